"""What a command shows on standard error while it works: a bar, or lines where that is a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Seconds between two lines where stderr is no terminal.
_LOG_INTERVAL = 10


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner; a line where nobody would see it turn."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(text)
    with console.status(text):
        yield


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar, and lines in a log; yields the function that moves it to a number of units.

    Args:
        label: what is being done.
        total: units of the whole.
        unit: their name, in the plural.
    """
    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        next_line = time.monotonic()

        def move(num_done: int) -> None:
            nonlocal next_line
            bar.update(task, completed=num_done)
            if not console.is_terminal and time.monotonic() >= next_line:
                console.print(f"{label}: {num_done} of {total} {unit}")
                next_line += _LOG_INTERVAL

        yield move
