"""The parts of a run without memory: model, method and engine as a run builds them, on fake tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from snell_scale.config import Config
from snell_scale.engines.torch_engine import TorchEngine
from snell_scale.estimate.fake_engines import fake_engine
from snell_scale.estimate.inputs import Inputs, without_weights
from snell_scale.interfaces import DataBundle, ModelBundle, StepPlan, Task, Tuner
from snell_scale.models.activation_checkpointing import checkpoint_activations
from snell_scale.optimization import AveragedWeights, make_optimizer

_CPU = torch.device("cpu")
_STEPS = 1000


@dataclass(frozen=True)
class FakeRun:
    """What a step is made of. Everything is used inside `mode` only."""

    mode: FakeTensorMode
    bundle: ModelBundle
    task: Task
    tuner: Tuner
    engine: TorchEngine
    forward: nn.Module
    averages: AveragedWeights | None
    num_total_params: int


def build(config: Config, inputs: Inputs, *, plan: StepPlan, world_size: int) -> FakeRun:
    """The parts of one rank of the run, no weight read and none allocated.

    FSDP2 wants a process group (`fake_engines.process_group`). ValueError as `assemble` raises it for model, task
    and method.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a task's tables: a noise schedule
    with torch.device("meta"):
        bundle = without_weights(config.model).build(
            num_classes=inputs.num_classes, input_spec=inputs.image, seed=config.seed
        )
        num_total = sum(p.numel() for p in bundle.module.parameters())
        tuner = config.method.apply(bundle, total_steps=_STEPS, steps_per_epoch=1, seed=config.seed)
    task = _for_training(config.task).build(data=_no_data(bundle, inputs), model=bundle)
    config.engine.check_module(tuner.module)
    if config.training.activation_checkpointing:
        checkpoint_activations(bundle.module, bundle.wrap_points)
    blocks = [bundle.module.get_submodule(name) for name in bundle.wrap_points]
    frozen = torch.bfloat16 if config.engine.frozen_dtype == "bf16" else None
    with mode:
        _give_shapes(tuner.module, frozen_dtype=frozen)
        engine = fake_engine(config.engine, world_size)
        forward = engine.setup(
            tuner.module,
            lambda module: make_optimizer(module, config.training, no_decay=tuner.no_decay),
            blocks=blocks,
            plan=plan,
        )
        if tuner.needs_selection:
            tuner.select_by_shape()
        tuner.bind(engine)
        decay = config.training.ema_decay
        averages = AveragedWeights(tuner.module, decay) if decay else None
    tuner.module.train()
    return FakeRun(mode, bundle, task, tuner, engine, forward, averages, num_total)


def _for_training(task: Any) -> Any:
    """The same task without the models that only evaluation asks, and without class names, which are made up."""
    absent = {"class_weights": {}, "fid_backend": None, "clip": None, "dino": None}
    return task.model_copy(update={key: value for key, value in absent.items() if key in type(task).model_fields})


def _no_data(bundle: ModelBundle, inputs: Inputs) -> DataBundle:
    """Enough of a data set for a task to be built: it looks at names, fields and sizes."""
    nothing: Any = ()
    return DataBundle(
        train=nothing,
        validation=nothing,
        test=nothing,
        class_names=tuple(f"class {number}" for number in range(inputs.num_classes)),
        input_spec=bundle.input_spec,
        sizes={"train": _STEPS, "validation": _STEPS, "test": _STEPS},
        fields=frozenset({"image", "label", "mask", "text", "caption", "index", "image_id"}),
        captions=("a caption",),
    )


def _give_shapes(module: nn.Module, *, frozen_dtype: torch.dtype | None) -> None:
    """Fake tensors in place of those on the meta device; what is shared stays shared. Inside the fake mode."""
    made: dict[
        torch.Tensor, torch.Tensor
    ] = {}  # by the tensor itself, which it keeps: none gets the id of another
    # Walked once and to its end before anything changes: peft's attention makes its weights anew at every walk.
    for child in list(module.modules()):
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                child._parameters[name] = _fake_parameter(parameter, made, frozen_dtype)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = made.setdefault(buffer, _empty_as(buffer, buffer.dtype))


def _fake_parameter(
    parameter: nn.Parameter, made: dict[torch.Tensor, torch.Tensor], frozen_dtype: torch.dtype | None
) -> nn.Parameter:
    if parameter not in made:
        is_cast = frozen_dtype is not None and not parameter.requires_grad and parameter.is_floating_point()
        value = _empty_as(parameter, frozen_dtype if is_cast and frozen_dtype else parameter.dtype)
        made[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    found = made[parameter]
    assert isinstance(found, nn.Parameter)
    return found


def _empty_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype, device=_CPU)
