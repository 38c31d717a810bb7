"""Evaluations of models whose weaknesses are known, as the measuring functions see them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from braintumor.evidence.calibration import measure_calibration, with_temperature
from braintumor.evidence.comparison import compare_with_champion
from braintumor.evidence.conformal import measure_conformal
from braintumor.evidence.leakage import measure_leakage_of_scores
from braintumor.evidence.metrics import compute_test_metrics
from braintumor.evidence.mistakes import find_label_errors, measure_mistakes
from braintumor.evidence.predictions import PROBABILITY_COLUMNS, make_predictions
from braintumor.evidence.shift import measure_ood, measure_robustness
from braintumor.evidence.shortcut import measure_shortcut
from braintumor.evidence.slices import measure_slices
from braintumor.evidence.statistics_floor import STATISTICS
from braintumor.evidence.triage import measure_triage
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams, load_params

GROUPS_PER_CLASS = 120
TEMPERATURE = 1.2


@dataclass(frozen=True)
class Evaluation:
    """The content of metrics.json, evidence.json and training.json."""

    metrics: dict[str, Any]
    evidence: dict[str, Any]
    training: dict[str, Any]


@pytest.fixture(scope="session")
def evaluate_params() -> EvaluateParams:
    """The committed parameters, with fewer bootstrap samples."""
    committed = load_params(Path(__file__).parents[2] / "params.yaml").evaluate
    return committed.model_copy(update={"bootstrap_samples": 200})


@pytest.fixture(scope="session")
def make_evaluation(evaluate_params: EvaluateParams) -> Callable[..., Evaluation]:
    """Make an evaluation of a model that is right as often as it says, about `accuracy` of the time.

    `leaky`: half of the images have copies among the training's and are right, the others often wrong; `shortcut`: it
    answers what the statistics say; `sharpened`: its logits are multiplied; `weak_mode`: what it makes of RGB files.
    """

    def make(
        accuracy: float = 0.97,
        *,
        leaky: bool = False,
        shortcut: bool = False,
        sharpened: float = 1,
        weak_mode: bool = False,
    ) -> Evaluation:
        rng = np.random.default_rng(5)
        rows = _images(rng)
        rows["is_leaked"] = (rows["number"] % 2 == 0) & leaky
        rows["is_declared_copy"] = rows["number"] % 3 == 0
        rows["mode"] = np.where(rows["number"] % 5 == 0, "RGB", "L")
        rows["statistics_label"] = _answers(rng, rows, np.full(len(rows), 0.85 if shortcut else 0.5))
        share = np.full(len(rows), accuracy)
        if leaky:
            share = np.where(rows["is_leaked"], 0.999, 0.7)
        if weak_mode:
            share = np.where(rows["mode"] == "RGB", 0.6, share)
        answered = rows["statistics_label"] if shortcut else _answers(rng, rows, share)
        rows["neighbour_label"] = _answers(rng, rows, np.where(rows["is_leaked"], 0.999, 0.6))
        confidence = np.clip(share if not shortcut else np.full(len(rows), 0.85), 0.4, 0.999)
        probabilities = _probabilities(rng, answered, confidence)
        if sharpened != 1:
            probabilities = with_temperature(probabilities, 1 / sharpened)
        return _measure(rng, rows, probabilities, evaluate_params)

    return make


@pytest.fixture(scope="session")
def evaluation(make_evaluation: Callable[..., Evaluation]) -> Evaluation:
    """One of a model that has something of everything."""
    return make_evaluation(0.9, weak_mode=True)


def _images(rng: np.random.Generator) -> pd.DataFrame:
    labels = np.repeat(CLASS_NAMES, GROUPS_PER_CLASS)
    copies = rng.integers(1, 3, len(labels))
    number = np.repeat(np.arange(len(labels)), copies)
    paths = [f"test/{labels[n]}/{place:04d}.png" for place, n in enumerate(number)]
    return pd.DataFrame(
        {"path": paths, "label": labels[number], "group": [f"g{n:04d}" for n in number], "number": number}
    )


def _answers(rng: np.random.Generator, rows: pd.DataFrame, share: np.ndarray) -> np.ndarray:
    truth = rows["label"].map(CLASS_NAMES.index).to_numpy()
    other = (truth + rng.integers(1, 4, len(rows))) % 4
    return np.asarray(CLASS_NAMES)[np.where(rng.random(len(rows)) < share, truth, other)]


def _probabilities(rng: np.random.Generator, answered: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    rest = rng.dirichlet(np.full(3, 20.0), len(confidence)) * (1 - confidence)[:, np.newaxis]
    probabilities = np.zeros((len(confidence), 4))
    chosen = pd.Series(answered).map(CLASS_NAMES.index).to_numpy()
    for column in range(1, 4):
        probabilities[np.arange(len(chosen)), (chosen + column) % 4] = rest[:, column - 1]
    probabilities[np.arange(len(chosen)), chosen] = confidence
    return probabilities


def _measure(
    rng: np.random.Generator, rows: pd.DataFrame, probabilities: np.ndarray, params: EvaluateParams
) -> Evaluation:
    scores = rng.uniform(0.2, 1.04, len(rows)).astype(np.float32)
    predictions = make_predictions(rows, probabilities.astype(np.float32), scores)
    facts = ("is_leaked", "is_declared_copy", "neighbour_label", "statistics_label", "mode")
    predictions = predictions.assign(**{name: rows[name].to_numpy() for name in facts})
    probes = {"noise": rng.uniform(1, 3, 24), "rotated": rng.uniform(0.6, 1.6, 24)}
    strange = pd.concat(pd.DataFrame({"kind": kind, "ood_score": score}) for kind, score in probes.items())
    truth = rows["label"].map(CLASS_NAMES.index).to_numpy(np.int64)
    groups = pd.factorize(rows["group"], sort=True)[0].astype(np.int64)
    answers = predictions[list(PROBABILITY_COLUMNS)].to_numpy(float)
    bound = {
        "data_md5": "d" * 32,
        "splits_sha256": "5" * 64,
        "model_digest": "a" * 64,
        "predictions_sha256": "b" * 64,
        "ood_scores_sha256": "c" * 64,
        "protocol": "declared" if rows["is_leaked"].any() else "official",
        "claim": "copy-free, patients unknown",
        "test_md5": "e" * 32,
        "nearest_neighbour_accuracy": float((rows["neighbour_label"] == rows["label"]).mean()),
        "statistics_accuracy": float((rows["statistics_label"] == rows["label"]).mean()),
        "leaked_share": float(rows["is_leaked"].mean()),
        "declared_leaked_share": float(rows["is_declared_copy"].mean()),
    }
    importances = {name: 0.02 * place for place, name in enumerate(STATISTICS)}
    champion = np.where(rng.random((len(rows), 1)) < 0.1, np.roll(answers, 1, axis=1), answers)
    evidence = {
        "schema_version": 1,
        **bound,
        "calibration": measure_calibration(truth, answers, groups, TEMPERATURE, params),
        "conformal": measure_conformal(truth, answers, groups, truth, answers, groups, params),
        "triage": measure_triage(truth, answers, groups, truth, answers, groups, params),
        "ood": measure_ood(scores, probes, {"noise": "noise of three kinds", "rotated": "test slices, turned"}),
        "slices": measure_slices(predictions, params),
        "leakage": measure_leakage_of_scores(predictions, params),
        "shortcut": measure_shortcut(predictions, importances, params),
        "mistakes": measure_mistakes(
            predictions, find_label_errors(predictions), len(rows), dict(zip(rows["path"], rows["path"], strict=True))
        ),
        "comparison": compare_with_champion(truth, answers, champion, groups, np.zeros(len(rows), bool), params, "3"),
        "robustness": _robustness(params),
        "explanation": _explanation(),
    }
    metrics = bound | {"schema_version": 1} | compute_test_metrics(predictions, strange, params)
    training = {
        "images": {"train": 1000, "val": 100, "calibration": 100},
        "best_epoch": 3,
        "epochs_run": 4,
        "temperature": TEMPERATURE,
        "best_val_accuracy": 0.91,
        "params": {"seed": 20, "weights": "none", "augmentation": {"flip_horizontal": True}},
    }
    return Evaluation(metrics, evidence, training)


def _robustness(params: EvaluateParams) -> dict[str, Any] | None:
    """Of a classifier that names the brightest quarter of the image."""
    truth = np.arange(24) % 4
    images = np.random.default_rng(1).integers(0, 60, (24, 32, 32, 1)).astype(np.uint8)
    for image, label in zip(images, truth, strict=True):
        image[16 * (label // 2) :, 16 * (label % 2) :][:16, :16] += 100

    def predict(images: np.ndarray) -> np.ndarray:
        return images.astype(float).reshape(-1, 2, 16, 2, 16).mean(axis=(2, 4)).reshape(-1, 4)

    return measure_robustness(predict, images, truth, params.seed)


def _explanation() -> dict[str, Any]:
    # The heat maps of a model need TensorFlow.
    stages = [{"randomised": name, "similarity": value} for name, value in (("logits", 0.3), ("conv5", 0.05))]
    per_class = {"glioma": {"n": 16, "pointing_game": 0.75, "overlap": 0.4}}
    place = {"n": 16, "pointing_game": 0.75, "chance": 0.06, "overlap": 0.4, "overlap_chance": 0.05}
    place["pointing_game_randomised"] = 0.1
    return {
        "method": "hirescam",
        "layer": "conv5_block32_concat",
        "map_px": 4,
        "n": 64,
        "randomisation": {"n": 64, "stages": stages, "limit": 0.5, "passed": True},
        "localisation": {**place, "per_class": per_class},
    }
