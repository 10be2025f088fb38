"""What the op promises besides its numbers: what it keeps, what it computes, and how it behaves at the edges."""

import gc
import itertools

import pytest
import torch
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear
from snell_scale.kernels.merge.products import LinearProduct

from .merge_cases import KERNEL_NAMES, MergeCase, assert_close, make_case


def _merge(case: MergeCase) -> Tensor:
    return merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept(
    kernel: str, sparsity: float | None, dtype: torch.dtype
) -> None:
    """Between forward and backward: x, the parameters themselves, and the thresholds."""
    case = make_case(kernel, sparsity=sparsity, groups=2, rows=20, num_in=30, num_tokens=3, dtype=torch.float32)
    x, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in (case.x, case.weight, case.bias))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = merge_linear(x, weight, case.A, case.B, bias, **case.settings)
    allowed = {tensor.data_ptr() for tensor in (x, weight, case.A, case.B, *case.settings["kernel_params"].values())}
    others = [tensor for tensor in kept if tensor.data_ptr() not in allowed]
    assert [tuple(tensor.shape) for tensor in others] == ([] if sparsity is None else [(2,)])
    (kept_weight,) = (tensor for tensor in kept if tensor.data_ptr() == weight.data_ptr())
    assert kept_weight.shape == weight.shape
    assert kept_weight.dtype == weight.dtype
    gc.collect()
    of_weights_size = [
        tensor
        for tensor in gc.get_objects()
        if isinstance(tensor, Tensor) and tensor.shape[-2:] in ((40, 30), (20, 30)) and tensor is not case.weight
    ]
    assert {tensor.data_ptr() for tensor in of_weights_size} <= {weight.data_ptr(), case.weight.data_ptr()}
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


@pytest.mark.parametrize("kernel", ["distance", "mixk", "linear", "sigmoid", "rbf", "exponential"])
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


def test_products_that_nobody_asked_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("grad_input", "grad_weight", "grad_bias"):
        original = getattr(LinearProduct, name)

        def counted(*arguments: object, name: str = name, original: object = original) -> object:
            calls.append(name)
            return original(*arguments)  # pyright: ignore

        monkeypatch.setattr(LinearProduct, name, counted)
