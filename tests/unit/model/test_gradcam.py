from typing import Any

import numpy as np
import pytest

from braintumor.errors import UserError
from braintumor.model.densenet import import_keras
from braintumor.model.gradcam import explained_layer, heat_maps, overlay, randomised_in_cascade

SIZE = 16


@pytest.fixture(scope="module")
def layers() -> Any:
    return import_keras().layers


def network(image: Any, logits: Any) -> Any:
    """A classifier as it is saved, of its logits."""
    keras = import_keras()
    return keras.Model(image, {"probabilities": keras.layers.Softmax(name="probabilities")(logits)}, name="tiny")


def pooled(layers: Any, *convolutions: Any) -> Any:
    """A network of convolutions, global average pooling and one dense layer."""
    image = import_keras().Input((SIZE, SIZE, 1), name="image")
    maps = image
    for convolution in convolutions:
        maps = convolution(maps)
    return network(image, layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(maps)))


def some_images(n: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 1), np.uint8)


@pytest.fixture
def trained(layers: Any) -> Any:
    import_keras().utils.set_random_seed(4)
    return pooled(
        layers,
        layers.Conv2D(6, 3, padding="same", activation="relu", name="first"),
        layers.Conv2D(5, 3, padding="same", activation="relu", name="last"),
    )


@pytest.mark.parametrize("method", ["grad-cam", "hirescam"])
def test_after_the_last_maps_it_is_the_class_activation_map(trained: Any, method: Any) -> None:
    # Zhou et al., CVPR 2016: the maps, weighted by what the dense layer makes of each.
    images = some_images(3)
    maps = import_keras().Model(trained.input, trained.get_layer("last").output)(images.astype(np.float32)).numpy()
    kernel, _ = trained.get_layer("logits").get_weights()
    expected = np.maximum(np.einsum("nhwk,kc->nchw", maps, kernel), 0)
    expected /= np.maximum(expected.max(axis=(2, 3), keepdims=True), 1e-12)
    found = heat_maps(trained, images, layer="last", method=method)
    assert found.shape == (3, 4, SIZE, SIZE)
    assert found.dtype == np.float32
    assert expected.any(axis=(2, 3)).sum() > 3
    np.testing.assert_allclose(found, expected, atol=1e-4)


def corner_network(layers: Any) -> Any:
    """Class 2 rests on the upper left quarter, class 3 speaks against it, and the others rest on nothing."""
    image = import_keras().Input((SIZE, SIZE, 1), name="image")
    maps = layers.Conv2D(1, 1, kernel_initializer="ones", name="maps")(image)
    head = layers.Dense(4, name="logits")
    model = network(image, head(layers.Flatten()(maps)))
    kernel = np.zeros((SIZE, SIZE, 4), np.float32)
    kernel[:8, :8, 2], kernel[:8, :8, 3] = 1, -1
    head.set_weights([kernel.reshape(-1, 4), np.zeros(4)])
    return model


def test_it_is_hot_where_the_evidence_is_and_nowhere_else(layers: Any) -> None:
    images = some_images(2)
    maps = heat_maps(corner_network(layers), images)
    seen = images[..., 0].astype(float)
    seen[:, 8:], seen[:, :, 8:] = 0, 0
    np.testing.assert_allclose(maps[:, 2], seen / seen.max(axis=(1, 2), keepdims=True), atol=1e-5)
    # Nothing speaks for these, or what there is speaks against them.
    assert not maps[:, [0, 1, 3]].any()


@pytest.mark.parametrize("method", ["grad-cam", "hirescam", "layercam"])
@pytest.mark.parametrize("value", [0, 200])
def test_an_even_image_points_nowhere(layers: Any, method: Any, value: int) -> None:
    model = pooled(layers, layers.Conv2D(2, 1, kernel_initializer="ones", use_bias=False, name="maps"))
    maps = heat_maps(model, np.full((1, SIZE, SIZE, 1), value, np.uint8), method=method)
    assert np.isfinite(maps).all()
    assert not maps.any()


def test_company_changes_no_map(trained: Any) -> None:
    images = some_images(20)
    together = heat_maps(trained, images)
    alone = [heat_maps(trained, images[index : index + 1])[0] for index in (0, 7, 19)]
    np.testing.assert_allclose(together[[0, 7, 19]], alone, atol=1e-5)
    assert heat_maps(trained, images[:0]).shape == (0, 4, SIZE, SIZE)


def test_classes_that_are_asked_for_are_those_of_all(trained: Any) -> None:
    images = some_images(3)
    wanted = np.array([[0, 2], [3, 3], [1, 0]])
    every = heat_maps(trained, images)
    np.testing.assert_allclose(heat_maps(trained, images, wanted), every[np.arange(3)[:, None], wanted], atol=1e-5)


def test_the_first_layer_of_the_coarsest_fine_maps_is_explained(layers: Any) -> None:
    image = import_keras().Input((64, 64, 1), name="image")
    maps = image
    for name, strides in (("half", 2), ("quarter", 2), ("again", 1), ("eighth", 2)):
        maps = layers.Conv2D(2, 3, strides=strides, padding="same", name=name)(maps)
    model = network(image, layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(maps)))
    assert explained_layer(model) == "quarter"


def test_no_layer_is_explained_that_another_path_leads_around(layers: Any) -> None:
    image = import_keras().Input((32, 32, 1), name="image")
    paths = [layers.Conv2D(2, 3, strides=2, padding="same", name=name)(image) for name in ("left", "right")]
    joined = layers.Concatenate(name="joined")(paths)
    coarse = layers.Conv2D(4, 3, strides=4, padding="same", name="coarse")(joined)
    model = network(image, layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(coarse)))
    assert explained_layer(model) == "joined"


def test_of_coarse_maps_alone_the_finest_is_explained(layers: Any) -> None:
    image = import_keras().Input((12, 12, 1), name="image")
    maps = layers.Conv2D(2, 3, strides=2, padding="same", name="coarse")(image)
    model = network(image, layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(maps)))
    assert explained_layer(model) == "image"
    assert heat_maps(model, some_images(2, 12)).shape == (2, 4, 12, 12)


def test_a_model_without_logits_is_refused(layers: Any) -> None:
    keras = import_keras()
    image = keras.Input((SIZE, SIZE, 1), name="image")
    model = keras.Model(image, layers.Dense(4, activation="softmax")(layers.Flatten()(image)))
    with pytest.raises(UserError, match="no layer 'logits'"):
        heat_maps(model, some_images(1))


def test_a_spot_is_found_where_it_is_in_the_maps_of_a_backbone(layers: Any) -> None:
    """The first layers of the backbone are DenseNet's: padding, stride 2, padding, pooling."""
    keras = import_keras()
    colour = keras.Input((64, 64, 1))
    maps = layers.Conv2D(1, 7, strides=2, kernel_initializer="ones")(layers.ZeroPadding2D(3)(colour))
    maps = layers.MaxPooling2D(3, strides=2, name="maps")(layers.ZeroPadding2D(1)(maps))
    backbone = keras.Model(colour, layers.AveragePooling2D(4)(maps), name="densenet201")
    image = keras.Input((64, 64, 1), name="image")
    scaled = layers.Rescaling(1 / 255, name="scaling")(image)
    features = layers.GlobalAveragePooling2D(name="features")(backbone(scaled))
    model = network(image, layers.Dense(4, kernel_initializer="ones", name="logits")(features))
    images = np.zeros((2, 64, 64, 1), np.uint8)
    places = [(20, 36), (33, 15)]
    for spotted, (row, column) in zip(images, places, strict=True):
        spotted[row - 1 : row + 2, column - 1 : column + 2] = 255
    assert explained_layer(model) == "maps"
    for heat, place in zip(heat_maps(model, images)[:, 0], places, strict=True):
        centre = [float((heat.sum(axis=axis) * np.arange(64)).sum() / heat.sum()) for axis in (1, 0)]
        np.testing.assert_allclose(centre, place, atol=1)


def test_weights_are_drawn_anew_from_the_logits_down_and_the_models_own_stay(trained: Any) -> None:
    before = [weight.copy() for weight in trained.get_weights()]
    images = some_images(4)
    maps, seen = heat_maps(trained, images), []
    for stage, copy in randomised_in_cascade(trained, seed=1):
        seen.append(stage)
        for layer in ("logits", "last", "first"):
            is_new = not np.array_equal(
                copy.get_layer(layer).get_weights()[0], trained.get_layer(layer).get_weights()[0]
            )
            assert is_new == (layer in seen)
        assert not np.allclose(heat_maps(copy, images), maps, atol=0.05)
    assert seen == ["logits", "last", "first"]
    for weight, was in zip(trained.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, was)


def test_the_same_seed_gives_the_same_random_network(trained: Any) -> None:
    first, second = ([copy.get_weights() for _, copy in randomised_in_cascade(trained, seed=3)] for _ in range(2))
    for one, other in zip(first[-1], second[-1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_overlay_colours_what_is_hot_and_leaves_the_rest() -> None:
    image = np.full((40, 40), 100, np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[2, 2] = 1
    pixels = np.asarray(overlay(image, heat)).astype(int)
    assert pixels.shape == (40, 40, 3)
    assert (pixels[25:, 25:] == 100).all()
    hot = pixels[12, 12]
    # Bright, and no grey; and an outline around it.
    assert hot.mean() > 130
    assert np.ptp(hot) > 40
    assert (pixels == 255).all(axis=2).any()
    assert (np.asarray(overlay(image, np.zeros((8, 8), np.float32))) == 100).all()
