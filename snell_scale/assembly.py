"""The parts of a run, built from its config on the CPU: every mistake in the config shows here."""

from dataclasses import dataclass

from snell_scale.config import Config
from snell_scale.data.batches import samples_per_forward, steps_per_epoch
from snell_scale.interfaces import DataBundle, ModelBundle, Task, Tuner
from snell_scale.trackers.following import check_trackers
from snell_scale.training import total_steps


@dataclass(frozen=True)
class Assembly:
    """The parts of a run, built on the CPU: no device has been touched yet."""

    config: Config
    data: DataBundle
    bundle: ModelBundle
    task: Task
    tuner: Tuner
    num_total_params: int
    num_trainable_params: int


def assemble(config: Config, *, world_size: int = 1) -> Assembly:
    """Build data, model, task and tuner on the CPU; no device is touched.

    ValueError for whatever does not fit, such as a batch that does not divide among `world_size` ranks.
    """
    config.engine.check()
    config.engine.check_run(config)
    config.data.check_run(config)
    check_trackers(config.logging.trackers)
    samples_per_forward(config.training.batch_size, config.training.gradient_accumulation, world_size)
    data, bundle = build_data_and_model(config)
    if config.training.batch_size > data.sizes["train"]:
        raise ValueError(
            f"training.batch_size={config.training.batch_size} is more than the {data.sizes['train']} training "
            "samples; lower it, or take more samples"
        )
    if config.training.activation_checkpointing and not bundle.wrap_points:
        raise ValueError(
            "training.activation_checkpointing=true, but this model lists no blocks to wrap; set it to false"
        )
    task = config.task.build(data=data, model=bundle)
    total_count = sum(p.numel() for p in bundle.module.parameters())
    tuner = config.method.apply(
        bundle,
        total_steps=total_steps(config, data),
        steps_per_epoch=steps_per_epoch(data.train, config.training.batch_size),
        seed=config.seed,
    )
    config.engine.check_module(tuner.module)
    return Assembly(config, data, bundle, task, tuner, total_count, tuner.num_trainable())


def build_data_and_model(config: Config) -> tuple[DataBundle, ModelBundle]:
    """The data as the model's weights expect them, and the model for them."""
    config.model.check()
    data = config.data.build(seed=config.data_seed, preprocessing=config.model.preprocessing())
    bundle = config.model.build(num_classes=len(data.class_names), input_spec=data.input_spec, seed=config.seed)
    return data, bundle
