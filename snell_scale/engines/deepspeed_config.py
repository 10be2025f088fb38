"""The settings of DeepSpeed's ZeRO, and how its processes join."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from snell_scale.config import Config
from snell_scale.engines.deepspeed_json import Dictated, check_dictated, check_precision, read_json
from snell_scale.engines.deepspeed_process import leave_deepspeed
from snell_scale.engines.distributed import DistributedConfig
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.shardable import check_shardable

if TYPE_CHECKING:
    from snell_scale.engines.deepspeed_engine import DeepSpeedEngine


class DeepSpeedConfig(DistributedConfig):
    """Several processes, state sharded by DeepSpeed ZeRO. Checkpoints resume at the same world size and stage."""

    name: Literal["deepspeed"] = "deepspeed"
    zero_stage: Literal[1, 2, 3] = Field(
        default=2, description="Shards optimizer state (1), gradients too (2), parameters too (3)."
    )
    offload_optimizer: bool = Field(default=False, description="Optimizer state and step on the host.")
    offload_parameters: bool = Field(default=False, description="ZeRO-3: parameter shards on the host.")
    json_file: str | None = Field(
        default=None,
        description="A DeepSpeed JSON; its 'auto' values are filled from the run's config, the rest must agree.",
    )

    @model_validator(mode="after")
    def _check_offload(self) -> "DeepSpeedConfig":
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters needs zero_stage=3, which shards parameters; zero_stage is {self.zero_stage}"
            )
        return self

    def check(self) -> None:
        super().check()
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "engine.name is 'deepspeed', which is not installed: pip install snell-scale[deepspeed]"
            )
        self.read_json()

    def check_module(self, module: nn.Module) -> None:
        if self.zero_stage == 3:
            check_shardable(module, "engine.zero_stage=3")

    def check_run(self, config: Config) -> None:
        refused = {
            "training.ema_decay": (
                config.training.ema_decay is not None and self.zero_stage == 3,
                "ZeRO-3 keeps no whole parameters to average; set it to null, or zero_stage to 1 or 2",
            ),
            "training.compile": (
                config.training.compile,
                "DeepSpeed's hooks do not compile; set it to false, or engine.name to ddp",
            ),
            "checkpoint.asynchronous": (
                config.checkpoint.asynchronous,
                "DeepSpeed writes its checkpoints while training waits; set it to false",
            ),
        }
        for key, (asked, reason) in refused.items():
            if asked:
                raise ValueError(f"{key} does not go with engine.name=deepspeed: {reason}")

    def read_json(self) -> dict[str, Any]:
        """The user's JSON with dotted keys, checked against this config; {} without one."""
        given = {} if self.json_file is None else read_json(self.json_file)
        check_precision(given, self.precision)
        check_dictated(given, self.dictated())
        return given

    def dictated(self) -> dict[str, Dictated]:
        """What this config decides of DeepSpeed's."""
        return {
            "zero_optimization.stage": Dictated(self.zero_stage, "engine.zero_stage"),
            "zero_optimization.offload_optimizer.device": Dictated(
                "cpu" if self.offload_optimizer else "none", "engine.offload_optimizer"
            ),
            "zero_optimization.offload_param.device": Dictated(
                "cpu" if self.offload_parameters else "none", "engine.offload_parameters"
            ),
        }

    @contextmanager
    def join(self) -> Iterator[Ranks]:
        with super().join() as ranks:
            # ZeRO-3 replaces it for the whole process; the next run may be on another engine.
            linear = nn.functional.linear
            try:
                yield ranks
            finally:
                nn.functional.linear = linear
                leave_deepspeed()

    def build(self, ranks: Ranks) -> "DeepSpeedEngine":
        from snell_scale.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(self, ranks)
