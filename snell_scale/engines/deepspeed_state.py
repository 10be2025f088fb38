"""What a DeepSpeed run keeps: its checkpoints, in DeepSpeed's own format, and the loss scale of fp16."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snell_scale.interfaces import Ranks, ShardWriter

_FOLDER, _TAG = "deepspeed", "state"
_EXTRA = "extra.pt"
_OF_A_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def state_writer(engine: Any, extra: Mapping[str, Tensor]) -> ShardWriter:
    """engine: a deepspeed.DeepSpeedEngine. `extra` is whole and equal on every rank; rank 0 writes it."""

    def write(folder: Path, ranks: Ranks) -> list[Path]:
        root = folder / _FOLDER
        ranks.first(lambda: (root / _TAG).mkdir(parents=True))
        with _raised_at_the_end(engine.checkpoint_engine):
            engine.save_checkpoint(str(root), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and _writer_of(path) == ranks.rank]
        if ranks.is_first:
            torch.save({name: tensor.detach().cpu() for name, tensor in extra.items()}, folder / _EXTRA)
            files.append(folder / _EXTRA)
        for path in files:
            _sync(path)
        return files

    return write


@contextmanager
def _raised_at_the_end(checkpoint_engine: Any) -> Iterator[None]:
    """What its `save` raises in the block is raised after it: within, the other ranks wait for this one."""
    save = checkpoint_engine.save
    errors: list[OSError | RuntimeError] = []

    def save_or_keep_error(*arguments: Any, **settings: Any) -> None:
        try:
            save(*arguments, **settings)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            errors.append(error)

    checkpoint_engine.save = save_or_keep_error
    try:
        yield
    finally:
        del checkpoint_engine.save
    if errors:
        raise errors[0]


@torch.no_grad()
def load_state(engine: Any, folder: Path, extra: Mapping[str, Tensor]) -> None:
    """Into the engine and the tensors of `extra`, in place."""
    path, _ = engine.load_checkpoint(str(folder / _FOLDER), tag=_TAG, load_module_strict=False)
    if path is None:
        raise ValueError(f"{folder} holds no checkpoint that DeepSpeed can read")
    saved = torch.load(folder / _EXTRA, map_location="cpu", weights_only=True)
    for name, tensor in extra.items():
        tensor.copy_(saved[name])


@dataclass
class LossScale:
    """torch.amp.GradScaler's rule: halved when a gradient overflowed, doubled after 2000 steps without."""

    scale: float = 2.0**16
    good_steps: int = 0

    def update(self, *, overflow: bool) -> None:
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale /= 2
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]


def _writer_of(path: Path) -> int:
    """The rank that writes a file of DeepSpeed's; what names none is rank 0's."""
    of_a_rank = _OF_A_RANK.search(path.name)
    return int(of_a_rank.group(1)) if of_a_rank else 0


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
