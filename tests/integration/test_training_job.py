"""The task `train` of several nodes, against a stand-in of the Kubernetes API that keeps state."""

import io
import json
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
import pytest
from trainjob_api import TrainJobApi

from braintumor.artifacts import read_json, sha256_of_file, write_json
from braintumor.data.split_artifact import SPLIT_FACTS
from braintumor.errors import UserError
from braintumor.model.saved import model_digest
from braintumor.registry.attempts import sigterm_as_exit
from components import training_job
from components.training_job import run_training_job

IMAGE = "example.test/braintumor@sha256:" + "a" * 64
NODES = json.dumps({"nodes": 3, "resources": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1"}})
MD5 = "d" * 32


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(private + made.public_bytes(pem))
    return file


class Task:
    """A pod of the task, the cache that it shares with the workers, and the cluster."""

    def __init__(self, root: Path, api: TrainJobApi) -> None:
        self.root, self.api = root, api
        self.splits, self.model = root / "split", root / "model"
        self.splits.mkdir()
        rows = pd.DataFrame({"path": ["a"], "label": ["glioma"], "group": ["1"], "split": ["test"]})
        rows.to_csv(self.splits / "splits.csv", index=False)
        rows.to_csv(self.splits / "floors.csv", index=False)
        facts = {f"{name}_sha256": sha256_of_file(self.splits / f"{name}.csv") for name in ("splits", "floors")}
        summary = dict.fromkeys(SPLIT_FACTS) | facts
        write_json(self.splits / "split.json", summary | {
            "data_md5": MD5, "protocol": "declared", "statistics_importances": {}})  # fmt: skip

    @property
    def folder(self) -> Path:
        (found,) = (self.root / "cache/jobs").iterdir()
        return found

    def run(self, **other: str) -> None:
        given = {"params": "{}", "nodes": NODES, "image": IMAGE, "run_id": "r7"} | other
        run_training_job(MD5, self.splits, self.model, **given)

    def work(self, *_: object) -> None:
        """What the first worker leaves in the folder."""
        model = self.folder / "model"
        model.mkdir()
        weights = io.BytesIO()
        with h5py.File(weights, "w") as file:
            file["kernel"] = [1.0, 2.0]
        with zipfile.ZipFile(model / "model.keras", "w") as archive:
            archive.writestr("config.json", "{}")
            archive.writestr("model.weights.h5", weights.getvalue())
        for name in ("seen_images.csv", "calibration.csv"):
            (model / name).write_text("path\n")
        write_json(model / "training.json", {
            "data_md5": MD5, "splits_sha256": sha256_of_file(self.folder / "split/splits.csv"),
            "model_digest": model_digest(model / "model.keras"),
            "seen_images_sha256": sha256_of_file(model / "seen_images.csv"),
            "calibration_sha256": sha256_of_file(model / "calibration.csv"),
        })  # fmt: skip

    def succeed(self, *_: object) -> None:
        self.work()
        self.api.end("Complete")

    def fail(self, *_: object) -> None:
        self.api.end("Failed")


@pytest.fixture
def task(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    with TrainJobApi().serving(certificate) as api:
        account = tmp_path / "account"
        account.mkdir()
        for name, text in (("token", api.token), ("namespace", api.namespace), ("ca.crt", certificate.read_text())):
            (account / name).write_text(text)
        for variable, value in {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port), "HOSTNAME": "launcher-0",
            "BRAINTUMOR_CACHE": str(tmp_path / "cache"), "BRAINTUMOR_PIPELINE_RUN": "run-of-tonight",
        }.items():  # fmt: skip
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(training_job, "ACCOUNT", account)
        monkeypatch.setattr(training_job, "POLL_S", 0.01)
        monkeypatch.setattr(training_job, "PATIENCE_S", 5)
        yield Task(tmp_path, api)


def test_a_job_is_started_with_what_it_needs_and_its_model_becomes_the_tasks(task: Task) -> None:
    task.api.meanwhile = [lambda _: None, lambda _: None, task.succeed]
    task.run()
    (job,) = task.api.created
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-7", "uid": "u-7"}
    ]
    trainer = job["spec"]["trainer"]
    assert (trainer["image"], trainer["numNodes"]) == (IMAGE, 3)
    assert trainer["command"] == ["python3", "-m", "components.training_worker", str(task.folder)]
    request = read_json(task.folder / "request.json", "")
    assert (request["dataset"], request["image"], request["run_id"]) == (MD5, IMAGE, "r7")
    assert (task.folder / "split/splits.csv").read_bytes() == (task.splits / "splits.csv").read_bytes()
    assert read_json(task.model / "training.json", "")["model_digest"] == model_digest(task.model / "model.keras")
    assert task.api.jobs == {}


def test_a_retried_task_joins_the_job_of_its_first_try(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise RuntimeError("the task's node is lost")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="node is lost"):
        patch.setattr(training_job, "_follow", lose)
        task.run()
    assert len(task.api.jobs) == 1
    marker = task.folder / "split/marker"
    marker.touch()
    task.api.meanwhile = [lambda _: None, lambda _: None, task.succeed]
    task.run()
    assert len(task.api.created) == 1
    assert marker.exists()  # the workers' folder was not touched under them
    assert (task.model / "training.json").is_file()


def test_a_model_that_is_written_is_not_taken_before_its_job_is_complete(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training_job, "_follow", lambda *_: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            task.run()
    task.work()
    # The first worker may be telling MLflow still.
    task.api.meanwhile = [lambda _: None, lambda _: None, lambda api: api.end("Complete")]
    task.run()
    assert task.api.meanwhile == []


def test_a_retried_task_takes_the_model_of_a_job_that_is_gone_without_another(task: Task) -> None:
    task.api.meanwhile = [task.succeed]
    task.run()
    task.run()
    assert len(task.api.created) == 1


def test_a_job_that_failed_is_started_again_by_the_next_try_when_it_is_gone(task: Task) -> None:
    task.api.meanwhile = [task.fail]
    with pytest.raises(UserError, match="failed: jobset failed due to"):
        task.run()
    assert not task.model.exists()
    task.api.stays = 3
    task.api.meanwhile = [*[lambda _: None] * 6, task.succeed]
    task.run()
    assert len(task.api.created) == 2


def test_the_reason_of_the_worker_that_made_the_mistake_is_told_and_not_that_of_who_lost_it(task: Task) -> None:
    def fail(_: object) -> None:
        for number, is_loss in enumerate((True, False, True)):
            told = {"worker": f"node-{number}", "message": f"reason {number}", "is_loss": is_loss}
            write_json(task.folder / f"failures/node-{number}.json", told)
        task.fail()

    task.api.meanwhile = [fail]
    with pytest.raises(UserError, match="node-1 says: reason 1"):
        task.run()


@pytest.mark.parametrize("other", [{"image": IMAGE.replace("a", "b")}, {"params": '{"a": 1}'}, {"run_id": "r8"}])
def test_a_job_of_other_content_under_the_name_is_refused_and_left(task: Task, other: dict[str, str]) -> None:
    task.api.meanwhile = [task.fail]
    with pytest.raises(UserError):
        task.run()
    before = json.dumps(task.api.jobs)
    request = (task.folder / "request.json").read_text()
    with pytest.raises(UserError, match="is of another training"):
        task.run(**other)
    assert json.dumps(task.api.jobs) == before
    assert (task.folder / "request.json").read_text() == request


def test_a_job_that_somebody_deletes_is_told_and_no_wait_without_an_end(task: Task) -> None:
    task.api.meanwhile = [lambda api: api.jobs.clear()]
    with pytest.raises(UserError, match="deleted by somebody"):
        task.run()


def test_a_terminated_task_takes_its_job_with_it(task: Task) -> None:
    def evict(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)

    task.api.meanwhile = [lambda _: None, evict]
    with pytest.raises(SystemExit) as ended, sigterm_as_exit():
        task.run()
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(task.api.created) == 1
    assert task.api.jobs == {}


@pytest.mark.parametrize("fault", ["503", "429", "drop"])
def test_an_api_that_is_away_for_a_while_costs_nothing(task: Task, fault: str) -> None:
    task.api.faults = {1: fault, 4: fault, 6: fault}
    task.api.meanwhile = [lambda _: None, lambda _: None, task.succeed]
    task.run()
    assert len(task.api.created) == 1


def test_an_api_that_stays_away_is_told(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_job, "PATIENCE_S", 0.1)
    task.api.faults = dict.fromkeys(range(1, 100), "503")
    with pytest.raises(UserError, match="does not answer: 503"):
        task.run()


def refuse(api: TrainJobApi) -> None:
    api.has_rights = False


def remove(api: TrainJobApi) -> None:
    api.has_trainer = False


def rename(api: TrainJobApi) -> None:
    api.token = "another"


@pytest.mark.parametrize(
    ("mend", "told"),
    [(refuse, "k8s/overlays/training"), (remove, "install Kubeflow Trainer 2"), (rename, "Unauthorized")],
)
def test_a_cluster_that_is_not_prepared_is_told_with_the_remedy(
    task: Task, mend: Callable[[TrainJobApi], None], told: str
) -> None:
    mend(task.api)
    with pytest.raises(UserError, match=told):
        task.run()
    assert task.api.created == []


@pytest.mark.parametrize("missing", ["KUBERNETES_SERVICE_HOST", "BRAINTUMOR_CACHE", "BRAINTUMOR_PIPELINE_RUN"])
def test_outside_a_prepared_pod_nothing_is_started(task: Task, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(UserError):
        task.run()
    assert task.api.requests == []


@pytest.mark.parametrize("file", ["model.keras", "calibration.csv", "seen_images.csv", "training.json"])
def test_a_model_that_is_not_what_the_workers_left_is_refused(task: Task, file: str) -> None:
    def tamper(_: object) -> None:
        task.succeed()
        if file == "model.keras":
            with (
                zipfile.ZipFile(task.folder / "model/other", "w") as archive,
                zipfile.ZipFile(task.folder / "model/model.keras") as good,
            ):
                archive.writestr("config.json", '{"a": 1}')
                archive.writestr("model.weights.h5", good.read("model.weights.h5"))
            (task.folder / "model/other").rename(task.folder / "model/model.keras")
        elif file == "training.json":
            (task.folder / "model/training.json").unlink()
        else:
            (task.folder / "model" / file).write_text("changed\n")

    task.api.meanwhile = [tamper]
    with pytest.raises(UserError, match=r"not what its training left|left no model"):
        task.run()
    assert not task.model.exists()


def test_folders_that_nobody_came_back_for_go_and_others_stay(task: Task) -> None:
    jobs = task.root / "cache/jobs"
    old, new, foreign = jobs / "braintumor-0123456789ab", jobs / "braintumor-ba9876543210", jobs / "by-hand"
    for folder in (old, new, foreign):
        folder.mkdir(parents=True)
    for folder in (old, foreign):
        os.utime(folder, (0, 0))
    training_job._shared_folder("braintumor-aaaaaaaaaaaa")
    assert {path.name for path in jobs.iterdir()} == {new.name, foreign.name}


def test_a_worker_leaves_its_reason_where_the_task_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.training_worker import work

    write_json(tmp_path / "request.json", {"dataset": MD5, "params": "{", "image": IMAGE})
    with pytest.raises(UserError):
        work(tmp_path)
    (told,) = (tmp_path / "failures").iterdir()
    assert "not valid JSON" in read_json(told, "")["message"]
    assert read_json(told, "")["is_loss"] is False
    given: list[Any] = []
    monkeypatch.setattr("components.training_worker.parse_params", lambda text: text)
    monkeypatch.setattr("braintumor.steps.train.train", lambda *a, **b: given.append((a, b)))
    work(tmp_path)
    ((positional, named),) = given
    assert positional[:3] == (Path(MD5), tmp_path / "split", tmp_path / "model")
    assert named == {"image": IMAGE}
    assert list((tmp_path / "failures").iterdir()) == []
