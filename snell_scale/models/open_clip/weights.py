"""Weights of a CLIP from a file or open_clip's hub, as tensors alone: no code that a file holds is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from snell_scale.models.open_clip.settings import check_activation, import_open_clip
from snell_scale.models.weight_files.fit import mismatches
from snell_scale.models.weight_files.reading import check_weights, read_weights
from snell_scale.models.weight_files.torchscript import is_torchscript, read_torchscript

_OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")


def check_file(path: Path) -> None:
    """ValueError where there is no such file, or it is cut, damaged, or holds code."""
    if not path.is_file() or not is_torchscript(path):
        check_weights(
            path, remedy="give a .safetensors, .pt or .bin file, 'pretrained:<tag>', or null for random weights"
        )


def hub_file(architecture: str, tag: str) -> Path:
    """The file of published weights, fetched unless the cache has it; ValueError where neither is possible."""
    open_clip = import_open_clip()
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, tag)))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model.weights: {architecture} tagged {tag!r} could not be fetched: {error}; connect to the "
            "internet, or give a local file"
        ) from error


def load_weights(module: nn.Module, path: Path, *, architecture: str, quick_gelu: bool) -> None:
    """Copy a whole state dict in. ValueError lists what is missing, unexpected or of another shape.

    Read are safetensors, state dicts, open_clip's training checkpoints, and OpenAI's archives, whose models have
    QuickGELU.
    """
    if is_torchscript(path):
        check_activation(architecture, f"{path} (OpenAI's)", wanted=True, quick_gelu=quick_gelu)
        content: Mapping[str, Any] = read_torchscript(path)
    else:
        content = read_weights(path)
    saved = _as_open_clip(module, _tensors(content, path))
    problems = mismatches(module.state_dict(), saved)
    if problems:
        raise ValueError(f"model.weights: {path} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(saved)


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    saved = content.get("state_dict", content)
    others = [name for name, value in saved.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"model.weights: {path} has {', '.join(map(str, others[:5]))} beside tensors; expected a CLIP's "
            "state dict, or one under 'state_dict', as open_clip's training saves it"
        )
    return dict(saved)


def _as_open_clip(module: nn.Module, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes as open_clip's model has them now: of wrapped modules and of earlier releases."""
    from open_clip import convert
    from open_clip.model import convert_to_custom_text_state_dict

    if saved and all(name.startswith("module.") for name in saved):
        saved = {name.removeprefix("module."): tensor for name, tensor in saved.items()}
    saved = convert.convert_state_dict(cast(Any, module), saved)
    if hasattr(module, "text"):
        saved = convert_to_custom_text_state_dict(saved)
    unsaved = {name for name, _ in module.named_buffers()} - module.state_dict().keys()
    saved = {name: tensor for name, tensor in saved.items() if name not in (*unsaved, *_OPENAI_NUMBERS)}
    for name in ("logit_scale", "logit_bias"):
        own = getattr(module, name, None)
        if own is not None and name in saved and saved[name].numel() == 1:
            saved[name] = saved[name].reshape(own.shape)
    return saved
