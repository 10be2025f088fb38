"""The specification of the delta in plain autograd torch, to be read against the papers; only tests call it.

Slow on purpose: distances through an (out, in, r/H) tensor, a sort for the threshold.
Sources: SNELL, arXiv 2411.01800, Eq. 2-5; SNELLA, arXiv 2510.24037; github.com/ssfgunner/SNELL @ e9d5185.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Sparsity = float | Sequence[float] | Tensor | None


def delta_weight_reference(
    A: Tensor,
    B: Tensor,
    *,
    sparsity: Sparsity,
    kernel: str = "distance",
    weighting: str = "magnitude",
    scale: float = 0.1,
    kernel_params: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """ΔW = K ⊙ g ⊙ M, (out, in); `g` and `M` carry no gradient.

    A: (G, H, in, r/H), B: (G, H, out/G, r/H), float; 3-D factors mean G = 1. The G matrices are stacked along
    out, each with its own threshold and its own entry of every kernel parameter.
    """
    A, B = (factor.unsqueeze(0) if factor.dim() == 3 else factor for factor in (A, B))
    stacked = []
    for group in range(A.shape[0]):
        params = {name: value.reshape(-1)[group] for name, value in (kernel_params or {}).items()}
        K = kernel_matrix_reference(A[group], B[group], kernel=kernel, scale=scale, kernel_params=params)
        stacked.append(K * gate_reference(K, _of_group(sparsity, group), weighting=weighting))
    return torch.cat(stacked)


def kernel_matrix_reference(
    A: Tensor, B: Tensor, *, kernel: str, scale: float, kernel_params: Mapping[str, Tensor]
) -> Tensor:
    """K, (out, in), of one matrix: A (H, in, r/H), B (H, out, r/H), parameters 0-d."""
    difference = B[:, :, None, :] - A[:, None, :, :]
    if kernel in ("distance", "mixk"):
        distances = torch.linalg.vector_norm(difference, dim=-1)
        K = torch.stack([scale * (-1) ** h * distances[h] for h in range(A.shape[0])]).sum(0)
        if kernel == "distance":
            return K
        alpha, gamma, beta = (kernel_params[name] for name in ("alpha", "gamma", "beta"))
        return K + alpha * torch.softmax(K / gamma, dim=0) + beta
    inner = torch.einsum("hik,hjk->ij", B, A)
    if kernel == "linear":
        return inner
    alpha, gamma, beta = (kernel_params[name] for name in ("alpha", "gamma", "beta"))
    if kernel == "sigmoid":
        return alpha / (1 + torch.exp(-beta * inner)) + gamma
    if kernel == "rbf":
        return alpha * torch.exp(-beta * difference.square().sum(dim=(0, 3))) + gamma
    if kernel == "exponential":
        return alpha * torch.exp(-beta * torch.linalg.vector_norm(difference, dim=(0, 3))) + gamma
    raise AssertionError(kernel)


def gate_reference(K: Tensor, sparsity: float | Tensor | None, *, weighting: str) -> Tensor:
    """g ⊙ M, (out, in), a constant to autograd; ones when `sparsity` is None (dense)."""
    if sparsity is None:
        return torch.ones_like(K)
    magnitude = K.detach().abs()
    rank = int(float(sparsity) * (K.numel() - 1))
    tau = magnitude.flatten().sort().values[rank]
    g = {"magnitude": magnitude, "soft": magnitude - tau, "hard": torch.ones_like(K)}[weighting]
    return g * (magnitude > tau)


def _of_group(sparsity: Sparsity, group: int) -> float | Tensor | None:
    if sparsity is None or isinstance(sparsity, float | int):
        return sparsity
    return sparsity.reshape(-1)[group] if isinstance(sparsity, Tensor) else sparsity[group]
