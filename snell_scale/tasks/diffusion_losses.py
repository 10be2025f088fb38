"""What a denoising model learns from: noise mixed into latents, the target that goes with it, and its weight.

Two families, told apart by the scheduler's config (diffusers): discrete diffusion (Ho et al., arXiv 2006.11239;
v-prediction: Salimans & Ho, arXiv 2202.00512) and rectified flow (SD3, arXiv 2403.03206; FLUX).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

TimestepWeighting = Literal["uniform", "logit_normal"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoisyLatents:
    """noisy, target: (B, C, h, w) float32; timesteps: (B,), as the model takes them; weight: (B,) float32."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


class NoiseProcess(Protocol):
    """Mixes noise into latents."""

    def mix(self, latents: Tensor, noise: Tensor, fraction: Tensor) -> NoisyLatents:
        """latents, noise: (B, C, h, w) float32; fraction: (B,) in (0, 1), uniform: how far into the noise."""
        ...


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether the config is one of diffusers' flow-matching schedulers."""
    return "FlowMatch" in str(scheduler.get("_class_name", ""))


def noise_process(
    scheduler: Mapping[str, Any],
    *,
    latent_shape: tuple[int, int, int],
    min_snr_gamma: float | None = None,
    timestep_weighting: TimestepWeighting = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> NoiseProcess:
    """The process that a scheduler's config describes. ValueError where an option does not belong to it."""
    if is_flow(scheduler):
        if min_snr_gamma is not None:
            raise ValueError(
                f"task.min_snr_gamma={min_snr_gamma} weights discrete diffusion, but this model is one of flow "
                "matching; set it to null, and choose task.timestep_weighting instead"
            )
        if scheduler.get("invert_sigmas"):
            raise ValueError("the scheduler's config has invert_sigmas=true, which is not supported here")
        shift = flow_shift(scheduler, latent_shape)
        logit_normal = (logit_mean, logit_std) if timestep_weighting == "logit_normal" else None
        return FlowMatching(
            shift=shift, num_timesteps=int(scheduler["num_train_timesteps"]), logit_normal=logit_normal
        )
    if timestep_weighting != "uniform":
        raise ValueError(
            f"task.timestep_weighting={timestep_weighting} is for flow matching, but this model's scheduler is "
            f"{scheduler.get('_class_name', 'one of discrete diffusion')}; set it to uniform"
        )
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise ValueError(
            f"the scheduler's config has prediction_type={prediction!r}, expected one of "
            f"{', '.join(_PREDICTIONS)}"
        )
    return DiscreteDiffusion(alphas_cumprod(scheduler), prediction=prediction, min_snr_gamma=min_snr_gamma)


class DiscreteDiffusion:
    """noisy = √ᾱ·latents + √(1−ᾱ)·noise at one of T timesteps.

    alphas_cumprod: (T,) float64. prediction: the target is the noise; v = √ᾱ·noise − √(1−ᾱ)·latents; or the
    latents. min_snr_gamma: min-SNR-γ weighting (Hang et al., arXiv 2303.09556), with SNR = ᾱ/(1−ᾱ): the weight of
    the latents' error is min(SNR, γ), so that of the noise's is min(SNR, γ)/SNR and of v's min(SNR, γ)/(SNR+1).
    """

    def __init__(
        self, alphas_cumprod: Tensor, *, prediction: Prediction, min_snr_gamma: float | None = None
    ) -> None:
        self._alphas = alphas_cumprod
        self._prediction: Prediction = prediction
        self._gamma = min_snr_gamma
        self._tables: dict[torch.device, Tensor] = {}

    def mix(self, latents: Tensor, noise: Tensor, fraction: Tensor) -> NoisyLatents:
        steps = len(self._alphas)
        timesteps = (fraction * steps).long().clamp(0, steps - 1)
        signal, spread, weight = self._table(latents.device)[timesteps].unbind(1)
        signal, spread = signal.view(-1, 1, 1, 1), spread.view(-1, 1, 1, 1)
        targets = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: signal * noise - spread * latents,
            "sample": lambda: latents,
        }
        return NoisyLatents(signal * latents + spread * noise, timesteps, targets[self._prediction](), weight)

    def _table(self, device: torch.device) -> Tensor:
        """(T, 3) float32: √ᾱ, √(1−ᾱ) and the loss weight of each timestep; copied to a device once."""
        if device not in self._tables:
            columns = [self._alphas.sqrt(), (1 - self._alphas).sqrt(), self._weights()]
            self._tables[device] = torch.stack(columns, dim=1).float().to(device)
        return self._tables[device]

    def _weights(self) -> Tensor:
        if self._gamma is None:
            return torch.ones_like(self._alphas)
        snr = self._alphas / (1 - self._alphas)
        if self._prediction == "epsilon":
            return (self._gamma / snr).clamp(max=1.0)  # min(SNR, γ)/SNR, and 1 where the SNR is 0
        clipped = snr.clamp(max=self._gamma)
        return clipped / (snr + 1) if self._prediction == "v_prediction" else clipped


class FlowMatching:
    """noisy = (1−σ)·latents + σ·noise; the target is noise − latents; the model is told σ·num_timesteps.

    σ is the fraction itself, or logit-normal: sigmoid(mean + std·Φ⁻¹(fraction)); then moved towards the noise:
    σ ← shift·σ / (1 + (shift−1)·σ) (arXiv 2403.03206, equations 19 and 23).
    """

    def __init__(
        self, *, shift: float, num_timesteps: int, logit_normal: tuple[float, float] | None = None
    ) -> None:
        self._shift = shift
        self._num_timesteps = num_timesteps
        self._logit_normal = logit_normal

    def mix(self, latents: Tensor, noise: Tensor, fraction: Tensor) -> NoisyLatents:
        sigma = fraction.clamp(1e-6, 1 - 1e-6)  # Φ⁻¹ of 0 and 1 is infinite
        if self._logit_normal is not None:
            mean, std = self._logit_normal
            sigma = torch.sigmoid(mean + std * torch.special.ndtri(sigma))
        sigma = self._shift * sigma / (1 + (self._shift - 1) * sigma)
        wide = sigma.view(-1, 1, 1, 1)
        return NoisyLatents(
            noisy=(1 - wide) * latents + wide * noise,
            timesteps=sigma * self._num_timesteps,
            target=noise - latents,
            weight=torch.ones_like(sigma),
        )


def alphas_cumprod(scheduler: Mapping[str, Any]) -> Tensor:
    """(T,) float64: ᾱ of every timestep, by diffusers' own DDPMScheduler."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(**known_settings(DDPMScheduler, scheduler)).alphas_cumprod.double()


def flow_shift(scheduler: Mapping[str, Any], latent_shape: tuple[int, int, int]) -> float:
    """How far σ is moved towards the noise: the config's shift, or FLUX's, which grows with the image.

    With use_dynamic_shifting, μ runs linearly with the number of the transformer's 2x2 patches from base_shift to
    max_shift, as diffusers' FLUX pipeline has it; the shift is e^μ, or μ itself.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    mu = dynamic_mu(scheduler, latent_shape)
    return mu if scheduler.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def dynamic_mu(scheduler: Mapping[str, Any], latent_shape: tuple[int, int, int]) -> float:
    """μ of dynamic shifting for latents of this size."""
    _, height, width = latent_shape
    first, last = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return low + (high - low) * ((height // 2) * (width // 2) - first) / (last - first)


def known_settings(cls: type, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's config that another of diffusers' schedulers understands."""
    return {name: scheduler[name] for name in signature(cls).parameters if name in scheduler}
