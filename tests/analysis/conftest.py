"""Run folders as the records module writes them, with made-up figures, for every test of the analysis."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snell_scale.records import Result, StepWriter, write_json, write_result, write_yaml

MIB = 2**20
WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes one run below tmp_path/<study>; see `write_synthetic_run`."""

    def write(method: str, seed: int, **figures: Any) -> Path:
        return write_synthetic_run(tmp_path, method, seed, **figures)

    return write


def write_synthetic_run(
    root: Path,
    method: str,
    seed: int,
    *,
    top1: float | None = 90.0,
    study: str = "study",
    peak_mib: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0),
    trainable: int = 2_500,
    varied: Mapping[str, Any] | None = None,
    label: str | None = None,
    curve: tuple[float, ...] = (50.0, 80.0),
    **fields: Any,
) -> Path:
    """One synthetic run; peak_mib is parameters, gradients, optimizer, activations, temporary.

    varied=None: method and seed, as a comparison of methods has it. fields: any further field of Result.
    """
    label = label or method
    folder = root / study / f"{label}-seed{seed}"
    names = ("parameters", "gradients", "optimizer", "activations", "temporary")
    peak = {f"{name}_bytes": int(value * MIB) for name, value in zip(names, peak_mib, strict=True)}
    peak["total_bytes"] = sum(peak.values())
    result = Result(
        name=f"{study}/{folder.name}",
        status="ok",
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
        metrics={} if top1 is None else {"test": {"top1": top1}, "validation": {"top1": top1 + 1}},
        best_step=20,
        steps=20,
        total_steps=20,
        trainable_parameters=trainable,
        total_parameters=100_000,
        adapter_bytes=10 * 1024,
        seconds={"setup": 0.5, "total": 6.5},
        throughput={"images_per_s": 1000.0 + seed, "step_ms_median": 32.0},
        memory={
            "device": "cpu",
            "source": "live tensor storages",
            "phases": {"load": {"total_bytes": MIB}, "backward": peak},
            "peak": {"phase": "backward", **peak},
        },
        varied={"method.name": method, "seed": seed} if varied is None else {**varied, "seed": seed},
    )
    write_result(folder, replace(result, **fields))
    write_yaml(folder / "config.yaml", {"name": result.name, "seed": seed})
    write_json(folder / "environment.json", {"packages": {"torch": "2.13.0"}, "device": "cpu", "cuda": None})
    writer = StepWriter(folder, keep_until_step=0)
    for index, value in enumerate(curve, start=1):
        writer.write({"step": 10 * index, "epoch": index, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0})
        writer.write({"step": 10 * index, "split": "validation", "top1": value, "loss": 1.0})
    writer.close()
    return folder
