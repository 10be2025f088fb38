"""The types that models, tasks, data, tuners and engines meet in; no behaviour lives here."""

from snell_scale.interfaces.components import ModelBundle, StepOutput, Task, Tuner
from snell_scale.interfaces.data import Batch, DataBundle, InputSpec, SampleKey
from snell_scale.interfaces.engine import Engine, ShardWriter, StepPlan
from snell_scale.interfaces.ranks import Failure, Ranks

__all__ = [
    "Batch",
    "DataBundle",
    "Engine",
    "Failure",
    "InputSpec",
    "ModelBundle",
    "Ranks",
    "SampleKey",
    "ShardWriter",
    "StepOutput",
    "StepPlan",
    "Task",
    "Tuner",
]
