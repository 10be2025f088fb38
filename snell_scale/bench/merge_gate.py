"""The gate of `bench merge`: ours and the baseline against the reference in float64, on the timed tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snell_scale.bench.cpu_libraries import products_of
from snell_scale.bench.layer_sides import Layer, MergedLinear, between_rounds
from snell_scale.bench.memory import clear_gradients
from snell_scale.bench_records import Gate
from snell_scale.kernels.merge.reference import gate_reference, kernel_matrix_reference

# Relative Frobenius error. float32: sums of some thousand terms are good to 1e-6; 20 times that. bfloat16 keeps
# 8 bits: the merged weight, dy·x and the output are each rounded once, 2^-9 at the most; 10 times that.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# An entry this close to the threshold, as a share of it, may fall on either side of it in float32.
_TIE = 1e-4
_MAX_TOKENS = 256
_BLOCK_BYTES = 1 << 27
_SCALE = 0.1


@dataclass(frozen=True)
class _Truth:
    """K and the published factor of one layer in float64, from the reference; (out, in)."""

    A: Tensor
    B: Tensor
    K: Tensor
    mask: Tensor
    tau: float


def gate_layer(case: str, layer: Layer, sides: dict[str, Callable[[Layer], nn.Module]]) -> list[Gate]:
    """Every check of every side; `sides` make a module from a layer, as `layer_sides.side_module` does.

    The weight is scaled to the size of ΔW, whose errors would drown in W0's rounding otherwise. A side that
    remembers thresholds is checked twice, the second time as it is timed: after a step of the optimizer, with
    the search starting from what is remembered.
    """
    truth = _truth(layer)
    small = _shrunk(layer, truth)
    gates = []
    for name, build in sides.items():
        with products_of(name):
            module, unit_module = build(small), build(_without_weight(layer))
            gates += _checks(case, name, module, unit_module, small, truth)
            if isinstance(module, MergedLinear):
                between_rounds(name, module)
                _copy_factors(module, unit_module)
                moved = replace(layer, A=module.A.detach().clone(), B=module.B.detach().clone())
                gates += _checks(case, f"{name}, warm", module, unit_module, small, _truth(moved))
    return gates


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64."""
    truth = truth.double()
    return float(torch.linalg.vector_norm(value.double() - truth) / torch.linalg.vector_norm(truth))


def _truth(layer: Layer) -> _Truth:
    A, B = layer.A[0].double(), layer.B[0].double()
    with torch.no_grad():
        K = torch.cat([_kernel_rows(A, B[:, rows]) for rows in _row_blocks(A, B)])
        mask = gate_reference(K, layer.sparsity, weighting="hard") != 0
    return _Truth(A, B, K, mask, tau=float(K.abs()[~mask].max()))


def _shrunk(layer: Layer, truth: _Truth) -> Layer:
    """Few tokens, and a weight of the size of ΔW."""
    delta = truth.K * truth.K.abs() * truth.mask
    weight = layer.weight * (delta.std() / layer.weight.double().std()).to(layer.weight.dtype)
    return layer.of_tokens(_MAX_TOKENS, weight=weight)


def _without_weight(layer: Layer) -> Layer:
    """Whose product with the unit matrix is ΔW."""
    return layer.of_tokens(1, weight=torch.zeros_like(layer.weight))


@torch.no_grad()
def _copy_factors(source: MergedLinear, target: nn.Module) -> None:
    assert isinstance(target, MergedLinear)
    target.A.copy_(source.A)
    target.B.copy_(source.B)


def _checks(
    case: str, name: str, module: nn.Module, unit_module: nn.Module, small: Layer, truth: _Truth
) -> list[Gate]:
    """Mask, output and gradients of one forward and backward.

    The true gradients are those under the side's own mask, which may differ from the true one in ties only.
    """
    unit = torch.eye(small.weight.shape[1], dtype=small.weight.dtype, device=small.weight.device)
    with torch.no_grad():
        mask = unit_module(unit).T != 0
    differing = mask != truth.mask
    distance = (truth.K.abs() - truth.tau).abs() / truth.tau
    worst = float(distance[differing].max()) if bool(differing.any()) else 0.0
    of_mask = Gate(case, f"{name}: mask differs only at the threshold", worst, _TIE)
    return [of_mask, *_errors(case, name, module, small, truth, mask=mask)]


def _errors(case: str, name: str, module: nn.Module, small: Layer, truth: _Truth, *, mask: Tensor) -> list[Gate]:
    """Output and gradients against the truth under this mask."""
    weight = small.weight.double() + truth.K * truth.K.abs() * mask
    x, dy = small.x.clone().requires_grad_(), small.dy.double()
    clear_gradients(list(module.parameters()))
    y = module(x)
    y.backward(small.dy)
    factors = dict(module.named_parameters())
    true_dA, true_dB = _factor_gradients(truth, dy.T @ small.x.double(), mask)
    pairs = {
        "y": (y.detach(), small.x.double() @ weight.T),
        "dx": (x.grad, dy @ weight),
        "dA": (factors["A"].grad, true_dA.unsqueeze(0)),
        "dB": (factors["B"].grad, true_dB.unsqueeze(0)),
    }
    limit = LIMITS[small.x.dtype]
    gates = []
    for what, (value, true) in pairs.items():
        error = float("nan") if value is None else relative_error(value, true)
        gates.append(Gate(case, f"{name}: relative error of {what}", error, limit))
    return gates


def _factor_gradients(truth: _Truth, G: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """dA, dB of Σ G ⊙ ΔW by autograd through the reference, a block of rows at a time."""
    A, B = truth.A.clone().requires_grad_(), truth.B.clone().requires_grad_()
    for rows in _row_blocks(A, B):
        K = _kernel_rows(A, B[:, rows])
        gate = K.detach().abs() * mask[rows]
        (K * gate * G[rows]).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    return A.grad, B.grad


def _kernel_rows(A: Tensor, B: Tensor) -> Tensor:
    return kernel_matrix_reference(A, B, kernel="distance", scale=_SCALE, kernel_params={})


def _row_blocks(A: Tensor, B: Tensor) -> list[slice]:
    """The reference makes an (out, in, r/H) tensor per component: this many rows of it at a time."""
    num_rows = max(1, _BLOCK_BYTES // (8 * A.numel()))
    return [slice(start, start + num_rows) for start in range(0, B.shape[1], num_rows)]
