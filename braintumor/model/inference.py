"""A saved model at work."""

from dataclasses import dataclass
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
PROBABILITIES, OOD_SCORE = "probabilities", "ood_score"


@dataclass(frozen=True)
class Outputs:
    """What a model says of n images.

    `probabilities` (n, 4): each row is finite and sums to 1. `ood_scores` (n,): above 1 an image is unlike those of the
    training; None of a model without such a score.
    """

    probabilities: NDArray[np.float32]
    ood_scores: NDArray[np.float32] | None


def load_classifier(path: Path) -> "keras.Model":
    """The model saved in `path`: images (n, size, size, 1) in 0..255 -> probabilities (n, 4) and scores (n, 1).

    A model that gives probabilities alone is one, too.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; run 'braintumor train' first")
    try:
        # safe_mode (the default) refuses serialised Python code: a model file is data.
        model = import_keras().models.load_model(path, compile=False)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a model that Keras can load ({_first_line(error)}); train it again") from error
    shapes = _shapes(model)
    probabilities = shapes.get(PROBABILITIES, ())
    is_scored = set(shapes) <= {PROBABILITIES, OOD_SCORE} and shapes.get(OOD_SCORE, (None, 1)) == (None, 1)
    takes_grey = len(model.input_shape) == 4 and model.input_shape[-1] == 1
    if probabilities != (None, len(CLASS_NAMES)) or not is_scored or not takes_grey:
        raise UserError(
            f"{path} takes {model.input_shape} and gives {model.output_shape}; "
            f"a classifier takes (n, size, size, 1) and gives (n, {len(CLASS_NAMES)})"
        )
    return model


def image_size_px(model: "keras.Model") -> int:
    """The side of the square images that the model takes."""
    return int(model.input_shape[1])


def predict(model: "keras.Model", images: NDArray[np.uint8]) -> Outputs:
    """What the model says of uint8 images (n, size, size, 1)."""
    is_scored = OOD_SCORE in _shapes(model)
    if len(images) == 0:
        nothing = np.empty(0, np.float32)
        return Outputs(np.empty((0, len(CLASS_NAMES)), np.float32), nothing if is_scored else None)
    found = model.predict(images, batch_size=BATCH_SIZE, verbose=0)
    outputs = found if isinstance(found, dict) else {PROBABILITIES: found}
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise UserError(f"the model gives NaN or infinite {name}; train it again with a lower learning rate")
    return Outputs(outputs[PROBABILITIES], outputs[OOD_SCORE][:, 0] if is_scored else None)


def predict_probabilities(model: "keras.Model", images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities (n, 4) of uint8 images (n, size, size, 1); each row is finite and sums to 1."""
    return predict(model, images).probabilities


def _shapes(model: "keras.Model") -> dict[str, tuple[int | None, ...]]:
    tensors = model.output if isinstance(model.output, dict) else {PROBABILITIES: model.output}
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
