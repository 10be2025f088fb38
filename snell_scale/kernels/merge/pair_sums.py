"""Quantities of pairs (row i of B, row j of A), tile by tile, and the sums that pull gradients back to A and B.

A: (N, columns, q) and B: (N, rows, q) hold N independent pairs of factors: the components of all matrices, or,
for a kernel over the whole rank, the matrices with their components side by side. A tile is (rows, some columns)
of one of the N.
"""

import torch
from torch import Tensor

from .numerics import host_number

# Up to so many numbers a row, differences are taken one by one: there |a|² − 2 a·b + |b|² cancels most, for many
# pairs are close, and the passes are few.
_MOST_SUBTRACTED = 2


class SquaredDistances:
    """factor² ‖b_i − a_j‖², as one product: (−2 b, |b|², 1) · (a, 1, |a|²); for small q by subtraction."""

    def __init__(self, A: Tensor, B: Tensor, *, factor: float = 1.0) -> None:
        self._is_subtracted = A.shape[2] <= _MOST_SUBTRACTED
        if self._is_subtracted:
            self._left, self._right = B * factor, A.transpose(1, 2) * factor
            return
        square = factor * factor
        of_rows = B.square().sum(2, keepdim=True).mul_(square)
        self._left = torch.cat((B * (-2 * square), of_rows, torch.full_like(of_rows, square)), 2)
        of_columns = A.square().sum(2).unsqueeze(1)
        self._right = torch.cat((A.transpose(1, 2), torch.ones_like(of_columns), of_columns), 1)

    def tile(self, index: int, columns: slice) -> tuple[Tensor, bool]:
        """The tile, never negative, and whether it may hold a 0, where the distance has no gradient."""
        left, right = self._left[index], self._right[index, :, columns]
        squares = _squared_differences(left, right) if self._is_subtracted else left @ right
        # On CPU reading the least value costs less than clamping, and spares every later guard against 0.
        if squares.device.type == "cpu" and host_number(squares.amin(), without_values=1.0) > 0:
            return squares, False
        return squares.clamp_min_(0), True


class ProductSums:
    """Pᵀ B for A and P A for B; None where not wanted.

    Summed transposed, as Bᵀ P and Aᵀ Pᵀ: with q as the short outer side these products run two to four times
    faster on CPU than P A does.
    """

    def __init__(self, A: Tensor, B: Tensor, *, wants: tuple[bool, bool]) -> None:
        self._At, self._Bt = (factor.transpose(1, 2).contiguous() for factor in (A, B))
        self._for_A = torch.empty_like(self._At) if wants[0] else None
        self._for_B = torch.zeros_like(self._Bt) if wants[1] else None

    def add(self, index: int, P: Tensor, columns: slice) -> None:
        if self._for_A is not None:
            torch.mm(self._Bt[index], P, out=self._for_A[index, :, columns])
        if self._for_B is not None:
            self._for_B[index].addmm_(self._At[index, :, columns], P.T)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Of A, (N, columns, q), and of B, (N, rows, q)."""
        for_A, for_B = self._for_A, self._for_B
        return None if for_A is None else for_A.mT, None if for_B is None else for_B.mT


class DifferenceSums:
    """Σ P[i,j] (b_i − a_j) over the pairs of a row i of B, and its negative for a row j of A.

    For B: B ⊙ rowsum P − P A. For A: A ⊙ colsum P − Pᵀ B. None where not wanted.
    """

    def __init__(self, A: Tensor, B: Tensor, *, wants: tuple[bool, bool]) -> None:
        self._A, self._B = A, B
        self._products = ProductSums(A, B, wants=wants)
        self._column_sums = A.new_empty(A.shape[:2]) if wants[0] else None
        self._row_sums = B.new_zeros(B.shape[:2]) if wants[1] else None

    def add(self, index: int, P: Tensor, columns: slice) -> None:
        self._products.add(index, P, columns)
        if self._column_sums is not None:
            torch.sum(P, 0, out=self._column_sums[index, columns])
        if self._row_sums is not None:
            self._row_sums[index] += P.sum(1)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Of A, (N, columns, q), and of B, (N, rows, q)."""
        PtB, PA = self._products.finish()
        return _difference(self._A, self._column_sums, PtB), _difference(self._B, self._row_sums, PA)


def _difference(factor: Tensor, sums: Tensor | None, product: Tensor | None) -> Tensor | None:
    return None if sums is None or product is None else (factor * sums.unsqueeze(2)).sub_(product)


def _squared_differences(left: Tensor, right: Tensor) -> Tensor:
    """Σ_k (left[i, k] − right[k, j])²."""
    squares = torch.square_(left[:, :1] - right[:1])
    for k in range(1, left.shape[1]):
        difference = left[:, k : k + 1] - right[k : k + 1]
        squares.addcmul_(difference, difference)
    return squares
