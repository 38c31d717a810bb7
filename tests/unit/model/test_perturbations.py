import numpy as np
import pytest

from braintumor.model.images import resize_square
from braintumor.model.perturbations import PERTURBATIONS, Images


@pytest.fixture(scope="module")
def slices() -> Images:
    """Six discs with structure in them, on black; as many pixels as the weakest blur needs."""
    random = np.random.default_rng(3)
    rows, columns = np.mgrid[:96, :96]
    images = []
    for _ in range(6):
        inside = np.hypot(rows - random.uniform(40, 56), columns - random.uniform(40, 56)) < random.uniform(28, 40)
        detail = resize_square(random.integers(40, 220, (24, 24)).astype(np.uint8), 96)
        images.append(np.where(inside, detail, 0))
    return np.stack(images).astype(np.uint8)[..., None]


def distance(images: Images, others: Images) -> float:
    return float(np.abs(images.astype(float) - others).mean())


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_no_severity_changes_nothing(kind: str, slices: Images) -> None:
    assert np.array_equal(PERTURBATIONS[kind].apply(slices, 0, seed=1), slices)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_each_severity_is_further_from_the_original_than_the_one_before(kind: str, slices: Images) -> None:
    perturbation = PERTURBATIONS[kind]
    changed = [perturbation.apply(slices, severity, seed=1) for severity in perturbation.severities]
    distances = [0.0, *(distance(slices, images) for images in changed)]
    assert len(changed) == 4
    assert (np.diff(distances) > 0.1).all()
    assert all(images.dtype == np.uint8 and images.shape == slices.shape for images in changed)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_the_change_of_an_image_does_not_depend_on_the_others(kind: str, slices: Images) -> None:
    perturbation = PERTURBATIONS[kind]
    severity = perturbation.severities[2]
    changed = perturbation.apply(slices, severity, seed=1)
    order = np.array([4, 0, 5])
    assert np.array_equal(perturbation.apply(slices[order], severity, seed=1), changed[order])


@pytest.mark.parametrize("kind", ["noise", "bias field", "shift"])
def test_another_seed_changes_otherwise(kind: str, slices: Images) -> None:
    perturbation = PERTURBATIONS[kind]
    one, other = (perturbation.apply(slices, perturbation.severities[2], seed) for seed in (1, 2))
    assert distance(one, other) > 1


def test_noise_deviates_as_named() -> None:
    grey = np.full((1, 64, 64, 1), 120, np.uint8)
    assert PERTURBATIONS["noise"].apply(grey, 10, seed=1).std() == pytest.approx(10, rel=0.05)


def test_shift_is_as_long_as_named() -> None:
    dot = np.zeros((1, 101, 101, 1), np.uint8)
    dot[0, 48:53, 48:53] = 200
    moved = PERTURBATIONS["shift"].apply(dot, 20, seed=1)[0, ..., 0]
    rows, columns = np.nonzero(moved > 50)
    assert np.hypot(rows.mean() - 50, columns.mean() - 50) == pytest.approx(20, abs=0.7)


def test_rotation_turns_as_far_as_named() -> None:
    bar = np.zeros((1, 101, 101, 1), np.uint8)
    bar[0, 48:53, 60:90] = 200
    turned = PERTURBATIONS["rotation"].apply(bar, 40, seed=1)[0, ..., 0]
    rows, columns = np.nonzero(turned > 100)
    angle = np.degrees(np.arctan2(rows.mean() - 50, columns.mean() - 50))
    assert abs(angle) == pytest.approx(40, abs=1)


def test_bias_field_reaches_the_gain_that_is_named_and_no_more() -> None:
    grey = np.full((1, 64, 64, 1), 60, np.uint8)
    gain = PERTURBATIONS["bias field"].apply(grey, 1, seed=1) / 60
    assert np.abs(np.log2(gain)).max() == pytest.approx(1, abs=0.03)


def test_contrast_is_a_power_of_the_grey_level() -> None:
    grey = np.full((1, 8, 8, 1), 64, np.uint8)
    changed = PERTURBATIONS["contrast"].apply(grey, 1, seed=1)
    assert set(np.unique(changed)) <= {round(255 * (64 / 255) ** 2), round(255 * (64 / 255) ** 0.5)}


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_blank_image_stays_finite(kind: str) -> None:
    black = np.zeros((1, 32, 32, 1), np.uint8)
    assert PERTURBATIONS[kind].apply(black, PERTURBATIONS[kind].severities[-1], seed=1).shape == black.shape
