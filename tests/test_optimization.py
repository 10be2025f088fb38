"""Decay groups, the schedule and averaged weights, by hand-computed values."""

import math

import pytest
import torch
from torch import nn

from snell_scale.config import TrainingConfig
from snell_scale.optimization import AveragedWeights, learning_rate, make_optimizer

TRAINING = TrainingConfig(steps=100, batch_size=4, lr=1e-2, min_lr=1e-4, warmup_fraction=0.1, weight_decay=0.3)


def test_biases_norms_and_named_parameters_are_not_decayed() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "frozen": nn.Linear(4, 4)})
    module["frozen"].requires_grad_(False)
    module.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 4)))
    optimizer = make_optimizer(module, TRAINING, no_decay=frozenset({"cls_token"}))
    groups = {g["group_name"]: g for g in optimizer.param_groups}
    assert [p.shape for p in groups["decayed"]["params"]] == [(4, 3)]
    assert groups["decayed"]["weight_decay"] == 0.3
    assert len(groups["undecayed"]["params"]) == 4
    assert groups["undecayed"]["weight_decay"] == 0.0


@pytest.mark.parametrize(("step", "expected"), [(0, 1e-3), (9, 1e-2), (10, 1e-2), (55, (1e-2 + 1e-4) / 2)])
def test_schedule(step: int, expected: float) -> None:
    assert math.isclose(learning_rate(step, 100, TRAINING), expected, rel_tol=1e-12)


def test_last_step_ends_near_the_minimum() -> None:
    assert 1e-4 < learning_rate(99, 100, TRAINING) < 1.1e-4


def test_averages_follow_and_swap_back() -> None:
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    averages = AveragedWeights(module, decay=0.75)
    with torch.no_grad():
        module.weight.fill_(3.0)
    averages.update()
    averages.swap()
    assert torch.equal(module.weight, torch.full((1, 2), 1.5))  # 0.75·1 + 0.25·3
    averages.swap()
    assert torch.equal(module.weight, torch.full((1, 2), 3.0))
