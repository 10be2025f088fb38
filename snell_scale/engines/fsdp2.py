"""FSDP2: every parameter in parts over the ranks, put together block by block where it is computed with."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from snell_scale.config import Config
from snell_scale.engines.distributed import DistributedConfig
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.shardable import check_shardable
from snell_scale.engines.torch_engine import TorchEngine

# Every parameter stays in its own dtype, frozen bf16 beside trained fp32: autocast reconciles them.
_PRECISION = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)


class Fsdp2Config(DistributedConfig):
    """Several processes, parameters, gradients and optimizer state in parts: fully_shard."""

    name: Literal["fsdp2"] = "fsdp2"
    replicas: int = Field(
        default=1,
        gt=0,
        description="Groups of ranks that each hold the model once (HSDP); 1: all ranks share it.",
    )
    reshard_after_forward: bool = Field(
        default=True, description="Free a block's whole weights until backward; false: more memory, less traffic."
    )

    @model_validator(mode="after")
    def _check_precision(self) -> "Fsdp2Config":
        if self.precision == "fp16":
            raise ValueError("engine.precision=fp16 does not go with fsdp2; use bf16, or engine.name=ddp")
        return self

    def check_run(self, config: Config) -> None:
        if config.training.compile:
            raise ValueError(
                "training.compile does not go with engine.name=fsdp2: what is compiled would have to include the "
                "gathering of the weights; set it to false, or engine.name=ddp"
            )

    def check_module(self, module: nn.Module) -> None:
        check_shardable(module, "engine.name=fsdp2")

    def build(self, ranks: Ranks) -> "Fsdp2Engine":
        """ValueError where the ranks cannot be divided into `replicas` groups."""
        if ranks.world_size % self.replicas != 0:
            raise ValueError(
                f"engine.replicas={self.replicas} does not divide the {ranks.world_size} rank(s) of this job; "
                "set it to a divisor, or start another number of processes"
            )
        return Fsdp2Engine(self, ranks)


class Fsdp2Engine(TorchEngine):
    """See `interfaces.Engine`. Parameters, gradients and moments are DTensors, laid out alike."""

    _mesh: DeviceMesh
    _root: FSDPModule

    def __init__(self, config: Fsdp2Config, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self._replicas = config.replicas
        self._num_shards = ranks.world_size // config.replicas
        self._reshard_after_forward = config.reshard_after_forward

    def describe(self) -> str:
        return "fsdp2" if self._replicas == 1 else f"fsdp2 replicas={self._replicas}"

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:
        """Until the last microbatch gradients add up whole on each rank; weights are freed as ever."""
        self._root.set_requires_gradient_sync(is_last)
        yield

    def place(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        assert isinstance(like, DTensor)
        return _part(whole.to(self.device), like)

    def gather(self, names: Collection[str]) -> dict[str, Tensor]:
        gathered = {}
        for name, tensor in self._named(sorted(names)).items():  # in one order on all ranks
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.ranks.is_first:
                gathered[name] = whole.to("cpu", copy=True)
        return gathered

    @torch.no_grad()
    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        names = self.ranks.first(lambda: list(tensors))
        for name, tensor in self._named(names).items():
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            if self.ranks.is_first:
                whole.copy_(tensors[name])
            dist.broadcast(whole, src=0)
            tensor.copy_(_part(whole, tensor) if isinstance(tensor, DTensor) else whole)

    def _distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        self._mesh = self._make_mesh()
        settings: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": _PRECISION,
            "shard_placement_fn": self._placement,
        }
        # Each call moves what it shards to the device: there is never more than one whole block on it.
        for block in blocks:
            fully_shard(block, reshard_after_forward=self._reshard_after_forward, **settings)
        # Backward starts with what is left to the root: it stays whole in between.
        self._root = fully_shard(module, reshard_after_forward=False, **settings)
        module.register_forward_hook(_reshard_after_evaluation)
        return module

    def _make_mesh(self) -> DeviceMesh:
        if self._replicas == 1:
            return init_device_mesh(self.device.type, (self._num_shards,), mesh_dim_names=("shard",))
        shape = (self._replicas, self._num_shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def _placement(self, parameter: nn.Parameter) -> Shard:
        """Which dimension to cut: the first if that comes out even, or else the largest that does.

        The first costs no extra copies, but of a factor (1, H, in, r/H) one rank would get everything.
        """
        even = [dim for dim, size in enumerate(parameter.shape) if size % self._num_shards == 0]
        if not even or 0 in even:
            return Shard(0)
        return Shard(max(even, key=lambda dim: parameter.shape[dim]))

    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def _whole_norms(self, norms: Tensor) -> Tensor:
        squares = norms.square()
        dist.all_reduce(squares, group=self._mesh.get_group("shard"))  # replicas hold the same parts
        return squares.sqrt()


def _part(whole: Tensor, like: DTensor) -> DTensor:
    """`whole` cut as `like` is, without communication."""
    part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    # In older torch it is a view, which would keep the whole tensor alive.
    return cast(DTensor, part.clone())


def _reshard_after_evaluation(module: nn.Module, args: Any, output: Any) -> None:
    """Whole weights that no backward frees would stand in for the parts, and miss changes to these."""
    if not torch.is_grad_enabled():
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()
