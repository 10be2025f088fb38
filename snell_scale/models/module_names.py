"""Names of modules: the repeated blocks, and regular expressions for target groups."""

import re
from collections.abc import Sequence

from torch import nn


def outermost(module: nn.Module, classes: re.Pattern[str], *, outside: Sequence[str] = ()) -> tuple[str, ...]:
    """Full names, in order, of the modules whose class's name `classes` finds and that lie in no other such one.

    outside: beginnings of names that are left out.
    """
    found: list[str] = []
    for name, child in module.named_modules():
        inside = name.startswith((*outside, *(f"{block}." for block in found)))
        if classes.search(type(child).__name__) and not inside:
            found.append(name)
    return tuple(found)


def pattern_of(module: nn.Module, names: Sequence[str]) -> str:
    """A regular expression of exactly these full names; layer numbers become \\d+ where that adds no module.

    Of several numbers in a name the leading ones do first: blocks.\\d+.net.2 where blocks.0.net.1 is not meant.
    """
    everything = [name for name, _ in module.named_modules()]
    wanted = left = set(names)
    patterns: dict[str, None] = {}
    for kept in range(1 + max((name.count(".") + 1 for name in names), default=0)):
        by_shape: dict[str, set[str]] = {}
        for name in everything:
            by_shape.setdefault(_shape(name, kept), set()).add(name)
        for name in names:
            shape = _shape(name, kept)
            if name in left and by_shape[shape] <= wanted:
                patterns.setdefault(shape, None)
        left = {name for name in left if _shape(name, kept) not in patterns}
        if not left:
            break
    return "|".join(patterns)


def _shape(name: str, kept: int) -> str:
    """The name as a regular expression, every number but its last `kept` ones open."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    opened = set(numbers[: max(0, len(numbers) - kept)])
    return r"\.".join(r"\d+" if place in opened else re.escape(part) for place, part in enumerate(parts))
