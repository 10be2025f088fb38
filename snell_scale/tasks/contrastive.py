"""Contrastive training on image-text pairs: CLIP's loss over all ranks, zero-shot accuracy, retrieval recall."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from snell_scale.config import StrictModel
from snell_scale.data.batches import num_samples
from snell_scale.interfaces import Batch, DataBundle, Engine, Evaluation, ModelBundle, StepOutput
from snell_scale.tasks.base import PlainTask, check_fit
from snell_scale.tasks.pair_pictures import shown_samples, tiles
from snell_scale.tasks.retrieval import pair_loss, recalls
from snell_scale.tasks.zero_shot import ClassPrompts, ranked_classes

_KS = (1, 5, 10)
# CLIP's limit of the logit scale, and a thousandth: OpenAI's weights, which stand at the limit, are above 100 by
# rounding, and would get no gradient any more.
_MAX_LOGIT_SCALE = 100.1

ChoosingMetric = Literal[
    "zero_shot_top1", "image_to_text_recall1", "image_to_text_recall5", "image_to_text_recall10",
    "text_to_image_recall1", "text_to_image_recall5", "text_to_image_recall10", "loss",
]  # fmt: skip


class ContrastiveConfig(StrictModel):
    """CLIP's loss on image-text pairs; reports zero-shot accuracy (data with labels) and retrieval recall.

    Every pair of a microbatch, over all ranks, is a negative of every other one: with gradient accumulation those
    of a microbatch, not those of the whole batch. A split's loss is that of all its pairs together.
    """

    name: Literal["contrastive"] = "contrastive"
    templates: tuple[str, ...] = Field(
        default=("a photo of a {}.",),
        min_length=1,
        description="Sentences with {} for a class's name; zero-shot evaluation averages over them.",
    )
    metric: ChoosingMetric | None = Field(
        default=None,
        description="Chooses the best step; null: zero_shot_top1, without labels image_to_text_recall1.",
    )

    @model_validator(mode="after")
    def _check(self) -> "ContrastiveConfig":
        wrong = [text for text in self.templates if [text.count(part) for part in ("{}", "{", "}")] != [1, 1, 1]]
        if wrong:
            raise ValueError(f"templates has {wrong[0]!r}, expected one {{}} in it, where the class's name goes")
        return self

    def build(self, *, data: DataBundle, model: ModelBundle) -> "Contrastive":
        """ValueError where data or model are not for this, or zero_shot_top1 is to choose without classes."""
        check_fit(
            self.name, data=data, model=model, needs={"image", "text", "index"}, output="image_text_features"
        )
        has_classes = "label" in data.fields and len(data.class_names) > 1
        if self.metric == "zero_shot_top1" and not has_classes:
            raise ValueError(
                "task.metric=zero_shot_top1 needs data with labels of at least two classes; these have none; set "
                "task.metric=image_to_text_recall1"
            )
        prompts = ClassPrompts(data.class_names, self.templates, _tokenizer(model)) if has_classes else None
        return Contrastive(self, data=data, prompts=prompts)


class Contrastive(PlainTask):
    """See `interfaces.Task`. Batches hold "image", "text", "index"; "label", "caption", "image_id" if there."""

    def __init__(self, config: ContrastiveConfig, *, data: DataBundle, prompts: ClassPrompts | None) -> None:
        self.metric: str = config.metric or ("zero_shot_top1" if prompts else "image_to_text_recall1")
        recall = tuple(f"{way}_recall{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5))
        self._has_top5 = prompts is not None and len(data.class_names) > 5
        top1 = ("zero_shot_top1",) if prompts is not None else ()
        self.reported = (*top1, *(("zero_shot_top5",) if self._has_top5 else ()), *recall)
        self._data, self._prompts = data, prompts
        self._loss = _clip_loss()
        self._engine: Engine | None = None

    def prepare(self, data: DataBundle, engine: Engine) -> DataBundle:
        self._engine = engine
        # Each rank has the logits of its own pairs against all; the features' gradients travel back.
        self._loss = _clip_loss(
            local_loss=True,
            gather_with_grad=True,
            rank=engine.ranks.rank,
            world_size=engine.ranks.world_size,
        )
        return data

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        image, text, scale = model(batch["image"], batch["text"])
        # Not in bf16: at a scale of 100 its products are off by as much as the loss is worth.
        dtype = torch.promote_types(image.dtype, torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            loss = self._loss(image.to(dtype), text.to(dtype), scale.to(dtype).clamp(max=_MAX_LOGIT_SCALE))
        return {"loss": loss, "outputs": image}

    def evaluation(self, model: nn.Module, split: Dataset[Batch]) -> Evaluation:
        return PairsEvaluation(num_samples(split), prompts=self._prompts, has_top5=self._has_top5)

    @torch.no_grad()
    def pictures(self, model: nn.Module, split: Dataset[Batch]) -> dict[str, Tensor]:
        """predictions: some images with the class that is nearest to each, or the nearest of their captions."""
        if self._prompts is None and not self._data.captions:
            return {}
        assert self._engine is not None, "prepare() comes first"
        samples = shown_samples(split)
        batch = self._engine.move(samples)
        image, text, _ = model(batch["image"], batch["text"])
        if self._prompts is not None:
            found = ranked_classes(image, self._prompts.embed(model, image.device), num=1)[:, 0].cpu()
            right, names = samples["label"], self._data.class_names
        else:
            nearest = (image.float() @ text.float().T).argmax(dim=1).cpu()
            right = samples["caption"]
            found, names = right[nearest], self._data.captions
        lines = [
            names[a] if a == b else f"{names[a]}\nis: {names[b]}"
            for a, b in zip(found.tolist(), right.tolist(), strict=True)
        ]
        picture = tiles(samples["image"], lines, right=(found == right).tolist(), spec=self._data.input_spec)
        return {"predictions": picture}


class PairsEvaluation:
    """See `interfaces.Evaluation`: every pair's features, in the row of its index and zero elsewhere, so that the
    sum over ranks gathers them. Data with several captions of an image give the image once for each.
    """

    def __init__(self, num_pairs: int, *, prompts: ClassPrompts | None, has_top5: bool) -> None:
        self._num_pairs = num_pairs
        self._prompts = prompts
        self._num_ranked = 5 if has_top5 else 1
        self._classes: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Batch, *, counts: bool = True) -> None:
        image, text, scale = model(batch["image"], batch["text"])
        if self._prompts is not None and self._classes is None:
            self._classes = self._prompts.embed(model, image.device)
        if not self._sums:
            self._sums = self._zeros(image.shape[1], image.device)
        if not counts:
            return
        index = batch["index"]
        self._sums["images"][index] = image.double()
        self._sums["texts"][index] = text.double()
        self._sums["image_ids"][index] = batch.get("image_id", index)
        self._sums["text_ids"][index] = batch.get("caption", index)
        self._sums["scale_sum"] += scale.double().clamp(max=_MAX_LOGIT_SCALE) * len(index)
        self._sums["count"] += len(index)
        if self._classes is not None:
            right = ranked_classes(image, self._classes, num=self._num_ranked) == batch["label"].unsqueeze(1)
            self._sums["correct1"] += right[:, 0].sum()
            self._sums["correct5"] += right.any(dim=1).sum()

    def sums(self) -> dict[str, Tensor]:
        return self._sums

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        count = int(sums["count"]) if sums else 0
        if count == 0:
            raise ValueError("no sample was evaluated: the split is empty; check the data's sizes")
        assert count == self._num_pairs, f"{count} of {self._num_pairs} pairs were evaluated"
        metrics = {}
        if self._prompts is not None:
            metrics["zero_shot_top1"] = 100 * int(sums["correct1"]) / count
            if self._num_ranked == 5:
                metrics["zero_shot_top5"] = 100 * int(sums["correct5"]) / count
        images, texts = sums["images"].float(), sums["texts"].float()
        ids = {"image_ids": sums["image_ids"], "text_ids": sums["text_ids"]}
        for way, values in zip(
            ("image_to_text", "text_to_image"), recalls(images, texts, ks=_KS, **ids), strict=True
        ):
            metrics |= {f"{way}_recall{k}": value for k, value in zip(_KS, values, strict=True)}
        scale = (sums["scale_sum"] / count).float()
        return metrics | {"loss": float(pair_loss(images, texts, scale))}

    def _zeros(self, width: int, device: torch.device) -> dict[str, Tensor]:
        shapes = {"images": (self._num_pairs, width), "texts": (self._num_pairs, width), "scale_sum": ()}
        numbers = {"image_ids": (self._num_pairs,), "text_ids": (self._num_pairs,), "count": ()}
        if self._prompts is not None:
            numbers |= {"correct1": (), "correct5": ()}
        floats = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        return floats | {
            name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in numbers.items()
        }


def _clip_loss(**arguments: Any) -> nn.Module:
    try:
        from open_clip.loss import ClipLoss  # seconds of import that only this task needs
    except ModuleNotFoundError as error:
        raise ValueError(f"task.name=contrastive needs {error.name}: pip install snell-scale[clip]") from error
    return ClipLoss(**arguments)


def _tokenizer(model: ModelBundle) -> Callable[[Sequence[str]], Tensor]:
    if model.tokenize is None:
        raise ValueError("zero-shot evaluation needs a model that reads text, which this one does not")
    return model.tokenize
