"""Where the model was wrong and sure of it, and where perhaps the label is what is wrong."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from braintumor.evidence.predictions import PROBABILITY_COLUMNS
from braintumor.labels import CLASS_NAMES

LABEL_ERROR_COLUMNS = ("path", "label", "new_label", "suggested", "quality", "confidence", "group")
SHOWN = 20
# Of the images that have less of their own class's probability than others, as many as there are confident confusions
# of classes (Northcutt et al. 2021). Of cleanlab's ways it named the fewest right labels.
FILTER = "low_self_confidence"


def find_label_errors(held_out: pd.DataFrame) -> pd.DataFrame:
    """The images whose label is likely wrong, worst first and copies together; none is an empty table.

    `held_out` holds path, label, group (str) and probability_* of images that the model was not trained on: what it
    was trained on it repeats. Returns path, label, new_label (empty: an annotator writes a class or 'remove', and
    `braintumor data relabel` takes the table back), suggested (the class that the model sees), quality (of the label:
    0 bad, 1 good), confidence (the probability of the suggestion) and group.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    rows = held_out.sort_values("path", ignore_index=True)
    labels = rows["label"].map(CLASS_NAMES.index).to_numpy(np.int64)
    probabilities = rows[list(PROBABILITY_COLUMNS)].to_numpy(float)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    is_error = find_label_issues(labels, probabilities, filter_by=FILTER, n_jobs=1)
    is_error &= probabilities.argmax(axis=1) != labels
    errors = pd.DataFrame(
        {
            "path": rows["path"],
            "label": rows["label"],
            "new_label": "",
            "suggested": np.asarray(CLASS_NAMES)[probabilities.argmax(axis=1)],
            "quality": get_label_quality_scores(labels, probabilities),
            "confidence": probabilities.max(axis=1),
            "group": rows["group"],
        }
    )[is_error]
    worst = errors.groupby("group")["quality"].transform("min")
    return errors.assign(worst=worst).sort_values(["worst", "group", "quality", "path"], ignore_index=True)[
        list(LABEL_ERROR_COLUMNS)
    ]


def measure_mistakes(
    test: pd.DataFrame, label_errors: pd.DataFrame, n_checked: int, shown_names: Mapping[str, str]
) -> dict[str, Any]:
    """The most confident mistakes among the test images and the likely label errors; rows in any order.

    `test` holds path, label, predicted and probability_*; `label_errors` is what `find_label_errors` found among
    `n_checked` images; `shown_names` gives the name under which each image may be named. Returns
      n_wrong; confident: up to 20 of {path, label, predicted, confidence}, the most confident first;
      n_label_errors, n_checked; label_errors: the first 20 of {path, label, suggested, quality}.
    """
    wrong = test[test["label"] != test["predicted"]]
    wrong = wrong.assign(confidence=wrong[list(PROBABILITY_COLUMNS)].max(axis=1))
    confident = wrong.sort_values(["confidence", "path"], ascending=[False, True]).head(SHOWN)
    columns = ["path", "label", "suggested", "quality"]
    return {
        "n_wrong": len(wrong),
        "confident": _records(confident[["path", "label", "predicted", "confidence"]], shown_names),
        "n_label_errors": len(label_errors),
        "n_checked": n_checked,
        "label_errors": _records(label_errors[columns].head(SHOWN), shown_names),
    }


def _records(rows: pd.DataFrame, shown_names: Mapping[str, str]) -> list[dict[str, Any]]:
    named = rows.assign(path=[shown_names[path] for path in rows["path"]])
    return [{str(key): value for key, value in row.items()} for row in named.to_dict("records")]
