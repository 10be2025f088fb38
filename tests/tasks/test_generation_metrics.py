"""FID and KID against closed forms; similarities by hand; backends from local files, refused where absent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from snell_scale.data.batches import evaluation_batches
from snell_scale.engines.ranks import Ranks
from snell_scale.interfaces import InputSpec
from snell_scale.registry import config_class
from snell_scale.tasks.feature_backends import FeatureBackendConfig, as_input
from snell_scale.tasks.generation_metrics import (
    GenerationMetrics,
    frechet_distance,
    kernel_distance,
    mean_similarity,
)
from tests.conftest import TINY
from tests.tasks.diffusion_parts import untrained_classifier

CPU = torch.device("cpu")


def with_statistics(number: int, mean: Tensor, covariance: Tensor, *, seed: int) -> Tensor:
    """(number, D) float64 features whose sample mean and covariance are exactly these."""
    drawn = torch.randn(number, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    centred = drawn - drawn.mean(dim=0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / (number - 1))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def test_fid_of_two_gaussians_is_the_closed_form() -> None:
    first, second = torch.tensor([1.0, 2.0, -1.0]).double(), torch.tensor([0.0, 2.5, 1.0]).double()
    rotation = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]
    spreads = torch.tensor([[4.0, 1.0, 0.25], [1.0, 9.0, 0.04]]).double()
    real = with_statistics(500, first, rotation @ spreads[0].diag() @ rotation.T, seed=2)
    generated = with_statistics(300, second, rotation @ spreads[1].diag() @ rotation.T, seed=3)
    # Covariances that commute: the trace term is Σ (√λ − √μ)².
    expected = (first - second).square().sum() + (spreads[0].sqrt() - spreads[1].sqrt()).square().sum()
    assert frechet_distance(real, generated) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-6)  # eigenvalues' roots: √1e-13


def kid_by_hand(real: Tensor, generated: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    number = len(real)
    pairs = [(i, j) for i in range(number) for j in range(number)]
    within = sum(kernel(x[i], x[j]) for x in (real, generated) for i, j in pairs if i != j)
    across = sum(kernel(real[i], generated[j]) for i, j in pairs)
    return within / (number * (number - 1)) - 2 * across / number**2


def test_kid_is_the_unbiased_polynomial_mmd_by_hand() -> None:
    real = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generated = 0.5 + torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert kernel_distance(real, generated) == pytest.approx(kid_by_hand(real, generated), rel=1e-12)


def test_kid_draws_the_same_subsets_every_time_and_no_other_random_number() -> None:
    real = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    generated = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first = kernel_distance(real, generated)
    torch.manual_seed(5)
    assert kernel_distance(real, generated) == first
    torch.set_rng_state(state)
    kernel_distance(real, generated)
    assert torch.equal(torch.get_rng_state(), state)


def test_similarity_is_the_mean_over_pairs_of_one_prompt() -> None:
    real = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    generated = torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    found = mean_similarity(
        real, generated, real_prompts=torch.tensor([4, 4, 7]), generated_prompts=torch.tensor([4, 7])
    )
    assert found == pytest.approx((1 + 0 - 0.5**0.5) / 3)


def test_images_are_resized_with_antialiasing() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255  # every other column: without a filter, a quarter of the size would be all white
    small = as_input(stripes, InputSpec(1, 16, 16, (0.5,), (0.5,)))
    assert small.shape == (1, 1, 16, 16)
    assert small.abs().max() < 0.1  # grey; at the border the filter sees one column more


@pytest.fixture
def classifier(tmp_path: Path) -> FeatureBackendConfig:
    return untrained_classifier(tmp_path)


def test_a_classifier_gives_features_and_says_what_samples_show(classifier: FeatureBackendConfig) -> None:
    model = classifier.check("fid_backend")
    assert model.class_names == ("five", "six", "seven")
    assert model.logits is not None
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert model.features(images).shape == (6, 16)  # embed_dim
    predicted = model.logits(images).argmax(dim=1)
    asked = predicted.clone()
    asked[:2] = (asked[:2] + 1) % 3
    metrics = GenerationMetrics(classifier, None, None, device=CPU)
    prompts, names = torch.zeros(6, dtype=torch.int64), [model.class_names[n] for n in asked.tolist()]
    metrics.add_generated(0, images, prompts=prompts, texts=["x"] * 6, classes=names)
    metrics.add_real(0, images.flip(0), prompts=prompts)
    found = metrics.metrics(Ranks())
    assert found.keys() == {"fid", "kid", "sample_accuracy"}
    assert found["sample_accuracy"] == pytest.approx(100 * 4 / 6)
    assert found["fid"] == pytest.approx(0.0, abs=1e-4)  # the same images, in another order; float32 features
    assert found["kid"] != 0.0  # unbiased: of equal sets it is below zero


def test_the_order_of_batches_is_that_of_their_numbers(classifier: FeatureBackendConfig) -> None:
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = torch.zeros(4, dtype=torch.int64)

    def measured(order: tuple[int, int]) -> dict[str, float]:
        metrics = GenerationMetrics(classifier, None, None, device=CPU)
        for number in order:
            part = images[4 * number : 4 * number + 4]
            metrics.add_real(number, 255 - part, prompts=prompts)
            metrics.add_generated(number, part, prompts=prompts, texts=["x"] * 4, classes=["six"] * 4)
        return metrics.metrics(Ranks())

    assert measured((0, 1)) == measured((1, 0))


def test_a_real_data_set_of_the_classifier_is_read_as_it_was_trained(classifier: FeatureBackendConfig) -> None:
    """Bytes of real images, normalised anew, are the very inputs of the classifier's training."""
    spec = InputSpec(1, 8, 8, (0.3053,), (0.3760,))
    data = config_class("data", "digits").model_validate(TINY["data"]).build(seed=0)
    images = next(evaluation_batches(data.test, 5))["image"]
    as_bytes = ((images * 0.3760 + 0.3053) * 255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    # A byte is 1/255 of the range; half of it, in units of the spread.
    torch.testing.assert_close(as_input(as_bytes, spec), images, rtol=0, atol=0.5 / 255 / 0.3760 + 1e-6)


def test_clip_matches_images_and_texts(tmp_path: Path) -> None:
    arguments = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    model = config_class("model", "open_clip").model_validate(
        {"name": "open_clip", "architecture": "custom", "arguments": arguments}
    )
    module = model.build(num_classes=2, input_spec=model.preprocessing().image, seed=0).module
    save_file(module.state_dict(), tmp_path / "clip.safetensors")
    backend = FeatureBackendConfig(
        name="clip",
        architecture="custom",
        weights=str(tmp_path / "clip.safetensors"),
        options={"arguments": arguments},
    )
    loaded = backend.check("clip")
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metrics = GenerationMetrics(None, backend, None, device=CPU)
    prompts, texts = torch.tensor([0, 0, 1, 1]), ["a five", "a five", "a six", "a six"]
    metrics.add_real(0, images, prompts=prompts)
    metrics.add_generated(0, images, prompts=prompts, texts=texts, classes=None)
    found = metrics.metrics(Ranks())
    assert loaded.texts is not None
    unit = torch.nn.functional.normalize(loaded.features(images))
    matches = (unit * torch.nn.functional.normalize(loaded.texts(texts))).sum(dim=1)
    assert found["clip_t"] == pytest.approx(float(matches.mean()), abs=1e-6)
    within = torch.cat([(unit[part] @ unit[part].T).flatten() for part in (slice(0, 2), slice(2, 4))])
    assert found["clip_i"] == pytest.approx(float(within.mean()), abs=1e-6)


def test_dino_features_are_pooled_tokens(tmp_path: Path) -> None:
    architecture = "vit_tiny_patch16_224"
    model = config_class("model", "timm").model_validate({"name": "timm", "architecture": architecture})
    module = model.build(num_classes=2, input_spec=model.preprocessing().image, seed=0).module
    weights = {name: value for name, value in module.state_dict().items() if not name.startswith("head.")}
    save_file(weights, tmp_path / "dino.safetensors")
    backend = FeatureBackendConfig(
        name="dino", architecture=architecture, weights=str(tmp_path / "dino.safetensors")
    )
    assert backend.check("dino").features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 192)
    assert "vit_tiny_patch16_224" in backend.describe()
    assert "sha256" in backend.describe()


BACKENDS: dict[str, dict[str, Any]] = {
    "inception": {},
    "clip": {"architecture": "ViT-B-32"},
    "dino": {"architecture": "vit_base_patch14_dinov2"},
    "classifier": {"config": "no/such.yaml"},
}


@pytest.mark.parametrize("name", list(BACKENDS))
def test_absent_weights_are_refused_with_what_to_do(name: Any) -> None:
    backend = FeatureBackendConfig(name=name, weights="no/such.safetensors", **BACKENDS[name])
    with pytest.raises(ValueError, match=r"task\.fid_backend\.weights: there is no file no/such.*set task"):
        backend.check("fid_backend")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "clip", "weights": "x"}, "set architecture"),
        ({"name": "classifier", "weights": "x"}, "set config"),
        ({"name": "inception", "weights": "x", "architecture": "y"}, "remove architecture"),
        ({"name": "inception", "weights": "x", "options": {"tag": "y"}}, "options"),
    ],
)
def test_settings_of_another_backend_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FeatureBackendConfig(**settings)


def test_weights_of_another_model_are_refused(classifier: FeatureBackendConfig, tmp_path: Path) -> None:
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    wrong = classifier.model_copy(update={"weights": str(tmp_path / "other.safetensors")})
    with pytest.raises(ValueError, match=r"does not fit"):
        wrong.check("fid_backend")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(3)}, tmp_path / "inception.pth")
    inception = FeatureBackendConfig(name="inception", weights=str(tmp_path / "inception.pth"))
    with pytest.raises(ValueError, match=r"does not fit torch-fidelity"):
        inception.check("fid_backend")
