"""MemoryProbe where storages are freed and allocated in place: by hand, and by FSDP2."""

from typing import Any

import pytest
import torch
from torch import nn

from snell_scale.engines.fsdp2 import Fsdp2Config
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.interfaces import StepPlan

WIDTH, NUM_BLOCKS, NUM_ROWS = 64, 4, 2
MODULE_BYTES = (4 * 8 + 8) * 4
BLOCK_BYTES = (WIDTH * WIDTH + WIDTH) * 4
ROWS_BYTES = NUM_ROWS * WIDTH * 4


def test_a_storage_freed_in_place_no_longer_counts():
    module = nn.Linear(4, 8)
    probe = MemoryProbe(module)
    x = torch.zeros(100)
    with probe, torch.no_grad():
        with probe.phase("whole"):
            x.add_(1)
        with probe.phase("freed, then another"):
            x.untyped_storage().resize_(0)
            torch.zeros(70)
        with probe.phase("another"):
            torch.zeros(70)
        with probe.phase("allocated again"):
            x.untyped_storage().resize_(400)
    phases = probe.report()["phases"]
    names = ("temporary_bytes", "parameters_bytes")
    assert [phases["whole"][name] for name in names] == [400, MODULE_BYTES]
    # A phase's peak is at least what stands when it starts: the 400 of before, which are more than the 280 after.
    assert [phases["freed, then another"][name] for name in names] == [400, MODULE_BYTES]
    assert [phases["another"][name] for name in names] == [280, MODULE_BYTES]
    assert [phases["allocated again"][name] for name in names] == [0, MODULE_BYTES + 400]
    assert "resize_" not in vars(torch.UntypedStorage)  # no hook is left behind


@pytest.mark.parametrize("trains", [True, False])
def test_fsdp2_holds_one_whole_block_at_a_time(trains: bool):
    """Alone a rank keeps all parts; beside them one block is whole, and in backward the next one too."""
    phases = _measured_step(trains=trains)
    parts = NUM_BLOCKS * BLOCK_BYTES
    assert phases["forward"]["parameters_bytes"] == parts + BLOCK_BYTES
    assert phases["backward"]["parameters_bytes"] <= parts + 2 * BLOCK_BYTES
    assert phases["step"]["parameters_bytes"] == parts
    # What a block keeps for backward is its input; its weight, which it saves too, is freed until then.
    assert phases["forward"]["activations_bytes"] <= NUM_BLOCKS * ROWS_BYTES


def _measured_step(*, trains: bool) -> dict[str, Any]:
    """The phases of the second step of linear blocks under FSDP2."""
    module = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(NUM_BLOCKS)])
    for block in module:
        block.weight.requires_grad_(trains)
    config = Fsdp2Config(device="cpu")
    with config.join() as ranks:
        engine = config.build(ranks)
        plan = StepPlan(microbatch_size=NUM_ROWS, gradient_accumulation=1, clip_grad_norm=None)
        forward = engine.setup(module, _make_optimizer, blocks=list(module), plan=plan)
        probe = MemoryProbe(module, engine.optimizer)
        x = torch.zeros(NUM_ROWS, WIDTH)
        for _ in range(2):
            with probe:
                with probe.phase("forward"):
                    loss = forward(x).sum()
                with probe.phase("backward"):
                    engine.backward(loss)
                with probe.phase("step"):
                    engine.step()
                    engine.zero_grad()
                del loss
        return probe.report()["phases"]


def _make_optimizer(module: nn.Module) -> torch.optim.AdamW:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": parameters, "group_name": "all"}], fused=True)
