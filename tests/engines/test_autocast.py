"""Autocast keeps no copies of the trained weights: not between layers, and not where a block is recomputed."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from snell_scale.instrument.memory import MemoryProbe

WIDTH, NUM_LAYERS = 128, 8
COPY_BYTES = 2 * WIDTH * WIDTH  # of one weight, in bf16


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return x


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_forward_holds_one_weights_copy_at_a_time(evaluates: bool) -> None:
    engine = SingleConfig(precision="bf16", device="cpu").build(Ranks())
    model, x = Recomputed(), torch.randn(2, WIDTH)
    probe = MemoryProbe(model)
    with probe, torch.set_grad_enabled(not evaluates), engine.autocast(), probe.phase("forward"):
        output = model(x)
    assert output.dtype == torch.bfloat16
    temporary = probe.report()["phases"]["forward"]["temporary_bytes"]
    # The weight in use, and what a layer takes in and puts out.
    assert COPY_BYTES <= temporary < 1.5 * COPY_BYTES
