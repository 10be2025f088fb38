"""What each of two processes does and sees under FSDP2, written to a file for the assertions."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from snell_scale.engines.ddp import DdpConfig
from snell_scale.engines.fsdp2 import Fsdp2Config
from snell_scale.engines.ranks import Ranks
from snell_scale.interfaces import Engine
from tests.engines.fsdp2_cases import CASES, STEPS, make_batch, set_up, train, train_batch_norm
from tests.spawned import WORLD_SIZE, set_rank

SECONDS = 240
GRID_SIZE = 4
HARD_CASE = "snell clipped, accumulated"
RESUMED_CASE = "snella clipped, accumulated"
FIRST_STEPS, OTHER_STEPS = STEPS[:3], STEPS[3:]


def run(rank: int, port: int, folder: Path) -> None:
    """The whole life of one process; writes rank<n>.pt."""
    set_rank(rank, WORLD_SIZE, port)
    with Fsdp2Config(device="cpu", cpu_threads=1, timeout_seconds=SECONDS).join() as ranks:
        torch.save(_observe(ranks, folder / "checkpoint"), folder / f"rank{rank}.pt")


def run_grid(rank: int, port: int, folder: Path) -> None:
    """One process of four: two replicas of the model, each in two parts. Writes grid<n>.pt."""
    set_rank(rank, GRID_SIZE, port)
    with Fsdp2Config(device="cpu", cpu_threads=1, timeout_seconds=SECONDS).join() as ranks:
        told = {name: train(_engine(ranks, replicas=2), CASES[name]) for name in (HARD_CASE, RESUMED_CASE)}
        torch.save(told, folder / f"grid{rank}.pt")


def _observe(ranks: Ranks, checkpoint: Path) -> dict[str, Any]:
    hard, resumed = CASES[HARD_CASE], CASES[RESUMED_CASE]
    train(_engine(ranks), resumed, steps=FIRST_STEPS, save=checkpoint)
    return {
        "cases": {name: train(_engine(ranks), case) for name, case in CASES.items()},
        "stays whole": train(_engine(ranks, reshard_after_forward=False), CASES["lora averaged"]),
        "resumed": train(_engine(ranks), resumed, steps=OTHER_STEPS, resume=checkpoint),
        "resumed by replicas": train(
            _engine(ranks, replicas=WORLD_SIZE), resumed, steps=OTHER_STEPS, resume=checkpoint
        ),
        "replicas": train(_engine(ranks, replicas=WORLD_SIZE), hard),
        "batch norm": train_batch_norm(_engine(ranks)),
        "batch norm, ddp": train_batch_norm(DdpConfig(device="cpu", cpu_threads=1).build(ranks)),
        "ddp": train(DdpConfig(device="cpu", cpu_threads=1).build(ranks), hard),
        "bf16": train(_engine(ranks, frozen_dtype="bf16"), hard),
        "layout": _layout(_engine(ranks, frozen_dtype="bf16")),
        "moved": _move(_engine(ranks)),
        "moved replicas": _move(_engine(ranks, replicas=WORLD_SIZE)),
    }


def _engine(ranks: Ranks, **settings: Any) -> Engine:
    return Fsdp2Config(device="cpu", cpu_threads=1, **settings).build(ranks)


def _layout(engine: Engine) -> dict[str, dict[str, Any]]:
    """By parameter, after a step of two microbatches: shape, this rank's share, dtypes, likeness of moments."""
    tuner, forward = set_up(engine, CASES["snella clipped, accumulated"])
    batch = make_batch(0)
    early: list[Tensor] = []
    for is_last in (False, True):
        early += [p.grad for p in tuner.module.parameters() if p.grad is not None]
        with engine.microbatch(is_last=is_last):
            with engine.autocast():
                loss = nn.functional.cross_entropy(forward(batch["image"]), batch["label"])
            engine.backward(loss)
    assert not early, "gradients were reduced before the last microbatch"
    engine.step()
    found = {}
    for name, parameter in tuner.module.named_parameters():
        value, gradient = engine.last_update(parameter)
        moments = engine.optimizer.state[parameter].get("exp_avg") if parameter.requires_grad else None
        found[name] = {
            "shape": tuple(parameter.shape),
            "part": cast(DTensor, value).to_local().numel(),
            "dtype": parameter.dtype,
            "trains": parameter.requires_grad,
            "gradient": None if gradient is None else (gradient.dtype, _is_like(gradient, value)),
            "moments": None if moments is None else (moments.dtype, _is_like(moments, value)),
        }
    return found


def _is_like(tensor: Tensor, parameter: Tensor) -> bool:
    assert isinstance(tensor, DTensor)
    assert isinstance(parameter, DTensor)
    same_part = tensor.to_local().shape == parameter.to_local().shape
    return tensor.placements == parameter.placements and same_part


def _move(engine: Engine) -> dict[str, Any]:
    """Scatter, gather and place, of every parameter and buffer, all with values of their own."""
    tuner, _ = set_up(engine, CASES["snella clipped, accumulated"])
    module = tuner.module
    live: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    before = engine.gather(set(live))  # a set has another order in each process
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in live.items()}
    engine.scatter(values if engine.ranks.is_first else {})
    misplaced = []
    if not engine.ranks.is_first:  # alone: would it talk to another rank, it would wait for ever
        misplaced = [name for name, p in module.named_parameters() if not _is_placed(engine, values[name], p)]
    return {
        "before": before,
        "scattered": values,
        "gathered": engine.gather(set(live)),
        "misplaced": misplaced,
    }


def _is_placed(engine: Engine, whole: Tensor, parameter: nn.Parameter) -> bool:
    placed = engine.place(whole, parameter)
    assert isinstance(placed, DTensor)
    part = placed.to_local()
    holds_part_only = part.untyped_storage().nbytes() == part.nbytes
    return (
        _is_like(placed, parameter) and torch.equal(part, cast(DTensor, parameter).to_local()) and holds_part_only
    )
