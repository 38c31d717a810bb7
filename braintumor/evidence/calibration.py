"""Whether probabilities mean what they say: of the images given 0.9, nine in ten are right."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.evidence.bootstrap import group_sums, percentile_interval, ratio_interval, resampled_sums
from braintumor.params import EvaluateParams

N_BINS = 15
# The model computes in 32-bit floats: a probability that underflowed to 0 is at most this.
LOWEST_PROBABILITY = float(np.finfo(np.float32).tiny)
_EQUAL_WIDTHS = np.arange(1, N_BINS) / N_BINS


def measure_calibration(
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.int64],
    temperature: float,
    params: EvaluateParams,
) -> dict[str, Any]:
    """Errors of the probabilities (n, 4), after and before the temperature that is in them, and reliability diagrams.

    Keys: temperature, n_bins; before {ece, ece_equal_mass, classwise_ece, brier, nll}; after: the same, with
    ece_interval, brier_interval, nll_interval, and ece_by_chance: the central interval of the ECE that a perfectly
    calibrated model with these confidences would show on so few groups; bins_before [{low, high, n, confidence | None,
    accuracy | None}] of the top probability, and bins: the same with accuracy_interval | None. Within a single group
    the intervals are as wide as can be.

    ECE has equal-width bins (Guo et al. 2017), ece_equal_mass as many bins of as many images; classwise_ece is the mean
    over the classes (Kull et al. 2019).
    """
    order = np.lexsort((*probabilities.T, truth, groups))
    truth, groups, after = truth[order], groups[order], probabilities[order]
    before = with_temperature(after, 1 / temperature)
    terms = _terms(truth, after)
    by_chance = _ece_by_chance(after.max(axis=1), groups, params)
    return {
        "temperature": float(temperature),
        "n_bins": N_BINS,
        "before": {name: _figure(term) for name, term in _terms(truth, before).items()},
        "after": {
            **{name: _figure(term) for name, term in terms.items()},
            "ece_interval": _ece_interval(terms["ece"], groups, by_chance, params),
            "brier_interval": _interval(terms["brier"], groups, 2.0, params),
            "nll_interval": _interval(terms["nll"], groups, -float(np.log(LOWEST_PROBABILITY)), params),
            "ece_by_chance": by_chance,
        },
        "bins_before": _bins(truth, before),
        "bins": _bins(truth, after, groups, params),
    }


def expected_calibration_error(
    confidence: NDArray[np.float64], is_right: NDArray[np.bool_], n_bins: int = N_BINS
) -> float:
    """Mean distance between confidence and accuracy over equal-width bins (low, high] (Guo et al. 2017)."""
    return _figure(_gaps(confidence, is_right, np.arange(1, n_bins) / n_bins))


def brier_score(truth: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Mean squared distance of the probabilities (n, classes) from the truth, summed over classes: 0 to 2."""
    return _figure(_squared_errors(truth, probabilities))


def negative_log_likelihood(truth: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Mean of -log of the true class's probability; one below LOWEST_PROBABILITY counts as that, so at most 87.3."""
    return _figure(_log_losses(truth, probabilities))


def with_temperature(probabilities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Softmax of the logits behind `probabilities`, divided by `temperature`."""
    logits = np.log(np.maximum(probabilities, LOWEST_PROBABILITY)) / temperature
    scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


def _terms(truth: NDArray[np.int64], probabilities: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What the images (n) add to the columns of each figure, see `_figure`."""
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    classes = range(probabilities.shape[1])
    by_class = [_gaps(probabilities[:, index], truth == index, _EQUAL_WIDTHS) for index in classes]
    return {
        "ece": _gaps(confidence, is_right, _EQUAL_WIDTHS),
        "ece_equal_mass": _gaps(confidence, is_right, _equal_masses(confidence)),
        "classwise_ece": np.hstack(by_class) / len(classes),
        "brier": _squared_errors(truth, probabilities),
        "nll": _log_losses(truth, probabilities),
    }


def _figure(terms: NDArray[np.float64]) -> float:
    return float(np.abs(terms.sum(axis=0)).sum() / len(terms))


def _gaps(
    confidence: NDArray[np.float64], is_right: NDArray[np.bool_], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    gaps = np.zeros((len(confidence), len(edges) + 1))
    gaps[np.arange(len(confidence)), np.digitize(confidence, edges, right=True)] = confidence - is_right
    return gaps


def _equal_masses(confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    # By rank rather than by interpolation: the edges stay where they are if every image is copied as often.
    ranks = -(-np.arange(1, N_BINS) * len(confidence) // N_BINS) - 1
    return np.sort(confidence)[ranks]


def _squared_errors(truth: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    one_hot = np.eye(probabilities.shape[1])[truth]
    return ((probabilities - one_hot) ** 2).sum(axis=1, keepdims=True)


def _log_losses(truth: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    of_truth = probabilities[np.arange(len(truth)), truth]
    return -np.log(np.clip(of_truth, LOWEST_PROBABILITY, 1))[:, np.newaxis]


def _interval(
    terms: NDArray[np.float64], groups: NDArray[np.int64], highest: float, params: EvaluateParams
) -> list[float]:
    """Percentile interval of a figure; [0, highest] within a single group, which tells nothing of others."""
    sums = group_sums(np.column_stack([terms, np.ones(len(terms))]), groups)
    if len(sums) == 1:
        return [0.0, highest]
    resampled = resampled_sums(sums, params)
    return percentile_interval(np.abs(resampled[:, :-1]).sum(axis=1) / resampled[:, -1], params)


def _ece_interval(
    terms: NDArray[np.float64], groups: NDArray[np.int64], by_chance: list[float], params: EvaluateParams
) -> list[float]:
    """Basic interval of the calibration error (Davison & Hinkley 1997, chapter 5), which always reaches the figure.

    The error is a sum of distances: noise only adds to it, and resampling adds the noise a second time. The basic
    interval takes that off again. In simulations of 1,200 images with a true ECE of 0.02, it holds the truth in 90 %,
    the percentile interval in 55 %. A calibrated model is the bad case: its error of 0 lies at the edge of what there
    is, and the interval alone would often leave it out. So the low end is 0 wherever chance explains the figure.
    """
    if len(np.unique(groups)) == 1:
        return [0.0, 1.0]
    figure = _figure(terms)
    low, high = (2 * figure - end for end in reversed(_interval(terms, groups, 1.0, params)))
    if figure <= by_chance[1]:
        low = 0.0
    return [max(0.0, min(low, figure)), min(1.0, max(high, figure))]


def _ece_by_chance(confidence: NDArray[np.float64], groups: NDArray[np.int64], params: EvaluateParams) -> list[float]:
    """Consistency resampling (Bröcker & Smith 2007): images are right as often as they say, copies together."""
    codes, group_of = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(params.seed).random((params.bootstrap_samples, len(codes)))
    bins = np.eye(N_BINS)[np.digitize(confidence, _EQUAL_WIDTHS, right=True)]
    right = (drawn[:, group_of] < confidence).astype(float) @ bins
    return percentile_interval(np.abs(confidence @ bins - right).sum(axis=1) / len(confidence), params)


def _bins(
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.int64] | None = None,
    params: EvaluateParams | None = None,
) -> list[dict[str, Any]]:
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bin_of = np.digitize(confidence, _EQUAL_WIDTHS, right=True)
    rows = []
    for index in range(N_BINS):
        inside = bin_of == index
        n = int(inside.sum())
        row: dict[str, Any] = {
            "low": index / N_BINS,
            "high": (index + 1) / N_BINS,
            "n": n,
            "confidence": float(confidence[inside].mean()) if n else None,
            "accuracy": float(is_right[inside].mean()) if n else None,
        }
        if groups is not None and params is not None:
            row["accuracy_interval"] = (
                ratio_interval(is_right[inside], np.ones(n), groups[inside], params) if n else None
            )
        rows.append(row)
    return rows
