"""What a person sees while a step works: bars on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]
SECONDS_BETWEEN_LINES = 10.0
Progress = Callable[[str, int], Advance]  # (what is under way, how many units) -> call once a unit


def silent(title: str, total: int) -> Advance:
    """Progress that shows nothing."""
    return lambda: None


@contextmanager
def shown() -> Iterator[Progress]:
    """Progress on stderr: bars on a terminal; elsewhere a line every ten seconds and one at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=console) as bars:

        def start(title: str, total: int) -> Advance:
            task = bars.add_task(title, total=total)
            return lambda: bars.advance(task)

        yield start


def _plain(title: str, total: int) -> Advance:
    started = told = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, told
        done += 1
        now = time.monotonic()
        if done == total or now - told >= SECONDS_BETWEEN_LINES:
            told = now
            _print(f"{title}: {done} of {total} ({now - started:.0f} s)")

    return advance


def note(message: str) -> None:
    """Say something on stderr, where it can't be taken for a command's result."""
    _print(message)


def warn(message: str) -> None:
    """Say on stderr that something is not as it should be, though the step goes on."""
    _print(f"Warning: {message}")


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
