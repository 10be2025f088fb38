"""The op as registered operators: torch's own checks of them, compilation, the choice of implementation."""

import logging
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear
from snell_scale.kernels.merge.choice import choose_implementation, say_once
from snell_scale.kernels.merge.operators import Call, merge_backward, merge_forward, merge_thresholds
from snell_scale.kernels.merge.pair_kernels import DistanceKernel

from .merge_cases import KERNEL_NAMES, MergeCase, assert_close, make_case

_ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def _assert_passes(operator: Any, arguments: tuple[Any, ...], checks: tuple[str, ...]) -> None:
    """Each of torch's checks, by name; opcheck raises at the first that fails."""
    assert torch.library.opcheck(operator, arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


def _call(case: MergeCase, geometry: tuple[int, ...] = ()) -> Call:
    params = case.settings["kernel_params"]
    return Call(
        A=case.A,
        B=case.B,
        alpha=params.get("alpha"),
        gamma=params.get("gamma"),
        beta=params.get("beta"),
        geometry=geometry,
        kernel=case.settings["kernel"],
        weighting="magnitude",
        scale=0.7,
        implementation="torch",
        transient_limit_bytes=2**26,
    )


@pytest.mark.parametrize("kernel", ["distance", "mixk", "sigmoid"])
@pytest.mark.parametrize("is_convolution", [False, True])
def test_torchs_own_checks_of_the_product(kernel: str, is_convolution: bool) -> None:
    """Schema, fake tensors, autograd registration, and tracing with symbolic shapes."""
    case = make_case(kernel, rows=6, num_in=18)
    x, geometry = case.x, ()
    if is_convolution:
        x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
        geometry = (3, 3, 1, 1, 1, 1, 1, 1)
    taus = torch.tensor([0.2], dtype=torch.float64)
    _assert_passes(merge_forward, (x, case.weight, case.bias, taus, None, *_call(case, geometry)), _ALL_CHECKS)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("is_convolution", [False, True])
def test_torchs_own_checks_of_the_backward(kernel: str, is_convolution: bool) -> None:
    """Sizes and strides of what it returns are those that a compiler was told."""
    case = make_case(kernel, groups=2, rows=6, num_in=18)
    call = _call(case, (3, 3, 1, 1, 1, 1, 1, 1) if is_convolution else ())
    x = torch.randn(3, 2, 5, 6, dtype=torch.float64) if is_convolution else case.x
    dy = torch.randn(3, 12, 5, 6, dtype=torch.float64) if is_convolution else case.dy
    wanted = [True, True, True, True, True] + [bool(case.settings["kernel_params"])] * 3
    taus = torch.tensor([0.2, 0.3], dtype=torch.float64)
    arguments = [
        each.detach() if isinstance(each, Tensor) else each
        for each in (dy, x, case.weight, taus, None, list(x.shape), wanted, *call)
    ]
    # It has no derivative, so there is no more to check.
    _assert_passes(merge_backward, tuple(arguments), ("test_schema", "test_faketensor"))


@pytest.mark.parametrize("has_memory", [False, True])
def test_torchs_own_checks_of_the_thresholds(has_memory: bool) -> None:
    case = make_case(groups=2)
    call = [each.detach() if isinstance(each, Tensor) else each for each in _call(case)]
    memory = torch.full((2, 2), math.nan) if has_memory else None
    _assert_passes(merge_thresholds, (torch.tensor([0.5, 0.7], dtype=torch.float64), memory, *call), _ALL_CHECKS)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_compiled_with_a_memory(kernel: str) -> None:
    """The graph is one piece, and the bracket that it writes arrives."""
    case = make_case(kernel, groups=2)
    memory = torch.full((2, 2), math.nan)

    def merge(case: MergeCase, memory: Tensor) -> Tensor:
        return merge_linear(
            case.x, case.weight, case.A, case.B, case.bias, threshold_memory=memory, **case.settings
        )

    expected_memory = memory.clone()
    expected = case.gradients(merge(case, expected_memory))
    compiled = torch.compile(merge, backend="aot_eager", fullgraph=True)
    assert_close(case.gradients(compiled(case, memory)), expected, tolerance=0)
    assert memory.isfinite().all()
    assert torch.equal(memory, expected_memory)


def test_compiled_under_autocast_and_checkpointing() -> None:
    case = make_case(groups=2, dtype=torch.float32)
    case.dy = case.dy.bfloat16()

    def merge(case: MergeCase) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(
                lambda: merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings),
                use_reentrant=False,
            )

    expected = case.gradients(merge(case))
    assert expected["y"].dtype == torch.bfloat16
    compiled = torch.compile(merge, backend="aot_eager", fullgraph=True)
    assert_close(case.gradients(compiled(case)), expected, tolerance=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_both_kinds_of_checkpointing(use_reentrant: bool) -> None:
    expected = make_case(groups=2)
    merge_linear(
        expected.x, expected.weight, expected.A, expected.B, expected.bias, **expected.settings
    ).backward(expected.dy)
    case = make_case(groups=2)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: merge_linear(x, case.weight, case.A, case.B, case.bias, **case.settings),
        case.x,
        use_reentrant=use_reentrant,
    )
    y.backward(case.dy)
    for name, leaf in case.leaves().items():
        assert torch.equal(_grad(leaf), _grad(expected.leaves()[name])), name


def test_looking_without_training_first_does_not_spoil_the_memory() -> None:
    case = make_case(rows=300, num_in=300, dtype=torch.float32)
    memory = torch.full((1, 2), math.nan)
    arguments = (case.x, case.weight, case.A, case.B)
    with torch.inference_mode():
        merge_linear(*arguments, threshold_memory=memory, **case.settings)
    merge_linear(*arguments, threshold_memory=memory, **case.settings).sum().backward()
    assert memory.isfinite().all()


def test_a_gradient_of_the_weight_alone_computes_no_kernel() -> None:
    case = make_case()
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name == "weight")
    y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
    with mock.patch.object(DistanceKernel, "tile") as tile:
        y.backward(case.dy)
    assert not tile.called
    assert _grad(case.weight).isfinite().all()


def test_gradients_accumulate() -> None:
    case = make_case(groups=2)
    once = case.gradients(merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings))
    for _ in range(3):
        merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings).backward(case.dy)
    for name, leaf in case.leaves().items():
        torch.testing.assert_close(_grad(leaf), 3 * once[name], rtol=1e-14, atol=0)


@pytest.fixture
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch fills what it allocates without a value with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("limit_bytes", [2**26, 13 * 2**10])
def test_everything_that_is_returned_was_written(kernel: str, limit_bytes: int) -> None:
    case = make_case(kernel, groups=2, rows=9, num_in=101)
    y = merge_linear(
        case.x, case.weight, case.A, case.B, case.bias, transient_limit_bytes=limit_bytes, **case.settings
    )
    assert all(each.isfinite().all() for each in case.gradients(y).values())
    delta = delta_weight(case.A, case.B, transient_limit_bytes=limit_bytes, **case.settings)
    assert delta.isfinite().all()
    image = torch.randn(2, 101, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = case.weight.detach().view(18, 101, 1, 1)
    z = merge_conv2d(image, weight, case.A, case.B, transient_limit_bytes=limit_bytes, **case.settings)
    (dx,) = torch.autograd.grad(z.sum(), image)
    assert z.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_the_reference_by_name(kernel: str, sparsity: float | None) -> None:
    """Plain autograd, so that it has a second derivative too."""
    case = make_case(kernel, groups=2, sparsity=sparsity)
    arguments = (case.x, case.weight, case.A, case.B, case.bias)
    by_reference = merge_linear(*arguments, implementation="reference", **case.settings)
    assert_close(
        case.gradients(merge_linear(*arguments, **case.settings)), case.gradients(by_reference), tolerance=1e-12
    )
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    case = make_case(kernel, rows=4, num_in=27, sparsity=sparsity)
    weight = case.weight.detach().view(4, 3, 3, 3)
    images = [
        merge_conv2d(x, weight, case.A, case.B, case.bias, implementation=name, **case.settings)
        for name in ("reference", "torch")
    ]
    torch.testing.assert_close(*images, rtol=1e-12, atol=1e-12)
    deltas = [
        delta_weight(case.A, case.B, implementation=name, **case.settings) for name in ("reference", "torch")
    ]
    torch.testing.assert_close(*deltas, rtol=1e-12, atol=1e-12)
    y = merge_linear(case.x, case.weight, case.A, case.B, implementation="reference", **case.settings)
    (dA,) = torch.autograd.grad(y.square().sum(), case.A, create_graph=True)
    dA.square().sum().backward()
    assert case.B.grad is not None


def test_an_implementation_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case(dtype=torch.float32)
    arguments = (case.x, case.weight, case.A, case.B)
    with pytest.raises(ValueError, match=r"implementation='triton' cannot be used.*on cpu"):
        merge_linear(*arguments, implementation="triton", **case.settings)
    with pytest.raises(ValueError, match=r"unknown implementation 'tritn' \(did you mean 'triton'\?\)"):
        merge_linear(*arguments, implementation="tritn", **case.settings)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="compute in float32 and x is torch.float64"):
        merge_linear(
            case.x.double(), case.weight.double(), case.A, case.B, implementation="triton", **case.settings
        )
    double = make_case()
    with pytest.raises(ValueError, match="compute in float32 and the factors are torch.float64"):
        merge_linear(double.x, double.weight, double.A, double.B, implementation="triton", **double.settings)


def test_the_choice_is_by_device_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_implementation("auto", torch.empty(1)) == "torch"
    assert choose_implementation("auto", torch.empty(1, dtype=torch.float64)) == "torch"
    say_once.cache_clear()
    case = make_case()
    with caplog.at_level(logging.INFO, logger="snell_scale.kernels.merge.choice"):
        for _ in range(2):
            delta_weight(case.A, case.B, **case.settings)
    assert [record.message for record in caplog.records] == [
        "merge op on cpu with torch.float64 factors: torch implementation"
    ]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_a_limit_is_a_positive_whole_number(limit: int) -> None:
    case = make_case()
    with pytest.raises(ValueError, match="expected a positive whole number"):
        delta_weight(case.A, case.B, transient_limit_bytes=limit, **case.settings)


@pytest.mark.parametrize(
    "memory",
    [
        torch.empty(2),
        torch.empty(2, 2),
        torch.empty(1, 2, dtype=torch.int32),
        torch.empty(1, 2, dtype=torch.bfloat16),
        torch.empty(1, 4)[:, ::2],
        torch.empty(1, 2, device="meta"),
    ],
)
def test_a_memory_has_one_bracket_per_matrix(memory: Tensor) -> None:
    case = make_case()
    with pytest.raises(ValueError, match="threshold_memory"):
        merge_linear(case.x, case.weight, case.A, case.B, threshold_memory=memory, **case.settings)


@pytest.mark.parametrize("name", ["A", "B", "alpha"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outside_the_hot_path_factors_must_be_finite(name: str, value: float) -> None:
    case = make_case("mixk")
    case.leaves()[name].detach().flatten()[0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        delta_weight(case.A, case.B, **case.settings)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
