"""A user's DeepSpeed JSON: "auto" is filled from the run's config, what contradicts it is refused by name."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snell_scale import registry
from snell_scale.assembly import assemble
from snell_scale.config import Config
from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.engines.deepspeed_json import (
    check_dictated,
    check_optimizer,
    default_values,
    plan_values,
    settings,
)
from snell_scale.engines.deepspeed_state import LossScale
from snell_scale.engines.ranks import Ranks
from snell_scale.interfaces import StepPlan

PLAN = StepPlan(microbatch_size=4, gradient_accumulation=2, clip_grad_norm=None)
# As users of the Hugging Face Trainer and Accelerate have it.
ALL_AUTO = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., DeepSpeedConfig]:
    """engine(given, **settings): the config of an engine with `given` as its JSON."""

    def make(given: Any, **chosen: Any) -> DeepSpeedConfig:
        path = tmp_path / "deepspeed.json"
        path.write_text(given if isinstance(given, str) else json.dumps(given))
        return DeepSpeedConfig(device="cpu", json_file=str(path), **chosen)

    return make


def test_auto_is_filled(engine: Callable[..., DeepSpeedConfig]) -> None:
    config = engine(ALL_AUTO, zero_stage=3)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    given = config.read_json()
    check_optimizer(given, torch.optim.AdamW(model.parameters(), lr=3e-4))
    dictated = {**config.dictated(), **plan_values(PLAN, 2)}
    told = settings(given, dictated=dictated, defaults=default_values(model, list(model)))
    batches = {key: told[key] for key in told if "batch" in key or "accumulation" in key}
    assert batches == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 16,
    }
    assert told["gradient_clipping"] == 0.0
    zero = told["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 + 8 + 8
    assert zero["stage3_prefetch_bucket_size"] == 72
    assert zero["stage3_param_persistence_threshold"] == 8
    assert zero["stage3_max_live_parameters"] == 1e9  # the JSON's own
    assert zero["stage3_max_reuse_distance"] == 0
    assert told.keys().isdisjoint({"optimizer", "scheduler"})
    assert "auto" not in json.dumps(told)
    assert "enabled" not in told["fp16"]


def test_values_that_agree_are_accepted(engine: Callable[..., DeepSpeedConfig]) -> None:
    optimizer = {"type": "adamw", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "torch_adam": True}}
    given = {"optimizer": optimizer, "train_batch_size": 16, "zero_optimization": {"stage": 2}}
    flat = engine(given).read_json()
    check_dictated(flat, plan_values(PLAN, 2))
    check_optimizer(flat, torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=3e-4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_batch_size": 32}, r"train_batch_size=32.* 16 .*training.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, r"train_micro_batch_size_per_gpu=8.* 4 .*on 2 rank"),
        (
            {"gradient_accumulation_steps": 1},
            r"gradient_accumulation_steps=1.* 2 .*training.gradient_accumulation",
        ),
        ({"gradient_clipping": 1.0}, r"gradient_clipping=1.0.* 0.0 .*training.clip_grad_norm"),
    ],
)
def test_a_contradiction_with_the_batches(
    engine: Callable[..., DeepSpeedConfig], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_dictated(engine(given).read_json(), plan_values(PLAN, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": {"type": "Lion"}}, r"optimizer.type='Lion'.*AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, r"optimizer.params.lr=0.001.*0.0003"),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, r"weight_decay=0.1.*0.05"),
        ({"optimizer": {"params": {"freeze_step": 4}}}, r"freeze_step=4.*no such setting"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}, r"warmup_num_steps=9.*schedule"),
    ],
)
def test_another_optimizer_or_schedule(
    engine: Callable[..., DeepSpeedConfig], given: dict[str, Any], message: str
) -> None:
    decayed, undecayed = nn.Linear(2, 2).parameters()
    groups = [{"params": [decayed], "weight_decay": 0.05}, {"params": [undecayed], "weight_decay": 0.0}]
    with pytest.raises(ValueError, match=message):
        check_optimizer(engine(given).read_json(), torch.optim.AdamW(groups, lr=3e-4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage=3.* 2 .*engine.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"'cpu'.*engine.offload_optimizer"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"'nvme'.*engine.offload_parameters"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled=true.*engine.precision"),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast.enabled=true.*engine.precision"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled=true.*'fp32'"),
        ([], r"holds a list"),
        ("{", r"could not be read as JSON"),
    ],
)  # fmt: skip
def test_a_contradiction_with_the_engine(
    engine: Callable[..., DeepSpeedConfig], given: Any, message: str
) -> None:
    """Before a device is touched."""
    with pytest.raises(ValueError, match=message):
        engine(given).check()


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine.json_file=.*absent.json.*could not be read"):
        DeepSpeedConfig(device="cpu", json_file=str(tmp_path / "absent.json")).check()


def test_what_the_config_itself_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="offload_parameters needs zero_stage=3"):
        DeepSpeedConfig(device="cpu", zero_stage=2, offload_parameters=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install snell-scale\[deepspeed\]"):
        DeepSpeedConfig(device="cpu").check()


@pytest.mark.parametrize(
    ("stage", "setting", "advice"),
    [
        (3, "training.ema_decay=0.9", "zero_stage to 1 or 2"),
        (2, "training.compile=true", "engine.name to ddp"),
        (2, "checkpoint.asynchronous=true", "set it to false"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_the_config(
    tiny: Callable[..., Config], stage: int, setting: str, advice: str
) -> None:
    def config(setting: str) -> Config:
        return tiny("engine.name=deepspeed", f"engine.zero_stage={stage}", setting)

    with pytest.raises(ValueError, match=rf"{setting.partition('=')[0]} .*deepspeed: .*{advice}"):
        assemble(config(setting))
    assert assemble(config("seed=1")).num_trainable_params > 0


def test_checkpoints_are_for_the_same_stage_and_world_size() -> None:
    built = DeepSpeedConfig(device="cpu", zero_stage=3).build(Ranks(world_size=2))
    built.check_checkpoint(built.layout())
    for other in ({"engine": "torch", "world_size": 2}, {**built.layout(), "world_size": 4}):
        with pytest.raises(
            ValueError, match=rf"{other['engine']} on {other['world_size']} .* deepspeed zero-3 on 2"
        ):
            built.check_checkpoint(other)


def test_loss_scale_follows_torch() -> None:
    """GradScaler's own numbers, after an overflow and 2000 good steps."""
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu")
    theirs.scale(torch.ones(()))  # makes its state
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(2002):
        overflow = step == 0
        weight.grad = torch.full((), float("inf") if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow=overflow)
        assert ours.scale == theirs.get_scale()
    assert ours.scale == 2.0**16


def test_registered() -> None:
    assert registry.config_class("engine", "deepspeed") is DeepSpeedConfig
