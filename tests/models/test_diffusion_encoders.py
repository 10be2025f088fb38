"""Word vectors and pixels: the encoders of small models that have none."""

from typing import Any

import pytest
import torch
from tiny_pipelines import PIXART, SDXL_UNET

from snell_scale.interfaces import Encoders, InputSpec
from snell_scale.models.diffusers.config import DiffusersConfig

MODELS: dict[str, dict[str, Any]] = {
    "unet": SDXL_UNET | {"in_channels": 3, "out_channels": 3},
    "pixart": PIXART | {"in_channels": 3},
}


def encoders(architecture: str = "unet", **settings: Any) -> Encoders:
    scheduler = {"num_train_timesteps": 1000}
    config = DiffusersConfig.model_validate(
        {"architecture": architecture, "arguments": MODELS[architecture], "scheduler": scheduler, **settings}
    )
    half = (0.5, 0.5, 0.5)
    diffusion = config.build(num_classes=0, input_spec=InputSpec(3, 8, 8, half, half), seed=0).diffusion
    assert diffusion is not None
    return diffusion.encoders


def test_word_vectors_are_a_function_of_seed_and_word() -> None:
    own = encoders()
    encode = own.encode_prompts
    text = encode(["a red cat", "Cat, red!", ""])["encoder_hidden_states"]
    assert text.shape == (3, 8, 32)
    assert torch.equal(text[0, 2], text[1, 0])
    assert torch.equal(text[0, 1], text[1, 1])
    assert not torch.equal(text[0, 0], text[0, 1])
    assert torch.equal(text[2], text[0, 3:4].expand(8, -1))  # no words: places of no word, all of them
    assert torch.equal(encode(["a red cat"])["encoder_hidden_states"][0], text[0])
    other = encoders(words_seed=1)
    assert not torch.equal(other.encode_prompts(["a red cat"])["encoder_hidden_states"][0], text[0])
    assert other.fingerprint != own.fingerprint
    assert abs(text[0, 0].std().item() - 1) < 0.4  # 32 standard normal numbers: three sigma
    assert encode(["a red cat"])["pooled_projections"].shape == (1, 16)


def test_words_of_pixart_come_with_a_mask_that_is_never_empty() -> None:
    mask = encoders("pixart").encode_prompts(["a red cat", ""])["encoder_attention_mask"]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_a_prompt_longer_than_the_model_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="'one two three' has 3 words, and model.text_length is 2"):
        encoders(text_length=2).encode_prompts(["one two three"])


def test_pixels_are_their_own_latents() -> None:
    own = encoders()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = own.encode_images(images)
    assert torch.equal(latents["mean"], images)
    assert not latents["std"].any()
    assert torch.equal(own.decode(latents["mean"]), images)
    assert own.decode(torch.full((1, 3, 8, 8), 7.0)).max() == 1
