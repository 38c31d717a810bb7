"""A saved model at work."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.model.densenet import import_keras

if TYPE_CHECKING:
    import keras

BATCH_SIZE = 64


def load_classifier(path: Path) -> "keras.Model":
    """The model saved in `path`: images (n, size, size, 1) in 0..255 -> probabilities (n, 4)."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run 'braintumor train' first")
    try:
        # safe_mode (the default) refuses serialised Python code: a model file is data.
        model = import_keras().models.load_model(path, compile=False)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a model that Keras can load ({_first_line(error)}); train it again") from error
    if model.output_shape[-1] != len(CLASS_NAMES) or len(model.input_shape) != 4 or model.input_shape[-1] != 1:
        raise UserError(
            f"{path} takes {model.input_shape} and gives {model.output_shape}; "
            f"a classifier takes (n, size, size, 1) and gives (n, {len(CLASS_NAMES)})"
        )
    return model


def image_size_px(model: "keras.Model") -> int:
    """The side of the square images that the model takes."""
    return int(model.input_shape[1])


def predict_probabilities(model: "keras.Model", images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities (n, 4) of uint8 images (n, size, size, 1); each row is finite and sums to 1."""
    if len(images) == 0:
        return np.empty((0, len(CLASS_NAMES)), np.float32)
    probabilities: NDArray[np.float32] = model.predict(images.astype(np.float32), batch_size=BATCH_SIZE, verbose=0)
    if not np.isfinite(probabilities).all():
        raise UserError("the model gives NaN or infinite probabilities; train it again with a lower learning rate")
    return probabilities


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
