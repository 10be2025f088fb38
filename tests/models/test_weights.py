"""Weight files: what is read, and how absent, cut, damaged and unsafe ones are refused."""

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snell_scale.models.timm.config import TimmConfig
from snell_scale.models.weight_files.reading import check_weights, npz_shapes, read_weights


class Code:
    """A class of somebody's training script: reading it back would import and run that script."""


def write(path: Path, kind: str) -> Path:
    tensors = {"a": torch.arange(100.0).view(10, 10), "b": torch.ones(3)}
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "npz":
        np.savez(path, a=tensors["a"].numpy(), b=tensors["b"].numpy())
    else:
        content = {"model": tensors, "args": argparse.Namespace(lr=0.1), "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


KINDS = {"safetensors": "w.safetensors", "npz": "w.npz", "zip": "w.pth.tar", "legacy": "w.pth"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_passes_and_gives_its_tensors(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / KINDS[kind], kind)
    check_weights(path, remedy="")
    if kind == "npz":
        assert npz_shapes(path) == {"a": (10, 10), "b": (3,)}
        return
    content = read_weights(path)
    tensors = content if kind == "safetensors" else content["model"]
    assert torch.equal(tensors["a"], torch.arange(100.0).view(10, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_refused_and_named(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / KINDS[kind], kind)
    whole = path.read_bytes()
    cuts = random.Random(0)
    for _ in range(40):
        path.write_bytes(whole[: cuts.randrange(len(whole))])
        with pytest.raises(ValueError, match=r"model.weights: .*/w\."):
            check_weights(path, remedy="")


@pytest.mark.parametrize("kind", ["npz", "zip"])
def test_a_flipped_bit_among_the_numbers_is_found(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / KINDS[kind], kind)
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(50).tobytes())] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged|Bad CRC"):
        check_weights(path, remedy="")


@pytest.mark.parametrize("content", [b"", b"hello", b"<html><body>404</body></html>", bytes(range(256))])
@pytest.mark.parametrize("name", KINDS.values())
def test_what_is_no_such_file_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no") as raised:
        check_weights(path, remedy="")
    assert "weights_only" not in str(raised.value)


def save_script_module(path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)


UNSAFE: dict[str, tuple[str, Any, str]] = {
    "a class": (
        "w.pth",
        lambda path: torch.save({"model": {}, "config": Code()}, path),
        "needs .*Code.*save_file",
    ),
    "a class, old": (
        "w.pth",
        lambda path: torch.save({"config": Code()}, path, _use_new_zipfile_serialization=False),
        "needs .*Code.*save_file",
    ),
    "a program": ("w.pt", save_script_module, "is a TorchScript archive, that is a program"),
    "objects": (
        "w.npz",
        lambda path: np.savez(path, a=np.array([{}], dtype=object)),
        "a.npy holds Python objects",
    ),
    "no dictionary": (
        "w.pth",
        lambda path: torch.save([torch.ones(2)], path),
        "holds a list, expected a dictionary",
    ),
    "a pointer": (
        "w.safetensors",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n", encoding="utf-8"),
        "is a Git LFS pointer",
    ),
    "another ending": (
        "w.h5",
        lambda path: path.write_bytes(b"x"),
        r"ends in none of \.npz, \.safetensors, \.pth",
    ),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_what_may_run_code_or_holds_no_weights_is_refused(what: str, tmp_path: Path) -> None:
    name, make, message = UNSAFE[what]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        check_weights(tmp_path / name, remedy="")


def test_the_same_file_is_looked_at_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "w.npz", "npz")
    check_weights(path, remedy="")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"w\.npz"):
        check_weights(path, remedy="")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pth")
    config = TimmConfig(architecture="vit_base_patch16_224", weights=str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match="has no tensors .*at its top, which holds epoch, lr"):
        config.preprocessing()
