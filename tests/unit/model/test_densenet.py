import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braintumor.errors import UserError
from braintumor.model.densenet import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Classifier,
    build_classifier,
    import_keras,
    save_backbone,
)
from braintumor.model.inference import OOD_SCORE, PROBABILITIES, load_classifier, predict, predict_probabilities
from braintumor.model.ood import feature_tensor, fit_ood_head
from braintumor.model.saved import model_digest
from braintumor.model.servable import servable, temperature_of
from braintumor.params import Params


@pytest.fixture(scope="module")
def classifier(recipe: Params) -> Classifier:
    import_keras().utils.set_random_seed(3)
    return build_classifier(recipe.train)


def finished(classifier: Classifier, temperature: float) -> Any:
    """The classifier as it is saved, its score fitted on random numbers."""
    features = np.random.default_rng(4).normal(size=(60, feature_tensor(classifier.network).shape[-1]))
    head = fit_ood_head(features[:40], np.arange(40) % 4, features[40:], 0.05)
    return servable(classifier.network, temperature, head)


@pytest.fixture(scope="module")
def saved(classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.keras"
    finished(classifier, 2.0).save(path)
    return path


@pytest.fixture(scope="module")
def backbone_file(saved: Path) -> Path:
    path = saved.with_name("backbone.weights.h5")
    save_backbone(saved, path)
    return path


def some_images(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 1), np.uint8)


def test_it_is_the_densenet201_of_keras(classifier: Classifier) -> None:
    # Huang et al. 2017, table 1: 6, 12, 48 and 32 dense layers, growth rate 32, 1,920 feature maps.
    names = [layer.name for layer in classifier.backbone.layers]
    dense_layers = [
        sum(name.startswith(f"conv{b}_block") and name.endswith("concat") for name in names) for b in range(2, 6)
    ]
    assert dense_layers == [6, 12, 48, 32]
    assert classifier.backbone.output_shape[-1] == 1920
    assert classifier.backbone.count_params() == 18_321_984


def test_scaling_is_that_of_imagenet(classifier: Classifier) -> None:
    network = classifier.network
    scaled = import_keras().Model(network.input, network.get_layer("scaling").output)
    image = np.full((1, 32, 32, 1), 51.0, np.float32)
    expected = [(0.2 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    np.testing.assert_allclose(np.asarray(scaled(image))[0, 0, 0], expected, rtol=1e-5)


def test_scaling_of_each_image_by_itself_is_a_layer_that_needs_no_code_of_ours(recipe: Params, tmp_path: Path) -> None:
    keras = import_keras()
    built = build_classifier(recipe.train.model_copy(update={"input_scaling": "per_image"}))
    network = keras.Model(built.network.input, built.network.get_layer("scaling").output)
    network.save(tmp_path / "scaling.keras")
    images = some_images(3).astype(np.float32)
    images[1] = images[1] * 0.3 + 40
    images[2] = 0
    scaled = np.asarray(keras.models.load_model(tmp_path / "scaling.keras")(images))
    assert scaled.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(scaled.mean(axis=(1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(scaled[:2].std(axis=(1, 2, 3)), 1, atol=1e-2)
    # Whatever the brightness and the contrast; and nothing is divided by 0.
    again = np.asarray(network(images * 0.5 + 60))
    np.testing.assert_allclose(again[:2], scaled[:2], atol=1e-2)
    assert (scaled[2] == 0).all()


def test_batch_norm_trains_from_scratch_and_rests_with_pretrained_weights(
    recipe: Params, classifier: Classifier, backbone_file: Path
) -> None:
    keras = import_keras()
    pretrained = recipe.train.model_copy(update={"weights": str(backbone_file)})
    fine_tuned = build_classifier(pretrained)
    asked = build_classifier(pretrained.model_copy(update={"batch_norm": "train"}))

    def batch_norms(built: Classifier) -> set[bool]:
        return {
            layer.trainable for layer in built.backbone.layers if isinstance(layer, keras.layers.BatchNormalization)
        }

    assert batch_norms(classifier) == {True}
    assert batch_norms(fine_tuned) == {False}
    assert batch_norms(asked) == {True}


def test_temperature_divides_the_logits(classifier: Classifier, saved: Path) -> None:
    images = some_images(3)
    logits = classifier.network.predict(images.astype(np.float32), verbose=0) / 2.0
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predict_probabilities(load_classifier(saved), images), expected, atol=1e-6)


def test_backbone_file_is_small_and_gives_the_weights_back(
    recipe: Params, classifier: Classifier, backbone_file: Path
) -> None:
    assert backbone_file.stat().st_size < 40e6
    loaded = build_classifier(recipe.train.model_copy(update={"weights": str(backbone_file)}))
    for expected, found in zip(classifier.backbone.get_weights(), loaded.backbone.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert [path.name for path in backbone_file.parent.iterdir() if path.name.startswith(".")] == []


def test_weights_that_are_missing_or_foreign_are_refused(recipe: Params, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.weights.h5"
    foreign.write_text("no weights")
    for weights, told in ((tmp_path / "gone.weights.h5", "is missing"), (foreign, "does not hold the weights")):
        with pytest.raises(UserError, match=told):
            build_classifier(recipe.train.model_copy(update={"weights": str(weights)}))


def test_imagenet_without_internet_names_the_remedies(
    recipe: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    monkeypatch.setattr("keras.src.utils.file_utils.config.keras_home", lambda: str(tmp_path))
    # A proxy that nobody listens at: the download fails as it does without internet.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert keras.config.dtype_policy().name == "float32"
    with pytest.raises(UserError, match=r"give its path or s3:// address as train\.weights"):
        build_classifier(recipe.train.model_copy(update={"weights": "imagenet"}))


def test_saved_model_gives_probabilities_and_a_score_for_each_image(saved: Path) -> None:
    model = load_classifier(saved)
    outputs = predict(model, some_images(3))
    assert set(model.output) == {PROBABILITIES, OOD_SCORE}
    assert outputs.probabilities.shape == (3, 4)
    assert outputs.ood_scores is not None and outputs.ood_scores.shape == (3,)
    assert temperature_of(model) == pytest.approx(2.0)
    nothing = predict(model, some_images(0))
    assert nothing.ood_scores is not None and nothing.ood_scores.shape == (0,)


def test_model_of_before_there_was_a_score_still_predicts(saved: Path, tmp_path: Path) -> None:
    keras = import_keras()
    model = load_classifier(saved)
    keras.Model(model.input, model.output[PROBABILITIES]).save(tmp_path / "old.keras")
    outputs = predict(load_classifier(tmp_path / "old.keras"), some_images(3))
    assert outputs.ood_scores is None
    np.testing.assert_allclose(outputs.probabilities, predict_probabilities(model, some_images(3)), atol=1e-6)


def test_digest_is_of_the_model_and_not_of_the_file(classifier: Classifier, saved: Path, tmp_path: Path) -> None:
    again, cooler = tmp_path / "again.keras", tmp_path / "cooler.keras"
    load_classifier(saved).save(again)
    finished(classifier, 2.5).save(cooler)
    assert again.read_bytes() != saved.read_bytes()
    assert model_digest(again) == model_digest(saved)
    assert model_digest(cooler) != model_digest(saved)


def test_digest_sees_a_single_changed_weight(saved: Path, tmp_path: Path) -> None:
    model = load_classifier(saved)
    kernel = model.get_layer("logits").kernel
    values = np.asarray(kernel).copy()
    values[0, 0] = np.nextafter(values[0, 0], np.float32(10))
    kernel.assign(values)
    model.save(tmp_path / "changed.keras")
    assert model_digest(tmp_path / "changed.keras") != model_digest(saved)


@pytest.mark.parametrize("content", [None, b"", b"no zip"])
def test_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.keras"
    if content is not None:
        path.write_bytes(content)
    for read in (model_digest, load_classifier):
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)


def test_archive_without_a_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    for read in (model_digest, load_classifier):
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)


def test_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    keras = import_keras()
    image = keras.Input((8, 8, 3))
    keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(image))).save(tmp_path / "colour.keras")
    with pytest.raises(UserError, match="a classifier takes"):
        load_classifier(tmp_path / "colour.keras")


def test_no_images_give_no_probabilities(saved: Path) -> None:
    assert predict_probabilities(load_classifier(saved), np.empty((0, 32, 32, 1), np.uint8)).shape == (0, 4)
