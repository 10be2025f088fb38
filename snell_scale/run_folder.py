"""Opening a run's folder: new, to be continued, or already finished; never two different runs in one."""

import contextlib
import fcntl
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from snell_scale import __version__
from snell_scale.config import Config, to_dict
from snell_scale.interfaces import Ranks
from snell_scale.records import Result, read_result

_OURS = ("config.yaml", "environment.json", "steps.jsonl", "result.json", "adapter", "checkpoints")
_OF_TRACKERS = ("tensorboard", "wandb")
# Results that stand: doing the same again ends the same way. What was interrupted or failed continues.
_FINAL = ("ok", "diverged", "oom")
# What may differ between a run and its continuation: what is written, or where it is computed.
_FREE_KEYS = ("checkpoint", "logging", "notes", "output_dir", "name", "engine")
_BOUND_KEYS = ("engine.precision", "engine.frozen_dtype")
_FITTED_KEY = "training.gradient_accumulation"


def check_same_everywhere(config: Config, ranks: Ranks) -> None:
    """ValueError on every rank where their configs or versions differ: each would train another model."""
    told = ranks.gather({**to_dict(config), "version of snell-scale": __version__})
    for rank, other in enumerate(told):
        differing = _compare(told[0], other, "")
        if differing:
            raise ValueError(
                f"rank {rank} was started with another config than rank 0, different in {', '.join(differing)}. "
                "Start all ranks with the same file, overrides and version"
            )


def find_finished(
    folder: Path,
    config: Config,
    *,
    resume: Literal["never", "auto"],
    overwrite: bool,
    world_size: int = 1,
    may_differ: Collection[str] = (),
) -> Result | None:
    """The result in `folder` if the run is finished and resume is "auto"; None if there is something to run.

    Out of memory is the end of a run on one engine, number of ranks and microbatch; on others it continues.
    may_differ: dotted keys in which a continuation may differ from what was begun, beside those it always may.
    ValueError if the folder holds another run, or any run while neither resume nor overwrite was asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder for the run; choose another name or output_dir")
    existing = [name for name in _OURS if (folder / name).exists()]
    if overwrite or not existing:
        return None
    if resume == "never":
        raise ValueError(
            f"{folder} already holds a run ({', '.join(existing)}); continue it with --resume auto, replace it "
            "with --overwrite, or set another name"
        )
    result = _standing(folder)
    if result is not None and result.predicted:
        raise ValueError(f"{folder} holds an estimate, and no run; delete it, or set another name")
    differing = _differences(folder, to_dict(config))
    fitted = any(key in may_differ for key in differing)
    differing = [key for key in differing if key not in may_differ]
    if differing:
        raise ValueError(
            f"{folder} holds a run with another config; it differs in {', '.join(differing)}. Undo that, "
            f"delete the folder, or set another name{_hint(differing)}"
        )
    if result is None:
        return None
    elsewhere = fitted or result.world_size != world_size or _engine_differs(folder, config)
    if result.status == "oom" and elsewhere:
        return None
    return result if result.status in _FINAL else None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder`, and keep other processes out of it; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {folder}; wait for it, or set another name"
            ) from None
        yield


def clear(folder: Path) -> None:
    """Drop what an earlier run left in the folder."""
    snapshots = [path.name for path in folder.glob("memory_snapshot*.pickle")]
    for name in (*_OURS, *_OF_TRACKERS, *snapshots):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _differences(folder: Path, wanted: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose recorded value is not the wanted one, and must be."""
    differing = _compare(_recorded(folder) or wanted, wanted, "")
    return [key for key in differing if key in _BOUND_KEYS or key.split(".")[0] not in _FREE_KEYS]


def _standing(folder: Path) -> Result | None:
    """The result in the folder; None without one, or where it is damaged."""
    if not (folder / "result.json").is_file():
        return None
    try:
        return read_result(folder)
    except ValueError as error:
        print(f"the run is done again from its last checkpoint: {error}", file=sys.stderr)
        return None


def _hint(differing: Collection[str]) -> str:
    return "; a run that was begun with --fit goes on with --fit" if differing == [_FITTED_KEY] else ""


def _engine_differs(folder: Path, config: Config) -> bool:
    recorded = _recorded(folder) or {}
    return recorded.get("engine") != to_dict(config)["engine"]


def _recorded(folder: Path) -> Mapping[str, Any] | None:
    """The config that the folder's run was started with; None without one."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {folder} to start over") from None
    if not isinstance(recorded, Mapping):
        raise ValueError(f"{path} is damaged (it holds no mapping); delete {folder} to start over")
    return recorded


def _compare(recorded: Any, wanted: Any, prefix: str) -> list[str]:
    if isinstance(recorded, Mapping) and isinstance(wanted, Mapping):
        keys = sorted(recorded.keys() | wanted.keys())
        return [
            name
            for key in keys
            for name in _compare(recorded.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if recorded == wanted else [prefix]
