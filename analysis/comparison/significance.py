"""What a few seeds can tell: the interval of a mean, and paired tests of a difference with Holm's correction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95
ALPHA = 0.05
_MAX_EXACT_SEEDS = 16
_NUM_RANDOM_FLIPS = 99_999
# Differences that differ by rounding only have no spread.
_ROUNDING = 1e-9


class Difference(NamedTuple):
    """A method's scores minus the baseline's over `num_pairs` common seeds; NaN where seeds are too few.

    p values are two-sided: `p_t` of the paired t test, `p_flips` of the sign-flip permutation test.
    """

    num_pairs: int
    mean: float
    half_width: float
    p_t: float
    p_flips: float


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean: Student's t with n - 1 degrees of freedom; NaN below two values."""
    count = len(values)
    if count < 2:
        return float("nan")
    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Both with one value per common seed, in the same order."""
    differences = np.subtract(scores, baseline)
    count = len(differences)
    if count == 0:
        return Difference(0, *[float("nan")] * 4)
    mean, p_flips = float(differences.mean()), _sign_flip_p(differences)
    return Difference(count, mean, half_width(list(differences)), _paired_t_p(differences), p_flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; what is NaN stays so and does not count as a test.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected = [float("nan")] * len(p_values)
    tests = sorted((p, index) for index, p in enumerate(p_values) if p == p)
    largest = 0.0
    for place, (p, index) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - place) * p))
        corrected[index] = largest
    return corrected


def smallest_flip_p(num_pairs: int) -> float:
    """The smallest p that the sign-flip test can give: all flips but none and all of them are less extreme."""
    return 2 / 2**num_pairs if num_pairs <= _MAX_EXACT_SEEDS else 1 / (_NUM_RANDOM_FLIPS + 1)


def seeds_needed(num_tests: int) -> int:
    """The fewest common seeds with which the sign-flip test can reach 5 % in the strictest of Holm's steps."""
    return next(count for count in range(1, 64) if num_tests * smallest_flip_p(count) <= ALPHA)


def _paired_t_p(differences: npt.NDArray[np.float64]) -> float:
    """NaN where the differences have no spread: the test is not defined there."""
    count, spread = len(differences), float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    if spread <= _ROUNDING * float(np.abs(differences).max()):
        return float("nan")
    return float(2 * stats.t.sf(abs(differences.mean()) / (spread / np.sqrt(count)), count - 1))


def _sign_flip_p(differences: npt.NDArray[np.float64]) -> float:
    """The share of sign flips whose mean is as far from 0 as the one seen; exact up to 16 seeds."""
    count = len(differences)
    if count < 2:
        return float("nan")
    enough = abs(differences.sum()) - _ROUNDING * np.abs(differences).sum()
    if count <= _MAX_EXACT_SEEDS:
        flips = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float(np.mean(np.abs(flips @ differences) >= enough))
    signs = np.random.default_rng(0).choice([-1, 1], size=(_NUM_RANDOM_FLIPS, count))
    return float((1 + np.sum(np.abs(signs @ differences) >= enough)) / (1 + _NUM_RANDOM_FLIPS))
