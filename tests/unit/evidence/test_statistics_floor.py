import numpy as np
import pandas as pd
import pytest

from braintumor.errors import UserError
from braintumor.evidence.statistics_floor import INTENSITY_STATISTICS, statistics_accuracy
from braintumor.labels import CLASS_NAMES


def images(seed: int, offset_of_class: float, n: int = 200) -> pd.DataFrame:
    """Rows of a manifest whose brightness tells the class as far as `offset_of_class` goes beyond the noise of 1."""
    random = np.random.default_rng(seed)
    labels = np.array(CLASS_NAMES)[random.integers(0, 4, n)]
    offsets = np.array([CLASS_NAMES.index(label) for label in labels]) * offset_of_class
    columns = {name: random.normal(0, 1, n) + offsets for name in INTENSITY_STATISTICS}
    return pd.DataFrame({"label": labels, **columns})


def test_sources_that_differ_in_brightness_are_exposed_and_equal_ones_are_at_chance() -> None:
    assert statistics_accuracy(images(1, 8.0), images(2, 8.0), seed=0) > 0.95
    assert 0.1 < statistics_accuracy(images(1, 0.0), images(2, 0.0), seed=0) < 0.4


def test_the_same_seed_gives_the_same_figure() -> None:
    train, test = images(1, 0.5), images(2, 0.5)
    assert statistics_accuracy(train, test, seed=3) == statistics_accuracy(train, test, seed=3)


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(UserError, match="one side of the split is empty"):
        statistics_accuracy(images(1, 1.0), images(2, 1.0).iloc[:0], seed=0)
