"""Choosing what to adapt: groups, regular expressions, lists, and what a miss says."""

from dataclasses import replace
from typing import Any

import pytest

from snell_scale.tuners.methods.base import find_targets, matching_modules
from tests.tuners.methods.tiny_training import apply, vit


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("mlp", ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        (r"blocks\.1\.attn\.\w+v", ["blocks.1.attn.qkv"]),
        (["attn.proj"], ["blocks.0.attn.proj", "blocks.1.attn.proj"]),
        (["blocks.0.mlp.fc1", "qkv"], ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"]),
    ],
)
def test_targets_mean_modules(targets: Any, expected: list[str]) -> None:
    bundle = vit()
    assert matching_modules(bundle.module, find_targets(bundle, targets)) == expected
    module = apply("lora", bundle, targets=targets).module
    adapted = {
        n.split(".lora_A")[0].removeprefix("base_model.model.")
        for n, _ in module.named_parameters()
        if "lora_A" in n
    }
    assert adapted == set(expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("atention", "atention matches nothing. Groups of this model: all, linear, attention, mlp"),
        (["qkv", "fc3"], "fc3 matches nothing"),
        ([], "an empty list matches nothing"),
        ("blocks[", "no regular expression"),
        ("head", "head belongs to the head, which is trained whole"),
    ],
)
def test_a_miss_says_what_there_is(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        apply("lora", vit(), targets=targets)


def test_what_lies_inside_a_head_of_several_layers_is_refused_too() -> None:
    bundle = replace(vit(), head_modules=("blocks.1", "head"))
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1, blocks.1.mlp.fc2 belongs to the head"):
        find_targets(bundle, "mlp")
