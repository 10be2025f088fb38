"""What a denoiser is trained behind without a pipeline: pixels as they are, and fixed random word vectors."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from snell_scale.models.diffusers.calls import MASK, POOLED, TEXT


@dataclass(frozen=True)
class ConditionShape:
    """What a model reads of a prompt. length: words; width: D; pooled: P, or None; masked: it wants a mask."""

    length: int
    width: int
    pooled: int | None
    masked: bool

    def entries(self) -> dict[str, tuple[int, ...]]:
        """The shape of each entry of a condition, without the batch."""
        found: dict[str, tuple[int, ...]] = {TEXT: (self.length, self.width)}
        if self.pooled is not None:
            found[POOLED] = (self.pooled,)
        if self.masked:
            found[MASK] = (self.length,)
        return found


class WordEncoders:
    """Encoders of small models in pixel space, with no weights at all.

    An image is its own latent: mean = image, std = 0. A prompt is split into words (case and punctuation do not
    count), and each word is a fixed random vector: standard normal numbers that are a function of (seed, word)
    alone. So equal words have equal vectors in every run, and that is all that the vectors say: words of like
    meaning are as far apart as any two, and their order is lost on a model without positions. Places after the
    last word hold the vector of "", which is thus the whole of an empty prompt.
    """

    def __init__(self, shape: ConditionShape, *, seed: int) -> None:
        self._shape = shape
        self._seed = seed
        self._device = torch.device("cpu")
        self.fingerprint = f"words-{seed}-{shape.length}x{shape.width}-{shape.pooled}-{shape.masked}"

    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) in [-1, 1] → itself as the mean, and a std of 0."""
        return {"mean": images, "std": torch.zeros_like(images)}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """(B, length, width) float32 word vectors; their mean as the pooled one; ValueError for a long prompt."""
        words = [self._words(prompt) for prompt in prompts]
        condition = {
            TEXT: self._stack([[self._vector(word, self._shape.width) for word in row] for row in words])
        }
        if self._shape.pooled is not None:
            pooled = [[self._vector(word, self._shape.pooled) for word in row] for row in words]
            condition[POOLED] = self._stack(pooled).mean(dim=1)
        if self._shape.masked:
            # One place counts even where there is no word: attention to nothing is not defined.
            counts = torch.tensor([max(1, sum(word != "" for word in row)) for row in words])
            mask = torch.arange(self._shape.length) < counts.unsqueeze(1)
            condition[MASK] = mask.long().to(self._device)
        return condition

    def decode(self, latents: Tensor) -> Tensor:
        """The latents, which are the pixels, cut to [-1, 1]."""
        return latents.clamp(-1, 1)

    def to(self, device: Any) -> None:
        self._device = torch.device(device)

    def release(self) -> None:
        return None

    def _words(self, prompt: str) -> list[str]:
        words = re.findall(r"\w+", prompt.lower())
        length = self._shape.length
        if len(words) > length:
            raise ValueError(
                f"the prompt {prompt!r} has {len(words)} words, and model.text_length is {length}: raise it, or "
                "shorten the prompt"
            )
        return words + [""] * (length - len(words))

    def _vector(self, word: str, width: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self._seed} {word}".encode()).digest()
        return np.random.default_rng(list(digest)).standard_normal(width, dtype=np.float32)

    def _stack(self, vectors: list[list[np.ndarray]]) -> Tensor:
        return torch.from_numpy(np.asarray(vectors)).to(self._device)


class AbsentEncoders:
    """Stands where a model has no encoders (a published shape with random weights); refuses to encode."""

    fingerprint = "none"

    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        self._refuse()

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self._refuse()

    def decode(self, latents: Tensor) -> Tensor:
        self._refuse()

    def to(self, device: Any) -> None:
        return None

    def release(self) -> None:
        return None

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "model.encoders is 'none', so that neither images nor prompts can be encoded; give model.folder a "
            "pipeline with its encoders, or a small model in pixel space model.encoders=words"
        )
