"""Made-up runs of several sizes, engines and numbers of ranks, measured and predicted."""

from pathlib import Path
from typing import Any

from synthetic_runs import MIB, WriteRun, memory_of

VIT_B = "vit_base_patch16_224.augreg_in21k"
VIT_H = "vit_huge_patch14_224"


def write_job(
    write_run: WriteRun,
    method: str,
    *,
    peak: float,
    ranks: int = 1,
    batch: int = 8,
    engine: str = "single",
    model: str = VIT_B,
    params: int = 86_600_000,
    r: int | None = 8,
    sparsity: float | None = None,
    case: str | None = None,
    seed: int = 0,
    images_per_s: float | None = None,
    wire_mib: float | None = None,
    **fields: Any,
) -> Path:
    """One run whose peak is `peak` MiB. r or sparsity None: the record does not tell it."""
    varied = {"method.name": method, "model.architecture": model, "engine.name": engine, "world_size": ranks}
    settings = {"method.r": r, "method.sparsity": sparsity, "case": case}
    varied |= {key: value for key, value in settings.items() if value is not None}
    predicted = fields.get("predicted", False)
    name = f"{case or ''}{fields.pop('name', '')}{'p' if predicted else ''}"
    label = f"{model}-{method}-{r}-{engine}-{ranks}-{batch}-{name}"
    return write_run(
        method,
        seed,
        top1=None,
        label=label,
        varied=varied,
        peak_mib=(peak - 4, 1.0, 1.0, 1.0, 1.0),
        engine=engine,
        model=model,
        world_size=ranks,
        batch_size=batch,
        num_total_params=params,
        throughput={} if images_per_s is None else {"images_per_s": images_per_s},
        communication=None if wire_mib is None else _communication(ranks, wire_mib),
        **fields,
    )


def with_ranks(peaks: list[float]) -> dict[str, Any]:
    """Memory of a run whose ranks have these peaks, as the first rank reports it."""
    memory = memory_of((peaks[0] - 4, 1.0, 1.0, 1.0, 1.0))
    ranks = [{"rank": rank, "peak": {"total_bytes": int(peak * MIB)}} for rank, peak in enumerate(peaks)]
    return {**memory, "ranks": ranks}


def _communication(ranks: int, wire_mib: float) -> dict[str, Any]:
    operations = {
        "all_reduce": {"calls": 3, "payload_bytes": int(wire_mib * MIB)},
        "broadcast": {"calls": 1, "payload_bytes": MIB},
    }
    return {
        "world_size": ranks,
        "operations": operations,
        "payload_bytes": int((wire_mib + 1) * MIB),
        "wire_bytes_per_rank": int(wire_mib * MIB),
    }
