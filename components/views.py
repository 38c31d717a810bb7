"""What Kubeflow shows of the steps' results: figures, matrix and curves, and pages that load nothing.

Kubeflow's metadata has no NaN and no infinity: they are left out, or put at the edge of their scale.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from kfp.dsl import ClassificationMetrics, Metrics

from braintumor import artifacts
from braintumor.artifacts import read_json, write_text
from braintumor.attempt_report import Ending
from braintumor.data.html_page import Html, element, page, table
from braintumor.evidence.predictions import PROBABILITY_COLUMNS, read_predictions
from braintumor.labels import CLASS_NAMES

TRAINING_FIGURES = ("epochs_run", "best_epoch", "best_val_loss", "best_val_accuracy", "temperature", "seconds")
SPLIT_FIGURES = ("leaked_share", "declared_leaked_share", "nearest_neighbour_accuracy", "statistics_accuracy")
MAX_ROC_POINTS = 200  # a metadata row of thousands of points makes Kubeflow's page slow


def log_figures(metrics: Metrics, numbers: Mapping[str, object]) -> None:
    """The finite numbers stand in the artifact's metadata; of the others, their count."""
    finite = {name: float(value) for name, value in numbers.items() if _is_finite(value)}  # type: ignore[arg-type]
    for name, value in finite.items():
        metrics.log_metric(name, value)
    if len(finite) < len(numbers):
        metrics.log_metric("not_finite", len(numbers) - len(finite))


def log_split(splits: Path, metrics: Metrics) -> None:
    """Sizes of the parts, leaked shares and floors of the split."""
    summary = read_json(splits / artifacts.SPLIT_SUMMARY, "braintumor split")
    sizes = {f"{name}_images": size for name, size in summary["sizes"].items()}
    log_figures(metrics, sizes | {name: summary[name] for name in SPLIT_FIGURES if summary[name] is not None})


def log_training(model: Path, metrics: Metrics) -> None:
    """Epochs, best validation figures and temperature of the training."""
    training = read_json(model / artifacts.TRAINING, "braintumor train")
    log_figures(metrics, {name: training[name] for name in TRAINING_FIGURES})


def log_evaluation(evaluation: Path, metrics: Metrics) -> None:
    """Every number of metrics.json that stands alone, the ends of the intervals, and each class's recall."""
    content = _metrics(evaluation)
    numbers = {name: value for name, value in content.items() if isinstance(value, int | float)}
    for name, value in content.items():
        if name.endswith("_interval") and value is not None:
            numbers[name.replace("_interval", "_low")], numbers[name.replace("_interval", "_high")] = value
    recalls = {f"recall_{label}": entry["recall"] for label, entry in content["per_class"].items()}
    log_figures(metrics, numbers | recalls)


def log_confusion_matrix(evaluation: Path, matrix: ClassificationMetrics) -> None:
    """Counts of true (rows) against predicted class."""
    matrix.log_confusion_matrix(list(CLASS_NAMES), _metrics(evaluation)["confusion_matrix"])


def log_roc_curves(evaluation: Path, curves: Sequence[ClassificationMetrics]) -> None:
    """A curve a class against the rest, in the order of CLASS_NAMES, of at most 200 points."""
    from sklearn.metrics import roc_curve

    predictions = read_predictions(evaluation / artifacts.PREDICTIONS)
    for label, column, curve in zip(CLASS_NAMES, PROBABILITY_COLUMNS, curves, strict=True):
        # scikit-learn starts at the threshold infinity, where nothing is called positive.
        rates = pd.DataFrame(zip(*roc_curve(predictions["label"] == label, predictions[column]), strict=True))
        rates = rates.replace([math.inf], 1.0).dropna()
        step = max(1, math.ceil(len(rates) / MAX_ROC_POINTS))
        shown = pd.concat([rates.iloc[:-1:step], rates.iloc[-1:]])
        curve.log_roc_curve(*(shown[column].tolist() for column in shown))


def write_validation_report(validation: Path, file: Path) -> None:
    """The index of the Data Docs, as it stands."""
    write_text(file, (validation / artifacts.DATA_DOCS / "index.html").read_text(encoding="utf-8"))


def write_evaluation_report(evaluation: Path, file: Path) -> None:
    """The report of the evaluation, as it stands."""
    write_text(file, (evaluation / artifacts.REPORT).read_text(encoding="utf-8"))


def write_decision_report(decision: Path, file: Path) -> None:
    """The verdict and every check with value, floor and reason."""
    content = read_json(decision / artifacts.DECISION, "braintumor gate")
    verdict = "The gate is open" if content["passed"] is True else "The gate is closed: nothing is registered"
    rows = [
        [
            _mark(check),
            check["name"].replace("_", " "),
            _text(check["value"]),
            _text(check["threshold"]),
            check["reason"],
        ]
        for check in sorted(content["checks"], key=lambda check: (check["passed"], not check["required"]))
    ]
    parts = [element("h1", verdict), table("Checks", ["verdict", "check", "value", "threshold", "reason"], rows)]
    write_text(file, page("Gate", parts))


def write_ending(ending: Ending, file: Path) -> None:
    """How the run ended, as Markdown."""
    lines = [f"# {ending.headline.capitalize()}", "", ending.message, ""]
    facts = {"data": ending.data_md5, "MLflow run": ending.address or ending.mlflow_run_id}
    write_text(file, "\n".join([*lines, *(f"- {name}: {value}" for name, value in facts.items() if value)]) + "\n")


def _metrics(evaluation: Path) -> dict[str, Any]:
    return read_json(evaluation / artifacts.METRICS, "braintumor evaluate")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _share(value: object) -> str:
    return f"{value:.1%}" if _is_finite(value) else "unknown"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _figure(text: str) -> Html:
    return element("span", text, 'class="figure"')


def _mark(check: Mapping[str, Any]) -> Html:
    if check["passed"]:
        return element("span", "passed", 'class="passed"')
    return (
        element("span", "failed", 'class="critical"')
        if check["required"]
        else element("span", "warning", 'class="warning"')
    )
