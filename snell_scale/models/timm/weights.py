"""Published weights for timm's models: told apart, renamed by timm's functions, loaded whole or not at all."""

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from snell_scale.interfaces import ModelBundle
from snell_scale.models.timm.npz import load_npz
from snell_scale.models.weight_files.fit import mismatches, refuse, without
from snell_scale.models.weight_files.reading import kind_of, read_weights

# The entry of a checkpoint that has the model; averaged weights first, as timm has it, and DINO's teacher.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "teacher",
    "target_encoder",
    "state_dict",
    "model",
    "module",
    "encoder",
)
_MOCO = "base_encoder."
# Of a whole segmentation model, as a run of this package saves it.
_SEGMENTATION_PARTS = frozenset({"backbone", "pyramid", "decoder", "auxiliary"})
_RENAMING_FAILED = (LookupError, AttributeError, RuntimeError, ValueError, TypeError)


@dataclass(frozen=True)
class Published:
    """Weights as a published file has them, without what is no part of the backbone.

    recipe: how they were trained, where the file tells: its statistics of the input are then known.
    left_out: what was not taken → number of tensors.
    """

    tensors: dict[str, Tensor]
    recipe: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def recipe_of(path: Path) -> str | None:
    """ "jax" (Google's .npz), "mae", "mocov3", "dino", "deit" where the file tells, else None."""
    if kind_of(path) == "npz":
        return "jax"
    return None if kind_of(path) == "safetensors" else _unwrap(read_weights(path), path).recipe


def load_timm_weights(bundle: ModelBundle, path: Path, *, keep_head: bool) -> None:
    """Copy the file's weights into the bundle's module; without its head unless asked for.

    Layouts: timm's own state dict; Google's .npz; and whatever timm's `checkpoint_filter_fn` of that model's file
    renames (Swin, ConvNeXt, EVA, CLIP's image tower, DINOv2, DINOv3, BEiT, …), below the usual wrappers
    ("model", "state_dict", …) and prefixes (DDP's, MoCo v3's base encoder, DINO's backbone), with MAE's decoder
    or another tower left out. What is resampled to another grid or left out is said on stderr.
    ValueError lists what does not fit: anything but the head.
    """
    if kind_of(path) == "npz":
        with _said(path):
            load_npz(bundle, path, keep_head=keep_head)
        return
    published = _unwrap(read_weights(path), path)
    if published.left_out:
        _say(path, ", ".join(f"{count} tensors of {what} left out" for what, count in published.left_out.items()))
    own = bundle.module.state_dict()
    saved = _renamed(bundle.module, published.tensors, path)
    _adapt_channels(bundle.module, saved, path)
    if not keep_head:
        own, saved = without(own, bundle.head_modules), without(saved, bundle.head_modules)
    problems = mismatches(own, saved)
    if problems:
        refuse(path, problems, own=own, saved=published.tensors, keep_head=keep_head)
    bundle.module.load_state_dict(saved, strict=False)


def _unwrap(content: Mapping[str, Any], path: Path) -> Published:
    """The backbone's tensors, by their names in the published code."""
    wrappers: list[str] = []
    while inner := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        wrappers.append(inner)
        content = content[inner]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"model.weights: {path} has no tensors under {' or '.join(_WRAPPERS)}, nor at its top, which holds "
            f"{', '.join(map(str, list(content)[:8])) or 'nothing'}; save the model's state_dict() instead"
        )
    tensors = _stripped(tensors)
    if any(name.startswith(_MOCO) for name in tensors):
        return _moco(tensors)
    if "teacher" in wrappers and any(name.startswith("backbone.") for name in tensors):
        return _part(tensors, "backbone.", recipe="dino", rest="the projection head")
    if {name.partition(".")[0] for name in tensors} <= _SEGMENTATION_PARTS:
        # Of a run of this project: every decoder is made anew, as every head is that is not kept.
        return Published(_part(tensors, "backbone.", recipe=None, rest="the decoder").tensors)
    if "decoder_embed.weight" in tensors:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder_")}
        kept.pop("mask_token", None)
        return Published(kept, "mae", {"the decoder": len(tensors) - len(kept)})
    return Published(tensors, _recipe(tensors, wrappers))


def _recipe(tensors: Mapping[str, Tensor], wrappers: list[str]) -> str | None:
    """A plain ViT under "model" is what DeiT's code writes, and MAE's, which is built on it."""
    plain = {"pos_embed", "cls_token", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.weight"} <= tensors.keys()
    if wrappers != ["model"] or not plain or any("rel_pos" in name for name in tensors):
        return None
    return "deit" if "head.weight" in tensors and "fc_norm.weight" not in tensors else "mae"


def _stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of DistributedDataParallel and torch.compile, where every name has them."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _moco(tensors: dict[str, Tensor]) -> Published:
    """MoCo v3's base encoder, as its linear evaluation takes it: its "head" is the projector (main_lincls.py)."""
    base = _part(tensors, _MOCO, recipe="mocov3", rest="the momentum encoder and the predictor")
    kept = without(base.tensors, ("head", "fc"))
    return Published(kept, "mocov3", {**base.left_out, "the projector": len(base.tensors) - len(kept)})


def _part(tensors: dict[str, Tensor], prefix: str, *, recipe: str | None, rest: str) -> Published:
    kept = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return Published(kept, recipe, {rest: len(tensors) - len(kept)})


def _renamed(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """By timm's own function for this family, which also resamples position embeddings to the module's grid."""
    rename = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return dict(tensors)
    # DeiT III's layer scale has names that this option alone turns into timm's.
    scaled = "adapt_layer_scale" in signature(rename).parameters and any(".gamma_1" in name for name in tensors)
    options = {"adapt_layer_scale": True} if scaled else {}
    try:
        # EVA's prints an exception for each bias that DINOv3 has and timm's model rightly has not.
        with _said(path), contextlib.redirect_stdout(io.StringIO()):
            renamed = dict(rename(dict(tensors), module, **options))
    except _RENAMING_FAILED as error:
        own = module.state_dict()
        problems = mismatches(own, tensors) or [f"timm could not rename its tensors ({error})"]
        refuse(path, problems, own=own, saved=tensors, keep_head=False)
    tables = [
        name
        for name, tensor in renamed.items()
        if re.search(r"rel(ative)?_pos", name) and name in tensors and tensor.shape != tensors[name].shape
    ]
    if tables:
        _say(
            path, f"{len(tables)} tables of relative positions resampled to the model's windows ({tables[0]}, …)"
        )
    return renamed


def _adapt_channels(module: nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    """The first convolution for another number of channels than the file's, as timm does it for its own."""
    from timm.models._manipulate import adapt_input_conv

    first = (getattr(module, "pretrained_cfg", None) or {}).get("first_conv")
    for name in [first] if isinstance(first, str) else list(first or ()):
        key, channels = f"{name}.weight", getattr(module, "in_chans", None)
        own = module.state_dict().get(key)
        if own is None or key not in saved or own.ndim != 4 or saved[key].ndim != 4:
            continue
        given = saved[key].shape[1]
        if given == 3 and given != own.shape[1] and (channels or own.shape[1]) == own.shape[1]:
            saved[key] = adapt_input_conv(own.shape[1], saved[key])
            _say(path, f"{key} made from {given} channels to {own.shape[1]}")


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """What timm logs of resampled embeddings inside reaches stderr."""
    logger = logging.getLogger("timm.layers")
    handler = _Sayer(path)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Sayer(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        _say(self._path, record.getMessage())


def _say(path: Path, text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"model.weights: {path}: {text}", file=sys.stderr)
