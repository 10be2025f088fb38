"""What DeepSpeed's ZeRO makes of the step of one process: arithmetic on what trains and what is frozen.

The other engines need none: FSDP2's own code runs on ranks that are not there, and DDP's buckets are tensors.

With N ranks (Rajbhandari et al., arXiv 1910.02054), T trainable bytes (float32, as this project trains) and F
frozen ones. DeepSpeed's own estimators (`estimate_zero3_model_states_mem_needs`) count frozen weights as trained,
16 or 18 bytes each; here they cost their own size alone.
- optimizer: a master copy of T and two moments, 3T/N; what the method or an average of the weights keeps is whole
- stages 1 and 2: weights whole. In backward two buckets in which gradients are summed; the reduced ones of this
  rank, T/N, come when activations are gone. In the step these and a flat copy. Between microbatches stage 1 keeps
  T of gradients, stage 2 T/N
- stage 3: (T+F)/N of weights, but what is no larger than the largest bias or norm whole, and two blocks gathered;
  T/N of gradients all the time, one bucket from backward on, and a flat copy in the step
With offload_optimizer the 3T/N are on the host, and so are the T/N of gradients and their flat copy; with
offload_parameters the shards of the weights.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.engines.deepspeed_json import default_values
from snell_scale.estimate.fake_run import FakeRun
from snell_scale.records import MEMORY_CATEGORIES

_FLOAT32 = 4
_NOTE = "ZeRO's shares are DeepSpeed's documented arithmetic, not a run of its code"
Change: TypeAlias = dict[str, int]
"""Category → bytes that are added (or, negative, taken away)."""


def with_engine(
    engine: Any, memory: dict[str, Any], run: FakeRun, *, world_size: int, accumulates: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the report of one process with the engine's shares in it, what there is to say of it)."""
    if not isinstance(engine, DeepSpeedConfig):
        return memory, ()
    changes = _zero(engine, _Sizes.of(run, world_size), accumulates=accumulates)
    notes = (_NOTE, *((f"{engine.json_file} is not read",) if engine.json_file else ()))
    return _changed(memory, changes), notes


def _changed(memory: dict[str, Any], changes: dict[str, Change]) -> dict[str, Any]:
    phases = {}
    for name, entry in memory["phases"].items():
        change = changes.get(name, {})
        split = {c: entry[f"{c}_bytes"] + change.get(c, 0) for c in MEMORY_CATEGORIES}
        phases[name] = {"total_bytes": sum(split.values()), **{f"{c}_bytes": n for c, n in split.items()}}
    peak = max(("forward", "backward", "step"), key=lambda name: phases[name]["total_bytes"])
    return {**memory, "phases": phases, "peak": {"phase": peak, **phases[peak]}}


def _zero(engine: DeepSpeedConfig, sizes: "_Sizes", *, accumulates: bool) -> dict[str, Change]:
    if engine.offload_optimizer:
        sizes = replace(sizes, optimizer=0, gradients=0)
    if engine.zero_stage == 3:
        shards = 0 if engine.offload_parameters else sizes.weight_shards
        kept = shards + sizes.persistent - sizes.weights
        standing = {"optimizer": sizes.optimizer, "gradients": sizes.gradients}
        busy = {**standing, "parameters": kept + sizes.gathered}
        return {
            "load": {"parameters": kept},
            "forward": busy,
            "evaluate": busy,
            "backward": {**busy, "communication": sizes.bucket},
            "step": {
                **standing,
                "parameters": kept,
                "gradients": 2 * sizes.gradients,
                "communication": sizes.bucket,
            },
        }
    between = sizes.trained if engine.zero_stage == 1 else sizes.gradients
    standing = {"optimizer": sizes.optimizer, "gradients": between if accumulates else 0}
    return {
        "forward": standing,
        "evaluate": {"optimizer": sizes.optimizer},
        "backward": {**standing, "communication": 2 * sizes.bucket},
        "step": {**standing, "gradients": 2 * sizes.gradients},
    }


@dataclass(frozen=True)
class _Sizes:
    """Bytes on one rank. optimizer: master copy and moments of its share; gradients: of its share."""

    weights: int
    trained: int
    weight_shards: int
    persistent: int
    gathered: int
    optimizer: int
    gradients: int
    bucket: int

    @classmethod
    def of(cls, run: FakeRun, world_size: int) -> "_Sizes":
        module = run.tuner.module
        blocks = [run.bundle.module.get_submodule(name) for name in run.bundle.wrap_points]
        chosen = default_values(module, blocks)
        threshold = chosen["zero_optimization.stage3_param_persistence_threshold"]
        weights, trained = _bytes(module), _bytes(module, trains=True)
        share = -(-trained // world_size)
        return cls(
            weights=weights,
            trained=trained,
            weight_shards=-(-weights // world_size),
            persistent=sum(p.nbytes for p in module.parameters() if p.numel() <= threshold),
            gathered=2 * max((_bytes(block) for block in blocks), default=weights),
            optimizer=3 * share,
            gradients=share,
            bucket=_FLOAT32 * chosen["zero_optimization.reduce_bucket_size"],
        )


def _bytes(module: nn.Module, *, trains: bool | None = None) -> int:
    return sum(p.nbytes for p in module.parameters() if trains is None or p.requires_grad is trains)
