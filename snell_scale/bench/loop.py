"""`snell-scale bench loop`: what the product's training loop costs beside model, loss and optimizer."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snell_scale.assembly import assemble
from snell_scale.bench.loop_sides import BareLoop, image_size_of, loop_config
from snell_scale.bench.progress import BenchProgress
from snell_scale.bench.report import Findings
from snell_scale.bench.settings import LoopSettings
from snell_scale.bench.timing import Timings, check_not_interrupted, rows_of, spread_of
from snell_scale.bench_records import Aim, Gate
from snell_scale.config import Config
from snell_scale.engines.checkpoint import Checkpoints
from snell_scale.interfaces import Ranks
from snell_scale.loop import train
from snell_scale.models.timm.config import TimmConfig
from snell_scale.optimization import trainable_parameters
from snell_scale.preparation import set_up
from snell_scale.progress import Silent
from snell_scale.records import read_steps
from snell_scale.signals import StopFlag, StopVote
from snell_scale.training import Training

_BARE, _LOOP = "bare", "loop"
_SHARE_LIMIT = 0.01
# As many layers and tensors as the model has, and the same images; but 4 patches, and almost no width.
_THIN = {"embed_dim": 48, "num_heads": 2}
_THIN_ROUNDS, _THIN_STEPS = 40, 10
_VISION_TRANSFORMERS = ("vit_", "deit_", "test_vit")
# On CPU the two sides call the same operators on the same numbers. On CUDA some add up in no fixed order.
_LIMITS = {"cpu": 0.0, "cuda": 1e-4}


@dataclass(frozen=True)
class _Case:
    """One model: `rounds` of `steps` steps of each side."""

    name: str
    config: Config
    rounds: int
    steps: int


class _Enough(Exception):
    """All rounds are done."""


class _Turns(StopVote):
    """In place of the run's vote, which the loop calls before every step: after each window the bare loop runs.

    So both sides take turns within one call of train(), and a window of the loop holds all that it does from one
    step to the next, its real vote too. The first window of both is warm-up, after which `check` may refuse.
    """

    def __init__(
        self, ranks: Ranks, bare: BareLoop, case: _Case, *, check: Callable[[Training, Tensor], None]
    ) -> None:
        super().__init__(StopFlag(), ranks)
        self.timings = Timings({_BARE: [], _LOOP: []})
        self.on_round: Callable[[int], None] | None = None
        self._bare, self._case, self._check = bare, case, check
        self._num_steps = 0
        self._started = 0.0
        self._run: Training | None = None

    def take(self, run: Training) -> None:
        """All rounds, or those before Ctrl-C."""
        self._run = run
        try:
            with contextlib.suppress(_Enough):
                train(run)
        except KeyboardInterrupt:
            self.timings.interrupted = True

    def __call__(self) -> bool:
        if self._num_steps % self._case.steps == 0:
            self._turn(self._num_steps // self._case.steps)
            self._started = self._now()
        self._num_steps += 1
        return super().__call__()

    def _turn(self, num_windows: int) -> None:
        if num_windows == 0:
            return
        loop_seconds = self._now() - self._started
        self._bare.prepare(self._case.steps)
        started = self._now()
        loss = self._bare.run()
        bare_seconds = self._now() - started
        if num_windows == 1:
            assert self._run is not None
            self._check(self._run, loss)
            return
        for side, seconds in ((_LOOP, loop_seconds), (_BARE, bare_seconds)):
            self.timings.milliseconds[side].append(1000 * seconds / self._case.steps)
        if self.on_round is not None:
            self.on_round(num_windows - 1)
        if num_windows - 1 == self._case.rounds:
            raise _Enough

    def _now(self) -> float:
        """At the edges of windows only is the device waited for."""
        if self._bare.device.type == "cuda":
            torch.cuda.synchronize(self._bare.device)
        return time.perf_counter()


def bench_loop(settings: LoopSettings, progress: BenchProgress, findings: Findings | None = None) -> Findings:
    """A thin copy of the model, where the loop's own time shows; then the model itself, side by side.

    RedGate where the two sides do not compute the same.
    """
    findings = Findings() if findings is None else findings
    thin, whole = _cases(settings)
    own_ms = _overheads(_bench_case(thin, findings, progress))
    timings = _bench_case(whole, findings, progress)
    findings.aims += _aims(whole.name, own_ms, timings)
    return findings


def _cases(settings: LoopSettings) -> tuple[_Case, _Case]:
    """(thin, as asked for). ValueError for a model that timm does not know, or that cannot be made thin."""
    TimmConfig(architecture=settings.model).check()
    image_size = image_size_of(settings.model)
    _, height, width = image_size
    if not settings.model.startswith(_VISION_TRANSFORMERS) or height != width or height % 2:
        raise ValueError(
            f"--model is {settings.model!r}; expected a vision transformer of timm's "
            f"({', '.join(f'{start}…' for start in _VISION_TRANSFORMERS)}), of which a thin copy can be made"
        )

    def case(name: str, arguments: Mapping[str, Any], rounds: int, steps: int) -> _Case:
        total = (1 + rounds) * steps
        config = loop_config(settings, arguments=arguments, image_size=image_size, steps=total, every=steps)
        return _Case(f"{name} batch {settings.batch_size} {settings.method}", config, rounds, steps)

    name = f"{settings.model} thin ({_THIN['embed_dim']} wide, 4 patches)"
    thin = case(name, {**_THIN, "patch_size": height // 2}, _THIN_ROUNDS, _THIN_STEPS)
    return thin, case(settings.model, {}, settings.repeats, settings.steps)


def _bench_case(case: _Case, findings: Findings, progress: BenchProgress) -> Timings:
    """Both sides in turns; adds gates and rows. KeyboardInterrupt once the rows of the rounds so far are kept."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ranks = stack.enter_context(case.config.engine.join())
        engine = case.config.engine.build(ranks)
        bare = BareLoop.of(case.config, engine.device)

        def check(run: Training, loss: Tensor) -> None:
            findings.add_gates(_gates(case.name, run, bare, loss))

        turns = _Turns(ranks, bare, case, check=check)
        checkpoints = Checkpoints(Path(folder) / "checkpoints", ranks, keep_last=1)
        run = set_up(assemble(case.config), engine, Path(folder), Silent(), turns, checkpoints=checkpoints)
        stack.enter_context(contextlib.closing(run.writer))
        turns.on_round = stack.enter_context(progress.rounds(f"{case.name}: the loop, a bare loop", case.rounds))
        turns.take(run)
    rows = rows_of(case.name, turns.timings, notes={_LOOP: f"synthetic images; a logged step in {case.steps}"})
    spread = spread_of(_overheads(turns.timings)) if turns.timings.milliseconds[_LOOP] else {}
    own = {f"overhead_ms{'' if name == 'median' else f'_{name}'}": value for name, value in spread.items()}
    findings.rows += [replace(row, figures=own) if row.side == _LOOP else row for row in rows if row.rounds]
    check_not_interrupted(turns.timings)
    return turns.timings


def _gates(case: str, run: Training, bare: BareLoop, loss: Tensor) -> list[Gate]:
    """After the warm-up's steps: the last logged loss, and every trained weight."""
    limit = _LIMITS[bare.device.type]
    logged, expected = float(read_steps(run.folder)[-1]["loss"]), loss.item()
    ours, theirs = dict(trainable_parameters(run.model)), dict(trainable_parameters(bare.module))
    assert ours.keys() == theirs.keys()
    apart = max((ours[name] - theirs[name]).detach().abs().max().item() for name in ours)
    largest = max(parameter.detach().abs().max().item() for parameter in theirs.values())
    return [
        Gate(case, "relative difference of the losses after the first steps", abs(logged / expected - 1), limit),
        Gate(case, "largest difference of a trained weight, over the largest weight", apart / largest, limit),
    ]


def _overheads(timings: Timings) -> list[float]:
    """Milliseconds a step of the loop takes longer than a bare one, round by round."""
    sides = timings.milliseconds
    return [ours - bare for ours, bare in zip(sides[_LOOP], sides[_BARE], strict=True)]


def _aims(case: str, own_ms: list[float], timings: Timings) -> list[Aim]:
    """The loop's own time as a share of a step: measured where it shows, and side by side."""
    own, step = spread_of(own_ms)["median"], spread_of(timings.milliseconds[_BARE])["median"]
    sides = timings.milliseconds
    shares = [ours / bare - 1 for ours, bare in zip(sides[_LOOP], sides[_BARE], strict=True)]
    beside = spread_of(shares)
    return [
        Aim(
            case,
            "the loop's own time (of the thin copy) / step",
            _SHARE_LIMIT,
            own / step,
            note=f"{own:.2f} ms of {step:.0f} ms",
        ),
        Aim(
            case,
            "loop / bare loop - 1, side by side",
            _SHARE_LIMIT,
            beside["median"],
            note=f"p10–p90 {100 * beside['p10']:+.2f} to {100 * beside['p90']:+.2f} %",
        ),
    ]
