import os
import signal
import threading
from collections.abc import Iterator

import pytest

from braintumor.interruption import deferred_interruptions


class Ended(Exception):
    """What the handler that stood before the block raises."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Both signals raise Ended outside of the block."""

    def end(number: int, frame: object) -> None:
        raise Ended

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_waits_until_the_block_acts_on_it(number: int, code: int) -> None:
    done = []
    with pytest.raises(SystemExit) as end, deferred_interruptions() as interruption:
        assert not interruption.is_asked
        send(number)
        assert interruption.is_asked
        done.append("saved")
        interruption.leave()
    assert done == ["saved"]
    assert end.value.code == code


def test_signal_that_the_block_did_not_act_on_ends_the_process_after_it() -> None:
    done = []
    with pytest.raises(SystemExit) as end, deferred_interruptions():
        send(signal.SIGTERM)
        done.append("all")
    assert done == ["all"]
    assert end.value.code == 143


def test_second_signal_ends_the_process_at_once() -> None:
    done = []
    with pytest.raises(SystemExit) as end, deferred_interruptions():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        done.append("never")
    assert done == []
    assert end.value.code == 130


def test_worker_that_leaves_as_another_was_told_to_ends_as_if_it_had_been() -> None:
    with pytest.raises(SystemExit) as end, deferred_interruptions() as interruption:
        interruption.leave()
    assert end.value.code == 143


def test_error_of_the_block_is_what_is_heard_of() -> None:
    with pytest.raises(ValueError, match="the loss became nan"), deferred_interruptions():
        send(signal.SIGTERM)
        raise ValueError("the loss became nan")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_handlers_are_as_before_after_the_block(number: int) -> None:
    with deferred_interruptions():
        pass
    with pytest.raises(Ended):
        send(number)


def test_thread_can_have_the_block_though_no_signal_comes_there() -> None:
    found = []

    def work() -> None:
        with deferred_interruptions() as interruption:
            found.append(interruption.is_asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
