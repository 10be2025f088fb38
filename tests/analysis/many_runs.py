"""Thousands of made-up records, written fast: `python tests/analysis/many_runs.py FOLDER COUNT`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from synthetic_runs import memory_of

from snell_scale.records import MEMORY_CATEGORIES, Result

_METHODS = ("lora", "snell", "snella", "gps", "full")
_CONDITIONS: dict[str, Any] = {
    "microbatch_size": 32,
    "gradient_accumulation": 1,
    "activation_checkpointing": False,
    "frozen_dtype": "fp32",
    "optimizer": "adamw",
    "allocator": "cpu",
    "compile": False,
    "deterministic": False,
    "ema_decay": None,
    "fused_attention": True,
    "data_seed": 0,
    "image_size": 8,
    "hardware": "a processor",
    "num_threads": 1,
}


def write_many_runs(folder: Path, count: int) -> None:
    """`count` run folders below `folder`, a hundred to a study, each with a record and its other files.

    The records are as large as those of a real run on one rank. Nothing is synchronised with the disk: a
    thousand records take a second.
    """
    for number in range(count):
        run = folder / f"study-{number // 100:03d}" / f"run-{number % 100:02d}"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(asdict(_result(number)), indent=2))
        (run / "config.yaml").write_text(f"name: run-{number}\n")
        (run / "environment.json").write_text("{}\n")
        (run / "steps.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
        (run / "adapter").mkdir()


def _result(number: int) -> Result:
    method, seed = _METHODS[number % len(_METHODS)], number // len(_METHODS)
    metrics = {"top1": 90.0 + number % 7, "top5": 99.0, "loss": 0.3}
    peak = tuple(float(1 + (number + place) % 5) for place in range(5))
    return Result(
        name=f"many/run-{number}",
        status="oom" if number % 50 == 49 else "ok",
        method=method,
        model="tiny-vit",
        dataset="digits",
        task="classification",
        engine="single",
        precision="fp32",
        seed=seed,
        world_size=1,
        batch_size=32,
        metric="top1",
        metrics={"validation": metrics, "test": metrics},
        best_step=20,
        steps=20,
        total_steps=20,
        created_at="2026-11-21T12:00:00+00:00",
        conditions=_CONDITIONS,
        num_trainable_params=2_500 + number,
        num_total_params=100_000,
        file_size=10_240,
        seconds={"train": 30.0, "evaluate": 1.5, "total": 32.0},
        throughput={"images_per_s": 1000.0 + number, "step_ms_median": 32.0, "step_ms_p90": 40.0},
        memory=_memory(peak),
        flops={"model_flops": 10**9, "hardware_flops": 10**9, "mfu": None, "hfu": None},
        varied={"method.name": method, "seed": seed, "training.lr": 1e-3},
    )


def _memory(peak_mib: tuple[float, ...]) -> dict[str, Any]:
    """All phases of a real run, each with every category."""
    memory = memory_of(peak_mib)
    entry = {key: value for key, value in memory["peak"].items() if key != "phase"}
    assert len(entry) == len(MEMORY_CATEGORIES) + 1
    return {**memory, "phases": dict.fromkeys(("load", "forward", "backward", "step", "evaluate"), entry)}


if __name__ == "__main__":
    write_many_runs(Path(sys.argv[1]), int(sys.argv[2]))
