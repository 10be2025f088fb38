"""The VAE and the text encoders of a diffusers pipeline folder, loaded when they are first needed."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_scale.models.diffusers.calls import MASK, POOLED, TEXT

Encode = Callable[[Any, list[str], torch.device, dict[str, int]], dict[str, Tensor]]


class PipelineEncoders:
    """Encodes as the pipeline named in the folder's model_index.json does: with its own `encode_prompt`.

    The VAE and the text encoders are loaded apart, each when first called. Images and latents are taken and given
    in float32. A VAE whose config says force_upcast overflows in half precision and stays in float32.
    SDXL: where the pipeline has force_zeros_for_empty_prompt, "" is zeros, as in its training and guidance.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, text_length: int | None) -> None:
        self._folder = folder
        self._dtype = dtype
        self._length = {} if text_length is None else {"max_sequence_length": text_length}
        self._device = torch.device("cpu")
        self._loaded_vae: Any = None
        self._loaded_text: Any = None
        self._index: Mapping[str, Any] = json.loads((folder / "model_index.json").read_text())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every file of the encoders (a second per gigabyte), the dtype and the text's length."""
        digest = hashlib.sha256(f"{self._dtype} {self._length} {self._index['_class_name']}".encode())
        folders = [part for part in sorted(self._folder.iterdir()) if _is_encoder(part.name)]
        for path in [file for part in folders for file in sorted(part.rglob("*")) if file.is_file()]:
            digest.update(str(path.relative_to(self._folder)).encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] → mean and std of the latents, shifted and scaled as the denoiser expects."""
        vae = self._vae()
        latents = vae.encode(images.to(self._device, vae.dtype)).latent_dist
        shift, scale = _shift_and_scale(vae)
        return {"mean": (latents.mean.float() - shift) * scale, "std": latents.std.float() * scale}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Entries "encoder_hidden_states" and, where the model reads them, "pooled_projections" and
        "encoder_attention_mask"."""
        pipeline = self._text()
        return _ENCODE[type(pipeline).__name__](pipeline, list(prompts), self._device, self._length)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as `encode_images` scales them → (B, 3, H, W) float32 in [-1, 1]."""
        vae = self._vae()
        shift, scale = _shift_and_scale(vae)
        unscaled = latents.to(self._device).float() / scale + shift
        return vae.decode(unscaled.to(vae.dtype)).sample.float().clamp(-1, 1)

    def to(self, device: Any) -> None:
        self._device = torch.device(device)
        for loaded in (self._loaded_vae, self._loaded_text):
            if loaded is not None:
                loaded.to(self._device)

    def release(self) -> None:
        self._loaded_vae = self._loaded_text = None

    def _vae(self) -> Any:
        if self._loaded_vae is None:
            from diffusers import AutoencoderKL

            loaded: Any = AutoencoderKL.from_pretrained(
                self._folder / "vae", torch_dtype=self._dtype, output_loading_info=True
            )
            module, problems = loaded
            refuse_problems(self._folder / "vae", problems)
            if module.config.force_upcast:
                module = module.float()
            self._loaded_vae = module.requires_grad_(False).eval().to(self._device)
        return self._loaded_vae

    def _text(self) -> Any:
        if self._loaded_text is None:
            import diffusers

            pipeline = getattr(diffusers, self._index["_class_name"])
            # Only tokenizers are left to the pipeline: it would make up the text encoders' missing weights.
            modules = [name for name, entry in self._index.items() if isinstance(entry, list)]
            parts = {
                name: self._text_encoder(name) if name.startswith("text_encoder") else None
                for name in modules
                if not name.startswith("tokenizer")
            }
            self._loaded_text = pipeline.from_pretrained(self._folder, **parts)
        return self._loaded_text

    def _text_encoder(self, name: str) -> nn.Module | None:
        library, class_name = self._index[name]
        if class_name is None:
            return None  # SD3 works without its T5
        import transformers

        module, problems = getattr(transformers, class_name).from_pretrained(
            self._folder / name, dtype=self._dtype, output_loading_info=True
        )
        # Not the unexpected ones: a text tower is often published with the other tower's weights beside it.
        refuse_problems(self._folder / name, {**problems, "unexpected_keys": ()})
        return module.requires_grad_(False).eval().to(self._device)


def refuse_problems(folder: Path, problems: Mapping[str, Any]) -> None:
    """ValueError listing the keys of `output_loading_info` that are missing, unexpected or of another shape."""
    found = [
        f"{len(keys)} {kind.replace('_keys', '')}: {_first(keys)}" for kind, keys in problems.items() if keys
    ]
    if found:
        raise ValueError(f"the weights in {folder} do not fit their config.json: {'; '.join(found)}")


def known_pipelines() -> tuple[str, ...]:
    """Class names, as model_index.json has them, of the pipelines whose prompts can be encoded."""
    return tuple(_ENCODE)


def _first(keys: Sequence[Any]) -> str:
    names = sorted(str(key) for key in keys)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _is_encoder(name: str) -> bool:
    return name == "vae" or name.startswith(("text_encoder", "tokenizer"))


def _shift_and_scale(vae: Any) -> tuple[Tensor | float, Tensor | float]:
    """latent for the denoiser = (latent - shift) · scale."""
    config = vae.config
    if config.latents_mean is None or config.latents_std is None:
        return config.shift_factor or 0.0, config.scaling_factor
    mean, std = (torch.tensor(values, device=vae.device).view(1, -1, 1, 1) for values in _statistics(config))
    return mean, config.scaling_factor / std


def _statistics(config: Any) -> tuple[list[float], list[float]]:
    return config.latents_mean, config.latents_std


def _encode_sd(
    pipeline: Any, prompts: list[str], device: torch.device, length: dict[str, int]
) -> dict[str, Tensor]:
    return {TEXT: pipeline.encode_prompt(prompts, device, 1, False)[0]}


def _encode_sdxl(
    pipeline: Any, prompts: list[str], device: torch.device, length: dict[str, int]
) -> dict[str, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    if pipeline.config.force_zeros_for_empty_prompt:
        for row, prompt in enumerate(prompts):
            if prompt == "":
                text[row], pooled[row] = 0, 0
    return {TEXT: text, POOLED: pooled}


def _encode_sd3(
    pipeline: Any, prompts: list[str], device: torch.device, length: dict[str, int]
) -> dict[str, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, device=device, do_classifier_free_guidance=False, **length
    )
    return {TEXT: text, POOLED: pooled}


def _encode_flux(
    pipeline: Any, prompts: list[str], device: torch.device, length: dict[str, int]
) -> dict[str, Tensor]:
    text, pooled, _ = pipeline.encode_prompt(prompts, device=device, **length)
    return {TEXT: text, POOLED: pooled}


def _encode_pixart(
    pipeline: Any, prompts: list[str], device: torch.device, length: dict[str, int]
) -> dict[str, Tensor]:
    text, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device, **length)
    return {TEXT: text, MASK: mask}


_ENCODE: Mapping[str, Encode] = {
    "StableDiffusionPipeline": _encode_sd,
    "StableDiffusionXLPipeline": _encode_sdxl,
    "StableDiffusion3Pipeline": _encode_sd3,
    "FluxPipeline": _encode_flux,
    "PixArtAlphaPipeline": _encode_pixart,
    "PixArtSigmaPipeline": _encode_pixart,
}
