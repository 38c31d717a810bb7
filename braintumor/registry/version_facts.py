"""All that is known of a registered version, read anew from the registry; every digest is computed on what was read."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file
from braintumor.errors import GateNotPassed, UserError
from braintumor.model.saved import MAX_MODEL_BYTES, model_digest
from braintumor.registry.tracking import EVALUATION_ARTIFACTS, get_run
from braintumor.registry.versions import (
    LOGGED_MODEL_URI,
    MODEL_IN_FOLDER,
    MODEL_SHA256,
    is_place_of_the_server,
    version_by_number,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DECISION = f"gate/{artifacts.DECISION}"
METRICS, EVIDENCE = (f"{EVALUATION_ARTIFACTS}/{name}" for name in (artifacts.METRICS, artifacts.EVIDENCE))
# What anybody uploads has to be read: an evaluation has some 50 KB, and is eight deep.
MAX_JSON_BYTES = 1 << 22
MAX_DEPTH = 50
MAX_DIGITS = 40
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
    model_sha256: str

    @property
    def digests(self) -> dict[str, str]:
        """What the ledger keeps of the version."""
        return {
            "model_digest": self.model_digest,
            MODEL_SHA256: self.model_sha256,
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
    folders = _folder(run.info.artifact_uri, found), _folder(_place_of_model(client, found), found)
    files = {
        path: _download(folders[0], path, MAX_JSON_BYTES, found, scratch) for path in (DECISION, METRICS, EVIDENCE)
    }
    contents = {path: _parsed(file, path, found) for path, file in files.items()}
    model = _download(folders[1], MODEL_IN_FOLDER, MAX_MODEL_BYTES, found, scratch)
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
        model_digest=_digest_of_model(model, found),
        model_sha256=sha256_of_file(model),
    )


class _Folder:
    """A folder of the artifact store; asked without MLflow's client, which asks the server again for each file."""

    def __init__(self, uri: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self._repository = get_artifact_repository(uri, tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        self._sizes: dict[str, dict[str, int | None]] = {}

    def sizes(self, folder: str) -> Mapping[str, int | None]:
        """Size by path, None for a folder; stores tell a missing file badly from a failure of theirs, so one asks."""
        if folder not in self._sizes:
            found = self._repository.list_artifacts(folder)
            self._sizes[folder] = {file.path: None if file.is_dir else file.file_size for file in found}
        return self._sizes[folder]

    def download(self, path: str, target: Path) -> Path:
        return Path(self._repository.download_artifacts(path, str(target)))


def _place_of_model(client: "MlflowClient", version: "ModelVersion") -> str:
    # An address elsewhere would be fetched from wherever whoever made the version wants.
    if not str(version.source).startswith(LOGGED_MODEL_URI):
        raise _unfit(version, "its model was not registered by 'braintumor register'")
    return str(client.get_model_version_download_uri(version.name, version.version))


def _folder(uri: str, version: "ModelVersion") -> _Folder:
    if not is_place_of_the_server(uri):
        raise _unfit(version, "its files lie elsewhere than in the server's artifact store")
    return _Folder(uri)


def _download(folder: _Folder, path: str, max_bytes: int, version: "ModelVersion", scratch: Path) -> Path:
    sizes = folder.sizes(str(Path(path).parent))
    if path not in sizes:
        missing = "its model file is gone from the artifact store" if path == MODEL_IN_FOLDER else None
        raise _unfit(version, missing or f"its run {version.run_id} has no {path}")
    size = sizes[path]
    if size is None or size > max_bytes:
        told = "no file" if size is None else f"{size} bytes long, and {max_bytes} are allowed"
        raise _unfit(version, f"its {path} is {told}")
    return folder.download(path, scratch)


def _parsed(file: Path, path: str, version: "ModelVersion") -> Mapping[str, Any]:
    """The JSON object, which any part of ours can compute with and write down."""
    try:
        content = json.loads(
            file.read_text(encoding="utf-8"), parse_int=_int, parse_float=_finite, parse_constant=_finite
        )
        is_fit = isinstance(content, dict) and _depth(content) <= MAX_DEPTH
        json.dumps(content, ensure_ascii=False).encode()  # fails for half a character
    except (ValueError, RecursionError, MemoryError):
        is_fit = False
    if not is_fit:
        raise _unfit(version, f"{path} of its run {version.run_id} is no JSON object that can be judged")
    found: dict[str, Any] = content
    return found


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def _depth(content: object) -> int:
    """How deep objects and lists are nested, told without recursion."""
    depth, level = 0, [content]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    return depth


def _digest_of_model(file: Path, version: "ModelVersion") -> str:
    try:
        return model_digest(file)
    except UserError:
        raise _unfit(version, "its model file is damaged") from None


def _unfit(version: "ModelVersion", fact: str) -> UnfitVersion:
    return UnfitVersion(f"version {version.version} of {version.name} may not be promoted: {fact}; {REGISTER_AGAIN}")
