"""Where a process stands among the workers, by what its orchestrator tells it."""

import json
import signal
from typing import Any

import numpy as np
import pytest

from braintumor.errors import UserError
from braintumor.model.distribution import Placement, _own_sigterm, agree, broadcast, make_strategy, placement

HOSTS = ["a.test:2222", "b.test:2222", "c.test:2222"]
TRAINER = {
    "PET_NNODES": "3",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "2",
    "PET_MASTER_ADDR": "train-7-node-0-0.train-7",
    "PET_MASTER_PORT": "29500",
    "JOB_COMPLETION_INDEX": "2",
}
JOBSET = {
    "BRAINTUMOR_WORKERS": "2",
    "BRAINTUMOR_JOBSET": "by-hand",
    "BRAINTUMOR_REPLICATED_JOB": "node",
    "JOB_COMPLETION_INDEX": "1",
}


def tf_config(cluster: Any, kind: Any = "worker", index: Any = 0) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


@pytest.mark.parametrize("distribution", ["one_device", "mirrored"])
@pytest.mark.parametrize(
    "environ", [{}, {"PET_NNODES": "1"}, {"JOB_COMPLETION_INDEX": "3"}, tf_config({"worker": HOSTS[:1]})]
)
def test_one_process_is_the_first_of_one(distribution: str, environ: dict[str, str]) -> None:
    assert placement(distribution, environ) == Placement(0, 1, ())


@pytest.mark.parametrize("environ", [TRAINER, JOBSET, tf_config({"worker": HOSTS}, index=1)])
def test_several_processes_do_not_train_the_same_each_for_itself(environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"(PET_NNODES|BRAINTUMOR_WORKERS|TF_CONFIG).*multi_worker"):
        placement("one_device", environ)


def test_workers_are_ranked_as_tf_config_lists_them_with_the_chief_first() -> None:
    assert placement("multi_worker", tf_config({"worker": HOSTS}, index=2)) == Placement(2, 3, tuple(HOSTS))
    with_chief = {"chief": HOSTS[2:], "worker": HOSTS[:2]}
    expected = (HOSTS[2], *HOSTS[:2])
    assert placement("multi_worker", tf_config(with_chief, "chief")) == Placement(0, 3, expected)
    assert placement("multi_worker", tf_config(with_chief, "worker", 1)) == Placement(2, 3, expected)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"cluster": {}}', '{"cluster": {"worker": 3}, "task": {"type": "worker", "index": 0}}',
        tf_config({})["TF_CONFIG"],
        tf_config({"worker": HOSTS}, index=3)["TF_CONFIG"],
        tf_config({"worker": HOSTS}, index=-1)["TF_CONFIG"],
        tf_config({"worker": HOSTS}, index="0")["TF_CONFIG"],
        tf_config({"worker": HOSTS}, index=True)["TF_CONFIG"],
        tf_config({"worker": HOSTS}, "chief")["TF_CONFIG"],
        tf_config({"worker": HOSTS}, ["worker"])["TF_CONFIG"],
        tf_config({"worker": HOSTS, "ps": ["p.test:1"]})["TF_CONFIG"],
        tf_config({"chief": HOSTS[:2], "worker": HOSTS[2:]})["TF_CONFIG"],
        tf_config({"worker": ["a.test", "b.test:1"]})["TF_CONFIG"],
        tf_config({"worker": ["a.test:99999"]})["TF_CONFIG"],
        tf_config({"worker": [7]})["TF_CONFIG"],
        tf_config({"worker": HOSTS + HOSTS[:1]})["TF_CONFIG"],
    ],
)  # fmt: skip
def test_tf_config_that_is_wrong_in_any_way_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match="TF_CONFIG"):
        placement("multi_worker", {"TF_CONFIG": text})


def test_all_peers_of_a_train_job_follow_from_the_name_of_its_first_pod() -> None:
    peers = tuple(f"train-7-node-0-{number}.train-7:29500" for number in range(3))
    assert placement("multi_worker", TRAINER) == Placement(2, 3, peers)
    without_index = {name: value for name, value in TRAINER.items() if name != "JOB_COMPLETION_INDEX"}
    assert placement("multi_worker", without_index) == Placement(2, 3, peers)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PET_NNODES", "1:4"), ("PET_NNODES", "0"), ("PET_NNODES", "2"),
        ("PET_NODE_RANK", ""), ("PET_NODE_RANK", "3"), ("PET_NODE_RANK", "1"), ("PET_NODE_RANK", "-1"),
        ("PET_MASTER_ADDR", ""), ("PET_MASTER_ADDR", "localhost"), ("PET_MASTER_ADDR", "train-7-node-0-1.train-7"),
        ("PET_MASTER_PORT", ""), ("PET_MASTER_PORT", "0"), ("PET_MASTER_PORT", "http"), ("PET_MASTER_PORT", "70000"),
        ("JOB_COMPLETION_INDEX", "0"),
    ],
)  # fmt: skip
def test_pieces_of_a_train_job_that_are_missing_or_contradict_each_other_are_named(name: str, value: str) -> None:
    named = {"PET_MASTER_PORT": "PET_MASTER_"}.get(name, name)
    with pytest.raises(UserError, match=named):
        placement("multi_worker", TRAINER | {name: value})


def test_peers_of_a_jobset_follow_from_its_names() -> None:
    peers = ("by-hand-node-0-0.by-hand:29500", "by-hand-node-0-1.by-hand:29500")
    assert placement("multi_worker", JOBSET) == Placement(1, 2, peers)


@pytest.mark.parametrize("name", JOBSET)
def test_a_piece_of_a_jobset_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(UserError, match=name):
        placement("multi_worker", JOBSET | {name: ""})


def test_two_orchestrators_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="TF_CONFIG and PET_NNODES"):
        placement("multi_worker", TRAINER | tf_config({"worker": HOSTS}))
    peers = [f"train-7-node-0-{number}.train-7:29500" for number in range(3)]
    assert placement("multi_worker", TRAINER | tf_config({"worker": peers}, index=2)).rank == 2


def test_nobody_but_oneself_is_said_with_what_to_do() -> None:
    with pytest.raises(UserError, match="training_nodes"):
        placement("multi_worker", {})


def test_one_process_agrees_with_itself_and_keeps_what_it_has() -> None:
    place = Placement()
    strategy = make_strategy(place, "one_device")
    agree(strategy, place, {"key": "any"})
    given = {"a": np.arange(3)}
    found = broadcast(strategy, place, given)
    assert found is not None
    assert found["a"].tolist() == [0, 1, 2]
    assert broadcast(strategy, place, None) is None


def test_sigterm_is_again_what_it_was() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with _own_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == previous
