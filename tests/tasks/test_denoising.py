"""The denoising task: its loss by hand, prior preservation, its evaluation, what it refuses before training."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from snell_scale.data.embedded import DigitsConfig
from snell_scale.data.latents import LatentSplit, PriorPreserving
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from snell_scale.interfaces import DataBundle, Engine, ModelBundle
from snell_scale.registry import config_class
from snell_scale.tasks.denoising import Denoising, DenoisingConfig, _batches_of_rank, _evenly
from tests.tasks.diffusion_parts import (
    V_PREDICTION,
    PlainEncoders,
    latent_batch,
    tiny_bundle,
    untrained_classifier,
)
from tests.tasks.parts import model_of


@pytest.fixture
def classifier(tmp_path: Path) -> Any:
    return untrained_classifier(tmp_path)


def digits(**changes: Any) -> DataBundle:
    settings: dict[str, Any] = {"classes": (5, 6, 7), "train_per_class": 4, "validation_per_class": 4}
    settings |= {"captions": ("a {}",), "scaling": "symmetric"}
    return DigitsConfig.model_validate(settings | changes).build(seed=0)


def made(data: DataBundle | None = None, *, scheduler: Any = V_PREDICTION, **settings: Any) -> tuple[Any, ...]:
    """(task, model's bundle, data)."""
    data = data or digits()
    bundle = tiny_bundle(data.input_spec, scheduler=scheduler)
    return DenoisingConfig(**settings).build(data=data, model=bundle), bundle, data


def engine_of(ranks: Ranks | None = None) -> Engine:
    return SingleConfig(device="cpu").build(ranks or Ranks())


def errors_by_hand(bundle: ModelBundle, batch: dict[str, Tensor], *, gamma: float | None = None) -> np.ndarray:
    """(B,) float64: the weighted squared error of v, from the cosine schedule's own formula."""
    steps = 100

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]
    alphas = np.cumprod(1 - np.array(betas))
    found = []
    module: Any = bundle.module.double()
    for row in range(len(batch["latents"])):
        x, e = batch["latents"][row].double(), batch["noise"][row].double()
        timestep = math.floor(float(batch["fraction"][row]) * steps)
        alpha = alphas[timestep]
        noisy = math.sqrt(alpha) * x + math.sqrt(1 - alpha) * e
        words = batch["condition.words"][row : row + 1].double()
        with torch.no_grad():
            told = module.told(torch.cat([torch.full((1, 1), timestep / 100, dtype=torch.float64), words], dim=1))
            out = module.outer(torch.tanh(module.inner(noisy[None]) + told[:, :, None, None]))[0]
        error = float((out - (math.sqrt(alpha) * e - math.sqrt(1 - alpha) * x)).square().mean())
        snr = alpha / (1 - alpha)
        found.append(error if gamma is None else error * min(snr, gamma) / (snr + 1))
    module.float()
    return np.array(found)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_weighted_squared_error(gamma: float | None) -> None:
    task, bundle, _ = made(min_snr_gamma=gamma)
    batch = latent_batch(6)
    found = task(bundle.module, batch)
    expected = errors_by_hand(bundle, batch, gamma=gamma).mean()
    # float32 against float64; the schedule's ᾱ is float32 in diffusers.
    assert found["loss"].item() == pytest.approx(expected, rel=2e-5)
    assert found["outputs"].shape == batch["latents"].shape


def test_prior_preservation_adds_the_weighted_prior_loss() -> None:
    task, bundle, _ = made()
    instances, prior = latent_batch(4, seed=1), latent_batch(4, seed=2)
    weight = 0.3
    paired = {name: torch.stack([instances[name], prior[name]], dim=1) for name in instances}
    paired["weight"] = torch.tensor([1.0, weight]).expand(4, 2)
    expected = errors_by_hand(bundle, instances).mean() + weight * errors_by_hand(bundle, prior).mean()
    assert task(bundle.module, paired)["loss"].item() == pytest.approx(expected, rel=2e-5)


def test_the_validation_loss_is_the_mean_over_images(tmp_path: Path) -> None:
    task, bundle, data = made(cache_dir=str(tmp_path), prompt_dropout=0.5)
    prepared = task.prepare(data, engine_of())
    split = prepared.validation
    assert isinstance(split, LatentSplit)
    whole = split.__getitems__([(index, 0) for index in range(12)])
    evaluation = task.evaluation(bundle.module, split)
    for part in (slice(0, 5), slice(5, 12)):
        evaluation.add(bundle.module, {name: value[part] for name, value in whole.items()})
    evaluation.add(bundle.module, whole, counts=False)
    metrics = evaluation.metrics(evaluation.sums())
    assert metrics["loss"] == pytest.approx(errors_by_hand(bundle, whole).mean(), rel=2e-5)
    # Twelve errors by twelve timesteps, one of each stretch: as many as there are images.
    timesteps = (whole["fraction"] * 12).long().unique()
    assert len(timesteps) >= 10


def test_an_empty_split_is_refused() -> None:
    task, bundle, data = made()
    evaluation = task.evaluation(bundle.module, data.test)
    with pytest.raises(ValueError, match="no sample"):
        evaluation.metrics({"loss_sum": torch.tensor(0.0), "count": torch.tensor(0)})


@pytest.mark.parametrize(
    ("data", "settings", "expected"),
    [
        ({"captions": ()}, {}, "caption"),
        ({}, {"sampling": {"sampler": "flow_euler"}}, "sampler"),
        ({}, {"timestep_weighting": "logit_normal"}, "timestep_weighting"),
        (
            {},
            {"clip": {"name": "clip", "weights": "none.pt", "architecture": "ViT-B-32"}},
            r"task\.clip\.weights",
        ),
        ({}, {"dino": {"name": "clip", "weights": "none.pt", "architecture": "ViT-B-32"}}, "expected 'dino'"),
        ({}, {"prompt": "a photo of {class}"}, "expected {} where the class's name goes"),
    ],
)
def test_what_does_not_fit_is_refused_when_built(data: Any, settings: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        made(digits(**data), **settings)


def test_a_model_that_does_not_denoise_is_refused() -> None:
    with pytest.raises(ValueError, match="denoised"):
        DenoisingConfig().build(data=digits(), model=model_of("class_logits"))


def test_a_classifier_that_lacks_a_class_is_refused(classifier: Any) -> None:
    with pytest.raises(ValueError, match="have eight"):
        made(digits(classes=(5, 6, 8)), fid_backend=classifier)


def test_one_real_image_is_too_few_for_fid(classifier: Any) -> None:
    data = digits()
    few = replace(data, sizes={**data.sizes, "test": 1})
    with pytest.raises(ValueError, match=r"at least 2 real images, but the test split has 1; .*reference=train"):
        made(few, fid_backend=classifier)
    made(few, fid_backend=classifier, reference="train")


def test_one_prompt_for_a_subject_and_its_class_is_refused() -> None:
    data = digits()
    both = replace(data, train=PriorPreserving(data.train, data.train, prior_weight=1.0))
    made(both)
    with pytest.raises(ValueError, match=r"task\.prompt would name the subject and its class alike"):
        made(both, prompt="a photo of a digit")


def test_a_prompt_for_all_needs_no_label() -> None:
    task, _, _ = made(digits(captions=()), prompt="a photo of sks digit")
    assert isinstance(task, Denoising)
    assert task.reported == ("loss",)


def test_test_metrics_are_of_the_prompted_images(classifier: Any, tmp_path: Path) -> None:
    """A denoiser that knows the test images draws them: the distances vanish, and every prompt is answered."""
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "fid_backend": classifier}
    settings["sampling"] = {"steps": 3, "batch_size": 50}
    data = digits()
    bundle = tiny_bundle(data.input_spec, scheduler=V_PREDICTION | {"prediction_type": "sample"})
    position = 0

    def cheats(model: Any, noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        nonlocal position
        images = torch.stack([data.test[index, 0]["image"] for index in range(position, position + len(noisy))])
        position += len(noisy) if int(timesteps[0]) < 40 else 0  # the last of three steps
        return images

    assert bundle.diffusion is not None
    object.__setattr__(bundle.diffusion, "denoise", cheats)
    task = DenoisingConfig(**settings).build(data=data, model=bundle)
    prepared = task.prepare(data, engine_of())
    metrics = task.test_metrics(bundle.module, prepared)
    assert metrics.keys() == {"fid", "kid", "sample_accuracy"}
    assert metrics["fid"] == pytest.approx(0.0, abs=1e-3)
    assert metrics["sample_accuracy"] > 0
    assert task.reported == ("kid", "fid", "sample_accuracy", "loss")
    described = task.describe_metrics()
    assert described.keys() == {"fid", "kid", "sample_accuracy"}
    assert "sha256" in described["fid"]
    assert "test split" in described["fid"]


def test_pictures_have_a_row_for_each_prompt(tmp_path: Path) -> None:
    task, bundle, data = made(cache_dir=str(tmp_path), picture_columns=3, sampling={"steps": 2, "batch_size": 2})
    prepared = task.prepare(data, engine_of())
    pictures = task.pictures(bundle.module, prepared.test)
    assert pictures["samples"].shape == (3 * 68 + 4, 3 * 68 + 4, 3)
    assert pictures["samples"].dtype == torch.uint8
    assert torch.equal(pictures["samples"], task.pictures(bundle.module, prepared.test)["samples"])
    encoders = bundle.diffusion.encoders
    assert isinstance(encoders, PlainEncoders)
    assert encoders.weights is None


def test_prompts_of_pictures_can_be_chosen(tmp_path: Path) -> None:
    task, bundle, data = made(
        cache_dir=str(tmp_path), picture_prompts=("a nine",), picture_columns=2, sampling={"steps": 2}
    )
    prepared = task.prepare(data, engine_of())
    assert task.pictures(bundle.module, prepared.test)["samples"].shape[0] == 72


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_batches_and_take_equally_many(world_size: int) -> None:
    found = [
        list(_batches_of_rank(23, 5, engine_of(Ranks(rank=r, world_size=world_size)))) for r in range(world_size)
    ]
    assert len({len(batches) for batches in found}) == 1
    counted = sorted((number, list(chunk)) for batches in found for number, chunk, counts in batches if counts)
    assert [number for number, _ in counted] == list(range(5))
    assert [index for _, chunk in counted for index in chunk] == list(range(23))


def test_samples_take_their_prompts_evenly() -> None:
    assert _evenly(4, 12).tolist() == [0, 3, 6, 9]
    assert _evenly(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert _evenly(3, 3).tolist() == [0, 1, 2]


def test_the_task_is_registered() -> None:
    assert config_class("task", "denoising") is DenoisingConfig
    assert config_class("data", "dreambooth").__name__ == "DreamBoothConfig"


def test_absent_metric_weights_stop_the_run_before_anything_is_made(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    backend = {
        "name": "dino",
        "architecture": "vit_tiny_patch16_224",
        "weights": str(tmp_path / "wrong.safetensors"),
    }
    with pytest.raises(ValueError, match="does not fit"):
        made(dino=backend, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
