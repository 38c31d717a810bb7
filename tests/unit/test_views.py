"""What Kubeflow shows: figures that are no numbers do no harm, and pages hold what the files say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from kfp.dsl import ClassificationMetrics, Metrics

from braintumor import artifacts
from braintumor.attempt_report import Ending
from braintumor.evidence import plots
from braintumor.evidence.predictions import read_predictions
from braintumor.labels import CLASS_NAMES
from braintumor.params import Params
from braintumor.steps.gate import gate
from components import views


def strict_json(metadata: dict[str, Any]) -> str:
    """The metadata as Kubeflow's launcher takes it: NaN and infinity are errors."""
    return json.dumps(metadata, allow_nan=False)


@pytest.fixture(name="folders")
def judged_folders(make_folders: Any, params: Params, no_store: Path) -> Any:
    """A run's folders, with plots and a decision that refuses."""
    made = make_folders(n_wrong=20)
    metrics = json.loads((made.evaluation / artifacts.METRICS).read_text())
    predictions = read_predictions(made.evaluation / artifacts.PREDICTIONS)
    plots.plot_confusion_matrix(metrics, made.evaluation / artifacts.CONFUSION_MATRIX)
    plots.plot_roc_curves(predictions, metrics, made.evaluation / artifacts.ROC_CURVES)
    gate(made.evaluation, made.context, made.validation, made.decision, params.gate)
    return made


def test_figures_that_are_no_finite_numbers_are_counted_and_left_out() -> None:
    metrics = Metrics(name="figures", uri="figures")
    views.log_figures(metrics, {"good": 1, "nan": math.nan, "inf": math.inf, "text": "0.9", "none": None})
    assert metrics.metadata == {"good": 1.0, "not_finite": 4.0}
    strict_json(metrics.metadata)


def test_evaluation_shows_its_figures_matrix_and_curves(folders: Any) -> None:
    content = json.loads((folders.evaluation / artifacts.METRICS).read_text())
    metrics = Metrics(name="figures", uri="figures")
    views.log_evaluation(folders.evaluation, metrics)
    assert metrics.metadata["accuracy"] == content["accuracy"]
    assert [metrics.metadata[f"accuracy_{end}"] for end in ("low", "high")] == content["accuracy_interval"]
    assert metrics.metadata["recall_glioma"] == content["per_class"]["glioma"]["recall"]

    matrix = ClassificationMetrics(name="matrix", uri="matrix")
    views.log_confusion_matrix(folders.evaluation, matrix)
    shown = matrix.metadata["confusionMatrix"]
    assert [column["displayName"] for column in shown["annotationSpecs"]] == list(CLASS_NAMES)
    assert [row["row"] for row in shown["rows"]] == content["confusion_matrix"]

    curves = [ClassificationMetrics(name=name, uri=name) for name in CLASS_NAMES]
    views.log_roc_curves(folders.evaluation, curves)
    for curve in curves:
        points = curve.metadata["confidenceMetrics"]
        assert points[0]["recall"] == 0.0 and points[0]["falsePositiveRate"] == 0.0
        assert points[-1]["recall"] == 1.0 and points[-1]["falsePositiveRate"] == 1.0
        assert all(0 <= point["confidenceThreshold"] <= 1 for point in points)
        assert len(points) <= views.MAX_ROC_POINTS + 1
        strict_json(curve.metadata)


def test_pages_hold_the_figures_and_load_nothing(folders: Any, tmp_path: Path) -> None:
    pages = {
        "evaluation": lambda file: views.write_evaluation_report(folders.evaluation, file),
        "gate": lambda file: views.write_decision_report(folders.decision, file),
        "validation": lambda file: views.write_validation_report(folders.validation, file),
    }
    texts = {}
    for name, write in pages.items():
        write(tmp_path / name)
        texts[name] = (tmp_path / name).read_text()
        assert "http" not in texts[name].replace("http-equiv", "")
    assert texts["evaluation"] == (folders.evaluation / artifacts.REPORT).read_text()
    decision = json.loads((folders.decision / artifacts.DECISION).read_text())
    [reason] = [check["reason"] for check in decision["checks"] if check["name"] == "min_accuracy"]
    assert "The gate is closed" in texts["gate"]
    assert reason in texts["gate"].replace("&lt;", "<").replace("&gt;", ">").replace("&#x27;", "'")
    assert "Data validation" in texts["validation"]


def test_names_in_a_page_are_text(folders: Any, tmp_path: Path) -> None:
    file = folders.decision / artifacts.DECISION
    content = json.loads(file.read_text())
    content["checks"][0]["reason"] = "<script>alert(1)</script>"
    file.write_text(json.dumps(content))
    views.write_decision_report(folders.decision, tmp_path / "page")
    assert "<script>" not in (tmp_path / "page").read_text()


def test_ending_is_told_with_its_addresses(tmp_path: Path) -> None:
    views.write_ending(Ending("failed", "killed", "train", "d" * 32, "run", None), tmp_path / "ending.md")
    assert (
        tmp_path / "ending.md"
    ).read_text() == f"# Failed in train\n\nkilled\n\n- data: {'d' * 32}\n- MLflow run: run\n"
