"""Contrastive on two ranks: every pair is a negative of every other one, with the gradients of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

from snell_scale import registry
from snell_scale.config import load_config
from snell_scale.engines.ddp import DdpConfig
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from snell_scale.interfaces import Engine, StepPlan
from snell_scale.records import read_result, read_steps
from snell_scale.run import run
from tests.conftest import TINY
from tests.spawned import free_ports, run_ranks, set_rank
from tests.tasks.contrastive_parts import TinyClip, bundle_of, pairs, stacked
from tests.tasks.parts import data_of

PAIRS = 8
WORLD_SIZE = 2
# Sums over 8 pairs in another order: some units in the last place of numbers near 1.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6}


def one_step(engine: Engine, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss, averaged gradients and the metrics' sums of this rank's share of the pairs."""
    samples = pairs(PAIRS, dtype=dtype)
    data = data_of(class_names=["a", "b", "c"], fields=set(samples[0]), samples=samples, size=4)
    model = TinyClip().to(dtype)
    task = registry.config_class("task", "contrastive")().build(data=data, model=bundle_of(model))
    task.prepare(data, engine)
    plan = StepPlan(PAIRS // engine.ranks.world_size, 1, clip_grad_norm=None)
    forward = engine.setup(model, _optimizer, blocks=[], plan=plan)
    share = PAIRS // engine.ranks.world_size
    first = engine.ranks.rank * share
    batch = stacked(samples[first : first + share])
    with engine.microbatch(is_last=True):
        loss = task(forward, batch)["loss"]
        engine.backward(loss)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    evaluation = task.evaluation(model, data.test)
    evaluation.add(model, batch)
    metrics = evaluation.metrics(engine.sum(evaluation.sums()))
    numbers = {f"metric.{name}": torch.tensor(value, dtype=dtype) for name, value in metrics.items()}
    return {"loss": engine.mean(loss.detach()), **gradients, **numbers}


def _optimizer(module: nn.Module) -> SGD:
    return SGD([{"params": list(module.parameters()), "group_name": "all"}], lr=0.1)


def work(rank: int, folder: Path, files: list[Path], ports: list[int]) -> None:
    """One rank: the steps, then the runs; each group of ranks meets at a port of its own."""
    torch.set_num_threads(1)
    set_rank(rank, WORLD_SIZE, ports[0])
    config = DdpConfig(device="cpu")
    with config.join() as ranks:
        for dtype in TOLERANCES:
            torch.save(one_step(config.build(ranks), dtype=dtype), folder / f"{dtype}-{rank}.pt")
    for file, port in zip(files, ports[1:], strict=True):
        set_rank(rank, WORLD_SIZE, port)
        run(load_config(file, config_class=registry.config_class), quiet=True)


def write_config(folder: Path, engine: str, method: dict[str, Any]) -> Path:
    content = {
        **TINY,
        "name": f"{engine}-{method['name']}",
        "output_dir": str(folder / "runs"),
        "data": {
            **TINY["data"],
            "train_per_class": 7,
            "channels": 3,
            "captions": ["a photo of the digit {}", "somebody wrote {}"],
        },
        "model": {
            "name": "open_clip",
            "architecture": "custom",
            "arguments": {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 8, "patch_size": 2, "width": 16, "layers": 1, "head_width": 8},
                "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
            },
        },
        "task": {"name": "contrastive"},
        "method": method,
        "engine": {**TINY["engine"], "name": engine},
        "training": {**TINY["training"], "steps": 5, "gradient_accumulation": 2, "clip_grad_norm": 1.0},
        "evaluation": {"every_steps": 5, "batch_size": 5},  # 18 samples: a rank idles in the last round
        "checkpoint": {"every_steps": None, "keep_last": 1},
        "variants": {},
    }
    path = folder / f"{engine}-{method['name']}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 4, "targets": "all"},
    "gps": {"name": "gps"},  # before training each rank takes the gradients of batches of its own
}
# peft's LoRA of nn.MultiheadAttention takes the base weights out of the module for its forward: not under FSDP2.
CASES = [("ddp", "full"), ("ddp", "lora"), ("ddp", "gps"), ("fsdp2", "full")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks and one process left: the steps' tensors, and a folder for each run."""
    folder = tmp_path_factory.mktemp("contrastive")
    torch.set_num_threads(1)
    for method in METHODS.values():
        run(load_config(write_config(folder, "single", method), config_class=registry.config_class), quiet=True)
    files = [write_config(folder, engine, METHODS[method]) for engine, method in CASES]
    run_ranks(work, folder, files, free_ports(1 + len(files)), seconds=240, world_size=WORLD_SIZE)
    return folder


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_loss_gradients_and_metrics_are_those_of_one_process(
    outcomes: Path, dtype: torch.dtype, rank: int
) -> None:
    expected = one_step(SingleConfig(device="cpu").build(Ranks()), dtype=dtype)
    found = torch.load(outcomes / f"{dtype}-{rank}.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert {"image.weight", "words.weight", "text.bias", "logit_scale", "metric.loss"} <= expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.allclose(found[name], tensor, rtol=0, atol=TOLERANCES[dtype]), name


@pytest.mark.parametrize(("engine", "method"), CASES)
def test_a_whole_run_is_that_of_one_process(outcomes: Path, engine: str, method: str) -> None:
    one, two = (outcomes / "runs" / f"{name}-{method}" for name in ("single", engine))
    expected, found = read_result(one), read_result(two)
    assert (found.status, found.world_size) == ("ok", WORLD_SIZE)
    losses = [[line["loss"] for line in read_steps(folder) if "split" not in line] for folder in (one, two)]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)  # as in tests/engines/test_equality.py
    for split in ("validation", "test"):
        assert found.metrics[split] == pytest.approx(expected.metrics[split], abs=1e-4)
    assert {path.name for path in (two / "pictures").iterdir()} == {"predictions.png"}
    weights, found_weights = (trained(folder) for folder in (one, two))
    assert weights.keys() == found_weights.keys()
    for name, tensor in weights.items():
        error = (found_weights[name].double() - tensor.double()).abs()  # of GPS's indices, too
        # Softmax does not see the bias of the keys: its gradient is rounding alone, which Adam makes steps of.
        if name.endswith("attn.in_proj_bias"):
            error[len(error) // 3 : 2 * len(error) // 3] = 0
        assert error.mean() <= 5e-6, name  # Adam's first steps magnify small errors of small gradients


def trained(folder: Path) -> dict[str, Tensor]:
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)
