import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.evidence.shift import measure_ood, measure_robustness, ood_auroc, robustness_images_scored
from braintumor.model.perturbations import PERTURBATIONS

TEST = np.array([0.2, 0.4, 0.9, 1.2])
PROBES = {"noise": np.array([2.0, 3.0]), "cropped": np.array([0.3, 1.0, 1.0])}
TOLD = {"noise": "by chance", "cropped": "a corner"}


def pairs_won(probe: NDArray[np.float64]) -> float:
    """The Mann-Whitney form of the AUROC, counted by hand."""
    pairs = list(itertools.product(TEST, probe))
    return sum((high > low) + (high == low) / 2 for low, high in pairs) / len(pairs)


def test_auroc_of_each_kind_is_the_share_of_pairs_in_the_right_order() -> None:
    section = measure_ood(TEST, PROBES, TOLD)
    for kind, scores in PROBES.items():
        assert section["kinds"][kind]["auroc"] == pytest.approx(pairs_won(scores))
    assert section["kinds"]["cropped"] == {
        "n": 3,
        "auroc": pytest.approx(7 / 12),
        "flagged_share": 0.0,
        "told": "a corner",
    }
    assert section["in_distribution"] == {"n": 4, "flagged_share": 0.25}
    assert section["lowest"] == "cropped"
    assert section["auroc"] == pytest.approx((1 + 7 / 12) / 2)


def test_a_score_at_the_threshold_is_not_flagged() -> None:
    assert measure_ood(np.array([1.0]), {"noise": np.array([1.0, 1.1])}, TOLD)["kinds"]["noise"]["flagged_share"] == 0.5


def test_auroc_is_the_same_for_rows_and_kinds_in_any_order() -> None:
    turned = {kind: scores[::-1] for kind, scores in reversed(PROBES.items())}
    assert ood_auroc(TEST[::-1], turned) == ood_auroc(TEST, PROBES) == measure_ood(TEST, PROBES, TOLD)["auroc"]


def test_scores_that_see_no_difference_have_an_auroc_of_one_half() -> None:
    assert ood_auroc(TEST, {"same": TEST}) == 0.5


@pytest.mark.parametrize("scores", [{}, {"noise": np.array([])}, {"noise": np.array([np.nan, 1.0])}])
def test_missing_and_undefined_scores_are_refused(scores: dict[str, NDArray[np.float64]]) -> None:
    with pytest.raises(UserError):
        ood_auroc(TEST, scores)


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    random = np.random.default_rng(0)
    levels = np.repeat([30, 90, 150, 210], 4)[:, None, None, None]
    return (levels + random.integers(-20, 21, (16, 24, 24, 1))).astype(np.uint8)


TRUTH = np.repeat(np.arange(4), 4)


def by_brightness(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """A model that looks at the mean grey level alone."""
    return np.eye(4)[np.clip(images.mean(axis=(1, 2, 3)) // 60, 0, 3).astype(int)]


def test_a_model_of_brightness_withstands_blur_but_not_contrast(images: NDArray[np.uint8]) -> None:
    section = measure_robustness(by_brightness, images, TRUTH, seed=1)
    assert section is not None
    assert section["n"] == 16
    assert section["clean_accuracy"] == 1
    assert list(section["kinds"]) == list(PERTURBATIONS)
    assert section["kinds"]["blur"]["retained"] == 1
    assert section["kinds"]["contrast"]["retained"] < 0.9
    contrast = section["kinds"]["contrast"]
    assert contrast["retained"] == pytest.approx(np.mean(contrast["accuracy"]))
    assert section["retained"] == pytest.approx(np.mean([kind["retained"] for kind in section["kinds"].values()]))


def test_robustness_is_the_same_for_images_in_any_order(images: NDArray[np.uint8]) -> None:
    order = np.random.default_rng(1).permutation(16)
    assert measure_robustness(by_brightness, images[order], TRUTH[order], seed=1) == measure_robustness(
        by_brightness, images, TRUTH, seed=1
    )


def test_every_scored_image_is_counted(images: NDArray[np.uint8]) -> None:
    counted = []
    measure_robustness(by_brightness, images, TRUTH, seed=1, on_image=lambda: counted.append(1))
    assert len(counted) == robustness_images_scored(16)


def test_no_images_give_no_section(images: NDArray[np.uint8]) -> None:
    assert measure_robustness(by_brightness, images[:0], TRUTH[:0], seed=1) is None


def test_a_model_that_is_never_right_retains_nothing(images: NDArray[np.uint8]) -> None:
    section = measure_robustness(by_brightness, images, (TRUTH + 2) % 4, seed=1)
    assert section is not None
    assert section["clean_accuracy"] == 0
    assert section["retained"] == 0
