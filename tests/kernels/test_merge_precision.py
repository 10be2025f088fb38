"""Low precision: as near the truth as the same product in eager torch; the factors never below float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear
from snell_scale.kernels.merge.numerics import ieee_float32_products

from .merge_cases import KERNEL_NAMES, MergeCase, make_case


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("weighting", ["magnitude", "soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_error_budget(kernel: str, weighting: str, dtype: torch.dtype, rank: int) -> None:
    """The op's distance from float64 against that of eager torch: the specification's ΔW, rounded, then F.linear.

    5 % for another order of summation; 32 eps of float32 (4e-6; seen: 1e-6) because the op takes distances from
    |a|² − 2 a·b + |b|², which magnifies rounding by (|a|² + |b|²) / |a − b|², where the specification subtracts.
    """
    truth = _case(kernel, weighting, torch.float64, rank=rank, rounded_to=dtype)
    eager = _case(kernel, weighting, dtype, rank=rank, rounded_to=dtype)
    ours = _case(kernel, weighting, dtype, rank=rank, rounded_to=dtype)
    expected = truth.gradients(truth.reference())
    eager_gradients = eager.gradients(
        F.linear(eager.x, eager.weight + eager.reference_delta().to(dtype), eager.bias)
    )
    our_gradients = ours.gradients(merge_linear(ours.x, ours.weight, ours.A, ours.B, ours.bias, **ours.settings))
    for name, exact in expected.items():
        allowed = 1.05 * _distance(eager_gradients[name], exact) + 32 * torch.finfo(torch.float32).eps
        assert _distance(our_gradients[name], exact) <= allowed, name
        assert our_gradients[name].dtype == eager_gradients[name].dtype


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_inside_for_backward", [True, False])
def test_autocast_rounds_what_it_rounds_for_a_linear_layer(
    weight_dtype: torch.dtype, is_inside_for_backward: bool
) -> None:
    """x and bias are rounded, the merged weight once; the factors' arithmetic is what it is without autocast."""
    case = make_case(groups=2, rows=12, num_in=16, dtype=torch.float32)
    case.weight = case.weight.detach().to(weight_dtype).requires_grad_()
    case.dy = case.dy.to(torch.bfloat16)
    rounded = _rounded(case, torch.bfloat16)
    merged = (case.weight + delta_weight(case.A, case.B, **case.settings)).detach()

    with torch.autocast("cpu", torch.bfloat16):
        y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
        gradients = case.gradients(y) if is_inside_for_backward else {}
        delta = delta_weight(case.A, case.B, **case.settings)
    gradients = gradients or case.gradients(y)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(rounded.x, merged.to(torch.bfloat16), rounded.bias))
    assert {name: gradients[name].dtype for name in case.leaves()} == {
        name: leaf.dtype for name, leaf in case.leaves().items()
    }
    assert delta.dtype == torch.float32
    assert torch.equal(delta, delta_weight(case.A, case.B, **case.settings))

    # What reaches A and B is what the product of rounded numbers sends back, to the last bit.
    G = case.dy.T @ rounded.x.detach()
    dA, dB = torch.autograd.grad(delta, [case.A, case.B], G.float())
    assert torch.equal(gradients["A"], dA)
    assert torch.equal(gradients["B"], dB)


def test_autocast_rounds_images_too() -> None:
    case = make_case(rows=6, num_in=18, dtype=torch.float32)
    x, weight = torch.rand(2, 2, 5, 5), torch.rand(6, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = merge_conv2d(x, weight, case.A, case.B, case.bias, **case.settings)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert case.A.grad is not None
    assert case.A.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    case = make_case()
    expected = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
    with torch.autocast("cpu", torch.bfloat16):
        y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_are_raised_to_float32(dtype: torch.dtype) -> None:
    case = _rounded(make_case("mixk", dtype=torch.float32), dtype, with_factors=True)
    raised = {name: param.detach().float() for name, param in case.settings["kernel_params"].items()}
    delta = delta_weight(case.A, case.B, **case.settings)
    case.settings["kernel_params"] = raised
    expected = delta_weight(case.A.detach().float(), case.B.detach().float(), **case.settings)
    assert delta.dtype == torch.float32
    assert torch.equal(delta, expected)
    delta.sum().backward()
    assert case.A.grad is not None
    assert case.A.grad.dtype == dtype


def test_a_float64_weight_is_not_rounded_to_the_factors() -> None:
    case = make_case(dtype=torch.float32)
    weight, x = torch.randn(7, 9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    merged = merge_linear(x, weight, case.A, case.B, **case.settings).T
    expected = weight + delta_weight(case.A, case.B, **case.settings).double()
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_programs_matmul_precision_is_not_felt_and_is_kept(precision: str) -> None:
    case = make_case(groups=2, rows=64, num_in=64, rank=32, dtype=torch.float32)
    expected = delta_weight(case.A, case.B, **case.settings)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with ieee_float32_products():
            inside = [_product_precision("cuda"), _product_precision("mkldnn")]
        delta = delta_weight(case.A, case.B, **case.settings)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(inside) <= {"ieee", "none", "highest"}
    assert torch.equal(delta, expected)


def _distance(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _product_precision(backend: str) -> str:
    """As torch reports it; before 2.9 there is one setting for all backends."""
    matmul = getattr(getattr(torch.backends, backend), "matmul", None)
    return getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()


def _case(kernel: str, weighting: str, dtype: torch.dtype, *, rank: int, rounded_to: torch.dtype) -> MergeCase:
    """The same numbers for every dtype: the layer's rounded to the lowest, the factors' to float32."""
    made = make_case(
        kernel,
        weighting=weighting,
        groups=2,
        rows=24,
        num_in=32,
        rank=rank,
        num_tokens=40,
        dtype=torch.float32,
    )
    case = _rounded(_rounded(made, rounded_to), dtype)
    return _rounded(case, torch.float64, with_factors=True) if dtype == torch.float64 else case


def _rounded(case: MergeCase, dtype: torch.dtype, *, with_factors: bool = False) -> MergeCase:
    """The case with x, weight, bias and dy in `dtype`, and the factors too if asked."""

    def to_leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_()

    settings = case.settings.copy()
    A, B = case.A, case.B
    if with_factors:
        A, B = to_leaf(A), to_leaf(B)
        params = {name: to_leaf(param) for name, param in settings["kernel_params"].items()}
        settings["kernel_params"] = params
    x, weight, bias = (to_leaf(tensor) for tensor in (case.x, case.weight, case.bias))
    return MergeCase(x, weight, bias, A, B, case.dy.to(dtype), settings)
