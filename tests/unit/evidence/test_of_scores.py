from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from braintumor.evidence.calibration import measure_calibration
from braintumor.evidence.conformal import measure_conformal
from braintumor.evidence.leakage import measure_leakage_of_scores
from braintumor.evidence.of_scores import arrays, sections_of_scores
from braintumor.evidence.predictions import PROBABILITY_COLUMNS, make_predictions
from braintumor.evidence.shift import measure_ood
from braintumor.evidence.shortcut import measure_shortcut
from braintumor.evidence.statistics_floor import STATISTICS
from braintumor.evidence.triage import measure_triage
from braintumor.labels import CLASS_NAMES
from braintumor.params import load_params

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml").evaluate.model_copy(update={"bootstrap_samples": 100})
TOLD = {"noise": "noise of three kinds", "turned": "test slices, turned"}
IMPORTANCES = {name: 0.01 * place for place, name in enumerate(STATISTICS)}


def predictions(n: int, seed: int) -> pd.DataFrame:
    """Rows of predictions.csv, two images a group, paths and groups in different orders."""
    random = np.random.default_rng(seed)
    truth = np.repeat(random.integers(0, 4, n // 2), 2)
    logits = random.normal(0, 1, (n, 4))
    logits[np.arange(n), truth] += 3
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = pd.DataFrame(
        {
            "path": [f"{index:04d}.png" for index in range(n)],
            "label": np.asarray(CLASS_NAMES)[truth],
            "group": [f"g{n - index // 2:04d}" for index in range(n)],
        }
    )
    floors = {name: random.choice(CLASS_NAMES, n) for name in ("neighbour_label", "statistics_label")}
    return make_predictions(rows, probabilities, random.uniform(0, 1.2, n)).assign(
        is_leaked=random.random(n) < 0.3, is_declared_copy=random.random(n) < 0.3, **floors
    )


@pytest.fixture(scope="module")
def tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """predictions.csv, ood_scores.csv and calibration.csv."""
    scores = np.random.default_rng(3).uniform(0.8, 3, 30)
    others = pd.DataFrame({"kind": np.repeat(["turned", "noise"], 15), "ood_score": scores})
    return predictions(200, 1), others, predictions(300, 2)


def test_sections_are_those_of_the_measuring_functions(
    tables: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame],
) -> None:
    test, others, calibration = tables
    found = sections_of_scores(test, others, TOLD, calibration, 1.3, IMPORTANCES, PARAMS)
    of_test, of_calibration = (
        (
            rows["label"].map(CLASS_NAMES.index).to_numpy(),
            rows[list(PROBABILITY_COLUMNS)].to_numpy(),
            rows["group"].str[1:].astype(int).to_numpy(),
        )
        for rows in (test, calibration)
    )
    scores = others["ood_score"].to_numpy()
    by_kind = {"noise": scores[15:], "turned": scores[:15]}
    assert found == {
        "calibration": measure_calibration(*of_test, 1.3, PARAMS),
        "conformal": measure_conformal(*of_calibration, *of_test, PARAMS),
        "triage": measure_triage(*of_calibration, *of_test, PARAMS),
        "leakage": measure_leakage_of_scores(test, PARAMS),
        "shortcut": measure_shortcut(test, IMPORTANCES, PARAMS),
        "ood": measure_ood(test["ood_score"].to_numpy(), by_kind, TOLD),
    }


def test_order_of_the_rows_changes_nothing(tables: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]) -> None:
    test, others, calibration = tables
    found = sections_of_scores(test, others, TOLD, calibration, 1.3, IMPORTANCES, PARAMS)
    for seed in range(3):
        mixed = [table.sample(frac=1, random_state=seed) for table in tables]
        assert sections_of_scores(mixed[0], mixed[1], TOLD, mixed[2], 1.3, IMPORTANCES, PARAMS) == found


def test_groups_are_numbered_by_their_names_alone(tables: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]) -> None:
    test, _, _ = tables
    truth, probabilities, groups = arrays(test)
    assert [CLASS_NAMES[index] for index in truth] == list(test["label"])
    assert probabilities.shape == (200, 4)
    assert groups.tolist() == [99 - index // 2 for index in range(200)]
