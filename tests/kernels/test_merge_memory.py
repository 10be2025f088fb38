"""The op's transient memory, counted in buffers of the weight's size: what its README states."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from snell_scale.kernels.merge import merge_linear

from .merge_cases import make_case

ROWS, NUM_IN = 300, 250


class _LiveBytes(TorchDispatchMode):
    """The bytes of storages made while it is on, now and at most; `existing` tensors are not counted."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, storage: int) -> None:
        self.live -= self._sizes.pop(storage, 0)


@pytest.mark.parametrize(
    ("kernel", "forward", "backward"),
    [
        ("linear", 2.25, 3),
        ("distance", 2.25, 5),
        ("sigmoid", 2.25, 5),
        ("rbf", 2.25, 5),
        ("exponential", 2.25, 5),
        ("mixk", 3, 8),
    ],
)
@pytest.mark.parametrize("groups", [1, 3])
def test_transient_buffers(kernel: str, forward: float, backward: float, groups: int) -> None:
    """In float32 buffers of one group; G > 1 adds the whole merged weight. 0.1: x, y, factors and their gradients
    are small beside 300 x 250, and with three groups one of the counted buffers is the merged weight itself.
    """
    case = make_case(kernel, groups=groups, rows=ROWS, num_in=NUM_IN, rank=4, num_tokens=2, dtype=torch.float32)
    case.weight.requires_grad_(False)
    existing = [*case.leaves().values(), case.dy]
    in_forward, in_backward = _LiveBytes(existing), _LiveBytes(existing)
    with in_forward:
        y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
    with in_backward:
        y.backward(case.dy)
    one_buffer = ROWS * NUM_IN * 4
    whole = groups if groups > 1 else 0
    assert in_forward.peak / one_buffer <= forward + whole + 0.1
    assert in_backward.peak / one_buffer <= backward + whole + 0.1
    assert in_forward.live / one_buffer <= 0.05
