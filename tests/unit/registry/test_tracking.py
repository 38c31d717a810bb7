import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from braintumor import artifacts
from braintumor.data.profile import load_profile, write_profile
from braintumor.errors import RegistryUnreachable, UserError
from braintumor.evidence.verdicts import SAME_MODEL
from braintumor.params import Params
from braintumor.registry import tracking
from braintumor.registry.server import connected, tracking_uri
from braintumor.steps.gate import gate, judge

MakeFolders = Callable[..., Any]


@dataclass(frozen=True)
class Epoch:
    epoch: int
    phase: str
    train_loss: float
    val_loss: float
    seconds: float


def all_runs(client: MlflowClient) -> list[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def artifact_paths(client: MlflowClient, run_id: str) -> set[str]:
    return {
        file.path for folder in client.list_artifacts(run_id) for file in client.list_artifacts(run_id, folder.path)
    }


def test_the_store_is_a_database_in_the_current_folder_unless_an_address_is_set(
    no_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri() == f"sqlite:///{no_store}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri() == "http://mlflow:5000"


def test_connecting_leaves_the_environment_as_it_was(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    with connected():
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "7"
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{store}"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR" not in os.environ


def test_a_server_that_is_away_is_known_within_15_seconds(no_server: str) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryUnreachable, match=no_server), connected():
        pytest.fail("nobody listens there")
    assert time.monotonic() - started < 15


def test_a_password_in_the_address_is_not_repeated(no_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", no_server.replace("://", "://user:secret@"))
    with pytest.raises(RegistryUnreachable) as caught, connected():
        pass
    assert "secret" not in str(caught.value) and no_server in str(caught.value)


@pytest.mark.parametrize("address", ["./mlruns", "nonsense://place"])
def test_an_address_that_mlflow_does_not_take_is_a_user_error(
    address: str, no_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError), connected() as client:
        client.search_experiments()


def test_publishing_logs_all_that_the_files_hold(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    run_id = tracking.publish(params, folders.model, folders.evaluation, folders.decision)

    training = artifacts.read_json(folders.model / artifacts.TRAINING, "")
    metrics = artifacts.read_json(folders.evaluation / artifacts.METRICS, "")
    with connected() as client:
        run = client.get_run(run_id)
        assert client.get_experiment(run.info.experiment_id).name == params.registration.experiment
        assert Path(run.info.artifact_uri).is_relative_to(store.parent / "mlartifacts")
        assert run.data.params["train.learning_rate"] == str(params.train.learning_rate)
        assert run.data.params["train.augmentation.flip_horizontal"] == "True"
        assert run.data.metrics["test_accuracy"] == metrics["accuracy"]
        assert run.data.metrics["test_accuracy_low"] == metrics["accuracy_interval"][0]
        assert run.data.metrics["test_accuracy_high"] == metrics["accuracy_interval"][1]
        assert run.data.metrics["test_recall_glioma"] == metrics["per_class"]["glioma"]["recall"]
        assert run.data.metrics["test_images"] == 60
        assert run.data.metrics["nearest_neighbour_accuracy"] == 0.5
        history = client.get_metric_history(run_id, "val_loss")
        assert [(metric.step, metric.value) for metric in history] == [(1, 1.1), (2, 0.55), (3, 1.1 / 3)]
        assert run.inputs.dataset_inputs[0].dataset.digest == training["data_md5"]
        assert run.data.tags["git_commit"] == training["git_commit"]
        assert run.data.tags["model_digest"] == training["model_digest"]
        assert run.data.tags["gate"] == run.data.tags["outcome.gate"] == "passed"
        assert run.data.tags["outcome"] == "gate passed"
        assert "0.92" in run.data.tags["gate.min_accuracy"]
        assert run.info.status == "FINISHED"
        assert f"/runs/{run_id}/artifacts/evaluation/report.html)" in run.data.tags["mlflow.note.content"]
        assert artifact_paths(client, run_id) >= {
            "training/learning_curve.png",
            "evaluation/metrics.json",
            "evaluation/roc_curves.png",
            "gate/decision.json",
        }
        # File names may tell who the patients are.
        assert "evaluation/predictions.csv" not in artifact_paths(client, run_id)


def test_evaluation_that_a_promotion_rested_on_stays_unless_privacy_became_stricter(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    run_id = tracking.publish(params, folders.model, folders.evaluation)

    def kept_report(**changes: Any) -> str:
        (folders.evaluation / artifacts.REPORT).write_text(f"<title>after {changes}</title>")
        tracking.publish(params.model_copy(update=changes), folders.model, folders.evaluation)
        with connected() as client:
            return Path(client.download_artifacts(run_id, f"evaluation/{artifacts.REPORT}")).read_text()

    before = kept_report()
    assert "after {}" in before
    comparison = {"champion": "1", "reason": SAME_MODEL}
    folders.edit(folders.evaluation / artifacts.EVIDENCE, comparison=comparison)
    assert kept_report(gate=params.gate) == before
    stricter = params.privacy.model_copy(update={"copy_images": "none"})
    assert "copy_images='none'" in kept_report(privacy=stricter)
    assert "copy_images='none'" in kept_report(privacy=stricter, gate=params.gate)


def test_evaluation_that_was_half_replaced_is_replaced_again(
    store: Path, make_folders: MakeFolders, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_folders()
    run_id = tracking.publish(params, folders.model, folders.evaluation)
    report = folders.evaluation / artifacts.REPORT
    before = report.read_text()
    report.write_text("<title>another</title>")

    def kill(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MlflowClient, "log_artifact", kill)
        tracking.publish(params, folders.model, folders.evaluation)
    # DVC may bring the earlier one back.
    report.write_text(before)
    tracking.publish(params, folders.model, folders.evaluation)
    with connected() as client:
        assert "evaluation/report.html" in artifact_paths(client, run_id)


def test_images_that_a_model_has_seen_are_listed_by_their_digests_alone(
    store: Path, make_folders: MakeFolders, params: Params, tmp_path: Path
) -> None:
    folders = make_folders()
    run_id = tracking.publish(params, folders.model)
    rows = pd.read_csv(folders.model / artifacts.SEEN_IMAGES)
    with connected() as client:
        assert tracking.seen_images(client, run_id, tmp_path) == set(rows["sha256"])
        content = Path(client.download_artifacts(run_id, tracking.SEEN_LIST)).read_text()
    assert "train/" not in content
    other = make_folders("other", seed=2)
    rows[:5].to_csv(other.model / artifacts.SEEN_IMAGES, index=False)
    with pytest.raises(UserError, match="seen_images"):
        tracking.publish(params, other.model)


def test_publishing_twice_adds_nothing(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    first = tracking.publish(params, folders.model, folders.evaluation)
    with connected() as client:
        client.delete_tag(first, "published.training")
        client.delete_tag(first, "published.evaluation")
    assert tracking.publish(params, folders.model, folders.evaluation) == first
    with connected() as client:
        assert len(all_runs(client)) == 1
        assert len(client.get_metric_history(first, "train_loss")) == 3
        assert len(client.get_metric_history(first, "test_accuracy")) == 1
        assert len(client.get_run(first).inputs.dataset_inputs) == 1


def test_a_model_trained_while_mlflow_was_down_is_logged_whole_afterwards(
    no_server: str, migrated_database: Path, no_store: Path, make_folders: MakeFolders, params: Params,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import shutil

    with tracking.training_run(params, "0" * 32) as run:
        run.log_epoch(Epoch(1, "head", 1.0, 1.0, 1.0))
        assert run.run_id is None
    folders = make_folders()
    assert tracking.publish_if_reachable(params, folders.model) is None
    assert no_server in capsys.readouterr().err
    with pytest.raises(RegistryUnreachable):
        tracking.publish(params, folders.model)

    shutil.copyfile(migrated_database, no_store)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run_id = tracking.publish(params, folders.model)
    with connected() as client:
        assert len(client.get_metric_history(run_id, "val_accuracy")) == 3
        assert client.get_run(run_id).data.tags["outcome.train"] == "trained"


def test_epochs_of_a_live_run_are_not_logged_twice(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    with tracking.training_run(params, "0" * 32) as run:
        run.log_epoch(Epoch(1, "head", 1.0, 1.1, 1.5))
        run.log_epoch(Epoch(2, "head", 0.5, 0.55, 1.5))
    folders.edit(folders.model / artifacts.TRAINING, mlflow_run_id=run.run_id)
    assert tracking.publish(params, folders.model) == run.run_id
    with connected() as client:
        history = client.get_metric_history(str(run.run_id), "val_loss")
        assert [(metric.step, metric.value) for metric in history] == [(1, 1.1), (2, 0.55), (3, 1.1 / 3)]
        assert len(all_runs(client)) == 1
        assert client.get_run(str(run.run_id)).info.status == "FINISHED"


def test_a_training_that_fails_ends_its_run_as_failed(store: Path, params: Params) -> None:
    with pytest.raises(ValueError), tracking.training_run(params, "0" * 32) as run:
        raise ValueError
    with connected() as client:
        found = client.get_run(str(run.run_id))
    assert found.info.status == "FAILED"
    assert found.data.tags["outcome"] == "failed in train"


def test_a_given_run_is_joined_and_left_open(
    store: Path, make_folders: MakeFolders, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected() as client:
        given = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    folders = make_folders()
    with tracking.training_run(params, "0" * 32) as run:
        assert run.run_id == given
    folders.edit(folders.model / artifacts.TRAINING, mlflow_run_id=given)
    assert tracking.publish(params, folders.model) == given
    with connected() as client:
        assert len(all_runs(client)) == 1
        assert client.get_run(given).info.status == "RUNNING"


def test_a_second_model_does_not_share_a_given_run(
    store: Path, make_folders: MakeFolders, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected() as client:
        given = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    assert tracking.publish(params, make_folders("first", seed=1).model) == given
    assert tracking.publish(params, make_folders("second", seed=2).model) != given


def test_a_model_whose_run_this_server_does_not_know_gets_a_linked_one(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    folders.edit(folders.model / artifacts.TRAINING, mlflow_run_id="0" * 32)
    run_id = tracking.publish(params, folders.model)
    assert run_id != "0" * 32
    assert tracking.publish(params, folders.model) == run_id
    with connected() as client:
        assert client.get_run(run_id).data.tags["linked_from"] == "0" * 32
        assert len(all_runs(client)) == 1


def test_an_evaluation_of_another_model_is_not_published(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    first, second = make_folders("first", seed=1), make_folders("second", seed=2)
    with pytest.raises(UserError, match="another model"):
        tracking.publish(params, first.model, second.evaluation)


def test_a_closed_gate_shows_in_the_run_of_its_model(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders(n_wrong=20)
    run_id = tracking.publish(params, folders.model, folders.evaluation)
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    with connected() as client:
        assert client.get_run(run_id).data.tags["outcome"] == "gate not passed"


def test_a_deleted_experiment_is_a_user_error(store: Path, make_folders: MakeFolders, params: Params) -> None:
    with connected() as client:
        client.delete_experiment(client.create_experiment(params.registration.experiment))
    with pytest.raises(UserError, match="restore"):
        tracking.publish(params, make_folders().model)


def test_a_validation_brings_profile_and_data_docs_with_a_link_to_them(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    run_id = tracking.publish(params, folders.model, validation=folders.validation)
    with connected() as client:
        run = client.get_run(run_id)
        assert artifact_paths(client, run_id) >= {"data/profile.parquet", "data/data_docs"}
        assert [file.path for file in client.list_artifacts(run_id, "data/data_docs")] == ["data/data_docs/index.html"]
    assert run.data.tags["data_docs"] == "data/data_docs/index.html"
    assert run.data.tags["outcome.validate"] == "1 warnings"
    assert f"/runs/{run_id}/artifacts/data/data_docs/index.html" in run.data.tags["mlflow.note.content"]


def test_a_validation_is_published_once_and_a_new_one_replaces_all_its_pages(
    store: Path, make_folders: MakeFolders, params: Params, write_validation: Callable[..., None]
) -> None:
    folders = make_folders()
    write_validation(folders.validation, page="gallery.html")
    run_id = tracking.publish(params, folders.model, validation=folders.validation)
    (stored,) = (store.parent / "mlartifacts").rglob("gallery.html")
    written = stored.stat().st_mtime_ns
    tracking.publish(params, folders.model, validation=folders.validation)
    assert stored.stat().st_mtime_ns == written

    with connected() as client:
        client.set_tag(run_id, "mlflow.note.content", "seen by Dr. A.")
    write_validation(folders.validation, page="copies.html")
    tracking.publish(params, folders.model, validation=folders.validation)
    with connected() as client:
        pages = {Path(file.path).name for file in client.list_artifacts(run_id, "data/data_docs")}
        assert client.get_run(run_id).data.tags["mlflow.note.content"] == "seen by Dr. A."
    assert pages == {"index.html", "copies.html"}


def test_a_validation_of_other_data_is_not_published(
    store: Path, make_folders: MakeFolders, params: Params, write_validation: Callable[..., None]
) -> None:
    folders = make_folders()
    write_validation(folders.validation, data_md5="f" * 32)
    with pytest.raises(UserError, match="run 'braintumor validate' again"):
        tracking.publish(params, folders.model, validation=folders.validation)
    with connected() as client:
        assert not any("data_docs" in run.data.tags for run in all_runs(client))


def test_a_validation_that_was_stopped_by_a_critical_finding_is_not_published(
    store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    (folders.validation / "profile.parquet").unlink()
    with pytest.raises(UserError, match="braintumor validate"):
        tracking.publish(params, folders.model, validation=folders.validation)


def test_data_docs_of_a_refused_model_show_in_its_run(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders(n_wrong=20)
    run_id = tracking.publish(params, folders.model, folders.evaluation)
    decision = judge(folders.evaluation, folders.context, params.gate)
    artifacts.write_json(folders.decision / artifacts.DECISION, decision.as_json())
    assert tracking.publish_decision_if_reachable(folders.decision, folders.validation) == run_id
    with connected() as client:
        tags = client.get_run(run_id).data.tags
    assert tags["outcome"] == "gate not passed"
    assert tags["data_docs"] == "data/data_docs/index.html"


def test_the_profile_comes_back_from_the_run(store: Path, make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    published, data_md5 = load_profile(folders.validation / artifacts.PROFILE)
    run_id = tracking.publish(params, folders.model)
    with connected() as client:
        assert tracking.published_profile(client, run_id, data_md5) is None
        assert tracking.published_profile(client, "0" * 32, data_md5) is None
    tracking.publish(params, folders.model, validation=folders.validation)
    with connected() as client:
        found = tracking.published_profile(client, run_id, data_md5)
        assert found is not None
        pd.testing.assert_frame_equal(found, published)
        with pytest.raises(UserError, match="should be of the data ffff"):
            tracking.published_profile(client, run_id, "f" * 32)


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_profile_that_the_store_lost_or_changed_is_refused(
    how: str, store: Path, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    _, data_md5 = load_profile(folders.validation / artifacts.PROFILE)
    run_id = tracking.publish(params, folders.model, validation=folders.validation)
    (stored,) = (store.parent / "mlartifacts").rglob("profile.parquet")
    if how == "gone":
        stored.unlink()
    else:
        other = pd.DataFrame(load_profile(stored)[0].assign(mean=1.0))
        write_profile(other, data_md5, stored)
    with connected() as client, pytest.raises(UserError, match="register the model of data"):
        tracking.published_profile(client, run_id, data_md5)
