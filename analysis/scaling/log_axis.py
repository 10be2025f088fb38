"""Logarithmic axes whose ticks are plain numbers: 1, 2, 5, 10 …"""

from collections.abc import Callable, Sequence

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# What an axis spans decides its ticks: few decades have 2 and 5 too, less than this ratio is as good as linear.
_DECADES_WITH_2_AND_5 = 2.5
_ALMOST_LINEAR = 3.0


def plain_ticks(
    axis: Axis,
    smallest: float,
    largest: float,
    *,
    text: Callable[[float], str] = "{:g}".format,
    are_wide: bool = False,
) -> None:
    """For an axis that is logarithmic and shows smallest to largest.

    text: how a tick is written. are_wide: as that is long, there is room for fewer.
    """
    if largest < _ALMOST_LINEAR * smallest:
        axis.set_major_locator(MaxNLocator(nbins=3 if are_wide else 5))
    else:
        few = not are_wide and largest <= smallest * 10**_DECADES_WITH_2_AND_5
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def every_value(axis: Axis, values: Sequence[int]) -> None:
    """For a logarithmic axis of few values, which are its ticks: world sizes."""
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(values, [str(value) for value in values])
