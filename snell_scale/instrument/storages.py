"""A ledger of the tensor storages alive on one device: how large each is, and what it is for."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from snell_scale.instrument.fake_bodies import BodyBytes, BodyPeaks
from snell_scale.kernels.merge import PYTHON_BODIES
from snell_scale.records import MEMORY_CATEGORIES

# A storage that is several things at once counts as the strongest: a parameter saved for backward stays a
# parameter, a saved tensor that is also the optimizer's belongs to the optimizer. What the merge op hands out is
# no transient of it any more: any layer has results.
_STRENGTH = {
    "unexplained": 0,
    "transients": 1,
    "temporary": 2,
    "communication": 3,
    "activations": 4,
    "gradients": 5,
    "optimizer": 6,
    "parameters": 7,
}
assert _STRENGTH.keys() == set(MEMORY_CATEGORIES)
_COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")


@dataclass(slots=True)
class _Entry:
    reference: "weakref.ref[torch.UntypedStorage]"
    num_bytes: int
    category: str
    first_seen: int


class StorageLedger:
    """Live bytes per category, and the split at the instant of the largest total since `start_peak`.

    Holds weak references only. torch keeps one Python object per storage for as long as the storage lives,
    so the weak reference's callback runs at the very release of the memory, and views, in-place results and
    detached copies all lead to the one entry of their storage.

    What a storage is for is often known only after it was allocated (an output is saved for backward, a
    buffer becomes .grad, the optimizer's first step makes its state). A storage that is alive now and was
    first seen before the peak was alive at the peak as well, so naming it late corrects the peak's split too.
    """

    def __init__(self, device: torch.device, place: Callable[[], str | None] = lambda: None) -> None:
        """place: says where in the model an operator runs; asked at every new peak."""
        self.device = device
        self.place = place
        self.peak_place: str | None = None
        self.live: dict[str, int] = dict.fromkeys(MEMORY_CATEGORIES, 0)
        self.peak: dict[str, int] = dict(self.live)
        self._peak_total = 0
        self._peak_clock = 0
        self._clock = 0
        self._entries: dict[int, _Entry] = {}

    def see(self, tensor: Tensor, category: str = "temporary") -> None:
        """Enter the tensor's storages (on this device), or strengthen the category they stand under."""
        for storage in storages_of(tensor, self.device):
            self.see_storage(storage, category)

    def see_storage(self, storage: torch.UntypedStorage, category: str) -> None:
        key = id(storage)
        entry = self._entries.get(key)
        if entry is not None and entry.num_bytes != storage.nbytes():
            # Resized in place: the new size was not there at an earlier peak, so it is a new entry.
            category = max(category, entry.category, key=_STRENGTH.__getitem__)
            self._release(key)
            entry = None
        if entry is None:
            self._add(storage, category)
        elif _STRENGTH[category] > _STRENGTH[entry.category]:
            self._strengthen(entry, category)

    def pass_through(self, num_bytes: int, category: str) -> None:
        """Bytes that are there for an instant, and are no storage that could be seen."""
        total = sum(self.live.values()) + num_bytes
        if num_bytes > 0 and total > self._peak_total:
            split = {**self.live, category: self.live[category] + num_bytes}
            self._new_peak(split, total)

    def start_peak(self) -> None:
        """Forget the peak so far: the largest total is now what is alive now."""
        self.peak = dict(self.live)
        self._peak_total = sum(self.live.values())
        self._peak_clock = self._clock
        self.peak_place = None

    def clear(self) -> None:
        """Drop every entry and its weak reference, so that nothing runs when a storage is released."""
        self._entries.clear()
        self.live = dict.fromkeys(MEMORY_CATEGORIES, 0)
        self.start_peak()

    def _add(self, storage: torch.UntypedStorage, category: str) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        self._clock += 1
        reference = weakref.ref(storage, partial(self._on_release, key))
        self._entries[key] = _Entry(reference, num_bytes, category, self._clock)
        self.live[category] += num_bytes
        total = sum(self.live.values())
        if total > self._peak_total:
            self._new_peak(dict(self.live), total)

    def _new_peak(self, split: dict[str, int], total: int) -> None:
        self.peak, self._peak_total, self._peak_clock = split, total, self._clock
        self.peak_place = self.place()

    def _strengthen(self, entry: _Entry, category: str) -> None:
        splits = [self.live]
        if entry.first_seen <= self._peak_clock:
            splits.append(self.peak)
        for split in splits:
            split[entry.category] -= entry.num_bytes
            split[category] += entry.num_bytes
        entry.category = category

    def _on_release(self, key: int, _: "weakref.ref[torch.UntypedStorage]") -> None:
        self._release(key)

    def _release(self, key: int) -> None:
        entry = self._entries.pop(key)
        self.live[entry.category] -= entry.num_bytes


@contextmanager
def watched_storages(ledger: StorageLedger, body_bytes: BodyBytes | None = None) -> Iterator[None]:
    """Meanwhile, enters every storage on the ledger's device that an operator touches, or that is resized.

    Resizing a storage is no operator, but it is how FSDP2 frees and allocates whole weights: those count as
    parameters, which they are, and not as the activations that autograd saves them as.
    """
    resize = torch.UntypedStorage.resize_

    def resize_and_see(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
        resize(storage, num_bytes)
        if storage.device in (ledger.device, torch.device("meta")):  # where a fake tensor's storage is
            ledger.see_storage(storage, "parameters")
        return storage

    with patch.object(torch.UntypedStorage, "resize_", resize_and_see), _StorageWatch(ledger, body_bytes):
        yield


class _StorageWatch(TorchDispatchMode):
    """While active, enters every operator's inputs and outputs into the ledger.

    Inputs as well as outputs, so that tensors made elsewhere (the batch, results of compiled code) count
    from their first use. Ops inside compiled code are left to it: ordinary modes would make torch fall
    back to eager, and measure another program. What a collective reads or writes is a communication buffer; what
    an operator written in torch operations (the merge op) makes inside of it is a transient.
    """

    def __init__(self, ledger: StorageLedger, body_bytes: BodyBytes | None) -> None:
        super().__init__()
        self._ledger = ledger
        self._category = "temporary"
        self._body_bytes = body_bytes or BodyPeaks(partial(_counted, ledger.device))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see_all((args, kwargs), self._category)
        body = PYTHON_BODIES.get(func)
        if body is None:
            result = func(*args, **kwargs)
        elif _is_fake(args):
            result = func(*args, **kwargs)
            self._see_all(result, self._category)
            self._ledger.pass_through(self._body_bytes(func, args, kwargs), "transients")
        else:
            with self, self._inside_operator():
                result = body(*args, **kwargs)
        self._see_all(result, self._category)
        if getattr(func, "namespace", None) in _COLLECTIVES:
            self._see_all((args, kwargs, result), "communication")
        return result

    @contextmanager
    def _inside_operator(self) -> Iterator[None]:
        outside, self._category = self._category, "transients"
        try:
            yield
        finally:
            self._category = outside

    def _see_all(self, tree: Any, category: str) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._ledger.see(leaf, category)


@contextmanager
def _counted(device: torch.device, inputs: list[Tensor]) -> Iterator[Callable[[], int]]:
    """Gives a function that says how many bytes were alive at once in the block, beside the inputs."""
    ledger = StorageLedger(device)
    for tensor in inputs:
        ledger.see(tensor)
    before = sum(ledger.live.values())
    ledger.start_peak()
    with watched_storages(ledger):
        yield lambda: sum(ledger.peak.values()) - before


def _is_fake(tree: Any) -> bool:
    """Whether there are no values to compute with, only shapes."""
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(tree))


def storages_of(tensor: Tensor, device: torch.device) -> Iterator[torch.UntypedStorage]:
    """The storages on `device` behind a tensor; of a wrapper (DTensor), those of its inner tensors.

    Sparse and other opaque layouts have no storage of their own and yield nothing.
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):
                yield from storages_of(inner, device)
    elif tensor.layout is torch.strided and tensor.device == device:
        yield tensor.untyped_storage()
