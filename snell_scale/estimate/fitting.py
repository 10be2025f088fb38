"""The largest microbatch that fits: by bisection over estimates, each a step on fake tensors. And what helps."""

from collections.abc import Callable

from snell_scale.config import Config
from snell_scale.engines.deepspeed_config import DeepSpeedConfig

MOST_SAMPLES = 2**16


def largest_fitting(peak_bytes: Callable[[int], int], limit_bytes: int, *, most: int = MOST_SAMPLES) -> int:
    """The largest number of samples in 1..most whose peak stays within the limit; 0 where one does not fit.

    peak_bytes: of a microbatch of so many samples; it never falls with their number. Peaks are close to a line,
    so each guess is where the line through the two nearest known ones meets the limit; a bisection where that
    does not narrow the search.
    """
    known = {1: peak_bytes(1)}
    if known[1] > limit_bytes:
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        guess = min(max(_guess(known, low, limit_bytes), low + 1), high - 1)
        known[guess] = peak_bytes(guess)
        if known[guess] <= limit_bytes:
            low = guess
        else:
            high = guess
        if high - low > 1 and len(known) > 4:  # the line has had its chance
            middle = (low + high) // 2
            known[middle] = peak_bytes(middle)
            low, high = (middle, high) if known[middle] <= limit_bytes else (low, middle)
    return low


def _guess(known: dict[int, int], low: int, limit_bytes: int) -> int:
    if len(known) == 1:
        return 2
    nearest = sorted(known, key=lambda samples: abs(samples - low))[:2]
    first, second = sorted(nearest)
    slope = (known[second] - known[first]) / (second - first)
    if slope <= 0:
        return 2 * low
    return first + int((limit_bytes - known[first]) / slope)


def ways_to_need_less(config: Config) -> str:
    """Advice where a training step does not fit: what would help and is not in the config already."""
    ways = []
    if isinstance(config.engine, DeepSpeedConfig):
        if config.engine.zero_stage != 3:
            ways.append("shard the weights (engine.zero_stage=3)")
    elif config.engine.name != "fsdp2":
        ways.append("shard the weights (engine.name=fsdp2)")
    if not config.training.activation_checkpointing:
        ways.append("set training.activation_checkpointing=true")
    return ", ".join([*ways, f"{'or ' if ways else ''}train less of the model"])
