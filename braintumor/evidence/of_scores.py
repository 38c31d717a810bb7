"""The sections of the evidence that follow from predictions and scores alone, for whoever makes or checks them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.evidence.calibration import measure_calibration
from braintumor.evidence.conformal import measure_conformal
from braintumor.evidence.leakage import measure_leakage_of_scores
from braintumor.evidence.predictions import OOD_COLUMN, PROBABILITY_COLUMNS
from braintumor.evidence.shift import measure_ood
from braintumor.evidence.shortcut import measure_shortcut
from braintumor.evidence.triage import measure_triage
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams


def sections_of_scores(
    predictions: pd.DataFrame,
    ood_scores: pd.DataFrame,
    told: Mapping[str, str],
    calibration: pd.DataFrame,
    temperature: float,
    importances: Mapping[str, float],
    params: EvaluateParams,
) -> dict[str, Any]:
    """Sections by name; the rows are those of predictions.csv, ood_scores.csv and calibration.csv.

    `told` says of each kind in `ood_scores` what its images are, `importances` are those in split.json.
    """
    of_test, of_calibration = arrays(predictions), arrays(calibration)
    by_kind = {str(kind): rows[OOD_COLUMN].to_numpy(float) for kind, rows in ood_scores.groupby("kind")}
    return {
        "calibration": measure_calibration(*of_test, temperature, params),
        "conformal": measure_conformal(*of_calibration, *of_test, params),
        "triage": measure_triage(*of_calibration, *of_test, params),
        "leakage": measure_leakage_of_scores(predictions, params),
        "shortcut": measure_shortcut(predictions, importances, params),
        "ood": measure_ood(predictions[OOD_COLUMN].to_numpy(float), by_kind, told),
    }


def arrays(rows: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """True classes (n,), probabilities (n, 4) and groups (n,) of rows of predictions."""
    truth = rows["label"].map(CLASS_NAMES.index).to_numpy(np.int64)
    groups = pd.factorize(rows["group"], sort=True)[0].astype(np.int64)
    return truth, rows[list(PROBABILITY_COLUMNS)].to_numpy(float), groups
