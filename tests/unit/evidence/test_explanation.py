from typing import Any

import numpy as np
import pytest

from braintumor.evidence.explanation import measure_explanation, overlap_of, pointing_game, rank_correlation
from braintumor.labels import CLASS_NAMES
from braintumor.model.densenet import import_keras

SIZE = 16


def one_hot_map(row: int, column: int) -> np.ndarray:
    heat = np.zeros((1, SIZE, SIZE), np.float32)
    heat[0, row, column] = 1
    return heat


def square(top: int, left: int, side: int) -> np.ndarray:
    lesion = np.zeros((SIZE, SIZE), bool)
    lesion[top : top + side, left : left + side] = True
    return lesion


def test_pointing_game_by_hand() -> None:
    maps = np.concatenate([one_hot_map(3, 4), one_hot_map(9, 9), np.zeros((1, SIZE, SIZE), np.float32)])
    # The third lesion covers the first pixel, where the peak of an empty map would be sought.
    lesions = np.stack([square(3, 3, 2), square(3, 3, 2), square(0, 0, 4)])
    assert pointing_game(maps, lesions).tolist() == [True, False, False]


def test_overlap_by_hand() -> None:
    heat = np.zeros((1, SIZE, SIZE), np.float32)
    heat[0, 4, 2:6] = [0.9, 0.8, 0.7, 0.6]
    # The four hottest pixels are those; two lie in this lesion of four: 2 of 6.
    assert overlap_of(heat, square(3, 4, 2)[None]).tolist() == [pytest.approx(2 / 6)]
    # Of a lesion of nine pixels only four have any heat, three of them within: 3 of 10.
    assert overlap_of(heat, square(3, 3, 3)[None]).tolist() == [pytest.approx(3 / 10)]
    assert overlap_of(np.zeros_like(heat), square(3, 3, 3)[None]).tolist() == [0]


def test_rank_correlation_by_hand() -> None:
    rising = np.linspace(0.1, 1, SIZE * SIZE, dtype=np.float32).reshape(1, SIZE, SIZE)
    assert rank_correlation(rising, rising**3) == pytest.approx(1)
    assert rank_correlation(rising, 1.1 - rising) == pytest.approx(-1)
    nothing = np.zeros_like(rising)
    assert rank_correlation(nothing, nothing) == 1
    assert rank_correlation(rising, nothing) == 0


def classifier(contrast: float = 1.0) -> Any:
    """A small network of random weights; with contrast 0 it sees nothing of its images."""
    keras = import_keras()
    keras.utils.set_random_seed(5)
    image = keras.Input((SIZE, SIZE, 1), name="image")
    maps = keras.layers.Rescaling(contrast / 255, name="scaling")(image)
    for name in ("first", "second"):
        maps = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name=name)(maps)
    logits = keras.layers.Dense(4, name="logits")(keras.layers.GlobalAveragePooling2D()(maps))
    return keras.Model(image, keras.layers.Softmax(name="probabilities")(logits))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (12, SIZE, SIZE, 1), np.uint8)


TRUTH = np.arange(12) % 4


def test_maps_that_do_not_depend_on_the_weights_fail_the_check(images: np.ndarray) -> None:
    blind = measure_explanation(classifier(contrast=0), images, TRUTH, None, seed=2)["randomisation"]
    assert not blind["passed"]
    assert [stage["similarity"] for stage in blind["stages"]] == [1, 1, 1]


def test_maps_that_depend_on_the_weights_pass_and_the_weights_stay(images: np.ndarray) -> None:
    model = classifier()
    before = [weight.copy() for weight in model.get_weights()]
    found = measure_explanation(model, images, TRUTH, None, seed=2)
    assert found["randomisation"]["passed"]
    assert [stage["randomised"] for stage in found["randomisation"]["stages"]] == ["logits", "second", "first"]
    assert (found["layer"], found["map_px"], found["n"]) == ("image", SIZE, 12)
    assert found["localisation"] is None
    for weight, was in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, was)


def spot_finder() -> tuple[Any, np.ndarray, dict[int, np.ndarray]]:
    """A network that looks for what is bright, images with a bright spot each, and the spots' masks."""
    keras = import_keras()
    image = keras.Input((SIZE, SIZE, 1), name="image")
    maps = keras.layers.Conv2D(1, 3, padding="same", kernel_initializer="ones", activation="relu", name="maps")(image)
    head = keras.layers.Dense(4, kernel_initializer="ones", name="logits")
    model = keras.Model(image, keras.layers.Softmax()(head(keras.layers.GlobalAveragePooling2D()(maps))))
    images = np.full((8, SIZE, SIZE, 1), 10, np.uint8)
    masks = {}
    for index in range(8):
        masks[index] = square(1 + index, 9 - index, 4)
        images[index, masks[index]] = 250
    return model, images, masks


def test_localisation_of_a_network_that_looks_at_the_lesion() -> None:
    model, images, masks = spot_finder()
    truth = np.arange(8) % 4
    # One lesion is not where the bright spot is.
    masks[0] = square(12, 0, 4)
    found = measure_explanation(model, images, truth, masks, seed=1)["localisation"]
    assert found["n"] == 6, "images without a tumour are left out"
    assert found["pointing_game"] == pytest.approx(5 / 6)
    assert found["chance"] == pytest.approx(16 / 256)
    assert found["overlap_chance"] == pytest.approx(16 / (512 - 16))
    assert set(found["per_class"]) == set(CLASS_NAMES) - {"notumor"}
    assert found["per_class"]["glioma"] == {"n": 2, "pointing_game": 0.5, "overlap": pytest.approx(0.5, abs=0.1)}
    assert found["per_class"]["pituitary"]["overlap"] > 0.8


def test_order_of_the_images_changes_no_figure(images: np.ndarray) -> None:
    model = classifier()
    masks = {index: square(index % 8, 3, 5) for index in range(0, 12, 2)}
    order = np.random.default_rng(3).permutation(12)
    moved = {int(np.flatnonzero(order == index)[0]): mask for index, mask in masks.items()}
    one = measure_explanation(model, images, TRUTH, masks, seed=2)
    other = measure_explanation(model, images[order], TRUTH[order], moved, seed=2)
    assert one["localisation"]["n"] == 6 - 3
    assert one["localisation"]["per_class"].keys() == other["localisation"]["per_class"].keys()
    for name in ("pointing_game", "overlap", "chance"):
        assert one["localisation"][name] == pytest.approx(other["localisation"][name], abs=1e-6)
    for one_stage, other_stage in zip(one["randomisation"]["stages"], other["randomisation"]["stages"], strict=True):
        assert one_stage["similarity"] == pytest.approx(other_stage["similarity"], abs=1e-4)
