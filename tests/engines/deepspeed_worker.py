"""What each of two processes does and sees under DeepSpeed, written to a file for the assertions."""

import json
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.engines.deepspeed_engine import DeepSpeedEngine
from snell_scale.engines.ranks import Ranks
from snell_scale.interfaces import Engine, StepPlan
from tests.engines.fsdp2_cases import (
    CASES,
    Case,
    make_batch,
    make_optimizer,
    mask_of,
    optimizer_step,
    set_up,
    train,
    train_batch_norm,
)
from tests.spawned import WORLD_SIZE, set_rank

STAGES = (1, 2, 3)
HARD_CASE = "snell clipped, accumulated"
RELEASED = (HARD_CASE, "snell checkpointed")
TRAINED = [
    *(f"{method} clipped, accumulated" for method in ("full", "lora", "snell", "snella")),
    "snell checkpointed",
]
NUM_BLOCKS = 8
MIXED: dict[str, dict[str, Any]] = {
    "autocast": {"precision": "bf16"},
    "bf16 frozen weights": {"frozen_dtype": "bf16"},
}
Key: TypeAlias = tuple[str, int, str]
"""(what is looked at, ZeRO's stage, the case)"""
SECOND_RUN: Key = ("second run", 3, "")
# The other keys are looked at by the slow tests.
QUICK: set[Key] = {
    *(("train", stage, name) for stage in (2, 3) for name in TRAINED[:4]),
    *((what, stage, "") for what, stage in (("masked", 2), ("masked", 3), ("updates", 3), ("evaluated", 3))),
    ("batch norm", 2, ""),
    ("resumed", 3, ""), ("released", 3, "snell checkpointed"), ("prefetched", 3, ""), SECOND_RUN,
}  # fmt: skip


def run(rank: int, ports: Sequence[int], folder: Path, *, keys: Collection[Key]) -> None:
    """The whole life of one process: two runs one after the other. Writes rank<n>.pt and rank<n>.log."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    linear = nn.functional.linear
    first = [key for key in jobs() if key in keys and key != SECOND_RUN]
    told: dict[Any, Any] = {}
    for wanted, port in zip((first, [SECOND_RUN]), ports, strict=True):
        set_rank(rank, WORLD_SIZE, port)
        with DeepSpeedConfig(device="cpu", cpu_threads=1, timeout_seconds=240).join() as ranks:
            told |= {key: jobs()[key](ranks, folder) for key in wanted}
        told["linear is torch's"] = nn.functional.linear is linear
    torch.save(told, folder / f"rank{rank}.pt")


def jobs() -> dict[Key, Callable[[Ranks, Path], Any]]:
    """What there is to see, in the order in which it is looked at."""
    stages: dict[str, Callable[[Engine], Any]] = {
        "masked": train_masked,
        "evaluated": train_and_evaluate,
        "updates": last_updates,
        "moved": _move,
        "batch norm": train_batch_norm,
    }
    return {
        **{("train", stage, name): partial(_train, stage, name) for stage in STAGES for name in TRAINED},
        **{(what, stage, ""): partial(_see, see, stage) for stage in STAGES for what, see in stages.items()},
        **{("resumed", stage, ""): partial(_resume, stage) for stage in STAGES},
        **{("released", 3, name): partial(_held, name) for name in RELEASED},
        ("prefetched", 3, ""): partial(_see, _held_blocks, 3),
        **{
            ("mixed", stage, name): partial(_train, stage, HARD_CASE, **settings)
            for stage in (2, 3) for name, settings in MIXED.items()
        },
        **{("fp16", stage, ""): partial(_see, train_fp16, stage, precision="fp16") for stage in (2, 3)},
        ("offloaded", 2, ""): partial(_train, 2, HARD_CASE, offload_optimizer=True),
        ("offloaded", 3, ""): partial(_train, 3, HARD_CASE, offload_optimizer=True, offload_parameters=True),
        ("own bf16", 2, ""): _own_bf16,
        SECOND_RUN: partial(_train, 3, HARD_CASE),
    }  # fmt: skip


def _train(stage: int, name: str, ranks: Ranks, folder: Path, **settings: Any) -> Any:
    return train(_engine(ranks, stage, **settings), CASES[name])


def _see(see: Callable[[Engine], Any], stage: int, ranks: Ranks, folder: Path, **settings: Any) -> Any:
    return see(_engine(ranks, stage, **settings))


def _engine(ranks: Ranks, stage: Any, **settings: Any) -> DeepSpeedEngine:
    return DeepSpeedConfig(device="cpu", cpu_threads=1, zero_stage=stage, **settings).build(ranks)


def train_masked(engine: Engine) -> dict[str, Tensor]:
    """What two steps changed of the fc1 weights, where only some entries may change."""
    case = Case("full", gradient_accumulation=2, clip_grad_norm=0.5)
    tuner, forward = set_up(engine, case)
    names = [name for name, _ in tuner.module.named_parameters() if name.endswith("fc1.weight")]
    before = engine.gather(names)
    for name in names:
        parameter = tuner.module.get_parameter(name)
        mask = engine.place(mask_of(torch.empty(64, 16)), parameter)
        engine.edit_gradient(parameter, _masking(mask))
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(2):
        optimizer_step(engine, forward, case, step)
        engine.zero_grad()
    after = engine.gather(names)
    return {name: after[name] - before[name] for name in before}


def train_and_evaluate(engine: Engine) -> list[float]:
    """Losses of steps with an evaluation of the module itself, in no_grad, after each."""
    tuner, forward = set_up(engine, CASES[HARD_CASE])
    losses = []
    for step in range(3):
        losses.append(optimizer_step(engine, forward, CASES[HARD_CASE], step)[0].item())
        engine.zero_grad()
        tuner.module.eval()
        with torch.no_grad():
            batch = make_batch(step)
            losses.append(nn.functional.cross_entropy(tuner.module(batch["image"]), batch["label"]).item())
        tuner.module.train()
    return losses


def last_updates(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """Of a clipped step: value and gradient of every factor, the learning rate set after setup."""
    case = CASES["snella clipped, accumulated"]
    tuner, forward = set_up(engine, case)
    tuner.begin_step(0, 0, True)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.5
    optimizer_step(engine, forward, case, 0)
    found = {}
    for name, parameter in tuner.module.named_parameters():
        if "snell_A" in name or "snell_B" in name:
            value, gradient = engine.last_update(parameter)
            assert gradient is not None
            found[name] = (value.detach().clone(), gradient.clone())
    return found


def train_fp16(engine: Engine) -> dict[str, Any]:
    """Under loss scaling: a scale that overflows, then one that does not."""
    case = CASES["lora clipped, accumulated"]
    tuner, forward = set_up(engine, case)
    names = [name for name, p in tuner.module.named_parameters() if p.requires_grad]
    before = engine.gather(names)
    engine.load_state_dict({"scale": 2.0**40, "good_steps": 7})
    norms = [optimizer_step(engine, forward, case, 0)[1].item()]
    engine.zero_grad()
    skipped, state = engine.gather(names), engine.state_dict()
    engine.load_state_dict({"scale": 2.0**8, "good_steps": 0})
    norms.append(optimizer_step(engine, forward, case, 0)[1].item())
    unmoved = all(torch.equal(before[name], skipped[name]) for name in before)
    return {"norms": norms, "unmoved": unmoved, "state": state, "next": engine.state_dict()}


def _resume(stage: int, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Where a run and its continuation from a checkpoint arrive, and what the checkpoint consists of."""
    case = CASES[HARD_CASE]
    engine = _engine(ranks, stage)
    tuner, forward = set_up(engine, case)
    names = [name for name, p in tuner.module.named_parameters() if p.requires_grad]
    for step in range(2):
        optimizer_step(engine, forward, case, step)
        engine.zero_grad()
    folder = folder / f"stage{stage}"
    if ranks.is_first:
        folder.mkdir()
    ranks.barrier()
    extra = {"scores": torch.arange(4.0), "scalar": torch.tensor(7, dtype=torch.int64)}
    written = engine.writer(extra, staged=False)(folder, ranks)
    losses = [optimizer_step(engine, forward, case, step)[0].item() for step in (2, 3)]
    weights = engine.gather(names)

    resumed = _engine(ranks, stage)
    _, forward = set_up(resumed, case)
    read = {name: torch.zeros_like(tensor) for name, tensor in extra.items()}
    resumed.load(folder, read)
    return {
        "losses": (losses, [optimizer_step(resumed, forward, case, step)[0].item() for step in (2, 3)]),
        "weights": (weights, resumed.gather(names)),
        "extra": (extra, read),
        "written": [str(path.relative_to(folder)) for path in written],
        "bytes": sum(path.stat().st_size for path in written),
        "lying there": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()),
    }


def _move(engine: Engine) -> dict[str, Any]:
    """Scatter and gather, of every parameter and buffer, all with values of their own."""
    tuner, _ = set_up(engine, CASES["snella clipped, accumulated"])
    module = tuner.module
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}  # each process its order
    before = engine.gather(names)
    values = {name: tensor + 1 for name, tensor in before.items()}
    engine.scatter(values)
    return {"scattered": values, "gathered": engine.gather(names)}


def _held(name: str, ranks: Ranks, folder: Path) -> list[int]:
    """Bytes of the frozen matrices that are whole between forward and backward, by step."""
    path = _json(ranks, folder / "sharp.json", {"zero_optimization": {"stage3_prefetch_bucket_size": 0}})
    engine = _engine(ranks, 3, json_file=path)
    tuner, forward = set_up(engine, CASES[name])
    matrices = [p for p in tuner.module.parameters() if not p.requires_grad and _sharded(p).ds_numel > 64]
    assert len(matrices) == 2 * 4 + 1  # of two blocks, and the position embedding
    held = []
    for step in range(4):
        batch = make_batch(step)
        loss = nn.functional.cross_entropy(forward(batch["image"]), batch["label"])
        held.append(sum(p.untyped_storage().nbytes() for p in matrices))
        with engine.microbatch(is_last=True):
            engine.backward(loss)
        engine.step()
        engine.zero_grad()
    return held


def _held_blocks(engine: Engine) -> list[int]:
    """How many frozen matrices of a deeper model are whole between forward and backward, as we set ZeRO-3 up."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(NUM_BLOCKS)))
    for layer in model:
        layer.get_parameter("weight").requires_grad_(False)
    plan = StepPlan(microbatch_size=4, gradient_accumulation=1, clip_grad_norm=None)
    forward = engine.setup(model, make_optimizer, blocks=list(model), plan=plan)
    held = []
    for _ in range(4):
        loss = forward(torch.ones(4, 32)).mean()
        held.append(sum(bool(layer.get_parameter("weight").untyped_storage().nbytes()) for layer in model))
        with engine.microbatch(is_last=True):
            engine.backward(loss)
        engine.step()
        engine.zero_grad()
    return held


def _sharded(parameter: nn.Parameter) -> Any:
    """With the attributes that ZeRO-3 gives it."""
    return parameter


def _own_bf16(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """DeepSpeed's own bf16, asked for in a JSON."""
    given = {"bf16": {"enabled": True}, "zero_optimization": {"stage": "auto"}}
    engine = _engine(ranks, 2, precision="bf16", json_file=_json(ranks, folder / "bf16.json", given))
    case = CASES["lora clipped, accumulated"]
    tuner, forward = set_up(engine, case)
    loss = optimizer_step(engine, forward, case, 0)[0].item()
    return {"loss": loss, "dtypes": {p.dtype for p in tuner.module.parameters()}}


def _json(ranks: Ranks, path: Path, given: dict[str, Any]) -> str:
    if ranks.is_first:
        path.write_text(json.dumps(given))
    ranks.barrier()
    return str(path)


def _masking(mask: Tensor) -> Any:
    def edit(gradient: Tensor) -> None:
        gradient.mul_(mask)

    return edit
