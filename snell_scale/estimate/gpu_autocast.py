"""Autocast as a GPU does it: norms, softmax and losses in float32, where a CPU's autocast leaves them in bf16."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

# Of torch's list for CUDA ("ops that autocast to float32") those that keep tensors for backward.
_IN_FLOAT32: tuple[tuple[Any, str], ...] = (
    (F, "layer_norm"),
    (F, "group_norm"),
    (F, "softmax"),
    (F, "log_softmax"),
    (F, "cross_entropy"),
    (F, "mse_loss"),
    (F, "normalize"),
    (torch, "softmax"),
    (torch, "log_softmax"),
    (Tensor, "softmax"),
    (Tensor, "log_softmax"),
)


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """Meanwhile, where autocast is on for the CPU, those operations take float32, as CUDA's autocast makes them.

    Functions are replaced: a mode of torch's would not reach what checkpoints recompute in backward.
    """
    with ExitStack() as stack:
        for owner, name in _IN_FLOAT32:
            stack.enter_context(patch.object(owner, name, _in_float32(getattr(owner, name))))
        yield


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_raised, (args, kwargs))
        return function(*args, **kwargs)

    return wrapped


def _raised(leaf: Any) -> Any:
    is_narrow = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.float() if is_narrow else leaf
