"""Divergence is noticed at its first step, with the groups it came from."""

import math

import torch
from torch import nn

from snell_scale.instrument.divergence import DivergenceWatch

NAMES = ("decayed", "undecayed")


def test_first_bad_step_and_its_group_are_kept() -> None:
    module = nn.Linear(2, 2)
    watch = DivergenceWatch()
    watch.observe(1, torch.tensor(0.5), torch.tensor([1.0, 1.0]), norms_matter=True)
    assert watch.read(NAMES, module) is None
    watch.observe(2, torch.tensor(0.4), torch.tensor([1.0, math.inf]), norms_matter=True)
    watch.observe(3, torch.tensor(math.nan), torch.tensor([math.nan, math.nan]), norms_matter=True)
    with torch.no_grad():
        module.bias.fill_(math.nan)
    found = watch.read(NAMES, module)
    assert found is not None
    assert (found.step, found.groups, found.parameters) == (2, ("undecayed",), ("bias",))
    assert "undecayed" in found.describe()


def test_scaled_gradients_may_overflow() -> None:
    module = nn.Linear(2, 2)
    watch = DivergenceWatch()
    watch.observe(1, torch.tensor(0.5), torch.tensor([math.inf, 1.0]), norms_matter=False)
    assert watch.read(NAMES, module) is None
    watch.observe(2, torch.tensor(math.inf), torch.tensor([1.0, 1.0]), norms_matter=False)
    found = watch.read(NAMES, module)
    assert found is not None
    assert found.step == 2
