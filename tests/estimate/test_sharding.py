"""ZeRO's arithmetic by hand: which bytes leave the device where the optimizer's part is on the host."""

from pathlib import Path
from typing import Any

import pytest

from snell_scale.estimate.prediction import Estimator
from tests.estimate.measured import CONFIGS, short

NUM_RANKS = 4


def phases(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    config = short(
        CONFIGS / "demo" / "transfer.yaml", tmp_path, "method.name=lora", "engine.name=deepspeed", *overrides
    )
    with Estimator(config, NUM_RANKS, num_classes=5, target="cpu") as estimator:
        return estimator.predict(2).memory["phases"]


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_takes_moments_gradients_and_their_copy_off_the_device(tmp_path: Path, stage: int) -> None:
    on_device = phases(tmp_path, f"engine.zero_stage={stage}")
    on_host = phases(tmp_path, f"engine.zero_stage={stage}", "engine.offload_optimizer=true")
    # LoRA's matrices of rank 8 in 4 blocks of width 96, as peft has them with a fused qkv, and a head of 5.
    trained = 4 * 8 * ((96 + 288) + (96 + 96) + (96 + 384) + (384 + 96)) + 5 * 96 + 5
    share = -(-4 * trained // NUM_RANKS)
    step, without = on_device["step"], on_host["step"]
    assert step["optimizer_bytes"] - without["optimizer_bytes"] == 3 * share
    assert step["gradients_bytes"] - without["gradients_bytes"] == 2 * share
    assert on_host["step"]["total_bytes"] == on_device["step"]["total_bytes"] - 5 * share
    for name in ("forward", "backward"):
        assert on_host[name]["parameters_bytes"] == on_device[name]["parameters_bytes"]
        assert on_host[name]["activations_bytes"] == on_device[name]["activations_bytes"]
