"""Configs: inheritance, variants, overrides, and errors that name the nearest valid key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from snell_scale import registry
from snell_scale.config import Config, json_schema, load_config, to_dict
from snell_scale.config_sources import SHARED_ENGINE_KEYS, parse_value

TRANSFER = Path(__file__).parent.parent / "configs" / "demo" / "transfer.yaml"


def load(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides, config_class=registry.config_class)


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load(path, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "path", sorted(TRANSFER.parent.parent.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_shipped_config_is_valid(path: Path) -> None:
    if path.name == "defaults.yaml":
        assert "extends" not in yaml.safe_load(path.read_text())
        return
    if path.name == "base.yaml":
        return  # what the files beside it share: no run by itself
    from snell_scale.compare import plan_study

    planned = plan_study([path], grid={}, overrides=[], name=None, config_class=registry.config_class)
    assert planned
    for run in planned:
        assert to_dict(run.config)["training"]["lr"] > 0


def test_extends_and_overrides_are_layered() -> None:
    config = load(TRANSFER, "training.lr=3e-4", "seed=7")
    assert config.training.lr == 3e-4
    assert config.seed == 7
    assert config.training.min_lr == 1e-5  # from defaults.yaml, three files up
    assert config.method.name == "snell"
    assert config.method.scale == 3.0  # from its variant


def test_one_field_switches_the_method_and_keeps_what_is_shared() -> None:
    lora = load(TRANSFER, "method.name=lora")
    assert lora.method.name == "lora"
    assert lora.method.r == load(TRANSFER).method.r
    assert not hasattr(lora.method, "sparsity")
    assert load(TRANSFER, "method.sparsity=0.5").method.sparsity == 0.5  # an override beats the variant


@pytest.mark.parametrize("name", registry.names("engine"))
def test_one_field_switches_the_engine_and_keeps_what_engines_share(name: str, tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    shared = "{device: cpu, precision: bf16, frozen_dtype: bf16, cpu_threads: 1, timeout_seconds: 77}"
    path.write_text(f"extends: {TRANSFER}\nengine: {shared}\n")
    engine = load(path, f"engine.name={name}").engine
    assert engine.name == name
    assert (engine.device, engine.precision, engine.frozen_dtype) == ("cpu", "bf16", "bf16")
    assert (engine.timeout_seconds, engine.cpu_threads) == (77, 1)
    # Its own settings do not follow to another engine.
    path.write_text(f"extends: {TRANSFER}\nengine: {{name: deepspeed, zero_stage: 3}}\n")
    assert hasattr(load(path, f"engine.name={name}").engine, "zero_stage") == (name == "deepspeed")


def test_what_engines_share_is_what_they_all_have() -> None:
    classes = [registry.config_class("engine", name) for name in registry.names("engine")]
    shared = set[str].intersection(*(set(cls.model_fields) for cls in classes))
    assert shared - {"name"} == SHARED_ENGINE_KEYS


def test_a_change_of_the_model_voids_the_models_settings(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(f"extends: {TRANSFER}\nmodel: {{name: open_clip, architecture: ViT-B-16}}\n")
    assert load(path).model.weights is None
    assert load(TRANSFER).model.weights is not None


def test_resolved_config_reads_back_to_itself(tmp_path: Path) -> None:
    config = load(TRANSFER)
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert load(path) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate=1", "unknown key 'training.learning_rate'"),
        ("training.batchsize=8", "did you mean 'batch_size'"),
        ("traning.lr=1e-3", "did you mean 'training'"),
        ("method.sparcity=0.5", "did you mean 'sparsity'"),
        ("method.name=snel", "did you mean 'snell'"),
        ("model.name=tim", "did you mean 'timm'"),
        ("training.lr=fast", "training.lr"),
        ("training.lr=-1", "greater than 0"),
        ("training.steps=10", "exactly one of training.epochs and training.steps"),
        ("training.gradient_accumulation=5", "not a multiple"),
        ("training.min_lr=1.0", "above lr"),
        ("name=../elsewhere", "expected a folder below output_dir"),
        ("engine.device=tpu", "engine.device"),
        ("training.lr=.inf", "finite number"),
        ("training.betas=[2, 5]", "less than 1"),
        ("seed=99999999999999999999", "less than"),
        ("method.name=[a]", "not known"),
        ("engine={name: single, precision: fp16, frozen_dtype: bf16}", "use precision=bf16"),
        ("lr", "not of the form key=value"),
        ("method=lora", "expected a mapping with a 'name'"),
    ],
)
def test_bad_overrides_say_what_to_do(override: str, expected: str) -> None:
    assert expected in error_of(TRANSFER, override)


def test_all_mistakes_are_listed_at_once() -> None:
    message = error_of(TRANSFER, "training.lr=-1", "method.sparcity=1", "evaluation.every=3")
    assert message.count("\n  - ") >= 3


def test_bad_files_are_named(tmp_path: Path) -> None:
    assert "did you mean" in error_of(TRANSFER.with_name("transfers.yaml"))
    for content, expected in [("a: [1", "not readable YAML"), ("- 1", "expected a mapping")]:
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        assert expected in error_of(path)
    path.write_text("extends: bad.yaml")
    assert "extends itself" in error_of(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not readable YAML" in error_of(path)
    path.write_text("seed: 1\nname: a\nseed: 2\n")
    assert "'seed' stands twice" in error_of(path)
    path.write_text(f"extends: {TRANSFER}\nvariants: {{snel: {{}}}}\n")
    assert "did you mean 'snell'" in error_of(path)
    path.write_text(f"extends: {TRANSFER}\nvariants: [1]\n")
    assert "expected a mapping" in error_of(path)
    path.write_text(f"extends: {TRANSFER}\ngrid: {{seed: [0]}}\n")
    assert "snell-scale compare" in error_of(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("0.5", 0.5),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("[0, 1e-1]", [0, 0.1]),
        ("eel", "eel"),
    ],
)
def test_override_values(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_schema_covers_every_component() -> None:
    components = {
        kind: {name: registry.config_class(kind, name) for name in registry.names(kind)}
        for kind in registry.COMPONENTS
    }
    schema = json_schema(components)
    for kind, classes in components.items():
        assert len(schema["properties"][kind]["oneOf"]) == len(classes)
    assert schema["$defs"]["TrainingConfig"]["additionalProperties"] is False


def test_configs_are_frozen() -> None:
    training: Any = load(TRANSFER).training
    with pytest.raises(ValueError, match="frozen"):
        training.lr = 1.0
