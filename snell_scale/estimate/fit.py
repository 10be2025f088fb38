"""`snell-scale run --fit`: the largest microbatch that fits by the estimate, and smaller ones if it does not."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from snell_scale.config import Config
from snell_scale.estimate.byte_sizes import show_size
from snell_scale.estimate.fitting import ways_to_need_less
from snell_scale.estimate.host_limit import group_free_bytes
from snell_scale.estimate.prediction import Estimator, Prediction
from snell_scale.estimate.settings import HEADROOM, Target
from snell_scale.interfaces import Ranks
from snell_scale.records import Result
from snell_scale.run_folder import find_finished

FREE_KEY = "training.gradient_accumulation"


def run_fitted(
    config: Config,
    run: Callable[..., Result],
    *,
    limit_bytes: int | None,
    say: Callable[[str], None],
    resume: Literal["never", "auto"],
    overwrite: bool,
    **settings: Any,
) -> Result:
    """Run `config` in as few microbatches as fit; where that runs out of memory after all, in more of them.

    The batch of a step stays what it is; the config's own gradient_accumulation does not matter. run:
    `snell_scale.run.run`, given `settings`. limit_bytes: of a device, headroom taken off; None: what rank 0's has
    free, less the headroom. Rank 0 estimates, for all. ValueError where no microbatch fits.
    """
    with config.engine.join() as ranks:
        folder = Path(config.output_dir) / config.name
        how = {
            "resume": resume,
            "overwrite": overwrite,
            "world_size": ranks.world_size,
            "may_differ": (FREE_KEY,),
        }
        standing = ranks.first(lambda: find_finished(folder, config, **how))
        if standing is not None and standing.status != "oom":
            return standing
        ladder, told = ranks.first(lambda: _apart(config, ranks, limit_bytes or _device_bytes(config)))
    say(told)
    result = None
    for number, accumulation in enumerate(ladder):
        again = {"resume": "auto" if number else resume, "overwrite": overwrite and not number}
        fitted = with_accumulation(config, accumulation)
        result = run(fitted, **again, **settings, may_differ=(FREE_KEY,))
        if result.status != "oom":
            break
        say(f"out of memory with {accumulation} microbatch(es) a step")
        _free()
    assert result is not None, "a ladder has a rung"
    return result


def choose(config: Config, world_size: int, limit_bytes: int, target: Target) -> tuple[list[int], str]:
    """(numbers of microbatches to try, the fewest that fit first; what to tell the user). ValueError: none fits.

    Runs in a process of its own.
    """
    ladder = _accumulations(config, world_size)
    share = config.training.batch_size // world_size
    with Estimator(config, world_size, target=target) as estimator:
        first, tried = _first_that_fits(ladder, limit_bytes, lambda n: estimator.predict(share // n, n))
        if first == len(ladder):
            raise ValueError(_refusal(config, tried, limit_bytes))
        normalized = estimator.trains_batch_norms()
    text = (
        f"fit: {ladder[first]} microbatch(es) of {tried[-1].microbatch_size} on each rank; estimated peak "
        f"{show_size(tried[-1].needed_bytes)} of {show_size(limit_bytes)} (headroom taken off)"
    )
    return ladder[first:], text + ("; batch norms see single microbatches" if normalized else "")


def with_accumulation(config: Config, accumulation: int) -> Config:
    training = config.training.model_copy(update={"gradient_accumulation": accumulation})
    return config.model_copy(update={"training": training})


def _apart(config: Config, ranks: Ranks, limit_bytes: int) -> tuple[list[int], str]:
    """`choose` in a process of its own: its process group of ranks that are not there leaves traces in torch."""
    target: Target = "cuda" if _uses_cuda(config) else "cpu"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(choose, config, ranks.world_size, limit_bytes, target).result()


def _first_that_fits(
    ladder: list[int], limit_bytes: int, predict: Callable[[int], Prediction]
) -> tuple[int, list[Prediction]]:
    """(its place, all that was predicted, its own last); the ladder's length for a place where none fits.

    From two microbatches on what is needed falls with their number, so that these are bisected. One alone is
    asked first: gradients stand during the forwards of several, which may need more than the batch in one.
    """
    tried = [predict(ladder[0])]
    if tried[0].needed_bytes <= limit_bytes:
        return 0, tried
    low, high = 1, len(ladder)
    found = None
    while low < high:
        middle = (low + high) // 2
        prediction = predict(ladder[middle])
        if prediction.needed_bytes <= limit_bytes:
            high, found = middle, prediction
        else:
            low = middle + 1
            tried.append(prediction)
    return low, tried if found is None else [*tried, found]


def _refusal(config: Config, tried: list[Prediction], limit_bytes: int) -> str:
    """Of what needs least, which may be the whole batch at once; each of what does not fit with its remedy."""
    best = min(tried, key=lambda prediction: (prediction.needed_bytes, prediction.peak_bytes))
    limit = show_size(limit_bytes)
    reasons = []
    if best.peak_bytes > limit_bytes:
        smaller = any(other.microbatch_size < best.microbatch_size for other in tried)
        why = ", the whole batch (parts of it need no less, for gradients stand between them)," if smaller else ""
        reasons.append(
            f"even a microbatch of {best.microbatch_size}{why} is estimated at "
            f"{show_size(best.peak_bytes)} of {limit}; {ways_to_need_less(config)}"
        )
    if best.evaluation_bytes > limit_bytes:
        reasons.append(
            f"an evaluation batch is estimated at {show_size(best.evaluation_bytes)} of {limit}; "
            "lower evaluation.batch_size"
        )
    return "--fit: " + "; and ".join(reasons)


def _accumulations(config: Config, world_size: int) -> list[int]:
    """Numbers of microbatches that a rank's share of the batch divides into, ascending.

    One alone for a contrastive loss, which compares all pairs of a batch.
    """
    batch = config.training.batch_size
    if batch % world_size:
        raise ValueError(
            f"training.batch_size={batch} does not divide among {world_size} ranks; change one of them"
        )
    share = batch // world_size
    if config.task.name == "contrastive":
        return [1]
    return [count for count in range(1, share + 1) if share % count == 0]


def _uses_cuda(config: Config) -> bool:
    return config.engine.device != "cpu" and torch.cuda.is_available()


def _device_bytes(config: Config) -> int:
    """Free on the device, or of the host's memory this rank's share, less the headroom."""
    if _uses_cuda(config):
        index = config.engine.device.partition(":")[2] or os.environ.get("LOCAL_RANK", "0")
        free, _ = torch.cuda.mem_get_info(int(index))
    else:
        free, allowed = psutil.virtual_memory().available, group_free_bytes()
        free = (free if allowed is None else min(free, allowed)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int((1 - HEADROOM) * free)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
