"""A model of images and texts as small as can be, and pairs for it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from snell_scale.interfaces import Batch, InputSpec, ModelBundle

LENGTH = 6


class TinyClip(nn.Module):
    """Linear towers, without interactions between the samples of a batch."""

    def __init__(self, *, seed: int = 0, scale: float = 10.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image = nn.Linear(3 * 4 * 4, 5)
            self.words = nn.Embedding(256, 8)
            self.text = nn.Linear(8, 5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor]:
        images = None if image is None else normalize(self.image(image.flatten(1)), dim=-1)
        texts = None if text is None else normalize(self.text(self.words(text).mean(dim=1)), dim=-1)
        return images, texts, self.logit_scale.exp()


def tokenize(texts: Sequence[str]) -> Tensor:
    """The first letters' codes."""
    return torch.tensor([[ord(letter) % 256 for letter in text.ljust(LENGTH)[-LENGTH:]] for text in texts])


def bundle_of(module: nn.Module) -> ModelBundle:
    spec = InputSpec(3, 4, 4, (0.5,) * 3, (0.5,) * 3)
    return ModelBundle(module, (), {}, {}, (), spec, output="image_text_features", tokenize=tokenize)


def pairs(number: int, *, classes: int = 3, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """Random images and texts; two captions follow each other under one image."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 4, 4, generator=generator, dtype=dtype)
    texts = torch.randint(0, 256, (number, LENGTH), generator=generator)
    return [
        {
            "image": images[index - index % 2],
            "text": texts[index],
            "label": torch.tensor(index % classes),
            "index": torch.tensor(index),
            "image_id": torch.tensor(index // 2),
            "caption": torch.tensor(index),
        }
        for index in range(number)
    ]


def stacked(samples: list[Batch]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
