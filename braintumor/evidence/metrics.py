"""Figures of a classifier on its test images, with intervals by bootstrap over groups of copies or patients."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.evidence.bootstrap import mean_interval, percentile_interval, resampled_sums, widen_share
from braintumor.evidence.calibration import brier_score, expected_calibration_error, negative_log_likelihood
from braintumor.evidence.predictions import (
    OOD_COLUMN,
    OOD_SCORE_COLUMNS,
    PREDICTION_COLUMNS,
    PROBABILITY_COLUMNS,
    SPLIT_COLUMNS,
)
from braintumor.evidence.shift import ood_auroc
from braintumor.labels import CLASS_NAMES, NO_TUMOUR
from braintumor.params import EvaluateParams

_NO_TUMOUR = CLASS_NAMES.index(NO_TUMOUR)


def compute_test_metrics(predictions: pd.DataFrame, ood_scores: pd.DataFrame, params: EvaluateParams) -> dict[str, Any]:
    """As `compute_metrics`, and the figures of copies and of images unlike the training's.

    `predictions` has the columns that the split knows, too; `ood_scores` has kind and ood_score of such images. Without
    copy-free test images, `copy_free_accuracy` and its interval are None. Raises UserError for scores that are not
    finite, too.
    """
    columns = [*PREDICTION_COLUMNS, OOD_COLUMN, *SPLIT_COLUMNS]
    _refuse_missing(predictions, columns, "predictions.csv")
    _refuse_missing(ood_scores, list(OOD_SCORE_COLUMNS), "ood_scores.csv")
    for table, name in ((predictions, "predictions.csv"), (ood_scores, "ood_scores.csv")):
        if table.empty or not np.isfinite(table[OOD_COLUMN].to_numpy(float)).all():
            raise UserError(f"{name} has no scores, or some that are not finite; run 'braintumor evaluate' again")
    metrics = compute_metrics(predictions, params)
    test_scores = predictions[OOD_COLUMN].to_numpy(float)
    by_kind = {str(kind): rows[OOD_COLUMN].to_numpy(float) for kind, rows in ood_scores.groupby("kind")}
    return {
        **metrics,
        **_copy_free(predictions, params),
        "ood_auroc": ood_auroc(test_scores, by_kind),
        "ood_flagged_share": float((test_scores > 1).mean()),
    }


def _copy_free(predictions: pd.DataFrame, params: EvaluateParams) -> dict[str, Any]:
    rows = predictions[~predictions["is_leaked"]]
    is_right = (rows["label"] == rows["predicted"]).to_numpy(float)
    groups = pd.factorize(rows["group"], sort=True)[0]
    return {
        "n_copy_free": len(rows),
        "copy_free_accuracy": float(is_right.mean()) if len(rows) else None,
        "copy_free_accuracy_interval": mean_interval(is_right, groups, params) if len(rows) else None,
    }


def _refuse_missing(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(f"{name} has no column {', '.join(missing)}; run 'braintumor evaluate' again")


def compute_metrics(predictions: pd.DataFrame, params: EvaluateParams) -> dict[str, Any]:
    """Figures of predictions.csv, n_test to confusion_matrix; the same rows in any order give the same figures.

    Raises UserError where a figure would be undefined: a class without test images, probabilities that are none, a path
    that stands twice, or a prediction that is not the most probable class.
    """
    from sklearn.metrics import roc_auc_score

    predictions = predictions.sort_values("path", ignore_index=True)
    truth, predicted, probabilities = _checked(predictions)
    groups = pd.factorize(predictions["group"], sort=True)[0]
    n_groups = int(groups.max()) + 1
    by_group = np.zeros((n_groups, len(CLASS_NAMES), len(CLASS_NAMES)))
    np.add.at(by_group, (groups, truth, predicted), 1)
    confusion = by_group.sum(axis=0)
    figures = figures_of_confusion(confusion)
    is_tumour = truth != _NO_TUMOUR
    return {
        "n_test": len(predictions),
        "n_groups": n_groups,
        "confidence_level": params.confidence_level,
        **{name: float(value) for name, value in figures.items()},
        **{f"{name}_interval": bounds for name, bounds in _intervals(by_group, params).items()},
        "macro_auroc": float(roc_auc_score(truth, _normalised(probabilities), multi_class="ovr", average="macro")),
        "tumour_auroc": float(roc_auc_score(is_tumour, 1 - probabilities[:, _NO_TUMOUR])),
        "ece": expected_calibration_error(probabilities.max(axis=1), truth == predicted),
        "brier": brier_score(truth, probabilities),
        "nll": negative_log_likelihood(truth, probabilities),
        "per_class": _per_class(confusion, truth, probabilities),
        "confusion_matrix": confusion.astype(int).tolist(),
    }


def _checked(predictions: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    _refuse_missing(predictions, PREDICTION_COLUMNS, "predictions.csv")
    probabilities = predictions[list(PROBABILITY_COLUMNS)].to_numpy(float)
    # Not a number is not at least 0 either.
    if not (probabilities >= 0).all() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise UserError("predictions.csv holds rows that are no probabilities; run 'braintumor evaluate' again")
    if (twice := predictions["path"].duplicated()).any():
        raise UserError(
            f"predictions.csv names {predictions['path'][twice].iloc[0]} twice; run 'braintumor evaluate' again"
        )
    classes = {name: index for index, name in enumerate(CLASS_NAMES)}
    truth, predicted = predictions["label"].map(classes), predictions["predicted"].map(classes)
    if truth.isna().any() or predicted.isna().any():
        raise UserError(f"predictions.csv holds labels other than {', '.join(CLASS_NAMES)}; check the data set")
    absent = [name for index, name in enumerate(CLASS_NAMES) if not (truth == index).any()]
    if absent:
        raise UserError(f"no test image of class {', '.join(absent)}; add some, or split with protocol 'grouped'")
    if (probabilities.argmax(axis=1) != predicted).any():
        raise UserError("predictions.csv names a class that is not its most probable; run 'braintumor evaluate' again")
    return np.asarray(truth, np.int64), np.asarray(predicted, np.int64), probabilities


def figures_of_confusion(confusion: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Figures of confusion matrices (..., true, predicted), each (...); 0 / 0 counts as 0."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    recall = _ratio(right, confusion.sum(axis=-1))
    precision = _ratio(right, confusion.sum(axis=-2))
    tumour = [index for index in range(len(CLASS_NAMES)) if index != _NO_TUMOUR]
    tumour_rows = confusion[..., tumour, :]
    return {
        "accuracy": _ratio(right.sum(axis=-1), confusion.sum(axis=(-2, -1))),
        "balanced_accuracy": recall.mean(axis=-1),
        "macro_f1": _ratio(2 * precision * recall, precision + recall).mean(axis=-1),
        "tumour_sensitivity": _ratio(tumour_rows[..., tumour].sum(axis=(-2, -1)), tumour_rows.sum(axis=(-2, -1))),
        "tumour_specificity": recall[..., _NO_TUMOUR],
    }


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)


def _intervals(by_group: NDArray[np.float64], params: EvaluateParams) -> dict[str, list[float]]:
    """Percentile intervals over resamples of whole groups, widened as those of any other share (`widen_share`).

    The groups that a figure rests on are all, those with a tumour, those without, or for the means over classes those
    of the class that is in the fewest. So a small test set can't claim certainty.
    """
    n_groups = len(by_group)
    resampled = resampled_sums(by_group.reshape(n_groups, -1), params).reshape(-1, *by_group.shape[1:])
    has_class = by_group.sum(axis=2) > 0
    smallest = int(has_class.sum(axis=0).min())
    resting_on = {
        "accuracy": n_groups,
        "tumour_sensitivity": int(np.delete(has_class, _NO_TUMOUR, axis=1).any(axis=1).sum()),
        "tumour_specificity": int(has_class[:, _NO_TUMOUR].sum()),
        "balanced_accuracy": smallest,
        "macro_f1": smallest,
    }
    point = figures_of_confusion(by_group.sum(axis=0))
    return {
        name: widen_share(float(point[name]), percentile_interval(values, params), resting_on[name], params)
        for name, values in figures_of_confusion(resampled).items()
    }


def _per_class(
    confusion: NDArray[np.float64], truth: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, dict[str, float]]:
    from sklearn.metrics import roc_auc_score

    right = np.diagonal(confusion)
    true, predicted, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    recall, precision = _ratio(right, true), _ratio(right, predicted)
    specificity = _ratio(total - true - predicted + right, total - true)
    f1 = _ratio(2 * precision * recall, precision + recall)
    return {
        name: {
            "n": int(true[index]),
            "recall": float(recall[index]),
            "specificity": float(specificity[index]),
            "precision": float(precision[index]),
            "f1": float(f1[index]),
            "auroc": float(roc_auc_score(truth == index, probabilities[:, index])),
        }
        for index, name in enumerate(CLASS_NAMES)
    }


def _normalised(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    # scikit-learn wants rows that sum to 1 more exactly than 32-bit floats do.
    return probabilities / probabilities.sum(axis=1, keepdims=True)
