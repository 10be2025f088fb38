"""Checkpoints that are complete or absent: written aside, fsynced, renamed, checked when read.

<run>/checkpoints/step-00000120/ holds state.pt (tensors and plain values; loads with weights_only=True) and
manifest.json (byte count and SHA-256 of state.pt). A folder without a matching manifest is no checkpoint.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from snell_scale.records import sync_folder, write_json

_STATE = "state.pt"
_MANIFEST = "manifest.json"


def save_checkpoint(root: Path, step: int, state: dict[str, Any], *, keep_last: int) -> Path:
    """Write checkpoint `step` below `root`, then drop all but the newest `keep_last` complete ones.

    OSError (disk full, no permission) leaves the earlier checkpoints untouched; its message says so.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    aside = root / f".step-{step:08d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        _write_state(aside, step, state)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} could not be written to {root}: {error}. Earlier checkpoints are "
            "untouched; free space (or set output_dir elsewhere) and resume with --resume auto"
        ) from error
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    sync_folder(root)
    for old in list_checkpoints(root)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest_checkpoint(root: Path) -> dict[str, Any] | None:
    """The state of the newest complete checkpoint; damaged ones are named on stderr and skipped."""
    for folder in reversed(list_checkpoints(root)):
        problem = find_damage(folder)
        if problem is None:
            # CPU first: every consumer copies into tensors that already live where they belong.
            return torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        print(f"skipping checkpoint {folder}: {problem}", file=sys.stderr)
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first, complete or not."""
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if it is complete and unchanged."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        expected_bytes, expected_digest = manifest["bytes"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {_MANIFEST} is missing or damaged ({error})"
    state = folder / _STATE
    if not state.is_file():
        return f"{_STATE} is missing"
    if state.stat().st_size != expected_bytes:
        return f"{_STATE} has {state.stat().st_size} bytes, expected {expected_bytes}: it is truncated"
    if _digest(state) != expected_digest:
        return f"the SHA-256 of {_STATE} does not match: it is corrupt"
    return None


def _write_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    path = folder / _STATE
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / _MANIFEST, {"step": step, "bytes": path.stat().st_size, "sha256": _digest(path)})


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
