import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from braintumor.evidence.bootstrap import (
    group_sums,
    mean_interval,
    one_of_each_group,
    ratio_interval,
    resample_groups,
)
from braintumor.params import EvaluateParams

PARAMS = EvaluateParams(
    bootstrap_samples=2000, confidence_level=0.95, seed=0, conformal_confidence=0.9, triage_max_error=0.05,
    ood_probes=8, robustness_images=0, gallery_images=0,
)  # fmt: skip


def images(n_groups: int, seed: int = 0, share: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Values 0 and 1 that the copies in a group share, and the groups, of one to six images."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 7, n_groups)
    return np.repeat(random.random(n_groups) < share, sizes).astype(float), np.repeat(np.arange(n_groups), sizes)


def test_every_resample_draws_as_many_groups_as_there_are() -> None:
    drawn = resample_groups(30, PARAMS)
    assert drawn.shape == (2000, 30)
    assert drawn.dtype == np.int64
    assert (drawn.sum(axis=1) == 30).all()
    drawn[:] = 0
    assert resample_groups(30, PARAMS).sum() == 2000 * 30


def test_interval_agrees_with_scipys_bootstrap_where_each_image_is_its_own_group() -> None:
    values = np.random.default_rng(1).normal(3, 1, 200)
    expected = bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0).confidence_interval
    found = mean_interval(values, np.arange(200), PARAMS, is_share=False)
    assert found == pytest.approx([expected.low, expected.high], abs=0.02)


def test_interval_agrees_with_a_case_worked_by_hand() -> None:
    # Two groups, one right and one wrong: a resample holds 0, 1 or 2 right ones with 1/4, 1/2 and 1/4.
    assert mean_interval([1, 0], [7, 3], PARAMS) == [0, 1]
    # Three images right of four: with the larger group drawn once, or never, or twice.
    halves = PARAMS.model_copy(update={"confidence_level": 0.51})
    assert mean_interval([1, 1, 1, 0], [5, 5, 5, 9], halves) == pytest.approx([0, 1])
    assert ratio_interval([3, 0], [3, 1], [5, 9], halves) == pytest.approx([0, 1])


@pytest.mark.parametrize("share", [0, 1])
def test_share_of_0_or_1_reaches_to_the_exact_bound_for_as_many_groups(share: int) -> None:
    groups = np.repeat(np.arange(40), 5)
    exact = binomtest(40 * share, 40).proportion_ci(0.95, method="exact")
    assert mean_interval(np.full(200, share), groups, PARAMS) == pytest.approx([exact.low, exact.high])


def test_share_within_one_group_is_unknown() -> None:
    assert mean_interval([1, 0, 1], [4, 4, 4], PARAMS) == [0, 1]


def test_groups_without_a_denominator_change_nothing() -> None:
    values, groups = images(50)
    alone = ratio_interval(values, np.ones(len(values)), groups, PARAMS)
    others = np.arange(1000, 1300)
    with_others = ratio_interval(
        np.append(values, np.zeros(300)), np.append(np.ones(len(values)), np.zeros(300)),
        np.append(groups, others), PARAMS,
    )  # fmt: skip
    assert with_others == alone
    with pytest.raises(ValueError, match="denominator"):
        ratio_interval([0.0], [0.0], [1], PARAMS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_the_images_changes_no_bit(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = random.integers(0, 20, 80)
    values = random.random(80)
    order = random.permutation(80)
    assert np.array_equal(group_sums(values[order, None], groups[order]), group_sums(values[:, None], groups))
    assert mean_interval(values[order], groups[order], PARAMS) == mean_interval(values, groups, PARAMS)
    picked, again = (
        one_of_each_group(values[:, None], groups, PARAMS),
        order[one_of_each_group(values[order, None], groups[order], PARAMS)],
    )
    assert np.array_equal(picked, again)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_copying_every_image_as_often_changes_no_interval(seed: int, times: int) -> None:
    values, groups = images(40, seed)
    copied = mean_interval(np.repeat(values, times), np.repeat(groups, times), PARAMS)
    assert copied == pytest.approx(mean_interval(values, groups, PARAMS), abs=1e-12)


def test_a_bootstrap_over_images_would_claim_more_than_one_over_groups() -> None:
    random = np.random.default_rng(3)
    values, groups = np.repeat(random.random(60) < 0.8, 6), np.repeat(np.arange(60), 6)
    low, high = mean_interval(values, groups, PARAMS)
    naive_low, naive_high = mean_interval(values, np.arange(360), PARAMS)
    # Six copies of each of 60 images are worth 60 images: the root of six is 2.4.
    assert (high - low) / (naive_high - naive_low) == pytest.approx(np.sqrt(6), rel=0.1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    params = PARAMS.model_copy(update={"bootstrap_samples": 300})
    held = []
    for seed in range(300):
        values, groups = images(120, seed)
        low, high = mean_interval(values, groups, params)
        held.append(low <= 0.8 <= high)
    assert 0.91 <= np.mean(held) <= 0.98


def test_one_image_of_each_group_is_drawn_evenly() -> None:
    groups = np.repeat(np.arange(3000), 3)
    which = np.tile(np.arange(3.0), 3000)
    picked = one_of_each_group(which[:, None], groups, PARAMS)
    assert np.array_equal(groups[picked], np.arange(3000))
    assert np.bincount(which[picked].astype(int)) == pytest.approx([1000, 1000, 1000], abs=100)


def test_copies_change_nothing_of_what_is_drawn() -> None:
    random = np.random.default_rng(0)
    values, groups = random.random(90), random.integers(0, 30, 90)
    drawn = values[one_of_each_group(values[:, None], groups, PARAMS)]
    copied, of_group = np.repeat(values, 4), np.repeat(groups, 4)
    assert np.array_equal(copied[one_of_each_group(copied[:, None], of_group, PARAMS)], drawn)
