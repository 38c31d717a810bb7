import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.metrics.classification import classification_coverage_score, classification_mean_width_score

from braintumor.evidence.conformal import measure_conformal
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams

PARAMS = EvaluateParams(
    bootstrap_samples=200, confidence_level=0.95, seed=0, conformal_confidence=0.9, triage_max_error=0.05,
    ood_probes=8, robustness_images=0, gallery_images=0,
)  # fmt: skip
Images = tuple[np.ndarray, np.ndarray, np.ndarray]
# How well the model knows each class; meningiomas badly.
SKILL = (2.0, 0.7, 3.0, 2.0)


def images(n: int, seed: int, skill: tuple[float, ...] = SKILL) -> Images:
    """Truth, probabilities and groups of one image, `n` // 4 of each class."""
    random = np.random.default_rng(seed)
    truth = np.arange(n) % 4
    logits = random.normal(0, 1, (n, 4))
    logits[np.arange(n), truth] += np.asarray(skill)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return truth, probabilities, np.arange(n)


def take(rows: Images, which: np.ndarray) -> Images:
    truth, probabilities, groups = rows
    return truth[which], probabilities[which], groups[which]


def test_figures_agree_with_mapies_scores_of_sets_worked_out_by_hand() -> None:
    calibration, test = images(400, 0), images(600, 1)
    found = measure_conformal(*calibration, *test, PARAMS)
    sets = np.zeros((600, 4), bool)
    for index in range(4):
        scores = np.sort(1 - calibration[1][calibration[0] == index, index])
        sets[:, index] = 1 - test[1][:, index] <= scores[math.ceil(101 * 0.9) - 1]
    is_empty = ~sets.any(axis=1)
    sets[is_empty, test[1][is_empty].argmax(axis=1)] = True
    assert found["n_filled"] == is_empty.sum()
    assert found["coverage"] == pytest.approx(classification_coverage_score(test[0], sets)[0])
    assert found["mean_size"] == pytest.approx(classification_mean_width_score(sets[:, :, None])[0])
    sizes = sets.sum(axis=1)
    assert found["sizes"] == {str(size): int((sizes == size).sum()) for size in (1, 2, 3, 4)}
    assert found["single"] == pytest.approx(np.mean(sizes == 1))
    assert found["single_correct"] == pytest.approx(np.mean(sets[sizes == 1, test[0][sizes == 1]]))
    for index, name in enumerate(CLASS_NAMES):
        of_class = test[0] == index
        one = found["per_class"][name]
        assert (one["n"], one["n_calibration"]) == (150, 100)
        assert one["coverage"] == pytest.approx(classification_coverage_score(test[0][of_class], sets[of_class])[0])
        assert one["coverage_interval"][0] <= one["coverage"] <= one["coverage_interval"][1]
    assert (found["confidence"], found["n_calibration"]) == (0.9, 400)
    json.dumps(found, allow_nan=False)


def test_every_class_is_covered_as_promised_where_the_images_are_exchangeable() -> None:
    coverages, below_chance = [], []
    for seed in range(50):
        found = measure_conformal(
            *images(160, seed), *images(600, 1000 + seed), PARAMS.model_copy(update={"bootstrap_samples": 100})
        )
        of_classes = [found["per_class"][name] for name in CLASS_NAMES]
        coverages.append([one["coverage"] for one in of_classes])
        below_chance.append(of_classes[1]["coverage"] < of_classes[1]["low_by_chance"])
    mean = np.mean(coverages, axis=0)
    # 40 images calibrate a class: its coverage is 37 / 41 on average, and more where empty sets are filled.
    assert mean[1] == pytest.approx(37 / 41, abs=0.02)
    assert (mean > 0.88).all()
    assert np.mean(below_chance) <= 0.1


def test_thirty_calibration_images_of_a_class_are_enough() -> None:
    found = measure_conformal(*images(120, 0), *images(400, 1), PARAMS)
    assert found["reaches_confidence"]
    assert {one["n_calibration"] for one in found["per_class"].values()} == {30}
    assert found["per_class"]["glioma"]["low_by_chance"] < 0.8


@pytest.mark.parametrize("n_meningiomas", [0, 1, 10])
def test_too_few_calibration_images_are_a_reason_and_no_claim(n_meningiomas: int) -> None:
    calibration = images(400, 0)
    few = take(calibration, np.r_[np.flatnonzero(calibration[0] != 1), np.arange(1, 4 * n_meningiomas, 4)])
    found = measure_conformal(*few, *images(400, 1), PARAMS)
    assert found["coverage"] is found["coverage_interval"] is found["mean_size"] is None
    assert not found["reaches_confidence"]
    assert f"meningioma ({n_meningiomas})" in found["remark"]
    assert "11 groups" in found["remark"]
    complete = measure_conformal(*calibration, *images(400, 1), PARAMS)
    assert found.keys() == complete.keys()
    json.dumps(found, allow_nan=False)


def test_eleven_are_enough_for_90_percent_and_copies_are_no_images() -> None:
    assert measure_conformal(*images(44, 0), *images(400, 1), PARAMS)["coverage"] is not None
    truth, probabilities, groups = images(44, 0)
    pairs = groups // 8 * 4 + truth
    assert measure_conformal(truth, probabilities, pairs, *images(400, 1), PARAMS)["coverage"] is None


def test_test_images_unlike_the_calibration_images_are_told() -> None:
    shifted = images(800, 1, skill=(2.0, -1.0, 3.0, 2.0))
    found = measure_conformal(*images(400, 0), *shifted, PARAMS)
    assert not found["reaches_confidence"]
    assert found["per_class"]["meningioma"]["coverage"] < 0.6
    assert "meningioma" in found["remark"]
    assert "unlike" in found["remark"]
    assert "glioma " not in found["remark"]


def test_no_set_is_empty() -> None:
    # A model so good that its calibration asks for more than some right answers have.
    found = measure_conformal(*images(400, 0, (6.0,) * 4), *images(400, 1, (6.0,) * 4), PARAMS)
    assert found["n_filled"] > 10
    assert found["sizes"] == {"1": 400, "2": 0, "3": 0, "4": 0}
    assert found["single_correct"] == found["coverage"] > 0.98


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_the_images_changes_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    calibration, test = images(120, seed), images(120, seed + 1)
    calibration = (*calibration[:2], random.integers(0, 80, 120))
    test = (*test[:2], random.integers(0, 50, 120))
    found = measure_conformal(*calibration, *test, PARAMS)
    shuffled = (take(rows, random.permutation(120)) for rows in (calibration, test))
    again = measure_conformal(*next(shuffled), *next(shuffled), PARAMS)
    assert again == found


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_copies_change_no_figure_and_no_interval(seed: int, times: int) -> None:
    calibration, test = images(160, seed), images(120, seed + 1)
    found = measure_conformal(*calibration, *test, PARAMS)
    each = np.repeat(np.arange(120), times)
    copied = measure_conformal(*calibration, *take(test, each), PARAMS)
    for name in ("coverage", "coverage_interval", "mean_size", "single", "single_correct"):
        assert copied[name] == pytest.approx(found[name])
    # Further copies of one calibration image, in its group.
    assert measure_conformal(*take(calibration, np.r_[np.arange(160), [3] * 40]), *test, PARAMS) == found


def test_an_interval_over_images_instead_of_groups_would_be_narrower() -> None:
    calibration, test = images(400, 0), take(images(200, 1), np.repeat(np.arange(200), 4))
    by_group = measure_conformal(*calibration, *test, PARAMS)["coverage_interval"]
    by_image = measure_conformal(*calibration, *test[:2], np.arange(800), PARAMS)["coverage_interval"]
    assert np.ptp(by_group) == pytest.approx(2 * np.ptp(by_image), rel=0.25)


def test_mapie_is_loaded_when_needed_and_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_conformal(*images(160, 0), *images(80, 1), PARAMS)
    program = "import braintumor.evidence.conformal, sys; print({'mapie', 'sklearn'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
