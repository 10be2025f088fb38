"""What a benchmark shows while it works: a live line on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class BenchProgress:
    """Says what is being done, and counts timed rounds."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()

    def say(self, text: str) -> None:
        """One line about what comes next."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def rounds(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function to be told the number of rounds done; it costs nothing between windows."""
        if not self._console.is_terminal:
            self.say(f"{text}: {total} rounds")
            yield _ignore
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # No refreshing thread: it would take time from the windows. It is drawn when a round ends.
        with Progress(*columns, console=self._console, auto_refresh=False, transient=True) as bar:
            task = bar.add_task(text, total=total)

            def done(count: int) -> None:
                bar.update(task, completed=count, refresh=True)

            bar.refresh()
            yield done


def _ignore(_: int) -> None:
    return None
