"""Updates read from adapter files in numpy are those that the layers compute in torch, and the authors'."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import Updates, write_peft_adapter, write_trained_weights

from analysis.updates.deltas import auto_scale, deltas, snell_delta
from analysis.updates.layers import block_of, kind_of, natural, num_stacked
from snell_scale.kernels.merge import auto_scale as auto_scale_of_the_kernels
from snell_scale.records import write_yaml

GOLDEN = Path(__file__).parents[1] / "kernels" / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "golden_merge.json").read_text())
KERNELS = ("distance", "mixk", "linear", "sigmoid", "rbf", "exponential")
# Both in float64: distances by differences there, by products here, which costs some digits of small ones.
TOLERANCE = 1e-9


def assert_same(folder: Path, expected: Updates) -> None:
    found = deltas(folder)
    assert {(delta.layer, delta.index) for delta in found} == set(expected)
    for delta in found:
        update, wanted = delta.make(), expected[(delta.layer, delta.index)]
        assert update.shape == delta.shape == wanted.shape
        assert np.count_nonzero(wanted) > 0
        assert np.abs(update - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['method']}")
def test_the_golden_numbers(case: dict[str, Any]) -> None:
    with np.load(GOLDEN / "golden_merge.npz") as stored:
        A, B, expected = (stored[f"{case['id']}/{name}"] for name in ("A", "B", "delta_w"))
    is_mixed = case["method"] in ("mixk", "snella")
    update = snell_delta(
        A,
        B,
        sparsity=case["sparsity"],
        kernel="mixk" if is_mixed else "distance",
        scale=float(np.float32(case["scale"])),  # the authors' modules hold it in float32
        parameters={name: case[name] for name in ("alpha", "gamma", "beta")} if is_mixed else {},
    )
    assert np.abs(update - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.count_nonzero(update) == case["nnz"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weighting", ["magnitude", "soft", "hard"])
def test_snell_of_every_kernel_and_weighting(kernel: str, weighting: str, tmp_path: Path) -> None:
    assert_same(tmp_path, write_peft_adapter(tmp_path, "snell", kernel=kernel, weighting=weighting, scale="auto"))


@pytest.mark.parametrize("method", ["klora", "snella", "lora"])
def test_the_other_adapters(method: str, tmp_path: Path) -> None:
    expected = write_peft_adapter(tmp_path, method, **({"lora_alpha": 7} if method == "lora" else {}))
    assert ("blocks.1.attn.qkv", 2) in expected
    assert_same(tmp_path, expected)


@pytest.mark.parametrize("method", ["full", "gps"])
def test_changes_of_the_model_s_own_weights(method: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert_same(run, write_trained_weights(run, method))


def test_a_method_that_trains_no_matrix_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_trained_weights(run, "bias")
    with pytest.raises(ValueError, match="trained no matrix"):
        deltas(run)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapter"):
        deltas(tmp_path)
    write_peft_adapter(tmp_path, "snell")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"SNELL"', '"SHIRA"'))
    with pytest.raises(ValueError, match="updates of SHIRA"):
        deltas(tmp_path)
    write_peft_adapter(tmp_path, "snell")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        deltas(tmp_path)


@pytest.mark.parametrize(("weights", "named"), [("pretrained", "pretrained"), (None, "null, random ones")])
def test_base_weights_that_are_not_at_hand_are_named(tmp_path: Path, weights: str | None, named: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_trained_weights(run, "full")
    write_yaml(run / "config.yaml", {"model": {"weights": weights}})
    with pytest.raises(ValueError, match=rf"not at hand.*model\.weights: {named}"):
        deltas(run)


def test_auto_scale_is_the_kernels_own() -> None:
    for arguments in ((768, 768, 32, 2), (3072, 768, 8, 2), (96, 384, 9, 3)):
        num_rows, num_columns, rank, components = arguments
        expected = auto_scale_of_the_kernels(num_columns, num_rows, rank, components)
        assert auto_scale(*arguments) == pytest.approx(expected, rel=1e-12)


def test_names_of_layers_say_their_block_and_kind() -> None:
    names = {
        "blocks.3.attn.qkv": ("blocks.3", ["attn.q", "attn.k", "attn.v"]),
        "visual.transformer.resblocks.10.attn": (
            "visual.transformer.resblocks.10", ["attn.q", "attn.k", "attn.v", "attn.out_proj"],
        ),
        "blocks.0.attn.base_layer.out_proj": ("blocks.0", ["attn.out_proj"]),
        "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_out.0": (
            "down_blocks.1.attentions.0.transformer_blocks.2", ["attn1.to_out.0"],
        ),
        "layer1.0.conv1": ("layer1.0", ["conv1"]),
        "patch_embed.proj": (None, ["patch_embed.proj"]),
    }  # fmt: skip
    for layer, (block, kinds) in names.items():
        assert block_of(layer) == block
        assert [kind_of(layer, index, len(kinds)) for index in range(len(kinds))] == kinds
    assert sorted(["blocks.10", "blocks.2"], key=natural) == ["blocks.2", "blocks.10"]
    assert [num_stacked("a.qkv", 72, 24), num_stacked("a.qkv", 24, 24), num_stacked("a.fc", 72, 24)] == [3, 1, 1]
