"""SIGTERM and Ctrl-C that wait for a moment at which the work can be put down."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Interruption:
    """What was asked for while interruptions are deferred."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._number: int | None = None

    @property
    def is_asked(self) -> bool:
        """Whether the work is to be put down at the next good moment."""
        return self._number is not None

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """The signal `number` has come; the second one ends the process at once."""
        if self._number is not None:
            self.leave()
        self._number = number

    def leave(self) -> NoReturn:
        """Raises SystemExit with the code that a process killed by the signal has."""
        raise SystemExit(128 + (self._number or signal.SIGTERM))


@contextmanager
def deferred_interruptions() -> Iterator[Interruption]:
    """SIGTERM and SIGINT in the block are only noted; one that the block did not act on ends the process after it."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = {number: signal.signal(number, interruption.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            # None is one that was not installed by Python, and can't be by it.
            signal.signal(number, handler or signal.SIG_DFL)
    if interruption.is_asked:
        interruption.leave()
