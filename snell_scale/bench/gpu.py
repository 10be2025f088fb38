"""`snell-scale bench gpu`: layers, the op's kernels and whole training steps, against the aims, in minutes."""

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from snell_scale.bench.layer_sides import make_layer
from snell_scale.bench.merge import bench_merge
from snell_scale.bench.op_kernels import kernel_rows
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import Findings
from snell_scale.bench.settings import LAYER_SIDES, GpuSettings, MergeSettings, shape_name
from snell_scale.bench.step import bench_case
from snell_scale.bench.step_sides import Case
from snell_scale.bench.unets import unet_workload
from snell_scale.bench.workloads import Workload, timm_workload
from snell_scale.bench_records import Aim, Row

_RANK, _SPARSITY = 8, 0.9
_STEP_SIDES = ("lora", "shira", "full", "naive", "snell")
_UNET_SIDES = ("lora", "full", "naive", "snell")
# What is wanted of a step: (what, base, limit of our time over the base's).
_TIME_AIMS = (("step / full fine-tuning", "full", 1.05), ("step / LoRA", "lora", 1.25))


@dataclass(frozen=True)
class _Sizes:
    """What is measured: (in, out) of layers; (model, batch size) of classifiers and of UNets."""

    dtype: str
    shapes: tuple[tuple[int, int], ...]
    tokens: int
    steps: tuple[tuple[str, int], ...]
    unets: tuple[tuple[str, int], ...]
    text_tokens: int
    repeats: int
    round_budget_s: float
    total_budget_s: float


# Layers of ViT-L/16 (1024, 4096), ViT-H/14 (1280, 5120) and SDXL (1280, 10240); tokens of 32 images at 14×14 + 1.
_FULL = _Sizes(
    dtype="bfloat16",
    shapes=((1024, 1024), (1024, 4096), (4096, 1024), (1280, 1280), (1280, 5120), (5120, 1280), (1280, 10240)),
    tokens=6304,
    steps=(
        ("vit_large_patch16_224", 32),
        ("vit_huge_patch14_224", 32),
        ("vit_large_patch16_224", 128),
        ("vit_huge_patch14_224", 128),
    ),
    unets=(("sd15", 8), ("sdxl", 2)),
    text_tokens=77,
    repeats=20,
    round_budget_s=12,
    total_budget_s=420,
)
_SMALL = _Sizes(
    dtype="float32",
    shapes=((24, 40),),
    tokens=6,
    steps=(("test_vit", 2),),
    unets=(("tiny", 2),),
    text_tokens=4,
    repeats=3,
    round_budget_s=1,
    total_budget_s=120,
)


@dataclass(frozen=True)
class _Item:
    """One entry of the set: adds to the findings; `aims` stand for it when it fails."""

    name: str
    run: Callable[[Findings], None]
    aims: Sequence[Aim]


def bench_gpu(settings: GpuSettings, progress: BenchProgress, findings: Findings | None = None) -> Findings:
    """Run the whole set; what fails, or finds no time left, becomes a row with its reason."""
    sizes = _SMALL if settings.small else _FULL
    deadline = time.perf_counter() + sizes.total_budget_s
    findings = Findings() if findings is None else findings
    for item in _items(settings, sizes, progress):
        if time.perf_counter() > deadline:
            _failed(findings, item, f"skipped: the {sizes.total_budget_s:.0f} s of the whole set are used up")
            continue
        try:
            item.run(findings)
        # Whatever goes wrong with one item (memory, a kernel that does not compile, a red gate) is its result;
        # the command ends with exit code 1 after the table.
        except Exception as error:
            traceback.print_exc()
            _failed(findings, item, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}")
        _free()
    return findings


def _items(settings: GpuSettings, sizes: _Sizes, progress: BenchProgress) -> list[_Item]:
    device, dtype = torch.device(settings.device), getattr(torch, sizes.dtype)

    def unet(name: str, batch_size: int) -> Workload:
        return unet_workload(
            name,
            device,
            batch_size=batch_size,
            num_text_tokens=sizes.text_tokens,
            dtype=dtype,
            seed=settings.seed,
        )

    def classifier(name: str, batch_size: int) -> Workload:
        return timm_workload(name, device, batch_size=batch_size, dtype=dtype, seed=settings.seed)

    kernels = [_kernel_item(shape, settings, sizes, progress) for shape in sizes.shapes]
    layers = [_layer_item(shape, settings, sizes, progress) for shape in sizes.shapes]
    steps = [_step_item(step, classifier, _STEP_SIDES, device, sizes, progress) for step in sizes.steps]
    unets = [_step_item(step, unet, _UNET_SIDES, device, sizes, progress) for step in sizes.unets]
    # What would be missed least comes last, should time run out: large batches.
    in_order = (("kernels", kernels), ("steps", steps[:2]), ("unets", unets), ("layers", layers))
    return [item for kind, items in (*in_order, ("steps", steps[2:])) if kind in settings.items for item in items]


def _kernel_item(shape: tuple[int, int], settings: GpuSettings, sizes: _Sizes, progress: BenchProgress) -> _Item:
    case = f"kernels {shape_name(shape)} r={_RANK}"

    def run(findings: Findings) -> None:
        progress.say(f"{case}: profiling")
        layer = make_layer(
            shape,
            torch.device(settings.device),
            num_tokens=sizes.tokens,
            rank=_RANK,
            sparsity=_SPARSITY,
            dtype=getattr(torch, sizes.dtype),
            implementation=settings.implementation,
            seed=settings.seed,
        )
        rows, aims = kernel_rows(case, layer, repeats=sizes.repeats)
        findings.rows += rows
        findings.aims += aims

    return _Item(case, run, [Aim(case, "merge and threshold against a copy of W0", 1.5)])


def _layer_item(shape: tuple[int, int], settings: GpuSettings, sizes: _Sizes, progress: BenchProgress) -> _Item:
    asked = MergeSettings(
        sides=LAYER_SIDES,
        repeats=sizes.repeats,
        sparsity=_SPARSITY,
        device=settings.device,
        dtype=sizes.dtype,
        threads=settings.threads,
        seed=settings.seed,
        shapes=(shape,),
        tokens=sizes.tokens,
        rank=_RANK,
        implementation=settings.implementation,
    )

    def run(findings: Findings) -> None:
        bench_merge(asked, progress, findings, budget_s=sizes.round_budget_s)

    return _Item(f"{shape_name(shape)} r={_RANK}", run, [])


def _step_item(
    step: tuple[str, int],
    workload: Callable[[str, int], Workload],
    sides: Sequence[str],
    device: torch.device,
    sizes: _Sizes,
    progress: BenchProgress,
) -> _Item:
    model, batch_size = step
    case = f"{model} batch {batch_size} r={_RANK}"

    def run(findings: Findings) -> None:
        progress.say(f"{case}: building")
        made = Case(workload(model, batch_size), rank=_RANK, sparsity=_SPARSITY, device=device)
        start = len(findings.rows)
        bench_case(made, sides, findings, progress, repeats=sizes.repeats, budget_s=sizes.round_budget_s)
        findings.aims += step_aims(case, findings.rows[start:])

    return _Item(case, run, step_aims(case, []))


def step_aims(case: str, rows: Sequence[Row]) -> list[Aim]:
    """The aims of one step, with what these rows say about them; without a value where a side is missing."""
    by_side = {row.side: row for row in rows}
    over = by_side["snell"].ratios if "snell" in by_side else {}
    aims = [Aim(case, what, limit, over.get(base, {}).get("median")) for what, base, limit in _TIME_AIMS]
    of_naive = over.get("naive", {}).get("median")
    speedup = None if of_naive is None else 1 / of_naive
    aims.append(Aim(case, "times faster than naive SNELL", 3.0, speedup, at_least=True))
    ours, loras = (by_side[side].peak_bytes if side in by_side else None for side in ("snell", "lora"))
    share = ours / loras if ours and loras else None
    aims.append(Aim(case, "peak allocated / LoRA's", 1.0, share))
    return aims


def _failed(findings: Findings, item: _Item, reason: str) -> None:
    findings.rows.append(Row(item.name, "–", error=reason))
    findings.aims += [Aim(aim.case, aim.what, aim.limit, at_least=aim.at_least, note=reason) for aim in item.aims]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
