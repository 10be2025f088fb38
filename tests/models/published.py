"""Weights of tiny timm models, written by hand in the layouts that others publish them in.

Each function takes timm's state dict and gives what the file holds. Names after the code that wrote them:
google-research/vision_transformer and big_vision (npz), facebookresearch/{mae, moco-v3, dino, dinov2, dinov3,
ConvNeXt, ConvNeXt-V2}, microsoft/Swin-Transformer, mlfoundations/open_clip, baaivision/EVA.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """Every name after all of the (pattern, replacement) in order."""
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def headless(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def jax_vit(state: State, *, num_heads: int) -> dict[str, np.ndarray]:
    """The augreg and IN-21k releases: an array per block, heads as a dimension of their own."""
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        block = _jax_block(state, f"blocks.{i}.", num_heads=num_heads, names=("_1", "_3", "_2"))
        arrays |= {f"Transformer/encoderblock_{i}/{name}": tensor for name, tensor in block.items()}
    return {name: tensor.contiguous().numpy() for name, tensor in arrays.items()}


def jax_big_vision(state: State, *, num_heads: int) -> dict[str, np.ndarray]:
    """big_vision: below "params/", the blocks stacked along the first dimension of each array."""
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    blocks = [
        _jax_block(state, f"blocks.{i}.", num_heads=num_heads, names=("_0", "_0", "_1")) for i in range(depth)
    ]
    plain = {
        name: array
        for name, array in jax_vit(state, num_heads=num_heads).items()
        if "encoderblock" not in name and "posembed" not in name
    }
    plain["pos_embedding"] = state["pos_embed"].numpy()
    stacked = {
        f"Transformer/encoderblock/{name}": torch.stack([block[name] for block in blocks]).numpy()
        for name in blocks[0]
    }
    return {f"params/{name}": array for name, array in (plain | stacked).items()}


def _jax_block(state: State, prefix: str, *, num_heads: int, names: tuple[str, str, str]) -> State:
    attention, mlp, second = (
        f"{kind}{number}"
        for kind, number in zip(("MultiHeadDotProductAttention", "MlpBlock", "LayerNorm"), names, strict=True)
    )
    weight, bias = state[f"{prefix}attn.qkv.weight"], state[f"{prefix}attn.qkv.bias"]
    width = weight.shape[1]
    arrays: State = {}
    for part, w, b in zip(("query", "key", "value"), weight.chunk(3), bias.chunk(3), strict=True):
        arrays[f"{attention}/{part}/kernel"] = w.T.reshape(width, num_heads, -1)
        arrays[f"{attention}/{part}/bias"] = b.reshape(num_heads, -1)
    arrays[f"{attention}/out/kernel"] = state[f"{prefix}attn.proj.weight"].T.reshape(num_heads, -1, width)
    arrays[f"{attention}/out/bias"] = state[f"{prefix}attn.proj.bias"]
    for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", second)):
        arrays[f"{theirs}/scale"] = state[f"{prefix}{ours}.weight"]
        arrays[f"{theirs}/bias"] = state[f"{prefix}{ours}.bias"]
    for i in range(2):
        arrays[f"{mlp}/Dense_{i}/kernel"] = state[f"{prefix}mlp.fc{i + 1}.weight"].T
        arrays[f"{mlp}/Dense_{i}/bias"] = state[f"{prefix}mlp.fc{i + 1}.bias"]
    return arrays


def mae_encoder(state: State) -> dict[str, Any]:
    return {"model": headless(state)}


def mae_with_decoder(state: State) -> dict[str, Any]:
    decoder = {
        "mask_token": torch.randn(1, 1, 8),
        "decoder_pos_embed": torch.randn(1, state["pos_embed"].shape[1], 8),
        "decoder_embed.weight": torch.randn(8, 16),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(24, 8),
        "decoder_norm.weight": torch.randn(8),
        "decoder_pred.bias": torch.randn(768),
    }
    return {"model": headless(state) | decoder, "epoch": 800, "args": argparse.Namespace(mask_ratio=0.75)}


def moco_v3(state: State) -> dict[str, Any]:
    base = headless(state)
    noise = {name: torch.randn_like(tensor) for name, tensor in base.items()}
    projector = {"head.0.weight": torch.randn(32, 16), "head.1.num_batches_tracked": torch.tensor(7)}
    predictor = {"predictor.0.weight": torch.randn(32, 32)}
    inside = {f"base_encoder.{name}": tensor for name, tensor in (base | projector).items()}
    inside |= {f"momentum_encoder.{name}": tensor for name, tensor in (noise | projector).items()} | predictor
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": {f"module.{name}": tensor for name, tensor in inside.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": 65536.0},
    }


def dino_training(state: State) -> dict[str, Any]:
    inside = {f"backbone.{name}": tensor for name, tensor in headless(state).items()}
    inside["head.mlp.0.weight"] = torch.randn(8, 16)
    student = {f"module.{name}": torch.randn_like(tensor) for name, tensor in inside.items()}
    return {"student": student, "teacher": inside, "epoch": 100, "args": argparse.Namespace(arch="vit_base")}


def dinov2(state: State) -> State:
    rules = [(r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")] if "reg_token" in state else []
    plain = renamed(headless(state), *rules)
    if "reg_token" in plain:  # register variants keep a position for the class token, which timm has added to it
        plain["register_tokens"] = plain.pop("reg_token")
        position = torch.randn(1, 1, plain["pos_embed"].shape[-1])
        plain["cls_token"] = plain["cls_token"] - position
        plain["pos_embed"] = torch.cat([position, plain["pos_embed"]], dim=1)
    return plain | {"mask_token": torch.randn(1, plain["pos_embed"].shape[-1])}


def dinov3(state: State) -> State:
    plain = renamed(
        headless(state), ("reg_token", "storage_tokens"), (r"gamma_([12])", r"ls\1.gamma")
    )  # biases of the keys are masked out
    for name in [name for name in plain if name.endswith("attn.qkv.weight")]:
        prefix = name.removesuffix("qkv.weight")
        q = plain.pop(f"{prefix}q_bias", torch.zeros(len(plain[name]) // 3))
        v = plain.pop(f"{prefix}v_bias", torch.zeros_like(q))
        plain[f"{prefix}qkv.bias"] = torch.cat([q, torch.randn_like(q), v])
        plain[f"{prefix}qkv.bias_mask"] = torch.cat([torch.ones_like(q), torch.zeros_like(q), torch.ones_like(q)])
    return plain | {"mask_token": torch.randn(1, 16), "rope_embed.periods": torch.randn(2)}


def clip_tower(state: State) -> State:
    """The image tower in open_clip's whole model; its projection has the place of a head."""
    visual = renamed(
        headless(state),
        (r"patch_embed\.proj", "conv1"),
        (r"pos_embed", "positional_embedding"),
        (r"cls_token", "class_embedding"),
        (r"norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"blocks\.", "transformer.resblocks."),
        (r"\.norm([12])", r".ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    visual["positional_embedding"] = visual["positional_embedding"][0]
    visual["class_embedding"] = visual["class_embedding"][0, 0]
    visual["proj"] = torch.randn(16, 12)
    text = {
        "token_embedding.weight": torch.randn(20, 12),
        "transformer.resblocks.0.attn.in_proj_weight": torch.randn(36, 12),
        "logit_scale": torch.tensor(2.6),
        "text_projection": torch.randn(12, 12),
    }
    return text | {f"visual.{name}": tensor for name, tensor in visual.items()}


def swin(state: State) -> dict[str, Any]:
    """A stage's patch merger at its end, and the buffers that its code saves."""
    earlier = {}
    for name, tensor in state.items():
        stage = re.match(r"layers\.(\d+)\.downsample", name)
        number = int(stage[1]) - 1 if stage else 0
        earlier[re.sub(r"layers\.\d+\.downsample", f"layers.{number}.downsample", name)] = tensor
    buffers = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "layers.1.blocks.1.attn_mask": torch.zeros(4, 16, 16),
    }
    return {"model": renamed(earlier, (r"^head\.fc\.", "head.")) | buffers}


def convnext(state: State) -> dict[str, Any]:
    original = renamed(
        state,
        (r"^stem\.", "downsample_layers.0."),
        (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"stages\.(\d)\.blocks\.", r"stages.\1."),
        ("conv_dw", "dwconv"),
        (r"mlp\.grn\.bias", "grn.beta"),
        (r"mlp\.grn\.weight", "grn.gamma"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
    return {"model": {n: t.view(1, 1, 1, -1) if ".grn." in n else t for n, t in original.items()}}


def eva02(state: State) -> dict[str, Any]:
    plain = renamed(
        state,
        (r"mlp\.fc1_g", "mlp.w1"),
        (r"mlp\.fc1_x", "mlp.w2"),
        (r"mlp\.fc2", "mlp.w3"),
        (r"mlp\.norm", "mlp.ffn_ln"),
        (r"attn\.q_proj\.bias", "attn.q_bias"),
        (r"attn\.v_proj\.bias", "attn.v_bias"),
    )
    return {"module": plain | {"blocks.0.attn.rope.freqs_cos": torch.zeros(4, 8)}}


def eva_pretrained(state: State) -> dict[str, Any]:
    """Masked image modelling: a final norm in place of fc_norm, a mask token, a head over its targets."""
    plain = renamed(headless(state), (r"^fc_norm\.", "norm."))
    return {"model": plain | {"mask_token": torch.randn(1, 1, 16), "lm_head.weight": torch.randn(12, 16)}}


def ddp(state: State) -> dict[str, Any]:
    return {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}


TORCH_LAYOUTS: Mapping[str, Callable[[State], Any]] = {
    "mae encoder": mae_encoder,
    "mae with decoder": mae_with_decoder,
    "moco v3": moco_v3,
    "dino training": dino_training,
    "dinov2": dinov2,
    "dinov2 giant with registers": dinov2,
    "dinov3": dinov3,
    "dinov3 with biases": dinov3,
    "clip": clip_tower,
    "swin": swin,
    "convnext": convnext,
    "convnext v2": convnext,
    "eva-02": eva02,
    "eva": ddp,
    "eva pre-trained": eva_pretrained,
    "ddp": ddp,
}
