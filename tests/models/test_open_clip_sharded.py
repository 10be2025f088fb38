"""A CLIP whose weights lie in parts on two processes trains as on one: its attention too, adapted or not."""

from typing import Any

import pytest
import torch

from snell_scale.engines.single import SingleConfig
from tests.models import clip_worker
from tests.models.clip_cases import NUM_STEPS, train
from tests.spawned import WORLD_SIZE, free_ports, run_ranks

pytestmark = pytest.mark.slow

# Sums in float32 in another order: roundings (6e-8) of losses up to 14, and of weights that a step moves by at
# most lr/eps = 10 times the difference of their gradients. Seen: 1e-6 and 1e-5.
LOSS_ROUNDING, WEIGHT_ROUNDING = 1e-5, 1e-4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("clip")
    run_ranks(clip_worker.run, free_ports(2), folder, seconds=clip_worker.SECONDS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("method", [method for method, _ in clip_worker.TRAINED])
@pytest.mark.parametrize("engine", ["fsdp2", "zero-3"])
def test_losses_and_weights_are_those_of_one_process(
    ranks: list[dict[Any, Any]], engine: str, method: str
) -> None:
    config = SingleConfig(device="cpu", cpu_threads=1)
    with config.join() as alone:
        expected = train(config.build(alone), method)
    found = ranks[0][engine, method]
    assert len(found["losses"]) == NUM_STEPS
    assert all(told[engine, method]["losses"] == found["losses"] for told in ranks)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=LOSS_ROUNDING)
    assert found["trained"].keys() == expected["trained"].keys()
    torch.testing.assert_close(found["trained"], expected["trained"], rtol=0, atol=WEIGHT_ROUNDING)
    assert expected["losses"][-1] < expected["losses"][0] - 1
