"""Where a classifier looks: heat maps of the evidence for each class, after Grad-CAM.

All three methods take a layer's feature maps A and the gradients G of a class's logit with regard to them, sum over the
channels, and cut what is negative:
- 'grad-cam': A times the mean of G over the map (Selvaraju et al., ICCV 2017, arXiv:1610.02391);
- 'hirescam': A times G (Draelos & Carin 2020, arXiv:2011.08891);
- 'layercam': A times what of G is positive (Jiang et al., IEEE TIP 2021).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.model.densenet import import_keras

if TYPE_CHECKING:
    import keras
    from PIL import Image

Method = Literal["grad-cam", "hirescam", "layercam"]
METHOD: Method = "hirescam"
# Fewer cells than this on a side can't show a lesion that is a tenth of the image wide.
MIN_CELLS = 14
LOGITS = "logits"
# The layers on both sides of the network within the network that DenseNet is here.
BEFORE_BACKBONE, AFTER_BACKBONE = "scaling", "features"
# The first two layers of DenseNet that halve the map centre each cell on the upper left of its four pixels, not between
# them: so half a pixel, then half of two, is lacking in all of its maps.
BACKBONE_SHIFT_PX = 1.5
# From the explained layer on, every layer's output is kept for the gradients.
BATCH_SIZE = 16
# DenseNet's layers between its blocks, with the block that they follow.
OF_BLOCK = {"bn": "conv5", "pool4": "conv4", "pool3": "conv3", "pool2": "conv2"}
# What a map's cells differ by, as a share of its peak, where they differ by rounding alone.
FLAT = 1e-4

COLOURS = "inferno"
OPACITY = 0.6
OUTLINE = 0.5  # of the peak
_WHITE = (255, 255, 255)


def heat_maps(
    model: "keras.Model",
    images: NDArray[np.uint8],
    classes: NDArray[np.int64] | None = None,
    layer: str | None = None,
    method: Method = METHOD,
) -> NDArray[np.float32]:
    """The evidence for every class in uint8 images (n, size, size, 1): (n, 4, size, size), in 0..1 of each map's peak.

    `classes` (n, k) are the classes to explain of each image, where not all are wanted: (n, k, size, size). A map that
    points nowhere, since it is flat or nothing speaks for the class, is 0. `layer` is by default that of
    `explained_layer`; between its cells the maps are linearly interpolated.
    """
    wanted = np.tile(np.arange(len(CLASS_NAMES)), (len(images), 1)) if classes is None else classes
    if len(images) == 0:
        return np.zeros((0, wanted.shape[1], *images.shape[1:3]), np.float32)
    to_maps, to_logits = _cut(model, layer or explained_layer(model))
    maps = [
        _heat(to_maps, to_logits, images[start : start + BATCH_SIZE], wanted[start : start + BATCH_SIZE], method)
        for start in range(0, len(images), BATCH_SIZE)
    ]
    shift_px = 0.0 if _network_of_maps(model) is model else BACKBONE_SHIFT_PX
    return _of_peak(_as_large(np.concatenate(maps), images.shape[1], shift_px))


def explained_layer(model: "keras.Model") -> str:
    """The first layer with the coarsest maps of MIN_CELLS on a side or more, or else with the finest, that all evidence
    passes. Later layers of the same size point less exactly: each convolution may put a thing beside its place.
    """
    layers = [layer for layer in _network_of_maps(model).layers if _cells(layer)]
    fine = [layer for layer in layers if _cells(layer) >= MIN_CELLS]
    # `sorted` is stable: of equal sizes the first layer comes first.
    for layer in sorted(fine, key=_cells) or sorted(layers, key=_cells, reverse=True):
        try:
            _cut(model, layer.name)
        except ValueError:
            # Another path leads around this layer.
            continue
        return str(layer.name)
    raise UserError(f"the model {model.name} has no layer of feature maps, so nothing can be shown of where it looks")


def randomised_in_cascade(model: "keras.Model", seed: int) -> Iterator[tuple[str, "keras.Model"]]:
    """What was reached, and a copy of the network (images to logits) whose weights from the logits down to there are
    drawn anew, as before a training; `model` stays as it is (Adebayo et al., NeurIPS 2018, arXiv:1810.03292).
    """
    keras = import_keras()
    network = keras.Model(model.input, _logits(model).output)
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    rng = np.random.default_rng(seed)
    for stage, layers in _stages(copy):
        for layer in layers:
            layer.set_weights([_fresh(weight, rng) for weight in layer.weights])
        yield stage, copy


def map_px(model: "keras.Model", layer: str) -> int:
    """How many cells the layer's maps have on their shorter side."""
    return _cells(_network_of_maps(model).get_layer(layer))


def overlay(image: NDArray[np.uint8], heat_map: NDArray[np.float32]) -> "Image.Image":
    """The grey image (h, w), in colour where the heat map, of any size, is hot, and outlined where it is half as hot.

    The colours rise in lightness with the heat, so that they are told apart without seeing hue.
    """
    import matplotlib
    from PIL import Image

    size = (image.shape[1], image.shape[0])
    scaled = Image.fromarray(heat_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    heat = np.asarray(scaled).clip(0, 1)[..., None]
    colours = 255 * matplotlib.colormaps[COLOURS](heat[..., 0])[..., :3]
    grey = np.repeat(image[..., None].astype(np.float32), 3, axis=2)
    blended = grey + OPACITY * heat * (colours - grey)
    blended[_outline(heat[..., 0] >= OUTLINE)] = _WHITE
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def _outline(is_within: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage

    return is_within & ~ndimage.binary_erosion(is_within, border_value=1)


def _heat(
    to_maps: Callable[[Any], Any],
    to_logits: Callable[[Any], Any],
    images: NDArray[np.uint8],
    classes: NDArray[np.int64],
    method: Method,
) -> NDArray[np.float32]:
    import tensorflow as tf

    maps = to_maps(tf.constant(images, tf.float32))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(maps)
        # No image's logit depends on another image, so the gradient of the sum holds each image's own.
        logits = to_logits(maps)
        wanted = [tf.gather(logits, column, axis=1, batch_dims=1) for column in classes.T]
    gradients = [tape.gradient(logit, maps, unconnected_gradients="zero") for logit in wanted]
    evidence = [_weigh(maps.numpy(), gradient.numpy(), method) for gradient in gradients]
    return np.stack(evidence, axis=1)


def _weigh(maps: NDArray[Any], gradients: NDArray[Any], method: Method) -> NDArray[np.float32]:
    maps, gradients = maps.astype(np.float32), gradients.astype(np.float32)
    match method:
        case "grad-cam":
            weights = gradients.mean(axis=(1, 2), keepdims=True)
        case "hirescam":
            weights = gradients
        case "layercam":
            weights = np.maximum(gradients, 0)
    return np.asarray((maps * weights).sum(axis=-1), np.float32)


def _as_large(evidence: NDArray[np.float32], size_px: int, shift_px: float) -> NDArray[np.float32]:
    """What is positive of maps (n, k, h, w), as large as the images; flat maps are 0."""
    heat = np.nan_to_num(np.maximum(evidence, 0), posinf=0)
    peak = heat.max(axis=(2, 3), keepdims=True)
    is_flat = peak - heat.min(axis=(2, 3), keepdims=True) <= FLAT * peak
    rows, columns = (_between(cells, size_px, shift_px) for cells in heat.shape[2:])
    return np.asarray(np.einsum("ri,nkij,cj->nkrc", rows, np.where(is_flat, 0, heat), columns), np.float32)


def _between(cells: int, size_px: int, shift_px: float) -> NDArray[np.float64]:
    """The share (size_px, cells) that each cell has in each pixel: 1 of the nearest at the image's edge."""
    places = (np.arange(size_px) + 0.5 + shift_px) * cells / size_px - 0.5
    return np.stack([np.interp(places, np.arange(cells), is_cell) for is_cell in np.eye(cells)], axis=1)


def _of_peak(heat: NDArray[np.float32]) -> NDArray[np.float32]:
    peak = heat.max(axis=(2, 3), keepdims=True)
    return np.divide(heat, peak, out=np.zeros_like(heat), where=peak > 0)


def _cut(model: "keras.Model", layer: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The network before and after a layer's maps; ValueError where another path leads around the layer."""
    keras = import_keras()
    network = _network_of_maps(model)
    maps = network.get_layer(layer).output
    before = keras.Model(network.input, maps)
    if network is model:
        return before, keras.Model(maps, _logits(model).output)
    to_backbone = keras.Model(model.input, model.get_layer(BEFORE_BACKBONE).output)
    to_logits = keras.Model(model.get_layer(AFTER_BACKBONE).input, _logits(model).output)
    after = keras.Model(maps, network.output) if maps is not network.output else keras.layers.Identity()
    return lambda images: before(to_backbone(images)), lambda values: to_logits(after(values))


def _network_of_maps(model: "keras.Model") -> "keras.Model":
    """The backbone, a model among the model's layers, or the model itself if it has none."""
    keras = import_keras()
    return next((layer for layer in model.layers if isinstance(layer, keras.Model)), model)


def _logits(model: "keras.Model") -> "keras.Layer":
    try:
        return model.get_layer(LOGITS)
    except ValueError:
        raise UserError(f"the model {model.name} has no layer '{LOGITS}'; train it again") from None


def _cells(layer: "keras.Layer") -> int:
    """How many cells the layer's map has on its shorter side; 0 of what gives no map."""
    shape = getattr(layer.output, "shape", ())
    return min(shape[1:3]) if len(shape) == 4 and None not in shape[1:3] else 0


def _stages(network: "keras.Model") -> list[tuple[str, Sequence["keras.Layer"]]]:
    """The layers with weights from the logits down, those of a block together: DenseNet's names begin with theirs."""
    inner = _network_of_maps(network)
    layers = [*reversed(network.layers), *(reversed(inner.layers) if inner is not network else [])]
    stages: dict[str, list[keras.Layer]] = {}
    for layer in layers:
        if layer.weights and layer is not inner:
            name = layer.name.split("_")[0]
            stages.setdefault(OF_BLOCK.get(name, name), []).append(layer)
    return list(stages.items())


def _fresh(weight: Any, rng: np.random.Generator) -> NDArray[np.float32]:
    """Kernels after Glorot & Bengio (2010), as Keras draws them; scales 1, shifts 0."""
    shape = tuple(weight.shape)
    if len(shape) < 2:
        return np.full(shape, weight.name in {"gamma", "moving_variance"}, np.float32)
    receptive = np.prod(shape[:-2])
    limit = np.sqrt(6 / (receptive * (shape[-2] + shape[-1])))
    return rng.uniform(-limit, limit, shape).astype(np.float32)
