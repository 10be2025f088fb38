"""Weights of a CLIP from files in every published layout, how their images are normalised, and bad files."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from snell_scale.models.open_clip.config import OpenClipConfig
from snell_scale.models.weight_files.torchscript import read_torchscript
from tests.models.clip_cases import SMALL, SPEC, build, small

INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
QUICK = {**SMALL, "quick_gelu": True}


@pytest.fixture
def published() -> dict[str, Tensor]:
    """The state dict of open_clip's own model, other than that of any seed used here."""
    torch.manual_seed(7)
    return open_clip.CLIP(**SMALL).state_dict()


def loaded(path: Path, **settings: Any) -> dict[str, Tensor]:
    return build(weights=str(path), **settings).module.state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype).view_as(found[name])), name


def test_safetensors(tmp_path: Path, published: dict[str, Tensor]) -> None:
    save_file(published, tmp_path / "open_clip_model.safetensors")
    assert_equal(loaded(tmp_path / "open_clip_model.safetensors"), published)


@pytest.mark.parametrize("half", [False, True])
def test_a_state_dict_as_on_the_hub(tmp_path: Path, published: dict[str, Tensor], half: bool) -> None:
    content = {name: tensor.half() for name, tensor in published.items()} if half else published
    torch.save(content, tmp_path / "open_clip_pytorch_model.bin")
    found = loaded(tmp_path / "open_clip_pytorch_model.bin")
    assert_equal(found, content)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_a_checkpoint_of_open_clips_training(tmp_path: Path, published: dict[str, Tensor]) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in published.items()}
    optimizer = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"epoch": 3, "name": "x", "state_dict": wrapped, "optimizer": optimizer}, tmp_path / "epoch_3.pt")
    assert_equal(loaded(tmp_path / "epoch_3.pt"), published)


def test_a_text_tower_that_was_not_apart_once(tmp_path: Path, published: dict[str, Tensor]) -> None:
    save_file(published, tmp_path / "old.safetensors")
    found = loaded(tmp_path / "old.safetensors", arguments={**SMALL, "custom_text": True})
    assert torch.equal(found["text.text_projection"], published["text_projection"])


class Traced(nn.Module):
    """As OpenAI published: an archive with three numbers among the tensors."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, value in (("input_resolution", 8), ("context_length", 8), ("vocab_size", 64)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("attn_mask", cast(Any, clip).attn_mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * cast(Tensor, self.logit_scale)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    clip = open_clip.CLIP(**QUICK)
    for parameter in clip.visual.parameters():
        parameter.data = parameter.data.half()
    traced = torch.jit.trace(Traced(clip), torch.ones(1), check_trace=False)
    torch.jit.save(cast(torch.jit.ScriptModule, traced), tmp_path / "ViT-small.pt")
    return tmp_path / "ViT-small.pt"


def test_openais_archive_is_read_as_torch_reads_it(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.jit.load(archive).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)  # which would compile and could run what the archive holds
    assert_equal(read_torchscript(archive), dict(expected))
    found = loaded(archive, arguments=QUICK)
    numbers = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    assert_equal(found, {name: tensor for name, tensor in expected.items() if name not in numbers})


def test_openais_archive_has_quick_gelu(archive: Path) -> None:
    with pytest.raises(ValueError, match="was trained with QuickGELU, and custom has GELU"):
        loaded(archive)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


def with_pickle(archive: Path, content: bytes) -> Path:
    """The archive with its module data replaced."""
    other = archive.with_name("other.pt")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("/data.pkl") else old.read(name))
    return other


@pytest.mark.parametrize("layout", ["state dict", "archive"])
def test_code_in_a_file_is_not_run(
    archive: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "harmful.pt"
    if layout == "archive":
        path = with_pickle(archive, pickle.dumps(Harmful(), protocol=2))
    else:
        torch.save({"logit_scale": Harmful()}, path)
    with pytest.raises(ValueError, match="could run code|neither module nor tensor"):
        loaded(path, arguments=QUICK)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"cos\nsystem", b"\x80\x02(NtQ.", b"\x80\x02}.", b"\x80\x02X"])
def test_an_archive_of_anything_else_is_refused(archive: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"model\.weights: .*other\.pt is (no|a) TorchScript archive of"):
        read_torchscript(with_pickle(archive, content))


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "archive"])
def test_a_cut_file_is_refused(
    tmp_path: Path, published: dict[str, Tensor], archive: Path, name: str, keep: float
) -> None:
    path = archive if name == "archive" else tmp_path / name
    if path.suffix == ".safetensors":
        save_file(published, path)
    elif name != "archive":
        torch.save(published, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=f"{path.name}.* (not a complete|no complete|damaged)"):
        loaded(path, arguments=QUICK)


def test_an_absent_file_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*absent\.pt"):
        small(weights=str(tmp_path / "absent.pt")).check()


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path, published: dict[str, Tensor]) -> None:
    published["strange"] = published.pop("ln_final.bias")
    save_file(published, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: ln_final\.bias; 1 unexpected: strange"):
        loaded(tmp_path / "a.safetensors")


def test_weights_of_another_architecture_are_refused(tmp_path: Path, published: dict[str, Tensor]) -> None:
    save_file(published, tmp_path / "a.safetensors")
    wider = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "width": 64}}
    with pytest.raises(ValueError, match=r"of another shape: .*\(8, 32\) in the file, \(8, 64\) in the model"):
        loaded(tmp_path / "a.safetensors", arguments=wider)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        loaded(tmp_path / "list.pt")


def normalisation(**settings: Any) -> tuple[Any, Any]:
    image = OpenClipConfig(**settings).preprocessing().image
    assert image is not None
    return image.mean, image.std


def test_normalisation_follows_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    openai = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert normalisation(architecture="ViT-L-14") == openai  # random weights
    assert normalisation(architecture="ViT-L-14", weights="pretrained:laion2b_s32b_b82k") == INCEPTION
    # One published normalisation: no question which.
    assert normalisation(architecture="ViT-L-14-336-quickgelu", weights=str(path)) == openai
    with pytest.raises(ValueError, match=r"ViT-L-14 differ in how images are normalised.*model\.tag.*laion2b"):
        normalisation(architecture="ViT-L-14", weights=str(path))
    assert normalisation(architecture="ViT-L-14", weights=str(path), tag="laion2b_s32b_b82k") == INCEPTION
    config = {"model_cfg": {}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert normalisation(architecture="ViT-L-14", weights=str(path)) == ((0.1, 0.2, 0.3), (1, 1, 1))
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"open_clip_config\.json is no JSON"):
        normalisation(architecture="ViT-L-14", weights=str(path))


def test_the_activation_follows_the_weights(tmp_path: Path) -> None:
    """GELU and QuickGELU have equal tensors: nothing in a state dict tells them apart."""
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"ViT-H-14 differ in .* their activation.*model\.tag.*dfn5b"):
        normalisation(architecture="ViT-H-14", weights=str(path))
    with pytest.raises(ValueError, match=r"QuickGELU, and ViT-H-14 has GELU: set .*=ViT-H-14-quickgelu$"):
        normalisation(architecture="ViT-H-14", weights=str(path), tag="dfn5b")
    with pytest.raises(ValueError, match=r"QuickGELU, and ViT-L-14-336 has GELU: set .*=ViT-L-14-336-quickgelu$"):
        normalisation(architecture="ViT-L-14-336", weights=str(path))
    OpenClipConfig(architecture="roberta-ViT-B-32", weights=str(path), tag="laion2b_s12b_b32k").check()
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": {"embed_dim": 1024, "quick_gelu": True}}))
    with pytest.raises(ValueError, match=r"model.safetensors was trained with QuickGELU, and ViT-H-14 has GELU"):
        normalisation(architecture="ViT-H-14", weights=str(path))
    normalisation(architecture="ViT-H-14-quickgelu", weights=str(path))
    config.write_text(json.dumps({"model_cfg": {"embed_dim": 768}}))
    normalisation(architecture="ViT-L-14-336", weights=str(path))


def test_hub_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(cfg: Any) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(open_clip, "download_pretrained", absent)
    config = OpenClipConfig(architecture="ViT-S-32-alt", weights="pretrained:openai")
    with pytest.raises(ValueError, match="has no weights of ViT-S-32-alt"):
        config.check()
    config = OpenClipConfig(architecture="RN50-quickgelu", weights="pretrained:openai")
    image = config.preprocessing().image
    assert image is not None
    with pytest.raises(ValueError, match="RN50-quickgelu tagged 'openai' could not be fetched: no connection"):
        config.build(num_classes=0, input_spec=image, seed=0)


def test_hub_weights_are_loaded(
    tmp_path: Path, published: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's file, for an architecture that a test makes small."""
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "cached.safetensors"))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: SMALL)
    save_file(published, tmp_path / "cached.safetensors")
    config = OpenClipConfig(architecture="ViT-B-32", weights="pretrained:laion2b_e16")
    found = config.build(num_classes=0, input_spec=SPEC, seed=0).module.state_dict()
    assert_equal(found, published)
