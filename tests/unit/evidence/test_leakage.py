from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braintumor.evidence.leakage import measure_leakage_of_scores
from braintumor.labels import CLASS_NAMES
from braintumor.params import Params, load_params

FEW_SAMPLES = load_params(Path(__file__).parents[3] / "params.yaml").evaluate.model_copy(
    update={"bootstrap_samples": 100}
)
CLASSES = np.array(CLASS_NAMES)


def answers(truth: np.ndarray, accuracy: np.ndarray | float, random: np.random.Generator) -> np.ndarray:
    """Labels that are right with a probability, and evenly wrong else."""
    other = (truth + random.integers(1, 4, len(truth))) % 4
    return CLASSES[np.where(random.random(len(truth)) < accuracy, truth, other)]


def images(seed: int, n: int = 400, copies: float = 0.5, leaky: bool = False, accuracy: float = 0.93) -> pd.DataFrame:
    """Test images, a share of them with copies in training; nearest neighbours find those, and little else."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 4, n)
    is_copy = random.random(n) < copies
    return pd.DataFrame(
        {
            "label": CLASSES[truth],
            "predicted": answers(truth, np.where(is_copy, 1.0, 0.25) if leaky else accuracy, random),
            "group": [f"g{index:04d}" for index in range(n)],
            "is_leaked": is_copy,
            "is_declared_copy": is_copy,
            "neighbour_label": answers(truth, np.where(is_copy, 0.98, 0.4), random),
            "statistics_label": answers(truth, 0.4, random),
        }
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_knows_the_copies_alone_is_exposed(params: Params, seed: int) -> None:
    found = measure_leakage_of_scores(images(seed, leaky=True), params.evaluate)
    inflated, looked_up = found["warnings"]
    assert "the accuracy on all test images is inflated" in inflated
    assert "is not clearly above the nearest neighbour" in looked_up
    _, with_copies, copy_free = found["split"]
    assert with_copies["accuracy"] == 1
    assert copy_free["accuracy_interval"][1] < 0.5
    assert found["advantage"]["split"]["same_mix"]["interval"][0] > 0.5


def test_an_honest_model_is_not_warned_of_though_it_is_tested_on_copies(params: Params) -> None:
    warned = [seed for seed in range(20) if measure_leakage_of_scores(images(seed), params.evaluate)["warnings"]]
    assert len(warned) <= 1


def test_a_single_copy_that_is_right_proves_nothing(params: Params) -> None:
    rows = images(0, copies=0.0, accuracy=0.8)
    first_right = rows.index[rows["predicted"] == rows["label"]][0]
    rows["is_leaked"] = rows.index == first_right
    found = measure_leakage_of_scores(rows, params.evaluate)
    assert found["split"][1]["accuracy"] == 1
    assert found["advantage"]["split"]["interval"][0] < 0
    assert found["warnings"] == []


def test_copies_of_the_easier_classes_are_told_from_copies_that_help(params: Params) -> None:
    # Tumours are hard, and 'notumor' is easy and full of copies: the copies themselves help nobody.
    random = np.random.default_rng(0)
    truth = random.integers(0, 4, 2000)
    is_easy = truth == CLASS_NAMES.index("notumor")
    is_copy = random.random(2000) < np.where(is_easy, 0.9, 0.1)
    rows = images(0, 2000).assign(
        label=CLASSES[truth], predicted=answers(truth, np.where(is_easy, 0.99, 0.7), random), is_leaked=is_copy
    )
    found = measure_leakage_of_scores(rows, params.evaluate)
    assert "copies stand more often in the classes that are easier" in found["warnings"][0]
    assert not any("inflated" in warning for warning in found["warnings"])
    advantage = found["advantage"]["split"]
    assert advantage["interval"][0] > 0.1
    low, high = advantage["same_mix"]["interval"]
    assert low < 0 < high


def test_copies_in_classes_of_their_own_count_as_inflating(params: Params) -> None:
    rows = images(1, leaky=True)
    is_copy = rows["label"].isin(["glioma", "notumor"])
    predicted = np.where(is_copy, rows["label"], "glioma")
    found = measure_leakage_of_scores(rows.assign(is_leaked=is_copy, predicted=predicted), params.evaluate)
    assert found["advantage"]["split"]["same_mix"] is None
    assert "the accuracy on all test images is inflated" in found["warnings"][0]


def test_classes_weigh_as_mantel_and_haenszel_say(params: Params) -> None:
    # Of gliomas 2 of 2 with copies and 1 of 2 without are right, weight 2 * 2 / 4; of the others 1 of 1 and 9 of 9,
    # weight 1 * 9 / 10.
    label = np.repeat(["glioma", "notumor"], [4, 10])
    is_copy = np.isin(np.arange(14), [0, 1, 4])
    rows = images(0, 14).assign(
        label=label, predicted=np.where(np.arange(14) == 3, "notumor", label), is_leaked=is_copy
    )
    advantage = measure_leakage_of_scores(rows, params.evaluate)["advantage"]["split"]
    assert advantage["same_mix"]["difference"] == pytest.approx(0.5 / 1.9)
    assert advantage["difference"] == pytest.approx(1 - 10 / 11)


def test_floors_and_parts_agree_with_a_case_worked_by_hand(params: Params) -> None:
    rows = pd.DataFrame(
        {
            "label": ["glioma", "glioma", "notumor", "pituitary"],
            "predicted": ["glioma", "notumor", "notumor", "pituitary"],
            "group": ["a", "a", "b", "c"],
            "is_leaked": [False, False, True, False],
            "is_declared_copy": [True, True, True, False],
            "neighbour_label": ["glioma", "glioma", "glioma", "glioma"],
            "statistics_label": ["pituitary", "pituitary", "pituitary", "pituitary"],
        }
    )
    found = measure_leakage_of_scores(rows, params.evaluate)
    figures = ("part", "n", "n_groups", "accuracy", "neighbour_accuracy", "statistics_accuracy")
    assert [tuple(part[name] for name in figures) for part in found["split"]] == [
        ("all", 4, 3, 0.75, 0.5, 0.25),
        ("with copies", 1, 1, 1.0, 0.0, 0.0),
        ("copy-free", 3, 2, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(1 / 3)),
    ]
    assert [part["n"] for part in found["declared"]] == [4, 3, 1]
    assert found["per_group"]["accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["over_neighbour"]["difference"] == pytest.approx(0.25)


def test_parts_without_images_have_no_figures(params: Params) -> None:
    found = measure_leakage_of_scores(images(0, copies=0.0), params.evaluate)
    assert found["split"][1] == {
        "part": "with copies",
        "n": 0,
        "n_groups": 0,
        "accuracy": None,
        "accuracy_interval": None,
        "neighbour_accuracy": None,
        "statistics_accuracy": None,
    }
    assert found["advantage"] == {"split": None, "declared": None}
    assert found["split"][0] | {"part": "copy-free"} == found["split"][2]


@settings(max_examples=10, deadline=None)
@given(order=st.integers(0, 1000), copied=st.integers(0, 199), n_copies=st.integers(1, 30))
def test_order_changes_nothing_and_copies_nothing_that_is_counted_by_group(
    order: int, copied: int, n_copies: int
) -> None:
    rows = images(1, 200, leaky=True)
    found = measure_leakage_of_scores(rows, FEW_SAMPLES)
    assert measure_leakage_of_scores(rows.sample(frac=1, random_state=order), FEW_SAMPLES) == found
    with_copies = pd.concat([rows, *[rows.iloc[[copied]]] * n_copies])
    assert measure_leakage_of_scores(with_copies, FEW_SAMPLES)["per_group"] == found["per_group"]
