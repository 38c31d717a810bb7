import numpy as np
import pandas as pd
import pytest

from braintumor.errors import UserError
from braintumor.evidence.statistics_floor import STATISTICS, statistics_floor
from braintumor.labels import CLASS_NAMES


def images(seed: int, offset_of_class: float, n: int = 200) -> pd.DataFrame:
    """Rows of a manifest whose brightness tells the class as far as `offset_of_class` goes beyond the noise of 1."""
    random = np.random.default_rng(seed)
    labels = np.array(CLASS_NAMES)[random.integers(0, 4, n)]
    offsets = np.array([CLASS_NAMES.index(label) for label in labels]) * offset_of_class
    columns = {name: random.normal(0, 1, n) + offsets for name in STATISTICS}
    return pd.DataFrame({"label": labels, **columns})


def accuracy(train: pd.DataFrame, test: pd.DataFrame) -> float:
    return float(np.mean(statistics_floor(train, test, seed=0).labels == test["label"]))


def test_sources_that_differ_in_brightness_are_exposed_and_equal_ones_are_at_chance() -> None:
    assert accuracy(images(1, 8.0), images(2, 8.0)) > 0.95
    assert 0.1 < accuracy(images(1, 0.0), images(2, 0.0)) < 0.4


def test_a_statistic_is_as_important_as_what_it_alone_tells() -> None:
    train, test = images(1, 0.0), images(2, 0.0)
    for rows in (train, test):
        rows["white_line"] = rows["label"].map(CLASS_NAMES.index).astype(float)
    importances = statistics_floor(train, test, seed=0).importances
    assert tuple(importances) == STATISTICS
    # Of four equal classes, three in four images get another one's value.
    assert importances.pop("white_line") == pytest.approx(0.75, abs=0.08)
    assert max(abs(value) for value in importances.values()) < 0.05


def test_the_same_seed_gives_the_same_answers() -> None:
    train, test = images(1, 0.5), images(2, 0.5)
    first, second = (statistics_floor(train, test, seed=3) for _ in range(2))
    assert first.labels.tolist() == second.labels.tolist()
    assert first.importances == second.importances


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(UserError, match="one side of the split is empty"):
        statistics_floor(images(1, 1.0), images(2, 1.0).iloc[:0], seed=0)
