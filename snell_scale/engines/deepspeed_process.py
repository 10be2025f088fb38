"""DeepSpeed's state of the process: brought up without compiling or printing, left ready to start again."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn


def load_deepspeed(device: torch.device) -> ModuleType:
    """The deepspeed module, talking over the process group that exists.

    ValueError if it is bound to another device.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it guesses, with a warning
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import logger

    accelerator = get_accelerator()
    assert accelerator is not None
    found = accelerator.device_name()
    if found != device.type:
        raise ValueError(
            f"DeepSpeed is already set to {found!r} in this process (the environment's DS_ACCELERATOR is "
            f"{os.environ['DS_ACCELERATOR']!r}), but engine.device means {device.type!r}; start a new process"
        )
    logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    torch_autocast._WARNED_NESTED_AUTOCAST = True  # the engine sets autocast anew inside the model
    with _nothing_compiled():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def register_held_parameters(module: nn.Module) -> None:
    """Tell ZeRO-3 which modules compute with parameters of containers, which are never called themselves.

    It finds that out by itself, but only where it has to gather one: that may be long after it has settled the
    order of gathering, which then does not hold any more.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for owner in module.modules():
        for child in owner.children():
            if isinstance(child, nn.ParameterDict | nn.ParameterList):
                for parameter in child.parameters():
                    register_external_parameter(owner, parameter)


def leave_deepspeed() -> None:
    """Forget the process groups, which are about to be destroyed."""
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.utils import groups

    groups._WORLD_GROUP = None


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """On a CPU it would compile C++ for collectives that inference alone uses."""
    backend: Any = import_module("deepspeed.comm.torch")  # the attribute of that name is torch itself
    build, backend.build_shm_op = backend.build_shm_op, lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build
