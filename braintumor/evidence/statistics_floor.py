"""The shortcut that needs no picture: how far nine numbers of how an image was made alone tell its class."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.errors import UserError

# Columns of the manifest that say how an image was made rather than what it shows: brightness, contrast, border,
# banners, white frames and sharpening.
STATISTICS = ("mean", "std", "p01", "p50", "p99", "border_mean", "coloured_line", "white_line", "sharpness")
N_TREES = 200
N_PERMUTATIONS = 5


@dataclass(frozen=True)
class StatisticsFloor:
    """What the statistics say of each test image, and which of them say it."""

    labels: NDArray[np.str_]  # (n_test,)
    importances: dict[str, float]  # accuracy on the test images that is lost with each statistic


def statistics_floor(train: pd.DataFrame, test: pd.DataFrame, seed: int) -> StatisticsFloor:
    """The labels that a random forest on the statistics of `train` gives to `test`; both are rows of the manifest.

    In sets merged from several sources the sources differ in these numbers, and each class comes from few of them:
    labels that are mostly right say that a model may have learned the source. An importance is the mean loss of
    accuracy when the statistic's values change places among the test images (Breiman 2001); statistics that tell the
    same share theirs, and a statistic that tells nothing may be a little below 0.
    """
    from sklearn.ensemble import RandomForestClassifier

    if train.empty or test.empty:
        raise UserError("the statistics floor needs training and test images; one side of the split is empty")
    columns = list(STATISTICS)
    forest = RandomForestClassifier(N_TREES, random_state=seed, n_jobs=-1)
    forest.fit(train[columns].to_numpy(float), train["label"].to_numpy(str))
    # Threads add up the trees' votes in any order, and so break ties in any way.
    forest.set_params(n_jobs=1)
    values, truth = test[columns].to_numpy(float), test["label"].to_numpy(str)
    labels = forest.predict(values).astype(str)
    random = np.random.default_rng(seed)
    importances = {}
    for index, name in enumerate(STATISTICS):
        shuffled = np.tile(values, (N_PERMUTATIONS, 1))
        shuffled[:, index] = np.concatenate([random.permutation(values[:, index]) for _ in range(N_PERMUTATIONS)])
        is_right = forest.predict(shuffled) == np.tile(truth, N_PERMUTATIONS)
        importances[name] = float(np.mean(labels == truth) - np.mean(is_right))
    return StatisticsFloor(labels, importances)
