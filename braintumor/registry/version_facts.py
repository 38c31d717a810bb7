"""All that is known of a registered version, read anew from the registry; every digest is computed on what was read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file
from braintumor.errors import GateNotPassed, UserError
from braintumor.model.saved import model_digest
from braintumor.registry.tracking import EVALUATION_ARTIFACTS, get_run
from braintumor.registry.versions import LOGGED_MODEL_URI, MODEL_IN_FOLDER, version_by_number

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DECISION = f"gate/{artifacts.DECISION}"
METRICS, EVIDENCE = (f"{EVALUATION_ARTIFACTS}/{name}" for name in (artifacts.METRICS, artifacts.EVIDENCE))
MAX_JSON_BYTES = 1 << 26  # an evaluation of a hundred thousand images stays far below
REGISTER_AGAIN = "register the model again ('braintumor register')"


class UnknownVersion(UserError):
    """The registry has no such version, or it is deleted."""


class UnfitVersion(GateNotPassed):
    """The version lacks what every promotion rests on; no override helps."""


@dataclass(frozen=True)
class VersionFacts:
    """A version, and the evidence in its run; the digests are of the very bytes that were read.

    `created` is the server's time. `decision`, `metrics` and `evidence` are JSON objects of which nothing is checked.
    """

    name: str
    version: str
    status: str
    created: datetime
    tags: Mapping[str, str]
    run_id: str
    run_tags: Mapping[str, str]
    decision: Mapping[str, Any]
    metrics: Mapping[str, Any]
    evidence: Mapping[str, Any]
    decision_sha256: str
    metrics_sha256: str
    evidence_sha256: str
    model_digest: str

    @property
    def digests(self) -> dict[str, str]:
        """What the ledger keeps of the version."""
        return {
            "model_digest": self.model_digest,
            "data_md5": str(self.metrics.get("data_md5")),
            "decision_sha256": self.decision_sha256,
            "metrics_sha256": self.metrics_sha256,
            "evidence_sha256": self.evidence_sha256,
        }

    @property
    def comparison(self) -> Mapping[str, Any]:
        """The evaluation's comparison with the champion; empty where it has none."""
        found = self.evidence.get("comparison")
        return found if isinstance(found, Mapping) else {}


def read_facts(client: "MlflowClient", model_name: str, version: str, scratch: Path) -> VersionFacts:
    """All facts of the version; files are downloaded into the folder `scratch`.

    Raises UnknownVersion, and UnfitVersion where a file is missing or can't be read: whether they agree is for
    promotion.rule. A server or an artifact store that does not answer is MLflow's own error, as nobody knows then.
    """
    found = version_by_number(client, model_name, version)
    if found is None:
        raise UnknownVersion(
            f"MLflow has no version {version} of {model_name}; the page of {model_name} lists those it has"
        )
    run = get_run(client, str(found.run_id)) if found.run_id else None
    if run is None:
        raise UnfitVersion(
            f"version {version} of {model_name} has no decision of the gate, since it has no run any more; "
            f"restore run {found.run_id or '(none)'} in MLflow, or {REGISTER_AGAIN}"
        )
    folders = _Folder(run.info.artifact_uri), _Folder(_place_of_model(client, found))
    files = {path: _download(folders[0], path, found, scratch) for path in (DECISION, METRICS, EVIDENCE)}
    contents = {path: _parsed(file, path, found) for path, file in files.items()}
    return VersionFacts(
        name=model_name,
        version=str(found.version),
        status=str(found.status),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        tags=dict(found.tags),
        run_id=str(found.run_id),
        run_tags=dict(run.data.tags),
        decision=contents[DECISION],
        metrics=contents[METRICS],
        evidence=contents[EVIDENCE],
        decision_sha256=sha256_of_file(files[DECISION]),
        metrics_sha256=sha256_of_file(files[METRICS]),
        evidence_sha256=sha256_of_file(files[EVIDENCE]),
        model_digest=_digest_of_model(folders[1], found, scratch),
    )


class _Folder:
    """A folder of the artifact store; asked without MLflow's client, which asks the server again for each file."""

    def __init__(self, uri: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self._repository = get_artifact_repository(uri, tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        self._sizes: dict[str, dict[str, int | None]] = {}

    def sizes(self, folder: str) -> Mapping[str, int | None]:
        """Size by path; stores tell a missing file badly from a failure of theirs, so one asks first."""
        if folder not in self._sizes:
            self._sizes[folder] = {file.path: file.file_size for file in self._repository.list_artifacts(folder)}
        return self._sizes[folder]

    def download(self, path: str, target: Path) -> Path:
        return Path(self._repository.download_artifacts(path, str(target)))


def _place_of_model(client: "MlflowClient", version: "ModelVersion") -> str:
    # An address elsewhere would be fetched from wherever whoever made the version wants.
    if not str(version.source).startswith(LOGGED_MODEL_URI):
        raise _unfit(version, "its model was not registered by 'braintumor register'")
    return str(client.get_model_version_download_uri(version.name, version.version))


def _download(folder: _Folder, path: str, version: "ModelVersion", scratch: Path) -> Path:
    sizes = folder.sizes(str(Path(path).parent))
    if path not in sizes:
        raise _unfit(version, f"its run {version.run_id} has no {path}")
    if (sizes[path] or 0) > MAX_JSON_BYTES:
        raise _unfit(version, f"{path} of its run {version.run_id} is {sizes[path]} bytes long")
    return folder.download(path, scratch)


def _parsed(file: Path, path: str, version: "ModelVersion") -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _unfit(version, f"{path} of its run {version.run_id} is no JSON object")
    return content


def _digest_of_model(folder: _Folder, version: "ModelVersion", scratch: Path) -> str:
    if MODEL_IN_FOLDER not in folder.sizes(str(Path(MODEL_IN_FOLDER).parent)):
        raise _unfit(version, "its model file is gone from the artifact store")
    try:
        return model_digest(folder.download(MODEL_IN_FOLDER, scratch))
    except UserError:
        raise _unfit(version, "its model file is damaged") from None


def _unfit(version: "ModelVersion", fact: str) -> UnfitVersion:
    return UnfitVersion(f"version {version.version} of {version.name} may not be promoted: {fact}; {REGISTER_AGAIN}")
