"""Dropout as a GPU computes it: one kernel that keeps a mask of one byte a number, where a CPU keeps four."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def dropout_of_a_gpu() -> Iterator[None]:
    """Meanwhile, torch.nn.functional.dropout (and so nn.Dropout) is the fused one on any device."""
    with patch.object(F, "dropout", _fused_dropout):
        yield


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
