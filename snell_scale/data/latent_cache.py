"""Runs the frozen encoders once over images and prompts, and keeps what they gave on disk.

A cache file appears whole or not at all, holds the SHA-256 of its content, and is named by a digest of all that
it depends on: the encoders, every image, the captions. One that is damaged is made again.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from snell_scale.data.batches import collate, evaluation_batches, num_samples
from snell_scale.data.latents import (
    LatentSplit,
    NoiseDraws,
    PriorPreserving,
    Prompts,
    WithPrior,
    with_seed,
)
from snell_scale.data.stored_tensors import StoredTensors, is_whole, write_whole
from snell_scale.interfaces import Batch, DataBundle, Encoders, Engine, InputSpec

_FORMAT = "1"
_SECONDS_BETWEEN_LINES = 5.0
_FIELDS = frozenset({"latents", "noise", "fraction", "weight", "prompt", "index"})

Item = TypeVar("Item")


@dataclass(frozen=True)
class CacheSettings:
    """folder: where the files go; flips: also keep what the encoders make of the mirrored images."""

    folder: Path
    flips: bool
    batch_size: int


class LatentCache:
    """Makes a data set of images into one of latents; the encoders work on rank 0 alone and are then released.

    prompt: None takes each image's caption (that of epoch 0); else a sentence for all images, in which {} is the
    name of the image's class. extra_prompts: further ones that `Prompts` is to know.
    """

    def __init__(
        self,
        encoders: Encoders,
        engine: Engine,
        *,
        latent_shape: tuple[int, int, int],
        settings: CacheSettings,
        prompt: str | None,
        extra_prompts: Sequence[str] = (),
    ) -> None:
        self._encoders = encoders
        self._engine = engine
        self._latent_shape = latent_shape
        self._settings = settings
        self._prompt = prompt
        self._extra_prompts = extra_prompts

    def prepare(self, data: DataBundle, *, draws: NoiseDraws) -> DataBundle:
        """`data` with latents in place of images; every rank calls it, those after the first wait for it.

        ValueError: training images that are augmented anew in every epoch, latents of another size than the model
        denoises, a cache folder that this rank does not see.
        """
        splits: dict[str, Dataset[Batch]] = {
            "train": data.train,
            "validation": data.validation,
            "test": data.test,
        }
        if isinstance(data.train, PriorPreserving):
            splits |= {"train": data.train.instances, "prior": data.train.prior}
        files: dict[str, str] = self._engine.ranks.first(lambda: self._make(data, splits))
        stored = {name: StoredTensors(_visible(Path(file))) for name, file in files.items()}
        texts = {name: self._texts(data, stored[name]) for name in splits}
        prompts = Prompts(stored["prompts"], self._all_prompts(texts))
        made = {
            name: LatentSplit(
                stored[name],
                prompts,
                prompt_ids=prompts.ids(texts[name]),
                draws=_draws_of(name, draws, number),
            )
            for number, name in enumerate(splits)
        }
        train: Dataset[Batch] = made["train"]
        if isinstance(data.train, PriorPreserving):
            train = WithPrior(made["train"], made["prior"], prior_weight=data.train.prior_weight)
        fields = _FIELDS | (data.fields & {"label"})
        return replace(
            data, train=train, validation=made["validation"], test=made["test"], fields=frozenset(fields)
        )

    def _make(self, data: DataBundle, splits: Mapping[str, Dataset[Batch]]) -> dict[str, str]:
        """Every file that there is not yet; name of the split, or "prompts", → path."""
        _check_same_every_epoch(splits["train"])
        self._settings.folder.mkdir(parents=True, exist_ok=True)
        try:
            files = {name: self._make_split(name, split, data) for name, split in splits.items()}
            texts = {name: self._texts(data, StoredTensors(file)) for name, file in files.items()}
            files["prompts"] = self._make_prompts(self._all_prompts(texts))
        finally:
            self._encoders.release()
        return {name: str(file.absolute()) for name, file in files.items()}

    def _make_split(self, name: str, split: Dataset[Batch], data: DataBundle) -> Path:
        size = self._settings.batch_size

        def batches(what: str) -> Iterator[Batch]:
            total = -(-num_samples(split) // size)
            for batch in _shown(evaluation_batches(split, size), f"{what} {name}", total):
                self._engine.ranks.beat()
                yield batch

        digest = _digest_of_images(batches("reading"))
        key = _key(self._encoders.fingerprint, digest, repr(data.input_spec), str(self._settings.flips), _FORMAT)
        file = self._settings.folder / f"latents-{key}.safetensors"
        if not is_whole(file):
            write_whole(file, self._encode(batches("encoding"), data.input_spec))
        return file

    def _encode(self, batches: Iterator[Batch], spec: InputSpec) -> dict[str, Tensor]:
        """mean and std of every image's latents, flipped ones where asked for, labels and captions."""
        parts: dict[str, list[Tensor]] = {}
        self._encoders.to(self._engine.device)
        for batch in batches:
            images = in_unit_range(batch["image"], spec).to(self._engine.device)
            found = self._encoded(images)
            if self._settings.flips:
                flipped = self._encoded(images.flip(-1))
                found |= {f"{name}_flipped": value for name, value in flipped.items()}
            found |= {name: batch[name] for name in ("label", "caption") if name in batch}
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in parts.items()}

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> dict[str, Tensor]:
        encoded = self._encoders.encode_images(images)
        found = {name: encoded[name].float().cpu() for name in ("mean", "std")}
        shape = tuple(found["mean"].shape[1:])
        if shape != self._latent_shape:
            raise ValueError(
                f"the encoders make latents of {shape} (channels, height, width) from images of "
                f"{tuple(images.shape[1:])}, but the model denoises {self._latent_shape}; change "
                "data.image_size, or the model's sample size"
            )
        if not all(value.isfinite().all() for value in found.values()):
            raise ValueError(
                "the encoders gave latents that are not finite (some VAEs overflow in half precision); load them "
                "in float32, or take weights fixed for half precision"
            )
        return found

    def _make_prompts(self, texts: Sequence[str]) -> Path:
        key = _key(self._encoders.fingerprint, json.dumps(texts), _FORMAT)
        file = self._settings.folder / f"prompts-{key}.safetensors"
        if not is_whole(file):
            self._encoders.to(self._engine.device)
            write_whole(file, self._encode_prompts(texts))
        return file

    @torch.no_grad()
    def _encode_prompts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        size = self._settings.batch_size
        parts: dict[str, list[Tensor]] = {}
        chunks = [texts[first : first + size] for first in range(0, len(texts), size)]
        for chunk in _shown(iter(chunks), "encoding prompts", len(chunks)):
            self._engine.ranks.beat()
            for name, value in self._encoders.encode_prompts(chunk).items():
                parts.setdefault(name, []).append(value.cpu())
        return {name: torch.cat(values) for name, values in parts.items()}

    def _texts(self, data: DataBundle, stored: StoredTensors) -> list[str]:
        """The prompt of every sample of a split."""
        if self._prompt is None:
            return [data.captions[number] for number in stored["caption"].tolist()]
        if "{}" not in self._prompt:
            return [self._prompt] * len(stored["mean"])
        return [self._prompt.format(data.class_names[number]) for number in stored["label"].tolist()]

    def _all_prompts(self, texts: Mapping[str, Sequence[str]]) -> list[str]:
        return sorted({"", *self._extra_prompts, *(text for split in texts.values() for text in split)})


def in_unit_range(images: Tensor, spec: InputSpec) -> Tensor:
    """(B, C, H, W), normalised as `spec` says → float32 in [-1, 1]."""
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return (images * std + mean) * 2 - 1


def _draws_of(name: str, draws: NoiseDraws, number: int) -> NoiseDraws:
    evaluates = name in ("validation", "test")
    return replace(with_seed(draws, split=number), evaluates=evaluates)


def _check_same_every_epoch(train: Dataset[Batch]) -> None:
    """Latents are made once: what an augmentation would do in later epochs would be lost without a word."""
    indices = range(min(8, num_samples(train)))
    first, later = (collate([train[index, epoch] for index in indices]) for epoch in (0, 1))
    if not torch.equal(first["image"], later["image"]):
        raise ValueError(
            "the training images differ from epoch to epoch, but their latents are computed once: turn the "
            "data's augmentation (crops, flips, shifts) off; task.cache_flips=true adds mirrored images"
        )


def _digest_of_images(batches: Iterator[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in ("image", "label", "caption"):
            if name in batch:
                digest.update(batch[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _visible(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(
            f"task.cache_dir: rank 0 has written {file}, but this rank does not see it; set it to a folder that "
            "all machines share"
        )
    return file


def _shown(items: Iterator[Item], label: str, total: int) -> Iterator[Item]:
    """The items; once they have taken some seconds, with a bar on a terminal or a line now and then elsewhere."""
    console = Console(stderr=True)
    bar = Progress(console=console)
    task = bar.add_task(label, total=total)
    last = time.monotonic()
    try:
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(task, completed=done)
            if bar.live.is_started or time.monotonic() - last < _SECONDS_BETWEEN_LINES:
                continue
            if console.is_terminal:
                bar.start()
            else:
                last = time.monotonic()
                print(f"{label}: {done}/{total} batches", file=sys.stderr, flush=True)
    finally:
        if bar.live.is_started:  # a bar that was not started would print an empty line
            bar.stop()
