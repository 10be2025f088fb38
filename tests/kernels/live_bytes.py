"""Counts the bytes of storages made while it is on, independently of the package's own instruments."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from snell_scale.kernels.merge import PYTHON_BODIES


class LiveBytes(TorchDispatchMode):
    """The bytes now and at most; `existing` tensors are not counted."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        body = PYTHON_BODIES.get(func)
        if body is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:
                result = body(*args, **(kwargs or {}))
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
