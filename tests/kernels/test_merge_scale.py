"""The automatic scale: the authors' own at their size, and the same start-up size at every other."""

import math

import pytest
import torch

from snell_scale.kernels.merge import auto_scale, delta_weight


def test_the_authors_size_gives_exactly_their_scale() -> None:
    assert auto_scale(768, 768, 32, 2) == 0.1


def test_formula_of_even_components() -> None:
    """c ∝ (1/H) √(r / (κ (1/n + 1/m))), κ = 1.4 for square matrices and 2 − 1.2·0.68 for 1:4."""
    assert auto_scale(96, 96, 8, 2) == pytest.approx(0.1 * math.sqrt((8 / 32) * (96 / 768)), rel=1e-12)
    assert auto_scale(768, 768, 32, 4) == pytest.approx(0.05, rel=1e-12)
    one_to_four = 0.1 * math.sqrt((2 / 768) / (1 / 768 + 1 / 3072)) * math.sqrt(1.4 / (2 - 1.2 * 0.68))
    assert auto_scale(768, 3072, 32, 2) == pytest.approx(one_to_four, rel=1e-12)
    assert auto_scale(3072, 768, 32, 2) == auto_scale(768, 3072, 32, 2)


@pytest.mark.parametrize(
    ("in_features", "out_features", "rank"),
    [
        (48, 48, 4), (48, 48, 32), (48, 192, 8), (96, 96, 4), (96, 96, 32), (96, 384, 16), (384, 96, 4),
        (192, 192, 8), (192, 48, 32), (768, 768, 4), (768, 768, 8), (768, 192, 16), (768, 768, 32),
    ],
)  # fmt: skip
def test_delta_starts_with_the_authors_size(in_features: int, out_features: int, rank: int) -> None:
    """Within 10 %: the first-order variance is 3 % off for two numbers per component (rank 4), and std ΔW has its
    square, with a fourth moment that differs by 5 % there; the rest is the sampling error of about 1 %.
    """
    measured = _rms_of_start(
        in_features, out_features, rank, 2, scale=auto_scale(in_features, out_features, rank, 2)
    )
    assert measured == pytest.approx(_rms_of_start(768, 768, 32, 2, scale=0.1), rel=0.10)


@pytest.mark.parametrize(("rank", "components"), [(4, 1), (32, 1), (9, 3), (8, 4), (32, 4)])
def test_kernel_matrix_starts_with_the_authors_size(rank: int, components: int) -> None:
    """E K² for any H, odd included; 5 %: 2 % of the first order, the rest sampling."""
    scale = auto_scale(96, 96, rank, components)
    measured = _rms_of_start(96, 96, rank, components, scale=scale, is_dense=True)
    assert measured == pytest.approx(_rms_of_start(768, 768, 32, 2, scale=0.1, is_dense=True), rel=0.05)


def test_a_fixed_scale_is_larger_in_small_layers() -> None:
    """RMS ΔW ∝ c² (1/m + 1/n) / r: 32 times the authors' at 96 x 96, rank 8; 10 % as above."""
    ratio = _rms_of_start(96, 96, 8, 2, scale=0.1) / _rms_of_start(768, 768, 32, 2, scale=0.1)
    assert ratio == pytest.approx(32, rel=0.10)


@pytest.mark.parametrize("weighting", ["magnitude", "soft", "hard"])
def test_the_scale_is_nothing_but_the_size_of_the_factors(weighting: str) -> None:
    """c κ(A, B) = κ(c A, c B); 4 is a power of two, so equal to the last bit."""
    A, B = (torch.randn(2, size, 3, generator=torch.Generator().manual_seed(size)) for size in (9, 7))
    scaled = delta_weight(A, B, sparsity=0.5, weighting=weighting, scale=4.0)
    assert torch.equal(scaled, delta_weight(4 * A, 4 * B, sparsity=0.5, weighting=weighting, scale=1.0))


@pytest.mark.parametrize(
    "sizes", [(0, 8, 4, 2), (8, 0, 4, 2), (8, 8, 0, 2), (8, 8, 4, 0), (8, 8, 4, 3), (8, 8, 2, 4)]
)
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        auto_scale(*sizes)


def _rms_of_start(
    in_features: int, out_features: int, rank: int, components: int, *, scale: float, is_dense: bool = False
) -> float:
    """RMS of ΔW (magnitude, s = 0), or of K, of factors as initialised; small layers are drawn many times."""
    generator = torch.Generator().manual_seed(0)
    num_draws = max(1, round(400 * 64 / (in_features + out_features) / 8))
    mean_square = 0.0
    for _ in range(num_draws):
        A, B = (
            (torch.rand(components, size, rank // components, generator=generator) * 2 - 1)
            / math.sqrt(size * rank / components)
            for size in (in_features, out_features)
        )
        delta = delta_weight(A, B, sparsity=None if is_dense else 0.0, scale=scale)
        mean_square += delta.double().square().mean().item() / num_draws
    return math.sqrt(mean_square)
