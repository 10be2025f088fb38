"""Weight files of every published kind, read without running code that lies in them."""

import argparse
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

Kind = Literal["npz", "safetensors", "torch"]

# Archives of torch are written under every ending of these, MoCo's .pth.tar included.
_KINDS: dict[str, Kind] = {
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    ".tar": "torch",
    ".ckpt": "torch",
}
_REMEDY = "fetch or copy it again"
# What torch's reader raises on bytes that are no archive of its own, or not the whole of one.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)


def kind_of(path: Path) -> Kind:
    """How the file is read, by its ending; ValueError for an ending that no published weights have."""
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"model.weights: {path} ends in none of {', '.join(_KINDS)}; give a file that does")
    return kind


def check_weights(path: Path, *, remedy: str) -> None:
    """ValueError where the file is absent (then with `remedy`), cut, damaged, no weights, or holds code.

    Reads no more than that takes: headers of safetensors, checksums of zip archives, the whole of older archives.
    """
    if not path.is_file():
        raise ValueError(f"model.weights: there is no file {path} (looked for from {Path.cwd()}); {remedy}")
    kind_of(path)
    state = path.stat()
    _check_content(path, state.st_size, state.st_mtime_ns)


def read_weights(path: Path) -> dict[str, Any]:
    """What a safetensors file or an archive of torch holds: tensors by name, or nested in dictionaries.

    Tensors lie in the mapped file where its kind allows it: they cost memory when they are touched.
    ValueError names the file where it is damaged, or would need code to be run (`weights_only` is always on).
    """
    if kind_of(path) == "safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model.weights: {path} is not a complete safetensors file: {error}") from error
    try:
        # argparse.Namespace: plain values that many published training scripts save beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # guesses of torch's about bytes that are refused right after
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNREADABLE as error:
        raise ValueError(_why_unreadable(path, str(error))) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"model.weights: {path} holds a {type(content).__name__}, expected a dictionary of tensors; save the "
            "model's state_dict() instead"
        )
    return {str(key): value for key, value in content.items()}


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of the arrays in an .npz file, from their headers; ValueError where one needs pickle."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _header_2
                    shape, _, dtype = read(file)
                if dtype.hasobject:
                    raise ValueError(f"{entry} holds Python objects, which could run code when read")
                shapes[entry.removesuffix(".npy")] = shape
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"model.weights: {path} is not a complete .npz file: {error}; {_REMEDY}") from error
    if not shapes:
        raise ValueError(f"model.weights: {path} holds no arrays; {_REMEDY}")
    return shapes


def _header_2(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    return np.lib.format.read_array_header_2_0(file)


@lru_cache(maxsize=8)
def _check_content(path: Path, size: int, changed_ns: int) -> None:
    """Once for each state of a file: a run asks more than once."""
    del size, changed_ns  # the state that the answer is kept for
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git"):
            raise ValueError(f"model.weights: {path} is a Git LFS pointer, not the weights; run git lfs pull")
    kind = kind_of(path)
    if kind == "safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model.weights: {path} is not a complete safetensors file: {error}") from error
        return
    if kind == "npz":
        npz_shapes(path)
    else:
        read_weights(path)
    _check_sums(path)


def _check_sums(path: Path) -> None:
    """A flipped bit in the middle of a zip archive shows only in its checksums, which torch does not compare."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"model.weights: {path} is damaged: {error}; {_REMEDY}") from error
    if damaged:
        raise ValueError(f"model.weights: {path} is damaged in its entry {damaged}; {_REMEDY}")


def _why_unreadable(path: Path, message: str) -> str:
    if "TorchScript" in message:
        return (
            f"model.weights: {path} is a TorchScript archive, that is a program; give the weights alone (of "
            "OpenAI's CLIP: the same model's .safetensors or .bin from the hub)"
        )
    wanted = re.search(r"GLOBAL ([\w.]+)", message)
    if wanted:
        return (
            f"model.weights: {path} needs {wanted[1]}, a Python object that could run code when it is read; if "
            "you trust where it comes from, write its tensors to a .safetensors file once, with "
            "torch.load(FILE, weights_only=False) and safetensors.torch.save_file"
        )
    # torch's own advice at this place is to let the code run.
    reason = (
        "" if message.startswith("Weights only") else f" ({message.splitlines()[0][:200]})" if message else ""
    )
    return f"model.weights: {path} is no complete file of torch.save{reason}; {_REMEDY}"
