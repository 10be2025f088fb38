"""Where a GPU keeps other tensors than a CPU, estimates for a GPU keep the GPU's."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_scale.estimate.cuda_dropout import dropout_of_a_gpu
from snell_scale.estimate.gpu_autocast import autocast_of_a_gpu


class _Saved:
    """(dtype, shape) of what is saved for backward."""

    def __init__(self) -> None:
        self.tensors: list[tuple[torch.dtype, torch.Size]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.tensors.append((tensor.dtype, tensor.shape))
        return tensor


def saved_by(module: nn.Module, x: Tensor) -> list[tuple[torch.dtype, torch.Size]]:
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        module(x)
    return saved.tensors


def test_a_dropout_keeps_a_mask_of_bytes() -> None:
    x = torch.ones(64, 32, requires_grad=True)
    assert (torch.float32, x.shape) in saved_by(nn.Dropout(0.5), x)
    with dropout_of_a_gpu():
        assert saved_by(nn.Dropout(0.5), x) == [(torch.bool, x.shape)]
        assert nn.Dropout(0.5).eval()(x) is x
    y = nn.Dropout(0.5)(x)
    assert set(y.unique().tolist()) <= {0.0, 2.0}


def test_norms_under_autocast_take_float32() -> None:
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    norm = nn.GroupNorm(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        with autocast_of_a_gpu():
            assert norm(x).dtype == torch.float32
            assert (torch.float32, x.shape) in saved_by(norm, x)
            assert torch.softmax(x, 1).dtype == torch.float32
            assert nn.Linear(4, 4)(x).dtype == torch.bfloat16


def test_what_is_recomputed_is_the_same() -> None:
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU())
    with autocast_of_a_gpu():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(block, x, use_reentrant=False)
        y.sum().backward()  # checkpoint compares what it recomputes with what it saved
    assert y.dtype == torch.float32
    assert x.grad is not None


def test_without_autocast_nothing_is_raised() -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with autocast_of_a_gpu():
        assert torch.softmax(x, 1).dtype == torch.bfloat16
