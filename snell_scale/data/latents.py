"""Latents and prompts as a data set: what the frozen encoders gave, with noise drawn for each sample."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from snell_scale.data.batches import num_samples
from snell_scale.data.images import rng_of
from snell_scale.data.stored_tensors import StoredTensors
from snell_scale.interfaces import Batch, SampleKey

CONDITION = "condition."
_GOLDEN = (5**0.5 - 1) / 2
_LARGEST_FRACTION = float(np.nextafter(np.float32(1), np.float32(0)))


@dataclass(frozen=True)
class NoiseDraws:
    """What is random about a sample; all of it follows from (seed, index, epoch).

    offset: strength of the noise that a channel has in common (0: none). prompt_dropout: share of samples whose
    prompt becomes the empty one. evaluates: no dropout, no flip, no offset, and how far into the noise a sample
    is follows from its index alone, by a golden-ratio sequence: even over any stretch of samples, and the same
    for every method.
    """

    seed: int
    prompt_dropout: float = 0.0
    offset: float = 0.0
    evaluates: bool = False


class Prompts:
    """What the encoders made of every prompt of the run; the empty prompt is one of them.

    texts: in the order of the stored rows.
    """

    def __init__(self, stored: StoredTensors, texts: Sequence[str]) -> None:
        self._stored = stored
        self.texts = tuple(texts)
        self.empty = self.texts.index("")

    def condition(self, ids: Tensor) -> dict[str, Tensor]:
        """ids: (B,) int64 → what the model is conditioned on, entries of (B, …)."""
        return {name: table[ids] for name, table in self._stored.all().items()}

    def ids(self, texts: Sequence[str]) -> Tensor:
        numbers = {text: number for number, text in enumerate(self.texts)}
        return torch.tensor([numbers[text] for text in texts])


class LatentSplit(Dataset[Batch]):
    """One split's latents with their prompts and noise, looked up by (index, epoch).

    images: "mean", "std" (N, C, h, w), perhaps "label" (N,) int64, and perhaps "mean_flipped", "std_flipped",
    which a training sample takes with probability 1/2. prompt_ids: (N,) int64, rows of `prompts`.
    Samples: latents, noise (C, h, w) float32; fraction () float32, how far into the noise; prompt, index ()
    int64; weight () float32; label () int64 where known; condition.* as the encoders gave them.
    """

    def __init__(self, images: StoredTensors, prompts: Prompts, *, prompt_ids: Tensor, draws: NoiseDraws) -> None:
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self._images = images
        self._draws = draws
        self._flips = "mean_flipped" in images and not draws.evaluates

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def labels(self) -> Tensor | None:
        """(N,) int64, where the samples have labels."""
        return self._images.all().get("label")

    def __getitem__(self, key: SampleKey) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        """The samples stacked."""
        drawn = [self._draw(key) for key in keys]
        indices = torch.tensor([index for index, _ in keys])
        flipped = torch.tensor([sample.flipped for sample in drawn])
        prompt = self.prompt_ids[indices].clone()
        prompt[torch.tensor([sample.drops_prompt for sample in drawn])] = self.prompts.empty
        posterior = torch.from_numpy(np.stack([sample.posterior for sample in drawn]))
        batch = {
            "latents": self._pick("mean", indices, flipped) + self._pick("std", indices, flipped) * posterior,
            "noise": torch.from_numpy(np.stack([sample.noise for sample in drawn])),
            "fraction": torch.tensor([sample.fraction for sample in drawn], dtype=torch.float32),
            "weight": torch.ones(len(keys)),
            "prompt": prompt,
            "index": indices,
        }
        labels = self.labels()
        batch |= {} if labels is None else {"label": labels[indices]}
        return batch | {CONDITION + name: value for name, value in self.prompts.condition(prompt).items()}

    def _pick(self, name: str, indices: Tensor, flipped: Tensor) -> Tensor:
        picked = self._images[name][indices].float()
        if flipped.any():
            picked[flipped] = self._images[f"{name}_flipped"][indices[flipped]].float()
        return picked

    def _draw(self, key: SampleKey) -> "_Drawn":
        """In a fixed order, so that options which are off do not change the rest."""
        draws, shape = self._draws, tuple(self._images["mean"].shape[1:])
        rng = rng_of(draws.seed, key)
        posterior, noise = rng.standard_normal((2, *shape), dtype=np.float32)
        fraction, drop, flip = rng.random(3)
        if draws.evaluates:
            return _Drawn(posterior, noise, ((key[0] + 0.5) * _GOLDEN) % 1.0, False, False)
        if draws.offset:
            noise = noise + draws.offset * rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
        fraction = min(float(fraction), _LARGEST_FRACTION)  # float32 would round up to 1
        return _Drawn(posterior, noise, fraction, drop < draws.prompt_dropout, self._flips and flip < 0.5)


@dataclass(frozen=True)
class _Drawn:
    posterior: np.ndarray
    noise: np.ndarray
    fraction: float
    drops_prompt: bool
    flipped: bool


class WithPrior(Dataset[Batch]):
    """Prior preservation (DreamBooth, arXiv 2208.12242): every sample is an instance and a prior image, stacked.

    Entries are (2, …): the instance, and the prior image whose turn it is; "weight" holds (1, prior_weight). So
    the loss of any batch is the mean instance loss plus prior_weight times the mean prior loss.
    """

    def __init__(self, instances: LatentSplit, prior: LatentSplit, *, prior_weight: float) -> None:
        self.prompts = instances.prompts
        self.prompt_ids = instances.prompt_ids
        self._instances = instances
        self._prior = prior
        self._prior_weight = prior_weight

    def __len__(self) -> int:
        return len(self._instances)

    def labels(self) -> Tensor | None:
        return self._instances.labels()

    def __getitem__(self, key: SampleKey) -> Batch:
        return {name: tensor[0] for name, tensor in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        total = len(self._prior)
        turns = [((index + epoch * len(self)) % total, epoch) for index, epoch in keys]
        instance, prior = self._instances.__getitems__(keys), self._prior.__getitems__(turns)
        prior["weight"] = prior["weight"] * self._prior_weight
        return {name: torch.stack([instance[name], prior[name]], dim=1) for name in instance}


class PriorPreserving(Dataset[Batch]):
    """Instance images that come with images of their class: what `WithPrior` is made from.

    instances, prior: image data sets with equal fields. Looked up, it is `instances`.
    """

    def __init__(self, instances: Dataset[Batch], prior: Dataset[Batch], *, prior_weight: float) -> None:
        self.instances = instances
        self.prior = prior
        self.prior_weight = prior_weight

    def __len__(self) -> int:
        return num_samples(self.instances)

    def __getitem__(self, key: SampleKey) -> Batch:
        return self.instances[key]


def with_seed(draws: NoiseDraws, *, split: int) -> NoiseDraws:
    """Draws of one of four splits (the prior is one): the noise of its n-th image is another."""
    return replace(draws, seed=4 * draws.seed + split)
