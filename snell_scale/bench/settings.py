"""What a benchmark is asked to do, checked before anything is built. No torch: the command line stays quick."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

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
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"--sparsity is {self.sparsity}; expected a share of zeros in [0, 1)")
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


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device is {device!r}; expected cpu, cuda or cuda:N")
