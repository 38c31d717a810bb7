from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from sklearn import metrics as reference

from braintumor.errors import UserError
from braintumor.evidence.metrics import PROBABILITY_COLUMNS, compute_metrics, make_predictions, read_predictions
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams

PARAMS = EvaluateParams(bootstrap_samples=400, confidence_level=0.95, seed=0)


def predictions(n: int = 200, seed: int = 0, skill: float = 2.0, group_size: int = 1) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n // group_size) % 4, group_size)
    logits = np.repeat(random.normal(0, 1, (n // group_size, 4)), group_size, axis=0)
    logits[np.arange(n), labels] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = pd.DataFrame(
        {
            "path": [f"test/{index:04d}.jpg" for index in range(n)],
            "label": np.asarray(CLASS_NAMES)[labels],
            "group": [f"g{index // group_size}" for index in range(n)],
        }
    )
    return make_predictions(rows, probabilities.astype(np.float32))


def test_figures_agree_with_scikit_learn() -> None:
    rows = predictions()
    found = compute_metrics(rows, PARAMS)
    truth, predicted = rows["label"], rows["predicted"]
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(truth, predicted, average="macro"))
    assert found["confusion_matrix"] == reference.confusion_matrix(truth, predicted, labels=CLASS_NAMES).tolist()
    precision, recall, f1, n = reference.precision_recall_fscore_support(truth, predicted, labels=CLASS_NAMES)
    for index, name in enumerate(CLASS_NAMES):
        one = found["per_class"][name]
        assert (one["precision"], one["recall"], one["f1"], one["n"]) == pytest.approx(
            (precision[index], recall[index], f1[index], n[index])
        )
        specificity = reference.recall_score(truth != name, predicted != name)
        assert one["specificity"] == pytest.approx(specificity)
        assert one["auroc"] == pytest.approx(reference.roc_auc_score(truth == name, rows[f"probability_{name}"]))


def test_tumour_figures_agree_with_a_case_worked_by_hand() -> None:
    # Three tumours, one of them called another tumour and one missed; two without, one of them called a tumour.
    rows = pd.DataFrame(
        {
            "path": list("abcdef"),
            "label": ["glioma", "meningioma", "pituitary", "notumor", "notumor", "glioma"],
            "group": list("uvwxyz"),
        }
    )
    called = [1, 1, 2, 2, 0, 0]
    probabilities = np.full((6, 4), 0.1, np.float32)
    probabilities[np.arange(6), called] = 0.7
    found = compute_metrics(make_predictions(rows, probabilities), PARAMS)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["tumour_sensitivity"] == pytest.approx(3 / 4)
    assert found["tumour_specificity"] == pytest.approx(1 / 2)
    assert found["per_class"]["glioma"]["recall"] == pytest.approx(1 / 2)
    assert found["per_class"]["pituitary"]["recall"] == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_order_of_the_rows_changes_nothing(seed: int) -> None:
    rows = predictions(80)
    assert compute_metrics(rows.sample(frac=1, random_state=seed), PARAMS) == compute_metrics(rows, PARAMS)


def test_interval_holds_the_figure_and_about_its_share_of_repetitions() -> None:
    # The right logit, normal around 2, is above three standard normal ones.
    true_accuracy = quad(lambda x: norm.pdf(x - 2) * norm.cdf(x) ** 3, -8, 12)[0]
    covered = 0
    for seed in range(60):
        found = compute_metrics(predictions(300, seed), PARAMS)
        low, high = found["accuracy_interval"]
        assert low <= found["accuracy"] <= high
        covered += low <= true_accuracy <= high
    assert covered >= 52


def test_copies_of_a_slice_narrow_no_interval() -> None:
    def width(rows: pd.DataFrame) -> float:
        low, high = compute_metrics(rows, PARAMS)["accuracy_interval"]
        return float(high - low)

    single = predictions(100)
    copied = pd.concat([single, *(single.assign(path=single["path"] + f"-{copy}") for copy in range(3))])
    assert width(copied) == pytest.approx(width(single), rel=0.1)
    as_if_independent = copied.assign(group=copied["path"])
    assert width(as_if_independent) < 0.7 * width(single)


def test_flawless_answers_on_few_images_claim_no_certainty() -> None:
    rows = predictions(40, skill=50.0)
    found = compute_metrics(rows, PARAMS)
    assert found["accuracy"] == 1
    # Clopper & Pearson: 0.025 ** (1 / 40).
    assert found["accuracy_interval"] == pytest.approx([0.025 ** (1 / 40), 1.0])
    # Specificity rests on the 10 images without a tumour, sensitivity on the 30 others.
    assert found["tumour_specificity_interval"][0] == pytest.approx(0.025 ** (1 / 10))
    assert found["tumour_sensitivity_interval"][0] == pytest.approx(0.025 ** (1 / 30))
    assert found["macro_f1_interval"][0] == found["balanced_accuracy_interval"][0] == pytest.approx(0.025 ** (1 / 10))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("probability_glioma", float("nan"), "no probabilities"),
        ("probability_glioma", 3.0, "no probabilities"),
        ("label", "metastasis", "labels other than"),
        ("predicted", "tumour", "labels other than"),
    ],
)
def test_impossible_row_is_refused(column: str, value: object, told: str) -> None:
    rows = predictions(40)
    rows.loc[3, column] = value
    with pytest.raises(UserError, match=told):
        compute_metrics(rows, PARAMS)


def test_prediction_other_than_the_most_probable_class_is_refused() -> None:
    rows = predictions(40)
    rows.loc[3, "predicted"] = next(name for name in CLASS_NAMES if name != rows.loc[3, "predicted"])
    with pytest.raises(UserError, match="not its most probable"):
        compute_metrics(rows, PARAMS)


def test_class_without_test_images_is_refused() -> None:
    rows = predictions(40)
    with pytest.raises(UserError, match="no test image of class pituitary"):
        compute_metrics(rows[rows["label"] != "pituitary"], PARAMS)


@pytest.mark.parametrize("column", ["group", "predicted", PROBABILITY_COLUMNS[0]])
def test_missing_column_is_named(column: str) -> None:
    with pytest.raises(UserError, match=f"no column {column}"):
        compute_metrics(predictions(40).drop(columns=column), PARAMS)


def test_predictions_read_back_give_the_same_figures(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    predictions(200).to_csv(path, index=False, float_format="%.9g")
    once = read_predictions(path)
    once.to_csv(path, index=False, float_format="%.9g")
    assert compute_metrics(read_predictions(path), PARAMS) == compute_metrics(once, PARAMS)


def test_file_that_is_no_table_of_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_predictions(tmp_path / "gone.csv")
    (tmp_path / "p.csv").write_text("path,probability_glioma\na,many\n")
    with pytest.raises(UserError, match="not a table"):
        read_predictions(tmp_path / "p.csv")
