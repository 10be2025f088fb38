"""Tensors on disk, in safetensors files that are whole or absent and are mapped into memory when read."""

import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_STALE_SECONDS = 24 * 3600


class StoredTensors:
    """The tensors of a safetensors file, mapped into memory: what is not looked up is not read.

    Pickled, it is its path: the process that gets it maps the file anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, Tensor] | None = None

    def all(self) -> Mapping[str, Tensor]:
        if self._tensors is None:
            with safe_open(self.path, framework="pt") as file:
                names = file.keys()
                self._tensors = {name: file.get_tensor(name) for name in names}
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.all()[name]

    def __contains__(self, name: str) -> bool:
        return name in self.all()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_tensors": None}


def is_whole(file: Path) -> bool:
    """Whether the file is there and as it was written; a damaged one is named on stderr."""
    if not file.exists():
        return False
    try:
        with safe_open(file, framework="pt") as stored:
            names, written = stored.keys(), (stored.metadata() or {}).get("sha256")
            tensors = {name: stored.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        print(f"{file} is damaged ({error}): made again", file=sys.stderr)
        return False
    if written != _digest_of_tensors(tensors):
        print(f"{file} is damaged (its checksum is another): made again", file=sys.stderr)
        return False
    return True


def write_whole(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Aside, then renamed: who finds the file finds it whole, also where two runs write it at once."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    for old in file.parent.glob(f".{file.name}.*.partial"):
        if time.time() - old.stat().st_mtime > _STALE_SECONDS:  # of a run that was killed
            old.unlink(missing_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, aside, metadata={"format": "pt", "sha256": _digest_of_tensors(tensors)})
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
