"""What the collectives of training steps carry: calls, payload and bytes over the wire, by operation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CommunicationCounter(TorchDispatchMode):
    """Counts the collectives that this thread issues inside `with counter:`; several with-blocks add up.

    Make it after the process group. Use it on steps after the first two (DDP arranges its buckets anew in the
    second, ZeRO-3 compares its ranks' traces in them), never in a timed window: it watches every operator. It
    changes no result, keeps no tensor and leaves no hook behind. It sees what goes through torch's dispatcher,
    whatever the backend: torch.distributed's functions, DDP's reducer, FSDP2, DTensors, DeepSpeed, what compiled
    code calls, and what autograd's threads issue for this thread's backward.

    Payload is the size of the whole tensor: what an all_reduce, all_to_all or reduce_scatter reads on one rank,
    what an all_gather leaves on one rank, the tensor that broadcast or reduce moves, all ranks' parts of a
    gather or scatter. Padding to a multiple of the ranks travels, so it counts.

    Wire bytes are a model, not a measurement: what a rank sends when N ranks move a payload S in a ring:
    all_reduce 2(N-1)/N S; all_gather, reduce_scatter and all_to_all (N-1)/N S. For operations with a root the
    mean over the ranks: broadcast and reduce (pipelined along the ring, one rank does not send) (N-1)/N S;
    gather and scatter (N-1)/N S by all ranks together. Backends may use trees, and gloo does not always use
    rings. N is the size of the operation's own group, so a rank outside of it counts nothing.

    Not counted: barriers; everything on `control_group` (what hosts tell each other: votes, objects); what
    other threads do (a checkpoint written in the background). Objects exchanged on any other group are tensors
    as others are, and count. What is not known here (sends from one rank to one other: no engine makes any) is
    named in the report.
    """

    supports_higher_order_operators = True

    def __init__(self, control_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._control_group = control_group
        self._traffic: dict[str, _Traffic] = {}
        self._unknown: set[str] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Any other mode would make compiled code run eagerly, and another program be measured."""
        return True

    def report(self) -> dict[str, Any]:
        """{"world_size", "operations": {name: {"calls", "payload_bytes"}}, "payload_bytes",
        "wire_bytes_per_rank"}: this rank's, plain values; an operation that was not called is left out.
        With "uncounted_operations" where there were some: the sums are then too small.
        """
        traffic = dict(sorted(self._traffic.items()))
        uncounted = {"uncounted_operations": sorted(self._unknown)} if self._unknown else {}
        return {
            **uncounted,
            "world_size": self._world_size,
            "operations": {
                name: {"calls": entry.num_calls, "payload_bytes": entry.payload_bytes}
                for name, entry in traffic.items()
            },
            "payload_bytes": sum(entry.payload_bytes for entry in traffic.values()),
            "wire_bytes_per_rank": round(sum(entry.wire_bytes for entry in traffic.values())),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # The DTensor goes first: the collectives that it makes of this operator come here by themselves.
            return NotImplemented
        kwargs = kwargs or {}
        if getattr(func, "namespace", None) in _NAMESPACES:
            self._count(func._schema, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, schema: torch.FunctionSchema, args: Any, kwargs: Mapping[str, Any]) -> None:
        names = [argument.name for argument in schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}  # defaults may be left out of args
        group = _group_of(arguments)
        if group is None or schema.name in _WITHOUT_PAYLOAD or group == self._control_group:
            return
        if schema.name not in _COLLECTIVES:
            self._unknown.add(schema.name)  # measuring must not end a run
            return
        row = _COLLECTIVES[schema.name]
        num_bytes = _num_bytes(arguments[row.argument]) * (group.size() if row.is_part else 1)
        self._traffic.setdefault(row.operation, _Traffic()).add(num_bytes, row.operation, group.size())


@dataclass
class _Traffic:
    num_calls: int = 0
    payload_bytes: int = 0
    wire_bytes: Fraction = field(default_factory=Fraction)

    def add(self, num_bytes: int, operation: str, group_size: int) -> None:
        self.num_calls += 1
        self.payload_bytes += num_bytes
        others = Fraction(group_size - 1, group_size)
        if operation == "all_reduce":
            others *= 2
        elif operation in ("gather", "scatter"):
            others /= group_size
        self.wire_bytes += others * num_bytes


@dataclass(frozen=True)
class _Collective:
    """operation: its name in the report. argument: holds the payload; is_part: only one rank's part of it."""

    operation: str
    argument: str
    is_part: bool = False


_COLLECTIVES = {
    # What torch.distributed, DDP's reducer, FSDP2 and DeepSpeed call.
    "c10d::allreduce_": _Collective("all_reduce", "tensors"),
    "c10d::allreduce_coalesced_": _Collective("all_reduce", "tensors"),
    "c10d::allgather_": _Collective("all_gather", "output_tensors"),
    "c10d::allgather_coalesced_": _Collective("all_gather", "output_lists"),
    "c10d::_allgather_base_": _Collective("all_gather", "output_tensor"),
    "c10d::allgather_into_tensor_coalesced_": _Collective("all_gather", "outputs"),
    "c10d::reduce_scatter_": _Collective("reduce_scatter", "input_tensors"),
    "c10d::_reduce_scatter_base_": _Collective("reduce_scatter", "input_tensor"),
    "c10d::reduce_scatter_tensor_coalesced_": _Collective("reduce_scatter", "inputs"),
    "c10d::broadcast_": _Collective("broadcast", "tensors"),
    "c10d::reduce_": _Collective("reduce", "tensors"),
    "c10d::alltoall_": _Collective("all_to_all", "input_tensors"),
    "c10d::alltoall_base_": _Collective("all_to_all", "input"),
    "c10d::gather_": _Collective("gather", "input_tensors", is_part=True),  # only the root has the outputs
    "c10d::scatter_": _Collective("scatter", "output_tensors", is_part=True),
    # What DTensors call. These call the ones above in turn, unseen: a mode does not see what it runs itself.
    "_c10d_functional::all_reduce": _Collective("all_reduce", "input"),
    "_c10d_functional::all_reduce_": _Collective("all_reduce", "input"),
    "_c10d_functional::all_reduce_coalesced": _Collective("all_reduce", "inputs"),
    "_c10d_functional::all_reduce_coalesced_": _Collective("all_reduce", "inputs"),
    "_c10d_functional::all_gather_into_tensor": _Collective("all_gather", "input", is_part=True),
    "_c10d_functional::all_gather_into_tensor_out": _Collective("all_gather", "input", is_part=True),
    "_c10d_functional::all_gather_into_tensor_coalesced": _Collective("all_gather", "inputs", is_part=True),
    "_c10d_functional::reduce_scatter_tensor": _Collective("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_out": _Collective("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": _Collective("reduce_scatter", "inputs"),
    "_c10d_functional::broadcast": _Collective("broadcast", "input"),
    "_c10d_functional::broadcast_": _Collective("broadcast", "input"),
    "_c10d_functional::all_to_all_single": _Collective("all_to_all", "input"),
    "_dtensor::shard_dim_alltoall": _Collective("all_to_all", "input"),
}
_NAMESPACES = frozenset(name.partition("::")[0] for name in _COLLECTIVES)
_WITHOUT_PAYLOAD = ("c10d::barrier", "c10d::monitored_barrier_")


def _group_of(arguments: Mapping[str, Any]) -> dist.ProcessGroup | None:
    """The group that the operator works on; None where it has none, and so does not communicate."""
    group: Any = arguments.get("process_group", arguments.get("group_name"))
    if isinstance(group, torch.ScriptObject):
        return dist.ProcessGroup.unbox(group)
    return _group_by_name(group) if isinstance(group, str) else group


def _group_by_name(name: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _num_bytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
