"""Every bad value of SnellConfig and SnellaConfig: what the message says."""

import re
from typing import Any

import pytest
from peft import PeftConfig
from snell_models import METHODS, config

from snell_scale.tuners import SnellaConfig, SnellConfig

GOOD: dict[str, Any] = {"r": 8, "sparsity": 0.9}
GOOD_SNELLA: dict[str, Any] = {"r": 8, "init_sparsity": 0.0, "target_sparsity": 0.8}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 0.9}, "r is missing: there is no default rank, give one, e.g. r=8"),
        ({"r": 8}, "sparsity is missing.*sparsity=None for the dense"),
        ({"r": 7}, "r=7 is not divisible by num_components=2.*use e.g. 6"),
        ({"r": 1, "num_components": 4}, "use e.g. 4"),
        ({"r": -2}, "r must be a whole number of at least 1, got -2"),
        ({"r": 8.0}, "whole number.*got 8.0"),
        ({"r": True}, "whole number.*got True"),
        ({"num_components": 0}, "num_components must be a whole number of at least 1"),
        ({"rank_pattern": {"fc1": 3}}, r"rank_pattern\['fc1'\]=3 is not divisible"),
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0; it is the share of entries set to zero"),
        ({"sparsity": -0.1}, r"\[0, 1\), got -0.1"),
        ({"sparsity": "0.9"}, r"\[0, 1\), got '0.9'"),
        ({"sparsity": True}, r"\[0, 1\), got True"),
        ({"kernel": "gauss"}, "unknown kernel 'gauss': choose one of 'distance', 'mixk'"),
        ({"weighting": "loud"}, "unknown weighting 'loud': choose one of 'magnitude', 'soft', 'hard'"),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0; or give 'auto'"),
        ({"scale": "big"}, "positive number, got 'big'"),
        ({"scale": float("inf")}, "positive number, got inf"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"drop_path": -1}, r"drop_path must lie in \[0, 1\)"),
        ({"target_modules": [""]}, "target_modules must be a list of module names or one regular expression"),
        ({"target_modules": 3}, "target_modules must be a list"),
        ({"exclude_modules": [1]}, "exclude_modules must be a list"),
        ({"fused_groups": {"qkv": 0}}, r"fused_groups\['qkv'\] must be a whole number"),
        ({"layers_pattern": "blocks"}, "does nothing without layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "needs target_modules as a list"),
        (
            {"init_weights": "orthogonal"},
            "unknown init_weights 'orthogonal': choose one of True, False, 'random'",
        ),
        ({"init_weights": 1}, "unknown init_weights 1"),
        ({"init_weights": "scaled", "init_scale": 0.0}, "init_scale must be a positive number.*'zeros'"),
        ({"init_scale": 2.0}, "init_scale=2.0 does nothing with init_weights=True"),
        ({"task_type": "PAINTING"}, "Invalid task type"),
    ],
)
def test_snell_refuses(values: dict[str, Any], message: str) -> None:
    only = values if set(values) in ({"sparsity"}, {"r"}) and "missing" in message else GOOD | values
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        SnellConfig(**only)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_sparsity": float("nan")}, "init_sparsity is missing"),
        ({"target_sparsity": float("nan")}, "target_sparsity is missing"),
        ({"target_sparsity": 1.0}, r"target_sparsity must lie in \[0, 1\)"),
        ({"init_sparsity": None}, r"init_sparsity must lie in \[0, 1\), got None"),
        ({"sparsity": 0.5}, "sparsity=0.5 does not apply to SNELLA.*give init_sparsity and target_sparsity"),
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2 must lie in \[0, 1\)"),
        ({"tick": "hour"}, "unknown tick 'hour': choose one of 'epoch', 'step'"),
        ({"mask_interval": 0}, "mask_interval must be a whole number of at least 1"),
        ({"init_warmup": -1}, "init_warmup must be a whole number of at least 0"),
        ({"final_warmup": 1.5}, "final_warmup must be a whole number"),
        ({"total_ticks": 0}, "total_ticks must be a whole number"),
        ({"total_ticks": 5, "init_warmup": 3, "final_warmup": 2}, "total_ticks=5 must exceed init_warmup"),
        ({"total_ticks": 6, "init_warmup": 3, "final_warmup": 2}, "total_ticks=6 must exceed init_warmup"),
        ({"total_ticks": 1}, "total_ticks=1 must exceed init_warmup"),
        ({"r": 0}, "r is missing"),
        ({"kernel": "none"}, "unknown kernel"),
    ],
)
def test_snella_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        SnellaConfig(**GOOD_SNELLA | values)


def test_dense_is_a_choice() -> None:
    assert SnellConfig(r=8, sparsity=None).start_sparsity is None
    assert SnellConfig(r=8, sparsity=0.0).start_sparsity == 0.0


def test_snella_differs_from_snell_in_its_kernel() -> None:
    snella = SnellaConfig(**GOOD_SNELLA)
    assert (snella.kernel, snella.start_sparsity, snella.competes) == ("mixk", 0.0, True)
    assert SnellaConfig(**GOOD_SNELLA, kernel="distance").kernel == "distance"
    with pytest.raises(
        ValueError, match="total_ticks is missing: to train SNELLA, set it to the number of steps"
    ):
        SnellaConfig(**GOOD_SNELLA, tick="step").schedule()


@pytest.mark.parametrize("method", METHODS)
def test_saved_config_is_read_back_equal(method: str, tmp_path: Any) -> None:
    written = config(method, "vit", exclude_modules=["head"], dropout_exclude_modules=["proj"], dropout=0.1)
    written.save_pretrained(str(tmp_path))
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is type(written)
    assert read == written
    first = (tmp_path / "adapter_config.json").read_bytes()
    read.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_config.json").read_bytes() == first
