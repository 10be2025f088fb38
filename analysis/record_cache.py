"""Rows of records read before, in the user's cache folder: a record that has not changed is not read again.

One parquet file per set of paths that were loaded together: each record's absolute folder, its files' stamp,
its row as JSON. A cache that is damaged, unwritable or of other code is as good as none: only time is lost.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet

import analysis.rows
import snell_scale.record_types
import snell_scale.record_versions
import snell_scale.records
from analysis.rows import Row
from snell_scale.records import write_atomically

MIN_RECORDS = 200  # below it reading takes less time than a person notices, and leaves nothing behind
_COLUMNS = ("folder", "stamp", "row")
_MAKES_ROWS = (analysis.rows, snell_scale.record_types, snell_scale.record_versions, snell_scale.records)


class Stamped(NamedTuple):
    """A row and the state of the files that it was made of."""

    stamp: str
    row: Row


def cache_file(paths: Sequence[str | Path]) -> Path:
    """Where the rows of these paths are kept; the order of the paths makes no difference."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = "\n".join(sorted({str(Path(path).resolve()) for path in paths}))
    return Path(home) / "snell-scale" / f"runs-{hashlib.sha256(key.encode()).hexdigest()[:24]}.parquet"


def stamp_of(folder: Path) -> str:
    """Changes with the record, and with the config that the upgrade of an early record reads."""
    stamps = []
    for name in ("result.json", "config.yaml"):
        try:
            status = (folder / name).stat()
        except OSError:
            stamps.append("-")
        else:
            stamps.append(f"{status.st_mtime_ns}:{status.st_size}:{status.st_ino}")
    return " ".join(stamps)


def read_cache(path: Path) -> dict[str, Stamped]:
    """Absolute folder → what was kept of it; empty where there is nothing that can be used."""
    try:
        table = parquet.read_table(path)
        if (table.schema.metadata or {}).get(b"code") != _code():
            return {}
        columns = [table.column(name).to_pylist() for name in _COLUMNS]
        return {folder: Stamped(stamp, json.loads(row)) for folder, stamp, row in zip(*columns, strict=True)}
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException):
        return {}


def write_cache(path: Path, rows: Mapping[str, Stamped]) -> None:
    """Keep the rows, if that is possible."""
    columns = [
        list(rows),
        [kept.stamp for kept in rows.values()],
        [json.dumps(kept.row) for kept in rows.values()],
    ]
    table = pyarrow.table([pyarrow.array(column, pyarrow.string()) for column in columns], names=list(_COLUMNS))
    content = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({b"code": _code()}), content)
    try:
        write_atomically(path, content.getvalue())
    except OSError:
        return


def _code() -> bytes:
    """The sources that make rows of records: no number that somebody has to think of when they change."""
    sources = [Path(str(module.__file__)).read_bytes() for module in _MAKES_ROWS]
    return hashlib.sha256(b"\0".join(sources)).hexdigest().encode()
