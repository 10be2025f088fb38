"""What tasks share: a pass over a split as a sum over batches, and the defaults of what most do not do."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from snell_scale.interfaces import Batch, DataBundle, Engine, ModelBundle


class PlainTask:
    """A task that computes nothing ahead, generates nothing and shows nothing; see `interfaces.Task`."""

    def prepare(self, data: DataBundle, engine: Engine) -> DataBundle:
        return data

    def test_metrics(self, model: nn.Module, data: DataBundle) -> dict[str, float]:
        return {}

    def describe_metrics(self) -> dict[str, str]:
        return {}

    def pictures(self, model: nn.Module, split: Dataset[Batch]) -> dict[str, Tensor]:
        return {}


class SummedEvaluation:
    """An evaluation whose sums are those of its batches.

    sums_of: (model, batch) → additive statistics. metrics_of: their sums over a split → metrics.
    """

    def __init__(
        self,
        sums_of: Callable[[nn.Module, Batch], dict[str, Tensor]],
        metrics_of: Callable[[Mapping[str, Tensor]], dict[str, float]],
    ) -> None:
        self._sums_of = sums_of
        self._metrics_of = metrics_of
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Batch, *, counts: bool = True) -> None:
        part = self._sums_of(model, batch)
        part = part if counts else {key: torch.zeros_like(value) for key, value in part.items()}
        self._sums = {key: self._sums[key] + value if self._sums else value for key, value in part.items()}

    def sums(self) -> dict[str, Tensor]:
        return self._sums

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return self._metrics_of(sums)


def check_fit(task: str, *, data: DataBundle, model: ModelBundle, needs: set[str], output: str) -> None:
    """ValueError where the data lack an entry that the task needs, or the model gives something else."""
    missing = sorted(needs - data.fields)
    if missing:
        raise ValueError(
            f"task.name={task} needs data with {' and '.join(missing)}, but these give "
            f"{', '.join(sorted(data.fields))}; choose other data (`snell-scale list datasets`), or set what "
            "makes them give it"
        )
    if model.output != output:
        raise ValueError(
            f"task.name={task} needs a model that gives {output}, but this one gives {model.output}; "
            "change model.name or task.name (`snell-scale list tasks`)"
        )
