"""One MLflow run a trained model: opened when training starts, completed from the steps' files at any later time.

What MLflow missed while it was down is in the files; `publish` logs whatever the run lacks, as often as it is called.
"""

import getpass
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from braintumor import artifacts
from braintumor.artifacts import digest_of_files, read_json, sha256_of_file, write_json
from braintumor.data.profile import load_profile
from braintumor.errors import UserError
from braintumor.evidence.verdicts import SAME_MODEL
from braintumor.params import Params, PrivacyParams
from braintumor.progress import warn
from braintumor.registry import ledger
from braintumor.registry.rights import server_rights
from braintumor.registry.server import ARTIFACT_FOLDER, connected, database_file, error_code, holds_nothing_yet

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

# Marks a run that this package opened, and may end.
OPENED_BY = "opened_by"
LINKED_FROM = "linked_from"
NOTE = "mlflow.note.content"
MODEL_DIGEST = "model_digest"
OUTCOME = "outcome"

# The folder of a run's artifacts that holds what the validation left.
DATA_ARTIFACTS = "data"
DATA_DOCS_PAGE = f"{DATA_ARTIFACTS}/{artifacts.DATA_DOCS}/index.html"
PROFILE_SHA256 = "profile_sha256"
EVALUATION_ARTIFACTS = "evaluation"
# Under which rules the pictures in a run's evaluation were drawn.
PRIVACY = "evaluation.privacy"
EVIDENCE_SHA256 = "evidence_sha256"
# Among a run's artifacts: the digest of each image file that the model was trained on; a digest names no patient.
SEEN_LIST = "training/seen_images.sha256"
SEEN_LIST_SHA256 = "seen_images_sha256"

GATE_PASSED = "gate passed"
GATE_NOT_PASSED = "gate not passed"
REGISTERED = "registered"

# Figures of the split, not of the test: they keep their names.
SPLIT_FIGURES = ("nearest_neighbour_accuracy", "statistics_accuracy", "leaked_share", "declared_leaked_share")
COUNTS = {"n_test": "test_images", "n_groups": "test_groups"}
TRAINING_FIGURES = ("temperature", "best_epoch", "best_val_loss", "best_val_accuracy", "epochs_run")
# Limits of MLflow's log-batch call.
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000


class LiveRun:
    """The run of a training under way; without a `run_id` it keeps nothing, and `publish` makes up for it."""

    def __init__(self, run_id: str | None) -> None:
        self.run_id = run_id
        self._is_heard = run_id is not None

    def log_epoch(self, epoch: "DataclassInstance") -> None:
        """The numbers of one row of the history stand in the run at step `epoch.epoch`; a failure is told once."""
        row = asdict(epoch)
        self._try(lambda client: client.log_batch(self._id, metrics=_metrics(_epoch_figures(row), row["epoch"])))

    def fail(self) -> None:
        """The run ends as failed in train."""

        def end(client: "MlflowClient") -> None:
            client.set_tag(self._id, f"{OUTCOME}.train", "failed")
            client.set_tag(self._id, OUTCOME, "failed in train")
            end_run(client, client.get_run(self._id), "FAILED")

        self._try(end)

    @property
    def _id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _try(self, call: Any) -> None:
        if not self._is_heard:
            return
        try:
            with connected(is_patient=False) as client:
                call(client)
        # Whatever it is, it must not cost the model that is being trained.
        except Exception as error:
            self._is_heard = False
            warn(f"{error}. Training goes on; its history is logged when it is published")


@contextmanager
def training_run(params: Params, data_md5: str) -> Iterator[LiveRun]:
    """The run that a training logs to: the one that MLFLOW_RUN_ID names, else a new one.

    Where MLflow does not answer, a warning is given and the run's id is None.
    """
    run = LiveRun(_open_or_none(params, data_md5))
    try:
        yield run
    except BaseException:
        run.fail()
        raise


def publish(
    params: Params,
    model: Path,
    evaluation: Path | None = None,
    decision: Path | None = None,
    validation: Path | None = None,
) -> str:
    """All that these folders hold stands in the model's run, whose id is returned; what is there already stays.

    Of a validation that is the profile and the Data Docs. The run is the one in training.json if this server knows it,
    else one that carries the model's digest, else a new one, linked to the old id. Raises RegistryUnreachable, and
    UserError for an evaluation or decision of another model and for a validation of other data than it was trained on.
    """
    training = _read_training(model)
    digest = str(training["model_digest"])
    with connected() as client:
        run_id = _find_run(client, digest, training.get("mlflow_run_id")) or _open_run(client, params, training)
        _publish_training(client, run_id, model, training)
        if evaluation is not None:
            _publish_evaluation(client, run_id, evaluation, digest, params.privacy)
        if decision is not None:
            _publish_decision(client, run_id, decision, digest, evaluation)
        if validation is not None:
            _publish_validation(client, run_id, validation, str(training["data_md5"]))
    return run_id


def publish_if_reachable(
    params: Params, model: Path, evaluation: Path | None = None, decision: Path | None = None
) -> str | None:
    """As `publish`, but MLflow's failure is only a warning: the next step that reaches it makes up for it."""
    try:
        return publish(params, model, evaluation, decision)
    # Whatever it is, it must not cost the model that was trained.
    except Exception as error:
        warn(f"{error}. The model is kept; MLflow gets the rest at the next step that reaches it")
        return None


def publish_decision_if_reachable(
    decision: Path, validation: Path | None = None, evaluation: Path | None = None
) -> str | None:
    """The gate's verdict, and the Data Docs, stand in the run of the model that was judged; failure is a warning.

    Without such a run nothing is published. `evaluation` is what was judged.
    """
    try:
        if holds_nothing_yet():
            return None
        digest = str(read_json(decision / artifacts.DECISION, "braintumor gate")["digests"][MODEL_DIGEST])
        with connected() as client:
            run_id = _find_run(client, digest, None)
            if run_id is not None:
                _publish_decision(client, run_id, decision, digest, evaluation)
            if run_id is not None and validation is not None:
                _publish_validation(client, run_id, validation, client.get_run(run_id).data.tags.get("data_md5"))
            return run_id
    except UserError as error:
        warn(f"{error}. The decision is kept; run the gate again to show it in MLflow")
        return None


def published_profile(client: "MlflowClient", run_id: str, data_md5: str) -> pd.DataFrame | None:
    """The profile of the data `data_md5` that the run keeps; None for a run where no validation was published.

    Raises UserError if what the store holds is not what was published, or is of other data.
    """
    run = get_run(client, run_id)
    expected = run.data.tags.get(PROFILE_SHA256) if run else None
    if expected is None:
        return None
    path = f"{DATA_ARTIFACTS}/{artifacts.PROFILE}"
    remedy = f"restore {path} in MLflow's run {run_id}, or register the model of data {data_md5} again"
    if path not in {file.path for file in client.list_artifacts(run_id, DATA_ARTIFACTS)}:
        raise UserError(f"the profile of the data {data_md5} is gone; {remedy}")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(client.download_artifacts(run_id, path, scratch))
        if sha256_of_file(file) != expected:
            raise UserError(f"the profile of the data {data_md5} is not the one that was published; {remedy}")
        profile, found = load_profile(file)
    if found != data_md5:
        raise UserError(f"the profile that should be of the data {data_md5} is of {found}; {remedy}")
    return profile


def published_judgement(run_id: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
    """The metrics, evidence and decision that the run keeps; None where it does not keep all of them."""
    paths = (
        f"{EVALUATION_ARTIFACTS}/{artifacts.METRICS}",
        f"{EVALUATION_ARTIFACTS}/{artifacts.EVIDENCE}",
        f"gate/{artifacts.DECISION}",
    )
    with connected() as client, tempfile.TemporaryDirectory() as scratch:
        kept = {
            file.path for folder in (EVALUATION_ARTIFACTS, "gate") for file in client.list_artifacts(run_id, folder)
        }
        if not kept.issuperset(paths):
            return None
        files = [Path(client.download_artifacts(run_id, path, scratch)) for path in paths]
        metrics, evidence, decision = (read_json(file, "braintumor evaluate") for file in files)
        return metrics, evidence, decision


def publish_card(run_id: str, card: Mapping[str, Any]) -> None:
    """The run holds this content of model_card.json, unless its model was promoted: then the card of then stays."""
    with connected() as client, tempfile.TemporaryDirectory() as scratch:
        if _was_promoted(client, run_id):
            return
        file = Path(scratch) / Path(artifacts.MODEL_CARD).name
        write_json(file, dict(card))
        sha256 = sha256_of_file(file)
        if not _is_published(client, run_id, "card", sha256):
            client.log_artifact(run_id, str(file), str(Path(artifacts.MODEL_CARD).parent))
            _mark_published(client, run_id, "card", sha256)


def run_page(run_id: str) -> str:
    """The address of the run within MLflow's pages."""
    with connected() as client:
        return f"#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"


def record_registration(run_id: str, model_name: str, version: str) -> None:
    """The run says that its model is registered, and as which version."""
    with connected() as client:
        set_tags(client, run_id, {f"{OUTCOME}.register": f"{model_name} version {version}", OUTCOME: REGISTERED})


def ensure_experiment(client: "MlflowClient", name: str) -> str:
    """The id of the experiment, which is made if need be; an SQLite store keeps its artifacts beside its file."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location())
        # Another step made it in the meantime.
        except Exception as error:
            if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
            assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {name!r} is deleted; run 'mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}', or name another one as register.experiment"
        )
    return str(experiment.experiment_id)


def _artifact_location() -> str | None:
    file = database_file(os.environ["MLFLOW_TRACKING_URI"])
    return None if file is None else str(file.parent / ARTIFACT_FOLDER)


def _read_training(model: Path) -> dict[str, Any]:
    training = read_json(model / artifacts.TRAINING, "braintumor train")
    for key in ("data_md5", "splits_sha256", "model_digest", "params", "seen_images_sha256"):
        if key not in training:
            raise UserError(f"{model / artifacts.TRAINING} has no {key}; run 'braintumor train' again")
    return training


def _open_or_none(params: Params, data_md5: str) -> str | None:
    try:
        with connected() as client:
            given = given_run(client)
            if given is not None and MODEL_DIGEST not in given.data.tags:
                client.log_batch(given.info.run_id, params=_params(params.train.model_dump()))
                return str(given.info.run_id)
            tags = {"data_md5": data_md5} | ({LINKED_FROM: given.info.run_id} if given else {})
            run_id = create_run(client, params, f"training on {data_md5[:7]}", tags)
            client.log_batch(run_id, params=_params(params.train.model_dump()))
            return run_id
    except UserError as error:
        warn(f"{error}. Training goes on without it, and is logged when it is published")
        return None


def given_run(client: "MlflowClient") -> "Run | None":
    """The run that MLFLOW_RUN_ID names; None where it names none, or one that this server does not know."""
    run_id = os.environ.get("MLFLOW_RUN_ID", "").strip()
    if not run_id:
        return None
    run = get_run(client, run_id)
    if run is None:
        warn(f"MLFLOW_RUN_ID names the run {run_id}, which this MLflow server does not know; another one is opened")
    return run


def get_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run, or None if there is none, it is deleted, or we may not see it."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        # A server with accounts denies a run that it does not know.
        if error_code(error) not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"}:
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _find_run(client: "MlflowClient", digest: str, known_id: object) -> str | None:
    """The run of the model: named by training.json, or tagged with the digest, or given and still without a model."""
    named = get_run(client, known_id) if isinstance(known_id, str) and known_id else None
    if named is not None and named.data.tags.get(MODEL_DIGEST, digest) == digest:
        return str(named.info.run_id)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    tagged = client.search_runs(
        experiments, f"tags.{MODEL_DIGEST} = '{digest}'", max_results=1, order_by=["attributes.start_time DESC"]
    )
    return str(tagged[0].info.run_id) if tagged else None


def _open_run(client: "MlflowClient", params: Params, training: Mapping[str, Any]) -> str:
    """The run that is given and has no model yet, else a new one that carries the digest from its first moment."""
    given = given_run(client)
    if given is not None and MODEL_DIGEST not in given.data.tags:
        return str(given.info.run_id)
    tags = {MODEL_DIGEST: training["model_digest"], "data_md5": training["data_md5"]}
    if training.get("mlflow_run_id"):
        tags[LINKED_FROM] = training["mlflow_run_id"]
    return create_run(client, params, f"training on {training['data_md5'][:7]}", tags)


def create_run(client: "MlflowClient", params: Params, name: str, tags: Mapping[str, str]) -> str:
    """The id of a new run of the experiment, which `end_run` may end."""
    own = {OPENED_BY: "braintumor", "mlflow.source.name": "braintumor train", "mlflow.user": user_name()}
    experiment = ensure_experiment(client, params.registration.experiment)
    return str(client.create_run(experiment, run_name=name, tags=own | dict(tags)).info.run_id)


def user_name() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    # A container's user may have no name.
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _publish_training(client: "MlflowClient", run_id: str, model: Path, training: Mapping[str, Any]) -> None:
    digest = str(training["model_digest"])
    tags = {name: training[name] for name in (MODEL_DIGEST, "data_md5", "splits_sha256")}
    if training.get("git_commit"):
        tags |= {"git_commit": training["git_commit"], "mlflow.source.git.commit": training["git_commit"]}
    # First of all, so that the run is found by its model whatever interrupts the rest.
    set_tags(client, run_id, tags)
    if _is_published(client, run_id, "training", digest):
        return
    run = client.get_run(run_id)
    # MLflow refuses to change a parameter.
    missing = [param for param in _params(training["params"]) if param.key not in run.data.params]
    for batch in _batches(missing, PARAMS_PER_CALL):
        client.log_batch(run_id, params=batch)
    _log_changed(client, run, {name: training.get(name) for name in TRAINING_FIGURES})
    _log_history(client, run_id, model / artifacts.HISTORY)
    _log_dataset(client, run_id, training)
    for name in (artifacts.LEARNING_CURVE, artifacts.HISTORY, artifacts.LABELS, artifacts.TRAINING):
        if (model / name).is_file():
            client.log_artifact(run_id, str(model / name), "training")
    _log_seen_images(client, run_id, model / artifacts.SEEN_IMAGES, training["seen_images_sha256"])
    set_tags(client, run_id, {f"{OUTCOME}.train": "trained", OUTCOME: "trained"})
    end_run(client, client.get_run(run_id), "FINISHED")
    _mark_published(client, run_id, "training", digest)


def _log_seen_images(client: "MlflowClient", run_id: str, file: Path, sha256: object) -> None:
    if not file.is_file() or sha256_of_file(file) != sha256:
        raise UserError(f"{file} is missing or was changed; run 'braintumor train' again")
    digests = sorted(set(pd.read_csv(file, dtype=str)["sha256"]))
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / Path(SEEN_LIST).name
        listed.write_text("\n".join(digests) + "\n", encoding="utf-8")
        set_tags(client, run_id, {SEEN_LIST_SHA256: sha256_of_file(listed)})
        client.log_artifact(run_id, str(listed), str(Path(SEEN_LIST).parent))


def seen_images(client: "MlflowClient", run_id: str, scratch: Path) -> frozenset[str]:
    """The SHA-256 of each image file that the run's model was trained on; empty where the run keeps no list.

    Raises UserError if what the store holds is not what was published.
    """
    run = get_run(client, run_id)
    expected = run.data.tags.get(SEEN_LIST_SHA256) if run else None
    folder = str(Path(SEEN_LIST).parent)
    if expected is None or SEEN_LIST not in {file.path for file in client.list_artifacts(run_id, folder)}:
        return frozenset()
    file = Path(client.download_artifacts(run_id, SEEN_LIST, str(scratch)))
    if sha256_of_file(file) != expected:
        raise UserError(f"{SEEN_LIST} of MLflow's run {run_id} is not what was published")
    return frozenset(file.read_text(encoding="utf-8").split())


def _publish_evaluation(
    client: "MlflowClient", run_id: str, evaluation: Path, digest: str, privacy: PrivacyParams
) -> None:
    file = evaluation / artifacts.METRICS
    metrics = read_json(file, "braintumor evaluate")
    if metrics.get(MODEL_DIGEST) != digest:
        raise UserError(f"{file} judges another model; run 'braintumor evaluate' again")
    # predictions.csv, label_errors.csv and the curves stay here: file names may tell who the patients are.
    names = {artifacts.METRICS, *artifacts.JUDGED_FILES} - {artifacts.PREDICTIONS}
    files = sorted(path for path in (evaluation / name for name in names) if path.is_file())
    digest = digest_of_files(evaluation, files)
    if _is_published(client, run_id, EVALUATION_ARTIFACTS, digest):
        return
    run = client.get_run(run_id)
    shown_before = {PRIVACY: privacy.model_dump_json()}.items() <= run.data.tags.items()
    is_settled = _was_promoted(client, run_id)
    # It was promoted since: the comparison with its predecessor, on which that rested, stays.
    if shown_before and (
        is_settled or is_of_the_champion(read_json(evaluation / artifacts.EVIDENCE, "braintumor evaluate"))
    ):
        return
    if is_settled and server_rights() is not None:
        warn(
            f"the model of run {run_id} was promoted: the server keeps the evaluation on which that rested, with its "
            "pictures; whoever may delete in the artifact store can take away what privacy forbids by now"
        )
        return
    _log_changed(client, run, test_figures(metrics))
    set_tags(
        client, run_id, {name: str(metrics[name]) for name in ("protocol", "claim", "test_md5") if metrics.get(name)}
    )
    # Pictures that privacy forbids by now may be among the earlier ones. Until all is there again, none is promised.
    for tag in {PRIVACY, f"published.{EVALUATION_ARTIFACTS}"} & run.data.tags.keys():
        client.delete_tag(run_id, tag)
    _delete_artifacts(client, run, EVALUATION_ARTIFACTS)
    for path in files:
        client.log_artifact(run_id, str(path), EVALUATION_ARTIFACTS)
    tags = {f"{OUTCOME}.evaluate": "evaluated", PRIVACY: privacy.model_dump_json()}
    set_tags(client, run_id, {**tags, EVIDENCE_SHA256: sha256_of_file(evaluation / artifacts.EVIDENCE)})
    _add_to_note(client, run, "Report of the evaluation", f"{EVALUATION_ARTIFACTS}/{artifacts.REPORT}")
    _mark_published(client, run_id, EVALUATION_ARTIFACTS, digest)


def _was_promoted(client: "MlflowClient", run_id: str) -> bool:
    """Whether the run's model is or was champion: what that rested on changes no more."""
    return any(was_promoted(client, version) for version in client.search_model_versions(f"run_id = '{run_id}'"))


def was_promoted(client: "MlflowClient", version: "ModelVersion") -> bool:
    """Whether the ledger of promotions knows the version as a champion; raises LedgerBroken."""
    # Of a version without this tag nobody has to read the ledger.
    if ledger.VERSION_ENTRY not in version.tags:
        return False
    return ledger.was_champion(ledger.read(client, version.name), str(version.version)) is not None


def is_of_the_champion(evidence: Mapping[str, Any]) -> bool:
    """Whether the model that was evaluated is the champion, so that nothing was left to compare it with."""
    return (evidence.get("comparison") or {}).get("reason") == SAME_MODEL


def _publish_decision(
    client: "MlflowClient", run_id: str, decision: Path, digest: str, evaluation: Path | None
) -> None:
    file = decision / artifacts.DECISION
    content = read_json(file, "braintumor gate")
    digests = content.get("digests", {})
    if digests.get(MODEL_DIGEST) != digest:
        raise UserError(f"{file} judges another model; run 'braintumor gate' again")
    if _was_promoted(client, run_id):
        return
    if evaluation is not None and is_of_the_champion(read_json(evaluation / artifacts.EVIDENCE, "braintumor evaluate")):
        shown = client.get_run(run_id).data.tags.get(EVIDENCE_SHA256)
        # The evaluation on which the promotion rested stays, and so does the decision on it.
        if shown not in (None, digests.get(EVIDENCE_SHA256)):
            return
    sha256 = sha256_of_file(file)
    if _is_published(client, run_id, "gate", sha256):
        return
    has_passed = content.get("passed") is True
    reasons = {f"gate.{check['name']}": check["reason"] for check in content["checks"]}
    verdict = "passed" if has_passed else "not passed"
    failed = [check["reason"] for check in content["checks"] if check["required"] and not check["passed"]]
    told = verdict if has_passed else f"{verdict}: {'; '.join(failed)}"
    client.log_artifact(run_id, str(file), "gate")
    outcome = GATE_PASSED if has_passed else GATE_NOT_PASSED
    # The evaluation may not be published, if the server was away then: the decision counts all the same.
    uses = decision / artifacts.TEST_USES
    test_md5 = read_json(uses, "braintumor gate").get("test_md5") if uses.is_file() else None
    test_set = {"test_md5": test_md5} if test_md5 else {}
    set_tags(client, run_id, {**reasons, **test_set, "gate": verdict, f"{OUTCOME}.gate": told, OUTCOME: outcome})
    _mark_published(client, run_id, "gate", sha256)


def _publish_validation(client: "MlflowClient", run_id: str, validation: Path, data_md5: str | None) -> None:
    file, docs = validation / artifacts.PROFILE, validation / artifacts.DATA_DOCS
    _, found = load_profile(file)
    if found != data_md5:
        raise UserError(
            f"{file} is of data {found}, the model was trained on {data_md5}; run 'braintumor validate' again"
        )
    if not (docs / "index.html").is_file():
        raise UserError(f"{docs / 'index.html'} is missing; run 'braintumor validate' again")
    findings = read_json(validation / artifacts.FINDINGS, "braintumor validate").get("findings", [])
    pages = sorted(path for path in docs.rglob("*") if path.is_file())
    digest = digest_of_files(validation, [file, *pages])
    if _is_published(client, run_id, "validation", digest):
        return
    run = client.get_run(run_id)
    # Pages and pictures that privacy forbids by now may be among the earlier ones.
    if PROFILE_SHA256 in run.data.tags:
        # First of all: whatever interrupts this, no run promises a profile that it does not have.
        client.delete_tag(run_id, PROFILE_SHA256)
    _delete_artifacts(client, run, DATA_ARTIFACTS)
    client.log_artifact(run_id, str(file), DATA_ARTIFACTS)
    client.log_artifacts(run_id, str(docs), f"{DATA_ARTIFACTS}/{artifacts.DATA_DOCS}")
    tags = {
        PROFILE_SHA256: sha256_of_file(file),
        artifacts.DATA_DOCS: DATA_DOCS_PAGE,
        f"{OUTCOME}.validate": f"{len(findings)} warnings",
    }
    set_tags(client, run_id, tags)
    _add_to_note(client, run, "Data Docs of the images", DATA_DOCS_PAGE)
    _mark_published(client, run_id, "validation", digest)


def _add_to_note(client: "MlflowClient", run: "Run", title: str, page: str) -> None:
    """A link to one of the run's pages stands in its description, unless a person wrote that."""
    run_id = run.info.run_id
    pages = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts/"
    links = client.get_run(run_id).data.tags.get(NOTE, "").splitlines()
    link = f"- [{title}]({pages}{page})"
    if link not in links and all(pages in line for line in links):
        client.set_tag(run_id, NOTE, "\n".join([*links, link]))


def _delete_artifacts(client: "MlflowClient", run: "Run", folder: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if client.list_artifacts(run.info.run_id, folder):
        repository = get_artifact_repository(run.info.artifact_uri, tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        repository.delete_artifacts(folder)


def test_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a metrics.json under the names that they have in MLflow."""
    figures: dict[str, Any] = {}
    for name, value in metrics.items():
        if name in SPLIT_FIGURES:
            figures[name] = value
        elif name in COUNTS:
            figures[COUNTS[name]] = value
        elif name.endswith("_interval") and isinstance(value, list) and len(value) == 2:
            stem = name.removesuffix("_interval")
            figures[f"test_{stem}_low"], figures[f"test_{stem}_high"] = value
        elif name == "per_class" and isinstance(value, Mapping):
            figures |= {
                f"test_{figure}_{label}": number
                for label, numbers in value.items()
                for figure, number in numbers.items()
                if figure != "n"
            }
        elif name not in {"schema_version", "confidence_level"}:
            figures[f"test_{name}"] = value
    return {name: float(value) for name, value in figures.items() if _is_finite(value)}


def _epoch_figures(row: Mapping[str, Any]) -> dict[str, float]:
    renamed = {"epoch_seconds" if name == "seconds" else name: value for name, value in row.items() if name != "epoch"}
    return {name: float(value) for name, value in renamed.items() if _is_finite(value)}


def _log_history(client: "MlflowClient", run_id: str, file: Path) -> None:
    """Log the epochs that the run does not have: those of a server that was away, and of a model out of DVC's cache."""
    if not file.is_file():
        raise UserError(f"{file} is missing; run 'braintumor train' again")
    rows: list[dict[str, Any]] = pd.read_csv(file, float_precision="round_trip").to_dict("records")  # type: ignore[assignment]
    names = sorted({name for row in rows for name in _epoch_figures(row)})
    known = {name: {metric.step for metric in client.get_metric_history(run_id, name)} for name in names}
    missing = [
        metric
        for row in rows
        for metric in _metrics(_epoch_figures(row), int(row["epoch"]))
        if metric.step not in known[metric.key]
    ]
    for batch in _batches(missing, METRICS_PER_CALL):
        client.log_batch(run_id, metrics=batch)


def _log_dataset(client: "MlflowClient", run_id: str, training: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name="brain-tumour-mri",
        digest=str(training["data_md5"]),
        source_type="dvc",
        source=json.dumps({"path": "data.dvc", "md5": f"{training['data_md5']}.dir"}),
        profile=json.dumps({"images": training.get("images")}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _log_changed(client: "MlflowClient", run: "Run", figures: Mapping[str, Any]) -> None:
    """Log the figures that the run does not show yet."""
    numbers = {name: float(value) for name, value in figures.items() if _is_finite(value)}
    changed = {name: value for name, value in numbers.items() if run.data.metrics.get(name) != value}
    for batch in _batches(_metrics(changed, 0), METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics=batch)


def _metrics(figures: Mapping[str, float], step: int) -> list[Any]:
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [Metric(name, value, now_ms, step) for name, value in figures.items()]


def _params(train: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(name, str(value)) for name, value in _flatten("train", train)]


def _flatten(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    """The run has these tags, all set in one request."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])


def _is_published(client: "MlflowClient", run_id: str, part: str, digest: str) -> bool:
    return client.get_run(run_id).data.tags.get(f"published.{part}") == digest


def _mark_published(client: "MlflowClient", run_id: str, part: str, digest: str) -> None:
    # Last of all: an interrupted part is published once more, from its beginning.
    client.set_tag(run_id, f"published.{part}", digest)


def end_run(client: "MlflowClient", run: "Run", status: str) -> None:
    """The run has the status, if this package opened it."""
    # A run that was given belongs to whoever opened it.
    if OPENED_BY in run.data.tags and run.info.status != status:
        client.set_terminated(run.info.run_id, status=status)
