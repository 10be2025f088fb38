"""The table of model sizes: against published numbers, and against what the methods put into the models."""

from typing import Any

import pytest
import torch

from snell_scale.interfaces import InputSpec
from snell_scale.models.census import MODELS, Method, census, census_markdown, census_of, census_rows
from snell_scale.registry import config_class

SETTINGS: dict[Method, dict[str, Any]] = {
    "lora": {},
    "klora": {},
    "snell": {"sparsity": 0.9},
    "snella": {"init_sparsity": 0.0, "target_sparsity": 0.5},
    "full": {},
}


@pytest.mark.parametrize(
    ("label", "rank", "published"),
    [
        ("ViT-B/16", 8, 1_327_104),
        ("ViT-B/16", 32, 5_308_416),
        ("ViT-L/16", 32, 14_155_776),
        ("ViT-H/14", 32, 23_592_960),
    ],
)
def test_snells_published_numbers(label: str, rank: int, published: int) -> None:
    assert census_of(label).num_trainable("snell", rank) == published


# label → (parameters of the whole model, adapted matrices, (rows, columns) of the largest)
SIZES = {
    "ViT-B/16": (86_567_656, 12 * 6, (3072, 768)),
    "ViT-L/16": (304_326_632, 24 * 6, (4096, 1024)),
    "ViT-H/14": (632_045_800, 32 * 6, (5120, 1280)),
    # gate and value of the SwiGLU apart
    "DINOv2 ViT-g/14": (1_138_016_232, 40 * 7, (4096, 1536)),
    "EVA-02-L/14": (305_080_232, 24 * 7, (2730, 1024)),
    # and 3 patch mergers
    "Swin-B": (87_768_224, 24 * 6 + 3, (4096, 1024)),
    # and 3 downsampling convolutions
    "ConvNeXt-B": (88_591_464, 36 * 2 + 3, (4096, 1024)),
    "CLIP ViT-L/14": (427_616_513, (24 + 12) * 6, (4096, 1024)),
    "CLIP ViT-H/14": (986_109_441, (32 + 24) * 6, (5120, 1280)),
    "CLIP ViT-bigG/14": (2_539_567_105, (48 + 32) * 6, (8192, 1664)),
}


@pytest.mark.parametrize("label", SIZES)
def test_sizes_against_the_literature(label: str) -> None:
    parameters, matrices, largest = SIZES[label]
    counted = census_of(label)
    assert (counted.num_parameters, len(counted.matrices)) == (parameters, matrices)
    assert (counted.largest.num_rows, counted.largest.num_columns) == largest
    assert not counted.exceeds_float32_integers


@pytest.mark.parametrize(("label", "parameters"), [("SD 1.5 UNet", 859_520_964), ("SDXL UNet", 2_567_463_684)])
def test_diffusion_models_have_matrices_that_float32_cannot_count(label: str, parameters: int) -> None:
    counted = census_of(label)
    assert counted.num_parameters == parameters
    assert counted.largest.num_entries == 1280 * 2560 * 3 * 3
    assert counted.exceeds_float32_integers


def applied(label: str, method: Method, rank: int) -> tuple[int, int]:
    """(what the table says, what the method itself trains without the head), on the meta device."""
    settings = MODELS[label]
    config = config_class("model", settings["name"]).model_validate(dict(settings))
    image = config.preprocessing().image
    with torch.device("meta"):
        bundle = config.build(num_classes=7, input_spec=image, seed=0)
        counted = census(bundle)
        chosen = config_class("method", method).model_validate({"name": method, "r": rank, **SETTINGS[method]})
        tuner = chosen.apply(bundle, total_steps=10, steps_per_epoch=5, seed=0)
    return counted.num_trainable(method, rank), tuner.num_trainable() - counted.num_head


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("ViT-B/16", "snell"),
        ("ViT-B/16", "full"),
        ("EVA-02-L/14", "snell"),
        ("Swin-B", "lora"),
        ("ConvNeXt-B", "klora"),
        ("CLIP ViT-L/14", "snella"),
        ("CLIP ViT-L/14", "lora"),
        ("SD 1.5 UNet", "snell"),
        ("PixArt-α transformer", "snella"),
    ],
)
def test_the_table_counts_what_the_methods_train(label: str, method: Method) -> None:
    told, trained = applied(label, method, 32)
    assert told == trained


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("label", MODELS)
def test_the_whole_table_counts_what_the_methods_train(label: str, method: Method) -> None:
    told, trained = applied(label, method, 8)
    assert told == trained


def test_a_rank_that_some_matrix_cannot_take_is_none() -> None:
    settings = {"architecture": "vision_transformer", "arguments": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    config = config_class("model", "timm").model_validate(settings)
    spec = InputSpec(3, 32, 32, (0.5,) * 3, (0.5,) * 3)
    assert census(config.build(num_classes=2, input_spec=spec, seed=0)).max_rank == 16


def test_the_table() -> None:
    rows = census_rows(["ViT-B/16", "SD 1.5 UNet"])
    assert rows[0]["snell r=32"] == "5.308 M"
    assert rows[1]["largest matrix"] == "1280×23040 (29.49 M > 2^24)"
    lines = census_markdown(rows).splitlines()
    assert lines[0].startswith("| model | parameters | matrices | lora r=8 |")
    assert lines[2].startswith("| ViT-B/16 | 86.57 M | 72 | 1.18 M |")
    assert {line.count("|") for line in lines[:4]} == {lines[0].count("|")}
