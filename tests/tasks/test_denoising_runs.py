"""Whole runs of the denoising task: two ranks as one, a kill in the middle, averaged weights, DreamBooth."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from snell_scale import registry
from snell_scale.config import Config, load_config
from snell_scale.records import Result, read_result, read_steps
from snell_scale.run import run
from tests.conftest import TINY
from tests.tasks.diffusion_parts import untrained_classifier
from tests.test_run import Killed, kill_at_step

UNET: dict[str, Any] = {
    "name": "diffusers",
    "architecture": "unet",
    "arguments": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4,
    },
    "text_length": 3,
    "scheduler": {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction", "timestep_spacing": "trailing",
    },
}  # fmt: skip


def config_of(folder: Path, name: str, **changes: Any) -> Path:
    """A run of 5 steps; keys of `changes` replace whole sections, except in training and task."""
    backend = untrained_classifier(folder).model_dump()
    content = {
        **TINY,
        "name": name,
        "output_dir": str(folder / "runs"),
        "data": {**TINY["data"], "shift_pixels": 0, "captions": ["a {}"], "scaling": "symmetric"},
        "model": UNET,
        "method": {"name": "lora", "r": 4, "targets": "all"},
        "checkpoint": {"every_steps": 2, "keep_last": 1},
        "evaluation": {"every_steps": 5, "batch_size": 5},
        "variants": {},
        **{key: value for key, value in changes.items() if key not in ("training", "task")},
        "training": {**TINY["training"], "steps": 5, "gradient_accumulation": 2, **changes.get("training", {})},
        "task": {
            "name": "denoising", "cache_dir": str(folder / "latents"), "min_snr_gamma": 5.0,
            "prompt_dropout": 0.2,
            "num_samples": 22, "fid_backend": backend, "picture_columns": 2,
            "sampling": {"steps": 2, "guidance_scale": 2.0, "batch_size": 4},
            **changes.get("task", {}),
        },
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def loaded(path: Path) -> Config:
    return load_config(path, config_class=registry.config_class)


def outcome(folder: Path, name: str) -> tuple[Result, list[float], dict[str, torch.Tensor]]:
    run_folder = folder / "runs" / name
    losses = [line["loss"] for line in read_steps(run_folder) if "split" not in line]
    (adapter,) = (run_folder / "adapter").glob("*.safetensors")
    return read_result(run_folder), losses, load_file(adapter)


def test_two_ranks_train_and_judge_as_one(tmp_path: Path) -> None:
    assert run(loaded(config_of(tmp_path, "one")), quiet=True).status == "ok"
    engine = {**TINY["engine"], "name": "ddp"}
    # Latents of its own: the second rank waits for the first.
    file = config_of(tmp_path, "two", engine=engine, task={"cache_dir": str(tmp_path / "others")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--module", "tests.engines.equality_worker", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (one, losses, weights), (two, found, adapter) = (outcome(tmp_path, name) for name in ("one", "two"))
    assert two.world_size == 2
    # float32 sums over ranks come in another order: see tests/engines/test_equality.py.
    assert found == pytest.approx(losses, abs=2e-5)
    for name, tensor in weights.items():
        assert (adapter[name] - tensor).abs().mean() <= 2e-5, name
    assert two.metrics["test"].keys() == {"loss", "fid", "kid", "sample_accuracy"}
    for split in ("validation", "test"):
        assert two.metrics[split]["loss"] == pytest.approx(one.metrics[split]["loss"], abs=1e-4)
    # The same batches of samples from weights that differ by 1e-5; bytes may round to their neighbour.
    for name in ("fid", "kid", "sample_accuracy"):
        assert two.metrics["test"][name] == pytest.approx(one.metrics["test"][name], rel=1e-2), name
    pictures = [
        np.asarray(Image.open(tmp_path / "runs" / name / "pictures/samples.png")) for name in ("one", "two")
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_resumes_with_identical_losses(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"name": method, "r": 4, "targets": "all"}
    options = {"method": settings, "training": {"ema_decay": 0.9}}
    options["task"] = {"offset_noise": 0.1, "cache_flips": True, "fid_backend": None}
    expected = run(loaded(config_of(tmp_path, "whole", **options)), quiet=True)
    broken = loaded(config_of(tmp_path, "broken", **options))
    with monkeypatch.context() as patch:
        kill_at_step(patch, 4)
        with pytest.raises(Killed):
            run(broken, resume="auto", quiet=True)
    result = run(broken, resume="auto", quiet=True)
    assert result.resumed_from_steps == (2,)
    assert outcome(tmp_path, "broken")[1] == outcome(tmp_path, "whole")[1]  # bit-identical
    assert result.metrics == expected.metrics


def test_averaged_weights_are_evaluated_and_kept(tmp_path: Path) -> None:
    task = {"fid_backend": None}
    full = {"name": "full"}
    plain = run(loaded(config_of(tmp_path, "plain", task=task, method=full)), quiet=True)
    averaged = run(
        loaded(config_of(tmp_path, "averaged", task=task, method=full, training={"ema_decay": 0.999})), quiet=True
    )
    (_, losses, weights), (_, found, slow) = outcome(tmp_path, "plain"), outcome(tmp_path, "averaged")
    assert found == losses  # averaging looks on
    assert averaged.metrics["validation"]["loss"] > plain.metrics["validation"]["loss"]  # still near the start
    start = registry.config_class("model", "diffusers").model_validate(UNET)
    config = loaded(tmp_path / "plain.yaml")
    data = config.data.build(seed=0)
    first = start.build(num_classes=3, input_spec=data.input_spec, seed=0).module.state_dict()
    name = "down_blocks.0.resnets.0.conv1.weight"
    moved, slowly = ((kept[name] - first[name]).norm() for kept in (weights, slow))
    # Five steps: the average has gone at most 1 − 0.999^5 of the way that the weights have gone.
    assert 0 < slowly < 0.005 * moved


def test_dreambooth_runs_and_is_judged_by_its_instances(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, number in (("dog", 6), ("dogs", 5)):
        (tmp_path / name).mkdir()
        for index in range(number):
            Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(
                tmp_path / name / f"{index}.png"
            )
    data = {
        "name": "dreambooth", "instance_folder": str(tmp_path / "dog"), "instance_prompt": "a sks dog",
        "class_folder": str(tmp_path / "dogs"), "class_prompt": "a dog", "num_class_images": 5,
        "prior_weight": 0.5, "image_size": 8,
    }  # fmt: skip
    file = config_of(
        tmp_path,
        "dreambooth",
        data=data,
        training={"batch_size": 4},
        task={"reference": "train", "num_samples": 6},
    )
    result = run(loaded(file), quiet=True)
    assert result.status == "ok"
    assert result.metrics["test"].keys() == {"loss", "fid", "kid"}  # no labels: nothing is recognised
    assert "train split" in yaml.safe_dump(result.metric_sources)
