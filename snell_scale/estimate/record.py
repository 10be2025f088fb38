"""An estimate as a record of a run that never ran: marked as predicted, read by the same analysis."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from snell_scale.attempt import blank_result
from snell_scale.config import Config, to_dict
from snell_scale.estimate.byte_sizes import show_size
from snell_scale.estimate.prediction import Prediction
from snell_scale.records import Result, read_result, write_result, write_yaml
from snell_scale.run_folder import locked


def as_result(
    prediction: Prediction, config: Config, *, varied: Mapping[str, Any], limit_bytes: int | None
) -> Result:
    """status: "oom" where more than limit_bytes is needed, else "ok". No metric, no time: nothing ran."""
    blank = blank_result(config, varied, world_size=prediction.world_size)
    fits = limit_bytes is None or prediction.needed_bytes <= limit_bytes
    return replace(
        blank,
        status="ok" if fits else "oom",
        predicted=True,
        message=describe(prediction, limit_bytes),
        batch_size=prediction.batch_size,
        conditions={
            **blank.conditions,
            "microbatch_size": prediction.microbatch_size,
            "image_size": list(prediction.image_size),
            "target": prediction.target,
            **({} if prediction.num_classes is None else {"num_classes": prediction.num_classes}),
        },
        num_trainable_params=prediction.num_trainable_params,
        num_total_params=prediction.num_total_params,
        memory={**prediction.memory, "place": prediction.place},
        seconds={"total": prediction.seconds},
    )


def describe(prediction: Prediction, limit_bytes: int | None = None) -> str:
    """The peak, where it stands, and whether it fits, in one line."""
    phase, place = prediction.memory["peak"]["phase"], prediction.place
    text = f"estimated peak {show_size(prediction.peak_bytes)} in {phase}"
    text += f" at {place}" if place else ""
    if prediction.evaluation_bytes > prediction.peak_bytes:
        text += f"; an evaluation batch takes more, {show_size(prediction.evaluation_bytes)}"
    if limit_bytes is not None:
        verb = "fits" if prediction.needed_bytes <= limit_bytes else "does not fit"
        text += f"; {verb} into {show_size(limit_bytes)}"
    return "; ".join([text, *prediction.notes])


def write_estimate(result: Result, config: Config) -> Path:
    """<output_dir>/<name>/result.json and config.yaml; returns the folder.

    config.yaml has the batch that was estimated. ValueError over anything but an earlier estimate.
    """
    folder = Path(config.output_dir) / config.name
    training = config.training.model_copy(update={"batch_size": result.batch_size})
    with locked(folder):
        if (folder / "config.yaml").exists() and not _holds_an_estimate(folder):
            raise ValueError(f"{folder} holds a run: give the estimates another --output, or another name")
        write_yaml(folder / "config.yaml", to_dict(config.model_copy(update={"training": training})))
        write_result(folder, result)
    return folder


def _holds_an_estimate(folder: Path) -> bool:
    return (folder / "result.json").exists() and read_result(folder).predicted
