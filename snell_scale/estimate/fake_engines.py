"""Engines for fake tensors, on ranks that are not there."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from snell_scale.engines.fsdp2 import Fsdp2Config, Fsdp2Engine
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig, SingleEngine
from snell_scale.engines.torch_engine import TorchEngine


def fake_engine(config: Any, world_size: int) -> TorchEngine:
    """What the engine of this config does to one rank's tensors. ValueError where the ranks do not divide.

    fp16 has bf16's sizes, and its loss scaling reads values that are not there.
    """
    shared = {
        "device": "cpu",
        "precision": "bf16" if config.precision == "fp16" else config.precision,
        "frozen_dtype": config.frozen_dtype,
    }
    if not isinstance(config, Fsdp2Config):
        return _ONE_PROCESS[config.name](SingleConfig(**shared), Ranks())
    if world_size % config.replicas:
        raise ValueError(
            f"engine.replicas={config.replicas} does not divide {world_size} ranks; change one of them"
        )
    own = {"replicas": config.replicas, "reshard_after_forward": config.reshard_after_forward}
    return _FakeFsdp2(Fsdp2Config(**shared, **own), Ranks(world_size=world_size))


@contextlib.contextmanager
def process_group(world_size: int) -> Iterator[None]:
    """Collectives return at once, having done nothing. ValueError inside a real process group."""
    if dist.is_initialized():
        raise ValueError(
            "an estimate cannot be made inside a run of several processes: make it in one of its own"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class FakeSingle(SingleEngine):
    """One process. Fake parameters are where they are, in the dtype that the frozen ones were given."""

    def _cast_frozen(self, module: nn.Module) -> None:
        return None

    def _distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        return module


class FakeDdp(FakeSingle):
    """A gradient goes into a bucket as it arrives, and is from then on a view of it. Buckets stay."""

    def __init__(self, config: SingleConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self._buckets: list[Tensor] = []

    def held(self) -> Mapping[str, Sequence[Tensor]]:
        return {"gradients": self._buckets}

    def _distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        for parameter in module.parameters():
            if parameter.requires_grad:
                self._buckets.append(torch.empty_like(parameter.detach()))
                parameter.register_post_accumulate_grad_hook(partial(_into, self._buckets[-1]))
        return module


class FakeZero(FakeSingle):
    """DeepSpeed takes a gradient away as it arrives, and keeps the optimizer's state itself: see `sharding`."""

    def _distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_taken_away)
        return module


class _FakeFsdp2(Fsdp2Engine):
    """The real sharding, on ranks that are not there."""

    def _cast_frozen(self, module: nn.Module) -> None:
        return None

    def _make_mesh(self) -> DeviceMesh:
        with unset_fake_temporarily():  # a mesh is numbers, and it reads them
            return super()._make_mesh()


_ONE_PROCESS = {"single": FakeSingle, "ddp": FakeDdp, "deepspeed": FakeZero}


def _into(bucket: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not bucket and parameter.grad is not None:
        bucket.copy_(parameter.grad)
        parameter.grad = bucket


def _taken_away(parameter: Tensor) -> None:
    parameter.grad = None
