"""Images from noise: diffusers' samplers around a denoising model, and samples laid out as one picture."""

from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from snell_scale.config import StrictModel
from snell_scale.data.latents import Prompts
from snell_scale.interfaces import Diffusion, Engine
from snell_scale.tasks.diffusion_losses import dynamic_mu, is_flow, known_settings

Condition = Mapping[str, Tensor]
_SMALLEST_PICTURE = 64


class SamplingConfig(StrictModel):
    """How images are generated, for pictures and for metrics; the same noise every time."""

    sampler: Literal["auto", "ddim", "dpm_solver", "flow_euler"] = Field(
        default="auto", description="auto: flow_euler for models of flow matching, else ddim."
    )
    steps: int = Field(default=25, gt=0, description="Forwards per image (twice as many with guidance).")
    guidance_scale: float = Field(default=1.0, ge=1, description="Classifier-free guidance; 1: none.")
    batch_size: int = Field(default=16, gt=0, description="Images generated together on one rank.")
    seed: int = Field(default=0, ge=0, description="Of the noise that samples start from.")

    def check(self, scheduler: Mapping[str, Any]) -> None:
        """ValueError where the sampler does not fit the model's scheduler."""
        fitting = ("auto", "flow_euler") if is_flow(scheduler) else ("auto", "ddim", "dpm_solver")
        if self.sampler not in fitting:
            raise ValueError(
                f"task.sampling.sampler={self.sampler} does not fit a model trained with "
                f"{scheduler.get('_class_name', 'this scheduler')}; choose one of {', '.join(fitting)}"
            )


@torch.no_grad()
def generate(
    model: nn.Module,
    diffusion: Diffusion,
    prompts: Prompts,
    ids: Tensor,
    noises: range,
    *,
    settings: SamplingConfig,
    engine: Engine,
) -> Tensor:
    """(N, 3, H, W) uint8 on the CPU: images of the prompts `ids` (N,), from the starting noises of these numbers.

    The encoders are left loaded: who has generated all that it wants releases them.
    """
    made = []
    diffusion.encoders.to(engine.device)
    for first in range(0, len(noises), settings.batch_size):
        engine.ranks.beat()
        chunk = noises[first : first + settings.batch_size]
        wanted = ids[first : first + settings.batch_size]
        noise = starting_noise(chunk, diffusion.latent_shape, seed=settings.seed)
        with engine.autocast():
            latents = sample(
                model,
                diffusion,
                noise=noise.to(engine.device),
                condition=engine.move(prompts.condition(wanted)),
                unconditional=engine.move(prompts.condition(torch.full_like(wanted, prompts.empty))),
                settings=settings,
            )
        with torch.autocast(engine.device.type, enabled=False):
            made.append(to_bytes(diffusion.encoders.decode(latents)))
    return torch.cat(made)


@torch.no_grad()
def sample(
    model: nn.Module,
    diffusion: Diffusion,
    *,
    noise: Tensor,
    condition: Condition,
    unconditional: Condition,
    settings: SamplingConfig,
) -> Tensor:
    """Latents (B, C, h, w) that the model makes of `noise` (standard normal, same shape and device).

    condition, unconditional: entries of (B, …), of the prompts and of the empty prompt. Deterministic: DDIM with
    η = 0 (arXiv 2010.02502), DPM-Solver++ of second order (arXiv 2211.01095), or Euler steps along the flow.
    """
    guided = settings.guidance_scale > 1
    if guided:
        condition = {name: torch.cat([unconditional[name], value]) for name, value in condition.items()}
    scheduler = _scheduler(diffusion, settings, device=noise.device)
    latents = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(inputs, timestep)
        predicted = diffusion.denoise(model, inputs, timestep.expand(len(inputs)), condition).float()
        if guided:
            without, given = predicted.chunk(2)
            predicted = without + settings.guidance_scale * (given - without)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


def starting_noise(indices: range, shape: tuple[int, int, int], *, seed: int) -> Tensor:
    """(len(indices), C, h, w) float32: each sample's noise depends on (seed, its index) alone."""
    drawn = [np.random.default_rng([seed, index]).standard_normal(shape, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(drawn))


def to_bytes(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] → (B, 3, H, W) uint8 on the CPU, as an image file would hold them."""
    grey_or_rgb = images if images.shape[1] == 3 else images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return ((grey_or_rgb.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def grid(images: Tensor, *, columns: int) -> Tensor:
    """(N, 3, H, W) uint8 → one picture (height, width, 3) uint8; small images are shown larger, by pixel."""
    from torchvision.utils import make_grid

    factor = -(-_SMALLEST_PICTURE // min(images.shape[-2:]))
    large = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return make_grid(large, nrow=columns, padding=4, pad_value=96).permute(1, 2, 0).contiguous()


def _scheduler(diffusion: Diffusion, settings: SamplingConfig, *, device: torch.device) -> Any:
    """diffusers' scheduler with its timesteps set; a fresh one for every batch, since they count their steps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    config = diffusion.scheduler
    if is_flow(config):
        flow = FlowMatchEulerDiscreteScheduler(**known_settings(FlowMatchEulerDiscreteScheduler, config))
        mu = dynamic_mu(config, diffusion.latent_shape) if config.get("use_dynamic_shifting") else None
        sigmas = np.linspace(1.0, 1.0 / settings.steps, settings.steps).tolist()
        flow.set_timesteps(device=device, sigmas=sigmas, mu=mu)
        return flow
    cls = DPMSolverMultistepScheduler if settings.sampler == "dpm_solver" else DDIMScheduler
    scheduler = cast(Any, cls)(**known_settings(cls, config))
    scheduler.set_timesteps(settings.steps, device=device)
    return scheduler
