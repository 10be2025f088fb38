"""Tiny pipelines of every supported kind, random weights and hand-made tokenizers, written as diffusers does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "photo", "of", "red", "cat", "dog", "sks")
TEXT_WIDTH, T5_WIDTH, POOLED_WIDTH = 16, 32, 16

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
}
SDXL_UNET: dict[str, Any] = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 4,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "use_linear_projection": True,
}
SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 2 * POOLED_WIDTH,
    "pos_embed_max_size": 8,
}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
PIXART: dict[str, Any] = {
    "sample_size": 128,  # then, and only then, the pipeline tells the model the image's size
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": T5_WIDTH,
    "norm_num_groups": 4,
}
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def make_pipeline(kind: str, folder: Path) -> DiffusionPipeline:
    """The pipeline of that kind, also saved in `folder`."""
    torch.manual_seed(0)
    pipeline = _MAKERS[kind](folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Whole words, no merges: letters that are no word become <|endoftext|>, as in CLIP."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for word in WORDS for letter in word})
    ends = [f"{letter}</w>" for letter in letters]
    vocabulary = [*letters, *ends]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(" ".join(pieces[:2]))
            pieces = ["".join(pieces[:2]), *pieces[2:]]
            vocabulary.append(pieces[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    return T5Tokenizer(tokenizer_object=tokenizer, extra_ids=0, model_max_length=16)


def _clip_config(tokenizer: CLIPTokenizer, projection: int = POOLED_WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _vae(**changes: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**settings, **changes).eval()


def _sd(folder: Path) -> DiffusionPipeline:
    tokenizer = clip_tokenizer(folder / "clip")
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET).eval(),
        scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def _sdxl(folder: Path) -> DiffusionPipeline:
    tokenizer = clip_tokenizer(folder / "clip")
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**SDXL_UNET).eval(),
        scheduler=DDPMScheduler(prediction_type="v_prediction"),  # pyright: ignore[reportArgumentType]
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd3(folder: Path) -> DiffusionPipeline:
    tokenizer, t5 = clip_tokenizer(folder / "clip"), _t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD3).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(t5),
        tokenizer_3=t5,
    )


def _flux(folder: Path) -> DiffusionPipeline:
    tokenizer, t5 = clip_tokenizer(folder / "clip"), _t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(**FLUX).eval(),
    )


def _pixart(folder: Path) -> DiffusionPipeline:
    t5 = _t5_tokenizer()
    return PixArtAlphaPipeline(
        tokenizer=t5,  # pyright: ignore[reportArgumentType]
        text_encoder=_t5(t5),
        vae=_vae(),
        transformer=PixArtTransformer2DModel(**PIXART).eval(),
        scheduler=DDPMScheduler(),  # pyright: ignore[reportArgumentType]
    )


_MAKERS: dict[str, Callable[[Path], DiffusionPipeline]] = {
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
}
KINDS = tuple(_MAKERS)


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
