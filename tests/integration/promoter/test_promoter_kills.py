"""Promoters that are killed, and several at once: each change has one entry, and the champion is the right one."""

import random
import signal
import threading
import time
from collections.abc import Callable

from promoter_processes import (
    POLL_S,
    ROUND_S,
    Hook,
    Promoters,
    Proxy,
    Registry,
    wait_for,
)

Change = tuple[Callable[[Registry], None], tuple[str, str]]
CHANGES: list[Change] = [
    (lambda registry: registry.promote("1"), ("promoted", "1")),
    # Its evaluation knows no champion.
    (lambda registry: registry.promote("2"), ("refused", "2")),
]


def test_killed_after_any_of_its_writes_another_promoter_finishes_the_work(
    registry: Registry, promoters: Promoters, hook: Hook, proxy: Proxy
) -> None:
    kills = dict.fromkeys(range(len(CHANGES)), 0)
    last, unfinished = 0, set(kills)
    while unfinished:
        last += 1
        registry.clear()
        hook.calls.clear()
        for number, (change, _) in enumerate(CHANGES[: max(unfinished) + 1]):
            proxy.n_writes = 0
            proxy.after_write = lambda count, last=last: promoters.started[-1].kill() if count == last else None
            change(registry)
            code = promoters.once(MLFLOW_TRACKING_URI=proxy.address)
            if code == -signal.SIGKILL:
                kills[number] += 1
                assert promoters.once() == 0
            else:
                assert code == 0
                unfinished -= {number}
            assert registry.actions == [action for _, action in CHANGES[: number + 1]], (last, promoters.said())
            registry.check(hook)
    # Ledger, entry, tags of pages, alias, deployment: there are at least so many moments.
    assert kills[0] >= 12 and kills[1] >= 6


def test_killed_between_the_hook_and_its_record_it_calls_again_with_the_same_key(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    registry.promote("1")
    hook.before_answer = lambda: promoters.started[-1].kill()
    assert promoters.once() == -signal.SIGKILL
    assert registry.n_open == 1
    hook.before_answer = lambda: None
    assert promoters.once() == 0
    registry.check(hook)
    assert [call["entry_sha256"] for call in hook.calls] == [registry.entries[0].sha256] * 2


def test_killed_at_any_moment_another_promoter_finishes_the_work(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    moments = random.Random(7)
    for number in range(4):
        registry.remove() if number % 2 else registry.promote("1")
        for _ in range(2):
            process = promoters.start("--once")
            process.join(moments.uniform(0.02, 0.9))
            process.kill()
            process.join()
        assert promoters.once() == 0
        assert len(registry.actions) == number + 1
        expected = "removed" if number % 2 else "rolled back" if number else "promoted"
        assert registry.actions[-1] == (expected, "1")
        registry.check(hook)


def test_several_promoters_at_once_write_each_entry_once(registry: Registry, promoters: Promoters, hook: Hook) -> None:
    for change in (lambda: registry.promote("1"), lambda: registry.promote("2"), registry.remove):
        change()
        together = [promoters.start("--once") for _ in range(3)]
        for process in together:
            process.join(ROUND_S)
            assert process.exitcode == 0, promoters.said()
    assert registry.actions == [("promoted", "1"), ("refused", "2"), ("removed", "1")]
    registry.check(hook)


def test_of_two_promotions_at_once_the_ledger_and_the_alias_name_the_same_one(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    for _ in range(2):
        promoters.serve()
    reviewers = [threading.Thread(target=registry.promote, args=(version,)) for version in ("1", "2")]
    for reviewer in reviewers:
        reviewer.start()
    for reviewer in reviewers:
        reviewer.join()
    wait_for(lambda: registry.actions and registry.n_open == 0)
    time.sleep(3 * POLL_S)
    assert registry.actions in [
        [("promoted", "1")], [("promoted", "2")],
        [("promoted", "1"), ("refused", "2")], [("promoted", "2"), ("refused", "1")],
    ]  # fmt: skip
    registry.check(hook)
