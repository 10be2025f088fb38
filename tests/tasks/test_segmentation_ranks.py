"""Segmentation on two ranks is segmentation on one: sizes of all kinds, windows, ignored pixels and all."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from snell_scale import registry
from snell_scale.config import load_config
from snell_scale.records import read_result, read_steps
from snell_scale.run import run

CONFIG: dict[str, Any] = {
    "data": {
        "name": "mask_pairs",
        "mask_values": {"dark": [1], "light": [2]},
        "ignore_values": [9],
        "image_size": 16,
        "validation_fraction": 0.25,
        "test_fraction": 0.25,
        "evaluation_resize": "none",
    },
    "task": {
        "name": "segmentation",
        "inference": "sliding",
        "windows_per_forward": 1,
        "dice_weight": 0.5,
        "scales": [1.0, 1.5],
        "flip": True,
    },
    "model": {
        "name": "timm_segmentation",
        "architecture": "vision_transformer",
        "arguments": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    },
    "method": {"name": "lora", "r": 2, "targets": "all"},
    "training": {"steps": 4, "batch_size": 4, "lr": 5e-3, "weight_decay": 0.0},
    "evaluation": {"every_steps": 4, "batch_size": 2},
    "logging": {"every_steps": 1, "memory_at_step": None, "warmup_steps": 0},
}


def photographs(root: Path, number: int = 20) -> Path:
    """Light and dark halves, in sizes of their own: every image has another number of windows."""
    rng = np.random.default_rng(0)
    for index in range(number):
        height, width = 12 + 3 * index, 40 - index
        mask = np.where(np.arange(width) < rng.integers(5, 15), 1, 2) * np.ones((height, 1))
        image = (70 * mask[..., None] + rng.integers(0, 60, (height, width, 3))).astype(np.uint8)
        mask[: rng.integers(0, 8)] = 9
        for folder, values in (("images", image), ("masks", mask.astype(np.uint8))):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / folder / f"{index}.png")
    return root


def write_config(folder: Path, data: Path, name: str, engine: dict[str, Any]) -> Path:
    content = {
        **CONFIG,
        "extends": str(Path(__file__).parents[2] / "configs" / "defaults.yaml"),
        "name": name,
        "output_dir": str(folder / "runs"),
        "data": {**CONFIG["data"], "root": str(data)},
        "engine": {"device": "cpu", "precision": "fp32", "cpu_threads": 1, **engine},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_ranks_train_and_evaluate_as_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = photographs(tmp_path / "data")
    alone = write_config(tmp_path, data, "single", {"name": "single"})
    run(load_config(alone, config_class=registry.config_class), quiet=True)
    engines = [{"name": "ddp"}, {"name": "fsdp2"}]
    files = [str(write_config(tmp_path, data, engine["name"], engine)) for engine in engines]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--module", "tests.engines.equality_worker", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "runs"
    expected, losses = read_result(folder / "single"), losses_of(folder / "single")
    assert len(losses) == 4
    for name in ("ddp", "fsdp2"):
        result = read_result(folder / name)
        assert (result.status, result.world_size) == ("ok", 2)
        # float32 sums in another order, through four steps of Adam (as tests/engines/test_equality.py)
        assert losses_of(folder / name) == pytest.approx(losses, abs=2e-5)
        for split in ("validation", "test"):
            assert result.metrics[split].keys() == expected.metrics[split].keys()
            for metric, value in expected.metrics[split].items():
                # A pixel that two classes tie for may fall to the other: 0.1 % of the few thousand there are.
                assert result.metrics[split][metric] == pytest.approx(value, abs=0.1), metric
        assert (folder / name / "pictures" / "predictions.png").is_file()


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_steps(folder) if "split" not in line]
