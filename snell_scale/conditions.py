"""The conditions of a run that a fair comparison holds constant, for its record."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from snell_scale.config import Config
from snell_scale.instrument.environment import cpu_model

# Keys of `data:` that say where the data lie on this machine.
_FOLDERS = ("root", "instance_folder", "class_folder")
_FILES = ("source", "train", "validation", "test")


def conditions_of(
    config: Config,
    *,
    world_size: int,
    device: torch.device | None = None,
    image_size: Sequence[int] | None = None,
) -> dict[str, Any]:
    """`Result.conditions`; what is not known (yet) is absent, and "weights" is null where they are random.

    device: where this rank computes; without it hardware, allocator and num_threads stay absent. image_size:
    (height, width) in pixels.
    """
    training = config.training
    parts = training.gradient_accumulation * world_size
    known = {
        "microbatch_size": training.batch_size // parts if training.batch_size % parts == 0 else None,
        "gradient_accumulation": training.gradient_accumulation,
        "activation_checkpointing": training.activation_checkpointing,
        "frozen_dtype": config.engine.frozen_dtype,
        "optimizer": "adamw",
        "compile": training.compile,
        "deterministic": training.deterministic,
        "ema_decay": training.ema_decay,
        "fused_attention": _is_attention_fused(),
        "data_seed": config.data_seed,
        "data": _digest(config.data.model_dump(mode="json")),
        "image_size": None if image_size is None else list(image_size),
        **({} if device is None else _of_device(device)),
    }
    weights = getattr(config.model, "weights", None)
    return {
        **{name: value for name, value in known.items() if value is not None},
        "weights": None if weights is None else Path(weights).name,
    }


def _is_attention_fused() -> bool:
    """Whether timm's attention leaves out its matrices, as TIMM_FUSED_ATTN says: without that, memory is higher.

    Asked of timm, which reads the variable when it is imported: a later change of it changes no model.
    """
    from timm.layers import use_fused_attn  # seconds of import that readers of this module should not wait for

    return use_fused_attn()


def _digest(section: Mapping[str, Any]) -> str:
    """Of the config's data without where they lie: equal on every machine that has the same data."""
    kept = {key: value for key, value in section.items() if key not in _FOLDERS}
    if "root" not in section:  # what is below a root says which data they are
        kept |= {key: _names(kept[key]) for key in _FILES if key in kept}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _names(paths: str | Sequence[str] | None) -> Any:
    if paths is None or isinstance(paths, str):
        return paths and Path(paths).name
    return [Path(path).name for path in paths]


def _of_device(device: torch.device) -> dict[str, Any]:
    is_cuda = device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(device) if is_cuda else cpu_model(),
        "allocator": _cuda_allocator() if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
    }


def _cuda_allocator() -> str:
    """torch's own ("native", "expandable_segments") or CUDA's ("cudaMallocAsync"), then what else was set."""
    text = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    settings = [setting.strip().partition(":") for setting in text.split(",") if setting.strip()]
    values = {name.strip(): value.strip() for name, _, value in settings}
    kind = values.pop("backend", "native")
    if values.pop("expandable_segments", "").lower() == "true" and kind == "native":
        kind = "expandable_segments"
    return " ".join([kind, *(f"{name}:{value}" for name, value in sorted(values.items()))])
