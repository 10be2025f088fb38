"""Digits and other images as latents that were computed once."""

from pathlib import Path
from typing import Any

from snell_scale.data.embedded import DigitsConfig
from snell_scale.data.latent_cache import CacheSettings, LatentCache
from snell_scale.data.latents import NoiseDraws
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from snell_scale.interfaces import DataBundle
from tests.tasks.diffusion_parts import PlainEncoders

SHAPE = (1, 8, 8)
CAPTIONS = ("a {}", "the {}")
DRAWS = NoiseDraws(seed=5)


def digits(**changes: Any) -> DataBundle:
    settings: dict[str, Any] = {
        "classes": (5, 6),
        "train_per_class": 10,
        "validation_per_class": 30,
        "captions": CAPTIONS,
    }
    return DigitsConfig.model_validate(settings | {"scaling": "symmetric"} | changes).build(seed=0)


def cached(
    folder: Path,
    data: DataBundle | None = None,
    *,
    encoders: PlainEncoders | None = None,
    draws: NoiseDraws = DRAWS,
    shape: tuple[int, int, int] = SHAPE,
    flips: bool = False,
    prompt: str | None = None,
) -> DataBundle:
    cache = LatentCache(
        encoders or PlainEncoders(),
        SingleConfig(device="cpu").build(Ranks()),
        latent_shape=shape,
        settings=CacheSettings(folder, flips, batch_size=16),
        prompt=prompt,
        extra_prompts=("something else",),
    )
    return cache.prepare(data or digits(), draws=draws)
