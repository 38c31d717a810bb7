import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file
from braintumor.errors import GateNotPassed, RegistryUnreachable, UserError
from braintumor.evidence.comparison import not_comparable
from braintumor.evidence.metrics import compute_test_metrics
from braintumor.evidence.predictions import read_predictions
from braintumor.evidence.verdicts import SAME_MODEL
from braintumor.params import Bound, Params
from braintumor.registry.promotions import promote
from braintumor.registry.server import connected
from braintumor.steps.gate import gate
from braintumor.steps.register import Registration, register

NAME = "brain-tumor-phantoms"
MakeFolders = Callable[..., Any]


def run_gate(folders: Any, params: Params) -> None:
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)


def run_register(folders: Any, params: Params) -> Registration:
    return register(
        folders.model,
        folders.splits,
        folders.evaluation,
        folders.decision,
        folders.context,
        folders.validation,
        folders.registration,
        params,
    )


def versions() -> list[Any]:
    with connected() as client:
        return list(client.search_model_versions(f"name = '{NAME}'"))


@pytest.fixture
def passed(store: Path, make_folders: MakeFolders, params: Params) -> Any:
    """A run that passed the gate, in front of an empty registry."""
    folders = make_folders()
    run_gate(folders, params)
    return folders


def refused(folders: Any, params: Params, match: str) -> None:
    with pytest.raises(UserError, match=match):
        run_register(folders, params)
    assert versions() == []
    assert not folders.registration.exists()
    with connected() as client:
        assert client.get_experiment_by_name(params.registration.experiment) is None


def test_a_model_that_passed_becomes_the_challenger(passed: Any, params: Params) -> None:
    registration = run_register(passed, params)
    assert (registration.version, registration.alias) == ("1", "challenger")
    written = json.loads((passed.registration / artifacts.REGISTRATION).read_text())
    assert written == registration.__dict__
    metrics = json.loads((passed.evaluation / artifacts.METRICS).read_text())
    with connected() as client:
        version = client.get_model_version_by_alias(NAME, "challenger")
        run = client.get_run(registration.run_id)
    assert version.run_id == registration.run_id
    assert version.tags["model_digest"] == metrics["model_digest"]
    assert version.tags["accuracy"] == f"{metrics['accuracy']:.4f}"
    assert version.tags["gate"] == "passed"
    assert set(version.tags) >= {
        "accuracy_interval", "balanced_accuracy", "macro_f1", "tumour_sensitivity", "nearest_neighbour_accuracy",
        "protocol", "claim", "data_md5", "git_commit", "splits_sha256",
    }  # fmt: skip
    assert "A research tool, not a diagnostic device" in version.description
    assert "| meningioma&ensp; | 15&ensp; |" in version.description
    assert f"#/experiments/{run.info.experiment_id}/runs/{registration.run_id}/artifacts/" in version.description
    assert version.tags["metrics_sha256"] == sha256_of_file(passed.evaluation / artifacts.METRICS)
    assert run.data.tags["outcome"] == "registered"
    assert run.data.tags["outcome.register"] == f"{NAME} version 1"


def published(run_id: str, path: str) -> Any:
    with connected() as client:
        return json.loads(Path(client.download_artifacts(run_id, path)).read_text())


def test_the_card_for_programs_stands_in_the_run(passed: Any, params: Params) -> None:
    registration = run_register(passed, params)
    card = published(registration.run_id, artifacts.MODEL_CARD)
    assert card["model_details"]["version"]["name"] == registration.model_digest
    assert card["model_details"]["name"] == NAME


def test_what_a_promotion_rested_on_stays_whatever_is_registered_after_it(
    passed: Any, make_folders: MakeFolders, params: Params
) -> None:
    first = run_register(passed, params)
    promote(NAME, first.version, "first", "", params)  # type: ignore[arg-type]

    def shown() -> tuple[Any, ...]:
        with connected() as client:
            version = client.get_model_version(NAME, first.version)
        return version.description, version.tags, published(first.run_id, "gate/decision.json")

    before = shown()
    other = make_folders("other", seed=2)
    run_gate(other, params)
    assert run_register(other, params).version == "2"
    # By now another model was judged on these test images, and the gate has another bound: a new page would say so.
    stricter = params.gate.model_copy(update={"min_accuracy": Bound(value=0.5, required=True)})
    changed = params.model_copy(update={"gate": stricter})
    run_gate(passed, changed)
    assert run_register(passed, changed).version == first.version
    assert shown() == before


def test_the_page_that_a_promotion_rested_on_stays_when_the_champion_is_judged_again(
    passed: Any, params: Params
) -> None:
    def shown() -> tuple[Any, ...]:
        (version,) = versions()
        files = (artifacts.MODEL_CARD, "gate/decision.json", "evaluation/evidence.json", "evaluation/metrics.json")
        return version.description, version.tags, *(published(version.run_id, path) for path in files)

    first = run_register(passed, params)
    before = shown()
    facts = {"version": first.version, "model_digest": first.model_digest, "data_md5": first.data_md5}
    passed.edit(passed.context / artifacts.CONTEXT, champion=facts)
    evidence, metrics = (passed.evaluation / name for name in (artifacts.EVIDENCE, artifacts.METRICS))
    passed.edit(evidence, comparison=not_comparable(SAME_MODEL, first.version))
    passed.edit(metrics, evidence_sha256=sha256_of_file(evidence))
    run_gate(passed, params)
    assert shown() == before
    assert run_register(passed, params) == first
    assert shown() == before


def test_registering_twice_makes_one_version_and_the_same_file(passed: Any, params: Params) -> None:
    first = run_register(passed, params)
    written = (passed.registration / artifacts.REGISTRATION).read_bytes()
    assert run_register(passed, params) == first
    assert (passed.registration / artifacts.REGISTRATION).read_bytes() == written
    assert len(versions()) == 1


# In the order of their first call.
WRITES = (
    "create_experiment",
    "create_run",
    "log_batch",
    "log_inputs",
    "log_artifact",
    "set_terminated",
    "set_tag",
    "create_registered_model",
    "create_logged_model",
    "log_model_artifacts",
    "log_outputs",
    "finalize_logged_model",
    "create_model_version",
    "set_logged_model_tags",
    "set_registered_model_alias",
)


class Killed(BaseException):
    """The process ends here."""


def test_a_registration_that_is_killed_anywhere_is_finished_by_running_again(
    passed: Any, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    fatal = ""

    def dying(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def write_and_die(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            if name == fatal:
                raise Killed
            return result

        return write_and_die

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, dying(name, getattr(MlflowClient, name)))
    for name in WRITES:
        fatal = name
        with pytest.raises(Killed):
            run_register(passed, params)
            pytest.fail(f"{name} was not reached")
        assert not passed.registration.exists()
    fatal = ""
    assert run_register(passed, params).version == "1"
    check_whole(params)


def check_whole(params: Params) -> None:
    """One run, one logged model, one version with all its marks."""
    (version,) = versions()
    assert version.tags["gate"] == "passed" and version.description
    with connected() as client:
        assert str(client.get_model_version_by_alias(NAME, "challenger").version) == "1"
        experiment = client.get_experiment_by_name(params.registration.experiment)
        assert [logged.status for logged in client.search_logged_models([experiment.experiment_id])] == ["READY"]
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.tags["outcome"] == "registered"
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "val_loss")) == 3


def test_a_closed_gate_registers_nothing(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders(n_wrong=20)
    run_gate(folders, params)
    with pytest.raises(GateNotPassed):
        run_register(folders, params)
    assert versions() == []


def test_a_decision_changed_by_hand_is_refused(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders(n_wrong=20)
    run_gate(folders, params)
    folders.edit(folders.decision / artifacts.DECISION, passed=True)
    refused(folders, params, "decision.json is stale or was changed")


@pytest.mark.parametrize("value", ["true", 1, None])
def test_only_true_opens_the_gate(value: Any, passed: Any, params: Params) -> None:
    passed.edit(passed.decision / artifacts.DECISION, passed=value)
    with pytest.raises(GateNotPassed):
        run_register(passed, params)
    assert versions() == []


def test_a_decision_under_an_older_policy_is_refused(passed: Any, params: Params) -> None:
    stricter = params.gate.model_copy(
        update={"min_accuracy": params.gate.min_accuracy.model_copy(update={"value": 0.95})}
    )
    refused(passed, params.model_copy(update={"gate": stricter}), "braintumor gate")


def test_another_model_than_the_judged_one_is_refused(passed: Any, tiny_models: list[Path], params: Params) -> None:
    shutil.copyfile(tiny_models[1], passed.model / artifacts.MODEL)
    refused(passed, params, "training.json is stale")


def test_an_evaluation_of_another_model_is_refused(passed: Any, make_folders: MakeFolders, params: Params) -> None:
    other = make_folders("other", seed=2)
    shutil.rmtree(passed.model)
    shutil.copytree(other.model, passed.model)
    refused(passed, params, "metrics.json is stale or was changed: its model_digest")


def test_predictions_changed_by_hand_are_refused(passed: Any, params: Params) -> None:
    file = passed.evaluation / artifacts.PREDICTIONS
    file.write_text(file.read_text() + "\n")
    refused(passed, params, "predictions.csv is stale")


def test_predictions_forged_with_their_digest_are_refused(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    """The wrong rows are left out, and every digest is mended; the split still knows its test images."""
    folders = make_folders(n_wrong=1)
    file = folders.evaluation / artifacts.PREDICTIONS
    rows = pd.read_csv(file)
    rows[rows["label"] == rows["predicted"]].to_csv(file, index=False)
    folders.edit(folders.evaluation / artifacts.METRICS, predictions_sha256=sha256_of_file(file))
    run_gate(folders, params)
    refused(folders, params, "are not the 60 test images")


def test_copies_that_are_told_as_none_are_refused(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders(protocol="declared")
    rows = pd.read_csv(folders.splits / artifacts.SPLITS)
    # A copy of a test image on the training side; the split's own digest is mended.
    rows.loc[rows["path"] == "train/glioma/0.png", "group"] = "test-glioma-0"
    rows.to_csv(folders.splits / artifacts.SPLITS, index=False)
    digest = sha256_of_file(folders.splits / artifacts.SPLITS)
    for file in ("split/split.json", "model/training.json", "evaluation/metrics.json"):
        folders.edit(folders.root / file, splits_sha256=digest)
    run_gate(folders, params)
    # Whoever got past the gate's refusal of this protocol is stopped here.
    folders.edit(folders.decision / artifacts.DECISION, passed=True)
    refused(folders, params, "are not the 60 test images")


def test_scores_that_the_files_do_not_give_are_refused(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    folders.edit(folders.evaluation / artifacts.METRICS, ood_auroc=0.999)
    run_gate(folders, params)
    refused(folders, params, "its ood_auroc is not what")


@pytest.mark.parametrize("name", artifacts.JUDGED_FILES)
def test_evidence_changed_after_the_gate_is_refused(name: str, passed: Any, params: Params) -> None:
    file = passed.evaluation / name
    file.write_bytes(file.read_bytes() + b"\n")
    refused(passed, params, f"{name} is stale")


def forge(folders: Any, name: str, content: str) -> None:
    """Write a file of the evaluation anew, and mend its digest wherever it stands."""
    (folders.evaluation / name).write_text(content)
    key, digest = artifacts.sha256_key(name), sha256_of_file(folders.evaluation / name)
    if key in json.loads((folders.evaluation / artifacts.EVIDENCE).read_text()):
        folders.edit(folders.evaluation / artifacts.EVIDENCE, **{key: digest})
    evidence = sha256_of_file(folders.evaluation / artifacts.EVIDENCE)
    folders.edit(folders.evaluation / artifacts.METRICS, **{key: digest, "evidence_sha256": evidence})


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"model_digest": "0" * 64}, "its model_digest"),
        ({"triage": {"threshold": 0.1}}, "its section triage"),
        ({"ood": None}, "its section ood"),
        ({"leakage": {"warnings": []}}, "its section leakage"),
    ],
)
def test_evidence_forged_with_its_digest_is_refused(
    section: dict[str, Any], told: str, store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    content = json.loads((folders.evaluation / artifacts.EVIDENCE).read_text()) | section
    forge(folders, artifacts.EVIDENCE, json.dumps(content))
    run_gate(folders, params)
    refused(folders, params, told)


@pytest.mark.parametrize("section", [{"robustness": {}}, {"mistakes": {}}, {"slices": [{}]}])
def test_evidence_of_which_no_card_can_be_made_is_refused(
    section: dict[str, Any], store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    content = json.loads((folders.evaluation / artifacts.EVIDENCE).read_text()) | section
    forge(folders, artifacts.EVIDENCE, json.dumps(content))
    run_gate(folders, params)
    refused(folders, params, "a section is not as it was written")


def test_floors_that_are_told_lower_are_refused(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    rows = pd.read_csv(folders.evaluation / artifacts.PREDICTIONS)
    rows["neighbour_label"] = "notumor"
    forge(folders, artifacts.PREDICTIONS, rows.to_csv(index=False))
    run_gate(folders, params)
    refused(folders, params, "are not the 60 test images")


@pytest.mark.parametrize("kept", ["the easiest kind", "the easiest of each kind"])
def test_strange_images_that_are_left_out_are_missed(
    kept: str, store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    scores = pd.read_csv(folders.evaluation / artifacts.OOD_SCORES)
    easy = scores[scores["kind"] == "web page"] if kept == "the easiest kind" else scores.groupby("kind").tail(5)
    forge(folders, artifacts.OOD_SCORES, easy.to_csv(index=False))
    tables = [read_predictions(folders.evaluation / name) for name in (artifacts.PREDICTIONS, artifacts.OOD_SCORES)]
    auroc = compute_test_metrics(*tables, params.evaluate)["ood_auroc"]
    folders.edit(folders.evaluation / artifacts.METRICS, ood_auroc=auroc)
    run_gate(folders, params)
    refused(folders, params, "lacks images of some kind")


@pytest.mark.parametrize("name", [artifacts.SEEN_IMAGES, artifacts.CALIBRATION])
def test_what_the_training_left_is_that_of_the_training(name: str, passed: Any, params: Params) -> None:
    file = passed.model / name
    file.write_text("\n".join(file.read_text().splitlines()[:-5]) + "\n")
    refused(passed, params, "training.json is stale")


def test_metrics_that_the_predictions_do_not_give_are_refused(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders(n_wrong=3)
    folders.edit(folders.evaluation / artifacts.METRICS, accuracy=0.99)
    run_gate(folders, params)
    refused(folders, params, "its accuracy is not what predictions.csv gives")


def test_a_protocol_that_the_split_does_not_have_is_refused(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders(protocol="declared")
    folders.edit(folders.evaluation / artifacts.METRICS, protocol="official")
    run_gate(folders, params)
    refused(folders, params, "its protocol is not that of")


def test_evidence_of_an_older_data_version_is_refused(passed: Any, params: Params) -> None:
    passed.edit(passed.context / artifacts.CONTEXT, data_md5="f" * 32)
    refused(passed, params, "dvc repro")


def test_a_split_changed_by_hand_is_refused(passed: Any, params: Params) -> None:
    file = passed.splits / artifacts.SPLITS
    file.write_text(file.read_text() + "\n")
    refused(passed, params, "braintumor split")


@pytest.mark.parametrize("name", ["model/model.keras", "evaluation/metrics.json", "gate/decision.json"])
def test_missing_evidence_is_refused(name: str, passed: Any, params: Params) -> None:
    (passed.root / name).unlink()
    refused(passed, params, "is missing")


def test_mlflow_that_is_away_is_reported_within_15_seconds_and_nothing_is_written(
    no_server: str, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    run_gate(folders, params)
    started = time.monotonic()
    with pytest.raises(RegistryUnreachable, match=no_server):
        run_register(folders, params)
    assert time.monotonic() - started < 15
    assert not folders.registration.exists()
