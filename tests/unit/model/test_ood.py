from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from braintumor.model.densenet import build_classifier, import_keras
from braintumor.model.ood import attach_ood_score, feature_tensor, fit_ood_head, fit_ood_score, score_features
from braintumor.params import Params

ALARM_SHARE = 0.05
Array = NDArray[np.float64]


def draw_features(n: int, seed: int, d: int = 40) -> tuple[Array, NDArray[np.int64]]:
    """Four classes around means of their own, in a few correlated directions, of very different scales."""
    means = np.random.default_rng(0).normal(size=(4, 6)) * 3
    mixing = np.random.default_rng(1).normal(size=(6, d)) * np.geomspace(1e-3, 1e2, d)
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    places = means[labels] + random.normal(size=(n, 6))
    return places @ mixing + random.normal(size=(n, d)) * 0.1 * np.geomspace(1e-3, 1e2, d), labels


def test_about_the_share_asked_for_of_images_like_the_calibration_ones_is_an_alarm() -> None:
    train, labels = draw_features(600, seed=2)
    alarms = []
    for seed in range(20):
        calibration, _ = draw_features(200, seed=100 + seed)
        head = fit_ood_head(train, labels, calibration, ALARM_SHARE, -train, seed=1)
        fresh, _ = draw_features(1000, seed=200 + seed)
        alarms.append((score_features(head, fresh) > 1).mean())
    assert np.mean(alarms) == pytest.approx(ALARM_SHARE, abs=0.015)


def test_threshold_is_the_conformal_quantile_of_the_calibration_images() -> None:
    train, labels = draw_features(300, seed=2)
    calibration, _ = draw_features(99, seed=3)
    head = fit_ood_head(train, labels, calibration, ALARM_SHARE, -train, seed=1)
    scores = np.sort(score_features(head, calibration))
    # The 95th of 99: (99 + 1) * 0.95.
    assert scores[94] == pytest.approx(1)
    assert scores[93] < 1 < scores[95]


def test_what_lies_far_away_scores_higher_the_farther_it_is() -> None:
    train, labels = draw_features(300, seed=2)
    head = fit_ood_head(train, labels, draw_features(60, seed=3)[0], ALARM_SHARE)
    away = train[:1] + np.outer([1, 3, 10], train.std(axis=0)) * np.sign(np.random.default_rng(1).normal(size=40))
    scores = score_features(head, away)
    assert (scores > 1).all()
    assert (np.diff(scores) > 0).all()


def test_distance_is_mahalanobis_to_the_nearest_class_in_a_case_worked_by_hand() -> None:
    # Two classes at (0, 0) and (10, 0), of variance 1 along the first axis and 4 along the second.
    offsets = np.array([[1, 2], [1, -2], [-1, 2], [-1, -2]] * 200, float)
    train = np.concatenate([offsets, offsets + np.array([10.0, 0.0])])
    labels = np.repeat([0, 1], len(offsets))
    calibration = np.array([[0, 0], [1, 0], [2, 0], [3, 0]], float)
    head = fit_ood_head(train, labels, calibration, 0.4)
    # Squared distances 0, 1, 4, 9: the middle is 2.5, the third of them the threshold.
    expected = [(squared - 2.5) / (4 - 2.5) for squared in (0, 1, 4, 9, 2.5**2, 1)]
    queries = np.concatenate([calibration, [[0, 5], [10, 2]]])
    assert score_features(head, queries) == pytest.approx(expected, abs=0.02)


def test_turned_images_are_told_where_the_distance_does_not_tell() -> None:
    random = np.random.default_rng(4)

    def draw(n: int, distance: float) -> Array:
        """Two clusters that far from the origin on either side, of one class: its mean lies between them."""
        points = random.normal(size=(n, 6))
        points[:, 0] += distance * random.choice([-1, 1], n)
        return points

    train, labels, calibration, turned = draw(400, 5), np.zeros(400, np.int64), draw(100, 5), draw(200, 0)
    blind = fit_ood_head(train, labels, calibration, ALARM_SHARE)
    head = fit_ood_head(train, labels, calibration, ALARM_SHARE, draw(1200, 0), seed=1)
    assert (score_features(blind, turned) > 1).mean() < 0.05
    assert (score_features(head, turned) > 1).mean() > 0.9


def test_same_seed_and_data_give_the_same_arrays() -> None:
    train, labels = draw_features(200, seed=2)
    calibration, _ = draw_features(50, seed=3)
    one, same, other = (fit_ood_head(train, labels, calibration, ALARM_SHARE, -train, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(left, right) for left, right in zip(astuple(one), astuple(same), strict=True))
    assert not np.array_equal(one.hidden_kernel, other.hidden_kernel)


@pytest.mark.parametrize(("n_train", "n_calibration", "d"), [(300, 20, 40), (30, 20, 400), (8, 4, 40), (300, 1, 40)])
def test_few_rows_and_more_features_than_rows_give_finite_scores(n_train: int, n_calibration: int, d: int) -> None:
    train, labels = draw_features(n_train, seed=2, d=d)
    calibration, _ = draw_features(n_calibration, seed=3, d=d)
    head = fit_ood_head(train, labels, calibration, ALARM_SHARE, -train, seed=1)
    assert np.isfinite(score_features(head, draw_features(50, seed=4, d=d)[0])).all()
    # Fewer than 19 can't bound an alarm of 1 in 20: none of them is one.
    assert score_features(head, calibration).max() <= 1 + 1e-9 or n_calibration >= 19


def test_features_that_never_vary_give_finite_scores() -> None:
    train, labels = draw_features(200, seed=2)
    calibration, _ = draw_features(50, seed=3)
    for features in (train, calibration):
        features[:, 7] = 3
    head = fit_ood_head(train, labels, calibration, ALARM_SHARE, -train, seed=1)
    assert np.isfinite(score_features(head, calibration)).all()
    nothing = fit_ood_head(np.ones((20, 5)), labels[:20], np.ones((20, 5)), ALARM_SHARE, np.ones((60, 5)), seed=1)
    assert np.isfinite(score_features(nothing, np.ones((3, 5)))).all()


@pytest.fixture(scope="module")
def trained(recipe: Params) -> dict[str, Any]:
    """A network of random weights, images of discs, the head for them and a model of the score alone."""
    keras = import_keras()
    keras.utils.set_random_seed(1)
    network = build_classifier(recipe.train).network
    random = np.random.default_rng(5)
    rows, columns = np.mgrid[:32, :32]

    def discs(n: int) -> NDArray[np.uint8]:
        centres, radii = random.uniform(12, 16, (n, 2, 1, 1)), random.uniform(6, 11, (n, 1, 1))
        inside = np.hypot(rows - centres[:, 0], columns - centres[:, 1]) < radii
        return (inside * random.integers(60, 220, (n, 32, 32))).astype(np.uint8)[..., None]

    train, calibration = discs(80), discs(40)
    head = fit_ood_score(network, train, np.arange(80) % 4, calibration, ALARM_SHARE, seed=1)
    model = keras.Model(network.input, attach_ood_score(network, head))
    noise = random.integers(0, 256, (20, 32, 32, 1)).astype(np.uint8)
    return dict(network=network, head=head, model=model, usual=discs(40), noise=noise)


def test_layers_give_what_numpy_gives_in_64_bits(trained: dict[str, Any]) -> None:
    keras = import_keras()
    network = trained["network"]
    images = np.concatenate([trained["usual"], trained["noise"], 255 - trained["usual"]])
    features = keras.Model(network.input, feature_tensor(network)).predict(images, verbose=0)
    scores = trained["model"].predict(images, verbose=0)
    assert scores.shape == (len(images), 1)
    assert scores[:, 0] == pytest.approx(score_features(trained["head"], features), rel=1e-3, abs=1e-3)


def test_noise_is_unlike_and_discs_are_like_the_training_images(trained: dict[str, Any]) -> None:
    score = lambda images: trained["model"].predict(images, verbose=0)[:, 0]  # noqa: E731
    assert (score(trained["noise"]) > 1).all()
    assert (score(trained["usual"]) > 1).mean() < 0.3


def test_features_are_those_of_the_backbones_own_stem(trained: dict[str, Any]) -> None:
    keras = import_keras()
    network = trained["network"]
    random = np.random.default_rng(0)
    norm = network.get_layer("densenet201").get_layer("conv1_bn")
    were = norm.get_weights()
    # As after a training, not as they were born.
    norm.set_weights(
        [random.uniform(0.5, 2, 64), random.normal(size=64), random.normal(size=64), random.uniform(1, 2, 64)]
    )
    try:
        backbone = network.get_layer("densenet201")
        scaled = keras.Model(network.input, network.get_layer("scaling").output).predict(trained["usual"], verbose=0)
        maps = keras.Model(backbone.input, backbone.get_layer("conv1_relu").output).predict(scaled, verbose=0)
        expected = maps.reshape(len(maps), 4, 4, 4, 4, 64).mean(axis=(2, 4)).reshape(len(maps), -1)
        features = keras.Model(network.input, feature_tensor(network)).predict(trained["usual"], verbose=0)
        assert np.allclose(features, expected, rtol=1e-4, atol=1e-4)
    finally:
        norm.set_weights(were)


def test_saved_model_gives_the_same_scores_without_any_code_of_ours(trained: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    trained["model"].save(path)
    loaded = import_keras().models.load_model(path, compile=False)
    assert loaded.layers[-1].name == "ood_score"
    images = np.concatenate([trained["usual"], trained["noise"]])
    assert np.array_equal(loaded.predict(images, verbose=0), trained["model"].predict(images, verbose=0))


def test_training_leaves_the_score_alone(trained: dict[str, Any]) -> None:
    own = [layer for layer in trained["model"].layers if layer.name.startswith("ood_")]
    assert own
    assert not any(layer.trainable_weights for layer in own)


def test_head_without_turned_images_works_in_layers_too(trained: dict[str, Any]) -> None:
    keras = import_keras()
    network = trained["network"]
    extractor = keras.Model(network.input, feature_tensor(network))
    features = extractor.predict(trained["usual"], verbose=0)
    head = fit_ood_head(features, np.arange(len(features)) % 4, features, ALARM_SHARE)
    scores = keras.Model(network.input, attach_ood_score(network, head)).predict(trained["usual"], verbose=0)
    assert scores[:, 0] == pytest.approx(score_features(head, features), rel=1e-3, abs=1e-3)
