"""DenseNet201 (Huang et al., CVPR 2017, arXiv:1608.06993) as this project trains and serves it.

The saved model takes grey images, float32 or uint8 (n, size_px, size_px, 1) in 0..255, and gives `probabilities`
(n, 4) in the order of CLASS_NAMES and an `ood_score` (n, 1), above 1 for images unlike those of the training: channels,
scaling, temperature and score are layers, so serving can't drift from training.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braintumor.artifacts import sha256_of_file
from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.params import TrainParams

if TYPE_CHECKING:
    import keras

# Of RGB in 0..1 over ImageNet; DenseNet's weights in keras.applications expect this 'torch' scaling.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Classifier:
    """A network in training: `backbone` ends in feature maps, `network` in logits (n, 4)."""

    backbone: "keras.Model"
    network: "keras.Model"
    is_pretrained: bool


def import_keras() -> Any:
    """The Keras package, on TensorFlow, which does not tell about its start."""
    if "keras" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with _holding_back_stderr():
            import tensorflow as tf

            tf.config.list_physical_devices()
    import keras

    return keras


@contextmanager
def _holding_back_stderr() -> Iterator[None]:
    """What native code writes to stderr is lost, unless an error ends the block: then it is shown."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def build_classifier(params: TrainParams) -> Classifier:
    """DenseNet201 with the weights that `params.weights` names, and a new head for the four classes.

    By default every BatchNorm stays in inference mode with pretrained weights, and trains with 'none'.
    """
    keras = import_keras()
    keras.config.set_dtype_policy(params.precision)
    try:
        backbone = _load_backbone(params)
        is_pretrained = params.weights != "none"
        trains = not is_pretrained if params.batch_norm == "by_weights" else params.batch_norm == "train"
        for layer in backbone.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                # Batches are too small to estimate better statistics than the pretrained ones.
                layer.trainable = trains
                layer.momentum = params.batch_norm_momentum
        network = _add_head(backbone, params)
    finally:
        keras.config.set_dtype_policy("float32")
    return Classifier(backbone, network, is_pretrained)


def _load_backbone(params: TrainParams) -> "keras.Model":
    keras = import_keras()
    shape = (params.image_size_px, params.image_size_px, 3)
    if params.weights == "imagenet":
        return _load_imagenet(shape)
    backbone = keras.applications.DenseNet201(include_top=False, weights=None, input_shape=shape)
    if params.weights == "none":
        return backbone
    path = _fetch(params.weights)
    try:
        backbone.load_weights(path)
    # Keras and h5py raise whatever the mismatch runs into first.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"train.weights: {params.weights} does not hold the weights of DenseNet201 without its top ({reason}); "
            "use a file written by Keras (.weights.h5) or by 'braintumor model backbone'"
        ) from error
    return backbone


def _load_imagenet(shape: tuple[int, int, int]) -> "keras.Model":
    keras = import_keras()
    try:
        return keras.applications.DenseNet201(include_top=False, weights="imagenet", input_shape=shape)
    except Exception as error:
        if "URL fetch failure" not in str(error) and not isinstance(error, OSError):
            raise
        raise UserError(
            "train.weights: 'imagenet' has to be downloaded, and the download failed here. Remedies: download "
            "densenet201_weights_tf_dim_ordering_tf_kernels_notop.h5 where there is internet and give its path or "
            "s3:// address as train.weights; or copy it to ~/.keras/models/; or train from 'none'"
        ) from error


def _fetch(weights: str) -> Path:
    if weights.startswith("s3://"):
        from braintumor.object_store import fetch_object

        return fetch_object(weights)
    path = Path(weights)
    if not path.is_file():
        raise UserError(
            f"train.weights: {path} is missing; run 'dvc pull -r sample weights.dvc' for the sample's backbone, "
            "or name another file, an s3:// address, 'imagenet' or 'none'"
        )
    return path


def weights_digest(params: TrainParams) -> str | None:
    """Hex SHA-256 of the weights' file or object; None for 'none' and for Keras' own 'imagenet'."""
    return None if params.weights in {"none", "imagenet"} else sha256_of_file(_fetch(params.weights))


def _add_head(backbone: "keras.Model", params: TrainParams) -> "keras.Model":
    keras = import_keras()
    size = params.image_size_px
    grey = keras.Input((size, size, 1), name="image", dtype="float32")
    channels = keras.layers.Concatenate(name="channels")([grey, grey, grey])
    features = keras.layers.GlobalAveragePooling2D(name="features", dtype="float32")(
        backbone(_scaling(params)(channels))
    )
    kept = keras.layers.Dropout(params.dropout, name="dropout", dtype="float32")(features)
    logits = keras.layers.Dense(len(CLASS_NAMES), name="logits", dtype="float32")(kept)
    return keras.Model(grey, logits, name="brain_tumor_densenet201")


def _scaling(params: TrainParams) -> Any:
    layers = import_keras().layers
    if params.input_scaling == "per_image":
        # Not the default epsilon, which would blow up the noise of a nearly black image.
        return layers.LayerNormalization((1, 2, 3), epsilon=1.0, center=False, scale=False, name="scaling")
    return layers.Rescaling(
        [1 / (255 * std) for std in IMAGENET_STD],
        [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)],
        name="scaling",
    )


def save_backbone(model: Path, output: Path) -> int:
    """Write the backbone of a trained model as Keras weights, kernels in 16 bits, and return the file's size in bytes.

    Keras casts them back to 32 bits when it loads them.
    """
    import h5py
    import numpy as np

    from braintumor.model.inference import load_classifier

    keras = import_keras()
    backbone = load_classifier(model).get_layer("densenet201")
    # Saved from a backbone of its own, so that the layout in the file is the one that a new backbone reads.
    fresh = keras.applications.DenseNet201(include_top=False, weights=None, input_shape=backbone.input_shape[1:])
    fresh.set_weights(backbone.get_weights())
    output.parent.mkdir(parents=True, exist_ok=True)
    full = output.with_name(f".{output.stem}.full.weights.h5")
    half = output.with_name(f".{output.stem}.half.weights.h5")
    try:
        fresh.save_weights(full)
        with h5py.File(full) as source, h5py.File(half, "w", libver="latest") as target:

            def copy(name: str, item: object) -> None:
                if isinstance(item, h5py.Group):
                    group = target.require_group(name)
                    group.attrs.update(item.attrs)
                elif isinstance(item, h5py.Dataset):
                    # HDF5's own conversion loses carries, so NumPy converts. Vectors stay in 32 bits: a BatchNorm's
                    # variance may leave the range of 16.
                    values = np.asarray(item)
                    if values.ndim > 1:
                        values = values.astype(np.float16)
                    target.create_dataset(name, data=values)

            target.attrs.update(source.attrs)
            source.visititems(copy)
        half.replace(output)
    finally:
        full.unlink(missing_ok=True)
        half.unlink(missing_ok=True)
    return output.stat().st_size
