"""What DeepSpeed is told: the run's settings, laid over a user's own JSON whose "auto" values they fill.

Keys are written with dots ("zero_optimization.stage"), as in messages.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from snell_scale.interfaces import StepPlan

_AUTO = "auto"
_LARGEST_BUCKET = 50_000_000  # numbers: 200 MB of gradients in flight, whatever trains
_ADAMW = ("adamw", _AUTO)
_OURS = ("optimizer.", "scheduler.")


@dataclass(frozen=True)
class Dictated:
    """A value that the run's config decides; another one in the JSON is a contradiction.

    source: the key of the run's config that says so.
    """

    value: Any
    source: str


def read_json(path: str) -> dict[str, Any]:
    """The JSON with dotted keys. ValueError where it is unreadable or no JSON object."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"engine.json_file={path!r} could not be read as JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(
            f"engine.json_file={path!r} holds a {type(given).__name__}; DeepSpeed takes an object {{…}}"
        )
    return dict(_flat(given))


def check_precision(given: Mapping[str, Any], precision: str) -> None:
    """ValueError for a precision section that says another thing than engine.precision.

    "auto" is off: our bf16 and fp16 are torch.autocast over float32 parameters, as in the other engines.
    bf16.enabled=true is DeepSpeed's own: parameters, adapters and SNELL's factors too, become bf16, and a float32
    copy of what trains is kept beside the optimizer's state.
    """
    for section in ("fp16", "torch_autocast"):
        if _on(given.get(f"{section}.enabled")):
            raise ValueError(
                f"engine.json_file has {section}.enabled=true, which would act beside engine.precision; set it "
                "to false or 'auto' and choose engine.precision=fp16 or bf16"
            )
    if _on(given.get("bf16.enabled")) and precision != "bf16":
        raise ValueError(
            f"engine.json_file has bf16.enabled=true, but engine.precision is {precision!r}; set "
            "engine.precision=bf16, or bf16.enabled to false or 'auto'"
        )


def plan_values(plan: StepPlan, world_size: int) -> dict[str, Dictated]:
    """What the run's batches and clipping decide."""
    accumulation, source = plan.gradient_accumulation, "training.batch_size and training.gradient_accumulation"
    return {
        "train_micro_batch_size_per_gpu": Dictated(plan.microbatch_size, f"{source} on {world_size} rank(s)"),
        "gradient_accumulation_steps": Dictated(accumulation, "training.gradient_accumulation"),
        "train_batch_size": Dictated(plan.microbatch_size * accumulation * world_size, source),
        "gradient_clipping": Dictated(plan.clip_grad_norm or 0.0, "training.clip_grad_norm (null is 0)"),
    }


def default_values(module: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """What we choose where the JSON leaves it open; buffers fit the model, frozen weights are not kept gathered.

    In ZeRO-3 biases and norms stay whole (the threshold is the largest of them); every larger parameter is
    gathered one block ahead of its use and released right after it, to be gathered again for backward.
    """
    sizes = [p.numel() for p in module.parameters()]
    block = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=max(sizes))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {
        "zero_optimization.overlap_comm": True,
        "zero_optimization.reduce_bucket_size": min(trainable, _LARGEST_BUCKET),
        "zero_optimization.stage3_prefetch_bucket_size": block,
        "zero_optimization.stage3_max_live_parameters": 2 * block,
        "zero_optimization.stage3_max_reuse_distance": 0,
        "zero_optimization.stage3_param_persistence_threshold": max(
            (p.numel() for p in module.parameters() if p.ndim <= 1), default=0
        ),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours is torch's AdamW: nothing is compiled
    }


def check_dictated(given: Mapping[str, Any], dictated: Mapping[str, Dictated]) -> None:
    """ValueError naming the key and both values where the JSON contradicts the run's config."""
    for key, ours in dictated.items():
        value = given.get(key, _AUTO)
        if value != _AUTO and not _same(value, ours.value):
            raise ValueError(
                f"engine.json_file has {key}={value!r}, but the run's config makes it {ours.value!r} "
                f"({ours.source}); set it to 'auto', or change one of the two"
            )


def check_optimizer(given: Mapping[str, Any], optimizer: Optimizer) -> None:
    """ValueError where an optimizer or scheduler section would replace the run's own AdamW and schedule."""
    ours = {**optimizer.defaults, "torch_adam": True, "adam_w_mode": True}
    # The run's decay is that of its decayed group; biases and norms have none.
    ours["weight_decay"] = max(group["weight_decay"] for group in optimizer.param_groups)
    kind = given.get("optimizer.type", _AUTO)
    if str(kind).lower() not in _ADAMW:
        raise ValueError(
            f"engine.json_file has optimizer.type={kind!r}, but the run's optimizer is AdamW; set it to 'AdamW' "
            "with every value 'auto', or leave the section out"
        )
    for key, value in _below(given, "optimizer.params.").items():
        if value != _AUTO and not _same(value, ours.get(key)):
            raise ValueError(
                f"engine.json_file has optimizer.params.{key}={value!r}, but the run's AdamW has "
                f"{ours.get(key, 'no such setting')!r} (from the training section); set it to 'auto'"
            )
    for key, value in _below(given, "scheduler.params.").items():
        if value != _AUTO:
            raise ValueError(
                f"engine.json_file has scheduler.params.{key}={value!r}, but the learning rate follows the run's "
                "own schedule (training.lr, warmup_fraction, min_lr); set it to 'auto', or leave the section out"
            )


def settings(
    given: Mapping[str, Any], *, dictated: Mapping[str, Dictated], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """DeepSpeed's configuration: the JSON without what the run itself does, "auto" filled, the rest completed."""
    kept = {key: value for key, value in given.items() if value != _AUTO and not key.startswith(_OURS)}
    return _nested({**defaults, **kept, **{key: ours.value for key, ours in dictated.items()}})


def _flat(section: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in section.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return items


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        section = whole
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return whole


def _below(given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}


def _on(value: object) -> bool:
    return value is True


def _same(value: object, ours: object) -> bool:
    """Equal, with 1e-3 and 0.001 or [0.9, 0.999] and a tuple of them taken for the same."""
    if isinstance(value, (list, tuple)) and isinstance(ours, (list, tuple)):
        return len(value) == len(ours) and all(_same(a, b) for a, b in zip(value, ours, strict=True))
    if isinstance(value, bool) or isinstance(ours, bool):
        return value is ours
    if isinstance(value, (int, float)) and isinstance(ours, (int, float)):
        return math.isclose(value, ours, rel_tol=1e-9)
    return value == ours
