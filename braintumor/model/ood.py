"""How unlike the training's an image is, as one number that the saved model gives.

The score sees what the stem of the network sees: the responses of its first filters, averaged over the cells of a
grid, so that it is told how a slice looks and how it lies, but not what the deep layers make of it, which were trained
to ignore whatever does not tell the classes apart. It is the larger of two:
- the squared Mahalanobis distance to the nearest class (Lee et al., NeurIPS 2018, arXiv:1807.03888);
- the logit that the image is a training image turned by 90, 180 or 270 degrees, by a small network that learned to
  tell such images (Hendrycks et al., NeurIPS 2019, arXiv:1906.12340).
Each is 0 for the middle one of the calibration images; at 1, as many score higher as may be alarms. The score is made
of standard Keras layers, so that a saved model holds it as weights, not as code.
"""

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from braintumor.model.densenet import import_keras
from braintumor.model.inference import BATCH_SIZE

if TYPE_CHECKING:
    import keras

SCORE = "ood_score"
GRID = 4
# As many directions of the features as hold this share of their variance, but no more than the second number.
VARIANCE_SHARE, MAX_DIRECTIONS = 0.99, 128
HIDDEN_UNITS = 64
WEIGHT_DECAY = 10.0
ITERATIONS = 100

Array = NDArray[np.float64]
Features = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class OodHead:
    """Weights of the score; z (k,) are the features, whitened."""

    whitening: Array  # (d, k)
    offset: Array  # (k,)
    class_means: Array  # (c, k), of z
    hidden_kernel: Array  # (k, h)
    hidden_bias: Array  # (h,)
    turned_kernel: Array  # (h,)
    turned_bias: float
    distance_middle: float
    distance_scale: float
    turned_middle: float
    turned_scale: float


def feature_tensor(network: "keras.Model") -> Any:
    """The symbolic features (None, d) of the training network that the score is computed from.

    They come from a copy of the stem, its BatchNorm folded into the kernel, with the weights as they are now.
    """
    layers = import_keras().layers
    backbone = network.get_layer("densenet201")
    convolution, norm = backbone.get_layer("conv1_conv"), backbone.get_layer("conv1_bn")
    gamma, beta, mean, variance = (np.asarray(values, np.float64) for values in norm.get_weights())
    gain = gamma / np.sqrt(variance + norm.epsilon)
    stem = layers.Conv2D(
        convolution.filters, convolution.kernel_size, convolution.strides,
        activation="relu", name="ood_stem", dtype="float32", trainable=False,
    )  # fmt: skip
    padding = (convolution.kernel_size[0] - 1) // 2
    padded = layers.ZeroPadding2D(padding, name="ood_padding", dtype="float32")(network.get_layer("scaling").output)
    maps = stem(padded)
    stem.set_weights([np.asarray(convolution.get_weights()[0], np.float64) * gain, beta - mean * gain])
    cells = layers.AveragePooling2D(max(1, maps.shape[1] // GRID), name="ood_grid", dtype="float32")(maps)
    return layers.Flatten(name="ood_features", dtype="float32")(cells)


def fit_ood_score(
    network: "keras.Model",
    train_images: NDArray[np.uint8],
    train_labels: NDArray[np.int64],
    calibration_images: NDArray[np.uint8],
    alarm_share: float,
    seed: int,
) -> OodHead:
    """The head for the trained network and its images (n, size, size, 1); see `fit_ood_head`."""
    extractor = import_keras().Model(network.input, feature_tensor(network))

    def features(images: NDArray[np.uint8]) -> Features:
        return np.asarray(extractor.predict(images, batch_size=BATCH_SIZE, verbose=0))

    turned = np.concatenate([features(np.rot90(train_images, turns, axes=(1, 2))) for turns in (1, 2, 3)])
    return fit_ood_head(features(train_images), train_labels, features(calibration_images), alarm_share, turned, seed)


def fit_ood_head(
    train_features: Features,
    train_labels: NDArray[np.int64],
    calibration_features: Features,
    alarm_share: float,
    turned_features: Features | None = None,
    seed: int = 0,
) -> OodHead:
    """The head for features (n, d) with labels (n,), and features of the same images, turned.

    Without turned ones the distance decides alone. About `alarm_share` of images like the calibration ones (m, d) will
    score above 1: the threshold is the conformal quantile of their scores, or the largest where there are fewer than
    1 / alarm_share - 1.
    """
    head = _whiten(np.asarray(train_features, np.float64), train_labels)
    distance = _distances(head, calibration_features)
    head = replace(head, distance_middle=float(np.median(distance)), distance_scale=_scale(distance, alarm_share))
    if turned_features is not None:
        head = _tell_turned(head, train_features, turned_features, seed)
        logits = _turned_logits(head, calibration_features)
        head = replace(head, turned_middle=float(np.median(logits)), turned_scale=_scale(logits, alarm_share))
    threshold = max(_conformal_quantile(score_features(head, calibration_features), alarm_share), 1e-3)
    return replace(head, distance_scale=head.distance_scale * threshold, turned_scale=head.turned_scale * threshold)


def _whiten(features: Array, labels: NDArray[np.int64]) -> OodHead:
    """A head with z of which the covariance within classes is 1."""
    from sklearn.covariance import ledoit_wolf

    mean, deviation = features.mean(axis=0), features.std(axis=0)
    # A feature that never varies must not be divided by 0.
    deviation = np.maximum(deviation, 1e-3 * deviation.mean() or 1.0)
    standard = (features - mean) / deviation
    variances, directions = np.linalg.eigh(standard.T @ standard)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
    shares = np.cumsum(variances) / max(variances.sum(), np.finfo(float).tiny)
    n_kept = int(np.clip(np.searchsorted(shares, VARIANCE_SHARE) + 1, 1, MAX_DIRECTIONS))
    basis = directions[:, :n_kept]
    places = standard @ basis
    classes, codes = np.unique(labels, return_inverse=True)
    means = np.stack([places[codes == code].mean(axis=0) for code in range(len(classes))])
    covariance, _ = ledoit_wolf(places - means[codes], assume_centered=True)
    variances, axes = np.linalg.eigh(covariance)
    to_white = axes / np.sqrt(np.maximum(variances, 1e-6 * max(variances.max(), 1e-6)))
    whitening = basis @ to_white / deviation[:, None]
    return OodHead(
        whitening=whitening,
        offset=-mean @ whitening,
        class_means=means @ to_white,
        hidden_kernel=np.zeros((n_kept, 1)),
        hidden_bias=np.zeros(1),
        turned_kernel=np.zeros(1),
        turned_bias=-np.inf,
        distance_middle=0.0,
        distance_scale=1.0,
        turned_middle=0.0,
        turned_scale=1.0,
    )


def _tell_turned(head: OodHead, features: Features, turned_features: Features, seed: int) -> OodHead:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier(HIDDEN_UNITS, solver="lbfgs", alpha=WEIGHT_DECAY, max_iter=ITERATIONS, random_state=seed)
    is_turned = np.repeat([0, 1], [len(features), len(turned_features)])
    with warnings.catch_warnings():
        # To end early is a part of the recipe.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(_whitened(head, np.concatenate([features, turned_features])), is_turned)
    (hidden_kernel, turned_kernel), (hidden_bias, turned_bias) = network.coefs_, network.intercepts_
    return replace(
        head,
        hidden_kernel=hidden_kernel,
        hidden_bias=hidden_bias,
        turned_kernel=turned_kernel[:, 0],
        turned_bias=float(turned_bias[0]),
    )


def _scale(values: Array, alarm_share: float) -> float:
    """From the middle to the threshold; never 0."""
    middle = float(np.median(values))
    return max(_conformal_quantile(values, alarm_share) - middle, 1e-3 * max(abs(middle), 1.0))


def _conformal_quantile(values: Array, alarm_share: float) -> float:
    """The value that a new one of the kind exceeds with a chance of at most `alarm_share` (Vovk et al. 2005)."""
    place = int(np.ceil((len(values) + 1) * (1 - alarm_share)))
    return float(np.sort(values)[min(place, len(values)) - 1])


def score_features(head: OodHead, features: Features) -> Array:
    """Scores (n,) of features (n, d), in 64 bits: what the layers of `attach_ood_score` give in 32."""
    return np.maximum(
        (_distances(head, features) - head.distance_middle) / head.distance_scale,
        (_turned_logits(head, features) - head.turned_middle) / head.turned_scale,
    )


def _whitened(head: OodHead, features: Features) -> Array:
    return np.asarray(features, np.float64) @ head.whitening + head.offset


def _distances(head: OodHead, features: Features) -> Array:
    """Squared, to the nearest class."""
    z = _whitened(head, features)
    return np.stack([((z - mean) ** 2).sum(axis=1) for mean in head.class_means]).min(axis=0)


def _turned_logits(head: OodHead, features: Features) -> Array:
    hidden = np.maximum(_whitened(head, features) @ head.hidden_kernel + head.hidden_bias, 0)
    return hidden @ head.turned_kernel + head.turned_bias


def attach_ood_score(network: "keras.Model", head: OodHead) -> Any:
    """The symbolic score (None, 1) of the training network, by layers of which the last is named 'ood_score'."""
    layers = import_keras().layers

    def dense(name: str, inputs: Any, kernel: Array, bias: Array, activation: str | None = None) -> Any:
        layer = layers.Dense(len(bias), activation=activation, name=name, dtype="float32", trainable=False)
        output = layer(inputs)
        layer.set_weights([kernel, bias])
        return output

    z = dense("ood_whitened", feature_tensor(network), head.whitening, head.offset)
    squares = layers.Multiply(name="ood_squares", dtype="float32")([z, z])
    both = layers.Concatenate(name="ood_terms", dtype="float32")([z, squares])
    # Minus the distances: -|z - m|^2 = 2 m z - |z|^2 - |m|^2; their largest is minus the smallest distance.
    n_classes, k = head.class_means.shape
    kernel = np.concatenate([2 * head.class_means.T, -np.ones((k, n_classes))])
    negative = dense("ood_distances", both, kernel, -(head.class_means**2).sum(axis=1))
    column = layers.Reshape((n_classes, 1), name="ood_classes", dtype="float32")(negative)
    nearest = layers.GlobalMaxPooling1D(name="ood_nearest", dtype="float32")(column)
    distance = layers.Rescaling(
        -1 / head.distance_scale, -head.distance_middle / head.distance_scale, name="ood_distance", dtype="float32"
    )(nearest)
    hidden = dense("ood_hidden", z, head.hidden_kernel, head.hidden_bias, "relu")
    turned = dense(
        "ood_turned",
        hidden,
        head.turned_kernel[:, None] / head.turned_scale,
        np.array([(head.turned_bias - head.turned_middle) / head.turned_scale]),
    )
    return layers.Maximum(name=SCORE, dtype="float32")([distance, turned])
