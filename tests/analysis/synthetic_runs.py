"""Run folders as the records module writes them, with made-up figures."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from snell_scale.records import Result, StepWriter, write_json, write_result, write_yaml

MIB = 2**20
WriteRun = Callable[..., Path]
_SAME_FOR_ALL: dict[str, Any] = {
    "status": "ok",
    "model": "tiny-vit",
    "dataset": "digits",
    "task": "classification",
    "engine": "single",
    "precision": "fp32",
    "world_size": 1,
    "batch_size": 32,
    "metric": "top1",
    "best_step": 20,
    "steps": 20,
    "total_steps": 20,
    "num_total_params": 100_000,
    "file_size": 10 * 1024,
    "seconds": {"setup": 0.5, "total": 6.5},
}


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

    varied: the seed comes to it; None is the method, as in a comparison of methods, and {} a run of its own.
    fields: any further field of Result.
    """
    varied = {"method.name": method} if varied is None else varied
    folder = root / study / f"{label or method}-seed{seed}"
    result = Result(
        name=f"{study}/{folder.name}",
        method=method,
        seed=seed,
        metrics={} if top1 is None else {"test": {"top1": top1}, "validation": {"top1": top1 + 1}},
        num_trainable_params=trainable,
        throughput={"images_per_s": 1000.0 + seed, "step_ms_median": 32.0},
        memory=memory_of(peak_mib),
        varied=varied and {**varied, "seed": seed},
        **_SAME_FOR_ALL,
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


_CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "temporary")


def memory_of(peak_mib: tuple[float, ...]) -> dict[str, Any]:
    peak = {f"{category}_bytes": int(value * MIB) for category, value in zip(_CATEGORIES, peak_mib, strict=True)}
    peak |= {f"{category}_bytes": 0 for category in ("transients", "communication", "unexplained")}
    peak["total_bytes"] = sum(peak.values())
    return {
        "device": "cpu",
        "source": "live tensor storages",
        "phases": {"load": {"total_bytes": MIB}, "backward": peak},
        "peak": {"phase": "backward", **peak},
    }
