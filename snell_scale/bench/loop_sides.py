"""The two sides of `bench loop`: the product's training of a timm model, and a bare loop over the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from snell_scale import registry
from snell_scale.assembly import assemble
from snell_scale.bench.settings import LoopSettings, method_settings
from snell_scale.bench.workloads import TARGETS
from snell_scale.config import Config, resolve
from snell_scale.data.batches import StepBatches, training_batches
from snell_scale.data.config import DataConfig, bundle_of
from snell_scale.interfaces import Batch, DataBundle, InputSpec, Preprocessing, SampleKey
from snell_scale.optimization import make_optimizer

_NUM_CLASSES = 100
_BATCHES_PER_EPOCH = 4
# As in step_sides: neither changes the time of a step.
_ADAPTER_LR, _FULL_LR = 1e-3, 1e-5


class SyntheticConfig(DataConfig):
    """Noise of a stated size with random labels, in memory."""

    name: Literal["synthetic"] = "synthetic"
    image_size: tuple[int, int, int] = Field(description="Channels, height, width.")
    num_samples: int = Field(gt=0)

    def build(self, *, seed: int, preprocessing: Preprocessing | None = None) -> DataBundle:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn((self.num_samples, *self.image_size), generator=generator)
        labels = torch.randint(_NUM_CLASSES, (self.num_samples,), generator=generator)
        split = _Synthetic(images, labels)
        channels, height, width = self.image_size
        spec = InputSpec(channels, height, width, mean=(0.0,) * channels, std=(1.0,) * channels)
        return bundle_of(
            dict.fromkeys(("train", "validation", "test"), split),
            class_names=[str(number) for number in range(_NUM_CLASSES)],
            input_spec=spec,
            fields={"image", "label"},
        )


class _Synthetic(Dataset[Batch]):
    """Samples one by one, as files on a disk would come: the product's loop collates them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: SampleKey) -> Batch:
        return {"image": self._images[key[0]], "label": self._labels[key[0]]}


@dataclass
class BareLoop:
    """Forward, loss, backward, update over batches that lie ready: what any training step must do."""

    module: nn.Module
    optimizer: Optimizer
    batches: Iterator[StepBatches]
    device: torch.device
    _ready: list[Batch] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "BareLoop":
        """The model, method, optimizer and order of samples of a run of this config, built anew."""
        parts = assemble(config)
        module = parts.tuner.module.to(device).train()
        optimizer = make_optimizer(module, config.training, no_decay=parts.tuner.no_decay)
        batches = training_batches(
            parts.data.train,
            batch_size=config.training.batch_size,
            seed=config.seed,
            start_step=0,
            gradient_accumulation=1,
        )
        return cls(module, optimizer, batches, device)

    def prepare(self, steps: int) -> None:
        """Make the batches of so many steps, outside of what is timed."""
        for _ in range(steps):
            (batch,) = next(self.batches).microbatches
            self._ready.append({name: tensor.to(self.device) for name, tensor in batch.items()})

    def run(self) -> Tensor:
        """All steps whose batches are ready; the loss of the last one."""
        loss = torch.empty(0)
        for batch in self._ready:
            loss = F.cross_entropy(self.module(batch["image"]), batch["label"])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._ready.clear()
        return loss.detach()


def loop_config(
    settings: LoopSettings, *, arguments: Mapping[str, Any], image_size: Sequence[int], steps: int, every: int
) -> Config:
    """A run of the product that is logged `every` so many steps, and never evaluated within `steps`."""
    lr = _FULL_LR if settings.method == "full" else _ADAPTER_LR
    data = SyntheticConfig(
        image_size=(image_size[0], image_size[1], image_size[2]),
        num_samples=_BATCHES_PER_EPOCH * settings.batch_size,
    )
    raw = {
        "name": "loop",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "model": {"name": "timm", "architecture": settings.model, "arguments": dict(arguments)},
        "data": data,
        "task": {"name": "classification"},
        "method": method_settings(settings.method, settings.rank, sparsity=settings.sparsity, targets=TARGETS),
        "engine": {"name": "single", "device": settings.device},
        # A constant rate, so that the bare loop needs no schedule.
        "training": {
            "steps": steps + 1,
            "batch_size": settings.batch_size,
            "lr": lr,
            "min_lr": lr,
            "warmup_fraction": 0.0,
            "weight_decay": 1e-2,
        },
        "evaluation": {"every_steps": steps + 1, "batch_size": settings.batch_size},
        "logging": {"every_steps": every, "memory_at_step": None},
    }
    return resolve(raw, [], config_class=registry.config_class, source="bench loop")


def image_size_of(model: str) -> tuple[int, int, int]:
    """(channels, height, width) that a timm model's published weights take."""
    import timm

    found = timm.get_pretrained_cfg(model)
    channels, height, width = (found.input_size if found is not None else None) or (3, 224, 224)
    return channels, height, width
