"""How a model meets images unlike the training's, and slices that were perturbed on their way."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.model.perturbations import PERTURBATIONS

THRESHOLD = 1.0

Scores = NDArray[np.floating[Any]]
Predict = Callable[[NDArray[np.uint8]], NDArray[np.floating[Any]]]


def measure_ood(test_scores: Scores, probe_scores: Mapping[str, Scores], told: Mapping[str, str]) -> dict[str, Any]:
    """The section 'ood' of evidence.json, of out-of-distribution scores of the test images and of each kind of probes.

    {"threshold": 1.0, "in_distribution": {"n", "flagged_share"}, "kinds": {kind: {"n", "auroc", "flagged_share",
    "told"}}, "auroc": the mean over kinds, "lowest": the kind with the lowest}. Kinds stand in the order given.
    """
    aurocs = _aurocs(test_scores, probe_scores)
    return {
        "threshold": THRESHOLD,
        "in_distribution": {"n": len(test_scores), "flagged_share": _flagged_share(test_scores)},
        "kinds": {
            kind: {
                "n": len(scores),
                "auroc": aurocs[kind],
                "flagged_share": _flagged_share(scores),
                "told": told[kind],
            }
            for kind, scores in probe_scores.items()
        },
        "auroc": _mean(aurocs),
        "lowest": min(aurocs, key=lambda kind: (aurocs[kind], kind)),
    }


def ood_auroc(test_scores: Scores, probe_scores: Mapping[str, Scores]) -> float:
    """The mean over kinds of the area under the ROC curve of their scores against those of the test images."""
    return _mean(_aurocs(test_scores, probe_scores))


def _mean(aurocs: Mapping[str, float]) -> float:
    # An exact sum: the same to the last bit, whatever the order of the kinds.
    return math.fsum(aurocs.values()) / len(aurocs)


def _aurocs(test_scores: Scores, probe_scores: Mapping[str, Scores]) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    if not probe_scores or not all(map(len, (test_scores, *probe_scores.values()))):
        raise UserError("out-of-distribution scores are missing; run 'braintumor evaluate' again")
    if not all(np.isfinite(scores).all() for scores in (test_scores, *probe_scores.values())):
        raise UserError("an out-of-distribution score is NaN or infinite; train the model again")
    return {
        kind: float(
            roc_auc_score(
                np.repeat([0, 1], [len(test_scores), len(scores)]),
                np.concatenate([test_scores, scores]).astype(np.float64),
            )
        )
        for kind, scores in probe_scores.items()
    }


def _flagged_share(scores: Scores) -> float:
    return float((np.asarray(scores) > THRESHOLD).mean())


def measure_robustness(
    predict: Predict,
    images: NDArray[np.uint8],
    truth: NDArray[np.int64],
    seed: int,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """The section 'robustness' of evidence.json, of images (n, size, size, 1) with truth (n,); None without images.

    {"n", "clean_accuracy", "kinds": {kind: {"unit", "severities": [...], "accuracy": [...], "retained"}}, "retained":
    the mean over kinds}. Retained is the mean accuracy over the severities by the clean one, 0 where that is 0, and
    may be above 1. `on_image` is called `robustness_images_scored(n)` times.
    """
    if len(images) == 0:
        return None

    def accuracy(perturbed: NDArray[np.uint8]) -> float:
        right = np.asarray(predict(perturbed)).argmax(axis=1) == truth
        for _ in perturbed:
            on_image()
        return float(right.mean())

    clean = accuracy(images)
    kinds = {}
    for kind, perturbation in PERTURBATIONS.items():
        accuracies = [accuracy(perturbation.apply(images, severity, seed)) for severity in perturbation.severities]
        kinds[kind] = {
            "unit": perturbation.unit,
            "severities": [float(severity) for severity in perturbation.severities],
            "accuracy": accuracies,
            "retained": float(np.mean(accuracies)) / clean if clean else 0.0,
        }
    return {
        "n": len(images),
        "clean_accuracy": clean,
        "kinds": kinds,
        "retained": float(np.mean([kind["retained"] for kind in kinds.values()])),
    }


def robustness_images_scored(n_images: int) -> int:
    """How many images are scored to measure the robustness on `n_images`."""
    return n_images * (1 + sum(len(perturbation.severities) for perturbation in PERTURBATIONS.values()))
