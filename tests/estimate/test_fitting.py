"""The largest microbatch that fits, against trying every one; and sizes of memory as people write them."""

from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snell_scale.config import Config
from snell_scale.estimate.byte_sizes import parse_size, show_size
from snell_scale.estimate.fitting import MOST_SAMPLES, largest_fitting, ways_to_need_less

MOST = 300


class Counted:
    """A function of the number of samples that knows how often it was asked."""

    def __init__(self, peak_bytes: Callable[[int], int]) -> None:
        self._peak_bytes = peak_bytes
        self.asked: list[int] = []

    def __call__(self, samples: int) -> int:
        self.asked.append(samples)
        return self._peak_bytes(samples)


def _by_trying(peak_bytes: Callable[[int], int], limit_bytes: int) -> int:
    return max((samples for samples in range(1, MOST + 1) if peak_bytes(samples) <= limit_bytes), default=0)


# Mostly flat, with small steps and sudden large ones: what blocks, tiles and padding make of a line.
_GROWTH = st.lists(st.sampled_from([0, 0, 0, 1, 7, 1000, 10**6]), min_size=MOST, max_size=MOST)


@given(growth=_GROWTH, limit=st.integers(0, 10**7))
def test_of_any_function_that_does_not_fall(growth: list[int], limit: int) -> None:
    peaks = list(accumulate(growth))
    counted = Counted(lambda samples: peaks[samples - 1])
    assert largest_fitting(counted, limit, most=MOST) == _by_trying(lambda n: peaks[n - 1], limit)
    assert all(1 <= samples <= MOST for samples in counted.asked)


@given(
    fixed=st.integers(0, 10**6), each=st.integers(1, 10**5), step=st.integers(1, 32), limit=st.integers(0, 10**7)
)
def test_of_a_stair(fixed: int, each: int, step: int, limit: int) -> None:
    def peak_bytes(samples: int) -> int:
        return fixed + each * step * -(-samples // step)

    assert largest_fitting(peak_bytes, limit, most=MOST) == _by_trying(peak_bytes, limit)


@given(fixed=st.integers(0, 10**12), each=st.integers(1, 10**10), limit=st.integers(0, 10**14))
def test_a_line_takes_few_evaluations(fixed: int, each: int, limit: int) -> None:
    counted = Counted(lambda samples: fixed + each * samples)
    expected = min(max(0, (limit - fixed) // each), MOST_SAMPLES)
    assert largest_fitting(counted, limit) == expected
    assert len(counted.asked) <= 6  # each is a step on fake tensors


def test_the_worst_function_takes_no_more_than_bisecting_twice() -> None:
    for edge in (2, 3, 1000, MOST_SAMPLES - 1):
        counted = Counted(lambda samples, edge=edge: 10**9 if samples >= edge else samples // 1000)
        assert largest_fitting(counted, 10**6) == edge - 1
        assert len(counted.asked) <= 2 * MOST_SAMPLES.bit_length() + 4


@pytest.mark.parametrize(
    ("overrides", "sharding"),
    [
        ([], "shard the weights (engine.name=fsdp2)"),
        (["engine.name=ddp"], "shard the weights (engine.name=fsdp2)"),
        (["engine.name=deepspeed"], "shard the weights (engine.zero_stage=3)"),
        (["engine.name=deepspeed", "engine.zero_stage=3"], None),
        (["engine.name=fsdp2"], None),
    ],
)
def test_what_the_config_has_already_is_no_advice(
    tiny: Callable[..., Config], overrides: list[str], sharding: str | None
) -> None:
    start = f"{sharding}, " if sharding else ""
    checkpointing = "set training.activation_checkpointing=true, or train less of the model"
    assert ways_to_need_less(tiny(*overrides)) == start + checkpointing
    end = "or train less of the model" if sharding else "train less of the model"
    assert ways_to_need_less(tiny(*overrides, "training.activation_checkpointing=true")) == start + end


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 80 * 2**30),
        ("24 GB", 24 * 10**9),
        (" 512MiB ", 512 * 2**20),
        ("1.5KiB", 1536),
        ("2TiB", 2 * 2**40),
        ("1TB", 10**12),
        ("17B", 17),
    ],
)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "80", "80G", "80gib", "GiB", "-1GiB", "0GiB", "1e3MiB", "80 GiB more", "8iB"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size of memory; write it like 80GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (2**30, "1.00 GiB"),
        (1234.5 * 2**30, "1,234.50 GiB"),
        (2**30 - 2**20, "1,023.0 MiB"),
        (2**19, "0.5 MiB"),
        (0, "0.0 MiB"),
    ],
)
def test_a_size_is_shown(num_bytes: float, text: str) -> None:
    assert show_size(num_bytes) == text
