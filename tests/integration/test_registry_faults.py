"""What a registration leaves when a part of the registry dies under it: nothing by halves; the next try finishes."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from registry_stack import Stack, registry_stack

from braintumor import artifacts
from braintumor.errors import RegistryUnreachable, UserError
from braintumor.params import Params, Profile
from braintumor.promoter import promote_once
from braintumor.registry import ledger
from braintumor.registry.server import connected
from braintumor.registry.versions import download_model
from braintumor.steps.gate import gate
from braintumor.steps.register import Registration, register


class Trouble:
    """Does something when the client asks the server for what `moment` says: once, or so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self._moment, self._is_after, self.left = "", False, 0
        self._action: Callable[[], None] = lambda: None
        send = requests.adapters.HTTPAdapter.send
        lock = threading.Lock()

        def watched(adapter: Any, request: Any, *arguments: Any, **options: Any) -> Any:
            with lock:
                asked = f"{request.method} {request.url}"
                self.asked.append(asked)
                is_due = self.left > 0 and re.search(self._moment, asked) is not None
                self.left -= is_due
            if is_due and not self._is_after:
                self._action()
            answer = send(adapter, request, *arguments, **options)
            if is_due and self._is_after:
                self._action()
                raise requests.ConnectionError("the answer is lost")
            return answer

        monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", watched)

    def plan(self, moment: str, action: Callable[[], None], *, is_after: bool = False, times: int = 1) -> None:
        self._moment, self._action, self._is_after, self.left = moment, action, is_after, times

    @property
    def has_come(self) -> bool:
        return self.left == 0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with registry_stack(tmp_path_factory.mktemp("stack"), workers=1) as running:
        yield running


@pytest.fixture
def server(stack: Stack, no_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    for name, value in stack.environment_of("pipeline").items():
        monkeypatch.setenv(name, value)
    # A test need not wait for a server that it has killed.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield stack
    for part in ("postgres", "s3", "mlflow"):
        if not stack.is_running(part):  # type: ignore[arg-type]
            stack.start(part)  # type: ignore[arg-type]


@pytest.fixture
def tiny_models(tiny_models: list[Path], tmp_path: Path) -> list[Path]:
    """Models that no other test has: a model has one run on a server, whatever the experiment."""
    from braintumor.model.densenet import import_keras

    keras = import_keras()
    own = []
    for path in tiny_models:
        model = keras.saving.load_model(path)
        model.set_weights([weights + np.float32(np.random.default_rng().normal()) for weights in model.get_weights()])
        own.append(tmp_path / path.name)
        model.save(own[-1])
    return own


@pytest.fixture
def trouble(server: Stack, monkeypatch: pytest.MonkeyPatch) -> Trouble:
    return Trouble(monkeypatch)


@pytest.fixture
def own_params(params: Params, request: pytest.FixtureRequest) -> Params:
    """Model and experiment are this test's own."""
    name = "".join(sign if sign.isalnum() else "-" for sign in request.node.name)[-60:]
    own = params.registration.model_copy(update={"model_name": name, "experiment": f"experiment of {name}"})
    return params.model_copy(update={"registration": own})


@pytest.fixture
def passed(make_folders: Callable[..., Any], own_params: Params, server: Stack) -> Any:
    return judged(make_folders(), own_params)


def judged(folders: Any, params: Params) -> Any:
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    return folders


def run_register(folders: Any, params: Params) -> Registration:
    return register(
        folders.model, folders.splits, folders.evaluation, folders.decision, folders.context, folders.validation,
        folders.registration, params,
    )  # fmt: skip


def versions_of(stack: Stack, name: str) -> list[tuple[str, str, bool, int]]:
    """Number, status, whether there is a card, and the number of tags of each version, as the database has it."""
    rows = stack.query(
        "SELECT version, status, description LIKE '%not a diagnostic device%', (SELECT count(*) FROM "
        "model_version_tags t WHERE t.name = v.name AND t.version = v.version) "
        f"FROM model_versions v WHERE name = '{name}' ORDER BY version"
    )
    return [(row[0], row[1], row[2] == "True", int(row[3])) for row in rows]


def refuse_half_a_version(stack: Stack, name: str) -> None:
    """A version that is there is one that a reviewer may look at."""
    for _, status, has_card, n_tags in versions_of(stack, name):
        assert status == "READY" and has_card and n_tags > 10


def expect_one_complete_version(stack: Stack, folders: Any, params: Params, tmp_path: Path) -> None:
    name = params.registration.model_name
    found = versions_of(stack, name)
    assert [number for number, *_ in found] == ["1"]
    refuse_half_a_version(stack, name)
    assert stack.query(f"SELECT alias, version FROM registered_model_aliases WHERE name = '{name}'") == [
        ["challenger", "1"]
    ]
    file = download_model(name, "1", tmp_path / "downloaded")
    assert file.read_bytes() == (folders.model / artifacts.MODEL).read_bytes()
    with connected() as client:
        run_id = client.get_model_version(name, "1").run_id
        run = client.get_run(run_id)
        assert run.data.tags["outcome"] == "registered"
        assert {file.path for file in client.list_artifacts(run_id)} >= {"training", "evaluation", "gate", "data"}
    ready = stack.query(
        "SELECT m.status FROM logged_models m JOIN experiments e USING (experiment_id) "
        f"WHERE e.name = '{params.registration.experiment}' AND m.lifecycle_stage = 'active'"
    )
    # 2: READY. Another one is what an interrupted upload left in the run, and never a version's.
    assert ["2"] in ready


# What the client asks for when the server dies, and whether the server has heard it.
MOMENTS = [
    ("the run is made, and its answer lost", r"runs/create$", True),
    ("in the middle of the evaluation", r"PUT .*/evaluation/metrics.json$", False),
    ("after the model's file", r"PUT .*/models/m-\w+/artifacts/data/model.keras$", True),
    ("before the version", r"model-versions/create$", False),
    ("the version is made, and its answer lost", r"model-versions/create$", True),
    ("the alias is set, and its answer lost", r"registered-models/alias$", True),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("moment", "is_after"), [moment[1:] for moment in MOMENTS], ids=[moment[0] for moment in MOMENTS]
)
def test_a_server_that_is_killed_costs_a_second_try_and_nothing_else(
    trouble: Trouble, passed: Any, own_params: Params, server: Stack, tmp_path: Path, moment: str, is_after: bool
) -> None:
    trouble.plan(moment, lambda: server.kill("mlflow"), is_after=is_after)
    with pytest.raises(RegistryUnreachable):
        run_register(passed, own_params)
    assert trouble.has_come
    assert not passed.registration.exists()
    refuse_half_a_version(server, own_params.registration.model_name)
    server.start("mlflow")
    first = run_register(passed, own_params)
    expect_one_complete_version(server, passed, own_params, tmp_path)
    assert run_register(passed, own_params) == first
    assert len(versions_of(server, own_params.registration.model_name)) == 1


@pytest.mark.timeout(600)
def test_a_database_that_is_restarted_at_every_turn_is_at_most_another_try(
    trouble: Trouble, passed: Any, own_params: Params, server: Stack, tmp_path: Path
) -> None:
    turns = "log-batch|training.json|decision.json|registered-models/create|logged-models|outputs|versions/create|alias"
    trouble.plan(f"(POST|PUT) .*({turns})$", lambda: server.restart("postgres"), times=12)
    for _ in range(13):
        try:
            run_register(passed, own_params)
            break
        except UserError:
            assert not passed.registration.exists()
            refuse_half_a_version(server, own_params.registration.model_name)
    assert trouble.left < 3
    trouble.left = 0
    run_register(passed, own_params)
    expect_one_complete_version(server, passed, own_params, tmp_path)


@pytest.mark.timeout(600)
def test_a_database_that_stays_away_is_told(
    trouble: Trouble, passed: Any, own_params: Params, server: Stack, tmp_path: Path
) -> None:
    trouble.plan(r"model-versions/create$", lambda: server.kill("postgres"))
    with pytest.raises(RegistryUnreachable):
        run_register(passed, own_params)
    assert trouble.has_come
    server.start("postgres")
    assert versions_of(server, own_params.registration.model_name) == []
    run_register(passed, own_params)
    expect_one_complete_version(server, passed, own_params, tmp_path)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("trial", "moment"),
    [("read-only", r"PUT .*/training/training.json$"), ("stopped", r"PUT .*/models/m-\w+/artifacts/data/model.keras$")],
)
def test_a_store_that_takes_nothing_leaves_no_version(
    trouble: Trouble, passed: Any, own_params: Params, server: Stack, tmp_path: Path, trial: str, moment: str
) -> None:
    def refuse() -> None:
        server.kill("s3")
        if trial == "read-only":
            server.s3_actions = ("Read", "List")
            server.start("s3")

    trouble.plan(moment, refuse)
    try:
        with pytest.raises(UserError) as told:
            run_register(passed, own_params)
        assert not any(secret in str(told.value) for secret in server.secrets)
        assert trouble.has_come
        assert versions_of(server, own_params.registration.model_name) == []
    finally:
        server.s3_actions = ("Admin",)
        if server.is_running("s3"):
            server.kill("s3")
        server.start("s3")
    run_register(passed, own_params)
    expect_one_complete_version(server, passed, own_params, tmp_path)


def at_once(*calls: Callable[[], Registration]) -> list[Registration | UserError]:
    """What each of them gives, started at the same moment."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Registration]) -> Registration | UserError:
        barrier.wait()
        try:
            return call()
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.timeout(600)
def test_a_model_that_is_registered_twice_at_once_is_one_version(
    trouble: Trouble, passed: Any, own_params: Params, server: Stack, tmp_path: Path
) -> None:
    # Neither has seen a version of the other when it makes its own.
    both = threading.Barrier(2)
    trouble.plan(r"model-versions/create$", lambda: both.wait(60) and None, times=2)
    twin = tmp_path / "twin"
    shutil.copytree(passed.root, twin)
    other = type(passed)(twin, *(twin / getattr(passed, part).name for part in PARTS))
    results = at_once(lambda: run_register(passed, own_params), lambda: run_register(other, own_params))
    assert any(isinstance(result, Registration) for result in results), results
    again = [run_register(folders, own_params) for folders in (passed, other)]
    assert again[0].version == again[1].version == "1"
    expect_one_complete_version(server, passed, own_params, tmp_path)


PARTS = ("validation", "model", "splits", "evaluation", "decision", "context", "registration")


@pytest.mark.timeout(600)
def test_two_models_that_are_registered_at_once_are_two_versions(
    make_folders: Callable[..., Any], params: Params, server: Stack
) -> None:
    # In the model and the experiment that the administrator made.
    both = [judged(make_folders(f"build-{seed}", seed=seed), params) for seed in (1, 2)]
    results = at_once(*(lambda folders=folders: run_register(folders, params) for folders in both))
    assert any(isinstance(result, Registration) for result in results), results
    again = {run_register(folders, params).version: folders for folders in both}
    name = params.registration.model_name
    assert [number for number, *_ in versions_of(server, name)] == sorted(again) == ["1", "2"]
    refuse_half_a_version(server, name)
    assert server.query(f"SELECT alias, version FROM registered_model_aliases WHERE name = '{name}'") == [
        ["challenger", "2"]
    ]
    for number, folders in again.items():
        file = download_model(name, number, folders.root / "downloaded")
        assert file.read_bytes() == (folders.model / artifacts.MODEL).read_bytes()


@pytest.mark.timeout(600)
def test_a_promoted_model_is_registered_again_and_nothing_of_it_changes(
    make_folders: Callable[..., Any], params: Profile, server: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act_as(user: str) -> None:
        for variable, value in server.environment_of(user).items():
            monkeypatch.setenv(variable, value)

    folders, name = judged(make_folders(), params), params.registration.model_name
    first = run_register(folders, params)
    act_as("reviewer")
    with connected() as client:
        client.set_registered_model_alias(name, "champion", first.version)
    act_as("promoter")
    # PostgreSQL goes away in the middle of the round; the next round finishes what is left.
    trouble = Trouble(monkeypatch)
    trouble.plan(r"runs/log-batch$", lambda: server.restart("postgres"))
    with suppress(UserError):
        promote_once(params)
    promote_once(params)
    assert trouble.has_come
    with connected() as client:
        entries = ledger.read(client, name)
    assert [(one.entry.action, one.entry.after, one.is_open) for one in entries] == [("promoted", first.version, False)]
    rows = f"FROM model_version_tags WHERE name = '{name}' AND version = {first.version} ORDER BY 1"
    before = server.query(f"SELECT key, value {rows}")
    act_as("pipeline")
    assert run_register(folders, params) == first
    assert server.query(f"SELECT key, value {rows}") == before
