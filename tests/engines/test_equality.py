"""Every engine on two ranks trains as one process does: the same losses, weights, metrics and adapter files."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from snell_scale import registry
from snell_scale.config import load_config
from snell_scale.records import Result, read_result, read_steps
from snell_scale.run import run
from snell_scale.tuners import SnellConfig
from tests.conftest import TINY

ENGINES: Mapping[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "hsdp": {"name": "fsdp2", "replicas": 2},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}
METHODS: Mapping[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4, "targets": "all"},
    "snell": {"name": "snell", "r": 4, "targets": "all", "sparsity": 0.5, "scale": 1.0},
    "snella": {
        "name": "snella", "r": 4, "targets": "all", "scale": 1.0,
        "init_sparsity": 0.0, "target_sparsity": 0.6, "tick": "step",
    },
    "gps": {"name": "gps"},
    "full": {"name": "full"},
}  # fmt: skip
# float32 sums over ranks come in another order: an error of some 1e-7 in each gradient. Adam's first steps divide
# a gradient by its own size, so an entry whose gradient is near the 1e-8 in its denominator may move by a share
# of the rate (5e-3): rare, and bounded by the 5 steps' rates.
LOSS_TOLERANCE = 2e-5
MEAN_TOLERANCE = 2e-5
LARGEST_TOLERANCE = 5 * 5e-3
CHOSEN = ("snell_sparsity", "#indices")  # what SNELLA allocated and GPS selected: equal, not close

CASES = [(engine, method) for engine in ENGINES for method in METHODS]


def write_config(folder: Path, engine: str, method: str) -> Path:
    model = {**TINY["model"], "arguments": {**TINY["model"]["arguments"], "proj_drop_rate": 0.0}}
    content = {
        **TINY,
        "name": f"{engine}-{method}",
        "output_dir": str(folder / "runs"),
        "model": model,  # without dropout, whose masks differ from rank to rank
        "method": METHODS[method],
        "engine": {**TINY["engine"], **ENGINES.get(engine, {})},
        "training": {**TINY["training"], "steps": 5, "gradient_accumulation": 2, "clip_grad_norm": 1.0},
        "evaluation": {
            "every_steps": 5,
            "batch_size": 5,
        },  # 18 samples: the last batch is uneven, and a rank idles
        "checkpoint": {"every_steps": None, "keep_last": 1},
        "variants": {},
    }
    path = folder / f"{engine}-{method}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: one process for "single", then two ranks that run all others in turn."""
    folder = tmp_path_factory.mktemp("equality")
    torch.set_num_threads(1)
    for method in METHODS:
        config = load_config(write_config(folder, "single", method), config_class=registry.config_class)
        run(config, quiet=True)
    files = [str(write_config(folder, engine, method)) for engine, method in CASES]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--module", "tests.engines.equality_worker", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "runs"


def outcome(runs: Path, engine: str, method: str) -> tuple[Result, list[float]]:
    folder = runs / f"{engine}-{method}"
    return read_result(folder), [line["loss"] for line in read_steps(folder) if "split" not in line]


def adapter(runs: Path, engine: str, method: str) -> dict[str, Tensor]:
    (path,) = (runs / f"{engine}-{method}" / "adapter").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(("engine", "method"), CASES)
def test_losses_metrics_and_counts_are_those_of_one_process(runs: Path, engine: str, method: str) -> None:
    (expected, losses), (result, found) = outcome(runs, "single", method), outcome(runs, engine, method)
    assert (result.status, result.world_size) == ("ok", 2)
    assert len(found) == 5
    assert found == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert result.num_trainable_params == expected.num_trainable_params
    assert result.num_total_params == expected.num_total_params
    for split in ("validation", "test"):
        assert result.metrics[split]["top1"] == expected.metrics[split]["top1"]
        assert result.metrics[split]["loss"] == pytest.approx(expected.metrics[split]["loss"], abs=1e-4)


@pytest.mark.parametrize(("engine", "method"), CASES)
def test_the_adapter_file_is_that_of_one_process(runs: Path, engine: str, method: str) -> None:
    expected, found = adapter(runs, "single", method), adapter(runs, engine, method)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        if name.endswith(CHOSEN):
            assert torch.equal(found[name], tensor), name
        error = (found[name].double() - tensor.double()).abs()
        assert error.max() <= LARGEST_TOLERANCE, name
        assert error.mean() <= MEAN_TOLERANCE, name


@pytest.mark.parametrize("method", ["lora", "snell", "snella"])
@pytest.mark.parametrize("engine", ENGINES)
def test_plain_peft_loads_the_adapter(runs: Path, engine: str, method: str) -> None:
    logits = []
    for name in (f"single-{method}", f"{engine}-{method}"):
        config = load_config(runs / name / "config.yaml", config_class=registry.config_class)
        data = config.data.build(seed=config.data_seed)
        bundle = config.model.build(
            num_classes=len(data.class_names), input_spec=data.input_spec, seed=config.seed
        )
        model = peft.PeftModel.from_pretrained(bundle.module, str(runs / name / "adapter")).eval()
        assert isinstance(model.peft_config["default"], LoraConfig if method == "lora" else SnellConfig)
        with torch.no_grad():
            logits.append(model(torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)))
    assert torch.allclose(logits[0], logits[1], atol=1e-3)
    assert not torch.equal(logits[0], torch.zeros_like(logits[0]))


@pytest.mark.parametrize("method", ["lora", "snell", "snella"])
@pytest.mark.parametrize("engine", ENGINES)
def test_only_trainable_gradients_exist_and_travel(runs: Path, engine: str, method: str) -> None:
    result, _ = outcome(runs, engine, method)
    assert result.communication is not None
    assert result.memory is not None
    assert result.num_trainable_params is not None
    trainable_bytes = 4 * result.num_trainable_params
    operations = result.communication["operations"]
    reductions = [operations[name] for name in ("all_reduce", "reduce_scatter") if name in operations]
    reduced = sum(operation["payload_bytes"] for operation in reductions)
    # ZeRO-2 and 3 keep only a shard of the sum, so they reduce every microbatch, of which there are two.
    times = 2 if engine in ("zero2", "zero3") else 1
    # Above: padding to even shards, and norms. SNELLA asks DeepSpeed for whole gradients to score by. All of it
    # far below the gradients of the frozen weights: those alone would be 26 KiB in this model.
    again = 1 if method == "snella" and engine.startswith("zero") else 0
    assert trainable_bytes * times <= reduced <= trainable_bytes * (times + again) * 1.3 + 1024
    # DDP's buckets take over the gradients of the microbatches before: for a moment they are there twice.
    copies = 2 if engine == "ddp" else 1
    assert result.memory["phases"]["backward"]["gradients_bytes"] <= trainable_bytes * copies * 1.1
