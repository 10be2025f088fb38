"""Small models and steps whose memory the probe's tests know."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_scale.instrument.memory import MemoryProbe
from snell_scale.records import MEMORY_CATEGORIES

NUM_IMAGES = 5
BATCH_BYTES = NUM_IMAGES * 4 * 4
HIDDEN_BYTES = NUM_IMAGES * 8 * 4
FIRST_BYTES = (8 * 4 + 8) * 4
SECOND_BYTES = (3 * 8 + 3) * 4
MLP_BYTES = FIRST_BYTES + SECOND_BYTES
ADAMW_BYTES = 2 * MLP_BYTES + 4 * 4
"""Two moments per parameter, and one fp32 step counter for each of the four parameter tensors."""

Phase = Callable[[str], AbstractContextManager[None]]


class Square(torch.autograd.Function):
    """y = x², saving x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad_outputs[0]


class SquareLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        output = Square.apply(x)
        assert isinstance(output, Tensor)
        return output


class Blocks(nn.Module):
    """Four blocks whose activations can be recomputed in backward."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4)]
        self.blocks = nn.ModuleList(blocks)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.use_reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def make_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def make_batch(num_features: int = 4) -> Tensor:
    return torch.randn(NUM_IMAGES, num_features, generator=torch.Generator().manual_seed(1))


def train_step(
    module: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, batch: Tensor, *, phase: Phase
) -> Tensor:
    with phase("forward"):
        loss = module(batch).sum()
    with phase("backward"):
        loss.backward()
    with phase("step"):
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def no_phase(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def split(entry: dict[str, Any]) -> dict[str, int]:
    """Every category, those without a byte left out."""
    found = {category: entry[f"{category}_bytes"] for category in MEMORY_CATEGORIES}
    return {category: num_bytes for category, num_bytes in found.items() if num_bytes}


def measure(
    module: nn.Module, batch: Tensor, *, num_warmup_steps: int = 0
) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    for _ in range(num_warmup_steps):
        train_step(module, optimizer, batch, phase=no_phase)
    probe = MemoryProbe(module, optimizer)
    with probe:
        train_step(module, optimizer, batch, phase=probe.phase)
    return probe.report(), optimizer
