"""The Triton implementation's merged weight against the specification in float64, and its tile arithmetic."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .merge_triton_cases import (
    DEVICE,
    SHAPES,
    Shape,
    exact_taus,
    make_delta,
    require_interpreter_or_gpu,
    triton_impl,
)

KERNELS = ("distance", "mixk", "linear", "sigmoid", "rbf", "exponential")

# Float32 K against float64: |a|² − 2 a·b + |b|² is off by a few eps of |a|² + |b|², and K enters squared.
KERNEL_ERROR = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _interpreter_or_gpu() -> None:
    require_interpreter_or_gpu()


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: an element that no program writes shows."""
    empty: Callable[..., Tensor] = torch.empty

    def poisoned(*args: int, **options: object) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", poisoned)


def _assert_merged(actual: Tensor, expected: Tensor, delta_weight: Tensor) -> None:
    """Half a unit in the last place of `actual`'s dtype, for the one rounding, and float32's error in ΔW."""
    # The interpreter, unlike the compiler, cuts bfloat16 off: a whole unit.
    units = 1.0 if DEVICE == "cpu" and actual.dtype == torch.bfloat16 else 0.5
    rounding = units * torch.finfo(actual.dtype).eps * expected.abs()
    # Below the smallest normal number units in the last place no longer shrink.
    rounding = rounding + torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    allowed = rounding + KERNEL_ERROR * delta_weight.abs().max() + 2**-23 * expected.abs()
    assert actual.isfinite().all()
    assert ((actual.cpu().double() - expected).abs() <= allowed).all()


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("weighting", "shape"),
    [(weighting, SHAPES[2]) for weighting in ("magnitude", "soft", "hard", "dense")]
    + [("magnitude", shape) for shape in (SHAPES[0], SHAPES[1], SHAPES[3])]
    + [("dense", SHAPES[1])],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_merged_weight_equals_the_specification(kernel: str, weighting: str, shape: Shape) -> None:
    sparsity = None if weighting == "dense" else 0.6
    delta, case = make_delta(
        kernel, shape, weighting="hard" if sparsity is None else weighting, sparsity=sparsity
    )  # fmt: skip
    logs = triton_impl.column_logs(delta)
    taus = exact_taus(delta, logs, sparsity=sparsity)
    weight = case.weight.detach().float().to(DEVICE)
    columns = slice(0, delta.num_columns)
    merged = triton_impl.merge_columns(delta, taus, logs, weight, columns, torch.float32)
    expected = case.reference_delta().detach()
    _assert_merged(merged, case.weight.detach() + expected, expected)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once_to_the_dtype_asked_for(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    delta, case = make_delta("distance", SHAPES[2])
    taus = exact_taus(delta, None)
    weight = None if weight_dtype is None else case.weight.detach().to(DEVICE, weight_dtype)
    merged = triton_impl.merge_columns(delta, taus, None, weight, slice(0, delta.num_columns), dtype)
    delta_weight = case.reference_delta().detach()
    expected = delta_weight if weight is None else weight.cpu().double() + delta_weight
    assert merged.dtype == dtype
    _assert_merged(merged, expected, delta_weight)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("kernel", ["distance", "mixk"])
@pytest.mark.parametrize(
    "columns", [slice(0, 1), slice(3, 40), slice(64, 65), slice(5, 5), slice(1, 65)], ids=str
)
def test_a_range_of_columns_is_that_part_of_the_whole(kernel: str, columns: slice) -> None:
    delta, case = make_delta(kernel, SHAPES[2])
    logs = triton_impl.column_logs(delta)
    taus = exact_taus(delta, logs)
    weight = case.weight.detach().to(DEVICE, torch.bfloat16)
    merge = triton_impl.merge_columns
    whole = merge(delta, taus, logs, weight, slice(0, delta.num_columns), torch.float32)
    part = merge(delta, taus, logs, weight, columns, torch.float32)
    assert torch.equal(part, whole[:, columns])
    assert part.is_contiguous()


@pytest.mark.parametrize("layout", ["transposed", "padded rows", "every second column", "one row repeated"])
def test_any_strides_of_the_weight(layout: str) -> None:
    delta, _ = make_delta("distance", SHAPES[2])
    taus = exact_taus(delta, None)
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(132, 132, generator=generator).to(DEVICE)
    weight = {
        "transposed": wide.T[:66, :65],
        "padded rows": wide[:66, 7:72],
        "every second column": wide[:66, 1:131:2],
        "one row repeated": wide[:1, :65].expand(66, 65),
    }[layout]
    columns = slice(2, 63)
    expected = triton_impl.merge_columns(delta, taus, None, weight.contiguous(), columns, torch.float32)
    assert torch.equal(triton_impl.merge_columns(delta, taus, None, weight, columns, torch.float32), expected)


@pytest.mark.parametrize("columns", [slice(0, 65), slice(2, 63)], ids=str)
def test_in_place_of_the_weight(columns: slice) -> None:
    delta, case = make_delta("mixk", SHAPES[2])
    logs = triton_impl.column_logs(delta)
    taus = exact_taus(delta, logs)
    weight = case.weight.detach().to(DEVICE, torch.float16)
    expected = triton_impl.merge_columns(delta, taus, logs, weight, columns, weight.dtype)
    untouched = weight.clone()
    triton_impl.merge_columns(delta, taus, logs, weight, columns, weight.dtype, out=weight[:, columns])
    untouched[:, columns] = expected
    assert torch.equal(weight, untouched)


def test_offsets_beyond_32_bits() -> None:
    """Two rows 2^31 elements apart: an offset in int32 would wrap. The memory between them is never touched."""
    apart = 2**31 + 8
    storage = torch.empty(apart + 64, dtype=torch.float16, device=DEVICE)
    weight = storage.as_strided((2, 9), (apart, 1))
    weight[:] = torch.arange(18, device=DEVICE).view(2, 9)
    delta, _ = make_delta("linear", (1, 2, 9, 2, 2))
    taus = exact_taus(delta, None)
    columns = slice(0, 9)
    expected = triton_impl.merge_columns(delta, taus, None, weight.clone(), columns, torch.float32)
    assert torch.equal(triton_impl.merge_columns(delta, taus, None, weight, columns, torch.float32), expected)


@pytest.mark.parametrize("config", triton_impl.CONFIGS, ids=str)
@pytest.mark.parametrize("kernel", ["distance", "mixk"])
def test_the_tile_changes_no_bit(
    kernel: str, config: triton_impl.Config, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Tuning must change neither τ nor the mask nor the weight."""
    delta, case = make_delta(kernel, SHAPES[3])
    logs = triton_impl.column_logs(delta)
    weight = case.weight.detach().to(DEVICE, torch.bfloat16)

    def merged() -> tuple[Tensor, Tensor]:
        ranks = torch.tensor([5000], device=DEVICE)
        taus = triton_impl.find_thresholds(delta, logs, ranks, torch.full((1, 2), torch.nan, device=DEVICE))
        return taus, triton_impl.merge_columns(delta, taus, logs, weight, slice(0, 70), torch.float32)

    expected_taus, expected = merged()
    monkeypatch.setattr(triton_impl, "_tuned", lambda *_: config)
    taus, actual = merged()
    assert torch.equal(taus, expected_taus)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_column_logs_are_the_softmaxs_denominators(kernel: str) -> None:
    delta, case = make_delta(kernel, (2, 300, 5, 4, 2))  # more rows than one chunk of partial sums
    logs = triton_impl.column_logs(delta)
    if kernel != "mixk":
        assert logs is None
        return
    distances = (case.B[:, :, :, None] - case.A[:, :, None]).norm(dim=-1)
    gamma = case.settings["kernel_params"]["gamma"]
    base = case.settings["scale"] * (distances[:, 0] - distances[:, 1])
    expected = torch.logsumexp(base / gamma[:, None, None], dim=1)
    assert logs is not None
    assert logs.shape == (2, 5)
    assert (logs.cpu() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_nan_in_a_factor_reaches_the_weight() -> None:
    """Divergence must be seen: no clamp and no mask turns NaN into a number."""
    delta, _ = make_delta("distance", SHAPES[2])
    delta.A[0, 0, 3, 0] = torch.nan
    merged = triton_impl.merge_columns(delta, exact_taus(delta, None), None, None, slice(0, 65), torch.float32)
    assert merged[:33, 3].isnan().all()
    assert merged[33:].isfinite().all()


def test_nothing_is_timed_without_a_gpu_or_in_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton_impl, "_milliseconds", lambda *_: pytest.fail("timed"))
    delta, _ = make_delta("distance", SHAPES[2])
    merged = triton_impl.merge_columns(delta, None, None, None, slice(0, 65), torch.float32)
    assert merged.shape == (66, 65)


def test_tuning_takes_the_fastest_once_and_leaves_the_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with made-up times; in place of the weight, where a launch repeated would add ΔW twice."""
    milliseconds = dict(zip(triton_impl.CONFIGS, (5.0, 4.0, 1.0, 3.0, 2.0), strict=True))
    timed: list[triton_impl.Config] = []

    def measure(launch: Callable[[], None]) -> float:
        launch()
        timed.append(launch.args[0])  # pyright: ignore[reportFunctionMemberAccess]  # a functools.partial
        return milliseconds[timed[-1]]

    delta, _ = make_delta("distance", SHAPES[2])
    taus = exact_taus(delta, None)
    weight = torch.ones(66, 65, device=DEVICE)
    everything = slice(0, 65)
    expected = triton_impl.merge_columns(delta, taus, None, weight, everything, torch.float32)
    monkeypatch.setattr(triton_impl, "_tuned_configs", {})
    monkeypatch.setattr(triton_impl, "_milliseconds", measure)
    monkeypatch.setattr(triton_impl, "_can_time", lambda _: True)
    for _ in range(2):
        out = weight.clone()
        triton_impl.merge_columns(delta, taus, None, out, everything, torch.float32, out=out)
        assert torch.equal(out, expected)
    assert timed == list(triton_impl.CONFIGS)
    assert list(triton_impl._tuned_configs.values()) == [triton_impl.CONFIGS[2]]
