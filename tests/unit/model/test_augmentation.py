import numpy as np
import pytest
import tensorflow as tf

from braintumor.model.augmentation import N_DRAWS, augment
from braintumor.params import Augmentation

NOTHING = {
    "rotation_degrees": 0, "shift_fraction": 0, "zoom_fraction": 0, "contrast_fraction": 0, "flip_horizontal": False,
}  # fmt: skip


def images(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (n, 16, 16, 1)).astype(np.float32)


def drawn(n: int) -> np.ndarray:
    return np.random.default_rng(1).random((n, N_DRAWS), np.float32)


def augmented(batch: np.ndarray, draws: np.ndarray | None = None, **changes: object) -> np.ndarray:
    draws = drawn(len(batch)) if draws is None else draws
    return augment(tf.constant(batch), tf.constant(draws), Augmentation.model_validate(NOTHING | changes)).numpy()


def test_nothing_turned_on_changes_nothing() -> None:
    np.testing.assert_allclose(augmented(images(4)), images(4), atol=1e-3)


def test_flip_mirrors_about_half_of_the_images_exactly() -> None:
    batch = images(200)
    result = augmented(batch, flip_horizontal=True)
    is_same = np.isclose(result, batch, atol=1e-2).all(axis=(1, 2, 3))
    is_mirrored = np.isclose(result, batch[:, :, ::-1], atol=1e-2).all(axis=(1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    assert 70 < is_mirrored.sum() < 130


def test_rotation_stays_within_its_degrees() -> None:
    line = np.zeros((60, 65, 65, 1), np.float32)
    line[:, 32, 33:, 0] = 255  # from the centre to the right
    rows, columns = np.mgrid[-32:33, -32:33]
    result = augmented(line, rotation_degrees=20)[..., 0]
    total = result.sum(axis=(1, 2))
    angles = np.degrees(
        np.arctan2((result * rows).sum(axis=(1, 2)) / total, (result * columns).sum(axis=(1, 2)) / total)
    )
    assert np.abs(angles).max() <= 20.5
    assert angles.min() < -10 < 10 < angles.max()


def test_shift_stays_within_its_fraction() -> None:
    dot = np.zeros((60, 41, 41, 1), np.float32)
    dot[:, 20, 20] = 255
    result = augmented(dot, shift_fraction=0.1)[..., 0]
    places = np.array([np.argwhere(image == image.max())[0] - 20 for image in result])
    assert np.abs(places).max() <= 5
    assert np.abs(places).max() >= 3


def test_contrast_keeps_the_mean_and_scales_the_spread() -> None:
    batch = np.random.default_rng(0).uniform(100, 150, (50, 16, 16, 1)).astype(np.float32)
    result = augmented(batch, contrast_fraction=0.2)
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), batch.mean(axis=(1, 2, 3)), rtol=1e-4)
    ratios = result.std(axis=(1, 2, 3)) / batch.std(axis=(1, 2, 3))
    assert 0.8 <= ratios.min() < 0.9
    assert 1.1 < ratios.max() <= 1.2001


EVERYTHING: dict[str, object] = {
    "rotation_degrees": 20, "shift_fraction": 0.1, "zoom_fraction": 0.1, "contrast_fraction": 0.2,
    "flip_horizontal": True,
}  # fmt: skip


def test_draws_in_the_middle_change_nothing() -> None:
    draws = np.full((4, N_DRAWS), 0.5, np.float32)
    np.testing.assert_allclose(augmented(images(4), draws, **EVERYTHING), images(4), atol=1e-2)


@pytest.mark.parametrize("number", range(N_DRAWS))
def test_each_draw_changes_its_own_image_alone(number: int) -> None:
    draws = np.full((3, N_DRAWS), 0.5, np.float32)
    draws[1, number] = 0.1
    result = augmented(images(3), draws, **EVERYTHING)
    is_same = np.isclose(result, images(3), atol=1e-2).all(axis=(1, 2, 3))
    assert is_same.tolist() == [True, False, True]


def test_image_is_augmented_alike_in_whatever_batch_it_stands() -> None:
    whole = augmented(images(8), drawn(8), **EVERYTHING)
    for part in (slice(3, 4), slice(2, 7)):
        np.testing.assert_array_equal(augmented(images(8)[part], drawn(8)[part], **EVERYTHING), whole[part])


def test_graph_and_eager_calls_give_the_same_images() -> None:
    params = Augmentation.model_validate(EVERYTHING)
    spec = [tf.TensorSpec((None, 16, 16, 1)), tf.TensorSpec((None, N_DRAWS))]
    graph = tf.function(lambda batch, draws: augment(batch, draws, params), input_signature=spec)
    np.testing.assert_allclose(graph(images(8), drawn(8)), augmented(images(8), **EVERYTHING), atol=1e-3)
