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
from braintumor.evidence.leakage import measure_leakage_of_scores
from braintumor.evidence.metrics import compute_metrics, compute_test_metrics
from braintumor.evidence.predictions import PROBABILITY_COLUMNS, make_predictions, read_predictions, write_table
from braintumor.labels import CLASS_NAMES
from braintumor.params import load_params

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml").evaluate.model_copy(
    update={"bootstrap_samples": 400, "seed": 0}
)
INTERVAL_FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "tumour_sensitivity", "tumour_specificity")


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


def test_images_of_one_group_say_nothing_of_others() -> None:
    rows = predictions(330, skill=4.0).assign(group="one patient")
    found = compute_metrics(rows, PARAMS)
    assert 0.9 < found["accuracy"] < 1
    for name in INTERVAL_FIGURES:
        low, high = found[f"{name}_interval"]
        assert (low < 0.03, high) == (True, 1), name
    # So do a single group without a tumour, and a smallest class of one group.
    rows = predictions(400)
    without_tumour = rows["label"] == "notumor"
    found = compute_metrics(rows.assign(group=np.where(without_tumour, "one", rows["group"])), PARAMS)
    assert found["tumour_specificity_interval"] == found["macro_f1_interval"] == [0, 1]
    assert found["tumour_sensitivity_interval"][0] > 0.5


def test_a_figure_of_0_is_as_uncertain_as_one_of_1() -> None:
    rows = predictions(40, skill=50.0)
    shifted = rows[list(PROBABILITY_COLUMNS)].to_numpy(np.float32)[:, [3, 0, 1, 2]]
    found = compute_metrics(make_predictions(rows[["path", "label", "group"]], shifted), PARAMS)
    assert found["accuracy"] == found["tumour_specificity"] == 0
    assert found["accuracy_interval"] == pytest.approx([0, 1 - 0.025 ** (1 / 40)])
    assert found["tumour_specificity_interval"] == pytest.approx([0, 1 - 0.025 ** (1 / 10)])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3, 50]), st.sampled_from([0.0, 2.0, 50.0]))
def test_where_no_image_has_a_copy_all_intervals_of_the_accuracy_are_one(
    seed: int, n_groups: int, skill: float
) -> None:
    rows, others = scored(60, seed, skill)
    # The groups in another order than the paths.
    names = np.random.default_rng(seed).integers(0, n_groups, 60)
    rows = rows.assign(is_leaked=False, group=[f"g{name}" for name in names])
    found = compute_test_metrics(rows, others, PARAMS)
    everything = measure_leakage_of_scores(rows, PARAMS)["split"][0]
    assert found["accuracy_interval"] == found["copy_free_accuracy_interval"] == everything["accuracy_interval"]


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("probability_glioma", float("nan"), "no probabilities"),
        ("probability_glioma", 3.0, "no probabilities"),
        (list(PROBABILITY_COLUMNS), [1.4, -0.2, -0.1, -0.1], "no probabilities"),
        ("path", "test/0000.jpg", "test/0000.jpg twice"),
        ("label", "metastasis", "labels other than"),
        ("predicted", "tumour", "labels other than"),
    ],
)
def test_impossible_row_is_refused(column: str | list[str], value: object, told: str) -> None:
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


def scored(n: int = 200, seed: int = 0, skill: float = 2.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions of test images with what the split knows of them, every fourth leaked, and scores of others."""
    random = np.random.default_rng(seed)
    rows = predictions(n, seed, skill).assign(
        ood_score=random.uniform(0, 1.2, n),
        is_leaked=np.arange(n) % 4 == 1,
        is_declared_copy=False,
        neighbour_label="glioma",
        statistics_label="glioma",
    )
    return rows, pd.DataFrame({"kind": ["noise"] * 20 + ["turned"] * 10, "ood_score": random.uniform(0.8, 3, 30)})


def test_figures_of_copies_and_of_other_images_agree_with_their_definition() -> None:
    rows, others = scored()
    found = compute_test_metrics(rows, others, PARAMS)
    free = rows[~rows["is_leaked"]]
    assert found["n_copy_free"] == len(free) == 150
    assert found["copy_free_accuracy"] == pytest.approx((free["label"] == free["predicted"]).mean())
    low, high = found["copy_free_accuracy_interval"]
    assert low < found["copy_free_accuracy"] < high
    areas = [
        reference.roc_auc_score(
            np.repeat([0, 1], [len(rows), len(kind)]), np.concatenate([rows["ood_score"], kind["ood_score"]])
        )
        for _, kind in others.groupby("kind")
    ]
    assert found["ood_auroc"] == pytest.approx(np.mean(areas))
    assert found["ood_flagged_share"] == pytest.approx((rows["ood_score"] > 1).mean())
    assert compute_test_metrics(rows.sample(frac=1, random_state=3), others[::-1], PARAMS) == found


def test_nothing_is_said_of_copy_free_images_where_there_are_none() -> None:
    rows, others = scored()
    found = compute_test_metrics(rows.assign(is_leaked=True), others, PARAMS)
    assert (found["n_copy_free"], found["copy_free_accuracy"], found["copy_free_accuracy_interval"]) == (0, None, None)


@pytest.mark.parametrize("harm", ["nan", "infinite", "no others", "no column", "no kind"])
def test_scores_that_are_missing_or_not_finite_are_refused(harm: str) -> None:
    rows, others = scored()
    match harm:
        case "nan":
            rows.loc[3, "ood_score"] = np.nan
        case "infinite":
            others.loc[3, "ood_score"] = np.inf
        case "no others":
            others = others[:0]
        case "no column":
            rows = rows.drop(columns="is_leaked")
        case "no kind":
            others = others.drop(columns="kind")
    with pytest.raises(UserError, match="braintumor evaluate"):
        compute_test_metrics(rows, others, PARAMS)


def test_scores_read_back_give_the_same_figures(tmp_path: Path) -> None:
    rows, others = scored()
    for table, name in ((rows, "predictions.csv"), (others, "ood_scores.csv")):
        write_table(table, tmp_path / name)
    once = [read_predictions(tmp_path / name) for name in ("predictions.csv", "ood_scores.csv")]
    found = compute_test_metrics(*once, PARAMS)
    for table, name in zip(once, ("predictions.csv", "ood_scores.csv"), strict=True):
        write_table(table, tmp_path / name)
    again = [read_predictions(tmp_path / name) for name in ("predictions.csv", "ood_scores.csv")]
    assert compute_test_metrics(*again, PARAMS) == found
    assert once[0]["is_leaked"].dtype == bool and once[0]["is_leaked"].sum() == 50
