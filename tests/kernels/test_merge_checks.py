"""Bad inputs: each is refused with what came, what was expected and what to do."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear

A, B = torch.rand(3, 2, 9, 2), torch.rand(3, 2, 7, 2)
X, W, BIAS = torch.rand(4, 9), torch.rand(21, 9), torch.rand(21)
IMAGES, FILTERS = torch.rand(1, 1, 5, 5), torch.rand(21, 1, 3, 3)
ONES = torch.ones(3)
MIXK = {"alpha": ONES, "gamma": ONES, "beta": ONES}

BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "unknown kernel": (
        lambda: delta_weight(A, B, sparsity=0.5, kernel="distence"),
        "unknown kernel 'distence' (did you mean 'distance'?)",
    ),
    "unknown weighting": (
        lambda: delta_weight(A, B, sparsity=0.5, weighting="sotf"),
        "unknown weighting 'sotf' (did you mean 'soft'?)",
    ),
    "other ranks": (lambda: delta_weight(A, torch.rand(3, 2, 7, 3), sparsity=0.5), "must be equal"),
    "other components": (lambda: delta_weight(A, torch.rand(3, 1, 7, 2), sparsity=0.5), "must be equal"),
    "other groups": (lambda: delta_weight(A, torch.rand(2, 2, 7, 2), sparsity=0.5), "must be equal"),
    "other dimensions": (lambda: delta_weight(A, B[0], sparsity=0.5), "same number of dimensions"),
    "two-dimensional factors": (lambda: delta_weight(A[0, 0], B[0, 0], sparsity=0.5), "3 or 4"),
    "rank 0": (lambda: delta_weight(A[..., :0], B[..., :0], sparsity=0.5), "not 0"),
    "other factor dtypes": (lambda: delta_weight(A, B.double(), sparsity=0.5), "one floating dtype"),
    "integer factors": (lambda: delta_weight(A.long(), B.long(), sparsity=0.5), "one floating dtype"),
    "weight of other width": (lambda: merge_linear(X, W[:, :8], A, B, sparsity=0.5), "(21, 9)"),
    "weight of other height": (lambda: merge_linear(X, W[:20], A, B, sparsity=0.5), "(20, 9)"),
    "weight of a convolution": (lambda: merge_linear(X, FILTERS, A, B, sparsity=0.5), "(out, in)"),
    "x of other width": (lambda: merge_linear(X[:, :8], W, A, B, sparsity=0.5), "(..., 9)"),
    "x a number": (lambda: merge_linear(X[0, 0], W, A, B, sparsity=0.5), "(..., 9)"),
    "x of other dtype": (
        lambda: merge_linear(X.bfloat16(), W, A, B, sparsity=0.5),
        "x is torch.bfloat16 but weight is torch.float32",
    ),
    "integer x": (lambda: merge_linear(X.long(), None, A, B, sparsity=0.5), "convert x"),
    "bias of other dtype": (
        lambda: merge_linear(X, W, A, B, BIAS.double(), sparsity=0.5),
        "bias is torch.float64",
    ),
    "bias of other length": (lambda: merge_linear(X, W, A, B, BIAS[:7], sparsity=0.5), "expected (21,)"),
    "missing parameters": (lambda: delta_weight(A, B, sparsity=0.5, kernel="mixk"), "add the missing"),
    "one parameter too many": (
        lambda: delta_weight(A, B, sparsity=0.5, kernel_params={"alpha": ONES}),
        "takes exactly nothing",
    ),
    "parameter of other length": (
        lambda: delta_weight(A, B, sparsity=0.5, kernel="mixk", kernel_params={**MIXK, "beta": ONES[:2]}),
        "kernel_params['beta'] has shape (2,); expected (3,)",
    ),
    "parameter a scalar for three groups": (
        lambda: delta_weight(A, B, sparsity=0.5, kernel="rbf", kernel_params={**MIXK, "beta": ONES[0]}),
        "one per group",
    ),
    "sparsity 1": (lambda: delta_weight(A, B, sparsity=1.0), "sparsity is 1.0; expected a number in [0, 1)"),
    "sparsity below 0": (lambda: delta_weight(A, B, sparsity=-0.1), "for a dense delta give None"),
    "sparsity not a number": (lambda: delta_weight(A, B, sparsity=float("nan")), "[0, 1)"),
    "sparsity True": (lambda: delta_weight(A, B, sparsity=[True, 0.5, 0.5]), "[0, 1)"),
    "two sparsities for three groups": (
        lambda: delta_weight(A, B, sparsity=[0.5, 0.5]),
        "got 2 sparsities for 3 groups",
    ),
    "sparsity tensor of other length": (
        lambda: delta_weight(A, B, sparsity=torch.tensor([0.5], dtype=torch.float64)),
        "shape (1,); expected (3,)",
    ),
    "sparsity tensor in float32": (lambda: delta_weight(A, B, sparsity=ONES), "expected torch.float64"),
    "grouped convolution": (
        lambda: merge_conv2d(torch.rand(1, 2, 5, 5), FILTERS, A, B, sparsity=0.5),
        "a grouped convolution is not supported",
    ),
    "convolution without any shape": (lambda: merge_conv2d(IMAGES, None, A, B, sparsity=0.5), "weight_shape"),
    "convolution with a matrix": (lambda: merge_conv2d(IMAGES, W, A, B, sparsity=0.5), "(out, in, kh, kw)"),
    "filters of other size": (
        lambda: merge_conv2d(IMAGES, torch.rand(21, 1, 2, 2), A, B, sparsity=0.5),
        "a matrix of (21, 4)",
    ),
    "padding with a stride": (
        lambda: merge_conv2d(IMAGES, FILTERS, A, B, stride=2, padding="same", sparsity=0.5),
        "'same' with stride 1",
    ),
    "padding of no known name": (
        lambda: merge_conv2d(IMAGES, FILTERS, A, B, padding="full", sparsity=0.5),
        "padding is 'full'",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what: str) -> None:
    call, message = BAD[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_same_inputs_made_right_are_taken() -> None:
    assert delta_weight(A, B, sparsity=[0.0, 0.5, 0.99]).shape == (21, 9)
    assert delta_weight(A, B, sparsity=0, kernel="mixk", kernel_params=MIXK).shape == (21, 9)
    assert merge_linear(X, W, A, B, BIAS, sparsity=0.5).shape == (4, 21)
    assert merge_conv2d(IMAGES, FILTERS, A, B, BIAS, sparsity=0.5).shape == (1, 21, 3, 3)
