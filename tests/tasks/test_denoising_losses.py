"""The losses of diffusion models: each against its formula in float64, written out, and against diffusers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from snell_scale.tasks.diffusion_losses import flow_shift, noise_process

# float32 results of a few products: relative rounding of some 1e-7.
TOLERANCE = 2e-6
SHAPE = (4, 8, 8)
SCALED_LINEAR: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def alphas_by_hand() -> np.ndarray:
    """ᾱ of Stable Diffusion's schedule: betas are squares of evenly spaced numbers."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def inputs(number: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, number, *SHAPE, generator=generator)
    return latents, noise, torch.rand(number, generator=generator)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_discrete_diffusion_follows_its_formulas(prediction: str, gamma: float | None) -> None:
    config = SCALED_LINEAR | {"prediction_type": prediction}
    latents, noise, fraction = inputs()
    mixed = noise_process(config, latent_shape=SHAPE, min_snr_gamma=gamma).mix(latents, noise, fraction)
    x, e = latents.double().numpy(), noise.double().numpy()
    for row, part in enumerate(fraction.tolist()):
        timestep = math.floor(part * 1000)
        alpha = alphas_by_hand()[timestep]
        snr = alpha / (1 - alpha)
        target = {
            "epsilon": e[row],
            "v_prediction": math.sqrt(alpha) * e[row] - math.sqrt(1 - alpha) * x[row],
            "sample": x[row],
        }[prediction]
        clipped = min(snr, gamma) if gamma is not None else snr
        divided = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction]
        weight = 1.0 if gamma is None else divided
        assert mixed.timesteps[row] == timestep
        noisy = math.sqrt(alpha) * x[row] + math.sqrt(1 - alpha) * e[row]
        # diffusers keeps betas in float32: ᾱ differs from float64 by up to 1e-5 of itself after 1000 products.
        np.testing.assert_allclose(mixed.noisy[row].numpy(), noisy, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(mixed.target[row].numpy(), target, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(float(mixed.weight[row]), weight, rtol=5e-5)


def test_min_snr_weights_of_the_three_predictions_are_one_loss() -> None:
    """An error of the latents d is -d·√SNR in the noise and -d/√(1−ᾱ) in v: weighted, all are min(SNR, γ)·d²."""
    latents, noise, fraction = inputs()
    weights = {
        name: noise_process(SCALED_LINEAR | {"prediction_type": name}, latent_shape=SHAPE, min_snr_gamma=5.0)
        .mix(latents, noise, fraction)
        .weight.double()
        for name in ("epsilon", "v_prediction", "sample")
    }
    alpha = torch.from_numpy(alphas_by_hand())[(fraction * 1000).long()]
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weights["epsilon"] * snr, weights["sample"], rtol=5e-5, atol=0)
    torch.testing.assert_close(weights["v_prediction"] / (1 - alpha), weights["sample"], rtol=5e-5, atol=0)
    assert len({round(value, 4) for value in weights["sample"].tolist()}) > 3  # they do vary


def test_noise_and_velocity_are_those_of_diffusers() -> None:
    config = SCALED_LINEAR | {"prediction_type": "v_prediction"}
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    latents, noise, fraction = inputs()
    mixed = noise_process(config, latent_shape=SHAPE).mix(latents, noise, fraction)
    timesteps: Any = mixed.timesteps  # diffusers declares its own IntTensor
    for ours, theirs in (
        (mixed.noisy, scheduler.add_noise(latents, noise, timesteps)),
        (mixed.target, scheduler.get_velocity(latents, noise, timesteps)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_schedule_that_ends_in_pure_noise_has_finite_weights() -> None:
    config = SCALED_LINEAR | {"rescale_betas_zero_snr": True}
    latents, noise, _ = inputs(2)
    last = torch.tensor([0.9999, 1.0])
    for prediction, expected in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        process = noise_process(config | {"prediction_type": prediction}, latent_shape=SHAPE, min_snr_gamma=5.0)
        mixed = process.mix(latents, noise, last)
        assert mixed.timesteps.tolist() == [999, 999]
        # diffusers leaves an ᾱ of 2e-8 there in place of 0, so that an SNR of 2e-8 is left, too.
        torch.testing.assert_close(mixed.weight, torch.full((2,), expected), rtol=1e-6, atol=1e-6)
        assert all(value.isfinite().all() for value in (mixed.noisy, mixed.target))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["uniform", "logit_normal"])
def test_flow_matching_follows_its_formulas(shift: float, weighting: Any) -> None:
    latents, noise, fraction = inputs()
    process = noise_process(
        FLOW | {"shift": shift},
        latent_shape=SHAPE,
        timestep_weighting=weighting,
        logit_mean=0.3,
        logit_std=0.8,
    )
    mixed = process.mix(latents, noise, fraction)
    u = fraction.double()
    if weighting == "logit_normal":
        normal = torch.distributions.Normal(0.0, 1.0).icdf(u)
        u = 1 / (1 + torch.exp(-(0.3 + 0.8 * normal)))
    sigma = shift * u / (1 + (shift - 1) * u)
    wide = sigma.view(-1, 1, 1, 1)
    x, e = latents.double(), noise.double()
    tolerance: Any = {"rtol": 1e-5, "atol": 1e-5}  # Φ⁻¹ in float32, near its ends
    torch.testing.assert_close(mixed.noisy.double(), (1 - wide) * x + wide * e, **tolerance)
    torch.testing.assert_close(mixed.target.double(), e - x, **tolerance)
    torch.testing.assert_close(mixed.timesteps.double(), 1000 * sigma, rtol=1e-5, atol=1e-5)
    assert mixed.weight.eq(1).all()


def test_logit_normal_timesteps_stay_inside_at_the_ends() -> None:
    process = noise_process(FLOW, latent_shape=SHAPE, timestep_weighting="logit_normal")
    latents, noise, _ = inputs(2)
    mixed = process.mix(latents, noise, torch.tensor([0.0, 1.0]))
    assert mixed.noisy.isfinite().all()
    assert 0 < mixed.timesteps[0] < mixed.timesteps[1] < 1000


def test_a_flow_is_mixed_as_by_diffusers() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    latents, noise, fraction = inputs()
    mixed = noise_process(FLOW | {"shift": 3.0}, latent_shape=SHAPE).mix(latents, noise, fraction)
    sigmas = mixed.timesteps / 1000
    # The scheduler has 1000 of all sigmas; shifted by 3, neighbours lie up to 0.003 apart.
    nearest = (scheduler.timesteps.unsqueeze(0) - mixed.timesteps.unsqueeze(1)).abs().argmin(dim=1)
    torch.testing.assert_close(scheduler.sigmas[nearest], sigmas, rtol=0, atol=1.5e-3)
    # Sampling starts where training mixes: scale_noise puts in the sigma of a timestep of the scheduler.
    there = scheduler.timesteps[nearest]
    theirs = scheduler.scale_noise(latents, there, noise)
    ours = mixed.noisy + (scheduler.sigmas[nearest] - sigmas).view(-1, 1, 1, 1) * (noise - latents)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # a few float32 products


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_shift_of_flux_is_that_of_diffusers(kind: Any) -> None:
    config = FLOW | {"use_dynamic_shifting": True, "time_shift_type": kind}
    shape = (16, 64, 64)  # 1024 patches
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    shift = flow_shift(config, shape)
    for sigma in (0.1, 0.5, 0.9):
        theirs = float(scheduler.time_shift(mu, 1.0, torch.tensor(sigma, dtype=torch.float64)))
        assert math.isclose(shift * sigma / (1 + (shift - 1) * sigma), theirs, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (FLOW, {"min_snr_gamma": 5.0}, "min_snr_gamma"),
        (FLOW | {"invert_sigmas": True}, {}, "invert_sigmas"),
        (SCALED_LINEAR, {"timestep_weighting": "logit_normal"}, "timestep_weighting"),
        (SCALED_LINEAR | {"prediction_type": "noise"}, {}, "prediction_type"),
    ],
)
def test_options_of_the_other_family_are_refused(
    config: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        noise_process(config, latent_shape=SHAPE, **options)
