"""Checkpoints that are complete or absent: written aside by all ranks, fsynced, renamed, checked when read.

<root>/step-00000120/ holds common.pt (the same for every rank), rank-00000.pt … (each rank's own), what the
engine wrote (shards/…) and, written last, manifest.json: step, layout, bytes and SHA-256 of every file. A folder
that does not match its manifest is no checkpoint. Every rank must see the same <root>.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snell_scale.engines.shards import RankError
from snell_scale.interfaces import Ranks, ShardWriter
from snell_scale.records import sync_folder, write_json

_MANIFEST = "manifest.json"
_COMMON = "common.pt"
_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """A complete one, found on disk. own: of this rank; None where another number of ranks wrote it."""

    folder: Path
    step: int
    layout: dict[str, Any]
    common: dict[str, Any]
    own: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of a run. Every rank makes the same calls, in the same order."""

    def __init__(self, root: Path, ranks: Ranks, *, keep_last: int, asynchronous: bool = False) -> None:
        """asynchronous: a thread writes, over a group of its own, while the caller goes on."""
        self._root = root
        self._ranks = ranks
        self._saving_ranks = ranks.twin() if asynchronous else ranks
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._saving: Future[None] | None = None

    def save(
        self,
        step: int,
        write: ShardWriter,
        *,
        layout: Mapping[str, Any],
        common: dict[str, Any],
        own: dict[str, Any],
    ) -> None:
        """Write checkpoint `step`, then drop all but the newest `keep_last`.

        common, own: tensors and plain values, as they are now. layout: JSON values, with the "world_size".
        OSError, the same on every rank, where one cannot write; asynchronous: raised by the next call.
        """
        self.wait()
        contents = {_own_name(self._ranks.rank): _serialised(own)}
        if self._ranks.is_first:
            contents[_COMMON] = _serialised(common)
        manifest = {"step": step, "layout": dict(layout)}
        if self._asynchronous:
            self._saving = _in_background(lambda: self._save(manifest, write, contents))
        else:
            self._save(manifest, write, contents)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged ones are named on stderr and skipped."""
        self.wait()
        found = self._ranks.first(self._find_newest)
        if found is None:
            return None
        folder, manifest = found
        same_ranks = manifest["layout"]["world_size"] == self._ranks.world_size
        return Checkpoint(
            folder=folder,
            step=manifest["step"],
            layout=manifest["layout"],
            common=_loaded(folder / _COMMON),
            own=_loaded(folder / _own_name(self._ranks.rank)) if same_ranks else None,
        )

    def wait(self) -> None:
        """Until no save is under way; raises the error of the one that was."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """The last call."""
        self.wait()

    def _save(self, manifest: dict[str, Any], write: ShardWriter, contents: Mapping[str, memoryview]) -> None:
        ranks, step = self._saving_ranks, manifest["step"]
        aside = self._root / f".step-{step:08d}.partial"
        try:
            ranks.first(lambda: self._make_room(aside))
            files = self._write(aside, write, contents)
            ranks.first(lambda: self._complete(aside, {**manifest, "files": files}))
        except OSError as error:  # on every rank, if on one
            ranks.first(lambda: shutil.rmtree(aside, ignore_errors=True))
            rank = error.rank if isinstance(error, RankError) else 0
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self._root}: {error} (on rank {rank}). "
                "Earlier checkpoints are untouched; free space (or set output_dir elsewhere) and resume with "
                "--resume auto"
            ) from error

    def _make_room(self, aside: Path) -> None:
        for left_by_a_kill in self._root.glob(".step-*.partial"):
            shutil.rmtree(left_by_a_kill)
        aside.mkdir(parents=True)

    def _write(
        self, aside: Path, write: ShardWriter, contents: Mapping[str, memoryview]
    ) -> dict[str, dict[str, Any]]:
        """Write this rank's files; returns every rank's entries of the manifest, or raises on every rank."""
        ranks = self._saving_ranks
        problem: tuple[int, str] | None = None
        files: dict[str, dict[str, Any]] = {}
        try:
            # What may wait for the other ranks comes first: from here to the gathering no rank waits.
            paths = write(aside, ranks)
            for name, content in contents.items():
                _write_file(aside / name, content)
                paths.append(aside / name)
            files = {path.relative_to(aside).as_posix(): _describe(path) for path in paths}
        except RankError as error:
            problem = (error.rank, str(error))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            problem = (ranks.rank, str(error))
        reports = ranks.gather((problem, files))
        for problem, _ in reports:
            if problem is not None:
                raise RankError(*problem)
        return {name: entry for _, files in reports for name, entry in files.items()}

    def _complete(self, aside: Path, manifest: dict[str, Any]) -> None:
        write_json(aside / _MANIFEST, manifest)
        for folder in {(aside / name).parent for name in manifest["files"]} | {aside}:
            sync_folder(folder)
        final = self._root / f"step-{manifest['step']:08d}"
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():  # it stays readable until the new one is in its place
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(aside, final)
        sync_folder(self._root)
        shutil.rmtree(replaced, ignore_errors=True)
        self._drop_all_but_last(final)

    def _drop_all_but_last(self, newest: Path) -> None:
        """Of those before `newest`, complete ones are kept: a damaged one must not take a good one's place.

        Those after it were damaged when this run began, or it would have gone on from them.
        """
        folders = _newest_first(self._root)
        earlier = folders[folders.index(newest) + 1 :]
        complete = [folder for folder in earlier if find_damage(folder, read=False) is None]
        for folder in set(folders) - {newest, *complete[: self._keep_last - 1]}:
            shutil.rmtree(folder, ignore_errors=True)

    def _find_newest(self) -> tuple[Path, dict[str, Any]] | None:
        for folder in _newest_first(self._root):
            problem = find_damage(folder, beat=self._ranks.beat)
            if problem is None:
                return folder, _manifest(folder)
            print(f"skipping checkpoint {folder}: {problem}", file=sys.stderr)
        return None


def find_damage(folder: Path, *, read: bool = True, beat: Callable[[], None] = lambda: None) -> str | None:
    """What is wrong with a checkpoint, or None where it is complete and unchanged.

    read: compare the contents too, not only the sizes. beat: called before each file.
    """
    try:
        files = _manifest(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {_MANIFEST} is missing or damaged ({error!r})"
    for name, expected in files.items():
        path = folder / name
        beat()
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}: it is truncated or was changed"
            if read and _digest(path) != expected["sha256"]:
                return f"the SHA-256 of {name} does not match: it is corrupt"
        except OSError as error:
            return f"{name} is missing or cannot be read ({error})"
    return None


def _newest_first(root: Path) -> list[Path]:
    """Checkpoint folders, complete or not; one that was being replaced comes after what replaces it."""
    found = [(match, path) for path in root.glob("step-*") if (match := _FOLDER.fullmatch(path.name))]
    found.sort(key=lambda item: (int(item[0][1]), item[0][2] is None), reverse=True)
    return [path for _, path in found]


def _manifest(folder: Path) -> dict[str, Any]:
    """OSError, ValueError, KeyError or TypeError where it is not one that `Checkpoints` wrote."""
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    files = manifest["files"]
    needed = {_COMMON, *(_own_name(rank) for rank in range(manifest["layout"]["world_size"]))}
    if not isinstance(files, dict) or not needed <= set(files) or not isinstance(manifest["step"], int):
        raise ValueError(f"expected an integer step and the files {sorted(needed)}")
    if not all({"bytes", "sha256"} <= set(entry) for entry in files.values()):
        raise ValueError("expected the bytes and the sha256 of every file")
    return manifest


def _in_background(function: Callable[[], None]) -> Future[None]:
    done: Future[None] = Future()

    def work() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # raised again where the result is asked for
            done.set_exception(error)

    # A daemon: a run that ends for another reason does not wait for ranks that may be gone.
    threading.Thread(target=work, name="checkpoint", daemon=True).start()
    return done


def _own_name(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _serialised(content: dict[str, Any]) -> memoryview:
    """In memory first: the caller may change its tensors, and a full disk is then told as such."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def _loaded(path: Path) -> dict[str, Any]:
    # CPU first: every consumer copies into tensors that already live where they belong.
    return torch.load(path, map_location="cpu", weights_only=True)


def _write_file(path: Path, content: memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
