"""K and its explicit gradients for every kernel, one matrix at a time; derivations in README.md.

`values` returns K and what `gradients` needs besides; `gradients` takes dK = ∂L/∂K and may overwrite it and that
state, for in the hot path every (out, in) buffer counts. Everything is in the factors' own dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Matrix:
    """What defines one K: A (H, in, r/H), B (H, out, r/H), the kernel's parameters (0-d), the scale c."""

    A: Tensor
    B: Tensor
    params: dict[str, Tensor]
    scale: float


@dataclass(frozen=True)
class PairKernel:
    """A kernel: names of its parameters, values(matrix, keep_state) and gradients(matrix, state, dK, wanted)."""

    parameters: tuple[str, ...]
    values: Callable[[Matrix, bool], tuple[Tensor, State]]
    gradients: Callable[[Matrix, State, Tensor, frozenset[str]], dict[str, Tensor]]


def _distance_values(matrix: Matrix, keep_state: bool) -> tuple[Tensor, State]:
    """K = Σ_h c (−1)^h d_h; state: the distances d_h."""
    K = None
    distances = []
    for h, coefficient in enumerate(_coefficients(matrix)):
        distance = _squared_distances(matrix.A[h], matrix.B[h]).sqrt_()
        if keep_state:
            distances.append(distance)
        if K is None:
            K = distance * coefficient if keep_state else distance.mul_(coefficient)
        else:
            K.add_(distance, alpha=coefficient)
    assert K is not None
    return K, tuple(distances)


def _distance_gradients(matrix: Matrix, state: State, dK: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """P_h = dK / d_h; the factor c (−1)^h is applied to the small results."""
    per_component = [
        _pull_back_difference(
            _divide_where_nonzero(dK, distance), matrix.A[h], matrix.B[h], coefficient=coefficient, wanted=wanted
        )
        for h, (distance, coefficient) in enumerate(zip(state, _coefficients(matrix), strict=True))
    ]
    return {name: torch.stack([each[name] for each in per_component]) for name in per_component[0]}


def _mixk_values(matrix: Matrix, keep_state: bool) -> tuple[Tensor, State]:
    """K' = K + α s + β with s = softmax_i(K/γ) over the out dimension; state: s, K, d_h."""
    K, distances = _distance_values(matrix, keep_state)
    alpha, gamma, beta = (matrix.params[name] for name in ("alpha", "gamma", "beta"))
    shares = torch.softmax(K / gamma, dim=0)
    if keep_state:
        return torch.addcmul(K, shares, alpha).add_(beta), (shares, K, *distances)
    return K.addcmul_(shares, alpha).add_(beta), ()


def _mixk_gradients(matrix: Matrix, state: State, dK: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """The softmax's Jacobian added to dK, then the distance kernel's own gradients."""
    shares, K, *distances = state
    alpha, gamma = matrix.params["alpha"], matrix.params["gamma"]
    weighted = dK * shares
    column_sums = weighted.sum(0)
    gradients = {}
    if "alpha" in wanted:
        gradients["alpha"] = column_sums.sum()
    if "beta" in wanted:
        gradients["beta"] = dK.sum()
    if "gamma" in wanted:
        K.sub_((shares * K).sum(0))
        gradients["gamma"] = K.mul_(weighted).sum() * (-alpha / gamma.square())
    if not wanted.isdisjoint(("A", "B")):
        weighted.sub_(shares.mul_(column_sums))
        dK.addcmul_(weighted, alpha / gamma)
        gradients |= _distance_gradients(matrix, tuple(distances), dK, wanted)
    return gradients


def _linear_values(matrix: Matrix, keep_state: bool) -> tuple[Tensor, State]:
    """K = Σ_h B_h A_hᵀ: one product of the factors with their components side by side."""
    return _side_by_side(matrix.B) @ _side_by_side(matrix.A).T, ()


def _linear_gradients(matrix: Matrix, state: State, dK: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    return _pull_back_product(matrix, dK, wanted)


def _sigmoid_values(matrix: Matrix, keep_state: bool) -> tuple[Tensor, State]:
    """K = α σ(β z) + γ with z = B Aᵀ; state: z, σ."""
    inner, _ = _linear_values(matrix, keep_state)
    sigma = (inner * matrix.params["beta"]).sigmoid_()
    return _affine(sigma, matrix, keep_state), ((inner, sigma) if keep_state else ())


def _sigmoid_gradients(matrix: Matrix, state: State, dK: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """dz = αβ dK ⊙ σ(1−σ); dβ = α Σ dK ⊙ σ(1−σ) ⊙ z."""
    inner, sigma = state
    gradients = _affine_gradients(sigma, dK, wanted)
    slope = dK.mul_(sigma).mul_(sigma.neg_().add_(1))
    if "beta" in wanted:
        gradients["beta"] = inner.mul_(slope).sum() * matrix.params["alpha"]
    if not wanted.isdisjoint(("A", "B")):
        slope.mul_(matrix.params["alpha"] * matrix.params["beta"])
        gradients |= _pull_back_product(matrix, slope, wanted)
    return gradients


def _rbf_values(matrix: Matrix, keep_state: bool) -> tuple[Tensor, State]:
    """K = α e + γ, e = exp(−β D²), D the distance over the whole rank; state: D², e."""
    squared = _squared_distances(_side_by_side(matrix.A), _side_by_side(matrix.B))
    return _radial_values(squared, matrix, keep_state)


def _rbf_gradients(matrix: Matrix, state: State, dK: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """With Q = dK ⊙ e: dβ = −α Σ Q ⊙ D²; ∂L/∂D² = −αβ Q."""
    squared, decay = state
    gradients = _affine_gradients(decay, dK, wanted)
    Q = dK.mul_(decay)
    if "beta" in wanted:
        gradients["beta"] = squared.mul_(Q).sum() * -matrix.params["alpha"]
    coefficient = -2 * matrix.params["alpha"] * matrix.params["beta"]
    return gradients | _pull_back_whole_rank(matrix, Q, coefficient=coefficient, wanted=wanted)


def _exponential_values(matrix: Matrix, keep_state: bool) -> tuple[Tensor, State]:
    """K = α e + γ, e = exp(−β D), D the distance over the whole rank; state: D, e."""
    distance = _squared_distances(_side_by_side(matrix.A), _side_by_side(matrix.B)).sqrt_()
    return _radial_values(distance, matrix, keep_state)


def _exponential_gradients(matrix: Matrix, state: State, dK: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """With Q = dK ⊙ e: dβ = −α Σ Q ⊙ D; ∂L/∂D = −αβ Q."""
    distance, decay = state
    gradients = _affine_gradients(decay, dK, wanted)
    Q = dK.mul_(decay)
    if "beta" in wanted:
        gradients["beta"] = decay.copy_(distance).mul_(Q).sum() * -matrix.params["alpha"]
    coefficient = -matrix.params["alpha"] * matrix.params["beta"]
    P = _divide_where_nonzero(Q, distance)
    return gradients | _pull_back_whole_rank(matrix, P, coefficient=coefficient, wanted=wanted)


KERNELS = {
    "distance": PairKernel((), _distance_values, _distance_gradients),
    "mixk": PairKernel(("alpha", "gamma", "beta"), _mixk_values, _mixk_gradients),
    "linear": PairKernel((), _linear_values, _linear_gradients),
    "sigmoid": PairKernel(("alpha", "gamma", "beta"), _sigmoid_values, _sigmoid_gradients),
    "rbf": PairKernel(("alpha", "gamma", "beta"), _rbf_values, _rbf_gradients),
    "exponential": PairKernel(("alpha", "gamma", "beta"), _exponential_values, _exponential_gradients),
}


def _coefficients(matrix: Matrix) -> list[float]:
    return [matrix.scale * (-1) ** h for h in range(matrix.A.shape[0])]


def _squared_distances(A: Tensor, B: Tensor) -> Tensor:
    """‖b_i − a_j‖², (out, in), of A (in, q) and B (out, q), by |a|² − 2 b·a + |b|²; clamped at 0."""
    squared = torch.addmm(A.square().sum(-1), B, A.T, alpha=-2.0)
    return squared.add_(B.square().sum(-1, keepdim=True)).clamp_min_(0)


def _divide_where_nonzero(numerator: Tensor, distance: Tensor) -> Tensor:
    """numerator / distance, written into `distance`; 0 where the distance is 0, a subgradient of the norm."""
    is_zero = distance == 0
    return torch.div(numerator, distance, out=distance).masked_fill_(is_zero, 0)


def _pull_back_difference(
    P: Tensor, A: Tensor, B: Tensor, *, coefficient: float | Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """dB = coefficient (B ⊙ rowsum P − P A), dA = coefficient (A ⊙ colsum P − Pᵀ B) for A (in, q), B (out, q)."""
    gradients = {}
    if "A" in wanted:
        gradients["A"] = torch.addmm(A * P.sum(0)[:, None], P.T, B, alpha=-1).mul_(coefficient)
    if "B" in wanted:
        gradients["B"] = torch.addmm(B * P.sum(1)[:, None], P, A, alpha=-1).mul_(coefficient)
    return gradients


def _pull_back_whole_rank(
    matrix: Matrix, P: Tensor, *, coefficient: Tensor, wanted: frozenset[str]
) -> dict[str, Tensor]:
    A, B = _side_by_side(matrix.A), _side_by_side(matrix.B)
    gradients = _pull_back_difference(P, A, B, coefficient=coefficient, wanted=wanted)
    return {name: _by_component(gradient, matrix) for name, gradient in gradients.items()}


def _pull_back_product(matrix: Matrix, dZ: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    """dB = dZ A, dA = dZᵀ B for Z = B Aᵀ."""
    gradients = {}
    if "A" in wanted:
        gradients["A"] = _by_component(dZ.T @ _side_by_side(matrix.B), matrix)
    if "B" in wanted:
        gradients["B"] = _by_component(dZ @ _side_by_side(matrix.A), matrix)
    return gradients


def _radial_values(distance: Tensor, matrix: Matrix, keep_state: bool) -> tuple[Tensor, State]:
    decay = torch.mul(distance, -matrix.params["beta"]).exp_()
    return _affine(decay, matrix, keep_state), ((distance, decay) if keep_state else ())


def _affine(shape: Tensor, matrix: Matrix, keep_state: bool) -> Tensor:
    """α shape + γ, written into `shape` unless it must be kept."""
    scaled = shape * matrix.params["alpha"] if keep_state else shape.mul_(matrix.params["alpha"])
    return scaled.add_(matrix.params["gamma"])


def _affine_gradients(shape: Tensor, dK: Tensor, wanted: frozenset[str]) -> dict[str, Tensor]:
    gradients = {}
    if "alpha" in wanted:
        gradients["alpha"] = (dK * shape).sum()
    if "gamma" in wanted:
        gradients["gamma"] = dK.sum()
    return gradients


def _side_by_side(factor: Tensor) -> Tensor:
    """(H, rows, r/H) → (rows, r)."""
    return factor.permute(1, 0, 2).reshape(factor.shape[1], -1)


def _by_component(factor: Tensor, matrix: Matrix) -> Tensor:
    """(rows, r) → (H, rows, r/H)."""
    return factor.unflatten(1, (matrix.A.shape[0], -1)).permute(1, 0, 2)
