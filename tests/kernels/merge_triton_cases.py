"""What the tests of the Triton implementation share: deltas in float32 with their truth in float64.

The kernels run on the GPU where there is one, and through Triton's interpreter elsewhere, which tests/conftest.py
asks for before anything imports triton.
"""

import sys

import torch
from torch import Tensor

from snell_scale.kernels.merge import triton_impl
from snell_scale.kernels.merge.delta import KERNEL_PARAMETERS, Delta

from .merge_cases import MergeCase, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (groups, rows, columns, rank, components): one entry; one number per component; tiles cut off in both
# directions, several tiles, a padded rank and, from 4097 entries, thresholds from a bracket.
Shape = tuple[int, int, int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 1, 1, 1, 1), (3, 7, 5, 2, 2), (2, 33, 65, 16, 4), (1, 130, 70, 10, 2))


def require_interpreter_or_gpu() -> None:
    """Fails with the reason where triton was imported before its interpreter was asked for."""
    triton = sys.modules.get("triton")
    if DEVICE == "cpu" and triton is not None:
        from triton.runtime.interpreter import InterpretedFunction

        standard = sys.modules["triton.language.standard"]
        assert isinstance(standard.cdiv, InterpretedFunction), (
            "triton was imported before TRITON_INTERPRET=1 was set: set it at the top of tests/conftest.py"
        )


def make_delta(
    kernel: str,
    shape: Shape,
    *,
    weighting: str = "magnitude",
    sparsity: float | None = 0.6,
) -> tuple[Delta, MergeCase]:
    """A float32 delta on the test device and the float64 case that holds the very same numbers, on the CPU."""
    groups, rows, columns, rank, components = shape
    case = make_case(
        kernel, weighting=weighting, sparsity=sparsity, groups=groups, rows=rows, num_in=columns, rank=rank,
        components=components,
    )  # fmt: skip
    for leaf in case.leaves().values():
        leaf.data = leaf.detach().float().double()
    params = [case.settings["kernel_params"][name].detach() for name in KERNEL_PARAMETERS[kernel]]
    A, B, *params = (each.detach().float().to(DEVICE).contiguous() for each in (case.A, case.B, *params))
    return Delta(A, B, params, kernel, weighting, case.settings["scale"], sparsity is None), case


def exact_taus(delta: Delta, logs: Tensor | None, *, sparsity: float | None = 0.6) -> Tensor | None:
    """τ at rank ⌊s(mn − 1)⌋ of every group, by a sort; None for a dense delta."""
    if sparsity is None:
        return None
    return magnitudes(delta, logs).sort(dim=1).values[:, int(sparsity * (delta.num_entries - 1))].contiguous()


def magnitudes(delta: Delta, logs: Tensor | None) -> Tensor:
    """|K| as the kernels compute it, (G, rows·columns): a dense merge onto nothing."""
    dense = Delta(delta.A, delta.B, delta.params, delta.kernel, "hard", delta.scale, True)
    K = triton_impl.merge_columns(dense, None, logs, None, slice(0, delta.num_columns), torch.float32)
    return K.abs().view(delta.num_groups, delta.num_entries)
