"""What two processes do with checkpoints, for test_shards.py and test_checkpoint.py: they write, the tests read.

`start` runs every part below in one pair of processes; each part leaves its answers in answers-<rank>.json.
"""

import gc
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from snell_scale.engines.checkpoint import Checkpoints
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.shards import read_shards, shard_writer
from tests.spawned import WORLD_SIZE, run_ranks

ALONE = {"world_size": 1}
BOTH = {"world_size": WORLD_SIZE}
LARGE = 40_000  # bytes: more than any checkpoint of `whole_state` has beside it, more than _LIMIT allows
_LIMIT = 30_000
_DEADLINE_SECONDS = 120
_PLACEMENTS: dict[str, Placement] = {
    "rows": Shard(0), "uneven": Shard(0), "one row": Shard(0), "columns": Shard(1), "replicated": Replicate(),
}  # fmt: skip


def whole_state(seed: int) -> dict[str, Tensor]:
    """Every kind of tensor: those of `_PLACEMENTS` are sharded by two ranks, the others whole on each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "rows": normal(4, 3),
        "uneven": normal(5, 3),
        "one row": normal(1, 3),
        "columns": normal(3, 6).bfloat16(),
        "replicated": normal(2, 2),
        "optimizer.head.weight.step": torch.tensor(float(seed)),
        "float64": normal(3).double(),
        "int64": torch.arange(4) + 2**40 + seed,
        "bool": normal(7) > 0,
        "strided": normal(4, 6).T[::2],
        "empty": normal(0, 3),
    }


def start(folder: Path) -> list[dict[str, Any]]:
    """Run the parts; returns the answers of each rank."""
    alone = Checkpoints(folder / "alone", Ranks(), keep_last=2)
    save(alone, 1, whole_state(1), layout=ALONE, rank=0)
    run_ranks(_work, str(folder), seconds=_DEADLINE_SECONDS)
    return [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def save(
    checkpoints: Checkpoints, step: int, state: dict[str, Tensor], *, layout: dict[str, Any], rank: int
) -> None:
    checkpoints.save(
        step, shard_writer(state, staged=False), layout=layout, common={"step": step}, own={"rank": rank}
    )


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    store = dist.FileStore(str(root / "store"), WORLD_SIZE)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    ranks = Ranks(rank=rank, world_size=WORLD_SIZE, group=group)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    parts = (_round_trip, _from_one_rank, _asynchronous, _full_disk, _full_disk_asynchronous, _misfit, _damage)
    answers = {part.__name__: part(root, ranks, mesh) for part in parts}
    (root / f"answers-{rank}.json").write_text(json.dumps(answers))
    ranks.barrier()
    gc.collect()
    dist.destroy_process_group()


def _round_trip(root: Path, ranks: Ranks, mesh: DeviceMesh) -> dict[str, Any]:
    checkpoints = Checkpoints(root / "two", ranks, keep_last=2)
    for step in (1, 2, 3):
        save(checkpoints, step, _distributed(whole_state(step), mesh), layout=BOTH, rank=ranks.rank)
    found = checkpoints.newest()
    assert found is not None
    return {
        "step": found.step,
        "own": found.own,
        "common": found.common,
        "equal": _reads(found.folder, whole_state(3), ranks, mesh),
    }


def _from_one_rank(root: Path, ranks: Ranks, mesh: DeviceMesh) -> dict[str, Any]:
    found = Checkpoints(root / "alone", ranks, keep_last=2).newest()
    assert found is not None
    return {"own": found.own, "equal": _reads(found.folder, whole_state(1), ranks, mesh)}


def _asynchronous(root: Path, ranks: Ranks, mesh: DeviceMesh) -> dict[str, Any]:
    """Training changes everything, and talks over its own groups, while a thread writes."""
    checkpoints = Checkpoints(root / "async", ranks, keep_last=2, asynchronous=True)
    for step in (1, 2):
        live = _distributed(whole_state(step), mesh)
        common, own = {"tensor": torch.tensor(step)}, {"tensor": torch.tensor(ranks.rank)}
        write = shard_writer(live, staged=True)
        checkpoints.save(step, write, layout=BOTH, common=common, own=own)
        for tensor in (*live.values(), *common.values(), *own.values()):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(1)
        for _ in range(20):
            dist.all_reduce(torch.ones(1000))
            ranks.gather(step)
    checkpoints.close()
    found = checkpoints.newest()
    assert found is not None
    assert found.own is not None
    return {
        "step": found.step,
        "common": int(found.common["tensor"]),
        "own": int(found.own["tensor"]),
        "equal": _reads(found.folder, whole_state(2), ranks, mesh),
    }


def _full_disk(root: Path, ranks: Ranks, mesh: DeviceMesh) -> dict[str, Any]:
    """Of the second rank only: in a shard, in its own file; and in what the first rank alone writes."""
    checkpoints = Checkpoints(root / "full", ranks, keep_last=2)
    small, large = whole_state(1), _distributed({"rows": torch.ones(LARGE // 2)}, mesh)
    save(checkpoints, 1, _distributed(small, mesh), layout=BOTH, rank=ranks.rank)
    padding = torch.zeros(LARGE // 4)
    cases: dict[str, tuple[int, dict[str, Tensor], dict[str, Any]]] = {
        "shard": (1, large, {}),
        "own file": (1, small, {"own": {"padding": padding}}),
        "common file": (0, small, {"common": {"padding": padding}}),
        "manifest": (0, small, {"layout": {**BOTH, "padding": "x" * LARGE}}),
    }
    answers = {}
    for name, (full_rank, state, changes) in cases.items():
        parts: dict[str, Any] = {"layout": BOTH, "common": {}, "own": {}, **changes}
        message = ""
        with _disk_full_on(full_rank, ranks):
            try:
                checkpoints.save(2, shard_writer(state, staged=False), **parts)
            except OSError as error:
                message = str(error)
        answers[name] = {"message": message, "left": _names(root / "full", ranks), "newest": _step(checkpoints)}
    return answers


def _full_disk_asynchronous(root: Path, ranks: Ranks, mesh: DeviceMesh) -> dict[str, Any]:
    """The error comes with the next save, which is then not made; the one after it is."""
    checkpoints = Checkpoints(root / "full-async", ranks, keep_last=2, asynchronous=True)
    state = _distributed({"rows": torch.ones(LARGE // 2)}, mesh)
    message = ""
    with _disk_full_on(1, ranks):
        save(checkpoints, 1, state, layout=BOTH, rank=ranks.rank)
        try:
            save(checkpoints, 2, state, layout=BOTH, rank=ranks.rank)
        except OSError as error:
            message = str(error)
    save(checkpoints, 3, state, layout=BOTH, rank=ranks.rank)
    checkpoints.close()
    return {"message": message, "left": _names(root / "full-async", ranks)}


def _misfit(root: Path, ranks: Ranks, mesh: DeviceMesh) -> dict[str, str]:
    """What reading says where names are missing or shapes differ."""
    folder = root / "two" / "step-00000003"
    other = {f"new.{i}": torch.zeros(2) for i in range(5)}
    answers = {}
    for name, state in {"missing": other, "shape": {"rows": torch.zeros(4, 5)}}.items():
        try:
            read_shards(folder, _distributed(state, mesh), ranks)
        except ValueError as error:
            answers[name] = str(error)
    return answers


def _damage(root: Path, ranks: Ranks, mesh: DeviceMesh) -> int | None:
    """The newest one lacks the second rank's file, which the first rank finds."""
    checkpoints = Checkpoints(root / "damaged", ranks, keep_last=2)
    for step in (1, 2):
        save(checkpoints, step, {"rows": torch.ones(2)}, layout=BOTH, rank=ranks.rank)
    ranks.first(lambda: (root / "damaged" / "step-00000002" / "rank-00001.pt").unlink())
    return _step(checkpoints)


def _distributed(state: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    return {
        name: distribute_tensor(tensor, mesh, [_PLACEMENTS[name]]) if name in _PLACEMENTS else tensor.clone()
        for name, tensor in state.items()
    }


def _reads(folder: Path, expected: dict[str, Tensor], ranks: Ranks, mesh: DeviceMesh) -> dict[str, bool]:
    """By name: whether this rank's part is read, bit for bit, into tensors that were zero."""
    target = _distributed({name: torch.zeros_like(tensor) for name, tensor in expected.items()}, mesh)
    read_shards(folder, target, ranks)
    answer = {}
    for name, part in _distributed(expected, mesh).items():
        found = target[name]
        if isinstance(found, DTensor) and isinstance(part, DTensor):
            found, part = found.to_local(), part.to_local()
        answer[name] = torch.equal(found, part)
    return answer


@contextmanager
def _disk_full_on(full_rank: int, ranks: Ranks) -> Iterator[None]:
    """Files of that rank end at _LIMIT bytes: the kernel refuses the rest, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _names(root: Path, ranks: Ranks) -> list[str]:
    return ranks.first(lambda: sorted(path.name for path in root.iterdir()))


def _step(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.newest()
    return None if found is None else found.step
