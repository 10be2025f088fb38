"""What only some runs have: transients of the merge op, and buffers of collectives."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from snell_scale.engines.ddp import DdpConfig
from snell_scale.instrument.memory import MemoryProbe
from snell_scale.kernels.merge import merge_linear
from tests.instrument.memory_cases import split
from tests.kernels.live_bytes import LiveBytes

NUM_ROWS, NUM_IN, NUM_OUT = 6, 96, 64
Y_BYTES = NUM_ROWS * NUM_OUT * 4


class Merged(nn.Module):
    """A frozen layer with a SNELL delta."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(NUM_OUT, NUM_IN, generator=generator), requires_grad=False)
        self.A = nn.Parameter(torch.randn(2, NUM_IN, 4, generator=generator))
        self.B = nn.Parameter(torch.randn(2, NUM_OUT, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return merge_linear(x, self.weight, self.A, self.B, sparsity=0.5, implementation="torch")


def test_what_the_merge_op_holds_for_a_while_are_transients():
    module, x = Merged(), torch.ones(NUM_ROWS, NUM_IN)
    probe = MemoryProbe(module)
    with probe:
        with probe.phase("forward"):
            y = module(x)
        with probe.phase("backward"):
            y.sum().backward()
    forward, backward = (probe.report()["phases"][name] for name in ("forward", "backward"))
    with LiveBytes([*module.parameters(), x]) as live:
        module(x)
    # At the op's fullest y may not be there yet.
    assert live.peak - Y_BYTES <= forward["transients_bytes"] <= live.peak
    assert forward["transients_bytes"] >= NUM_IN * NUM_OUT * 4  # the merged weight, of one range
    assert backward["transients_bytes"] >= NUM_IN * NUM_OUT * 4  # G; x needs no gradient
    # In backward x and y stand beside them: y for the loss, x for G.
    assert backward["activations_bytes"] >= x.nbytes


def test_results_of_the_merge_op_are_what_those_of_any_layer_are():
    module, x = Merged(), torch.ones(NUM_ROWS, NUM_IN)
    probe = MemoryProbe(module)
    with probe:
        with probe.phase("evaluate"), torch.no_grad():
            y = module(x)
        with probe.phase("after"):
            pass
        with probe.phase("saved"):
            loss = module(x).square().sum()
            later = torch.zeros(NUM_IN * NUM_OUT * 100)  # the peak is here, where no op runs
        del loss, later
    phases = probe.report()["phases"]
    assert phases["after"]["transients_bytes"] == 0
    assert phases["after"]["temporary_bytes"] == x.nbytes + y.nbytes
    assert phases["saved"]["transients_bytes"] == 0
    # x and the layer's result, and τ with the empty tensor that stands for the column sums.
    assert phases["saved"]["activations_bytes"] == x.nbytes + Y_BYTES + 4


@pytest.fixture
def alone() -> nn.Linear:
    return nn.Linear(4, 8)


def test_buffers_of_collectives_are_communication_unless_they_are_gradients(alone: nn.Linear):
    with DdpConfig(device="cpu").join():
        probe = MemoryProbe(alone)
        alone(torch.ones(1, 4)).sum().backward()
        assert alone.weight.grad is not None
        with probe, probe.phase("step"), torch.no_grad():
            buffer, whole = torch.zeros(100), torch.empty(300)
            dist.all_reduce(buffer)
            dist.all_gather([whole], torch.ones(300))
            dist.all_reduce(alone.weight.grad)
    num_weights = (4 * 8 + 8) * 4
    assert split(probe.report()["phases"]["step"]) == {
        "parameters": num_weights,
        "gradients": num_weights,
        "communication": (100 + 300 + 300) * 4,
    }
