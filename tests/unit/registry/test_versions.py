import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS

from braintumor import artifacts
from braintumor.data.profile import Accepted, load_profile
from braintumor.errors import RegistryUnreachable, UserError
from braintumor.model.saved import model_digest
from braintumor.params import Params
from braintumor.registry import tracking, version_facts, versions
from braintumor.registry.server import connected
from braintumor.registry.version_facts import UnfitVersion
from braintumor.registry.versions import (
    champion,
    download_model,
    generated_example,
    is_place_of_the_server,
    last_accepted,
    register_version,
)

NAME = "brain-tumor-phantoms"
PRESENT = "e" * 32
Register = Callable[..., Any]


@pytest.fixture
def register_model(store: Path, make_folders: Callable[..., Any], params: Params) -> Register:
    def register(seed: int = 1, card: str = "card", **tags: str) -> Any:
        build = store.parent / f"build-{seed}"
        model = build / "model" if build.exists() else make_folders(build.name, seed=seed).model
        digest = model_digest(model / artifacts.MODEL)
        run_id = tracking.publish(params, model)
        tags = {"model_digest": digest, "data_md5": "d" * 32, **tags}
        return register_version(model / artifacts.MODEL, NAME, "challenger", run_id, tags, card)

    return register


def test_there_is_no_champion_in_a_store_that_nobody_made(no_store: Path) -> None:
    assert champion(NAME) is None
    assert not no_store.exists()


def test_there_is_no_champion_until_a_reviewer_sets_it(register_model: Register, tiny_models: list[Path]) -> None:
    assert champion(NAME) is None
    register_model()
    assert champion(NAME) is None
    with connected() as client:
        client.set_registered_model_alias(NAME, "champion", "1")
    assert champion(NAME) == {"version": "1", "model_digest": model_digest(tiny_models[0]), "data_md5": "d" * 32}


def accept(client: Any, data_md5: str | None, run_id: str | None = None, gate: str | None = "passed") -> None:
    tags = {name: value for name, value in (("data_md5", data_md5), ("gate", gate)) if value}
    client.create_model_version(NAME, source="somewhere", run_id=run_id, tags=tags)


def test_nothing_is_accepted_in_a_store_that_nobody_made_and_under_a_name_without_versions(
    no_store: Path, migrated_database: Path
) -> None:
    assert last_accepted(NAME, PRESENT) is None
    assert not no_store.exists()
    shutil.copyfile(migrated_database, no_store)
    assert last_accepted(NAME, PRESENT) is None
    with connected() as client:
        client.create_registered_model(NAME)
    assert last_accepted(NAME, PRESENT) is None


def test_the_last_accepted_data_is_that_of_the_newest_version_on_other_data_than_the_present(
    store: Path, make_folders: Callable[..., Any], params: Params
) -> None:
    with connected() as client:
        client.create_registered_model(NAME)
        run_id = client.create_run("0").info.run_id
        accept(client, "older", run_id)
        accept(client, PRESENT, run_id)
        assert last_accepted(NAME, PRESENT) == Accepted("1", "older", None)
        accept(client, "newer", run_id)
        accept(client, PRESENT, run_id)
        # Neither says that a model trained on this data passed the gate.
        accept(client, "unjudged", run_id, gate=None)
        accept(client, None, run_id)
        assert last_accepted(NAME, PRESENT) == Accepted("3", "newer", None)
        client.delete_model_version(NAME, "3")
        assert last_accepted(NAME, PRESENT) == Accepted("1", "older", None)
        assert last_accepted("another-name", PRESENT) is None


def test_the_profile_comes_from_the_newest_run_on_that_data_that_keeps_one(
    store: Path, make_folders: Callable[..., Any], params: Params
) -> None:
    folders = make_folders()
    profile, data_md5 = load_profile(folders.validation / artifacts.PROFILE)
    kept = tracking.publish(params, folders.model, validation=folders.validation)
    with connected() as client:
        client.create_registered_model(NAME)
        accept(client, "older", kept)
        accept(client, data_md5, kept)
        accept(client, data_md5, client.create_run("0").info.run_id)
    found = last_accepted(NAME, PRESENT)
    assert found is not None and (found.version, found.data_md5) == ("3", data_md5)
    assert found.images is not None
    pd.testing.assert_frame_equal(found.images, profile)
    # The profile of other data is never taken for it.
    with pytest.raises(UserError, match="should be of the data older"):
        last_accepted(NAME, data_md5)


def test_more_versions_than_a_page_of_the_registry_holds_are_all_seen(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = MlflowClient.search_model_versions
    monkeypatch.setattr(
        MlflowClient, "search_model_versions", lambda self, text, **rest: search(self, text, max_results=2, **rest)
    )
    with connected() as client:
        client.create_registered_model(NAME)
        run_id = client.create_run("0").info.run_id
        for data_md5 in ("other", *[PRESENT] * 4):
            accept(client, data_md5, run_id)
    assert last_accepted(NAME, PRESENT) == Accepted("1", "other", None)


def test_the_same_model_stays_one_version_and_what_is_missing_is_mended(register_model: Register) -> None:
    first = register_model(gate="passed")
    with connected() as client:
        client.delete_registered_model_alias(NAME, "challenger")
        client.delete_model_version_tag(NAME, "1", "gate")
        client.update_model_version(NAME, "1", description="")
    again = register_model(gate="passed")
    assert (first.number, first.is_new) == ("1", True)
    assert (again.number, again.alias, again.is_new) == ("1", "challenger", False)
    with connected() as client:
        version = client.get_model_version_by_alias(NAME, "challenger")
        assert version.tags["gate"] == "passed" and version.description == "card"
        assert len(client.search_model_versions(f"name = '{NAME}'")) == 1


def test_a_new_card_replaces_an_old_one_but_not_a_reviewers_words(register_model: Register) -> None:
    register_model(card="first")
    register_model(card="second")
    with connected() as client:
        assert client.get_model_version(NAME, "1").description == "second"
        client.update_model_version(NAME, "1", description="seen by Dr. A.")
    register_model(card="third")
    with connected() as client:
        assert client.get_model_version(NAME, "1").description == "seen by Dr. A."


def test_an_old_model_does_not_take_the_alias_from_its_successor(register_model: Register) -> None:
    register_model(1)
    assert register_model(2).number == "2"
    again = register_model(1)
    assert (again.number, again.alias) == ("1", None)
    with connected() as client:
        assert str(client.get_model_version_by_alias(NAME, "challenger").version) == "2"


def test_an_interrupted_upload_is_finished_in_its_place(
    store: Path, make_folders: Callable[..., Any], params: Params
) -> None:
    model = make_folders().model
    digest = model_digest(model / artifacts.MODEL)
    run_id = tracking.publish(params, model)
    with connected() as client:
        experiment = client.get_run(run_id).info.experiment_id
        begun = client.create_logged_model(
            experiment, name="classifier", source_run_id=run_id, tags={"model_digest": digest}
        )
    register_version(model / artifacts.MODEL, NAME, "challenger", run_id, {"model_digest": digest}, "card")
    with connected() as client:
        assert client.get_model_version(NAME, "1").source == f"models:/{begun.model_id}"
        (logged,) = client.search_logged_models([experiment])
        assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "1"}]
        assert logged.status == "READY"


@pytest.mark.parametrize("which", ["challenger", "1"])
def test_the_model_comes_back_byte_for_byte(
    which: str, register_model: Register, tiny_models: list[Path], tmp_path: Path
) -> None:
    register_model()
    file = download_model(NAME, which, tmp_path / "downloaded")
    assert file.read_bytes() == tiny_models[0].read_bytes()
    assert list((tmp_path / "downloaded").iterdir()) == [file]


@pytest.mark.parametrize("which", ["champion", "7", "nobody"])
def test_a_version_that_does_not_exist_is_a_user_error(which: str, register_model: Register, tmp_path: Path) -> None:
    register_model()
    with pytest.raises(UserError, match=which):
        download_model(NAME, which, tmp_path / "downloaded")


def test_a_model_that_was_changed_in_the_store_is_refused(
    register_model: Register, tiny_models: list[Path], tmp_path: Path
) -> None:
    register_model()
    (stored,) = (tmp_path / "mlartifacts").rglob("model.keras")
    stored.write_bytes(tiny_models[1].read_bytes())
    with pytest.raises(UserError, match="register the model again"):
        download_model(NAME, "challenger", tmp_path / "downloaded")
    assert not list((tmp_path / "downloaded").iterdir())


def test_a_model_that_somebody_else_registers_meanwhile_is_the_same_version(
    register_model: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = MlflowClient.create_model_version

    def refuse_twin(client: MlflowClient, **given: Any) -> Any:
        make(client, **given)
        raise MlflowException("there is one", error_code=RESOURCE_ALREADY_EXISTS)

    monkeypatch.setattr(MlflowClient, "create_model_version", refuse_twin)
    found = register_model()
    assert (found.number, found.alias, found.is_new) == ("1", "challenger", False)


@pytest.mark.parametrize(
    ("uri", "is_its"),
    [
        ("mlflow-artifacts:/1/abc/artifacts", True),
        ("mlflow-artifacts:/1/my%20run/artifacts", True),
        ("mlflow-artifacts://elsewhere/1/abc", False),
        ("mlflow-artifacts:/0/../../x", False),
        ("mlflow-artifacts:/0/%2e%2e/x", False),
        ("mlflow-artifacts:/0/%252e%252e/x", False),
        ("file:///etc", False),
        ("s3://bucket/x", False),
        ("gs://bucket/x", False),
        ("/etc", False),
        ("", False),
    ],
)
def test_where_a_server_keeps_artifacts_no_other_place_is_read(
    uri: str, is_its: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert is_place_of_the_server(uri) is is_its
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert is_place_of_the_server(uri)


def test_a_model_at_another_place_than_the_servers_is_not_fetched(
    register_model: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register_model()
    monkeypatch.setattr(versions, "is_place_of_the_server", lambda uri: False)
    with pytest.raises(UserError, match="lie elsewhere"):
        download_model(NAME, "1", tmp_path / "downloaded")
    monkeypatch.setattr(version_facts, "is_place_of_the_server", lambda uri: False)
    with connected() as client, pytest.raises(UnfitVersion, match="lie elsewhere"):
        version_facts.read_facts(client, NAME, "1", tmp_path)


def test_a_server_that_is_away_is_reported(no_server: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryUnreachable, match=no_server):
        champion(NAME)
    with pytest.raises(RegistryUnreachable, match=no_server):
        download_model(NAME, "challenger", tmp_path / "downloaded")


def test_the_input_example_is_a_ramp_of_grey() -> None:
    example = generated_example(64)
    assert example.shape == (1, 64, 64, 1) and example.dtype == "uint8"
    assert (example.min(), example.max()) == (0, 255)
