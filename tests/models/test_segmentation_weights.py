"""A segmentation model that a run saved whole is where the next one takes its backbone from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.segmentation.config import TimmSegmentationConfig

SPEC = InputSpec(3, 16, 16, (0.5,) * 3, (0.5,) * 3)
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def build(*, num_classes: int, seed: int, weights: Path | None = None) -> ModelBundle:
    config = TimmSegmentationConfig(
        architecture="vision_transformer", arguments=TINY, weights=str(weights) if weights else None
    )
    return config.build(num_classes=num_classes, input_spec=SPEC, seed=seed)


def test_the_backbone_is_taken_and_the_decoder_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = build(num_classes=6, seed=0).module.state_dict()
    path = tmp_path / "trained.safetensors"
    save_file(trained, path)
    other = build(num_classes=4, seed=1, weights=path).module.state_dict()
    backbone = [name for name in trained if name.startswith("backbone.")]
    assert len(backbone) > 20
    assert all(torch.equal(other[name], trained[name]) for name in backbone)
    assert other["decoder.classifier.1.weight"].shape[0] == 4
    assert capsys.readouterr().err == ""


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    trained = build(num_classes=6, seed=0).module.state_dict()
    del trained["backbone.blocks.1.mlp.fc1.weight"]
    path = tmp_path / "trained.safetensors"
    save_file(trained, path)
    with pytest.raises(ValueError, match=r"does not fit the model: 1 missing: blocks\.1\.mlp\.fc1\.weight"):
        build(num_classes=6, seed=0, weights=path)
