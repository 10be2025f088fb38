"""DistributedDataParallel: the model whole on every rank, gradients averaged while backward runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import nn
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

    def microbatch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self._wrapped.no_sync()

    def _distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        module.to(self.device)
        # They are equal on every rank, or batch statistics, which are averaged after the step.
        buffers = [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)
        self._wrapped = DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # no second copy of the gradients
        )
        return self._wrapped
