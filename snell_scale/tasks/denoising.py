"""Training a diffusion model: noise prediction, v-prediction or flow matching, samples and their metrics."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from snell_scale.config import StrictModel
from snell_scale.data.latent_cache import CacheSettings, LatentCache, in_unit_range
from snell_scale.data.latents import CONDITION, LatentSplit, NoiseDraws, PriorPreserving, WithPrior
from snell_scale.interfaces import Batch, DataBundle, Diffusion, Engine, Evaluation, ModelBundle, StepOutput
from snell_scale.tasks.base import SummedEvaluation, check_fit
from snell_scale.tasks.diffusion_losses import TimestepWeighting, noise_process
from snell_scale.tasks.feature_backends import FeatureBackendConfig
from snell_scale.tasks.generation_metrics import GenerationMetrics, check_enough_images
from snell_scale.tasks.sampling import SamplingConfig, generate, grid, to_bytes

Latents = LatentSplit | WithPrior
_SIMILARITIES = {"clip": ("clip_i", "clip_t"), "dino": ("dino",)}


class DenoisingConfig(StrictModel):
    """Trains a diffusion model on latents that are computed once; the loss is what the model's scheduler says."""

    name: Literal["denoising"] = "denoising"
    prompt: str | None = Field(
        default=None, description="For every image, {} standing for its class; null: the data's captions."
    )
    prompt_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of training samples with an empty prompt, for guidance."
    )
    min_snr_gamma: float | None = Field(default=None, gt=0, description="min-SNR-γ weighting; usual: 5.")
    offset_noise: float = Field(
        default=0.0, ge=0, description="Noise that a channel shares; usual where used: 0.1."
    )
    timestep_weighting: TimestepWeighting = Field(
        default="uniform", description="How flow matching draws its timesteps; SD3's choice: logit_normal."
    )
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    noise_seed: int = Field(default=0, ge=0, lt=2**60, description="Of noise, timesteps and dropped prompts.")
    cache_dir: str = Field(default="runs/latents", description="Where latents and prompts are kept.")
    cache_flips: bool = Field(default=False, description="Train on mirrored images, too.")
    cache_batch_size: int = Field(default=8, gt=0, description="Images that the encoders see at once.")
    sampling: SamplingConfig = SamplingConfig()
    picture_prompts: tuple[str, ...] = Field(
        default=(), description="One row of the pictures each; none: the first prompts of the split."
    )
    picture_columns: int = Field(
        default=8, gt=0, description="Samples per prompt in a picture; as many forwards."
    )
    num_samples: int | None = Field(
        default=None, ge=2, description="Generated for the test metrics; null: as many as there are real ones."
    )
    reference: Literal["test", "train"] = Field(
        default="test", description="The real images of the test metrics (train: usual for DreamBooth)."
    )
    fid_backend: FeatureBackendConfig | None = Field(default=None, description="For FID, KID; null: neither.")
    clip: FeatureBackendConfig | None = Field(default=None, description="For CLIP-I, CLIP-T; null: neither.")
    dino: FeatureBackendConfig | None = Field(default=None, description="For DINO similarity; null: none.")

    @model_validator(mode="after")
    def _check(self) -> "DenoisingConfig":
        if set((self.prompt or "").replace("{}", "")) & set("{}"):
            raise ValueError(
                f"prompt is {self.prompt!r}, expected {{}} where the class's name goes, or no braces"
            )
        for key in _SIMILARITIES:
            backend = getattr(self, key)
            if backend is not None and backend.name != key:
                raise ValueError(f"{key}.name is {backend.name!r}, expected {key!r}")
        return self

    def build(self, *, data: DataBundle, model: ModelBundle) -> "Denoising":
        """ValueError: data or model that do not fit, options that are not the scheduler's, absent backends."""
        source = "caption" if self.prompt is None else "label"
        needs = {"image", source} if self.prompt is None or "{}" in self.prompt else {"image"}
        check_fit("denoising", data=data, model=model, needs=needs, output="denoised")
        if self.prompt is not None and isinstance(data.train, PriorPreserving):
            raise ValueError(
                "task.prompt would name the subject and its class alike; set it to null: the data do"
            )
        if self.fid_backend is not None:
            check_enough_images(data.sizes[self.reference], split=self.reference)
        assert model.diffusion is not None, "a model that denoises brings its scheduler and encoders"
        self.sampling.check(model.diffusion.scheduler)
        for key, backend in self.backends().items():
            names = backend.check(key).class_names
            unknown = sorted(set(data.class_names) - set(names)) if names else []
            if unknown and "label" in data.fields:
                raise ValueError(
                    f"task.{key}: the classifier knows {', '.join(names)}, but the data have "
                    f"{', '.join(unknown)}; train it on all classes of the data, named alike"
                )
        return Denoising(self, diffusion=model.diffusion)

    def backends(self) -> dict[str, FeatureBackendConfig]:
        """The feature backends that are asked for, by their key in the config."""
        named = {"fid_backend": self.fid_backend, "clip": self.clip, "dino": self.dino}
        return {key: backend for key, backend in named.items() if backend is not None}


class Denoising:
    """See `interfaces.Task`. Batches are those of `LatentSplit`, or `WithPrior`."""

    metric = "loss"

    def __init__(self, config: DenoisingConfig, *, diffusion: Diffusion) -> None:
        self.reported = _reported(config)
        self._config = config
        self._diffusion = diffusion
        self._process = noise_process(
            diffusion.scheduler,
            latent_shape=diffusion.latent_shape,
            min_snr_gamma=config.min_snr_gamma,
            timestep_weighting=config.timestep_weighting,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        )
        self._engine: Engine | None = None
        self._images: DataBundle | None = None

    def prepare(self, data: DataBundle, engine: Engine) -> DataBundle:
        """Latents in place of images; the images themselves are kept at hand for the test metrics."""
        config = self._config
        self._engine, self._images = engine, data
        cache = LatentCache(
            self._diffusion.encoders,
            engine,
            latent_shape=self._diffusion.latent_shape,
            settings=CacheSettings(Path(config.cache_dir), config.cache_flips, config.cache_batch_size),
            prompt=config.prompt,
            extra_prompts=config.picture_prompts,
        )
        draws = NoiseDraws(config.noise_seed, config.prompt_dropout, config.offset_noise)
        return cache.prepare(data, draws=draws)

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        size = len(batch["weight"])
        losses, predicted = self._losses(model, batch)
        return {"loss": losses.sum() / size, "outputs": predicted}

    def evaluation(self, model: nn.Module, split: Dataset[Batch]) -> Evaluation:
        return SummedEvaluation(self._sums, _mean_loss)

    @torch.no_grad()
    def test_metrics(self, model: nn.Module, data: DataBundle) -> dict[str, float]:
        """Of samples of the reference split's prompts against its images; {} where no backend is asked for.

        Sample i starts from noise of its own and has the prompt of an image, evenly taken from the split. Ranks
        take batches in turn, all of them equally many; the metrics are those of one rank.
        """
        backends = {key.removesuffix("_backend"): value for key, value in self._config.backends().items()}
        if not backends:
            return {}
        engine, images = self._prepared()
        split = data.test if self._config.reference == "test" else data.train
        assert isinstance(split, Latents)
        metrics = GenerationMetrics(
            backends.get("fid"), backends.get("clip"), backends.get("dino"), device=engine.device
        )
        self._add_real(metrics, split, images)
        self._add_generated(metrics, model, split, images.class_names)
        return metrics.metrics(engine.ranks)

    @torch.no_grad()
    def pictures(self, model: nn.Module, split: Dataset[Batch]) -> dict[str, Tensor]:
        """ "samples": a row for each prompt, a column for each of always the same starting noises."""
        assert isinstance(split, Latents)
        columns = self._config.picture_columns
        rows = self._config.picture_prompts or _first_prompts(split)
        made = []
        for prompt in rows:
            ids = split.prompts.ids([prompt]).expand(columns)
            made.append(self._generate(model, split, ids, range(columns)))
        self._diffusion.encoders.release()
        return {"samples": grid(torch.cat(made), columns=columns)}

    def describe_metrics(self) -> dict[str, str]:
        """Metric → what it was measured with, for the record: backend, weights, number of samples, sampler."""
        config = self._config
        sampling = config.sampling
        samples = config.num_samples or "as many"
        how = (
            f"{samples} samples against the {config.reference} split; sampler {sampling.sampler}, "
            f"{sampling.steps} steps, guidance {sampling.guidance_scale:g}, seed {sampling.seed}"
        )
        described: dict[str, str] = {}
        for key, backend in config.backends().items():
            for metric in _metrics_of(key, backend):
                described[metric] = f"{backend.describe()}; {how}"
        return described

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """((N,) weighted loss of every image, the predictions); the pairs of `WithPrior` are two images."""
        if batch["weight"].ndim == 2:
            batch = {name: value.flatten(0, 1) for name, value in batch.items()}
        mixed = self._process.mix(batch["latents"], batch["noise"], batch["fraction"])
        condition = {
            name.removeprefix(CONDITION): value for name, value in batch.items() if name.startswith(CONDITION)
        }
        predicted = self._diffusion.denoise(model, mixed.noisy, mixed.timesteps, condition)
        errors = (predicted.float() - mixed.target).square().flatten(1).mean(dim=1)
        return errors * mixed.weight * batch["weight"], predicted

    def _sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        losses, _ = self._losses(model, batch)
        count = torch.full((), len(losses), dtype=torch.int64, device=losses.device)
        return {"loss_sum": losses.double().sum(), "count": count}

    def _prepared(self) -> tuple[Engine, DataBundle]:
        assert self._engine is not None, "the loop prepares the task first"
        assert self._images is not None
        return self._engine, self._images

    def _generate(self, model: nn.Module, split: Latents, ids: Tensor, noises: range) -> Tensor:
        engine, _ = self._prepared()
        return generate(
            model, self._diffusion, split.prompts, ids, noises, settings=self._config.sampling, engine=engine
        )

    def _add_generated(
        self,
        metrics: GenerationMetrics,
        model: nn.Module,
        split: Latents,
        class_names: tuple[str, ...],
    ) -> None:
        engine, _ = self._prepared()
        total = self._config.num_samples or len(split)
        of_sample = _evenly(total, len(split))
        labels = split.labels()
        for number, chunk, counts in _batches_of_rank(total, self._config.sampling.batch_size, engine):
            positions = of_sample[chunk.start : chunk.stop]
            ids = split.prompt_ids[positions]
            made = self._generate(model, split, ids, chunk)
            if counts:
                names = None if labels is None else [class_names[n] for n in labels[positions].tolist()]
                texts = [split.prompts.texts[number] for number in ids.tolist()]
                metrics.add_generated(number, made, prompts=ids, texts=texts, classes=names)
        self._diffusion.encoders.release()

    def _add_real(self, metrics: GenerationMetrics, split: Latents, images: DataBundle) -> None:
        engine, _ = self._prepared()
        source = images.test if self._config.reference == "test" else images.train
        source = source.instances if isinstance(source, PriorPreserving) else source
        for number, chunk, counts in _batches_of_rank(len(split), self._config.sampling.batch_size, engine):
            if counts:
                real = torch.stack([source[index, 0]["image"] for index in chunk])
                as_file = to_bytes(in_unit_range(real, images.input_spec))
                metrics.add_real(number, as_file, prompts=split.prompt_ids[chunk.start : chunk.stop])


def _reported(config: DenoisingConfig) -> tuple[str, ...]:
    found = [name for key, backend in config.backends().items() for name in _metrics_of(key, backend)]
    order = ("kid", "fid", "sample_accuracy", "clip_i", "clip_t", "dino")
    return (*(name for name in order if name in found), "loss")


def _metrics_of(key: str, backend: FeatureBackendConfig) -> tuple[str, ...]:
    if key != "fid_backend":
        return _SIMILARITIES[key]
    return ("kid", "fid", "sample_accuracy") if backend.name == "classifier" else ("kid", "fid")


def _mean_loss(sums: Mapping[str, Tensor]) -> dict[str, float]:
    count = int(sums["count"])
    if count == 0:
        raise ValueError("no sample was evaluated: the split is empty; check the data's sizes")
    return {"loss": float(sums["loss_sum"]) / count}


def _first_prompts(split: Latents, most: int = 8) -> list[str]:
    """The split's prompts in order of appearance, at most so many."""
    seen = dict.fromkeys(split.prompt_ids.tolist())
    return [split.prompts.texts[number] for number in list(seen)[:most]]


def _evenly(total: int, available: int) -> Tensor:
    """(total,) int64: which image each sample takes its prompt from; in turn where there are more samples."""
    numbers = torch.arange(total)
    return numbers * available // total if total <= available else numbers % available


def _batches_of_rank(total: int, size: int, engine: Engine) -> Iterator[tuple[int, range, bool]]:
    """(number, indices, whether it counts) of every batch of this rank; all ranks get equally many.

    A batch is the same on any number of ranks, so that what is computed of it is, too.
    """
    rank, world_size = engine.ranks.rank, engine.ranks.world_size
    chunks = [range(first, min(first + size, total)) for first in range(0, total, size)]
    for first in range(0, len(chunks), world_size):
        number = first + rank
        counts = number < len(chunks)
        yield number, chunks[number if counts else 0], counts
