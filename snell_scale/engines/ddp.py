"""DistributedDataParallel: the model whole on every rank, gradients averaged while backward runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from snell_scale.engines.distributed import DistributedConfig
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.torch_engine import TorchEngine


class DdpConfig(DistributedConfig):
    """Several processes, the model whole on each: DistributedDataParallel. Shards nothing."""

    name: Literal["ddp"] = "ddp"

    def build(self, ranks: Ranks) -> "DdpEngine":
        return DdpEngine(self, ranks)


class DdpEngine(TorchEngine):
    """See `interfaces.Engine`."""

    _wrapped: DistributedDataParallel

    def describe(self) -> str:
        return "ddp"

    def microbatch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self._wrapped.no_sync()

    def _distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        module.to(self.device)
        # Batch statistics that train are kept as rank 0 has them; all other buffers are equal on every rank.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, _equal_buffers(module))
        self._wrapped = DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # no second copy of the gradients
        )
        return self._wrapped


def _equal_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers that no batch norm in training changes by what its rank has seen."""
    statistics = {
        f"{name}.{buffer}"
        for name, child in module.named_modules()
        if isinstance(child, _BatchNorm) and any(p.requires_grad for p in child.parameters())
        for buffer, _ in child.named_buffers(recurse=False)
    }
    return [name for name, _ in module.named_buffers() if name not in statistics]
