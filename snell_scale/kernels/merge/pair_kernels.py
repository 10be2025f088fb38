"""K by tiles of columns, and the gradients of its factors, kernel by kernel; derivations in README.md.

A tile holds some columns of one of the delta's G matrices with all their rows. `tile` returns K's; where
gradients are wanted it keeps what they need, `add_gradients` takes ∂L/∂K of the same tile, and `finish` returns
the sums. A tile of K belongs to the caller only where no gradient is wanted; ∂L/∂K always goes over to the
kernel: in the hot path every pass over a tile counts.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .delta import Delta, Wanted
from .pair_sums import DifferenceSums, ProductSums, SquaredDistances


class PairKernel(ABC):
    """K and its gradients."""

    def __init__(self, delta: Delta, wanted: Wanted) -> None:
        self._delta = delta
        self._wanted = wanted
        self._param_sums = [torch.zeros_like(param) for param in delta.params] if any(wanted.params) else []

    @abstractmethod
    def tile(self, group: int, columns: slice) -> Tensor:
        """K[:, columns] of a matrix, a new tensor (rows, len(columns))."""

    @abstractmethod
    def add_gradients(self, group: int, dK: Tensor, columns: slice) -> None:
        """Adds what the tile that `tile` returned last contributes."""

    @abstractmethod
    def finish(self) -> list[Tensor | None]:
        """The gradients of A, B and the parameters, None where not wanted, once every column has been added."""

    def _params(self, group: int) -> list[Tensor]:
        return [param[group] for param in self._delta.params]

    def _param_gradients(self) -> list[Tensor | None]:
        sums = self._param_sums or self._wanted.params
        return [
            each if is_wanted and isinstance(each, Tensor) else None
            for each, is_wanted in zip(sums, self._wanted.params, strict=True)
        ]


class DistanceKernel(PairKernel):
    """K = Σ_h c (−1)^h d_h. P_h = dK / d_h, 0 where d_h = 0."""

    def __init__(self, delta: Delta, wanted: Wanted) -> None:
        super().__init__(delta, wanted)
        self._num_components = delta.num_components
        self._signs = [(-1) ** h * (-1 if delta.scale < 0 else 1) for h in range(self._num_components)]
        A, B = delta.A.flatten(0, 1), delta.B.flatten(0, 1)
        self._squares = SquaredDistances(A, B, factor=delta.scale)
        self._sums = DifferenceSums(A, B, wants=wanted.factors) if any(wanted.factors) else None
        self._state: list[tuple[Tensor, bool]] = []

    def tile(self, group: int, columns: slice) -> Tensor:
        first = group * self._num_components
        tiles = [self._squares.tile(first + h, columns) for h in range(self._num_components)]
        self._state = [(squares.sqrt_(), has_zeros) for squares, has_zeros in tiles]
        K = self._signed_sum([distances for distances, _ in self._state])
        if not self._wanted.anything:
            self._state = []
        return K

    def add_gradients(self, group: int, dK: Tensor, columns: slice) -> None:
        if self._sums is not None:
            for h, (distances, has_zeros) in enumerate(self._state):
                P = _divided(dK, distances, has_zeros=has_zeros)
                self._sums.add(group * self._num_components + h, P, columns)
        self._state = []

    def finish(self) -> list[Tensor | None]:
        if self._sums is None:
            return [None, None]
        return [None if sums is None else self._by_component(sums) for sums in self._sums.finish()]

    def _by_component(self, sums: Tensor) -> Tensor:
        """(G·H, …) → (G, H, …), each component with its coefficient.

        dK / (|c| d) is |c| too small for ∂L/∂d = c (−1)^h dK, and its difference vectors lack the c: hence c².
        """
        gradients = sums.unflatten(0, (-1, self._num_components))
        for h, sign in enumerate(self._signs):
            gradients[:, h].mul_(sign * self._delta.scale**2)
        return gradients

    def _signed_sum(self, distances: list[Tensor]) -> Tensor:
        first, *others = distances
        K = first if self._signs[0] > 0 else -first
        for sign, distance in zip(self._signs[1:], others, strict=True):
            is_own = K is not first or not self._wanted.anything
            K = torch.add(K, distance, alpha=sign, out=K if is_own else None)
        return K


class MixkKernel(PairKernel):
    """K' = K + α s + β with s = softmax_i(K/γ) over the rows, of which a tile holds all."""

    def __init__(self, delta: Delta, wanted: Wanted) -> None:
        super().__init__(delta, wanted)
        self._distance = DistanceKernel(delta, wanted)
        self._state: tuple[Tensor, ...] = ()

    def tile(self, group: int, columns: slice) -> Tensor:
        alpha, gamma, beta = self._params(group)
        K = self._distance.tile(group, columns)
        shares = torch.softmax(K / gamma, dim=0)
        if not self._wanted.anything:
            return K.addcmul_(shares, alpha).add_(beta)
        self._state = (K, shares)
        return torch.addcmul(K, shares, alpha).add_(beta)

    def add_gradients(self, group: int, dK: Tensor, columns: slice) -> None:
        """The softmax's Jacobian added to dK, then the distance kernel's own gradients."""
        K, shares = self._state
        self._state = ()
        alpha, gamma, _ = self._params(group)
        weighted = dK * shares
        column_sums = weighted.sum(0)
        if self._param_sums:
            dalpha, dgamma, dbeta = self._param_sums
            dalpha[group] += column_sums.sum()
            dbeta[group] += dK.sum()
            mean_K = (shares * K).sum(0)
            slopes = K.mul(weighted).sum(0) - mean_K * column_sums
            dgamma[group] += slopes.sum() * (-alpha / gamma.square())
        del K
        weighted.sub_(shares.mul_(column_sums))
        self._distance.add_gradients(group, dK.addcmul_(weighted, alpha / gamma), columns)

    def finish(self) -> list[Tensor | None]:
        return self._distance.finish() + self._param_gradients()


class LinearKernel(PairKernel):
    """K = Σ_h B_h A_hᵀ: one product of the factors with their components side by side."""

    def __init__(self, delta: Delta, wanted: Wanted) -> None:
        super().__init__(delta, wanted)
        A, self._B = _side_by_side(delta.A), _side_by_side(delta.B)
        self._At = A.transpose(1, 2).contiguous()
        self._sums = ProductSums(A, self._B, wants=wanted.factors) if any(wanted.factors) else None

    def tile(self, group: int, columns: slice) -> Tensor:
        return self._B[group] @ self._At[group, :, columns]

    def add_gradients(self, group: int, dK: Tensor, columns: slice) -> None:
        if self._sums is not None:
            self._sums.add(group, dK, columns)

    def finish(self) -> list[Tensor | None]:
        found = (None, None) if self._sums is None else self._sums.finish()
        return [_by_component(each, self._delta) for each in found]


class SigmoidKernel(PairKernel):
    """K = α σ(β z) + γ with z = B Aᵀ: dz = αβ dK ⊙ σ(1−σ), dβ = α Σ dK ⊙ σ(1−σ) ⊙ z."""

    def __init__(self, delta: Delta, wanted: Wanted) -> None:
        super().__init__(delta, wanted)
        self._inner = LinearKernel(delta, wanted)
        self._state: tuple[Tensor, ...] = ()

    def tile(self, group: int, columns: slice) -> Tensor:
        alpha, gamma, beta = self._params(group)
        inner = self._inner.tile(group, columns)
        sigma = torch.sigmoid_(inner * beta)
        if not self._wanted.anything:
            return sigma.mul_(alpha).add_(gamma)
        self._state = (inner, sigma)
        return (sigma * alpha).add_(gamma)

    def add_gradients(self, group: int, dK: Tensor, columns: slice) -> None:
        inner, sigma = self._state
        self._state = ()
        alpha, _, beta = self._params(group)
        if self._param_sums:
            self._param_sums[1][group] += dK.sum()
        slope = dK.mul_(sigma)
        if self._param_sums:
            self._param_sums[0][group] += slope.sum()
        slope.mul_(sigma.neg_().add_(1))
        if self._param_sums:
            self._param_sums[2][group] += inner.mul_(slope).sum() * alpha
        self._inner.add_gradients(group, slope.mul_(alpha * beta), columns)

    def finish(self) -> list[Tensor | None]:
        return self._inner.finish() + self._param_gradients()


class _RadialKernel(PairKernel):
    """K = α e + γ, e = exp(−β t), with t a function of the distance over the whole rank."""

    _slope: int  # ∂t/∂b = slope · (b − a), or of its unit vector where t is the distance

    def __init__(self, delta: Delta, wanted: Wanted) -> None:
        super().__init__(delta, wanted)
        A, B = _side_by_side(delta.A), _side_by_side(delta.B)
        self._squares = SquaredDistances(A, B)
        self._sums = DifferenceSums(A, B, wants=wanted.factors) if any(wanted.factors) else None
        self._state: tuple[Tensor, Tensor, bool] | None = None

    @abstractmethod
    def _radius(self, squares: Tensor) -> Tensor:
        """t, written into `squares`."""

    @abstractmethod
    def _pull_back(self, Q: Tensor, radius: Tensor, has_zeros: bool) -> Tensor:
        """P of the difference sums."""

    def tile(self, group: int, columns: slice) -> Tensor:
        alpha, gamma, beta = self._params(group)
        squares, has_zeros = self._squares.tile(group, columns)
        radius = self._radius(squares)
        decay = torch.exp_(radius * -beta)
        if not self._wanted.anything:
            return decay.mul_(alpha).add_(gamma)
        self._state = (radius, decay, has_zeros)
        return (decay * alpha).add_(gamma)

    def add_gradients(self, group: int, dK: Tensor, columns: slice) -> None:
        """With Q = dK ⊙ e: dα = Σ Q, dγ = Σ dK, dβ = −α Σ Q ⊙ t."""
        assert self._state is not None
        radius, decay, has_zeros = self._state
        self._state = None
        if self._param_sums:
            self._param_sums[1][group] += dK.sum()
        Q = dK.mul_(decay)
        if self._param_sums:
            self._param_sums[0][group] += Q.sum()
            self._param_sums[2][group] -= torch.mul(Q, radius, out=decay).sum() * self._delta.params[0][group]
        if self._sums is not None:
            self._sums.add(group, self._pull_back(Q, radius, has_zeros), columns)

    def finish(self) -> list[Tensor | None]:
        alpha, _, beta = self._delta.params
        coefficients = (alpha * beta).mul_(-self._slope)[:, None, None]
        found = (None, None) if self._sums is None else self._sums.finish()
        scaled = [None if each is None else each.mul_(coefficients) for each in found]
        return [_by_component(each, self._delta) for each in scaled] + self._param_gradients()


class RbfKernel(_RadialKernel):
    """t = D²."""

    _slope = 2

    def _radius(self, squares: Tensor) -> Tensor:
        return squares

    def _pull_back(self, Q: Tensor, radius: Tensor, has_zeros: bool) -> Tensor:
        return Q


class ExponentialKernel(_RadialKernel):
    """t = D."""

    _slope = 1

    def _radius(self, squares: Tensor) -> Tensor:
        return squares.sqrt_()

    def _pull_back(self, Q: Tensor, radius: Tensor, has_zeros: bool) -> Tensor:
        return _divided(Q, radius, has_zeros=has_zeros)


PAIR_KERNELS: dict[str, type[PairKernel]] = {
    "distance": DistanceKernel,
    "mixk": MixkKernel,
    "linear": LinearKernel,
    "sigmoid": SigmoidKernel,
    "rbf": RbfKernel,
    "exponential": ExponentialKernel,
}


def _divided(numerator: Tensor, distances: Tensor, *, has_zeros: bool) -> Tensor:
    """numerator / distances, written into `distances`; 0 where the distance is 0, a subgradient of the norm."""
    is_zero = distances == 0 if has_zeros else None
    quotient = torch.div(numerator, distances, out=distances)
    return quotient if is_zero is None else quotient.masked_fill_(is_zero, 0)


def _side_by_side(factor: Tensor) -> Tensor:
    """(G, H, rows, q) → (G, rows, H·q)."""
    return factor.transpose(1, 2).flatten(2)


def _by_component(gradient: Tensor | None, delta: Delta) -> Tensor | None:
    """(G, rows, H·q) → (G, H, rows, q)."""
    return None if gradient is None else gradient.unflatten(2, (delta.num_components, -1)).transpose(1, 2)
