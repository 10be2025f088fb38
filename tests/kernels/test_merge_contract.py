"""What the op promises besides its numbers: what it keeps, what it computes, and how it behaves at the edges."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear
from snell_scale.kernels.merge.products import LinearProduct

from .merge_cases import KERNEL_NAMES, MergeCase, assert_close, make_case


def _merge(case: MergeCase) -> Tensor:
    return merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)


def test_the_result_can_be_changed_in_place() -> None:
    """As ReLU(inplace=True) does behind a layer; batched inputs are products of views inside."""
    results = []
    for relu in (torch.relu, torch.relu_):
        case = make_case()
        y = merge_linear(case.x.unflatten(0, (1, -1)), case.weight, case.A, case.B, case.bias, **case.settings)
        relu(y).sum().backward()
        results.append([leaf.grad for leaf in case.leaves().values()])
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept(kernel: str, sparsity: float | None, dtype: torch.dtype) -> None:
    """Between forward and backward: x, the parameters themselves, and the thresholds."""
    case = make_case(kernel, sparsity=sparsity, groups=2, rows=20, num_in=30, num_tokens=3, dtype=torch.float32)
    x, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in (case.x, case.weight, case.bias))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = merge_linear(x, weight, case.A, case.B, bias, **case.settings)
    allowed = {
        tensor.data_ptr() for tensor in (x, weight, case.A, case.B, *case.settings["kernel_params"].values())
    }
    others = [tensor for tensor in kept if tensor.data_ptr() not in allowed]
    assert [tuple(tensor.shape) for tensor in others] == ([] if sparsity is None else [(2,)])
    (kept_weight,) = (tensor for tensor in kept if tensor.data_ptr() == weight.data_ptr())
    assert kept_weight.shape == weight.shape
    assert kept_weight.dtype == weight.dtype
    assert not [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor)]
    y.sum().backward()
    assert case.A.grad is not None


def test_only_what_the_gradients_need_is_kept() -> None:
    for wanted, expected in {
        ("bias",): 0,
        ("x",): 4,  # weight, A, B, τ
        ("A",): 4,  # x, A, B, τ
        ("A", "x"): 5,
    }.items():
        case = make_case()
        for name, leaf in case.leaves().items():
            leaf.requires_grad_(name in wanted)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            _merge(case)
        assert len(kept) == expected, wanted


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_a_gradient_exists_exactly_where_one_is_asked_for(kernel: str) -> None:
    everything = make_case(kernel, groups=2)
    names = tuple(everything.leaves())
    expected = everything.gradients(_merge(everything))
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(1, len(names) + 1)
    ):
        case = make_case(kernel, groups=2)
        for name, leaf in case.leaves().items():
            leaf.requires_grad_(name in chosen)
        _merge(case).backward(case.dy)
        found = {name: leaf.grad for name, leaf in case.leaves().items() if leaf.grad is not None}
        assert_close(found, {name: expected[name] for name in chosen}, tolerance=1e-14)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("x",), {"add_grad_input"}),
        (("A",), {"grad_weight"}),
        (("alpha",), {"grad_weight"}),
        (("weight",), {"grad_weight"}),
        (("bias",), {"grad_bias"}),
        (("x", "B", "bias"), {"add_grad_input", "grad_weight", "grad_bias"}),
    ],
)
def test_products_that_nobody_asked_for_are_not_computed(wanted: tuple[str, ...], expected: set[str]) -> None:
    case = make_case("mixk")
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name in wanted)
    names = ("add_grad_input", "grad_weight", "grad_bias")
    with contextlib.ExitStack() as stack:
        spies = {
            name: stack.enter_context(
                mock.patch.object(LinearProduct, name, autospec=True, side_effect=getattr(LinearProduct, name))
            )
            for name in names
        }
        _merge(case).backward(case.dy)
    assert {name: spy.call_count for name, spy in spies.items() if spy.called} == dict.fromkeys(expected, 1)


def test_a_trainable_weight_and_its_delta_share_one_product() -> None:
    case = make_case(groups=3)
    with mock.patch.object(
        LinearProduct, "grad_weight", autospec=True, side_effect=LinearProduct.grad_weight
    ) as spy:
        _merge(case).backward(case.dy)
    assert spy.call_count == 1


@pytest.mark.parametrize("is_linear_loss", [True, False])
def test_double_backward_raises(is_linear_loss: bool) -> None:
    case = make_case()
    y = _merge(case)
    loss = y.sum() if is_linear_loss else y.square().sum()
    (dx,) = torch.autograd.grad(loss, case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.square().sum().backward()


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_two_runs_are_bit_identical(kernel: str) -> None:
    first, second = (make_case(kernel, groups=3, rows=17, num_in=33, dtype=torch.float32) for _ in range(2))
    a, b = first.gradients(_merge(first)), second.gradients(_merge(second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert set(a) == set(b)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_any_leading_dimensions(shape: tuple[int, ...], has_weight: bool) -> None:
    case = make_case(groups=2)
    generator = torch.Generator().manual_seed(1)
    case.x = torch.randn(*shape, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    case.dy = torch.randn(*shape, 14, generator=generator, dtype=torch.float64)
    weight = case.weight if has_weight else None
    y = merge_linear(case.x, weight, case.A, case.B, case.bias, **case.settings)
    expected = case.reference() if has_weight else case.reference_of_delta_alone()
    # As in the comparison with the specification: rounding of float64.
    assert_close(case.gradients(y), case.gradients(expected), tolerance=1e-12)


def test_strided_inputs_and_gradients() -> None:
    case = make_case(groups=2, num_tokens=6)
    case.x = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    strided = case.x.T[::2]
    case.dy = torch.ones(1, dtype=torch.float64).expand(6, 14)
    y = merge_linear(strided, case.weight, case.A, case.B, case.bias, **case.settings)
    expected = torch.nn.functional.linear(strided, case.weight + case.reference_delta(), case.bias)
    assert_close(case.gradients(y), case.gradients(expected), tolerance=1e-12)


@pytest.mark.parametrize("layout", ["one image", "no image", "channels last"])
def test_images_of_any_layout(layout: str) -> None:
    case = make_case(rows=6, num_in=18)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(0 if layout == "no image" else 2, 2, 7, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64)
    if layout == "channels last":
        x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    case.x = (x[0] if layout == "one image" else x).detach().requires_grad_()
    case.weight = weight.requires_grad_()
    merged = case.weight + case.reference_delta().view(6, 2, 3, 3)
    expected = torch.nn.functional.conv2d(case.x, merged, case.bias, padding=1)
    case.dy = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    y = merge_conv2d(case.x, case.weight, case.A, case.B, case.bias, padding=1, **case.settings)
    assert_close(case.gradients(y), case.gradients(expected), tolerance=1e-12)


def test_three_dimensional_factors_are_one_group() -> None:
    case = make_case("mixk")
    flat = {name: param.squeeze(0) for name, param in case.settings["kernel_params"].items()}
    expected = _merge(case)
    case.settings["kernel_params"] = flat
    y = merge_linear(case.x, case.weight, case.A[0], case.B[0], case.bias, **case.settings)
    assert torch.equal(y, expected)
    y.backward(case.dy)
    assert case.A.grad is not None
    assert case.A.grad.shape == case.A.shape


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("weighting", ["magnitude", "soft", "hard"])
def test_at_sparsity_one_nothing_survives(kernel: str, weighting: str) -> None:
    case = make_case(kernel, weighting=weighting, groups=2)
    case.settings["sparsity"] = torch.tensor([1.0, 0.5], dtype=torch.float64)
    delta = delta_weight(case.A, case.B, **case.settings)
    assert delta[:7].count_nonzero() == 0
    assert delta[7:].count_nonzero() == 63 - 32
    delta.backward(torch.ones_like(delta))
    assert case.A.grad is not None
    assert case.A.grad[0].count_nonzero() == 0
    assert case.A.grad[1].count_nonzero() > 0


def test_a_tensor_of_sparsities_equals_the_numbers() -> None:
    case = make_case(groups=2, sparsity=[0.3, 0.9])
    expected = case.gradients(_merge(case))
    case.settings["sparsity"] = torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert_close(case.gradients(_merge(case)), expected, tolerance=0)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.5])
def test_zero_factors_have_zero_distance_and_finite_gradients(kernel: str, sparsity: float | None) -> None:
    """Every d is 0, where the distance has no gradient: none is invented."""
    case = make_case(kernel, sparsity=sparsity, dtype=torch.float32)
    for factor in (case.A, case.B):
        factor.detach().zero_()
    gradients = case.gradients(_merge(case))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["A"].count_nonzero() == gradients["B"].count_nonzero() == 0


def test_equal_rows_do_not_blow_up() -> None:
    """|a|² − 2 a·b + |b|² of equal rows is rounding noise, not 0: the gradient keeps the size of the others."""
    case = make_case(sparsity=None, rows=9, rank=64, dtype=torch.float32)
    case.B.detach().copy_(case.A)
    gradients = case.gradients(_merge(case))
    expected = case.gradients(case.reference())
    # Each dA sums 9 unit vectors, one of them noise of at most 1 (0 in the specification).
    largest = case.settings["scale"] * (case.dy.T @ case.x.detach()).abs().max().item()
    assert (gradients["A"] - expected["A"]).abs().max().item() <= largest


def test_inside_activation_checkpointing() -> None:
    case = make_case(groups=2)
    expected = case.gradients(_merge(case))
    y = torch.utils.checkpoint.checkpoint(lambda: _merge(case), use_reentrant=False)
    assert_close(case.gradients(y), expected, tolerance=0)


def test_compiled_without_a_graph_break() -> None:
    case = make_case(groups=2)
    expected = case.gradients(_merge(case))
    compiled = torch.compile(_merge, backend="aot_eager", fullgraph=True)
    assert_close(case.gradients(compiled(case)), expected, tolerance=0)


@pytest.mark.parametrize("is_tensor", [True, False])
def test_shapes_alone_are_enough(is_tensor: bool) -> None:
    """Meta and fake tensors go through forward and backward: memory can be estimated, and no value is read."""
    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            A, B = torch.empty(2, 2, 9, 2, requires_grad=True), torch.empty(2, 2, 7, 2, requires_grad=True)
            x, weight = torch.empty(3, 9, requires_grad=True), torch.empty(14, 9)
            sparsity = torch.empty(2, dtype=torch.float64) if is_tensor else 0.5
            y = merge_linear(x, weight, A, B, sparsity=sparsity)
            y.sum().backward()
        assert y.shape == (3, 14)
        assert A.grad is not None
        assert x.grad is not None
