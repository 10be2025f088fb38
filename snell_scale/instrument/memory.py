"""Peak memory of instrumented training steps, per phase and split by what the memory is for."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from snell_scale.instrument import nvml
from snell_scale.instrument.allocator import AllocatorMeter
from snell_scale.instrument.fake_bodies import BodyBytes
from snell_scale.instrument.host import host_memory
from snell_scale.instrument.storages import StorageLedger, storages_of, watched_storages
from snell_scale.records import MEMORY_CATEGORIES

OptimizerState: TypeAlias = Optimizer | Callable[[], Iterable[Tensor]]
_ByCategory: TypeAlias = Mapping[str, Iterable[Tensor]]
Extra: TypeAlias = _ByCategory | Callable[[], _ByCategory]

_TRAINING_PHASES = ("forward", "backward", "step")


class MemoryProbe:
    """Measures the steps run inside `with probe:`, each part inside `with probe.phase(name):`.

    Use it on one or a few steps after warm-up, never in a timed window: it watches every operator and, on
    CUDA, resets the allocator's peak counters. Forward, backward and step of one step belong into one
    with-block: what was allocated before it is known only once an operator touches it. The probe changes no
    result and keeps no tensor, module or optimizer alive; outside of its with-blocks it costs nothing and
    leaves no hook behind.

    Categories of a storage; the strongest that applies to it, in this order:
    - parameters: the module's parameters and buffers; storages resized in place: weights that FSDP2 gathers
    - optimizer: the optimizer's state, and parameters that only the optimizer has (master weights)
    - gradients: .grad of those parameters
    - activations: saved for backward outside of the phase "backward"; of the batch, what backward needs
    - communication: what collectives read and write: the buffers that weights are gathered into and gradients
      are summed in. Where these are the gradients themselves (DDP) they are gradients
    - temporary: everything else, such as the batch, gradients of activations, buffers of the step, what
      activation checkpointing recomputes during backward, and tensors that an autograd.Function keeps as
      attributes instead of through save_for_backward
    - transients: what the merge op holds while it runs: the merged weight, G, tiles of K. Its results are what
      any layer's are
    - unexplained: what the allocator counts beyond the storages seen; 0 where no allocator is asked
    A storage counts as what it turns out to be by the end of the phase. So a gradient made AND freed inside
    one phase (an optimizer that steps inside backward) is temporary.

    total_bytes, on CPU and other devices: the peak of live storages that operators were seen to read or
    write ("live tensor storages"). Not seen: work space inside an operator, and what compiled code
    (torch.compile) allocates and frees within itself; its inputs, outputs and saved tensors are seen.
    On CUDA ("cuda allocator"): the allocator's peak of allocated bytes, which has all of that; what exceeds
    the storages seen (also rounding to blocks) is unexplained. Storages on other devices than the
    module's do not count. Tensors not touched by any operator inside the with-block do not count either,
    unless they belong to the module, the optimizer or `extra`: DDP's buckets, before gradients are written there.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerState | None = None,
        *,
        extra: Extra | None = None,
        place: Callable[[], str | None] = lambda: None,
        body_bytes: BodyBytes | None = None,
    ) -> None:
        """Takes the phase "load": what of the model (and the optimizer) stands at this moment.

        module: already on its device. optimizer: a torch Optimizer, or a function that lists the tensors of
        its state. extra: category → further tensors that belong to it (the weights of an EMA → "optimizer"), or a
        function that gives them whenever it is asked.
        place: says which module runs; asked at every new peak, for `place_of_peak`. body_bytes: of fake tensors,
        what the merge op holds while it runs; None: what its CPU body would.
        Raises ValueError for an unknown category or an optimizer of another kind.
        """
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._module = weakref.ref(module)
        self._optimizer_tensors = _optimizer_tensors(optimizer)
        self._extra = _extra_storages(extra or {}, self.device)
        self._ledger = StorageLedger(self.device, place)
        self._body_bytes = body_bytes
        self._places: dict[str, str | None] = {}
        self.allocator = AllocatorMeter(self.device)
        self._watch: AbstractContextManager[None] | None = None
        self._open_phase: str | None = None
        self._see_standing()
        self._phases = {"load": self._entry(self._ledger.live, peak=False)}
        self._ledger.clear()

    def __enter__(self) -> "MemoryProbe":
        if self._watch is not None:
            raise ValueError("this MemoryProbe is already active: leave its with-block before entering it again")
        self._see_standing()
        self._watch = watched_storages(self._ledger, self._body_bytes)
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._watch is not None
        self._watch.__exit__(kind, error, trace)
        self._watch = None
        self._ledger.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One part of a step. Of several phases of one name the one with the largest total is reported.

        A phase that ends with an exception (out of memory) is recorded up to there.
        """
        self._check_phase(name)
        self._open_phase = name
        self._see_standing()
        self._ledger.start_peak()
        self.allocator.reset_peaks()
        try:
            with ExitStack() as stack:
                if name != "backward":
                    hooks = torch.autograd.graph.saved_tensors_hooks(partial(_pack, self._ledger), _unpack)
                    stack.enter_context(hooks)
                yield
        finally:
            self._open_phase = None
            self._see_standing()
            self._keep_larger(name, self._entry(self._ledger.peak, peak=True))

    def report(self) -> dict[str, Any]:
        """{"device", "source", "phases": {name: entry}, "peak": the training step's largest, its "phase",
        "allocator": as AllocatorMeter reports it, "host": as host_memory does}.

        Evaluation is no part of the peak while a training phase was measured: its batch has a size of its own.

        entry: total_bytes and its exact split at that instant, `<category>_bytes`; on CUDA also the phase's
        own peaks allocated_bytes, active_bytes (with what was freed and still waits for a stream) and
        reserved_bytes, and nvml_used_bytes at its end (the whole device's, all processes; None without a
        driver): the driver keeps no peak, and memory that the allocator reserved it keeps.
        """
        of_training = [name for name in self._phases if name in _TRAINING_PHASES]
        name = max(of_training or self._phases, key=lambda name: self._phases[name]["total_bytes"])
        return {
            "device": str(self.device),
            "source": "cuda allocator" if self.device.type == "cuda" else "live tensor storages",
            "phases": {name: dict(entry) for name, entry in self._phases.items()},
            "peak": {"phase": name, **self._phases[name]},
            "allocator": self.allocator.report(),
            "host": host_memory(),
        }

    def place_of_peak(self) -> str | None:
        """What `place` said when the reported peak was reached."""
        return self._places.get(self.report()["peak"]["phase"])

    def _check_phase(self, name: str) -> None:
        if self._watch is None:
            raise ValueError(f'phase "{name}" outside of the probe: open it inside `with probe:`')
        if self._open_phase is not None:
            raise ValueError(f'phase "{name}" inside phase "{self._open_phase}": phases follow one another')
        if name == "load":
            raise ValueError('"load" is what stands when the probe is made: give this phase another name')

    def _see_standing(self) -> None:
        module = self._module()
        parameters = [] if module is None else list(module.parameters())
        buffers = [] if module is None else list(module.buffers())
        for tensor in parameters + buffers:
            self._ledger.see(tensor, "parameters")
        optimizer_tensors = self._optimizer_tensors()
        for tensor in optimizer_tensors:
            self._ledger.see(tensor, "optimizer")
        for tensor in parameters + optimizer_tensors:
            # Other tensors have no .grad of their own, and asking one that is no leaf for it warns.
            if tensor.is_leaf and tensor.grad is not None:
                self._ledger.see(tensor.grad, "gradients")
        for category, storage in self._extra():
            self._ledger.see_storage(storage, category)

    def _entry(self, split: Mapping[str, int], *, peak: bool) -> dict[str, Any]:
        if self.device.type != "cuda":
            return _entry_of(split)
        cuda = torch.cuda
        allocated = cuda.max_memory_allocated(self.device) if peak else cuda.memory_allocated(self.device)
        reserved = cuda.max_memory_reserved(self.device) if peak else cuda.memory_reserved(self.device)
        active = cuda.memory_stats(self.device).get(f"active_bytes.all.{'peak' if peak else 'current'}", 0)
        unseen = max(0, allocated - sum(split.values()))
        return {
            **_entry_of({**split, "unexplained": unseen}),
            "allocated_bytes": allocated,
            "active_bytes": active,
            "reserved_bytes": reserved,
            "nvml_used_bytes": nvml.used_bytes(self.device),
        }

    def _keep_larger(self, name: str, entry: dict[str, Any]) -> None:
        kept = self._phases.get(name)
        if kept is None or entry["total_bytes"] > kept["total_bytes"]:
            self._phases[name], self._places[name] = entry, self._ledger.peak_place


def _entry_of(split: Mapping[str, int]) -> dict[str, Any]:
    total = sum(split.values())
    return {"total_bytes": total, **{f"{category}_bytes": split[category] for category in MEMORY_CATEGORIES}}


def _pack(ledger: StorageLedger, tensor: Tensor) -> Tensor:
    ledger.see(tensor, "activations")
    # A result saved by the node that made it would keep itself alive through its grad_fn, hence the detach.
    # Leaves go through as they are: engines that shard swap the data of the very Parameter between forward
    # and backward, and a detached copy would hold on to the old data.
    return tensor if tensor.grad_fn is None else tensor.detach()


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def _optimizer_tensors(optimizer: OptimizerState | None) -> Callable[[], list[Tensor]]:
    if optimizer is None:
        return list
    if isinstance(optimizer, Optimizer):
        return partial(_state_of, weakref.ref(optimizer))
    if callable(optimizer):
        return lambda: list(optimizer())
    raise ValueError(
        f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer, None, or a function "
        "that returns the tensors of the optimizer's state"
    )


def _state_of(reference: "weakref.ref[Optimizer]") -> list[Tensor]:
    optimizer = reference()
    if optimizer is None:
        return []
    leaves = tree_leaves([list(optimizer.state.values()), optimizer.param_groups])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _extra_storages(extra: Extra, device: torch.device) -> Callable[[], list[tuple[str, torch.UntypedStorage]]]:
    """A function that gives (category, storage) of what is alive of them; it keeps none of them alive."""
    if callable(extra):
        return lambda: _by_category(extra(), device)
    unknown = sorted(extra.keys() - set(MEMORY_CATEGORIES))
    if unknown:
        raise ValueError(f"extra: unknown categories {unknown}, expected some of {list(MEMORY_CATEGORIES)}")
    kept = [(category, weakref.ref(storage)) for category, storage in _by_category(extra, device)]

    def alive() -> list[tuple[str, torch.UntypedStorage]]:
        found = ((category, reference()) for category, reference in kept)
        return [(category, storage) for category, storage in found if storage is not None]

    return alive


def _by_category(extra: _ByCategory, device: torch.device) -> list[tuple[str, torch.UntypedStorage]]:
    pairs = ((category, tensor) for category, tensors in extra.items() for tensor in tensors)
    return [(category, storage) for category, tensor in pairs for storage in storages_of(tensor, device)]
