"""Intervals and tests against numbers worked out by hand, and against scipy's own."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.comparison.significance import half_width, holm, paired_difference, seeds_needed, smallest_flip_p


def test_interval_of_a_mean() -> None:
    # Standard deviation 2, three values: t(0.975, 2) = 4.3027, over the root of 3.
    assert half_width([88.0, 90.0, 92.0]) == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert half_width([5.0, 5.0]) == 0
    assert math.isnan(half_width([90.0]))
    assert math.isnan(half_width([]))


def test_difference_over_common_seeds() -> None:
    scores, baseline = [93.0, 94.0, 95.5, 92.0], [88.0, 90.0, 92.0, 89.0]
    found = paired_difference(scores, baseline)
    assert (found.num_pairs, found.mean) == (4, 3.875)
    expected = stats.ttest_rel(scores, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.p_t == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2, rel=1e-9)


def test_sign_flips_by_hand() -> None:
    # Sums of ±1 ±2 ±3: 6, 4, 2, 0 and their negatives; as far out as 1 + 2 + 3 are two of eight.
    assert paired_difference([1.0, 2.0, 3.0], [0.0] * 3).p_flips == 2 / 8
    # As far out as 1 + 2 - 3 = 0 are all; as -1 + 2 + 3 = 4: six and four, both signs.
    assert paired_difference([1.0, 2.0, -3.0], [0.0] * 3).p_flips == 1
    assert paired_difference([-1.0, 2.0, 3.0], [0.0] * 3).p_flips == 4 / 8


def test_sign_flips_equal_those_of_scipy() -> None:
    differences = np.random.default_rng(1).normal(0.4, 1.0, size=9)
    expected = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=10**6)
    assert paired_difference(list(differences), [0.0] * 9).p_flips == pytest.approx(expected.pvalue, rel=1e-9)


def test_random_flips_come_close_to_the_exact_test() -> None:
    differences = list(np.random.default_rng(2).normal(0.45, 1.0, size=17))
    found = paired_difference(differences, [0.0] * 17).p_flips
    flips = 1 - 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1)
    exact = float(np.mean(np.abs(flips @ differences) >= abs(sum(differences)) - 1e-9))
    # 99,999 draws: four standard errors of a share near 0.1 are 0.004.
    assert found == pytest.approx(exact, abs=0.004)
    assert found == paired_difference(differences, [0.0] * 17).p_flips


def test_what_too_few_or_equal_seeds_cannot_tell() -> None:
    none, one = paired_difference([], []), paired_difference([91.0], [90.0])
    assert none.num_pairs == 0
    assert all(math.isnan(value) for value in none[1:])
    assert (one.num_pairs, one.mean) == (1, 1.0)
    assert all(math.isnan(value) for value in one[2:])
    # The same difference at every seed, but for rounding: no spread, so no t.
    constant = paired_difference([90.1, 88.1, 85.1], [90.0, 88.0, 85.0])
    assert math.isnan(constant.p_t)
    assert constant.p_flips == 0.25
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_flips == 1


def test_holm() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    corrected = holm([0.01, math.nan, 0.02])
    assert corrected[0] == 0.02
    assert math.isnan(corrected[1])
    assert corrected[2] == 0.02
    assert holm([]) == []


def test_smallest_p_is_reached_and_seeds_needed_are_enough() -> None:
    for count in (2, 3, 5, 8):
        assert paired_difference([1.0] * count, [0.0] * count).p_flips == smallest_flip_p(count)
    assert seeds_needed(1) == 6
    assert seeds_needed(4) == 8
    assert 4 * smallest_flip_p(8) <= 0.05 < 4 * smallest_flip_p(7)
