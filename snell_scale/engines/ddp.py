"""DistributedDataParallel: the model whole on every rank, gradients averaged while backward runs."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snell_scale.engines.distributed import DistributedConfig
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.torch_engine import TorchEngine

_STEPS_TO_SETTLE = 2  # after the first, DDP makes its buckets anew


class DdpConfig(DistributedConfig):
    """Several processes, the model whole on each: DistributedDataParallel. Shards nothing."""

    name: Literal["ddp"] = "ddp"

    def build(self, ranks: Ranks) -> "DdpEngine":
        return DdpEngine(self, ranks)


class DdpEngine(TorchEngine):
    """See `interfaces.Engine`."""

    _wrapped: DistributedDataParallel

    def __init__(self, config: DdpConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self._buckets: list[weakref.ref[torch.UntypedStorage]] = []
        self._num_steps = 0

    def step(self) -> Tensor:
        if self._num_steps < _STEPS_TO_SETTLE:
            self._num_steps += 1
            gradients = (p.grad for p in self.module.parameters() if p.grad is not None)
            storages = {id(storage): storage for storage in (g.untyped_storage() for g in gradients)}
            self._buckets = [weakref.ref(storage) for storage in storages.values()]
        return super().step()

    def held(self) -> Mapping[str, Sequence[Tensor]]:
        """The buckets: gradients are views of them, and while there are none the buckets stay."""
        storages = (reference() for reference in self._buckets)
        new = partial(torch.empty, 0, dtype=torch.uint8, device=self.device)
        return {"gradients": [new().set_(storage) for storage in storages if storage is not None]}

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
