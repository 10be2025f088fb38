"""The types that models, tasks, data, tuners and engines meet in; no behaviour lives here."""

from snell_scale.interfaces.components import (
    Diffusion,
    Encoders,
    Evaluation,
    ModelBundle,
    ModelOutput,
    StepOutput,
    Task,
    Tuner,
)
from snell_scale.interfaces.data import IGNORED_PIXEL, Batch, DataBundle, InputSpec, Preprocessing, SampleKey
from snell_scale.interfaces.engine import Engine, ShardWriter, StepPlan
from snell_scale.interfaces.ranks import Failure, Ranks

__all__ = [
    "IGNORED_PIXEL",
    "Batch",
    "DataBundle",
    "Diffusion",
    "Encoders",
    "Engine",
    "Evaluation",
    "Failure",
    "InputSpec",
    "ModelBundle",
    "ModelOutput",
    "Preprocessing",
    "Ranks",
    "SampleKey",
    "ShardWriter",
    "StepOutput",
    "StepPlan",
    "Task",
    "Tuner",
]
