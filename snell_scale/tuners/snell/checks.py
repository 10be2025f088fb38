"""Checks of configuration values: each raises ValueError saying what came, what is valid and what to do."""

import math
from collections.abc import Sequence
from typing import TypeGuard


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """A whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_fraction(name: str, value: object, *, advice: str = "") -> None:
    """A number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}{'; ' + advice if advice else ''}")


def check_positive(name: str, value: object, *, advice: str = "") -> None:
    """A finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}{'; ' + advice if advice else ''}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """One of the choices."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, choices))}")


def check_names(name: str, value: object) -> None:
    """None, one string, or a list of non-empty strings."""
    if value is None or (isinstance(value, str) and value):
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{name} must be a list of module names or one regular expression, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """An int or float that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
