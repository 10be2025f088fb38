"""A run small enough for a test: a tiny vision transformer on a few digits."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

# Triton decides at its first import whether to interpret, and timm and peft import it: without a GPU its kernels
# are tested interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Started in the background of a script, this process ignores Ctrl-C, and what it starts would as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from snell_scale import registry
from snell_scale.config import Config, load_config

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "name": "digits", "classes": [5, 6, 7], "train_per_class": 8, "validation_per_class": 6,
        "shift_pixels": 1,
    },
    "model": {
        "name": "timm", "architecture": "vision_transformer", "head": "new",
        "arguments": {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.1},
    },
    "task": {"name": "classification"},
    "method": {"name": "snell", "r": 4, "targets": "all", "sparsity": 0.5, "scale": 1.0},
    "engine": {"name": "single", "device": "cpu", "precision": "fp32"},
    "training": {"steps": 8, "batch_size": 8, "lr": 5e-3, "weight_decay": 0.01},
    "evaluation": {"every_steps": 4, "batch_size": 16},
    "checkpoint": {"every_steps": 2, "keep_last": 2},
    "logging": {"every_steps": 1, "memory_at_step": 3, "warmup_steps": 2},
    "variants": {
        "probe": {"method": {"name": "probe"}},
        "snella": {"method": {"init_sparsity": 0.0, "target_sparsity": 0.6, "scale": 1.0, "tick": "step"}},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The tiny config as a file; its runs go below tmp_path/runs."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(tmp_path / "runs")}))
    return path


@pytest.fixture
def tiny(tiny_file: Path) -> Callable[..., Config]:
    """tiny("method.name=lora", …) → a resolved Config."""

    def make(*overrides: str) -> Config:
        # A method other than SNELL does not know SNELL's options: the file's method section keeps what is shared.
        raw = yaml.safe_load(tiny_file.read_text())
        name = next((o.split("=")[1] for o in overrides if o.startswith("method.name=")), "snell")
        if name != "snell":
            raw["method"] = {"name": name, "r": 4, "targets": "all"}
            tiny_file.write_text(yaml.safe_dump(raw))
        return load_config(tiny_file, overrides, config_class=registry.config_class)

    return make
