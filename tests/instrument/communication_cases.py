"""Collectives and training steps of known size, counted on two processes; every count is written as JSON."""

import gc
import json
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _get_current_dispatch_mode

from snell_scale.instrument.communication import CommunicationCounter
from snell_scale.instrument.memory import MemoryProbe
from tests.spawned import WORLD_SIZE, set_rank

NUM_FLOATS = 10
WIDTH = 8
EVEN, ODD = 4, 5  # rows of the trainable layers: ODD ones do not divide among two ranks
_NUM_WARMUP_STEPS = 2
_NUM_STEPS = 4
_DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def run(rank: int, folder: Path, port: int) -> None:
    """One of two processes: counts everything below into <folder>/<rank>.json."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    set_rank(rank, WORLD_SIZE, port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {
        "raw": _count_raw_calls(),
        "uncounted": _send_and_receive(),
        "steps": _count_steps(),
        "uncounted losses": [_losses(nullcontext(), name) for name in ("ddp", "fsdp2")],
        "counted losses": [_losses(CommunicationCounter(), name) for name in ("ddp", "fsdp2")],
        "nested": {name: _nest(name) for name in ("ddp", "fsdp2")},
        "modes left": _get_current_dispatch_mode() is not None,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    gc.collect()  # gloo's threads abort a process whose collectives' tensors outlive the group
    dist.barrier()
    dist.destroy_process_group()


def _count_raw_calls() -> dict[str, Any]:
    control = dist.new_group(backend="gloo")
    alone = [dist.new_group([rank]) for rank in range(WORLD_SIZE)][dist.get_rank()]
    assert isinstance(control, dist.ProcessGroup)
    assert isinstance(alone, dist.ProcessGroup)
    found = {}
    for name, call in _raw_calls(control, alone).items():
        with CommunicationCounter(control) as counter:
            call()
        found[name] = counter.report()
    return found


def _raw_calls(control: dist.ProcessGroup, alone: dist.ProcessGroup) -> dict[str, Callable[[], Any]]:
    ten, two = torch.ones(NUM_FLOATS), [torch.ones(NUM_FLOATS) for _ in range(WORLD_SIZE)]
    two_at_root = two if dist.get_rank() == 0 else None
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    partial_sum = DTensor.from_local(ten.clone(), mesh, [Partial()])
    sharded = DTensor.from_local(ten.clone(), mesh, [Shard(0)])
    return {
        "all_reduce": lambda: dist.all_reduce(ten),
        "all_reduce, bf16, async": _all_reduce_later,
        "all_reduce of 3 and 4, coalesced": _all_reduce_together,
        "all_gather into a list": lambda: dist.all_gather(two, ten),
        "all_gather into a tensor": lambda: dist.all_gather_into_tensor(torch.cat(two), ten),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.ones(NUM_FLOATS // WORLD_SIZE), ten),
        "reduce_scatter of a list": lambda: dist.reduce_scatter(ten, two),
        "broadcast": lambda: dist.broadcast(ten, src=0),
        "reduce": lambda: dist.reduce(ten, dst=0),
        "all_to_all": lambda: dist.all_to_all_single(torch.ones(NUM_FLOATS), ten),
        "gather": lambda: dist.gather(ten, two_at_root),
        "scatter": lambda: dist.scatter(ten, two_at_root),
        "a group of one": lambda: dist.all_reduce(ten, group=alone),
        "DTensor partial to replicated": lambda: (
            partial_sum.redistribute(placements=[Replicate()]).to_local() + 0
        ),
        "DTensor partial to sharded": lambda: partial_sum.redistribute(placements=[Shard(0)]).to_local() + 0,
        "DTensor sharded to whole": sharded.full_tensor,
        "DTensor operator": lambda: torch.relu(partial_sum),  # it sums before it cuts off
        "a thread of autograd": lambda: _Deep.apply(torch.ones(NUM_FLOATS).requires_grad_(), 80).backward(ten),
        "barrier": dist.barrier,
        "objects on the control group": lambda: dist.all_gather_object([None] * WORLD_SIZE, "x", group=control),
        "all_reduce on the control group": lambda: dist.all_reduce(ten, group=control),
    }


def _all_reduce_later() -> None:
    work = dist.all_reduce(torch.ones(NUM_FLOATS, dtype=torch.bfloat16), async_op=True)
    assert work is not None
    work.wait()


def _all_reduce_together() -> None:
    with dist._coalescing_manager():
        dist.all_reduce(torch.ones(3))
        dist.all_reduce(torch.ones(4))


def _send_and_receive() -> dict[str, Any]:
    """What the counter says of operations that it does not know."""
    with CommunicationCounter() as counter:
        (dist.send if dist.get_rank() == 0 else dist.recv)(torch.ones(NUM_FLOATS), 1 - dist.get_rank())
    return counter.report()


class _Deep(torch.autograd.Function):
    """Backward inside backward: below a depth of 60 autograd goes on in a thread of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int) -> Tensor:
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (dy,) = grad_outputs
        if ctx.depth == 0:
            assert threading.get_ident() != threading.main_thread().ident
            dist.all_reduce(dy.clone())
        else:
            with torch.enable_grad():
                _Deep.apply(dy.detach().clone().requires_grad_(), ctx.depth - 1).backward(dy)
        return dy, None


def make_model(num_rows: int = EVEN, *, num_frozen: int = 1) -> nn.Sequential:
    """Two blocks: frozen WIDTH x WIDTH layers, a trainable one to `num_rows`, a frozen one back to WIDTH."""
    torch.manual_seed(0)
    blocks = []
    for _ in range(2):
        frozen = [nn.Linear(WIDTH, WIDTH) for _ in range(num_frozen)]
        block = nn.Sequential(*frozen, nn.Linear(WIDTH, num_rows), nn.Linear(num_rows, WIDTH))
        for layer in [*frozen, block[-1]]:
            layer.requires_grad_(False)
        blocks.append(block)
    return nn.Sequential(*blocks)


class _Training:
    """One model under DDP or FSDP2; call it for a step, which returns the loss."""

    def __init__(self, engine: str, num_rows: int = EVEN, num_frozen: int = 1) -> None:
        self.module: nn.Module = make_model(num_rows, num_frozen=num_frozen)
        if engine == "fsdp2":
            for block in self.module.children():
                fully_shard(block)
            fully_shard(self.module)
        self.forward = DistributedDataParallel(self.module) if engine == "ddp" else self.module
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable)

    def __call__(self, phase: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> float:
        with phase("forward"):
            loss = self.forward(_batch()).square().mean()
        with phase("backward"):
            loss.backward()
        with phase("step"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


class _DeepSpeedTraining:
    """One model under ZeRO; call it for a step."""

    def __init__(self, stage: int, num_frozen: int = 1) -> None:
        import deepspeed  # here: DS_ACCELERATOR must be set before

        zero = {
            "stage": stage,
            # Else small weights, kept or fetched ahead, do not travel as large ones do.
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
        }
        model = make_model(num_frozen=num_frozen)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        config = {**_DEEPSPEED, "zero_optimization": zero}
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def __call__(self) -> None:
        self.engine.backward(self.engine(_batch()).square().mean())
        self.engine.step()


def _batch() -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(4, WIDTH, generator=generator)


def _count_steps() -> dict[str, Any]:
    """One step of each, after warm-up: DDP arranges its buckets anew in its second step, and tells the ranks."""
    trainings: dict[str, Callable[[], Callable[[], Any]]] = {
        "ddp": partial(_Training, "ddp"),
        "fsdp2, 1 frozen": partial(_Training, "fsdp2"),
        "fsdp2, 2 frozen": partial(_Training, "fsdp2", num_frozen=2),
        "fsdp2, odd rows": partial(_Training, "fsdp2", num_rows=ODD),
        "zero-2": partial(_DeepSpeedTraining, 2),
        "zero-3, 1 frozen": partial(_DeepSpeedTraining, 3),
        "zero-3, 2 frozen": partial(_DeepSpeedTraining, 3, num_frozen=2),
    }
    found = {}
    for name, make in trainings.items():
        step = make()
        for _ in range(_NUM_WARMUP_STEPS):
            step()
        with CommunicationCounter() as counter:
            step()
        found[name] = counter.report()
    return found


def _losses(watch: AbstractContextManager[Any], engine: str) -> list[float]:
    training = _Training(engine)
    with watch:
        return [training() for _ in range(_NUM_STEPS)]


def _nest(engine: str) -> dict[str, Any]:
    """What counter and probe report of one step, each alone and one inside the other."""
    training = _Training(engine)
    found: dict[str, Any] = {}
    for _ in range(_NUM_WARMUP_STEPS):
        training()
    for order in ("alone", "probe inside", "counter inside"):
        counter, probe = CommunicationCounter(), MemoryProbe(training.module, training.optimizer)
        if order == "alone":
            with counter:
                training()
            with probe:
                training(probe.phase)
        elif order == "probe inside":
            with counter, probe:
                training(probe.phase)
        else:
            with probe, counter:
                training(probe.phase)
        found[order] = {"communication": counter.report(), "memory": probe.report()["phases"]}
    return found
