"""What the Triton implementation is said to hold while it runs, against what it allocates when it runs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snell_scale.estimate.cuda_transients import triton_body_bytes
from snell_scale.kernels.merge import PYTHON_BODIES
from snell_scale.kernels.merge.operators import merge_backward, merge_forward, merge_thresholds
from tests.kernels.live_bytes import LiveBytes
from tests.kernels.merge_triton_cases import DEVICE, require_interpreter_or_gpu

# The numbers leave out what is small beside a matrix: sums over columns, gradients of the kernel's parameters.
TOLERANCE = 0.1
NUM_OUT, NUM_IN, NUM_TOKENS, R, NUM_COMPONENTS = 512, 768, 4, 8, 2
ALL_WANTED = (True, False, True, True, True)


@pytest.fixture(autouse=True)
def _triton_can_run() -> None:
    require_interpreter_or_gpu()


def _call(kernel: str = "distance") -> tuple[Any, ...]:
    """The fields of Call for a linear layer."""
    generator = torch.Generator().manual_seed(0)
    rank = R // NUM_COMPONENTS
    A = torch.randn(1, NUM_COMPONENTS, NUM_IN, rank, generator=generator).to(DEVICE)
    B = torch.randn(1, NUM_COMPONENTS, NUM_OUT, rank, generator=generator).to(DEVICE)
    parameters = (torch.ones(1, device=DEVICE),) * 3 if kernel == "mixk" else (None,) * 3
    return A, B, *parameters, (), kernel, "magnitude", 1.0, "triton", 2**26


def _arguments(operator: Any, kernel: str) -> tuple[Any, ...]:
    call = _call(kernel)
    sparsity = torch.full((1,), 0.9, dtype=torch.float64, device=DEVICE)
    if operator is merge_thresholds:
        return sparsity, None, *call
    x, weight = torch.randn(NUM_TOKENS, NUM_IN, device=DEVICE), torch.randn(NUM_OUT, NUM_IN, device=DEVICE)
    taus, logs = PYTHON_BODIES[merge_thresholds](sparsity, None, *call)
    logs = logs if logs.dim() == 2 else None
    if operator is merge_forward:
        return x, weight, None, taus, logs, *call
    of_parameters = (kernel == "mixk",) * 3
    wanted = [*ALL_WANTED, *of_parameters]
    return torch.randn(NUM_TOKENS, NUM_OUT, device=DEVICE), x, weight, taus, logs, list(x.shape), wanted, *call


@pytest.mark.parametrize("operator", [merge_thresholds, merge_forward, merge_backward], ids=lambda op: op.name())
@pytest.mark.parametrize("kernel", ["distance", "mixk"])
def test_it_is_what_the_body_allocates(operator: Any, kernel: str) -> None:
    arguments = _arguments(operator, kernel)
    with LiveBytes([each for each in arguments if isinstance(each, Tensor)]) as live:
        results = PYTHON_BODIES[operator](*arguments)
    own = sum(result.untyped_storage().nbytes() for result in results) if operator is not merge_forward else 0
    own += results.untyped_storage().nbytes() if operator is merge_forward else 0
    assert triton_body_bytes(operator, arguments, {}) == pytest.approx(live.peak - own, rel=TOLERANCE)


def test_it_takes_shapes_alone() -> None:
    expected = {op: triton_body_bytes(op, _arguments(op, "distance"), {}) for op in PYTHON_BODIES}
    for operator, num_bytes in expected.items():
        arguments = _arguments(operator, "distance")
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
            assert triton_body_bytes(operator, tuple(fake), {}) == num_bytes


def test_a_dense_delta_has_no_threshold() -> None:
    assert triton_body_bytes(merge_thresholds, (None, None, *_call()), {}) == 0
