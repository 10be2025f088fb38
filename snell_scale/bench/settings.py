"""What a benchmark is asked to do, checked before anything is built. No torch: the command line stays quick."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snell_scale.registry import nearest

LAYER_SIDES = ("frozen", "lora", "shira", "full", "naive", "snell", "snell-cold")
STEP_SIDES = ("probe", "lora", "shira", "full", "naive", "snell")
# Ours with the library that F.linear calls, where the op would take a faster one: on CPU, in float32.
MKL_SIDE = "snell-mkl"
DTYPES = ("float32", "bfloat16")
IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")
GPU_ITEMS = ("kernels", "steps", "unets", "layers")
# Whole models have SNELL layers, which choose the implementation themselves.
_WITHOUT_IMPLEMENTATION = ("steps", "unets")
NUM_COMPONENTS = 2
# Those with nothing to do between two steps: a bare loop can do the same.
METHODS = ("probe", "bias", "full", "lora", "shira", "klora", "snell")
# Engine by side: what a config says of it.
ENGINES: Mapping[str, Mapping[str, str | int]] = {
    "single": {"name": "single"},
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}


@dataclass(frozen=True)
class Common:
    """What both benchmarks have. repeats: timed rounds. threads: torch's CPU threads, None as torch chooses."""

    sides: tuple[str, ...]
    repeats: int
    sparsity: float
    device: str
    dtype: str
    threads: int | None
    seed: int

    def check(self, known_sides: Sequence[str]) -> None:
        """ValueError that names what is wrong and what is valid."""
        valid = [*known_sides, MKL_SIDE]
        for side in self.sides:
            if side not in valid:
                raise ValueError(f"--sides has {side!r}, {nearest(side, valid)}")
        _check_some("--sides", self.sides, valid)
        _check_choice("--dtype", self.dtype, DTYPES)
        if MKL_SIDE in self.sides and (self.device != "cpu" or self.dtype != "float32"):
            raise ValueError(
                f"--sides has {MKL_SIDE!r}, which is about libraries on CPU in float32: leave it out, or give "
                "--device cpu --dtype float32"
            )
        _check_sparsity(self.sparsity)
        _check_device(self.device)


@dataclass(frozen=True)
class MergeSettings(Common):
    """`bench merge`: one layer per shape, given as (in, out)."""

    shapes: tuple[tuple[int, int], ...]  # (in, out)
    tokens: int
    rank: int
    implementation: str

    def check_all(self) -> None:
        self.check(LAYER_SIDES)
        _check_choice("--implementation", self.implementation, IMPLEMENTATIONS)
        check_rank(self.rank, smallest=min(min(shape) for shape in self.shapes))


@dataclass(frozen=True)
class StepSettings(Common):
    """`bench step`: a training step of a timm model, once per rank."""

    model: str
    batch_size: int
    ranks: tuple[int, ...]

    def check_all(self) -> None:
        self.check(STEP_SIDES)
        for rank in self.ranks:
            check_rank(rank)


@dataclass(frozen=True)
class GpuSettings:
    """`bench gpu`: a fixed set, of which `items` are run; `small` at sizes for a test of the command on CPU."""

    items: tuple[str, ...]
    small: bool
    device: str
    implementation: str
    threads: int | None
    seed: int

    def check_all(self) -> None:
        for item in self.items:
            _check_choice("--items", item, GPU_ITEMS)
        _check_some("--items", self.items, GPU_ITEMS)
        _check_choice("--implementation", self.implementation, IMPLEMENTATIONS)
        ignoring = [item for item in self.items if item in _WITHOUT_IMPLEMENTATION]
        if self.implementation != "auto" and ignoring:
            taking = ",".join(item for item in GPU_ITEMS if item not in _WITHOUT_IMPLEMENTATION)
            raise ValueError(
                f"--implementation is {self.implementation!r}, but {' and '.join(ignoring)} run whole models, "
                f"whose layers choose by themselves: give --items {taking} or --implementation auto"
            )
        _check_device(self.device)
        if self.device == "cpu" and not self.small:
            raise ValueError(
                "--device is 'cpu': the set is sized for a GPU; add --small to try the command on CPU"
            )

    @property
    def dtype(self) -> str:
        return "float32" if self.small else "bfloat16"


@dataclass(frozen=True, kw_only=True)
class _TrainingSettings:
    """What the benchmarks have that train by a run's own code."""

    model: str
    batch_size: int
    method: str
    rank: int
    sparsity: float
    steps: int
    repeats: int
    device: str
    threads: int | None
    seed: int
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class LoopSettings(_TrainingSettings):
    """`bench loop`: the product's loop against a bare one. steps: of one side in a round; repeats: rounds."""

    def check_all(self) -> None:
        _check_choice("--method", self.method, METHODS)
        check_rank(self.rank)
        _check_sparsity(self.sparsity)
        _check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class EnginesSettings(_TrainingSettings):
    """`bench engines`: a run by every engine on every number of processes, `repeats` times.

    depth: blocks of the model; None as it has. threads: CPU threads that the processes of a run share.
    """

    engines: tuple[str, ...]
    processes: tuple[int, ...]
    depth: int | None
    image_size: int

    def check_all(self) -> None:
        _check_some("--engines", self.engines, list(ENGINES))
        for engine in self.engines:
            _check_choice("--engines", engine, list(ENGINES))
        for option, values in (("--engines", self.engines), ("--processes", self.processes)):
            if len(set(values)) < len(values):
                raise ValueError(f"{option} is {','.join(map(str, values))}: name each once")
        self._check_processes()
        _check_choice("--method", self.method, METHODS)
        check_rank(self.rank)
        _check_sparsity(self.sparsity)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"--device is {self.device!r}; expected cpu or cuda, of which each process takes one"
            )

    def cells(self) -> list[tuple[str, int]]:
        """(engine, processes), each of them one row; the single engine is one process."""
        return [(engine, n) for n in self.processes for engine in self.engines if engine != "single" or n == 1]

    def _check_processes(self) -> None:
        for count in self.processes:
            if count < 1:
                raise ValueError(f"--processes has {count}; expected numbers from 1 on, e.g. 1,2")
            if self.batch_size % count:
                raise ValueError(
                    f"--batch-size is {self.batch_size}, which does not divide among {count} processes: choose a "
                    "multiple"
                )
        if not self.cells():
            raise ValueError(
                f"--engines is single and --processes {','.join(map(str, self.processes))}: that engine is one "
                "process; add 1 to --processes, or another engine"
            )


def method_settings(name: str, rank: int, *, sparsity: float, targets: str) -> dict[str, Any]:
    """What a config says of one of METHODS."""
    settings = {"name": name, "r": rank, "targets": targets}
    return {**settings, "sparsity": sparsity} if name == "snell" else settings


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,2" as numbers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.lstrip("-").isdigit() for part in parts):
        raise ValueError(f"{option} is {text!r}; expected whole numbers between commas, e.g. 1,2")
    return tuple(int(part) for part in parts)


def check_rank(rank: int, *, smallest: int | None = None) -> None:
    """SNELL's rank is shared by its components, and no larger than the matrix."""
    if rank < NUM_COMPONENTS or rank % NUM_COMPONENTS:
        raise ValueError(
            f"--rank is {rank}; expected an even number, for SNELL's two components share it, e.g. 8"
        )
    if smallest is not None and rank > smallest:
        raise ValueError(f"--rank is {rank}, larger than the smallest side of a shape, {smallest}: lower it")


def parse_shape(text: str) -> tuple[int, int]:
    """ "1280x5120" (or with × or →): a layer of 1280 in and 5120 out features."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX×→]\s*(\d+)\s*", text)
    if match is None or not (int(match[1]) and int(match[2])):
        raise ValueError(f"--shape is {text!r}; expected INxOUT in features, e.g. 1280x5120")
    return int(match[1]), int(match[2])


def shape_name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}→{shape[1]}"


def _check_choice(option: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{option} is {value!r}, {nearest(value, list(valid))}")


def _check_some(option: str, values: Sequence[str], valid: Sequence[str]) -> None:
    if not values:
        raise ValueError(f"{option} is empty; valid: {', '.join(valid)}")


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"--sparsity is {sparsity}; expected a share of zeros in [0, 1)")


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device is {device!r}; expected cpu, cuda or cuda:N")
