"""How much of what a model can do needs no picture: the nine statistics of how an image was made against the model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from braintumor.evidence.bootstrap import mean_interval
from braintumor.evidence.statistics_floor import STATISTICS
from braintumor.params import EvaluateParams

# The statistics explain most of what a model gains over guessing above it.
MAX_SHARE_OF_GAIN = 0.5


def measure_shortcut(rows: pd.DataFrame, importances: Mapping[str, float], params: EvaluateParams) -> dict[str, Any]:
    """The statistics' accuracy against the model's on the test images, with a warning; rows in any order.

    `rows` hold label, predicted, group (str) and statistics_label; `importances` are those in split.json. Returns
      statistics: the names of the nine; importances: {name: accuracy that is lost without it};
      accuracy: of the statistics; chance: the share of the largest class, which guessing reaches;
      share_of_gain: of what the model gains over chance, how much the statistics gain; None for a model at chance;
      over_statistics: {difference, interval} of the accuracies of model and statistics;
      where_statistics_fail: {n, n_groups, accuracy, accuracy_interval} of the model on the images that the statistics
        sort wrongly: close to its accuracy elsewhere if it goes by what is shown, close to 0 if it goes by these;
      warning: a sentence, or None.
    """
    groups = pd.factorize(rows["group"], sort=True)[0]
    is_right = (rows["predicted"] == rows["label"]).to_numpy(bool)
    is_floor_right = (rows["statistics_label"] == rows["label"]).to_numpy(bool)
    accuracy, floor = float(is_right.mean()), float(is_floor_right.mean())
    chance = float(rows["label"].value_counts(normalize=True).max())
    gain = is_right.astype(float) - is_floor_right
    interval = mean_interval(gain, groups, params, is_share=False)
    share_of_gain = (floor - chance) / (accuracy - chance) if accuracy > chance else None
    failed, groups_failed = is_right[~is_floor_right], groups[~is_floor_right]
    return {
        "statistics": list(STATISTICS),
        "importances": {name: float(importances[name]) for name in STATISTICS},
        "accuracy": floor,
        "chance": chance,
        "share_of_gain": share_of_gain,
        "over_statistics": {"difference": float(gain.mean()), "interval": interval},
        "where_statistics_fail": {
            "n": len(failed),
            "n_groups": len(np.unique(groups_failed)),
            "accuracy": float(failed.mean()) if len(failed) else None,
            "accuracy_interval": mean_interval(failed, groups_failed, params) if len(failed) else None,
        },
        "warning": _warning(accuracy, floor, chance, share_of_gain, interval),
    }


def _warning(
    accuracy: float, floor: float, chance: float, share_of_gain: float | None, over: list[float]
) -> str | None:
    if share_of_gain is None:
        return (
            f"the model, at {accuracy:.1%}, is no better than naming the largest class every time, at {chance:.1%}: it "
            "gains nothing that a shortcut could explain"
        )
    if over[0] <= 0:
        return (
            f"the model, at {accuracy:.1%}, is not clearly above what nine statistics of the image reach, {floor:.1%}: "
            "it may have learned where images come from rather than what they show"
        )
    if share_of_gain > MAX_SHARE_OF_GAIN:
        return (
            f"nine statistics of the image alone reach {floor:.1%}, {share_of_gain:.0%} of what the model gains over "
            "guessing: sources and classes go together in this data set, and the model may have learned the sources"
        )
    return None
