"""A config's estimate beside what a run of it measures."""

from pathlib import Path
from typing import Any, NamedTuple

from snell_scale import registry
from snell_scale.config import Config, load_config
from snell_scale.estimate.prediction import Estimator
from snell_scale.run import run

CONFIGS = Path(__file__).parents[2] / "configs"
PHASES = ("forward", "backward", "step")
SHORT = (
    "model.weights=null",
    "training.epochs=null",
    "training.steps=4",
    "engine.device=cpu",
    "logging.memory_at_step=3",
    "evaluation.batch_size=128",
)
"""Of any config: its model with random weights, a measured step and one after it, on the CPU."""


class OffBy(NamedTuple):
    """By which share of the measured bytes an estimate is off."""

    share: float
    predicted_bytes: int
    measured_bytes: int


class Pair(NamedTuple):
    """Reports of memory, as MemoryProbe makes them."""

    predicted: dict[str, Any]
    measured: dict[str, Any]


def short(path: Path, folder: Path, *overrides: str) -> Config:
    """The config, shortened and changed, its run below `folder`."""
    texts = [*SHORT, f"output_dir={folder}", *overrides]
    return load_config(path, texts, config_class=registry.config_class)


def predict_and_measure(config: Config) -> Pair:
    """Of a config of one process."""
    with Estimator(config, target="cpu") as estimator:
        predicted = estimator.predict().memory
    result = run(config, quiet=True)
    assert result.status == "ok"
    assert result.memory is not None
    return Pair(predicted, dict(result.memory))


def off_by(pair: Pair) -> dict[str, OffBy]:
    """Of every phase, and of the peak."""
    found = {name: [report["phases"][name]["total_bytes"] for report in pair] for name in PHASES}
    found["peak"] = [report["peak"]["total_bytes"] for report in pair]
    return {name: OffBy(abs(predicted / seen - 1), predicted, seen) for name, (predicted, seen) in found.items()}
