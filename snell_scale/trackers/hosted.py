"""Weights & Biases and trackio; their packages are imported when a run asks for them, and not before."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "snell-scale"


class WeightsAndBiases:
    """One W&B run per attempt, as WANDB_PROJECT, WANDB_MODE, … of the environment say; its files in the run's."""

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        wandb = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(project=project, name=name, config=dict(config), dir=str(folder))

    def start(self, num_done_steps: int) -> None:
        self._run.summary["resumed_after_step"] = num_done_steps

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


class Trackio:
    """One trackio run per attempt, kept where TRACKIO_DIR or TRACKIO_SPACE_ID of the environment say."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        trackio = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project=project, name=name, config=dict(config), embed=False)

    def start(self, num_done_steps: int) -> None:
        return None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, ok: bool) -> None:
        self._run.finish()
