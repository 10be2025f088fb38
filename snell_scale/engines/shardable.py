"""Modules whose weights cannot be kept in parts."""

from peft.tuners.lora.layer import MultiheadAttention
from torch import nn


def check_shardable(module: nn.Module, engine: str) -> None:
    """ValueError for peft's LoRA on an nn.MultiheadAttention: every forward of it makes its weights anew.

    FSDP2 and ZeRO-3 know a module's parameters by the objects that were there when they sharded it.
    """
    found = [name for name, child in module.named_modules() if isinstance(child, MultiheadAttention)]
    if found:
        raise ValueError(
            f"{engine} keeps weights in parts, which peft's LoRA on an nn.MultiheadAttention ({found[0]}) does "
            "not allow: it makes the weights anew in every forward; set engine.name=ddp, engine.zero_stage to 1 "
            "or 2, method.targets=mlp, or method.name=snell"
        )
