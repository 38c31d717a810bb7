import numpy as np
import pandas as pd
import pytest

from braintumor.evidence.shortcut import measure_shortcut
from braintumor.evidence.statistics_floor import STATISTICS, statistics_floor
from braintumor.labels import CLASS_NAMES
from braintumor.params import Params

CLASSES = np.array(CLASS_NAMES)


def manifest(seed: int, told_by: str, n: int = 300, spread: float = 1.0) -> pd.DataFrame:
    """Rows of a manifest of several sources: one statistic tells the class as far as it exceeds the noise."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 4, n)
    statistics = {name: random.normal(0, 1, n) for name in STATISTICS}
    statistics[told_by] = statistics[told_by] + spread * truth
    groups = [f"g{seed}-{index:04d}" for index in range(n)]
    return pd.DataFrame({"label": CLASSES[truth], "group": groups, **statistics})


def scored(rows: pd.DataFrame, statistics_label: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    return rows[["label", "group"]].assign(statistics_label=statistics_label, predicted=predicted)


def honest(rows: pd.DataFrame, accuracy: float) -> np.ndarray:
    random = np.random.default_rng(9)
    wrong = CLASSES[random.integers(0, 4, len(rows))]
    return np.where(random.random(len(rows)) < accuracy, rows["label"], wrong)


@pytest.mark.parametrize("told_by", ["border_mean", "sharpness"])
def test_a_model_that_goes_by_what_the_statistics_tell_is_exposed(params: Params, told_by: str) -> None:
    train, test = manifest(1, told_by, spread=2.5), manifest(2, told_by, spread=2.5)
    floor = statistics_floor(train, test, seed=0)
    assert np.mean(floor.labels == test["label"]) > 0.7
    found = measure_shortcut(scored(test, floor.labels, floor.labels), floor.importances, params.evaluate)
    assert "is not clearly above what nine statistics of the image reach" in found["warning"]
    assert found["share_of_gain"] == 1
    assert found["over_statistics"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert found["where_statistics_fail"]["accuracy"] == 0
    assert max(found["importances"], key=lambda name: found["importances"][name]) == told_by
    assert found["importances"][told_by] > 0.3


def test_a_model_that_is_only_somewhat_better_is_exposed(params: Params) -> None:
    train, test = manifest(1, "mean", 600, spread=2.5), manifest(2, "mean", 600, spread=2.5)
    floor = statistics_floor(train, test, seed=0)
    found = measure_shortcut(scored(test, floor.labels, honest(test, 0.95)), floor.importances, params.evaluate)
    assert found["over_statistics"]["interval"][0] > 0
    assert 0.5 < found["share_of_gain"] < 1
    assert "of what the model gains over guessing" in found["warning"]


def test_an_honest_model_where_statistics_tell_little_gets_no_warning(params: Params) -> None:
    train, test = manifest(1, "mean", spread=0.3), manifest(2, "mean", spread=0.3)
    floor = statistics_floor(train, test, seed=0)
    found = measure_shortcut(scored(test, floor.labels, honest(test, 0.95)), floor.importances, params.evaluate)
    assert found["warning"] is None
    assert found["where_statistics_fail"]["accuracy"] > 0.9
    assert found["chance"] == pytest.approx(test["label"].value_counts(normalize=True).max())


def test_a_model_at_chance_has_no_gain_to_explain(params: Params) -> None:
    test = manifest(2, "mean")
    guessed = np.full(len(test), test["label"].mode()[0])
    found = measure_shortcut(scored(test, guessed, guessed), dict.fromkeys(STATISTICS, 0.0), params.evaluate)
    assert found["share_of_gain"] is None
    assert "no better than naming the largest class every time" in found["warning"]
    # So is one that is worse, and above the statistics.
    statistics = np.asarray(CLASSES)[(test["label"].map(CLASS_NAMES.index) + 1) % 4]
    mostly_wrong = np.where(np.arange(len(test)) % 5 == 0, test["label"], statistics)
    found = measure_shortcut(scored(test, statistics, mostly_wrong), dict.fromkeys(STATISTICS, 0.0), params.evaluate)
    assert found["over_statistics"]["interval"][0] > 0
    assert "no better than naming the largest class every time" in found["warning"]


def test_statistics_that_are_never_wrong_leave_nothing_to_compare_on(params: Params) -> None:
    test = manifest(2, "mean")
    found = measure_shortcut(
        scored(test, test["label"].to_numpy(), honest(test, 0.9)), dict.fromkeys(STATISTICS, 0.1), params.evaluate
    )
    assert found["where_statistics_fail"] == {"n": 0, "n_groups": 0, "accuracy": None, "accuracy_interval": None}


def test_order_of_the_rows_changes_nothing(params: Params) -> None:
    test = manifest(2, "mean")
    rows = scored(test, honest(test, 0.5), honest(test, 0.9))
    rows["group"] = rows["group"].str[:-1]
    importances = dict.fromkeys(STATISTICS, 0.1)
    found = measure_shortcut(rows, importances, params.evaluate)
    for seed in range(3):
        assert measure_shortcut(rows.sample(frac=1, random_state=seed), importances, params.evaluate) == found
