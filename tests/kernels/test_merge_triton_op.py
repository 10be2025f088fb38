"""The whole op under Triton, through the public functions: output, every gradient, convolutions, the memory."""

import math

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear

from .merge_cases import KERNEL_NAMES, MergeCase, assert_close, make_case
from .merge_triton_cases import DEVICE, require_interpreter_or_gpu

# float32 sums in another order; dα, dγ, dβ and the gradients of close pairs cancel (see test_merge_precision.py).
TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def _triton_can_run() -> None:
    require_interpreter_or_gpu()


def _case(kernel: str = "distance", *, groups: int = 2, rows: int = 21, num_in: int = 37) -> MergeCase:
    case = make_case(kernel, groups=groups, rows=rows, num_in=num_in, dtype=torch.float32)
    case.dy = case.dy.to(DEVICE)
    for name in ("x", "weight", "bias", "A", "B"):
        setattr(case, name, getattr(case, name).detach().to(DEVICE).requires_grad_())
    params = {n: p.detach().to(DEVICE).requires_grad_() for n, p in case.settings["kernel_params"].items()}
    case.settings["kernel_params"] = params
    return case


def _linear(case: MergeCase, implementation: str, memory: Tensor | None = None) -> Tensor:
    arguments = (case.x, case.weight, case.A, case.B, case.bias)
    return merge_linear(*arguments, implementation=implementation, threshold_memory=memory, **case.settings)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_linear_equals_the_torch_implementation(kernel: str, sparsity: float | None) -> None:
    case = _case(kernel)
    case.settings["sparsity"] = sparsity
    expected = case.gradients(_linear(case, "torch"))
    assert_close(case.gradients(_linear(case, "triton")), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("kernel", ["distance", "mixk"])
def test_convolutions_and_the_delta_alone(kernel: str) -> None:
    case = _case(kernel, groups=1, rows=6, num_in=27)
    case.weight = case.weight.detach().view(6, 3, 3, 3).requires_grad_()
    case.x = torch.randn(2, 3, 6, 5, device=DEVICE, generator=_generator()).requires_grad_()
    found = []
    for implementation in ("torch", "triton"):
        y = merge_conv2d(
            case.x,
            case.weight,
            case.A,
            case.B,
            case.bias,
            padding=1,
            implementation=implementation,
            **case.settings,
        )
        case.dy = torch.ones_like(y)
        found.append(case.gradients(y))
    assert_close(found[1], found[0], tolerance=TOLERANCE)
    deltas = [delta_weight(case.A, case.B, implementation=name, **case.settings) for name in ("torch", "triton")]
    assert_close({"delta": deltas[1]}, {"delta": deltas[0]}, tolerance=TOLERANCE)


def test_the_memory_changes_nothing_but_itself() -> None:
    case = _case(rows=50, num_in=90)  # 4500 entries: above those that are collected whole
    expected = case.gradients(_linear(case, "triton"))
    memory = torch.full((2, 2), math.nan, device=DEVICE)
    for _ in range(3):
        assert_close(case.gradients(_linear(case, "triton", memory)), expected, tolerance=0)
        assert memory.isfinite().all()


def test_activation_checkpointing_and_repetition() -> None:
    case = _case("mixk")
    expected = case.gradients(_linear(case, "triton"))
    y = torch.utils.checkpoint.checkpoint(lambda: _linear(case, "triton"), use_reentrant=False)
    assert_close(case.gradients(y), expected, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layers_with_float32_factors(dtype: torch.dtype) -> None:
    case = _case()
    for name in ("x", "weight", "bias", "dy"):
        value = getattr(case, name).detach().to(dtype)
        setattr(case, name, value if name == "dy" else value.requires_grad_())
    expected = case.gradients(_linear(case, "torch"))
    found = case.gradients(_linear(case, "triton"))
    # One unit in the last place of a merged weight, which the interpreter truncates where a GPU rounds.
    assert_close(found, expected, tolerance=2 * torch.finfo(dtype).eps)
    assert {name: each.dtype for name, each in found.items()} == {n: e.dtype for n, e in expected.items()}


def _generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1)
