"""The conditions of a run: what its config and its machine say, and nothing that is not known."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn, use_fused_attn

from snell_scale.attempt import blank_result
from snell_scale.conditions import conditions_of
from snell_scale.config import Config
from snell_scale.instrument.environment import cpu_model
from snell_scale.registry import config_class

MakeConfig = Callable[..., Config]
MakeSection = Callable[..., str]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def make_section(tiny: MakeConfig) -> MakeSection:
    """The condition "data" of a config with the section that is given."""

    def make(section: dict[str, Any], **more: Any) -> str:
        raw = {**section, **more}
        data = config_class("data", raw["name"]).model_validate(raw)
        return conditions_of(tiny().model_copy(update={"data": data}), world_size=1)["data"]

    return make


def test_what_the_config_says(tiny: MakeConfig):
    config = tiny("training.gradient_accumulation=2", "training.ema_decay=0.9", "data_seed=7", "method.name=lora")
    found = conditions_of(config, world_size=2)
    assert len(found.pop("data")) == 12
    assert found == {
        "microbatch_size": 2,
        "gradient_accumulation": 2,
        "activation_checkpointing": False,
        "frozen_dtype": "fp32",
        "optimizer": "adamw",
        "compile": False,
        "deterministic": False,
        "ema_decay": 0.9,
        "fused_attention": use_fused_attn(),
        "data_seed": 7,
        "weights": None,
    }


def test_data_are_told_apart_and_not_by_where_they_lie(make_section: MakeSection):
    folder = {"name": "image_folder", "validation_fraction": 0.1}
    pairs = {"name": "image_text", "format": "csv", "validation_fraction": 0.1, "test_fraction": 0.1}
    shards = {"name": "webdataset", "validation_fraction": 0.1}
    here = make_section(folder, root="/here/pets")
    assert here == make_section(folder, root="/there/pets")
    assert here != make_section({**folder, "validation_fraction": 0.2}, root="/here/pets")
    assert make_section(pairs, source="/here/a.csv") == make_section(pairs, source="there/a.csv")
    assert make_section(pairs, source="/here/a.csv") != make_section(pairs, source="/here/b.csv")
    assert make_section(pairs, source=["x/a.csv", "x/b.csv"]) == make_section(
        pairs, source=["y/a.csv", "y/b.csv"]
    )
    # Below a root the folders are the data's own.
    assert make_section(shards, root="/x", train=["one/0.tar"]) != make_section(
        shards, root="/x", train=["two/0.tar"]
    )


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("/somewhere/trained.safetensors", "trained.safetensors"), ("pretrained", "pretrained"), (None, None)],
)
def test_weights_are_named_without_their_place(tiny: MakeConfig, weights: str | None, expected: str | None):
    config = tiny()
    config = config.model_copy(update={"model": config.model.model_copy(update={"weights": weights})})
    assert conditions_of(config, world_size=1)["weights"] == expected


def test_whether_timm_fuses_attention(tiny: MakeConfig):
    was_fused = use_fused_attn()
    try:
        for is_fused in (False, True):
            set_fused_attn(is_fused)
            assert conditions_of(tiny(), world_size=1)["fused_attention"] is is_fused
    finally:
        set_fused_attn(was_fused)


@pytest.mark.parametrize(("variable", "expected"), [("0", "False"), ("1", "True")])
def test_the_variable_decides_whether_attention_is_fused(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, expected: str
):
    monkeypatch.setenv("TIMM_FUSED_ATTN", variable)
    code = (
        "import sys; from snell_scale import config, registry; from snell_scale.conditions import conditions_of\n"
        "found = config.load_config(sys.argv[1], config_class=registry.config_class)\n"
        "print(conditions_of(found, world_size=1)['fused_attention'])"
    )
    command = [sys.executable, "-c", code, str(tiny_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


def test_what_the_device_says(tiny: MakeConfig):
    found = conditions_of(tiny(), world_size=1, device=torch.device("cpu"), image_size=(8, 8))
    assert found["hardware"] == cpu_model()
    assert found["allocator"] == "cpu"
    assert found["num_threads"] == torch.get_num_threads()
    assert found["image_size"] == [8, 8]
    assert "ema_decay" not in found


def test_a_batch_that_does_not_divide_is_refused_elsewhere(tiny: MakeConfig):
    result = blank_result(tiny(), {}, world_size=3)
    assert "microbatch_size" not in result.conditions
    assert result.conditions["gradient_accumulation"] == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "native"),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128, expandable_segments:True"},
            "expandable_segments max_split_size_mb:128",
        ),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "cudaMallocAsync"),
        # The new name goes first.
        ({"PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:1"}, "native"),
    ],
)
def test_the_allocator_and_how_it_was_set(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    found = conditions_of(tiny(), world_size=1, device=CUDA)
    assert found["allocator"] == expected
    assert found["hardware"] == "NVIDIA H100 80GB HBM3"
