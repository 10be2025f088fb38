"""Zero-shot classification: images are compared with sentences about the classes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

_PROMPTS_PER_FORWARD = 256


class ClassPrompts:
    """Sentences about the classes, as tokens: (classes x templates, length) int64, class after class."""

    def __init__(
        self, class_names: Sequence[str], templates: Sequence[str], tokenize: Callable[[Sequence[str]], Tensor]
    ) -> None:
        self._num_classes = len(class_names)
        self._tokens = tokenize([text.format(name) for name in class_names for text in templates])

    @torch.no_grad()
    def embed(self, model: nn.Module, device: torch.device) -> Tensor:
        """(classes, D) float32 of length 1: the mean over a class's sentences, as open_clip's
        build_zero_shot_classifier has it (which wants the model's methods; behind PEFT and sharding engines only
        its forward is to be called). Equally many forwards on every rank.
        """
        parts = [model(None, tokens.to(device))[1].float() for tokens in self._tokens.split(_PROMPTS_PER_FORWARD)]
        return normalize(torch.cat(parts).unflatten(0, (self._num_classes, -1)).mean(dim=1), dim=-1)


def ranked_classes(image_features: Tensor, class_features: Tensor, *, num: int) -> Tensor:
    """(B, D), (classes, D) → (B, num) int64: the nearest classes, the nearest first."""
    return (image_features.float() @ class_features.T).topk(num, dim=1).indices
