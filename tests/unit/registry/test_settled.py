import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braintumor import artifacts
from braintumor.errors import UserError
from braintumor.params import Params
from braintumor.registry import settled, versions
from braintumor.registry.server import connected
from braintumor.steps.gate import gate
from braintumor.steps.register import Registration, register
from braintumor.steps.resolve import Context, resolve


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    image = tmp_path / "data/train/glioma/1.png"
    image.parent.mkdir(parents=True)
    image.write_text("1")
    return tmp_path / "data"


@pytest.fixture
def resolved(dataset: Path, store: Path, tmp_path: Path, params: Params) -> Callable[[], Context]:
    def run() -> Context:
        return resolve(dataset, tmp_path / "resolve", params.registration)

    run()
    return run


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*given: Any) -> None:
        raise UserError("MLflow was asked")

    monkeypatch.setattr(versions, "connected", asked)


def test_where_nothing_changed_resolve_asks_nobody_and_writes_the_same(
    resolved: Callable[[], Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in (tmp_path / "resolve").iterdir()}
    forbid(monkeypatch)
    for path in (tmp_path / "resolve").iterdir():
        path.unlink()
    assert resolved().n_images == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "resolve").iterdir()} == files


@pytest.mark.parametrize("what", ["data", "registry", "journal", "setting", "kept file", "code", "kept key"])
def test_where_anything_changed_resolve_asks(
    what: str, resolved: Callable[[], Context], tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    match what:
        case "data":
            (tmp_path / "data/train/glioma/1.png").write_text("2")
        case "registry":
            with connected() as client:
                client.create_registered_model("another")
        case "journal":
            store.with_name(f"{store.name}-journal").write_bytes(b"")
        case "setting":
            monkeypatch.setenv("MLFLOW_RUN_ID", "a")
        case "kept file":
            (tmp_path / ".resolve.kept" / artifacts.CONTEXT).write_text("{}")
        case "code":
            monkeypatch.setattr(settled, "source_digest", lambda: "other")
        case "kept key":
            (tmp_path / ".resolve.kept" / settled.KEY).write_text("[")
    forbid(monkeypatch)
    with pytest.raises(UserError, match="MLflow was asked"):
        resolved()


def test_of_a_server_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert settled.registry_state() is None
    settled.keep(tmp_path, None, {})
    assert not settled.write_again(tmp_path, None, {})


@pytest.fixture
def registered(store: Path, make_folders: Callable[..., Any], params: Params) -> Callable[[], Registration]:
    folders = make_folders()
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)

    def run() -> Registration:
        return register(
            folders.model, folders.splits, folders.evaluation, folders.decision, folders.context, folders.validation,
            folders.registration, params,
        )  # fmt: skip

    run()
    return run


def test_what_is_registered_is_told_again_without_asking_until_a_file_changes(
    registered: Callable[[], Registration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = (tmp_path / "build/registration" / artifacts.REGISTRATION).read_bytes()
    with monkeypatch.context() as patch:
        forbid(patch)
        assert registered().version == "1"
    assert (tmp_path / "build/registration" / artifacts.REGISTRATION).read_bytes() == written
    metrics = tmp_path / "build/evaluation" / artifacts.METRICS
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"accuracy": 1.0}))
    with pytest.raises(UserError, match=r"stale or was changed"):
        registered()


def test_a_version_that_the_registry_lost_is_registered_again(
    registered: Callable[[], Registration], params: Params
) -> None:
    with connected() as client:
        client.delete_model_version(params.registration.model_name, "1")
    assert registered().version == "2"
