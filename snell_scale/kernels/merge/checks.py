"""What the public functions refuse: every message says what came, what was expected and what to do."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .choice import IMPLEMENTATIONS
from .delta import KERNEL_PARAMETERS, WEIGHTINGS


def check_names(kernel: str, weighting: str, implementation: str) -> None:
    """Kernel, weighting and implementation exist."""
    for what, name, valid in (
        ("kernel", kernel, KERNEL_PARAMETERS),
        ("weighting", weighting, WEIGHTINGS),
        ("implementation", implementation, IMPLEMENTATIONS),
    ):
        if name not in valid:
            raise ValueError(f"unknown {what} {name!r}{_nearest(name, valid)}; choose one of {', '.join(valid)}")


def check_factors(A: Tensor, B: Tensor) -> None:
    """A (G, H, in, r/H) and B (G, H, out/G, r/H), or both without G; floating point, one dtype."""
    came = f"A {tuple(A.shape)} {A.dtype} and B {tuple(B.shape)} {B.dtype}"
    if A.dim() != B.dim() or A.dim() not in (3, 4):
        raise ValueError(
            f"got {came}; expected A (G, H, in, r/H) and B (G, H, out/G, r/H), or both 3-D for one matrix: "
            "give both factors the same number of dimensions, 3 or 4"
        )
    if A.shape[:-2] != B.shape[:-2] or A.shape[-1] != B.shape[-1] or 0 in A.shape or 0 in B.shape:
        raise ValueError(
            f"got {came}; their groups G, components H and ranks r/H (last) must be equal and not 0: "
            "build both factors from one rank and one number of components"
        )
    if A.dtype != B.dtype or not A.dtype.is_floating_point:
        raise ValueError(f"got {came}; expected one floating dtype: keep both factors in float32")


def check_weight(A: Tensor, B: Tensor, shape: Sequence[int], *, num_in: int) -> None:
    """The factors fit a weight of this shape, seen as a matrix (out, num_in)."""
    num_groups = A.shape[0] if A.dim() == 4 else 1
    fits = (num_groups * B.shape[-2], A.shape[-2])
    if (shape[0], num_in) != fits:
        raise ValueError(
            f"the factors A {tuple(A.shape)} and B {tuple(B.shape)} make a delta of {fits}, but the weight "
            f"{tuple(shape)} is a matrix of {(shape[0], num_in)}: A needs in = {num_in} rows, and B out/G rows "
            f"with G * rows = {shape[0]}"
        )


def check_dtypes(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, is_autocast: bool) -> None:
    """x, weight and bias agree as F.linear wants them to; autocast has rounded x and bias, not the weight."""
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}; expected a floating dtype: convert x first")
    if weight is not None and weight.dtype != x.dtype and not is_autocast:
        raise ValueError(
            f"x is {x.dtype} but weight is {weight.dtype}; expected one dtype: convert x to {weight.dtype}, or "
            "run under torch.autocast"
        )
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} but bias is {bias.dtype}; expected one dtype: convert the bias")


def check_bias(bias: Tensor | None, *, num_out: int) -> None:
    """One bias per output."""
    if bias is not None and tuple(bias.shape) != (num_out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({num_out},), one per output feature")


def check_limit(transient_limit_bytes: int) -> None:
    """A positive number of bytes; however small, one tile of columns is always taken."""
    if (
        isinstance(transient_limit_bytes, bool)
        or not isinstance(transient_limit_bytes, int)
        or transient_limit_bytes < 1
    ):
        raise ValueError(
            f"transient_limit_bytes is {transient_limit_bytes!r}; expected a positive whole number: give bytes, "
            "e.g. 64 * 2**20"
        )


def check_memory(threshold_memory: Tensor | None, A: Tensor) -> None:
    """One bracket per group, beside the factors, float32 whatever they are."""
    if threshold_memory is None:
        return
    expected = ((A.shape[0], 2), torch.float32, A.device)
    came = (tuple(threshold_memory.shape), threshold_memory.dtype, threshold_memory.device)
    if came != expected or not threshold_memory.is_contiguous():
        raise ValueError(
            f"threshold_memory is {came[0]} {came[1]} on {came[2]}; expected {expected[0]} {expected[1]} on "
            f"{expected[2]}, contiguous: start with torch.full({expected[0]}, math.nan) in that dtype and place"
        )


def check_finite(factors: Sequence[Tensor]) -> None:
    """No NaN and no infinity in A, B and the kernel's parameters. Reads them back from their device."""
    if torch.compiler.is_compiling() or isinstance(factors[0], FakeTensor) or factors[0].is_meta:
        return
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise ValueError(
            "A, B or a kernel parameter holds NaN or infinity, so there is no delta: the training that made them "
            "diverged; go back to an earlier checkpoint"
        )


def named_params(
    kernel: str, kernel_params: Mapping[str, Tensor] | None, *, num_groups: int
) -> dict[str, Tensor]:
    """The kernel's parameters, exactly those it has, (G,) each."""
    given, needed = dict(kernel_params or {}), KERNEL_PARAMETERS[kernel]
    if set(given) != set(needed):
        raise ValueError(
            f"kernel_params has {sorted(given) or 'nothing'}; kernel {kernel!r} takes exactly "
            f"{sorted(needed) or 'nothing'}: add the missing, remove the others"
        )
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            raise ValueError(f"kernel_params[{name!r}] is {value!r}; expected a floating tensor: wrap it in one")
        if tuple(value.shape) != (num_groups,) and not (num_groups == 1 and value.dim() == 0):
            raise ValueError(
                f"kernel_params[{name!r}] has shape {tuple(value.shape)}; expected ({num_groups},), one per group"
            )
    return {name: value.reshape(-1) for name, value in given.items()}


def sparsity_per_group(
    sparsity: float | Sequence[float] | Tensor | None, *, num_groups: int
) -> tuple[float, ...] | Tensor | None:
    """None (dense), G floats in [0, 1), or a float64 tensor (G,) whose values nobody reads here."""
    if sparsity is None:
        return None
    if isinstance(sparsity, Tensor):
        if sparsity.dtype != torch.float64:
            raise ValueError(
                f"sparsity is a {sparsity.dtype} tensor; expected torch.float64, for the index of the threshold "
                "must be exact: keep it in float64 when the model is converted"
            )
        if tuple(sparsity.shape) != (num_groups,) and not (num_groups == 1 and sparsity.dim() == 0):
            raise ValueError(
                f"sparsity has shape {tuple(sparsity.shape)}; expected ({num_groups},), one per group"
            )
        return sparsity.reshape(-1)
    values = tuple(sparsity) if isinstance(sparsity, Sequence) else (sparsity,) * num_groups
    if len(values) != num_groups:
        raise ValueError(
            f"got {len(values)} sparsities for {num_groups} groups: give one number, or one per group"
        )
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < 1:
            raise ValueError(
                f"sparsity is {value!r}; expected a number in [0, 1), the share of entries set to zero: for a "
                "dense delta give None"
            )
    return tuple(float(value) for value in values)


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), valid, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
