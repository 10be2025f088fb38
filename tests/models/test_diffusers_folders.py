"""What a pipeline folder that is damaged, incomplete or of another kind says before anything is built from it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import edit, make_pipeline
from torch import Tensor

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.diffusers.config import DiffusersConfig

SIDE, WIDTH = 16, 24  # pixels, twice as many as the tiny VAE makes latents of them
PROMPT = "a photo of a red cat"
HALF = (0.5, 0.5, 0.5)


def build(folder: Path, **settings: Any) -> ModelBundle:
    config = DiffusersConfig.model_validate({"folder": str(folder), **settings})
    return config.build(num_classes=0, input_spec=InputSpec(3, SIDE, WIDTH, HALF, HALF), seed=0)


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    make_pipeline("sd", folder)
    return folder / "pipeline"


@pytest.fixture
def copied(sd_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "copied"))


def edit_weights(path: Path, change: Any) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_fingerprint_follows_the_files_of_the_encoders_alone(copied: Path, sd_folder: Path) -> None:
    def fingerprint() -> str:
        bundle = build(copied)
        assert bundle.diffusion is not None
        return bundle.diffusion.encoders.fingerprint

    original = build(sd_folder).diffusion
    assert original is not None
    assert fingerprint() == original.encoders.fingerprint
    edit_weights(copied / "unet/diffusion_pytorch_model.safetensors", lambda t: t["conv_in.bias"].add_(1))
    assert fingerprint() == original.encoders.fingerprint
    edit_weights(copied / "vae/diffusion_pytorch_model.safetensors", lambda t: t["encoder.conv_in.bias"].add_(1))
    assert fingerprint() != original.encoders.fingerprint


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", lambda t: t.pop("conv_in.bias"), "1 missing: conv_in.bias"),
        ("unet", lambda t: t.update(strange=torch.ones(1)), "1 unexpected: strange"),
        ("unet", lambda t: t.update({"conv_in.bias": torch.ones(3)}), "conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(
    part: str, change: Any, message: str, copied: Path
) -> None:
    edit_weights(copied / part / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        build(copied)


def test_encoders_with_missing_weights_are_refused(copied: Path) -> None:
    edit_weights(copied / "vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("encoder.conv_in.bias"))
    edit_weights(copied / "text_encoder/model.safetensors", lambda t: t.pop(min(t)))
    diffusion = build(copied).diffusion
    assert diffusion is not None
    with pytest.raises(ValueError, match="vae do not fit.*1 missing: encoder.conv_in.bias"):
        diffusion.encoders.encode_images(torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match="text_encoder do not fit.*1 missing"):
        diffusion.encoders.encode_prompts([""])


def test_a_cut_file_is_refused(copied: Path) -> None:
    path = copied / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        build(copied)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "KandinskyPipeline"},
            "of a KandinskyPipeline, expected one of Stable",
        ),
        ("model_index.json", {"tokenizer": ["own", "Tokenizer"]}, "tokenizer from 'own', expected transformers"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "of a UNet3DConditionModel, expected one"),
        ("unet/config.json", {"num_class_embeds": 4}, "num_class_embeds=4.*prompts alone"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type='image'"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused(
    file: str, changes: dict[str, Any], message: str, copied: Path
) -> None:
    edit(copied / file, **changes)
    with pytest.raises(ValueError, match=message):
        build(copied)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json"])
def test_a_file_that_is_missing_or_no_json_is_named(file: str, copied: Path) -> None:
    (copied / file).write_text("{")
    with pytest.raises(ValueError, match=f"{file} is no JSON"):
        build(copied)
    (copied / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        build(copied)


def test_absent_folders_and_unreachable_hubs_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no folder .*absent/folder/here"):
        build(Path("absent/folder/here"))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="some-body/no-such-pipeline is no folder here.*connect to the internet"):
        build(Path("some-body/no-such-pipeline"))


def test_a_hub_id_is_read_from_the_cache_without_a_network(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--some-body--tiny"
    commit = "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    shutil.copytree(sd_folder, cached / "snapshots" / commit)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    diffusion = build(Path("some-body/tiny")).diffusion
    assert diffusion is not None
    assert diffusion.encoders.encode_prompts([PROMPT])["encoder_hidden_states"].shape == (1, 16, 16)
