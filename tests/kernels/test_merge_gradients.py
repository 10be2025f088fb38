"""Every output and gradient of the op against the specification, and the specification against differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear
from snell_scale.kernels.merge.reference import gate_reference, kernel_matrix_reference

from .merge_cases import KERNEL_NAMES, WEIGHTING_NAMES, MergeCase, assert_close, make_case

# float64 and sums of at most a few hundred terms: rounding stays below 1e-13; a wrong term is of order 1.
TOLERANCE = 1e-12


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("weighting", WEIGHTING_NAMES)
def test_the_specification_has_the_gradient_of_the_fixed_mask(kernel: str, weighting: str) -> None:
    """Finite differences of K ⊙ (g ⊙ M) with g ⊙ M held fixed: the stop-gradient of the papers."""
    case = make_case(kernel, rows=4, num_in=3)
    names = list(case.settings["kernel_params"])

    def values(A: Tensor, B: Tensor, *params: Tensor) -> Tensor:
        by_name = {name: param.squeeze() for name, param in zip(names, params, strict=True)}
        return kernel_matrix_reference(A[0], B[0], kernel=kernel, scale=0.7, kernel_params=by_name)

    factors = (case.A, case.B, *case.settings["kernel_params"].values())
    gate = gate_reference(values(*factors), 0.5, weighting=weighting)
    assert 0 < int(gate.count_nonzero()) < gate.numel()
    assert torch.autograd.gradcheck(lambda *inputs: values(*inputs) * gate, factors)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize(("weighting", "sparsity"), [("hard", 0.5), ("magnitude", None)])
def test_gradcheck_of_the_op_where_no_factor_is_frozen(
    kernel: str, weighting: str, sparsity: float | None
) -> None:
    """With g = 1 the op's own differences are its gradient, for 1e-6 moves no entry across the threshold."""
    case = make_case(kernel, weighting=weighting, sparsity=sparsity, groups=2, rows=3, num_in=3)
    names, leaves = list(case.settings["kernel_params"]), tuple(case.leaves().values())

    def merged(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, *params: Tensor) -> Tensor:
        case.settings["kernel_params"] = dict(zip(names, params, strict=True))
        return merge_linear(x, weight, A, B, bias, **case.settings)

    assert torch.autograd.gradcheck(merged, leaves)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("weighting", WEIGHTING_NAMES)
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.6, "per group"])
@pytest.mark.parametrize("groups", [1, 3])
def test_linear_equals_the_specification(
    kernel: str, weighting: str, sparsity: float | str | None, groups: int
) -> None:
    of_groups = [0.1, 0.5, 0.9][:groups] if isinstance(sparsity, str) else sparsity
    case = make_case(kernel, weighting=weighting, sparsity=of_groups, groups=groups)
    y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
    assert_close(case.gradients(y), case.gradients(case.reference()), tolerance=TOLERANCE)

    y = merge_linear(case.x, None, case.A, case.B, case.bias, **case.settings)
    assert_close(case.gradients(y), case.gradients(case.reference_of_delta_alone()), tolerance=TOLERANCE)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("groups", [1, 3])
def test_delta_weight_equals_the_specification(kernel: str, groups: int) -> None:
    case = make_case(kernel, groups=groups)
    case.dy = torch.randn(groups * 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta = delta_weight(case.A, case.B, **case.settings)
    assert_close(case.gradients(delta), case.gradients(case.reference_delta()), tolerance=TOLERANCE)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize(
    ("window", "stride", "padding", "dilation"),
    [
        ((1, 1), 1, 0, 1),
        ((3, 3), 2, 1, 1),
        ((3, 2), (2, 1), (0, 2), (1, 2)),
        ((2, 4), 1, "same", (1, 3)),
        ((3, 3), 1, "same", 2),
        ((3, 3), 2, "valid", 1),
    ],
)
def test_conv2d_equals_the_specification(
    kernel: str,
    window: tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
) -> None:
    case = make_case(kernel, groups=2, rows=3, num_in=2 * window[0] * window[1])
    generator = torch.Generator().manual_seed(1)
    case.x = torch.randn(2, 2, 8, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    shape = (6, 2, *window)
    case.weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    for weight in (case.weight, None):
        delta = case.reference_delta().view(shape)
        merged = delta if weight is None else weight + delta
        expected = F.conv2d(case.x, merged, case.bias, stride, padding, dilation)
        case.dy = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        y = merge_conv2d(
            case.x,
            weight,
            case.A,
            case.B,
            case.bias,
            weight_shape=shape,
            stride=stride,
            padding=padding,
            dilation=dilation,
            **case.settings,
        )
        assert_close(case.gradients(y), case.gradients(expected), tolerance=TOLERANCE)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from(KERNEL_NAMES),
    weighting=st.sampled_from(WEIGHTING_NAMES),
    sparsity=st.none() | st.floats(0, 1, exclude_max=True),
    groups=st.integers(1, 3),
    rows=st.integers(1, 40),
    num_in=st.integers(1, 40),
    components=st.integers(1, 4),
    rank_per_component=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_specification(
    kernel: str,
    weighting: str,
    sparsity: float | None,
    groups: int,
    rows: int,
    num_in: int,
    components: int,
    rank_per_component: int,
    seed: int,
) -> None:
    case = make_case(
        kernel,
        weighting=weighting,
        sparsity=sparsity,
        groups=groups,
        rows=rows,
        num_in=num_in,
        rank=components * rank_per_component,
        components=components,
        seed=seed,
    )
    y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
    expected = case.gradients(case.reference())
    assert_close(case.gradients(y), expected, tolerance=TOLERANCE * _cancellation(case))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from(KERNEL_NAMES),
    weighting=st.sampled_from(WEIGHTING_NAMES),
    sparsity=st.floats(0, 1, exclude_max=True),
    rows=st.integers(1, 300),
    num_in=st.integers(1, 300),
    components=st.integers(1, 4),
    rank_per_component=st.integers(1, 16),
    limit_bytes=st.sampled_from([2**16, 2**20, 2**26]),
    seed=st.integers(0, 1000),
)
def test_larger_shapes_in_tiles_equal_the_specification(
    kernel: str,
    weighting: str,
    sparsity: float,
    rows: int,
    num_in: int,
    components: int,
    rank_per_component: int,
    limit_bytes: int,
    seed: int,
) -> None:
    case = make_case(
        kernel,
        weighting=weighting,
        sparsity=sparsity,
        rows=rows,
        num_in=num_in,
        rank=components * rank_per_component,
        components=components,
        seed=seed,
    )
    y = merge_linear(
        case.x, case.weight, case.A, case.B, case.bias, transient_limit_bytes=limit_bytes, **case.settings
    )
    expected = case.gradients(case.reference())
    assert_close(case.gradients(y), expected, tolerance=TOLERANCE * _cancellation(case))


def _cancellation(case: MergeCase) -> float:
    """How much |a|² − 2 a·b + |b|² may magnify rounding: the largest (|a|² + |b|²) / |a − b|² of any pair."""
    A, B = case.A.detach()[:, :, None, :, :], case.B.detach()[:, :, :, None, :]
    lengths = A.square().sum(-1) + B.square().sum(-1)
    return max(1.0, (lengths / (A - B).square().sum(-1)).max().item())
