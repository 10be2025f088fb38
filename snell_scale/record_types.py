"""Whether what was read of a record has the types that its fields declare. No torch: analysis reads with it."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

_MAX_SHOWN = 60
_NAMES = {Any: "anything", type(None): "null", bool: "true or false", str: "text", float: "a number", int: "int"}

# What the declared types leave open ("anything") and readers compute with.
_INNER: dict[str, Any] = {
    "conditions.microbatch_size": float,
    "conditions.gradient_accumulation": float,
    "conditions.ema_decay": float,
    "conditions.num_threads": float,
    "memory.peak": Mapping[str, Any],
    "memory.peak.total_bytes": float,
    "memory.phases": Mapping[str, Mapping[str, Any]],
    "memory.ranks": tuple[Mapping[str, Any], ...],
    "memory.ranks.peak": Mapping[str, Any],
}


def record_type_error(record: Mapping[str, Any], declared: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field that has another type than it declares; None where all are right."""
    errors = (type_error(name, record[name], declared[name]) for name in declared if name in record)
    inner = (
        type_error(path, value, expected) for path, expected in _INNER.items() for value in _at(record, path)
    )
    return next((error for error in (*errors, *inner) if error), None)


def _at(record: Mapping[str, Any], path: str) -> list[Any]:
    """The value there, that of every entry where a list is on the way; empty where there is none."""
    found: list[Any] = [record]
    for key in path.split("."):
        entries = [entry for value in found for entry in (value if isinstance(value, list) else [value])]
        found = [entry[key] for entry in entries if isinstance(entry, Mapping) and key in entry]
    return found


def type_error(name: str, value: Any, expected: Any) -> str | None:
    """ "seed is 'zero', expected int", or None where the value fits. expected: a type as JSON can hold it.

    A list fits a tuple, a whole number a float, and null too: it stands for a number that JSON does not have.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        (option,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else type_error(name, value, option)
    if origin is Mapping and isinstance(value, Mapping):
        errors = (type_error(f"{name}.{key}", item, arguments[1]) for key, item in value.items())
        return next((error for error in errors if error), None)
    if origin is tuple and isinstance(value, list | tuple):
        errors = (type_error(f"{name}.{index}", item, arguments[0]) for index, item in enumerate(value))
        return next((error for error in errors if error), None)
    return None if _fits(value, expected) else f"{name} is {_shown(value)}, expected {_named(expected)}"


def _fits(value: Any, expected: Any) -> bool:
    if expected is Any:
        return True
    if get_origin(expected) is not None:
        return get_origin(expected) is Literal and value in get_args(expected)
    if expected is float:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return isinstance(value, expected) and (expected is bool or not isinstance(value, bool))


def _named(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return " or ".join(map(str, get_args(expected)))
    return _NAMES.get(expected) or ("a mapping" if get_origin(expected) is Mapping else "a list")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
