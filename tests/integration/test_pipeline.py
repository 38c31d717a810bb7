"""All steps through the command line, on images made here, with a real DenseNet201 and a real MLflow store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from braintumor.artifacts import read_json
from braintumor.labels import CLASS_NAMES

STEPS = ("resolve", "validate", "split", "train", "evaluate", "gate", "register")


def test_whole_run_ends_with_a_challenger_that_gives_the_same_probabilities(
    store: Path, tmp_path: Path, braintumor: Any, dataset_maker: Callable[..., Path], params_writer: Callable[..., Path]
) -> None:
    data = dataset_maker(tmp_path / "data")
    params_writer(tmp_path / "params.yaml")
    for step in STEPS:
        ended = braintumor(step)
        assert ended.code == 0, ended.err
        assert ended.out.startswith(f"{step}: ")
    build = tmp_path / "build"
    metrics = read_json(build / "evaluation/metrics.json", "")
    training = read_json(build / "model/training.json", "")
    assert metrics["n_test"] == 24
    assert metrics["protocol"] == "official"
    assert training["epochs_run"] == 9
    assert training["mlflow_run_id"]
    history = pd.read_csv(build / "model/history.csv")
    assert history["phase"].tolist() == ["head"] * 8 + ["fine-tuning"]
    assert history["val_loss"].min() == pytest.approx(training["best_val_loss"])
    seen = pd.read_csv(build / "model/seen_images.csv")
    tested = pd.read_csv(build / "evaluation/predictions.csv")
    assert not set(seen["group"]) & set(tested["group"])

    registration = read_json(build / "registration/registration.json", "")
    assert registration["version"] == "1"
    before = (build / "registration/registration.json").read_bytes()
    for step in ("resolve", "register"):
        assert braintumor(step).code == 0
    assert (build / "registration/registration.json").read_bytes() == before

    # From the registry and from the file, as evaluate had them.
    for source in (("--alias", "challenger"), ("--model", build / "model/model.keras")):
        ended = braintumor("predict", data / "test", "--json", *source)
        assert ended.code == 0, ended.err
        found = [json.loads(line) for line in ended.out.splitlines()]
        assert {tuple(one) for one in found} == {
            ("path", "label", "probabilities", "ood_score", "is_unlike_training", "overlay")
        }
        by_path = {str(Path(one["path"]).relative_to(data)): one for one in found}
        for row in tested.to_dict("records"):
            one = by_path[row["path"]]
            assert one["label"] == row["predicted"]
            expected = [row[f"probability_{name}"] for name in CLASS_NAMES]
            np.testing.assert_allclose([one["probabilities"][name] for name in CLASS_NAMES], expected, atol=2e-6)
            assert one["ood_score"] == pytest.approx(row["ood_score"], abs=1e-5)
            assert one["is_unlike_training"] is (one["ood_score"] > 1)

    ended = braintumor("summary")
    assert "brain-tumor-phantoms version 1 (challenger)" in ended.out


def test_training_survives_mlflow_being_down_and_running_again_finishes_the_rest(
    store: Path,
    closed_port: int,
    tmp_path: Path,
    braintumor: Any,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from braintumor.registry.server import connected

    dataset_maker(tmp_path / "data")
    params_writer(
        tmp_path / "params.yaml",
        train={"epochs": 0, "head_epochs": 2},
        gate={"min_accuracy": {"value": 0, "required": True}},
    )
    assert [braintumor(step).code for step in ("resolve", "validate", "split")] == [0, 0, 0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    for step in ("train", "evaluate", "gate"):
        ended = braintumor(step)
        assert ended.code == 0, ended.err
        assert "Warning: MLflow at" in ended.err
    assert read_json(tmp_path / "build/model/training.json", "")["mlflow_run_id"] is None
    ended = braintumor("register")
    assert ended.code == 5
    assert not (tmp_path / "build/registration").exists()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert braintumor("register").code == 0
    registration = read_json(tmp_path / "build/registration/registration.json", "")
    with connected() as client:
        run = client.get_run(registration["run_id"])
        steps = [metric.step for metric in client.get_metric_history(registration["run_id"], "val_loss")]
    assert sorted(steps) == [1, 2]
    assert run.data.params["train.head_epochs"] == "2"
    assert run.data.tags["outcome"] == "registered"
    assert run.inputs.dataset_inputs[0].dataset.digest == registration["data_md5"]


def test_same_seed_trains_the_same_model(
    no_store: Path,
    tmp_path: Path,
    braintumor: Any,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
) -> None:
    dataset_maker(tmp_path / "data")
    params_writer(tmp_path / "params.yaml", train={"head_epochs": 2})
    assert [braintumor(step).code for step in ("resolve", "validate", "split")] == [0, 0, 0]
    digests = []
    for name in ("one", "two"):
        ended = braintumor("train", "--output", tmp_path / name)
        assert ended.code == 0, ended.err
        training = read_json(tmp_path / name / "training.json", "")
        assert training["resumed_after_epoch"] is None
        digests.append(training["model_digest"])
    assert digests[0] == digests[1]
