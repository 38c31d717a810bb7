"""Against a real MLflow server, over HTTP, with proxied artifacts."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braintumor import artifacts
from braintumor.errors import RegistryUnreachable, UserError
from braintumor.model.inference import load_classifier, predict_probabilities
from braintumor.params import Params
from braintumor.registry import tracking
from braintumor.registry.server import connected
from braintumor.registry.versions import champion, download_model
from braintumor.steps.gate import gate
from braintumor.steps.register import register

NAME = "brain-tumor-phantoms"
STARTUP_S = 120


@dataclass(frozen=True)
class Epoch:
    epoch: int
    train_loss: float


def start_server(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination", str(folder / "server-artifacts"), "--serve-artifacts",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    log = (folder / "server.log").open("wb")
    server = subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    stop(server)
    pytest.fail((folder / "server.log").read_text())


def stop(server: "subprocess.Popen[bytes]") -> None:
    # Not SIGTERM: the server would wait for the connections that this process keeps open.
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = start_server(tmp_path_factory.mktemp("server"), port)
    yield f"http://127.0.0.1:{port}"
    stop(server)


@pytest.fixture
def server(address: str, no_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.fixture
def passed(make_folders: Callable[..., Any], params: Params, server: str) -> Any:
    folders = make_folders()
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    return folders


def run_register(folders: Any, params: Params) -> Any:
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


@pytest.mark.timeout(240)
def test_a_version_comes_back_over_http_with_equal_probabilities(
    passed: Any, params: Params, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    first = run_register(passed, params)
    assert run_register(passed, params) == first
    with connected() as client:
        assert len(client.search_model_versions(f"name = '{NAME}'")) == 1
        client.set_registered_model_alias(NAME, "champion", first.version)
        run = client.get_run(first.run_id)
        assert run.data.tags["outcome"] == "registered"
        assert run.inputs.dataset_inputs[0].dataset.digest == first.data_md5
        assert {file.path for file in client.list_artifacts(first.run_id)} >= {"training", "evaluation", "gate"}
    assert champion(NAME) == {
        "version": first.version,
        "model_digest": first.model_digest,
        "data_md5": first.data_md5,
    }
    assert not (tmp_path / "mlflow.db").exists()

    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1), np.uint8)
    expected = predict_probabilities(load_classifier(passed.model / artifacts.MODEL), images)
    file = download_model(NAME, "champion", tmp_path / "downloaded")
    assert file.read_bytes() == (passed.model / artifacts.MODEL).read_bytes()
    assert np.array_equal(predict_probabilities(load_classifier(file), images), expected)

    uri = f"models:/{NAME}@champion"
    keras_model = mlflow.tensorflow.load_model(uri)
    np.testing.assert_allclose(keras_model.predict(images, verbose=0)["probabilities"], expected, atol=1e-6)
    # As a serving container does it, and with the signature enforced.
    served = mlflow.pyfunc.load_model(uri)
    answer = served.predict(images)
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-6)
    assert answer["ood_score"].shape == (8, 1)
    with pytest.raises(mlflow.MlflowException):
        served.predict(images.astype(np.float64) / 255)
    assert np.asarray(served.input_example).shape == (1, 32, 32, 1)


@pytest.mark.timeout(240)
def test_a_training_whose_server_dies_is_logged_whole_when_the_server_is_back(
    make_folders: Callable[..., Any], no_store: Path, params: Params, tmp_path: Path, closed_port: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    server = start_server(tmp_path, closed_port)
    try:
        with tracking.training_run(params, "0" * 32) as run:
            run.log_epoch(Epoch(1, 1.0))
            stop(server)
            run.log_epoch(Epoch(2, 0.5))
            run.log_epoch(Epoch(3, 1 / 3))
        assert capsys.readouterr().err.count("Warning") == 1
        folders = make_folders()
        folders.edit(folders.model / artifacts.TRAINING, mlflow_run_id=run.run_id)
        with pytest.raises(RegistryUnreachable):
            tracking.publish(params, folders.model)
        server = start_server(tmp_path, closed_port)
        assert tracking.publish(params, folders.model) == run.run_id
        with connected() as client:
            history = client.get_metric_history(str(run.run_id), "train_loss")
            assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    finally:
        stop(server)


def test_something_that_is_no_mlflow_server_is_reported(
    address: str, no_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{address}/elsewhere")
    with pytest.raises(UserError, match="elsewhere"), connected():
        pass
