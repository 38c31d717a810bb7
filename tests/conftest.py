"""A consistent set of artifact folders around a tiny model, and MLflow stores that are quick to make."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file, write_json
from braintumor.data.profile import STATISTICS, write_profile
from braintumor.data.split_artifact import SPLIT_FACTS
from braintumor.evidence.comparison import no_champion
from braintumor.evidence.metrics import compute_test_metrics
from braintumor.evidence.of_scores import sections_of_scores
from braintumor.evidence.predictions import make_predictions, read_predictions, write_table
from braintumor.evidence.statistics_floor import STATISTICS as FLOOR_STATISTICS
from braintumor.labels import CLASS_NAMES
from braintumor.model.probes import PROBE_KINDS
from braintumor.model.saved import model_digest
from braintumor.params import Params, load_params

DATA_MD5 = "0123456789abcdef0123456789abcdef"
TESTS_PER_CLASS = 15
SIZE_PX = 32


@dataclass(frozen=True)
class Folders:
    """The folders of one run, as the steps leave them."""

    root: Path
    validation: Path
    model: Path
    splits: Path
    evaluation: Path
    decision: Path
    context: Path
    registration: Path

    def edit(self, file: Path, **changes: Any) -> None:
        """Change keys of a JSON file, as somebody who tampers with it would."""
        file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2, sort_keys=True) + "\n")


@pytest.fixture
def params() -> Params:
    """The committed parameters, with fewer bootstrap samples."""
    committed = load_params(Path(__file__).parents[1] / "params.yaml")
    return committed.model_copy(update={"evaluate": committed.evaluate.model_copy(update={"bootstrap_samples": 100})})


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two saved classifiers with different weights: images (n, 32, 32, 1) -> probabilities (n, 4), score (n, 1)."""
    from braintumor.model.densenet import import_keras
    from braintumor.model.inference import OOD_SCORE, PROBABILITIES

    keras = import_keras()
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for seed in (1, 2):
        image = keras.Input((SIZE_PX, SIZE_PX, 1), name="image")
        scaled = keras.layers.Rescaling(1 / 255)(image)
        features = keras.layers.GlobalAveragePooling2D()(keras.layers.MaxPooling2D(8)(scaled))
        normal = keras.initializers.RandomNormal(seed=seed)
        logits = keras.layers.Dense(4, kernel_initializer=normal, name="logits")(features)
        paths.append(folder / f"model-{seed}.keras")
        outputs = {
            PROBABILITIES: keras.layers.Softmax(name=PROBABILITIES)(logits),
            OOD_SCORE: keras.layers.Dense(1, kernel_initializer="ones", name=OOD_SCORE)(features),
        }
        keras.Model(image, outputs, name="tiny").save(paths[-1])
    return paths


@pytest.fixture
def make_folders(tmp_path: Path, tiny_models: list[Path], params: Params) -> Callable[..., Folders]:
    """Make a run's folders, all but decision and registration; `n_wrong` test images are misjudged."""

    def make(name: str = "build", seed: int = 1, n_wrong: int = 1, protocol: str = "official") -> Folders:
        root = tmp_path / name
        parts = ("validation", "model", "split", "evaluation", "gate", "resolve", "registration")
        validation, model, splits, evaluation, gate, resolve, registration = (root / part for part in parts)
        for folder in (validation, model, splits, evaluation, resolve):
            folder.mkdir(parents=True)
        write_validation(validation)
        write_json(
            resolve / artifacts.CONTEXT,
            {"data_md5": DATA_MD5, "n_images": 240, "model_name": params.registration.model_name, "champion": None},
        )
        split = _write_split(splits, protocol)
        training = _write_model(model, tiny_models[seed - 1], split, params)
        _write_evaluation(evaluation, splits, model, split, training, params, n_wrong)
        return Folders(root, validation, model, splits, evaluation, gate, resolve, registration)

    return make


def write_validation(folder: Path, data_md5: str = DATA_MD5, page: str = "index.html") -> None:
    """What a run publishes of a validation: a profile of one image a class, findings and Data Docs."""
    profile = pd.DataFrame(
        {
            "path": f"train/{label}/0.png",
            "label": label,
            "declared_split": "train",
            "duplicate_group": f"g-{label}",
            "sha256": f"sha-{label}",
            "pixels_sha256": f"pixels-{label}",
            **dict.fromkeys(STATISTICS, 50.0),
        }
        for label in CLASS_NAMES
    )
    write_profile(profile, data_md5, folder / artifacts.PROFILE)
    write_json(folder / artifacts.FINDINGS, {"data_md5": data_md5, "findings": [{"severity": "warning"}]})
    docs = folder / artifacts.DATA_DOCS
    shutil.rmtree(docs, ignore_errors=True)
    docs.mkdir()
    for name in {"index.html", page}:
        (docs / name).write_text("<h1>Data validation</h1>")


@pytest.fixture(name="write_validation")
def validation_writer() -> Callable[..., None]:
    """`write_validation`, for test modules that can't import it."""
    return write_validation


def _write_split(folder: Path, protocol: str) -> dict[str, Any]:
    rows = [
        {"path": f"{split}/{label}/{number}.png", "label": label, "group": f"{split}-{label}-{number}", "split": split}
        for split in ("train", "val", "calibration", "test")
        for label in CLASS_NAMES
        for number in range(TESTS_PER_CLASS)
    ]
    pd.DataFrame(rows).to_csv(folder / artifacts.SPLITS, index=False)
    test = [row for row in rows if row["split"] == "test"]
    floors = [
        {
            "path": row["path"],
            "neighbour_label": row["label"] if index < 0.5 * len(test) else "notumor",
            "statistics_label": row["label"] if index < 0.4 * len(test) else "notumor",
        }
        for index, row in enumerate(test)
    ]
    pd.DataFrame(floors).to_csv(folder / artifacts.FLOORS, index=False)
    summary = {
        "data_md5": DATA_MD5,
        "splits_sha256": sha256_of_file(folder / artifacts.SPLITS),
        "floors_sha256": sha256_of_file(folder / artifacts.FLOORS),
        "protocol": protocol,
        "claim": "copy-free, patients unknown",
        "test_md5": "fedcba9876543210fedcba9876543210",
        "statistics_accuracy": 0.4,
        "statistics_importances": dict.fromkeys(FLOOR_STATISTICS, 0.0),
        "leaked_share": 0.0,
        "declared_leaked_share": 0.25,
        "nearest_neighbour_accuracy": 0.5,
    }
    write_json(folder / artifacts.SPLIT_SUMMARY, summary)
    return summary


def _write_model(folder: Path, model: Path, split: dict[str, Any], params: Params) -> dict[str, Any]:
    shutil.copyfile(model, folder / artifacts.MODEL)
    epochs = [
        {
            "epoch": epoch,
            "phase": "head",
            "train_loss": 1.0 / epoch,
            "train_accuracy": 0.5 + epoch / 10,
            "val_loss": 1.1 / epoch,
            "val_accuracy": 0.4 + epoch / 10,
            "learning_rate": 0.001,
            "seconds": 1.5,
        }
        for epoch in (1, 2, 3)
    ]
    pd.DataFrame(epochs).to_csv(folder / artifacts.HISTORY, index=False)
    (folder / artifacts.LEARNING_CURVE).write_bytes(b"\x89PNG")
    seen = [f"train/{label}/{number}.png" for label in CLASS_NAMES for number in range(TESTS_PER_CLASS)]
    digests = [hashlib.sha256(path.encode()).hexdigest() for path in seen]
    pd.DataFrame({"path": seen, "sha256": digests}).to_csv(folder / artifacts.SEEN_IMAGES, index=False)
    calibration = pd.DataFrame(
        {
            "path": [f"calibration/{label}/{number}.png" for label in CLASS_NAMES for number in range(TESTS_PER_CLASS)],
            "label": np.repeat(CLASS_NAMES, TESTS_PER_CLASS),
            "group": [f"calibration-{label}-{number}" for label in CLASS_NAMES for number in range(TESTS_PER_CLASS)],
        }
    )
    right = np.eye(len(CLASS_NAMES), dtype=np.float32)[np.repeat(range(len(CLASS_NAMES)), TESTS_PER_CLASS)]
    scores = np.linspace(0, 1, len(calibration), dtype=np.float32)
    write_table(make_predictions(calibration, 0.96 * right + 0.01, scores), folder / artifacts.CALIBRATION)
    training = {
        "calibration_sha256": sha256_of_file(folder / artifacts.CALIBRATION),
        "seen_images_sha256": sha256_of_file(folder / artifacts.SEEN_IMAGES),
        "data_md5": DATA_MD5,
        "splits_sha256": split["splits_sha256"],
        "model_digest": model_digest(folder / artifacts.MODEL),
        "params": params.train.model_dump(),
        "temperature": 1.2,
        "epochs_run": 3,
        "best_epoch": 3,
        "best_val_loss": 0.37,
        "best_val_accuracy": 0.7,
        "git_commit": "f" * 40,
        "seconds": 4.5,
        "images": {"train": 60, "val": 60, "calibration": 60},
        "mlflow_run_id": None,
    }
    write_json(folder / artifacts.TRAINING, training)
    return training


def _write_evaluation(
    folder: Path,
    splits: Path,
    model: Path,
    split: dict[str, Any],
    training: dict[str, Any],
    params: Params,
    n_wrong: int,
) -> None:
    rows = pd.read_csv(splits / artifacts.SPLITS, dtype=str)
    rows = rows[rows["split"] == "test"]
    judged = rows["label"].map(CLASS_NAMES.index).to_numpy()
    judged[:n_wrong] = (judged[:n_wrong] + 1) % len(CLASS_NAMES)
    probabilities = np.full((len(rows), len(CLASS_NAMES)), 0.01, np.float32)
    probabilities[np.arange(len(rows)), judged] = 0.97
    scores = np.linspace(0.2, 0.9, len(rows), dtype=np.float32)
    floors = pd.read_csv(splits / artifacts.FLOORS, dtype=str).drop(columns="path")
    predictions = make_predictions(rows, probabilities, scores).assign(
        is_leaked=False, is_declared_copy=False, **{name: floors[name].to_numpy() for name in floors}
    )
    write_table(predictions, folder / artifacts.PREDICTIONS)
    probes = pd.DataFrame({"kind": np.repeat(list(PROBE_KINDS), params.evaluate.ood_probes)})
    probes["ood_score"] = np.linspace(0.85, 3, len(probes))
    write_table(probes, folder / artifacts.OOD_SCORES)
    (folder / artifacts.REPORT).write_text("<!DOCTYPE html><title>Evaluation</title>")
    tables = [read_predictions(folder / name) for name in (artifacts.PREDICTIONS, artifacts.OOD_SCORES)]
    bound = {
        **{fact: split[fact] for fact in ("data_md5", "splits_sha256", *SPLIT_FACTS)},
        "model_digest": training["model_digest"],
        "predictions_sha256": sha256_of_file(folder / artifacts.PREDICTIONS),
        "ood_scores_sha256": sha256_of_file(folder / artifacts.OOD_SCORES),
    }
    calibration = read_predictions(model / artifacts.CALIBRATION)
    sections = sections_of_scores(
        *tables, PROBE_KINDS, calibration, training["temperature"], split["statistics_importances"], params.evaluate
    )
    write_json(folder / artifacts.EVIDENCE, bound | sections | {"comparison": no_champion()})
    for name in (artifacts.CONFUSION_MATRIX, artifacts.ROC_CURVES, artifacts.PER_CLASS):
        (folder / name).write_bytes(b"\x89PNG")
    metrics = {
        "schema_version": 2,
        **bound,
        **{artifacts.sha256_key(name): sha256_of_file(folder / name) for name in artifacts.JUDGED_FILES},
        **compute_test_metrics(*tables, params.evaluate),
    }
    write_json(folder / artifacts.METRICS, metrics)


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: to make one takes seconds, to copy it none."""
    from braintumor.registry.server import connected

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        with connected() as client:
            client.search_experiments()
    return file


@pytest.fixture
def no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder without MLflow settings: the database that would be made there."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mlflow.db"


@pytest.fixture
def store(no_store: Path, migrated_database: Path) -> Path:
    """A fresh current folder with an empty MLflow database."""
    shutil.copyfile(migrated_database, no_store)
    return no_store


@pytest.fixture
def closed_port() -> int:
    """A loopback port where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def no_server(no_store: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLFLOW_TRACKING_URI names a server that is away."""
    address = f"http://127.0.0.1:{closed_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address
