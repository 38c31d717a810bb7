"""Sets of classes that hold the true one as often as promised, instead of one class that may be wrong."""

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.evidence.bootstrap import mean_interval, one_of_each_group
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams

METHOD = "least ambiguous sets (LAC), conformalized for each class"


def measure_conformal(
    calibration_truth: NDArray[np.int64],
    calibration_probabilities: NDArray[np.float64],
    calibration_groups: NDArray[np.int64],
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.int64],
    params: EvaluateParams,
) -> dict[str, Any]:
    """Coverage and size of the prediction sets of the test images.

    Keys: confidence; method; n_calibration: groups of calibration images; n_needed: groups that each class needs;
    coverage, coverage_interval, mean_size, single and single_correct (share of the sets with one class, and of these
    the right ones), n_filled: sets that held no class and got the most probable one; sizes {"1": n, ..., "4": n};
    per_class {name: {n, n_calibration, coverage, coverage_interval, low_by_chance, mean_size}}, where low_by_chance is
    the lowest coverage that so small a calibration gives by chance; reaches_confidence: no interval, of all or of a
    class, lies below the promise; remark. Where a class has too few calibration images no promise is made: coverage to
    n_filled are None, sizes and per_class {}, reaches_confidence False, and the remark says why.

    Each class has a quantile of its own (Sadinle, Lei & Wasserman 2019), so that the promise holds for every class: on
    real images, one quantile for all covers 90 %, but meningiomas 75 %. Adaptive scores (APS, RAPS) cover 95 % and more
    with larger sets, and draw at random. One image of each group calibrates, see `one_of_each_group`. That the
    temperature was fitted on the same rows is neglected: it is one number.
    """
    confidence = params.conformal_confidence
    n_needed = math.floor(1 / (1 - confidence)) + 1
    rows = _calibration_rows(calibration_truth, calibration_probabilities, calibration_groups, params)
    known = {
        "confidence": confidence,
        "method": METHOD,
        "n_calibration": len(np.unique(calibration_groups)),
        "n_needed": n_needed,
    }
    lacking = [
        f"{name} ({len(of_class)})"
        for name, of_class in zip(CLASS_NAMES, rows, strict=True)
        if len(of_class) < n_needed
    ]
    if lacking:
        return known | _refused(
            f"A promise of {_percent(confidence)} for each class needs {n_needed} groups of calibration "
            f"images in each, and there are too few of {', '.join(lacking)}. Raise split.calibration_fraction."
        )
    sets = np.column_stack(
        [
            _has_class(index, _normalised(calibration_probabilities[of_class]), _normalised(probabilities), confidence)
            for index, of_class in enumerate(rows)
        ]
    )
    is_empty = ~sets.any(axis=1)
    sets[is_empty, probabilities[is_empty].argmax(axis=1)] = True
    found = _measured(sets, [len(of_class) for of_class in rows], truth, groups, params)
    return known | found | {"n_filled": int(is_empty.sum()), "remark": _remark(found, confidence)}


def _calibration_rows(
    truth: NDArray[np.int64], probabilities: NDArray[np.float64], groups: NDArray[np.int64], params: EvaluateParams
) -> list[NDArray[np.int64]]:
    """Indices of the rows that calibrate each class."""
    rows = []
    for index in range(len(CLASS_NAMES)):
        of_class = np.flatnonzero(truth == index)
        rows.append(of_class[one_of_each_group(probabilities[of_class], groups[of_class], params)])
    return rows


def _has_class(
    index: int, calibration: NDArray[np.float64], probabilities: NDArray[np.float64], confidence: float
) -> NDArray[np.bool_]:
    """Whether the set of each row of `probabilities` holds class `index`, whose images gave `calibration`."""
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """A classifier whose images are their probabilities already."""

        def __init__(self) -> None:
            self.classes_ = np.arange(len(CLASS_NAMES))

        def fit(self, rows: NDArray[np.float64], truth: NDArray[np.int64]) -> "Given":
            return self

        def predict_proba(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
            return rows

        def predict(self, rows: NDArray[np.float64]) -> NDArray[np.int64]:
            return rows.argmax(axis=1)

    conformal = SplitConformalClassifier(Given(), confidence_level=confidence, conformity_score="lac", prefit=True)
    with warnings.catch_warnings():
        # That only one class stands in the calibration rows is meant so.
        warnings.simplefilter("ignore")
        conformal.conformalize(calibration, np.full(len(calibration), index))
        held: NDArray[np.bool_] = conformal.predict_set(probabilities)[1][:, index, 0]
    return held


def _measured(
    sets: NDArray[np.bool_],
    n_calibration: list[int],
    truth: NDArray[np.int64],
    groups: NDArray[np.int64],
    params: EvaluateParams,
) -> dict[str, Any]:
    is_covered, size = sets[np.arange(len(truth)), truth], sets.sum(axis=1)
    is_single = size == 1
    per_class: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(CLASS_NAMES):
        of_class = truth == index
        per_class[name] = {
            "n": int(of_class.sum()),
            "n_calibration": n_calibration[index],
            **_coverage(is_covered[of_class], groups[of_class], params),
            "low_by_chance": _low_by_chance(n_calibration[index], params),
            "mean_size": float(size[of_class].mean()) if of_class.any() else None,
        }
    overall = _coverage(is_covered, groups, params)
    intervals = [one["coverage_interval"] for one in (overall, *per_class.values()) if one["coverage_interval"]]
    return {
        **overall,
        "mean_size": float(size.mean()),
        "single": float(is_single.mean()),
        "single_correct": float(is_covered[is_single].mean()) if is_single.any() else None,
        "sizes": {str(count): int((size == count).sum()) for count in range(1, len(CLASS_NAMES) + 1)},
        "per_class": per_class,
        "reaches_confidence": all(high >= params.conformal_confidence for _, high in intervals),
    }


def _coverage(is_covered: NDArray[np.bool_], groups: NDArray[np.int64], params: EvaluateParams) -> dict[str, Any]:
    if not len(is_covered):
        return {"coverage": None, "coverage_interval": None}
    return {"coverage": float(is_covered.mean()), "coverage_interval": mean_interval(is_covered, groups, params)}


def _low_by_chance(n_calibration: int, params: EvaluateParams) -> float:
    """Over calibrations, the coverage that one gives is Beta distributed (Vovk 2012; Angelopoulos & Bates 2021)."""
    from scipy.stats import beta

    rank = math.ceil((n_calibration + 1) * params.conformal_confidence)
    return float(beta.ppf((1 - params.confidence_level) / 2, rank, n_calibration + 1 - rank))


def _refused(reason: str) -> dict[str, Any]:
    figures = ("coverage", "coverage_interval", "mean_size", "single", "single_correct", "n_filled")
    return {
        **dict.fromkeys(figures),
        "sizes": {},
        "per_class": {},
        "reaches_confidence": False,
        "remark": reason,
    }


def _remark(found: dict[str, Any], confidence: float) -> str:
    promise = (
        f"The promise of {_percent(confidence)} for each class is an average over calibrations of this size, for "
        "images from where the calibration images come from. A declared test folder (protocols 'official' and "
        "'declared') is another source: there it may fail."
    )
    if found["reaches_confidence"]:
        return promise
    below = {
        name: one for name, one in found["per_class"].items() if one["n"] and one["coverage_interval"][1] < confidence
    }
    shares = [f"{name} {_percent(one['coverage'])}" for name, one in below.items()]
    is_unlike = any(one["coverage_interval"][1] < one["low_by_chance"] for one in below.values())
    reason = (
        "more than so few calibration images explain: the test images are unlike them"
        if is_unlike
        else "which so few calibration images may explain"
    )
    what = f"for {', '.join(shares)}" if shares else f"over all images ({_percent(found['coverage'])})"
    return f"The sets hold the true class less often than promised {what}, {reason}. {promise}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _normalised(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    # MAPIE wants rows that sum to 1 more exactly than 32-bit floats do.
    return probabilities / probabilities.sum(axis=1, keepdims=True)
