"""What a person sees while a step works: bars on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]
Progress = Callable[[str, int], Advance]  # (what is under way, how many units) -> call once a unit


def silent(title: str, total: int) -> Advance:
    """Progress that shows nothing."""
    return lambda: None


@contextmanager
def shown() -> Iterator[Progress]:
    """Progress on stderr: bars on a terminal; elsewhere one line when a bar starts and one for every tenth of it."""
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
    started = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done == total or done * 10 // total > (done - 1) * 10 // total:
            _print(f"{title}: {done} of {total} ({time.monotonic() - started:.0f} s)")

    return advance


def note(message: str) -> None:
    """Say something on stderr, where it can't be taken for a command's result."""
    _print(message)


def warn(message: str) -> None:
    """Say on stderr that something is not as it should be, though the step goes on."""
    _print(f"Warning: {message}")


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
