"""Published sizes of diffusion models: the arguments of diffusers' classes, and the noise schedules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Architecture = Literal["unet", "sd3", "flux", "pixart"]
Shape = Literal["sd15", "sdxl", "sd3", "flux", "pixart"]

CLASSES: Mapping[Architecture, str] = {
    "unet": "UNet2DConditionModel",
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
}


@dataclass(frozen=True)
class Denoiser:
    """A model without its weights: arguments of its class, noise schedule, pixels per latent along a side."""

    architecture: Architecture
    arguments: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    vae_factor: int = 8


_STABLE_DIFFUSION = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}

SHAPES: Mapping[Shape, Denoiser] = {
    # huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5 : unet/config.json
    "sd15": Denoiser(
        "unet",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        _STABLE_DIFFUSION,
    ),
    # huggingface.co/stabilityai/stable-diffusion-xl-base-1.0 : unet/config.json
    "sdxl": Denoiser(
        "unet",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "cross_attention_dim": 2048,
        },
        _STABLE_DIFFUSION,
    ),
    # huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers : transformer/config.json
    "sd3": Denoiser(
        "sd3",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    ),
    # huggingface.co/black-forest-labs/FLUX.1-dev : transformer/config.json
    "flux": Denoiser(
        "flux",
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    ),
    # huggingface.co/PixArt-alpha/PixArt-XL-2-1024-MS : transformer/config.json
    "pixart": Denoiser(
        "pixart",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "norm_type": "ada_norm_single",
        },
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
        },
    ),
}
