import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file
from braintumor.data.profile import load_accepted, load_profile
from braintumor.errors import RegistryUnreachable, UserError
from braintumor.params import Params
from braintumor.registry import tracking
from braintumor.registry.server import connected
from braintumor.steps.resolve import resolve


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for name in ("train/glioma/1.png", "test/notumor/2.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_text(name)
    (tmp_path / "data" / "groups.csv").write_text("path,patient\n")
    return tmp_path / "data"


def dvc_md5(dataset: Path) -> str:
    files = sorted(path.relative_to(dataset).as_posix() for path in dataset.rglob("*") if path.is_file())
    entries = [{"md5": hashlib.md5((dataset / name).read_bytes()).hexdigest(), "relpath": name} for name in files]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def test_resolve_names_the_data_version_and_no_champion(
    dataset: Path, no_store: Path, tmp_path: Path, params: Params
) -> None:
    context = resolve(dataset, tmp_path / "resolve", params.registration)
    written = json.loads((tmp_path / "resolve" / "context.json").read_text())
    assert written == {
        "data_md5": dvc_md5(dataset),
        "n_images": 2,
        "model_name": "brain-tumor-phantoms",
        "champion": None,
        "accepted": None,
    }
    assert context.data_md5 == written["data_md5"]
    assert load_accepted(tmp_path / "resolve") == (None, context.data_md5)
    assert not no_store.exists()


def test_the_context_changes_only_with_data_and_champion(
    dataset: Path, store: Path, tmp_path: Path, params: Params
) -> None:
    file = tmp_path / "resolve" / "context.json"
    resolve(dataset, file.parent, params.registration)
    first = file.read_bytes()
    resolve(dataset, file.parent, params.registration)
    assert file.read_bytes() == first

    name = params.registration.model_name
    with connected() as client:
        client.create_registered_model(name)
        client.create_model_version(name, source=str(tmp_path), tags={"model_digest": "a", "data_md5": "b"})
        client.set_registered_model_alias(name, "challenger", "1")
    resolve(dataset, file.parent, params.registration)
    assert file.read_bytes() == first

    with connected() as client:
        client.set_registered_model_alias(name, "champion", "1")
    resolve(dataset, file.parent, params.registration)
    assert json.loads(file.read_text())["champion"] == {"version": "1", "model_digest": "a", "data_md5": "b"}

    (dataset / "train/glioma/1.png").write_text("other")
    resolve(dataset, file.parent, params.registration)
    assert json.loads(file.read_text())["data_md5"] == dvc_md5(dataset)


def accept(folders: Any, params: Params, data_md5: str) -> None:
    """Register a version as `register` does, trained on data of this md5."""
    run_id = tracking.publish(params, folders.model, validation=folders.validation)
    tags = {"gate": "passed", "data_md5": data_md5, "model_digest": "d"}
    name = params.registration.model_name
    with connected() as client:
        client.create_registered_model(name)
        client.create_model_version(name, source=str(folders.model), run_id=run_id, tags=tags)


def test_the_last_accepted_data_is_brought_as_it_was_published(
    dataset: Path, store: Path, tmp_path: Path, params: Params, make_folders: Callable[..., Any]
) -> None:
    folders = make_folders()
    published, data_md5 = load_profile(folders.validation / artifacts.PROFILE)
    accept(folders, params, data_md5)
    context = resolve(dataset, tmp_path / "resolve", params.registration)
    assert context.accepted == {"version": "1", "data_md5": data_md5, "has_profile": True}
    assert json.loads((tmp_path / "resolve/context.json").read_text())["accepted"] == context.accepted
    accepted, present = load_accepted(tmp_path / "resolve")
    assert accepted is not None and accepted.images is not None
    assert (accepted.version, accepted.data_md5, present) == ("1", data_md5, dvc_md5(dataset))
    pd.testing.assert_frame_equal(accepted.images, published)
    before = {name: sha256_of_file(tmp_path / "resolve" / name) for name in ("accepted.parquet", "context.json")}
    resolve(dataset, tmp_path / "resolve", params.registration)
    assert {name: sha256_of_file(tmp_path / "resolve" / name) for name in before} == before


def test_registering_the_present_data_does_not_change_what_it_is_compared_with(
    dataset: Path, store: Path, tmp_path: Path, params: Params
) -> None:
    resolve(dataset, tmp_path / "resolve", params.registration)
    before = sha256_of_file(tmp_path / "resolve/accepted.parquet")
    name = params.registration.model_name
    with connected() as client:
        client.create_registered_model(name)
        tags = {"gate": "passed", "data_md5": dvc_md5(dataset)}
        client.create_model_version(name, source=str(tmp_path), tags=tags)
    assert resolve(dataset, tmp_path / "resolve", params.registration).accepted is None
    assert sha256_of_file(tmp_path / "resolve/accepted.parquet") == before


def test_a_damaged_profile_stops_resolve_and_leaves_what_was_there(
    dataset: Path, store: Path, tmp_path: Path, params: Params, make_folders: Callable[..., Any]
) -> None:
    folders = make_folders()
    accept(folders, params, load_profile(folders.validation / artifacts.PROFILE)[1])
    (stored,) = (tmp_path / "mlartifacts").rglob("profile.parquet")
    stored.write_bytes(stored.read_bytes() + b"x")
    with pytest.raises(UserError, match="not the one that was published"):
        resolve(dataset, tmp_path / "resolve", params.registration)
    assert not (tmp_path / "resolve").exists()


def test_a_registry_that_is_away_stops_resolve_and_leaves_nothing(
    dataset: Path, no_server: str, tmp_path: Path, params: Params
) -> None:
    with pytest.raises(RegistryUnreachable, match=no_server) as caught:
        resolve(dataset, tmp_path / "resolve", params.registration)
    assert caught.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_missing_data_set_is_a_user_error(no_store: Path, tmp_path: Path, params: Params) -> None:
    with pytest.raises(UserError, match="dvc pull"):
        resolve(tmp_path / "data", tmp_path / "resolve", params.registration)
