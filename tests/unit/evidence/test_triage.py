import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from braintumor.evidence.triage import measure_triage
from braintumor.params import EvaluateParams

PARAMS = EvaluateParams(
    bootstrap_samples=200, confidence_level=0.95, seed=0, conformal_confidence=0.9, triage_max_error=0.05,
    ood_probes=8, robustness_images=0, gallery_images=0,
)  # fmt: skip
Images = tuple[np.ndarray, np.ndarray, np.ndarray]


def answers(scores: np.ndarray, is_wrong: np.ndarray, groups: np.ndarray | None = None) -> Images:
    """Images of class 0 or, where wrong, 1, all called class 0 with these top probabilities."""
    probabilities = np.column_stack([scores, *[(1 - scores) / 3] * 3])
    return is_wrong.astype(int), probabilities, np.arange(len(scores)) if groups is None else groups


def images(n: int, seed: int, error_of_unsure: float = 0.6) -> Images:
    """Sure images are wrong in 1 %; the less sure below 0.8, the more often."""
    random = np.random.default_rng(seed)
    scores = random.uniform(0.4, 1, n)
    return answers(scores, random.random(n) < np.where(scores > 0.8, 0.01, error_of_unsure * (1 - scores)))


def take(rows: Images, which: np.ndarray) -> Images:
    truth, probabilities, groups = rows
    return truth[which], probabilities[which], groups[which]


def aurc(scores: list[float], is_wrong: list[int]) -> float:
    found = measure_triage(*images(100, 0), *answers(np.array(scores), np.array(is_wrong)), PARAMS)["aurc"]
    assert isinstance(found, float)
    return found


def test_area_agrees_with_cases_worked_by_hand() -> None:
    assert aurc([0.9, 0.8, 0.7], [0, 1, 0]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert aurc([0.7, 0.8, 0.9], [1, 1, 1]) == 1
    assert aurc([0.7, 0.8, 0.9], [0, 0, 0]) == 0
    # Of equal score: kept together, or not at all.
    assert aurc([0.9, 0.8, 0.8, 0.7], [0, 1, 0, 0]) == pytest.approx((0 + 2 * 1 / 3 + 1 / 4) / 4)


def test_area_agrees_with_its_definition() -> None:
    truth, probabilities, _ = test = images(500, 3)
    scores = probabilities.max(axis=1)
    risks = [(truth[scores >= score] != 0).mean() for score in scores]
    found = measure_triage(*images(300, 0), *test, PARAMS)
    assert found["aurc"] == pytest.approx(np.mean(risks))
    assert found["aurc_interval"][0] < found["aurc"] < found["aurc_interval"][1]
    assert found["aurc_random"] == pytest.approx((truth != 0).mean())
    is_wrong = np.sort(truth != 0)
    perfect = np.mean(is_wrong.cumsum() / np.arange(1, 501))
    assert found["aurc_perfect"] == pytest.approx(perfect, abs=0.001)
    assert found["aurc_perfect"] < found["aurc"] < found["aurc_random"]


def test_curve_ends_at_the_accuracy_of_all_images() -> None:
    truth, probabilities, _ = test = images(731, 4)
    curve = measure_triage(*images(300, 0), *test, PARAMS)["curve"]
    assert 90 <= len(curve) <= 100
    kept = [point["kept"] for point in curve]
    assert kept == sorted(set(kept))
    assert curve[-1] == {
        "kept": 1,
        "accuracy": pytest.approx((truth == 0).mean()),
        "threshold": probabilities.max(axis=1).min(),
    }
    for point in curve:
        is_kept = probabilities.max(axis=1) >= point["threshold"]
        assert point["kept"] == pytest.approx(is_kept.mean())
        assert point["accuracy"] == pytest.approx((truth[is_kept] == 0).mean())


def test_threshold_keeps_what_the_calibration_images_can_answer_for() -> None:
    calibration, test = images(600, 0), images(1000, 1)
    found = measure_triage(*calibration, *test, PARAMS)
    threshold, shown = found["threshold"], found["calibration"]
    assert 0.5 < threshold < 0.8
    is_kept = calibration[1].max(axis=1) >= threshold
    n_wrong, n = int((calibration[0][is_kept] != 0).sum()), int(is_kept.sum())
    exact = binomtest(n_wrong, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert shown == {
        "threshold": threshold,
        "n": 600,
        "kept": n / 600,
        "error": n_wrong / n,
        "error_bound": pytest.approx(exact),
    }
    assert shown["error_bound"] <= 0.05 < found["failed"]["error_bound"]
    assert found["failed"]["threshold"] == pytest.approx(threshold - 0.01)

    is_kept = test[1].max(axis=1) >= threshold
    assert found["test"]["kept"] == pytest.approx(is_kept.mean())
    assert found["test"]["accuracy"] == pytest.approx((test[0][is_kept] == 0).mean())
    assert found["test"]["accuracy_interval"][0] < found["test"]["accuracy"] < found["test"]["accuracy_interval"][1]
    assert found["test"]["n_referred"] == (~is_kept).sum()
    assert found["test"]["n_wrong_kept"] == (test[0][is_kept] != 0).sum()
    assert found["n_wrong"] == (test[0] != 0).sum()
    assert f"{threshold:g}" in found["remark"]
    json.dumps(found, allow_nan=False)


def test_a_limit_that_is_not_kept_is_seldom_claimed() -> None:
    # The error is 5.5 % at every threshold: each claim is false, and 5 % of the calibrations may make one.
    test, claims = images(20, 0), 0
    params = PARAMS.model_copy(update={"bootstrap_samples": 100})
    for seed in range(150):
        random = np.random.default_rng(seed)
        calibration = answers(random.uniform(0.3, 1, 300), random.random(300) < 0.055)
        claims += measure_triage(*calibration, *test, params)["threshold"] is not None
    assert 0 < claims <= 0.05 * 150 + 2 * np.sqrt(0.05 * 0.95 * 150)


def test_everything_is_referred_where_no_threshold_holds() -> None:
    random = np.random.default_rng(0)
    guessing = answers(random.uniform(0.3, 1, 400), random.random(400) < 0.5)
    found = measure_triage(*guessing, *images(200, 1), PARAMS)
    assert found["threshold"] is found["calibration"] is found["test"] is None
    assert found["failed"]["error_bound"] > 0.4
    assert "Refer every image" in found["remark"]
    assert len(found["curve"]) == 100
    json.dumps(found, allow_nan=False)


def test_few_calibration_images_are_told() -> None:
    needed = next(
        n for n in range(2, 200) if binomtest(1, n, alternative="less").proportion_ci(0.95, "exact").high <= 0.05
    )
    certain = answers(np.full(needed, 0.99), np.zeros(needed, bool))
    found = measure_triage(*certain, *images(200, 1), PARAMS)
    assert (found["n_needed"], found["threshold"]) == (needed, 0.25)
    few = measure_triage(*take(certain, np.arange(needed - 1)), *images(200, 1), PARAMS)
    assert few["threshold"] is few["failed"] is None
    assert f"{needed} groups" in few["remark"]
    # Copies are no further images.
    copies = (*certain[:2], np.arange(needed) // 2)
    assert measure_triage(*copies, *images(200, 1), PARAMS)["threshold"] is None


def test_test_images_that_break_the_promise_are_told() -> None:
    random = np.random.default_rng(0)
    unlike = answers(random.uniform(0.4, 1, 500), random.random(500) < 0.3)
    found = measure_triage(*images(600, 0), *unlike, PARAMS)
    assert found["test"]["accuracy"] < 0.8
    assert "break" in found["remark"]


def test_a_single_group_of_test_images_tells_nothing_of_others() -> None:
    truth, probabilities, _ = images(200, 1)
    found = measure_triage(*images(600, 0), truth, probabilities, np.zeros(200, int), PARAMS)
    assert found["aurc_interval"] == found["test"]["accuracy_interval"] == [0, 1]
    assert "break" not in found["remark"]


def test_threshold_that_refers_every_test_image_has_no_accuracy() -> None:
    unsure = answers(np.full(50, 0.3), np.zeros(50, bool))
    found = measure_triage(*images(600, 0), *unsure, PARAMS)
    assert found["test"] == {
        "kept": 0, "accuracy": None, "accuracy_interval": None, "n_referred": 50, "n_wrong_kept": 0
    }  # fmt: skip
    json.dumps(found, allow_nan=False)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_the_images_changes_nothing_even_where_scores_are_equal(seed: int) -> None:
    random = np.random.default_rng(seed)

    def tied(n: int) -> Images:
        scores = random.choice([0.5, 0.7, 0.9, 0.99], n)
        return answers(scores, random.random(n) < 0.1 * (1 - scores), random.integers(0, n // 2, n))

    calibration, test = tied(400), tied(150)
    found = measure_triage(*calibration, *test, PARAMS)
    again = measure_triage(*take(calibration, random.permutation(400)), *take(test, random.permutation(150)), PARAMS)
    assert again == found


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_copies_change_no_figure_and_no_interval(seed: int, times: int) -> None:
    calibration, test = images(300, seed), images(150, seed + 1)
    found = measure_triage(*calibration, *test, PARAMS)
    copied = measure_triage(*calibration, *take(test, np.repeat(np.arange(150), times)), PARAMS)
    for name in ("aurc", "aurc_perfect", "threshold"):
        assert copied[name] == (found[name] if found[name] is None else pytest.approx(found[name]))
    assert copied["aurc_interval"] == pytest.approx(found["aurc_interval"])
    if found["test"]:
        assert copied["test"]["accuracy_interval"] == pytest.approx(found["test"]["accuracy_interval"])
    # Further copies of one calibration image, in its group.
    assert measure_triage(*take(calibration, np.r_[np.arange(300), [5] * 50]), *test, PARAMS) == found


def test_intervals_over_images_instead_of_groups_would_be_narrower() -> None:
    calibration, test = images(600, 0), take(images(200, 1), np.repeat(np.arange(200), 4))
    by_group = measure_triage(*calibration, *test, PARAMS)["aurc_interval"]
    by_image = measure_triage(*calibration, *test[:2], np.arange(800), PARAMS)["aurc_interval"]
    assert np.ptp(by_group) == pytest.approx(2 * np.ptp(by_image), rel=0.25)


def test_2000_resamples_of_1500_images_take_less_than_2_seconds() -> None:
    calibration, test = images(500, 0), images(1500, 1)
    started = time.process_time()
    measure_triage(*calibration, *test, PARAMS.model_copy(update={"bootstrap_samples": 2000}))
    assert time.process_time() - started < 2
