"""One of two processes that train a small CLIP in parts, by one sharding engine after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.engines.fsdp2 import Fsdp2Config
from tests.models.clip_cases import train
from tests.spawned import WORLD_SIZE, set_rank

SECONDS = 240
TRAINED = (("snella", False), ("snell", True), ("full", False))
"""(method, whether activations are checkpointed)"""


def run(rank: int, ports: Sequence[int], folder: Path) -> None:
    """The whole life of one process: two runs one after the other. Writes rank<n>.pt."""
    settings: dict[str, Any] = {"device": "cpu", "cpu_threads": 1, "timeout_seconds": SECONDS}
    engines = {"fsdp2": Fsdp2Config(**settings), "zero-3": DeepSpeedConfig(**settings, zero_stage=3)}
    told: dict[tuple[str, str], Any] = {}
    for (name, engine), port in zip(engines.items(), ports, strict=True):
        set_rank(rank, WORLD_SIZE, port)
        with engine.join() as ranks:
            for method, checkpointed in TRAINED:
                told[name, method] = train(engine.build(ranks), method, checkpointed=checkpointed)
    torch.save(told, folder / f"rank{rank}.pt")
