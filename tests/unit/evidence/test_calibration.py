import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.metrics.calibration import expected_calibration_error as reference_ece
from sklearn.metrics import brier_score_loss, log_loss

from braintumor.evidence.calibration import (
    LOWEST_PROBABILITY,
    brier_score,
    expected_calibration_error,
    measure_calibration,
    negative_log_likelihood,
    with_temperature,
)
from braintumor.params import EvaluateParams

PARAMS = EvaluateParams(
    bootstrap_samples=500, confidence_level=0.95, seed=0, conformal_confidence=0.9, triage_max_error=0.05,
    ood_probes=8, robustness_images=0, gallery_images=0,
)  # fmt: skip
Images = tuple[np.ndarray, np.ndarray, np.ndarray]


def calibrated(n: int = 1000, seed: int = 0, copies: int = 1) -> Images:
    """Truth, probabilities (each class true as often as it says) and groups of `copies` equal images."""
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet([0.4] * 4, n // copies)
    truth = (random.random(n // copies)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1).clip(0, 3)
    return tuple(np.repeat(column, copies, axis=0) for column in (truth, probabilities, np.arange(n // copies)))


def test_scores_agree_with_trusted_implementations() -> None:
    truth, probabilities, _ = calibrated()
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    # MAPIE counts the edges of the bins.
    expected = reference_ece(is_right.astype(int), confidence, num_bins=16, split_strategy="uniform")
    assert expected_calibration_error(confidence, is_right) == pytest.approx(expected)
    ten = reference_ece(is_right.astype(int), confidence, num_bins=11, split_strategy="uniform")
    assert expected_calibration_error(confidence, is_right, n_bins=10) == pytest.approx(ten)
    assert brier_score(truth, probabilities) == pytest.approx(
        brier_score_loss(truth, probabilities, labels=[0, 1, 2, 3], scale_by_half=False)
    )
    assert negative_log_likelihood(truth, probabilities) == pytest.approx(log_loss(truth, probabilities))
    after = measure_calibration(*calibrated(), 1.0, PARAMS)["after"]
    classwise = reference_ece(
        truth, probabilities, num_bins=16, split_strategy="uniform", classwise=True, class_labels=truth
    )
    assert after["classwise_ece"] == pytest.approx(classwise)
    # MAPIE puts the least confident image into a bin of its own.
    equal_mass = reference_ece(is_right.astype(int), confidence, num_bins=16, split_strategy="quantile")
    assert after["ece_equal_mass"] == pytest.approx(equal_mass, abs=0.004)
    assert (after["ece"], after["brier"], after["nll"]) == pytest.approx(
        (expected, brier_score(truth, probabilities), negative_log_likelihood(truth, probabilities))
    )


def test_figures_agree_with_a_case_worked_by_hand() -> None:
    # Two images in the bin (0.8, 0.867], one of them right; one on the upper edge of (0.533, 0.6], right; one above it.
    confidence = np.array([0.81, 0.85, 0.6, 0.65])
    is_right = np.array([True, False, True, False])
    expected = 2 / 4 * (0.83 - 0.5) + 1 / 4 * 0.4 + 1 / 4 * 0.65
    assert expected_calibration_error(confidence, is_right) == pytest.approx(expected)
    probabilities = np.column_stack([confidence, (1 - confidence)[:, None] * [0.5, 0.5, 0.0]])
    truth = np.array([0, 1, 0, 1])
    bins = measure_calibration(truth, probabilities, np.arange(4), 1.0, PARAMS)["bins"]
    assert [one["n"] for one in bins] == [0] * 8 + [1, 1, 0, 0, 2, 0, 0]
    assert (bins[8]["low"], bins[8]["high"]) == pytest.approx((8 / 15, 0.6))
    assert (bins[8]["confidence"], bins[8]["accuracy"]) == (0.6, 1)
    assert (bins[12]["confidence"], bins[12]["accuracy"]) == pytest.approx((0.83, 0.5))
    assert bins[12]["accuracy_interval"] == [0, 1]
    assert (bins[0]["confidence"], bins[0]["accuracy"], bins[0]["accuracy_interval"]) == (None, None, None)
    assert brier_score(np.array([0]), np.array([[0.5, 0.5, 0, 0]])) == 0.5


def test_probability_of_0_for_the_true_class_stays_finite() -> None:
    certain = np.array([[1.0, 0, 0, 0]])
    assert negative_log_likelihood(np.array([1]), certain) == pytest.approx(-np.log(LOWEST_PROBABILITY))
    assert negative_log_likelihood(np.array([0]), certain) == 0
    found = measure_calibration(np.array([1, 0]), np.repeat(certain, 2, axis=0), np.arange(2), 2.0, PARAMS)
    json.dumps(found, allow_nan=False)


def test_the_temperature_is_taken_out_again_for_the_figures_before() -> None:
    truth, _, groups = calibrated()
    logits = np.random.default_rng(5).normal(0, 3, (1000, 4))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = measure_calibration(truth, with_temperature(softmax, 2.5), groups, 2.5, PARAMS)
    plain = measure_calibration(truth, softmax, groups, 1.0, PARAMS)
    assert found["before"] == pytest.approx(plain["before"])
    assert plain["before"] == pytest.approx({name: plain["after"][name] for name in plain["before"]})
    assert [one["n"] for one in found["bins_before"]] == [one["n"] for one in plain["bins"]]


def test_an_over_confident_model_is_exposed_and_its_temperature_brings_it_back() -> None:
    truth, honest, groups = calibrated(1200)
    sharpened = with_temperature(honest, 1 / 3)
    exposed = measure_calibration(truth, sharpened, groups, 1.0, PARAMS)["after"]
    assert exposed["ece"] > 0.15
    assert exposed["ece_interval"][0] > exposed["ece_by_chance"][1]
    assert exposed["ece_equal_mass"] > 0.15
    assert exposed["nll"] > log_loss(truth, honest) + 0.3

    mended = measure_calibration(truth, with_temperature(sharpened, 3), groups, 3.0, PARAMS)
    assert mended["before"]["ece"] == pytest.approx(exposed["ece"])
    assert mended["after"]["ece"] <= mended["after"]["ece_by_chance"][1]
    for name, before in mended["before"].items():
        assert mended["after"][name] < before


def test_ece_by_chance_is_what_calibrated_models_show() -> None:
    inside = []
    for seed in range(40):
        found = measure_calibration(*calibrated(400, seed, copies=2), 1.0, PARAMS)["after"]
        low, high = found["ece_by_chance"]
        inside.append(low <= found["ece"] <= high)
    assert np.mean(inside) >= 0.85


def test_interval_of_the_ece_holds_its_true_value() -> None:
    # In every bin 0.02 fewer are right than are said to be. A percentile interval holds that in 1 of 100 cases.
    held, params = [], PARAMS.model_copy(update={"bootstrap_samples": 200})
    for seed in range(40):
        random = np.random.default_rng(seed)
        confidence = random.uniform(0.4, 1, 800)
        probabilities = np.column_stack([confidence, *[(1 - confidence) / 3] * 3])
        is_wrong = random.random(800) > confidence - 0.02
        low, high = measure_calibration(is_wrong.astype(int), probabilities, np.arange(800), 1.0, params)["after"][
            "ece_interval"
        ]
        held.append(low <= 0.02 <= high)
    assert np.mean(held) > 0.75


def test_interval_of_the_ece_reaches_the_figure_and_0_where_chance_explains_it() -> None:
    explained = []
    for seed in range(30):
        after = measure_calibration(*calibrated(200, seed), 1.0, PARAMS)["after"]
        low, high = after["ece_interval"]
        assert low <= after["ece"] <= high
        explained.append(after["ece"] <= after["ece_by_chance"][1])
        assert (low == 0) == explained[-1]
    assert 20 < sum(explained) < 30


def test_a_single_group_tells_nothing_of_others() -> None:
    truth, probabilities, _ = calibrated(200)
    after = measure_calibration(truth, probabilities, np.zeros(200, int), 1.0, PARAMS)["after"]
    assert after["ece_interval"] == [0, 1] and after["brier_interval"] == [0, 2]
    assert after["nll_interval"] == [0, pytest.approx(87.3, abs=0.1)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_the_images_changes_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth, probabilities, _ = calibrated(120, seed)
    probabilities = probabilities.round(1)
    probabilities[:, 0] += 1 - probabilities.sum(axis=1)
    images = truth, probabilities, random.integers(0, 50, 120)
    order = random.permutation(120)
    shuffled = measure_calibration(*(column[order] for column in images), 1.5, PARAMS)
    assert shuffled == measure_calibration(*images, 1.5, PARAMS)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_copying_every_image_as_often_changes_no_figure_and_no_interval(seed: int, times: int) -> None:
    images = calibrated(100, seed)
    plain = measure_calibration(*images, 1.5, PARAMS)
    copied = measure_calibration(*(np.repeat(column, times, axis=0) for column in images), 1.5, PARAMS)
    for name, value in plain["after"].items():
        assert copied["after"][name] == pytest.approx(value, abs=1e-9)
    for one, other in zip(plain["bins"], copied["bins"], strict=True):
        assert other["n"] == times * one["n"]
        assert other["accuracy_interval"] == one["accuracy_interval"] or (
            other["accuracy_interval"] == pytest.approx(one["accuracy_interval"], abs=1e-9)
        )


def test_intervals_over_images_instead_of_groups_would_be_narrower() -> None:
    truth, probabilities, groups = calibrated(600, copies=4)
    by_group = measure_calibration(truth, probabilities, groups, 1.0, PARAMS)["after"]
    by_image = measure_calibration(truth, probabilities, np.arange(600), 1.0, PARAMS)["after"]
    for name in ("brier_interval", "nll_interval"):
        assert np.ptp(by_group[name]) == pytest.approx(2 * np.ptp(by_image[name]), rel=0.2)
    assert by_group["ece_by_chance"][1] > 1.5 * by_image["ece_by_chance"][1]


def test_2000_resamples_of_1500_images_take_less_than_2_seconds() -> None:
    images = calibrated(1500)
    started = time.process_time()
    measure_calibration(*images, 1.2, PARAMS.model_copy(update={"bootstrap_samples": 2000}))
    assert time.process_time() - started < 2
