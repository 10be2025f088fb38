"""The file of methods without peft: what does not fit or is damaged is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from snell_scale.tuners.methods.trained_file import load_trained
from tests.tuners.methods.tiny_training import apply, save, train, vit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle = vit()
    tuner = apply("gps", bundle)
    train(tuner, bundle, steps=1)
    save(tuner, tmp_path)
    return tmp_path


def test_loading_returns_the_settings(folder: Path) -> None:
    settings = load_trained(vit().module, folder)
    assert (settings["name"], settings["per_neuron"]) == ("gps", 1)


def test_full_fine_tuning_writes_weights_that_a_model_starts_from(tmp_path: Path) -> None:
    bundle = vit()
    tuner = apply("full", bundle)
    train(tuner, bundle)
    save(tuner, tmp_path)
    saved = load_file(tmp_path / "trained.safetensors")
    assert saved.keys() == bundle.module.state_dict().keys()


def test_an_empty_folder_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not hold trained.safetensors"):
        load_trained(vit().module, tmp_path)


def test_a_cut_file_is_damaged(folder: Path) -> None:
    path = folder / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        load_trained(vit().module, folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("fc.weight", torch.zeros(3)),
        ("head.bias", torch.zeros(4)),
        ("blocks.0.mlp.fc1.weight#indices", torch.tensor([10**6], dtype=torch.int32)),
    ],
)
def test_tensors_of_another_model_are_refused_before_any_is_loaded(
    folder: Path, name: str, tensor: torch.Tensor
) -> None:
    content = load_file(folder / "trained.safetensors")
    save_file({**content, name: tensor}, folder / "trained.safetensors")
    module = vit().module
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model"):
        load_trained(module, folder)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
