"""Predictions as a table: what a model says of each image, beside what is known of it."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES

PROBABILITY_COLUMNS = tuple(f"probability_{name}" for name in CLASS_NAMES)
PREDICTION_COLUMNS = ("path", "label", "group", "predicted", *PROBABILITY_COLUMNS)
OOD_COLUMN = "ood_score"
# What the split knows of a test image: whether a copy of it was used in training, or stands in the declared training
# folder, and what two classifiers that know nothing of tumours say.
SPLIT_COLUMNS = ("is_leaked", "is_declared_copy", "neighbour_label", "statistics_label")
OOD_SCORE_COLUMNS = ("kind", OOD_COLUMN)
_NUMBERS = {*PROBABILITY_COLUMNS, OOD_COLUMN}
_CLAIMS = {"is_leaked", "is_declared_copy"}
_COLUMN_TYPES: dict[str, type] = {
    name: float if name in _NUMBERS else bool if name in _CLAIMS else str
    for name in (*PREDICTION_COLUMNS, *SPLIT_COLUMNS, *OOD_SCORE_COLUMNS)
}


def make_predictions(
    rows: pd.DataFrame, probabilities: NDArray[np.float32], ood_scores: NDArray[np.float32] | None = None
) -> pd.DataFrame:
    """Rows of predictions.csv for rows with path, label, group, probabilities (n, 4) and scores (n,)."""
    predicted = np.asarray(CLASS_NAMES)[probabilities.argmax(axis=1)]
    columns = {name: probabilities[:, index].astype(float) for index, name in enumerate(PROBABILITY_COLUMNS)}
    if ood_scores is not None:
        columns[OOD_COLUMN] = ood_scores.astype(float)
    return rows[["path", "label", "group"]].reset_index(drop=True).assign(predicted=predicted, **columns)


def write_table(rows: pd.DataFrame, path: Path) -> None:
    """The rows stand in a CSV with nine digits, which hold a 32-bit float exactly."""
    rows.to_csv(path, index=False, float_format="%.9g", lineterminator="\n")


def read_predictions(path: Path, made_by: str = "braintumor evaluate") -> pd.DataFrame:
    """The rows of predictions.csv, calibration.csv or ood_scores.csv, names as text and scores as numbers."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run '{made_by}' first")
    try:
        return pd.read_csv(path, dtype=_COLUMN_TYPES, keep_default_na=False, float_precision="round_trip")
    except ValueError as error:
        raise UserError(f"{path} is not a table of predictions ({error}); run '{made_by}' again") from error
