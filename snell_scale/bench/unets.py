"""Denoising steps of Stable Diffusion's UNets for `bench gpu`: their published sizes, with random weights."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_scale.bench.workloads import TARGETS, Workload
from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.diffusers.arguments import import_diffusers
from snell_scale.models.diffusers.shapes import SHAPES

_ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)"
_FEED_FORWARD = r"ff\.net\.(0\.proj|2)"
_BLOCKS = rf".*attentions\.\d+\.transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})"
_NUM_TIMESTEPS = 1000
# What SDXL is told beside the text: a pooled embedding, and six numbers about the image's size and crop.
_POOLED, _NUM_SIZES = "text_embeds", 6

UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd15": SHAPES["sd15"].arguments,
    "sdxl": SHAPES["sdxl"].arguments,
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
        "cross_attention_dim": 16,
    },
}


def make_unet(name: str) -> nn.Module:
    """UNet2DConditionModel of these sizes on the current default device. ValueError without diffusers."""
    return import_diffusers().UNet2DConditionModel(**UNETS[name])


def unet_workload(
    name: str, device: torch.device, *, batch_size: int, num_text_tokens: int, dtype: torch.dtype, seed: int
) -> Workload:
    """Predicting noise from noise; attention and feed-forward layers of every transformer block are adapted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with device:
            module = make_unet(name).to(dtype)
    config = UNETS[name]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn((batch_size, *size), generator=generator, device=device).to(dtype)

    side = config["sample_size"]
    batch = {
        "sample": normal(4, side, side),
        "noise": normal(4, side, side),
        "context": normal(num_text_tokens, config["cross_attention_dim"]),
        "timestep": torch.randint(_NUM_TIMESTEPS, (batch_size,), generator=generator, device=device),
    }
    if "addition_time_embed_dim" in config:
        sizes = _NUM_SIZES * config["addition_time_embed_dim"]
        batch[_POOLED] = normal(config["projection_class_embeddings_input_dim"] - sizes)
        batch["time_ids"] = normal(_NUM_SIZES)
    bundle = ModelBundle(
        module=module,
        wrap_points=(),
        target_groups={TARGETS: _BLOCKS},
        fused_groups={},
        head_modules=(),
        input_spec=InputSpec(channels=4, height=side, width=side, mean=(0.0,) * 4, std=(1.0,) * 4),
    )
    return Workload(f"{name} batch {batch_size}", bundle, batch, _denoise)


def _denoise(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    added = {name: batch[name] for name in (_POOLED, "time_ids") if name in batch}
    output = module(batch["sample"], batch["timestep"], batch["context"], added_cond_kwargs=added or None)
    return F.mse_loss(output.sample.float(), batch["noise"].float())
