"""Where a config's values come from: YAML files that extend one another, variants, dotted overrides.

A file may `extends:` another one and holds only what differs. `variants:` holds, per method name, settings
that apply when that method is chosen. Overrides (`training.lr=1e-3`) win over both.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

COMPONENT_KINDS = ("model", "data", "task", "method", "engine")
# Every engine has these, and they are the run's as much as the engine's: they outlive a change of engine.name.
SHARED_ENGINE_KEYS = frozenset({"device", "precision", "frozen_dtype", "cpu_threads", "timeout_seconds"})


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML forbids it, and the parser would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        double = sorted({str(key) for key in keys if keys.count(key) > 1})
        if double:
            raise yaml.YAMLError(f"the key {double[0]!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, merged over the file its `extends:` names (relative to it)."""
    return _read_chain(Path(path), seen=())


def with_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides applied; the chosen method's `variants` entry lies between the file and the overrides."""
    parsed = [_parse_override(text) for text in overrides]
    variants = raw.get("variants") or {}
    base = {key: value for key, value in raw.items() if key != "variants"}
    merged = _deep_merge(base, _nested(parsed))
    name = merged["method"].get("name") if isinstance(merged.get("method"), dict) else None
    chosen = variants.get(name) if isinstance(name, str) else None
    return _deep_merge(_deep_merge(base, chosen or {}), _nested(parsed))


def parse_value(text: str) -> Any:
    """A YAML scalar or list, with 1e-3 read as the number that it is (YAML 1.1 calls it a string)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a YAML value; quote it, e.g. 'name=\"a: b\"'") from None
    return _numbers(value)


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        siblings = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), siblings, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"no config file at {path}{hint}")
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself, through {' → '.join(p.name for p in seen)}")
    try:
        raw = _numbers(yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected a mapping of config keys")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    return _deep_merge(_read_chain(path.parent / str(parent), (*seen, path.resolve())), raw)


def _deep_merge(base: Mapping[str, Any], delta: Mapping[str, Any]) -> dict[str, Any]:
    """`delta` over `base`. Where a section's `name` changes, options of the other component are void."""
    merged = dict(base)
    for key, value in delta.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            is_renamed = key in COMPONENT_KINDS and value.get("name", old.get("name")) != old.get("name")
            merged[key] = _deep_merge(_outliving(key, old) if is_renamed else old, value)
        else:
            merged[key] = value
    return merged


def _outliving(kind: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of a section holds for another component too: all of a method's (rank, targets), for `variants` tell
    methods apart, what all engines share, and nothing of the others.
    """
    if kind == "method":
        return section
    shared = SHARED_ENGINE_KEYS if kind == "engine" else ()
    return {key: section[key] for key in shared if key in section}


def _parse_override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"override {text!r} is not of the form key=value, e.g. training.lr=1e-3")
    return key.strip(), parse_value(value)


def _numbers(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.lower() not in ("e", "inf", "nan") else value
        except ValueError:
            return value
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value


def _nested(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for dotted, value in pairs:
        node = tree
        *parents, last = dotted.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {dotted}: {parent} was already set to a value")
        node[last] = value
    return tree
