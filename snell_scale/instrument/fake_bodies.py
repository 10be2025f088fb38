"""What the merge op holds while it runs, found out without values: on fake tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves

from snell_scale.kernels.merge import PYTHON_BODIES

BodyBytes: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]
"""(operator, args, kwargs) → the most bytes that it holds at once beside its arguments and its results."""
Counted: TypeAlias = Callable[[list[Tensor]], AbstractContextManager[Callable[[], int]]]
"""(tensors that stand) → a block; what it gives says how many bytes beside these were alive at once in it."""


class BodyPeaks:
    """`BodyBytes` by running the operator's body in torch operations, once per shape of its arguments.

    On fake tensors a body costs a hundred calls of the dispatcher, and a model has few shapes of layers.
    """

    def __init__(self, counted: Counted) -> None:
        self._counted = counted
        self._known: dict[Any, int] = {}

    def __call__(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        leaves = tree_leaves((args, kwargs))
        key = (operator, *(_signature(leaf) for leaf in leaves))
        if key not in self._known:
            with self._counted([leaf for leaf in leaves if isinstance(leaf, Tensor)]) as peak_bytes:
                results = tree_leaves(PYTHON_BODIES[operator](*args, **kwargs))
            own = sum(result.untyped_storage().nbytes() for result in results)
            self._known[key] = max(0, peak_bytes() - own)
        return self._known[key]


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.device, tuple(leaf.shape), leaf.stride()
    return leaf
