"""From a config to the peak memory of one rank: by phase and category, and the module where the peak stands."""

import contextlib
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from snell_scale.config import Config
from snell_scale.data.batches import samples_per_forward
from snell_scale.estimate.fake_engines import process_group
from snell_scale.estimate.fake_run import FakeRun, build
from snell_scale.estimate.inputs import inputs_of
from snell_scale.estimate.settings import Target
from snell_scale.estimate.sharding import with_engine
from snell_scale.estimate.step import run_step
from snell_scale.interfaces import StepPlan


@dataclass(frozen=True)
class Prediction:
    """What a step of one rank needs. memory: as MemoryProbe reports it; place: of its peak, None outside of all.

    batch_size: of all ranks and microbatches together. notes: what the numbers leave out.
    num_classes: as it was given; None: the data said it.
    """

    memory: dict[str, Any]
    place: str | None
    num_trainable_params: int
    num_total_params: int
    world_size: int
    microbatch_size: int
    batch_size: int
    target: Target
    image_size: tuple[int, int]
    seconds: float
    notes: tuple[str, ...] = ()
    num_classes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Of the training step, as a run's record has it."""
        return self.memory["peak"]["total_bytes"]

    @property
    def evaluation_bytes(self) -> int:
        return self.memory["phases"]["evaluate"]["total_bytes"]

    @property
    def needed_bytes(self) -> int:
        """What a device must have: of the training step or of an evaluation batch, whichever takes more."""
        return max(self.peak_bytes, self.evaluation_bytes)


@dataclass
class Estimator:
    """Estimates of one config on so many ranks; use it in a with-block, and for several microbatches.

    num_classes: given, no data are read. target: whose kernels the merge op is taken to run; None: CUDA's, unless
    engine.device is "cpu".
    ValueError for what a run would be refused for, and for methods that have no form without values.
    """

    config: Config
    world_size: int = 1
    num_classes: int | None = None
    target: Target | None = None
    _run: FakeRun = field(init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)

    def __enter__(self) -> "Estimator":
        started = time.perf_counter()
        _check(self.config, self.world_size)
        self._inputs = inputs_of(self.config, self.num_classes)
        if self.config.engine.name == "fsdp2":
            self._stack.enter_context(process_group(self.world_size))
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            self._run = build(self.config, self._inputs, plan=self._plan(1, 1), world_size=self.world_size)
            undo.pop_all()
        self._build_seconds = time.perf_counter() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._run
        self._stack.close()

    def predict(self, microbatch_size: int | None = None, gradient_accumulation: int | None = None) -> Prediction:
        """microbatch_size: samples of one forward on one rank. None: what the config makes them."""
        accumulation = gradient_accumulation or self.config.training.gradient_accumulation
        size = microbatch_size or microbatch_of(self.config, self.world_size)
        target = self.target or ("cpu" if self.config.engine.device == "cpu" else "cuda")
        started = time.perf_counter()
        peaks = run_step(
            self._run,
            self._inputs,
            self._plan(size, accumulation),
            target=target,
            evaluation_size=self.config.evaluation.batch_size,
        )
        memory, notes = with_engine(
            self.config.engine, peaks.memory, self._run, world_size=self.world_size, accumulates=accumulation > 1
        )
        return Prediction(
            memory=memory,
            place=peaks.place,
            num_trainable_params=self._run.tuner.num_trainable(),
            num_total_params=self._run.num_total_params,
            world_size=self.world_size,
            microbatch_size=size,
            batch_size=size * accumulation * self.world_size,
            target=target,
            image_size=(self._inputs.image.height, self._inputs.image.width),
            seconds=self._build_seconds + time.perf_counter() - started,
            notes=notes,
            num_classes=self.num_classes,
        )

    def trains_batch_norms(self) -> bool:
        """Whether a batch norm's own weights train, and with them its statistics."""
        norms = (child for child in self._run.tuner.module.modules() if isinstance(child, _BatchNorm))
        return any(p.requires_grad for norm in norms for p in norm.parameters())

    def _plan(self, microbatch_size: int, accumulation: int) -> StepPlan:
        return StepPlan(microbatch_size, accumulation, self.config.training.clip_grad_norm)


def microbatch_of(config: Config, world_size: int) -> int:
    """The config's batch, divided among ranks and accumulation. ValueError where that does not come out."""
    training = config.training
    try:
        return samples_per_forward(training.batch_size, training.gradient_accumulation, world_size)
    except ValueError as error:
        raise ValueError(f"training.{error}; or give --microbatch N") from error


def _check(config: Config, world_size: int) -> None:
    if config.engine.name == "single" and world_size > 1:
        raise ValueError(
            f"engine.name is 'single', but --world-size is {world_size}; choose --engine ddp, fsdp2 or deepspeed"
        )
    config.engine.check_run(config)
    if config.method.name == "shira":
        raise ValueError(
            "method.name=shira has no estimate: peft adds sparse tensors to the weights, which have no form "
            "without values; method.name=gps is the sparse method that has one"
        )
    if config.training.compile:
        raise ValueError(
            "training.compile has no estimate: what compiled code allocates is known once it is compiled; set it "
            "to false for the estimate, which is then an upper bound in most cases"
        )
