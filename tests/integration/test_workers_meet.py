"""Two processes on loopback become one training: they tell each other what they have, and notice each other's end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from braintumor.errors import UserError
from braintumor.model import distribution
from braintumor.model.distribution import WorkerLost

WORKER = """
import os, signal, sys, time
import numpy as np
from braintumor.errors import UserError
from braintumor.model import distribution
from braintumor.model.distribution import agree, broadcast, lost_workers_as_message, make_strategy, placement
from braintumor.model.distribution import sum_over_workers

distribution.HEARTBEAT_TIMEOUT_S = 10
evicted = []
signal.signal(signal.SIGTERM, lambda *_: evicted.append(True))
place = placement("multi_worker", os.environ)
strategy = make_strategy(place, "multi_worker")
os.kill(os.getpid(), signal.SIGTERM)
while not evicted:
    time.sleep(0.01)

mine = {
    "odd": np.array([-0.0, 1.5, np.nan, -np.inf], np.float32),
    "whole": np.arange(7, dtype=np.int16).reshape(7, 1),
    "none": np.zeros((0, 3)),
    "scalar": np.float64(0.1),
}
found = broadcast(strategy, place, mine if place.is_first else {"odd": np.ones(9)})
assert {name: (value.dtype, value.shape, value.tobytes()) for name, value in found.items()} == {
    name: (value.dtype, value.shape, value.tobytes()) for name, value in mine.items()
}
assert broadcast(strategy, place, None if place.is_first else mine) is None
assert sum_over_workers(strategy, np.full((2, 2), place.rank + 1.0)).tolist() == [[3.0, 3.0]] * 2
agree(strategy, place, {"image": "same"})
try:
    agree(strategy, place, {"image": "same", "data": str(place.rank)})
except UserError as error:
    print(error, flush=True)
with lost_workers_as_message(place):
    for number in range(10_000):
        if number == 3 and place.rank == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        sum_over_workers(strategy, np.ones(3, np.float32))
"""


def free_ports(number: int) -> list[int]:
    held = [socket.socket() for _ in range(number)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


def started(rank: int, peers: list[str], program: str, *arguments: str) -> subprocess.Popen[str]:
    config = {"cluster": {"worker": peers}, "task": {"type": "worker", "index": rank}}
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "BRAINTUMOR_"))}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environ | {"TF_CONFIG": json.dumps(config), "TF_CPP_MIN_LOG_LEVEL": "2"},
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_workers_share_what_the_first_has_refuse_what_differs_and_say_who_was_lost() -> None:
    peers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    workers = [started(rank, peers, WORKER, "1") for rank in range(2)]
    try:
        told = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert workers[1].returncode == -signal.SIGKILL, told[1][1]
    assert workers[0].returncode == 1, told[0][1]
    for out, _ in told:
        assert out.startswith("data of worker 1 differs from that of worker 0")
    assert f"WorkerLost: worker 1 at {peers[1]} of this training was lost" in told[0][1]


def test_a_worker_that_never_comes_is_named_and_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "START_TIMEOUT_S", 0.3)
    peers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    with pytest.raises(UserError, match=rf"1 of 2 workers did not come.*{peers[1]}"):
        distribution.make_strategy(distribution.Placement(0, 2, tuple(peers)), "multi_worker")


def test_a_lost_worker_is_told_from_a_mistake_by_its_exit_code() -> None:
    assert WorkerLost("gone").exit_code not in (0, 1, UserError.exit_code, 128 + signal.SIGTERM)
