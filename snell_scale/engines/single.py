"""One device, one process: CPU or one GPU, in fp32 or mixed precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from snell_scale.engines.ranks import Ranks, launched_world_size
from snell_scale.engines.torch_engine import EngineConfig, TorchEngine


class SingleConfig(EngineConfig):
    """One process on one device (CPU or one GPU)."""

    name: Literal["single"] = "single"

    @contextmanager
    def join(self) -> Iterator[Ranks]:
        """This process alone. ValueError under a launcher that started several."""
        if launched_world_size() > 1:
            raise ValueError(
                f"engine.name is 'single', but the launcher started {launched_world_size()} processes; set "
                "engine.name to ddp, fsdp2 or deepspeed, or start one process"
            )
        yield Ranks()

    def build(self, ranks: Ranks) -> "SingleEngine":
        return SingleEngine(self, ranks)


class SingleEngine(TorchEngine):
    """See `interfaces.Engine`."""
