"""Which images the model may keep, and which it refers to a radiologist."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.evidence.bootstrap import mean_interval, one_of_each_group, percentile_interval, resample_groups
from braintumor.params import EvaluateParams

SCORE = "top probability"
# Fixed beforehand: a threshold looked for among the scores themselves would be fitted to their errors.
THRESHOLDS = (*(percent / 100 for percent in range(25, 100)), 0.995, 0.999)
CURVE_POINTS = 100


def measure_triage(
    calibration_truth: NDArray[np.int64],
    calibration_probabilities: NDArray[np.float64],
    calibration_groups: NDArray[np.int64],
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.int64],
    params: EvaluateParams,
) -> dict[str, Any]:
    """A threshold of the top probability below which images are referred, and what it does to the test images.

    Keys: max_error; score; threshold | None; n_needed: groups of calibration images that must be kept, for a bound at
    all; calibration {threshold, n: groups, kept: share, error, error_bound} | None; failed: the same of the next
    threshold, that did not pass | None; test {kept: share, accuracy | None,
    accuracy_interval | None, n_referred, n_wrong_kept} | None, both None without a threshold; n_wrong: of all test
    images; aurc, aurc_interval, aurc_perfect and aurc_random: area under the risk-coverage curve, of an order that puts
    all errors last, and of none; curve [{kept: share, accuracy, threshold}], at most 100 points, fewest kept first;
    remark. Within a single group of test images the aurc_interval is [0, 1].

    Risk and coverage as in Geifman & El-Yaniv 2017: images whose score is at least the threshold are kept.
    """
    scores, is_wrong = _judged(truth, probabilities)
    n_needed = _groups_needed(params)
    tried = _tried(calibration_truth, calibration_probabilities, calibration_groups, n_needed, params)
    passed = [one for one in tried if one["error_bound"] <= params.triage_max_error]
    chosen = passed[-1] if passed else None
    test = _at_threshold(scores, is_wrong, groups, chosen["threshold"], params) if chosen else None
    error = float(is_wrong.mean())
    return {
        "max_error": params.triage_max_error,
        "score": SCORE,
        "threshold": chosen["threshold"] if chosen else None,
        "n_needed": n_needed,
        "calibration": chosen,
        "failed": tried[-1] if len(tried) > len(passed) else None,
        "test": test,
        "n_wrong": int(is_wrong.sum()),
        **_area(scores, is_wrong, groups, params),
        # All errors last: the risk is 0 up to a coverage of 1 - error, and 1 - (1 - error) / coverage after it.
        "aurc_perfect": error + (1 - error) * float(np.log1p(-error)) if error < 1 else 1.0,
        "aurc_random": error,
        "curve": _curve(scores, is_wrong),
        "remark": _remark(chosen, tried[0] if tried else None, test, n_needed, params),
    }


def breaks_promise(test: Mapping[str, Any] | None, max_error: float) -> bool:
    """Whether more of the kept test images are wrong than may be, and not just by the chance of the draw."""
    return bool(test and test["accuracy"] is not None and 1 - test["accuracy_interval"][1] > max_error)


def _judged(
    truth: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return probabilities.max(axis=1), probabilities.argmax(axis=1) != truth


def _tried(
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.int64],
    n_needed: int,
    params: EvaluateParams,
) -> list[dict[str, Any]]:
    """Thresholds from strict to loose, up to the first that isn't shown to hold the error to `triage_max_error`.

    Selection with guaranteed risk (Geifman & El-Yaniv 2017), the thresholds tested in a fixed order until one fails
    (Angelopoulos et al. 2021, 'Learn then Test'): none can pass wrongly unless the first wrong one does, so each test
    may use the whole chance of a mistake, 1 - confidence_level. The first threshold is the strictest that keeps
    `n_needed` groups. One image of each group counts, see `one_of_each_group`: the bound is that of independent images.
    """
    scores, is_wrong = _judged(truth, probabilities)
    picked = one_of_each_group(np.column_stack([scores, is_wrong]), groups, params)
    scores, is_wrong = scores[picked], is_wrong[picked]
    tried: list[dict[str, Any]] = []
    for threshold in reversed(THRESHOLDS):
        is_kept = scores >= threshold
        n_kept, n_wrong = int(is_kept.sum()), int(is_wrong[is_kept].sum())
        if n_kept < n_needed:
            continue
        bound = _error_bound(n_wrong, n_kept, params)
        found = {"threshold": threshold, "n": len(picked), "kept": n_kept / len(picked), "error": n_wrong / n_kept}
        tried.append(found | {"error_bound": bound})
        if bound > params.triage_max_error:
            break
    return tried


def _groups_needed(params: EvaluateParams) -> int:
    """How many must be kept for one wrong image among them to pass: a single wrong label shall not end the search."""
    n = 2
    while _error_bound(1, n, params) > params.triage_max_error:
        n += 1
    return n


def _error_bound(n_wrong: int, n: int, params: EvaluateParams) -> float:
    """Upper bound of the error that `n_wrong` of `n` independent images show (Clopper & Pearson 1934, one-sided)."""
    from scipy.special import betaincinv

    return float(betaincinv(n_wrong + 1, n - n_wrong, params.confidence_level)) if n_wrong < n else 1.0


def _at_threshold(
    scores: NDArray[np.float64],
    is_wrong: NDArray[np.bool_],
    groups: NDArray[np.int64],
    threshold: float,
    params: EvaluateParams,
) -> dict[str, Any]:
    is_kept = scores >= threshold
    any_kept = bool(is_kept.any())
    return {
        "kept": float(is_kept.mean()),
        "accuracy": float((~is_wrong[is_kept]).mean()) if any_kept else None,
        "accuracy_interval": mean_interval(~is_wrong[is_kept], groups[is_kept], params) if any_kept else None,
        "n_referred": int((~is_kept).sum()),
        "n_wrong_kept": int(is_wrong[is_kept].sum()),
    }


def _area(
    scores: NDArray[np.float64], is_wrong: NDArray[np.bool_], groups: NDArray[np.int64], params: EvaluateParams
) -> dict[str, Any]:
    """Area under the risk-coverage curve: the mean over images of the risk if images at least as sure are kept.

    Images of equal score stand or fall together, so their order changes nothing (Ding et al. 2020).
    """
    order = np.lexsort((groups, is_wrong, -scores))
    codes, group_of = np.unique(groups[order], return_inverse=True)
    last_of_score = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    wrong = is_wrong[order].astype(float)

    def areas(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        kept = np.cumsum(weights, axis=1)[:, last_of_score]
        errors = np.cumsum(weights * wrong, axis=1)[:, last_of_score]
        risk = np.divide(errors, kept, out=np.zeros_like(kept), where=kept > 0)
        share = np.diff(kept, axis=1, prepend=0) / kept[:, -1:]
        area: NDArray[np.float64] = (risk * share).sum(axis=1)
        return area

    draws = resample_groups(len(codes), params)[:, group_of].astype(float)
    return {
        "aurc": float(areas(np.ones((1, len(order))))[0]),
        "aurc_interval": percentile_interval(areas(draws), params) if len(codes) > 1 else [0.0, 1.0],
    }


def _curve(scores: NDArray[np.float64], is_wrong: NDArray[np.bool_]) -> list[dict[str, float]]:
    order = np.argsort(-scores, kind="stable")
    last_of_score = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    errors = np.cumsum(is_wrong[order])
    wanted = np.arange(1, CURVE_POINTS + 1) * len(order) / CURVE_POINTS - 1
    ends = np.unique(last_of_score[np.searchsorted(last_of_score, np.ceil(wanted))])
    return [
        {
            "kept": float((end + 1) / len(order)),
            "accuracy": float(1 - errors[end] / (end + 1)),
            "threshold": float(scores[order[end]]),
        }
        for end in ends
    ]


def _remark(
    chosen: dict[str, Any] | None,
    first: dict[str, Any] | None,
    test: dict[str, Any] | None,
    n_needed: int,
    params: EvaluateParams,
) -> str:
    limit = _percent(params.triage_max_error)
    if chosen is None or test is None:
        reason = (
            f"fewer than the {n_needed} groups of calibration images are there that this needs"
            if first is None
            else f"at {first['threshold']:g}, the strictest that keeps enough calibration images to tell, it may be "
            f"{_percent(first['error_bound'])}"
        )
        return f"The error among kept images can't be shown to stay within {limit}: {reason}. Refer every image."
    promise = (
        f"Refer images whose top probability is below {chosen['threshold']:g}: of the others at most {limit} are "
        f"wrong, in {_percent(params.confidence_level)} of calibrations and for images from where the calibration "
        "images come from."
    )
    if test["accuracy"] is None:
        return f"{promise} None of the test images is kept."
    if breaks_promise(test, params.triage_max_error):
        return (
            f"{promise} The test images break this: {_percent(1 - test['accuracy'])} of the kept ones are wrong; "
            "don't rely on the threshold for images like them."
        )
    return promise


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
