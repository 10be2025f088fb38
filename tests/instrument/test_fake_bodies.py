"""What the merge op's body holds, found out on fake tensors, against what it holds when it computes."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snell_scale.instrument.fake_bodies import BodyPeaks
from snell_scale.instrument.storages import _counted
from snell_scale.kernels.merge import PYTHON_BODIES
from snell_scale.kernels.merge.delta import KERNEL_PARAMETERS
from snell_scale.kernels.merge.operators import merge_backward, merge_forward, merge_thresholds
from tests.kernels.live_bytes import LiveBytes

# A search for a threshold depends on values: how many candidates it collects differs from call to call.
TOLERANCE = 0.05
NUM_OUT, NUM_IN, NUM_TOKENS, R, NUM_COMPONENTS = 320, 480, 16, 8, 2
OPERATORS = {"thresholds": merge_thresholds, "forward": merge_forward, "backward": merge_backward}


def _arguments(operator: Any, kernel: str, *, limit_bytes: int, num_groups: int = 1) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    parts = NUM_COMPONENTS if kernel == "distance" else 1
    A, B = (randn(num_groups, parts, size, R // parts) for size in (NUM_IN, NUM_OUT // num_groups))
    own = [torch.ones(num_groups) if n in KERNEL_PARAMETERS[kernel] else None for n in ("alpha", "gamma", "beta")]
    call = (A, B, *own, (), kernel, "magnitude", 1.0, "torch", limit_bytes)
    sparsity = torch.full((num_groups,), 0.7, dtype=torch.float64)
    if operator is merge_thresholds:
        return sparsity, None, *call
    taus, _ = PYTHON_BODIES[merge_thresholds](sparsity, None, *call)
    x, weight = randn(NUM_TOKENS, NUM_IN), randn(NUM_OUT, NUM_IN)
    if operator is merge_forward:
        return x, weight, None, taus, None, *call
    wanted = [True, False, False, True, True, *(each is not None for each in own)]
    return randn(NUM_TOKENS, NUM_OUT), x, weight, taus, None, list(x.shape), wanted, *call


def _measured(operator: Any, arguments: tuple[Any, ...]) -> int:
    """By a count of its own: the most bytes alive beside arguments and results."""
    with LiveBytes([each for each in arguments if isinstance(each, Tensor)]) as live:
        results = PYTHON_BODIES[operator](*arguments)
    return live.peak - sum(each.untyped_storage().nbytes() for each in _listed(results))


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _faked(operator: Any, arguments: tuple[Any, ...], peaks: BodyPeaks) -> int:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
        return peaks(operator, tuple(fake), {})


def _peaks() -> BodyPeaks:
    return BodyPeaks(partial(_counted, torch.device("cpu")))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kernel", KERNEL_PARAMETERS)
@pytest.mark.parametrize("limit_bytes", [2**26, 2**18], ids=["whole", "tiles"])
def test_shapes_alone_give_what_a_body_holds(name: str, kernel: str, limit_bytes: int) -> None:
    operator = OPERATORS[name]
    arguments = _arguments(operator, kernel, limit_bytes=limit_bytes)
    faked, measured = _faked(operator, arguments, _peaks()), _measured(operator, arguments)
    assert faked == pytest.approx(measured, rel=TOLERANCE)


def test_a_shape_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, num_calls = _peaks(), 0
    body = PYTHON_BODIES[merge_forward]

    def counted(*arguments: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return body(*arguments)

    monkeypatch.setitem(PYTHON_BODIES, merge_forward, counted)
    arguments = _arguments(merge_forward, "distance", limit_bytes=2**26)
    first = _faked(merge_forward, arguments, peaks)
    assert _faked(merge_forward, arguments, peaks) == first
    assert num_calls == 1
    others = _arguments(merge_forward, "distance", limit_bytes=2**16)  # a setting, not a shape
    assert _faked(merge_forward, others, peaks) < first
    assert num_calls == 2
