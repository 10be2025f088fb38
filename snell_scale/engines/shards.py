"""Tensors in files, each rank writing its own part; read back by any number of ranks, sharded or whole.

torch.distributed.checkpoint writes and reshards. Its index, `.metadata`, is a pickle: read only what you wrote.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from snell_scale.interfaces import Ranks, ShardWriter

_FOLDER = "shards"
_INDEX = ".metadata"
_NUM_NAMED = 3

# A process alone is the ordinary case here, and it is asked for by name (no_dist).
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class RankError(OSError):
    """A file that could not be written or read on `rank`; every rank raises it."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def shard_writer(state: Mapping[str, Tensor], *, staged: bool) -> ShardWriter:
    """A function that writes `state` into <folder>/shards, fsynced, and returns this rank's files.

    state: plain tensors, equal on every rank and written once, or DTensors, written where they are. staged: the
    function writes copies on the host, taken now. It raises RankError, on every rank, where a file cannot be
    written.
    """
    local = {name: _local(tensor) for name, tensor in state.items()}
    if staged:
        local = {name: tensor.to("cpu", copy=True) for name, tensor in local.items()}

    def write(folder: Path, ranks: Ranks) -> list[Path]:
        shards = folder / _FOLDER
        with _plain_errors():
            dcp.save(
                dict(state),
                storage_writer=_Writer(shards),
                planner=_SavePlanner(local),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
        index = [shards / _INDEX] if ranks.is_first else []
        return sorted(shards.glob(f"__{ranks.rank}_*")) + index

    return write


def read_shards(folder: Path, state: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill the tensors of `state`, in place, from what any number of ranks wrote into <folder>/shards.

    ValueError where a name is missing or has another shape; names that `state` does not ask for are left alone.
    """
    reader = dcp.FileSystemReader(folder / _FOLDER)
    _check_fit(folder, reader.read_metadata(), state)
    with _plain_errors():
        dcp.load(
            dict(state),
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )


class _Writer(dcp.FileSystemWriter):
    """Says why a write failed: torch.save tells only that, and what it answered is lost between ranks."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _SavePlanner(DefaultSavePlanner):
    """Plans from the live tensors' shapes and placements, and writes the given local parts instead of them."""

    def __init__(self, local: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local_parts = local

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._local_parts[index.fqn]


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _plain_errors() -> Iterator[None]:
    """CheckpointException, which no `except Exception` sees, as the error of the first rank that failed."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if not isinstance(cause, (OSError, RuntimeError)):
            raise cause from error
        raise RankError(rank, str(cause)) from error


def _check_fit(folder: Path, index: Metadata, state: Mapping[str, Tensor]) -> None:
    found = {
        name: tuple(entry.size)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    missing = [name for name in state if name not in found]
    other = [
        f"{name} is {found[name]} there and {tuple(tensor.shape)} here"
        for name, tensor in state.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    if not missing and not other:
        return
    problems = [f"it lacks {len(missing)} tensor(s) ({_some(missing)})"] if missing else []
    problems += [f"{len(other)} tensor(s) have another shape ({_some(other)})"] if other else []
    raise ValueError(
        f"the checkpoint {folder} does not fit this run: {'; '.join(problems)}. It was written with another "
        "model, method or optimizer; continue with the config it was written with, or start anew with --overwrite"
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NUM_NAMED]) + (", …" if len(names) > _NUM_NAMED else "")
