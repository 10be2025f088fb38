"""Segmentation models on two ranks: what shards weights trains as what keeps them whole."""

from typing import Any

import pytest
import torch

from snell_scale.engines.single import SingleConfig
from tests.models.segmentation_worker import DECODERS, METHODS, losses, run
from tests.spawned import free_ports, run_ranks


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[float]]:
    folder = tmp_path_factory.mktemp("segmentation")
    run_ranks(run, free_ports(3), folder, seconds=400)
    return torch.load(folder / "rank0.pt")


@pytest.mark.slow  # two processes, three engines
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_engine_trains_alike(told: dict[Any, list[float]], decoder: str, method: str) -> None:
    whole = told["ddp", decoder, method]
    assert whole[-1] < whole[0]
    for engine in ("fsdp2", "deepspeed"):
        # float32 losses of about 1 to 3, summed in another order.
        assert told[engine, decoder, method] == pytest.approx(whole, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_without_batch_norms_two_ranks_train_as_one(told: dict[Any, list[float]], method: str) -> None:
    config = SingleConfig(device="cpu")
    with config.join() as ranks:
        alone = losses(config.build(ranks), "linear", method)
    assert told["ddp", "linear", method] == pytest.approx(alone, abs=2e-6)
