"""How each diffusers architecture is called: one signature for all, `interfaces.Diffusion.denoise`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snell_scale.models.diffusers.shapes import Architecture

Denoise = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]

TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
"""Entries of a condition: (B, L, D) text; (B, L) int64, 1 where it counts; (B, P) the prompt in one vector."""

_NUM_SIZES = 6
_FLUX_PATCH = 2


def denoise_function(
    architecture: Architecture, config: Mapping[str, Any], *, vae_factor: int, guidance: float
) -> Denoise:
    """(model, noisy latents (B, C, h, w), timesteps (B,) of the scheduler, condition) → prediction (B, C, h, w).

    config: of the diffusers model. vae_factor: pixels per latent, for models that are told the image's size.
    guidance: for models that were distilled to read it (FLUX.1-dev); others ignore it.
    """
    if architecture == "sd3":
        return _denoise_sd3
    if architecture == "flux":
        return partial(_denoise_flux, guidance=guidance if config["guidance_embeds"] else None)
    if architecture == "pixart":
        told = config["use_additional_conditions"]
        told = config["sample_size"] == 128 if told is None else told
        return partial(_denoise_pixart, vae_factor=vae_factor if told else None)
    sdxl = config["addition_embed_type"] == "text_time"
    return partial(_denoise_unet, vae_factor=vae_factor if sdxl else None)


def latent_channels(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """Channels of the latents; FLUX's transformer takes them packed, 2x2 in one."""
    return config["in_channels"] // (_FLUX_PATCH**2 if architecture == "flux" else 1)


def patch_size(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """Latents along a side that the model reads as one; their number must be a multiple of it."""
    return {"unet": 1, "flux": _FLUX_PATCH}.get(architecture) or config["patch_size"]


def text_width(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """D of the text that the model reads."""
    if architecture == "pixart":
        return config["caption_channels"] or config["cross_attention_dim"]
    return config["cross_attention_dim" if architecture == "unet" else "joint_attention_dim"]


def pooled_width(architecture: Architecture, config: Mapping[str, Any]) -> int | None:
    """P of the pooled prompt; None for a model that reads none."""
    if architecture in ("sd3", "flux"):
        return config["pooled_projection_dim"]
    if architecture == "unet" and config["addition_embed_type"] == "text_time":
        return config["projection_class_embeddings_input_dim"] - _NUM_SIZES * config["addition_time_embed_dim"]
    return None


def _denoise_unet(
    model: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    condition: Mapping[str, Tensor],
    *,
    vae_factor: int | None,
) -> Tensor:
    added: dict[str, Tensor] | None = None
    if vae_factor is not None:
        height, width = (side * vae_factor for side in noisy.shape[-2:])
        # SDXL's size before cropping, crop's corner, size: the images are whole.
        sizes = _rows(noisy, height, width, 0, 0, height, width)
        added = {"text_embeds": condition[POOLED], "time_ids": sizes}
    return model(noisy, timesteps, condition[TEXT], added_cond_kwargs=added, return_dict=False)[0]


def _denoise_sd3(model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    return model(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=condition[TEXT],
        pooled_projections=condition[POOLED],
        return_dict=False,
    )[0]


def _denoise_flux(
    model: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    condition: Mapping[str, Tensor],
    *,
    guidance: float | None,
) -> Tensor:
    text = condition[TEXT]
    batch, channels, height, width = noisy.shape
    rows, columns, patch = height // _FLUX_PATCH, width // _FLUX_PATCH, _FLUX_PATCH
    packed = noisy.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    predicted = model(
        hidden_states=packed.reshape(batch, rows * columns, channels * patch**2),
        timestep=timesteps / 1000,  # the model multiplies by 1000 again
        guidance=None if guidance is None else noisy.new_full((batch,), guidance),
        pooled_projections=condition[POOLED],
        encoder_hidden_states=text,
        txt_ids=text.new_zeros(text.shape[1], 3),
        img_ids=_grid(rows, columns, noisy),
        return_dict=False,
    )[0]
    unpacked = predicted.reshape(batch, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(batch, channels, height, width)


def _grid(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows·columns, 3): 0, row, column of each patch; dtype and device of `like`."""
    row = torch.arange(rows, device=like.device, dtype=like.dtype)
    column = torch.arange(columns, device=like.device, dtype=like.dtype)
    places = torch.cartesian_prod(row, column).reshape(-1, 2)
    return torch.cat([places.new_zeros(len(places), 1), places], dim=1)


def _denoise_pixart(
    model: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    condition: Mapping[str, Tensor],
    *,
    vae_factor: int | None,
) -> Tensor:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if vae_factor is not None:
        height, width = (side * vae_factor for side in noisy.shape[-2:])
        added = {"resolution": _rows(noisy, height, width), "aspect_ratio": _rows(noisy, height / width)}
    predicted = model(
        noisy,
        encoder_hidden_states=condition[TEXT],
        encoder_attention_mask=condition[MASK],
        timestep=timesteps,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    # The second half, where there is one, is the variance, which is not trained.
    return predicted[:, : noisy.shape[1]]


def _rows(like: Tensor, *values: float) -> Tensor:
    """(B, number of values), every row these; filled on the device, for a copy from the host would wait."""
    return torch.cat([like.new_full((len(like), 1), value) for value in values], dim=1)
