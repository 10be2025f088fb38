"""configs/segmentation: every file is a valid config, and the published layouts run with their settings."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snell_scale import registry
from snell_scale.assembly import assemble
from snell_scale.compare import plan_study
from snell_scale.config import load_config

FOLDER = Path(__file__).parents[2] / "configs" / "segmentation"
SMALL_MODEL = [
    "model.architecture=vision_transformer",
    "model.arguments={patch_size: 16, embed_dim: 16, depth: 4, num_heads: 2}",
    "model.decoder=linear",
    "method.r=2",
]


@pytest.mark.parametrize("name", ["pretrain", "transfer", "ade20k", "kvasir"])
def test_the_files_are_valid(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml", config_class=registry.config_class)
    assert config.task.name == "segmentation"
    assert config.model.name == "timm_segmentation"


def test_kvasir_assembles_on_its_layout(tmp_path: Path) -> None:
    for index in range(20):
        for folder, values in (("images", np.zeros((40, 30, 3))), ("masks", np.eye(40, 30) * 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / folder / f"{index}.jpg")
    overrides = [f"data.root={tmp_path}", *SMALL_MODEL]
    config = load_config(FOLDER / "kvasir.yaml", overrides, config_class=registry.config_class)
    parts = assemble(config, world_size=1)
    assert parts.data.class_names == ("background", "polyp")
    assert parts.data.train[(0, 0)]["image"].shape == (3, 352, 352)
    sample = parts.data.test[(0, 0)]
    assert (sample["image"].shape, sample["mask"].shape) == ((3, 352, 352), (40, 30))


@pytest.mark.parametrize(("name", "number"), [("methods", 8), ("tuning", 16)])
def test_the_studies_compare_every_method_alike(name: str, number: int) -> None:
    runs = plan_study(
        [FOLDER / f"{name}.yaml"], grid={}, overrides=[], name="study", config_class=registry.config_class
    )
    assert len(runs) == number
    assert {run.config.method.name for run in runs} == {"lora", "snell", "snella", "full"}
    shared = {
        (run.config.training.steps, run.config.training.epochs, run.config.training.batch_size) for run in runs
    }
    assert len(shared) == 1
