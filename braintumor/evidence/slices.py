"""Figures apart for images of one kind: by mode, size, banner, frame, border, brightness, plane and patient.

A model that is good on the whole may fail on the images of one scanner, and nobody sees it in the whole.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.data.patients import is_known
from braintumor.evidence.bootstrap import mean_interval, shares_of_parts
from braintumor.evidence.calibration import expected_calibration_error
from braintumor.evidence.predictions import PROBABILITY_COLUMNS
from braintumor.labels import CLASS_NAMES, NO_TUMOUR, PLANE, PLANES
from braintumor.params import EvaluateParams, ValidateParams

UNKNOWN = "unknown"
# What each fact is, for whoever reads the report.
FACTS = {
    "mode": "colour mode of the file",
    "size": "width and height in pixels",
    "banner": "a coloured banner near the edge",
    "white_frame": "a white row or column near the edge",
    "edge_filtered": "sharpened until noise shows",
    "brightness": "quarter of the data set by mean intensity",
    "border": "quarter of the data set by the intensity of the border",
    PLANE: "the plane of the slice",
    "patient": "whether the patient is known",
}
COMMON_SIZES = 4
QUARTERS = ("1 darkest", "2 dark", "3 bright", "4 brightest")
# Slices of fewer are shown, but nothing is said of them.
MIN_GROUPS = 20


def facts_of(manifest: pd.DataFrame, groups: pd.DataFrame, params: ValidateParams) -> pd.DataFrame:
    """The facts of each image as text: path and the columns FACTS, one row a row of the manifest.

    `manifest` should be the whole one, which the quarters and the common sizes are of. `groups` are the rows of the
    data set's groups.csv; its column plane is optional.
    """
    limits = params.odd_images
    sizes = [f"{width} x {height}" for width, height in zip(manifest["width"], manifest["height"], strict=True)]
    common = pd.Series(sizes).value_counts().sort_index().sort_values(ascending=False, kind="stable").index
    stated = groups[PLANE].str.strip().str.lower() if PLANE in groups else pd.Series(UNKNOWN, index=groups.index)
    planes = dict(zip(groups["path"], stated.where(stated.isin(PLANES), UNKNOWN), strict=True))
    return pd.DataFrame(
        {
            "path": manifest["path"].to_numpy(),
            "mode": manifest["mode"].fillna(UNKNOWN).to_numpy(),
            "size": [size if size in set(common[:COMMON_SIZES]) else "other" for size in sizes],
            "banner": _yes_or_no(manifest["coloured_line"] > limits.max_coloured_line),
            "white_frame": _yes_or_no(manifest["white_line"] > limits.max_white_line),
            "edge_filtered": _yes_or_no(manifest["sharpness"] > limits.max_sharpness),
            "brightness": _quarters(manifest["mean"]),
            "border": _quarters(manifest["border_mean"]),
            PLANE: [planes.get(path, UNKNOWN) for path in manifest["path"]],
            "patient": np.where(manifest["patient"].map(is_known_patient), "known", UNKNOWN),
        }
    )


def measure_slices(rows: pd.DataFrame, params: EvaluateParams) -> list[dict[str, Any]]:
    """One dict a slice, those of one fact together; the rows may come in any order.

    `rows` hold path, label, predicted, group (str), probability_* and any of the columns FACTS as text. A fact that is
    the same for all rows makes no slice. Each dict holds fact, value, label (None, or the class that the slice is
    narrowed to), told (a phrase), n, n_groups, accuracy, accuracy_interval, macro_recall, tumour_sensitivity,
    tumour_specificity, mean_confidence, ece and stands_out; a figure that the slice's classes leave undefined is None.

    A slice stands out if its accuracy lies below that of the rest, and so does the whole interval of the difference
    over resampled groups, at a level that is shared among all slices compared (Bonferroni), so that in a model without
    a weakness one of all the slices stands out in at most 1 - confidence_level of evaluations. Slices of one class are
    compared with the rest of that class, and listed only where they stand out. Slices, or rests, of fewer than
    20 groups never do.
    """
    rows = rows.sort_values("path", ignore_index=True)
    rows = rows.assign(
        group=pd.factorize(rows["group"], sort=True)[0],
        is_right=rows["predicted"] == rows["label"],
        confidence=rows[list(PROBABILITY_COLUMNS)].max(axis=1),
    )
    slices = _slices(rows)
    standing_out = _standing_out(rows, slices, params)
    return [
        _figures(rows, one, stands_out, params)
        for one, stands_out in zip(slices, standing_out, strict=True)
        if stands_out or one.label is None
    ]


@dataclass(frozen=True)
class _Slice:
    fact: str
    value: str
    label: str | None
    is_in: NDArray[np.bool_]
    is_rest: NDArray[np.bool_]


def is_known_patient(patient: object) -> bool:
    """Whether the manifest names a patient, rather than nobody or slices that seem to be of one."""
    return isinstance(patient, str) and is_known(patient)


def _yes_or_no(holds: "pd.Series[bool]") -> NDArray[np.str_]:
    return np.where(holds.fillna(False).to_numpy(bool), "yes", "no")


def _quarters(values: "pd.Series[float]") -> list[str]:
    edges = values.quantile([0.25, 0.5, 0.75]).to_numpy(float)
    # An image that can't be decoded has no intensity.
    return [UNKNOWN if np.isnan(value) else QUARTERS[np.searchsorted(edges, value)] for value in values.to_numpy(float)]


def _slices(rows: pd.DataFrame) -> list[_Slice]:
    slices = []
    everything = np.ones(len(rows), bool)
    for fact in FACTS:
        if fact not in rows or rows[fact].nunique() < 2:
            continue
        for value in sorted(rows[fact].unique()):
            has_value = (rows[fact] == value).to_numpy(bool)
            for label in (None, *CLASS_NAMES):
                of_class = everything if label is None else (rows["label"] == label).to_numpy(bool)
                slices.append(_Slice(fact, value, label, has_value & of_class, ~has_value & of_class))
    return slices


def _standing_out(rows: pd.DataFrame, slices: list[_Slice], params: EvaluateParams) -> list[bool]:
    from scipy.stats import norm

    groups, is_right = rows["group"].to_numpy(np.int64), rows["is_right"].to_numpy(bool)
    judged = [_is_large(one.is_in, groups) and _is_large(one.is_rest, groups) for one in slices]
    if not any(judged):
        return judged
    compared = [one for one, is_judged in zip(slices, judged, strict=True) if is_judged]
    parts = np.column_stack([one.is_in for one in compared] + [one.is_rest for one in compared])
    shares, resampled = shares_of_parts(is_right, parts, groups, params)
    (inside, outside), n = np.split(shares, 2), len(compared)
    spread = np.nanstd(resampled[:, :n] - resampled[:, n:], axis=0)
    # Resamples of a share near 0 or 1 have next to no spread.
    least = np.hypot(*np.split(_spread_of_groups(shares, parts, groups), 2))
    limit = norm.ppf(1 - (1 - params.confidence_level) / 2 / n)
    verdicts = iter((inside - outside + limit * np.maximum(spread, least) < 0).tolist())
    return [is_judged and next(verdicts) for is_judged in judged]


def _is_large(is_in: NDArray[np.bool_], groups: NDArray[np.int64]) -> bool:
    return len(np.unique(groups[is_in])) >= MIN_GROUPS


def _spread_of_groups(
    shares: NDArray[np.float64], parts: NDArray[np.bool_], groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The standard error of each part's share if each group were one image (Agresti & Coull 1998)."""
    n_groups = np.array([len(np.unique(groups[is_in])) for is_in in parts.T])
    pulled = (shares * n_groups + 2) / (n_groups + 4)
    return np.asarray(np.sqrt(pulled * (1 - pulled) / (n_groups + 4)), float)


def _figures(rows: pd.DataFrame, one: _Slice, stands_out: bool, params: EvaluateParams) -> dict[str, Any]:
    inside = rows[one.is_in]
    is_right, is_tumour = inside["is_right"], inside["label"] != NO_TUMOUR
    recalls = is_right.groupby(inside["label"]).mean()
    found = inside["predicted"] != NO_TUMOUR
    return {
        "fact": one.fact,
        "value": one.value,
        "label": one.label,
        "told": _told(one),
        "n": len(inside),
        "n_groups": int(inside["group"].nunique()),
        "accuracy": float(is_right.mean()),
        "accuracy_interval": mean_interval(is_right, inside["group"], params),
        "macro_recall": float(recalls[list(CLASS_NAMES)].mean()) if len(recalls) == len(CLASS_NAMES) else None,
        "tumour_sensitivity": float(found[is_tumour].mean()) if is_tumour.any() else None,
        "tumour_specificity": float((~found[~is_tumour]).mean()) if not is_tumour.all() else None,
        "mean_confidence": float(inside["confidence"].mean()),
        "ece": expected_calibration_error(inside["confidence"].to_numpy(float), is_right.to_numpy(bool)),
        "stands_out": stands_out,
    }


def _told(one: _Slice) -> str:
    told = f"{FACTS[one.fact]}: {one.value}"
    return told if one.label is None else f"{told}; {one.label} alone"
