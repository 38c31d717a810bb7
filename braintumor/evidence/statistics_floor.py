"""The shortcut that needs no picture: how far brightness, contrast and the border of an image alone tell its class."""

import numpy as np
import pandas as pd

from braintumor.errors import UserError

# Columns of the manifest that say how an image was made rather than what it shows.
INTENSITY_STATISTICS = ("mean", "std", "p01", "p50", "p99", "border_mean")
N_TREES = 200


def statistics_accuracy(train: pd.DataFrame, test: pd.DataFrame, seed: int) -> float:
    """Share of `test` that a random forest on the intensity statistics of `train` sorts rightly.

    Both are rows of the manifest with their `label`. In sets merged from several sources the sources differ in these
    numbers, and each class comes from few of them: a high value says that a model may have learned the source.
    """
    from sklearn.ensemble import RandomForestClassifier

    if train.empty or test.empty:
        raise UserError("the statistics floor needs training and test images; one side of the split is empty")
    columns = list(INTENSITY_STATISTICS)
    forest = RandomForestClassifier(N_TREES, random_state=seed, n_jobs=-1)
    forest.fit(train[columns].to_numpy(float), train["label"].to_numpy(str))
    return float(np.mean(forest.predict(test[columns].to_numpy(float)) == test["label"].to_numpy(str)))
