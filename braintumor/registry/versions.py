"""Versions in the MLflow registry: made once for each model, and brought back as the file that was trained."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file
from braintumor.data.profile import Accepted
from braintumor.errors import UserError
from braintumor.model.saved import model_digest
from braintumor.registry import ledger
from braintumor.registry.rights import server_rights
from braintumor.registry.server import (
    CHAMPION,
    SERVER,
    connected,
    error_code,
    holds_nothing_yet,
    spelled_alike,
    tracking_uri,
)
from braintumor.registry.tracking import published_profile, was_promoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

MODEL_DIGEST = "model_digest"
MODEL_SHA256 = "model_sha256"  # of the file, in the ledger
CARD_SHA256 = "card_sha256"
LOGGED_MODEL = "classifier"
LOGGED_MODEL_URI = "models:/"
# Where artifacts lie that a server keeps and hands out itself.
SERVERS_ARTIFACTS = "mlflow-artifacts:/"
EXISTS_CODES = frozenset({"RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"})
# Where mlflow.tensorflow keeps a Keras model in its folder.
MODEL_IN_FOLDER = f"data/{artifacts.MODEL}"

MODEL_DESCRIPTION = (
    "Classifier of brain MRI slices: glioma, meningioma, no tumour, pituitary tumour. "
    "A research tool, not a diagnostic device. A reviewer promotes a version by the alias 'champion'."
)


@dataclass(frozen=True)
class Version:
    """A version in the registry; `alias` is None where the alias was left on a newer version."""

    number: str
    alias: str | None
    is_new: bool


def champion(model_name: str) -> dict[str, str | None] | None:
    """The version that the alias 'champion' is set to: version, model_digest, data_md5; None if there is none."""
    if holds_nothing_yet():
        return None
    with connected() as client:
        found = _by_alias(client, model_name, CHAMPION)
    if found is None:
        return None
    return {
        "version": str(found.version),
        "model_digest": found.tags.get(MODEL_DIGEST),
        "data_md5": found.tags.get("data_md5"),
    }


def run_of_version(client: "MlflowClient", model_name: str, number: str) -> tuple[str, dict[str, str]] | None:
    """The run that a version comes from, and the version's tags; None if there is no such version."""
    found = version_by_number(client, model_name, number)
    return None if found is None else (str(found.run_id), dict(found.tags))


def last_accepted(model_name: str, data_md5: str) -> Accepted | None:
    """The newest data version other than `data_md5` whose model passed the gate and is registered; None if none is.

    Registering a model of the present data therefore changes nothing. The profile comes from the newest run on that
    data that keeps one. Raises UserError where a profile is lost or was changed.
    """
    if holds_nothing_yet():
        return None
    with connected() as client:
        others = [
            version
            for version in _all_versions(client, model_name)
            if version.tags.get("gate") == "passed" and version.tags.get("data_md5") not in (None, data_md5)
        ]
        if not others:
            return None
        newest = others[0]
        accepted_md5 = newest.tags["data_md5"]
        profiles = (
            published_profile(client, version.run_id, accepted_md5)
            for version in others
            if version.tags["data_md5"] == accepted_md5
        )
        images = next((profile for profile in profiles if profile is not None), None)
    return Accepted(str(newest.version), accepted_md5, images)


def register_version(
    model: Path, model_name: str, alias: str, run_id: str, tags: Mapping[str, str], card: str
) -> Version:
    """The model file has exactly one version of this name, with tags, card and alias; what is missing is added.

    `tags` hold the model's digest, by which its version is found again; it is there from the version's first moment.
    The alias moves to a version only while that is the newest: registering an old model again takes nothing from
    its successor. A card that a reviewer has edited is left alone.
    """
    with connected() as client:
        _ensure_registered_model(client, model_name)
        made, found = None, _by_digest(client, model_name, tags[MODEL_DIGEST])
        if found is None:
            made = _make_version(client, model, model_name, run_id, tags, card)
            # Somebody else has registered it since: our server refuses a second version of a model.
            found = _by_digest(client, model_name, tags[MODEL_DIGEST]) if made is None else None
        # A page that a promotion rested on stays as the reviewer saw it.
        if found is not None and not was_promoted(client, found):
            _mend_version(client, found, tags, card)
        present = made or found
        if present is None:
            raise UserError(
                f"MLflow says that {model_name} has this model already, and shows no such version; try again"
            )
        number = str(present.version)
        _link_from_model(client, model_name, number)
        return Version(number, _set_alias(client, model_name, alias, number), is_new=made is not None)


def download_model(model_name: str, alias_or_version: str, target: Path) -> Path:
    """The model file of a version, byte for byte as it was trained, in the folder `target`.

    Raises UserError if there is no such version, if what the store holds is not the model that was registered, and for
    a champion that the ledger of promotions does not know as such.
    """
    if spelled_alike([alias_or_version]):
        raise UserError(f"the alias {alias_or_version!r} is not {CHAMPION!r}; spell it so")
    with connected() as client:
        version = (
            version_by_number(client, model_name, alias_or_version)
            if alias_or_version.isdecimal()
            else _by_alias(client, model_name, alias_or_version)
        )
        if version is None:
            raise UserError(
                f"MLflow has no version {alias_or_version!r} of {model_name}; "
                "give --alias with another alias (as 'challenger') or a number, or --model with a file"
            )
        recorded_sha256 = _recorded_sha256(client, version) if alias_or_version == CHAMPION else None
        file = _download(client, version, target)
    if recorded_sha256 is not None and sha256_of_file(file) != recorded_sha256:
        file.unlink()
        raise UserError(
            f"version {version.version} of {model_name} does not hold the file that was promoted: it was replaced in "
            "the artifact store; put it back, or promote another version"
        )
    expected = version.tags.get(MODEL_DIGEST)
    if expected is None or model_digest(file) != expected:
        file.unlink()
        raise UserError(
            f"version {version.version} of {model_name} does not hold the model that its tag {MODEL_DIGEST} names; "
            "register the model again"
        )
    return file


def is_place_of_the_server(uri: str) -> bool:
    """Whether artifacts lie in the server's own store; true of every place where MLflow is no server.

    Who may make an experiment says where its runs' files lie: on the reader's disk, or with another host.
    """
    if not tracking_uri().startswith(SERVER):
        return True
    path = unquote(uri.removeprefix(SERVERS_ARTIFACTS))
    is_plain = path.isprintable() and not path.startswith("/") and not set(path) & set("\\?#%")
    return uri.startswith(SERVERS_ARTIFACTS) and is_plain and ".." not in path.split("/")


def _recorded_sha256(client: "MlflowClient", version: "ModelVersion") -> str | None:
    """The SHA-256 of the champion's file in the record of promotions; None where it has none.

    Raises UserError where promotions are recorded, and the version is not the champion of the record, or not the model
    of then.
    """
    entries = ledger.read(client, version.name)
    # A server with our plugin has a promoter, who has yet to judge the first one.
    if not entries and server_rights() is None:
        return None
    number, champion = str(version.version), ledger.champion_of(entries)
    if champion != number:
        raise UserError(
            f"the alias 'champion' of {version.name} is set to version {number}, whose promotion is not recorded (the "
            f"recorded champion: {champion or 'none'}); run 'braintumor promoter --once', or give --alias with a number"
        )
    made = ledger.was_champion(entries, number)
    if made is None or made.entry.digests.get(MODEL_DIGEST) != version.tags.get(MODEL_DIGEST):
        raise UserError(
            f"version {number} of {version.name} is another model than the one that was promoted: its tag "
            f"{MODEL_DIGEST} was changed; see 'braintumor history --verify', then promote another version"
        )
    return made.entry.digests.get(MODEL_SHA256)


def _make_version(
    client: "MlflowClient", model: Path, model_name: str, run_id: str, tags: Mapping[str, str], card: str
) -> "ModelVersion | None":
    """A new version of the model file; None where the server has one of this digest by now."""
    logged = _log_model(client, model, run_id, tags[MODEL_DIGEST])
    try:
        return client.create_model_version(
            name=model_name,
            source=f"{LOGGED_MODEL_URI}{logged.model_id}",
            run_id=run_id,
            tags={**tags, CARD_SHA256: _sha256(card)},
            description=card,
            model_id=logged.model_id,
        )
    except Exception as error:
        if error_code(error) not in EXISTS_CODES:
            raise
        return None


def _download(client: "MlflowClient", version: "ModelVersion", target: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    folder = client.get_model_version_download_uri(version.name, version.version)
    if not is_place_of_the_server(folder):
        raise UserError(
            f"the files of version {version.version} of {version.name} lie elsewhere than in the server's artifact "
            "store, so they were not fetched; register the model again, where the server keeps artifacts "
            "(--serve-artifacts)"
        )
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as scratch:
        downloaded = download_artifacts(
            artifact_uri=f"{folder}/{MODEL_IN_FOLDER}",
            dst_path=scratch,
            tracking_uri=os.environ["MLFLOW_TRACKING_URI"],
        )
        return Path(shutil.move(downloaded, target / artifacts.MODEL))


def _ensure_registered_model(client: "MlflowClient", name: str) -> None:
    try:
        client.create_registered_model(name, description=MODEL_DESCRIPTION)
    except Exception as error:
        if error_code(error) not in EXISTS_CODES:
            raise


def _by_alias(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    try:
        aliases = client.get_registered_model(name).aliases
        return client.get_model_version_by_alias(name, alias) if alias in aliases else None
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def version_by_number(client: "MlflowClient", name: str, number: str) -> "ModelVersion | None":
    """The version; None if there is none, or it is deleted."""
    try:
        return client.get_model_version(name, number)
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _by_digest(client: "MlflowClient", name: str, digest: str) -> "ModelVersion | None":
    found = client.search_model_versions(f"name = '{name}' and tags.{MODEL_DIGEST} = '{digest}'")
    return max(found, key=lambda version: int(version.version), default=None)


def _all_versions(client: "MlflowClient", name: str) -> list["ModelVersion"]:
    """Every version, the newest first."""
    page = client.search_model_versions(f"name = '{name}'")
    versions = list(page)
    while page.token:
        page = client.search_model_versions(f"name = '{name}'", page_token=page.token)
        versions += page
    return sorted(versions, key=lambda version: int(version.version), reverse=True)


def _newest(client: "MlflowClient", name: str) -> int:
    found = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    return max(int(version.version) for version in found)


def _set_alias(client: "MlflowClient", name: str, alias: str, number: str) -> str | None:
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get(alias)) == number:
        return alias
    if _newest(client, name) != int(number):
        return None
    client.set_registered_model_alias(name, alias, number)
    return alias


def _mend_version(client: "MlflowClient", version: "ModelVersion", tags: Mapping[str, str], card: str) -> None:
    is_as_written = not version.description or _sha256(version.description) == version.tags.get(CARD_SHA256)
    if is_as_written and version.description != card:
        client.update_model_version(version.name, version.version, description=card)
        tags = {**tags, CARD_SHA256: _sha256(card)}
    for name, value in tags.items():
        if version.tags.get(name) != value:
            client.set_model_version_tag(version.name, version.version, name, value)


def _log_model(client: "MlflowClient", model: Path, run_id: str, digest: str) -> "LoggedModel":
    """The model among the run's models, complete; an upload that was interrupted is done again into the same place."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    found = client.search_logged_models([experiment], filter_string=f"tags.{MODEL_DIGEST} = '{digest}'")
    own = [logged for logged in found if logged.source_run_id == run_id]
    ready = [logged for logged in own if logged.status == "READY"]
    if ready:
        return ready[0]
    logged = (
        own[0]
        if own
        else client.create_logged_model(
            experiment, name=LOGGED_MODEL, source_run_id=run_id, tags={MODEL_DIGEST: digest}, model_type="classifier"
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / LOGGED_MODEL
        _write_folder(model, folder, logged)
        client.log_model_artifacts(logged.model_id, str(folder))
    # MLflow refuses the same output twice.
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")


def _write_folder(model: Path, folder: Path, logged: "LoggedModel") -> None:
    """An MLflow model folder with signature and input example, around the very bytes of `model`."""
    from braintumor.model.inference import OOD_SCORE, PROBABILITIES, load_classifier, predict

    classifier = load_classifier(model)
    example = generated_example(int(classifier.input_shape[1]))
    outputs = predict(classifier, example)

    import mlflow.tensorflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    float32, shape = np.dtype(np.float32), (-1, *outputs.probabilities.shape[1:])
    given = [TensorSpec(float32, shape)]
    if outputs.ood_scores is not None:
        given = [TensorSpec(float32, shape, PROBABILITIES), TensorSpec(float32, (-1, 1), OOD_SCORE)]
    # Unnamed: with a name, MLflow hands a dict to Keras, and the example can't be read back.
    signature = ModelSignature(Schema([TensorSpec(np.dtype(np.uint8), (-1, *example.shape[1:]))]), Schema(given))
    mlflow.tensorflow.save_model(
        classifier,
        str(folder),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
            run_id=logged.source_run_id,
        ),
        signature=signature,
        input_example=example,
        pip_requirements=[f"{name}=={installed_version(name)}" for name in ("mlflow", "tensorflow", "keras", "numpy")],
    )
    # Keras writes a date into the file: the copy would have other bytes than the model that was judged.
    shutil.copyfile(model, folder / MODEL_IN_FOLDER)


def generated_example(size_px: int) -> NDArray[np.uint8]:
    """One image (1, size_px, size_px, 1), a ramp from black to white: an input example must be nobody's scan."""
    ramp = np.linspace(0, 255, size_px).astype(np.uint8)
    return np.broadcast_to(ramp[None, :, None, None], (1, size_px, size_px, 1)).copy()


def _link_from_model(client: "MlflowClient", name: str, number: str) -> None:
    """The page of the logged model leads to the version, as after mlflow.register_model."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    # The SQL store keeps the logged model's id in the source alone.
    source = client.get_model_version(name, number).source or ""
    if not source.startswith(LOGGED_MODEL_URI):
        return
    model_id = source.removeprefix(LOGGED_MODEL_URI)
    link = {"name": name, "version": number}
    links = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    if link not in links:
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*links, link])})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
