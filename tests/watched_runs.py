"""Run folders as a run under way leaves them, and its end."""

import json
import time
from pathlib import Path
from typing import Any

from snell_scale.records import Result, write_result, write_yaml

BATCH_SIZE = 32


def write_run(folder: Path, *, num_lines: int = 4, started: float | None = None) -> Path:
    """A run of 100 steps that logs every tenth, two seconds apart, the last just now."""
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text("{}")
    write_yaml(folder / "config.yaml", {"training": {"batch_size": BATCH_SIZE}})
    first = time.time() - 2 * num_lines if started is None else started
    with (folder / "steps.jsonl").open("w") as file:
        for number in range(1, num_lines + 1):
            line = {"step": 10 * number, "loss": 1 / number, "lr": 1e-3, "time": first + 2 * number}
            file.write(json.dumps(line | {"total_steps": 100, "peak_memory_bytes": 3 * 2**20}) + "\n")
    return folder


def end_run(folder: Path, status: Any = "ok") -> None:
    result = Result(
        name=folder.name,
        status=status,
        method="lora",
        model="tiny",
        dataset="digits",
        task="classification",
        engine="single",
        precision="fp32",
        seed=0,
        world_size=1,
        batch_size=BATCH_SIZE,
        metric="top1",
        metrics={"test": {"top1": 91.25}},
        steps=100,
        total_steps=100,
        throughput={"images_per_s": 512.0},
        memory={"peak": {"total_bytes": 5 * 2**20}},
    )
    write_result(folder, result)


def append(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.write("".join(lines))
