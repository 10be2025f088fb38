"""What every registered task must do: refuse what does not fit, train, and give sums that add up over shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_scale import metrics
from snell_scale.data.embedded import DigitsConfig
from snell_scale.interfaces import Batch, DataBundle, Evaluation, ModelBundle
from snell_scale.registry import config_class, names
from tests.tasks.contrastive_parts import TinyClip, pairs
from tests.tasks.contrastive_parts import bundle_of as clip_of
from tests.tasks.diffusion_parts import latent_batch, tiny_bundle
from tests.tasks.parts import data_of, model_of


@dataclass(frozen=True)
class Case:
    """A task on four samples: data and model that fit it, and the same samples as one batch."""

    settings: dict[str, Any]
    data: DataBundle
    model: ModelBundle
    batch: Batch

    def task(self, name: str) -> Any:
        config = config_class("task", name).model_validate({"name": name, **self.settings})
        return config.build(data=self.data, model=self.model)


def stacked(samples: list[Batch]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def _classification() -> Case:
    torch.manual_seed(0)
    samples = [{"image": torch.randn(3), "label": torch.tensor(i % 3)} for i in range(4)]
    data = data_of(class_names=["a", "b", "c"], fields={"image", "label"}, samples=samples)
    return Case({}, data, model_of("class_logits", nn.Linear(3, 3)), stacked(samples))


def _contrastive() -> Case:
    samples = pairs(4)
    data = data_of(class_names=["a", "b", "c"], fields=set(samples[0]), samples=samples, size=4)
    return Case({}, data, clip_of(TinyClip()), stacked(samples))


def _segmentation() -> Case:
    torch.manual_seed(0)
    samples = [{"image": torch.randn(3, 8, 8), "mask": torch.randint(0, 3, (8, 8))} for _ in range(4)]
    data = data_of(class_names=["a", "b", "c"], fields={"image", "mask"}, samples=samples)
    return Case({}, data, model_of("pixel_logits", nn.Conv2d(3, 3, 1)), stacked(samples))


def _denoising() -> Case:
    settings = {"classes": (5, 6, 7), "train_per_class": 4, "validation_per_class": 4, "captions": ("a {}",)}
    data = DigitsConfig.model_validate({**settings, "scaling": "symmetric"}).build(seed=0)
    return Case({}, data, tiny_bundle(data.input_spec), latent_batch(4))


# One per registered task; adding a task to the registry means adding one here.
SAMPLES: dict[str, Callable[[], Case]] = {
    "classification": _classification,
    "segmentation": _segmentation,
    "contrastive": _contrastive,
    "denoising": _denoising,
}


@pytest.fixture(params=names("task"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_sums_of_shares_give_the_metrics_of_the_whole(name: str) -> None:
    case = SAMPLES[name]()
    task, model, split = case.task(name), case.model.module.eval(), case.data.test
    whole = _evaluated(task.evaluation(model, split), model, [(case.batch, True)])
    first, second = (_part(case.batch, part) for part in (slice(0, 1), slice(1, 4)))
    shares = [
        _evaluated(task.evaluation(model, split), model, [(first, True), (first, False)]),
        _evaluated(task.evaluation(model, split), model, [(second, True)]),
    ]
    added = {key: shares[0][key] + shares[1][key] for key in whole}
    assert all(value.dtype in (torch.float64, torch.int64) for value in whole.values())
    expected = task.evaluation(model, split).metrics(whole)
    # float64 sums of the same numbers in another order; batched float32 products of other shapes
    assert task.evaluation(model, split).metrics(added) == pytest.approx(expected, rel=1e-5)
    assert task.metric in expected
    assert task.metric in metrics.METRICS
    assert {reported.partition("/")[0] for reported in task.reported} <= metrics.METRICS.keys()


def test_the_loss_trains_and_evaluation_does_not(name: str) -> None:
    case = SAMPLES[name]()
    task, model = case.task(name), case.model.module
    output = task(model, case.batch)
    assert output["loss"].ndim == 0
    output["loss"].backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    evaluation = task.evaluation(model, case.data.test)
    evaluation.add(model, case.batch)
    assert not any(value.requires_grad for value in evaluation.sums().values())


def test_data_and_models_that_do_not_fit_are_refused(name: str) -> None:
    case = SAMPLES[name]()
    config = config_class("task", name).model_validate({"name": name, **case.settings})
    with pytest.raises(ValueError, match=f"task.name={name} needs data with .*image"):
        config.build(data=data_of(class_names=["a", "b"], fields={"sound"}), model=case.model)
    with pytest.raises(ValueError, match=f"task.name={name} needs a model that gives"):
        config.build(data=case.data, model=model_of("sounds"))


def _evaluated(evaluation: Evaluation, model: nn.Module, batches: list[tuple[Batch, bool]]) -> dict[str, Tensor]:
    for batch, counts in batches:
        evaluation.add(model, batch, counts=counts)
    return evaluation.sums()


def _part(batch: Batch, part: slice) -> Batch:
    return {key: value[part] for key, value in batch.items()}
