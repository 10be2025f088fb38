"""What is known of a run before it has ended, and the record of one that ends early, here or on another rank."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from snell_scale.conditions import conditions_of
from snell_scale.config import Config
from snell_scale.exit_codes import EXIT_CODES, REFUSED, OtherRankFailed
from snell_scale.interfaces import Failure, Ranks
from snell_scale.records import Result, Status, write_result
from snell_scale.training import Training


class Attempt:
    """One attempt at a run. training: once there is one; owns_folder: records may go there."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.training: Training | None = None
        self.owns_folder = False
        self._started = time.perf_counter()

    def so_far(self) -> Result:
        """The result with what training has measured by now."""
        training, total = self.training, time.perf_counter() - self._started
        if training is None:
            return replace(self.result, seconds={"total": total})
        history = training.measured()
        return replace(
            self.result,
            steps=training.step,
            best_step=training.best_step,
            resumed_from_steps=history.resumed_from,
            seconds={"train": history.seconds, "total": total},
            throughput=history.throughput,
            memory=memory_of_ranks({training.engine.ranks.rank: history.memory}),
            communication=history.communication,
            flops=history.flops,
        )

    def failed(self, error: BaseException, ranks: Ranks) -> Result:
        """The result of a run that ended with an exception here, or on another rank before."""
        failure = ranks.failure()
        if failure is None:
            return replace(self.so_far(), status=_status_of(error), message=_describe(error))
        where = f"rank {failure.rank}: " if ranks.world_size > 1 else ""
        return replace(self.so_far(), status=failure.status, message=where + failure.message)

    def record_ended(self, folder: Path, failure: Failure) -> None:
        """The record of a process that is being ended, from another thread: it asks no device for anything."""
        if not self.owns_folder or (folder / "result.json").exists():
            return
        steps = self.training.step if self.training is not None else 0
        message = f"rank {failure.rank}: {failure.message}"
        write_despite_trouble(folder, replace(self.result, status=failure.status, message=message, steps=steps))


def blank_result(
    config: Config, varied: Mapping[str, Any], *, message: str | None = None, world_size: int = 1
) -> Result:
    """What is known of a run before it starts; its status is "failed" until something better is known."""
    return Result(
        name=config.name,
        status="failed",
        method=config.method.name,
        model=config.model.describe(),
        dataset=config.data.describe(),
        task=config.task.name,
        engine=config.engine.name,
        precision=config.engine.precision,
        seed=config.seed,
        world_size=world_size,
        batch_size=config.training.batch_size,
        protocol=config.evaluation.protocol,
        message=message,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        conditions=conditions_of(config, world_size=world_size),
        varied=dict(varied),
    )


def memory_of_ranks(reports: Mapping[int, Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """`Result.memory` from the reports of the ranks that are known: the one with the largest peak, and all."""
    ranks = [{"rank": rank, **report} for rank, report in reports.items() if report is not None]
    if not ranks:
        return None
    return {**max(ranks, key=lambda report: report["peak"].get("total_bytes", 0)), "ranks": ranks}


def tell_failure(error: BaseException, ranks: Ranks) -> None:
    """Tell the other ranks of an exception, unless one has told before: they end with the same exit code."""
    status = _status_of(error)
    code = REFUSED if isinstance(error, ValueError | OSError) else EXIT_CODES[status]
    ranks.tell_failure(Failure(ranks.rank, status, _describe(error), code))


def echo_of_failure(error: BaseException, ranks: Ranks) -> OtherRankFailed | None:
    """What to raise in place of a collective's error that only says that another rank has failed."""
    failure = ranks.failure()
    if not isinstance(error, RuntimeError):
        return None
    if failure is not None and failure.rank != ranks.rank:
        return OtherRankFailed(f"ended because rank {failure.rank} failed: {failure.message}", failure.exit_code)
    if _tells_of_a_lost_rank(error):
        return OtherRankFailed(f"ended because {_describe(error)}", EXIT_CODES["failed"])
    return None


def write_despite_trouble(folder: Path, result: Result) -> None:
    """A best effort: recording must not hide the error that is about to be raised again."""
    with contextlib.suppress(OSError):
        write_result(folder, result)


def _status_of(error: BaseException) -> Status:
    """What an exception makes of the run. Out of memory on the host is a plain RuntimeError in torch."""
    on_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if on_host or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _describe(error: BaseException) -> str:
    """For the others and the record."""
    what = f"{type(error).__name__}: {error}"
    return f"the process of another rank is gone (killed?): {what}" if _tells_of_a_lost_rank(error) else what


def _tells_of_a_lost_rank(error: BaseException) -> bool:
    """gloo and NCCL say it in words of their own only."""
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
