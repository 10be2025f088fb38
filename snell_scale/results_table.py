"""What commands print: the table of runs that have ended, and plain lines."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snell_scale.metrics import metric
from snell_scale.records import Result

# Wide where nobody watches: a log must not lose the end of a name.
console = Console() if sys.stdout.isatty() else Console(width=160)


def print_results(results: list[Result]) -> None:
    """One row per run."""
    table = Table("run", "status", "validation", "test", "trainable", "peak MiB", "images/s")
    for result in results:
        name = result.metric or ""
        digits = f".{max(2, metric(name).digits)}f"
        peak = (result.memory or {}).get("peak") or {}
        speed = result.throughput.get("images_per_s")
        table.add_row(
            escape(result.name),
            result.status,
            *(_figure(result.metrics.get(split, {}).get(name), digits) for split in ("validation", "test")),
            _figure(result.num_trainable_params, ",d"),
            _figure(peak.get("total_bytes", 0) / 2**20 or None, ".1f"),
            _figure(speed, ",.0f"),
        )
    console.print(table)
    for result in results:
        if result.message:
            say(f"{result.name}: {result.status}: {result.message}")


def say(text: str) -> None:
    """User text as it is: no markup read in it, no line broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _figure(value: Any, style: str) -> str:
    return "–" if value is None else format(value, style)
