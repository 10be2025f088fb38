"""What engines keep between steps is measured as what it is, also in a phase that does not touch it."""

from collections.abc import Callable
from typing import Any

import pytest

from snell_scale.config import Config
from snell_scale.run import run

MakeConfig = Callable[..., Config]


def forward_of(config: Config) -> dict[str, Any]:
    result = run(config, quiet=True)
    assert result.memory is not None
    return {**result.memory["phases"]["forward"], "trained": 4 * (result.num_trainable_params or 0)}


def test_ddp_keeps_its_buckets_while_there_are_no_gradients(tiny: MakeConfig):
    alone = forward_of(tiny("method.name=full", "name=alone"))
    on_ddp = forward_of(tiny("method.name=full", "engine.name=ddp", "name=ddp"))
    assert alone["gradients_bytes"] == 0
    assert on_ddp["gradients_bytes"] == pytest.approx(on_ddp["trained"], rel=0.01)
    assert on_ddp["total_bytes"] - alone["total_bytes"] == pytest.approx(on_ddp["trained"], rel=0.05)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_keeps_a_copy_of_what_is_updated(tiny: MakeConfig, stage: int):
    engine = ("engine.name=deepspeed", f"engine.zero_stage={stage}", f"name=zero{stage}")
    phase = forward_of(tiny("method.name=full", *engine))
    assert phase["parameters_bytes"] >= phase["trained"]
    assert phase["optimizer_bytes"] == pytest.approx(3 * phase["trained"], rel=0.05)
