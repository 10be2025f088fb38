"""The record of a benchmark on disk: its schema, writer and reader. No torch: analysis reads with it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from snell_scale.records import write_json

SCHEMA_VERSION = 1
FILE_NAME = "bench.json"
# What ratios are taken to, where a benchmark has these sides.
BASES = ("frozen", "probe", "lora", "full", "naive", "bare", "single")
_MIB = 2**20
_T = TypeVar("_T")


@dataclass(frozen=True)
class Figure:
    """How a further figure of a row is shown: value / divisor under a heading."""

    heading: str
    divisor: int = 1
    digits: int = 2


# Further figures of a row by their key in the record; one that is not listed is kept, but not shown.
FIGURES = {
    "overhead_ms": Figure("overhead ms"),
    "images_per_s": Figure("images/s", digits=1),
    "payload_bytes": Figure("payload MiB", _MIB),
    "wire_bytes_per_rank": Figure("wire MiB/rank", _MIB),
    "gradient_bytes": Figure("gradients MiB", _MIB),
}


@dataclass(frozen=True)
class Gate:
    """One check of correctness before anything was timed: `value` must not exceed `limit`.

    A value that is not finite is None in the file.
    """

    case: str
    name: str
    value: float | None
    limit: float

    @property
    def passed(self) -> bool:
        # Not "value > limit": NaN must fail.
        return self.value is not None and self.value <= self.limit


@dataclass(frozen=True)
class Row:
    """One side of one case. None where it was not measured; `error` says why, where it could not be.

    Milliseconds of one round, over `rounds` rounds in which every side ran once. peak_bytes: see the record's
    `memory_source`. ratios: base side → {"median", "p10", "p90"} of this side's time over the base's, formed
    round by round. figures: what only some benchmarks measure, by a name with its unit.
    """

    case: str
    side: str
    rounds: int = 0
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    peak_bytes: int | None = None
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Aim:
    """A stated target: `value` must not exceed `limit` (or must reach it, where at_least)."""

    case: str
    what: str
    limit: float
    value: float | None = None
    at_least: bool = False
    note: str | None = None

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class BenchRecord:
    """bench.json. `environment` as instrument.environment collects it; `hardware`: the processor or GPU timed.

    interrupted: the user stopped it; the rows are those of the rounds and cases before.
    """

    command: str
    name: str
    created: str
    hardware: str
    device: str
    dtype: str
    num_threads: int
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    memory_source: str
    gates: Sequence[Gate] = ()
    rows: Sequence[Row] = ()
    aims: Sequence[Aim] = ()
    seconds: float | None = None
    interrupted: bool = False
    schema_version: int = SCHEMA_VERSION


def write_bench(folder: Path, record: BenchRecord) -> Path:
    """Write <folder>/bench.json, old or new at every instant; returns its path."""
    path = folder / FILE_NAME
    write_json(path, asdict(record))
    return path


def read_bench(path: Path) -> BenchRecord:
    """The record in a file, or in a folder's bench.json. ValueError names the file and what is wrong with it."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no benchmark record {path}; make one with `snell-scale bench`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        raise ValueError(f"{path} has schema version {version}, expected {SCHEMA_VERSION}")
    parts = {"gates": Gate, "rows": Row, "aims": Aim}
    nested = {name: _entries(path, cls, name, raw.get(name, [])) for name, cls in parts.items()}
    return _entry(path, BenchRecord, raw | nested)


def _entries(path: Path, cls: type[_T], name: str, items: Any) -> tuple[_T, ...]:
    if not isinstance(items, list):
        raise ValueError(f"{path}: {name} is {items!r}, expected a list")
    return tuple(_entry(path, cls, item) for item in items)


def _entry(path: Path, cls: type[_T], raw: Any) -> _T:
    known = fields(cast(Any, cls))  # a type variable cannot say "dataclass"
    required = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    given = set(raw) if isinstance(raw, Mapping) else set()
    unknown, missing = given - {f.name for f in known}, required - given
    if unknown or missing:
        raise ValueError(f"{path}: {cls.__name__}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    return cls(**raw)
