"""A Keras model whose variables are pieces of three long vectors.

`decayed` holds kernels, `undecayed` what no weight decay applies to (biases, gamma and beta of BatchNorm), and
`statistics` all that is not trained. Seeds of dropout are no part of them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import keras

NAMES = ("decayed", "undecayed", "statistics")
UNDECAYED = frozenset({"bias", "gamma", "beta"})

Values = dict[str, NDArray[Any]]


class Layout:
    """Where each variable of `model` stands in the vectors."""

    def __init__(self, model: "keras.Model") -> None:
        """Takes no values yet."""
        self._model = model
        trainable = model.trainable_variables
        self._groups = {
            "decayed": [variable for variable in trainable if variable.name not in UNDECAYED],
            "undecayed": [variable for variable in trainable if variable.name in UNDECAYED],
            "statistics": [variable for variable in model.non_trainable_variables if _is_float(variable)],
        }
        self._sizes = {
            name: [int(np.prod(variable.shape)) for variable in group] for name, group in self._groups.items()
        }

    def read(self) -> Values:
        """The model's present values as vectors float32 (n,)."""
        return {
            name: np.concatenate([np.zeros(0, np.float32), *(np.ravel(variable.numpy()) for variable in group)])
            for name, group in self._groups.items()
        }

    def write(self, values: Values) -> None:
        """The model's variables have these values."""
        for name, group in self._groups.items():
            places = np.cumsum(self._sizes[name])[:-1]
            # One variable at least: without, there would be one piece all the same.
            for variable, piece in zip(group, np.split(values[name], places) if group else [], strict=True):
                variable.assign(piece.reshape(variable.shape))

    def call(self, vectors: Sequence[Any], seed: Any, images: Any, *, training: bool) -> tuple[Any, Any]:
        """(the model's outputs, its statistics after them) for three vectors, without a look at its variables.

        The statistics are None where the call does not change them. Dropout draws from `seed`, a pair of integers.
        """
        import tensorflow as tf

        pieces: dict[int, Any] = {}
        for name, vector in zip(NAMES, vectors, strict=True):
            if not self._groups[name]:
                continue
            parts = tf.split(vector, self._sizes[name])
            for variable, part in zip(self._groups[name], parts, strict=True):
                pieces[id(variable)] = tf.reshape(part, variable.shape)
        trainable = [pieces[id(variable)] for variable in self._model.trainable_variables]
        others = [
            pieces[id(variable)] if id(variable) in pieces else tf.cast(seed, variable.dtype)
            for variable in self._model.non_trainable_variables
        ]
        outputs, changed = self._model.stateless_call(trainable, others, images, training=training)
        triples = zip(self._model.non_trainable_variables, others, changed, strict=True)
        statistics = [(old, new) for variable, old, new in triples if id(variable) in pieces]
        # A BatchNorm at rest gives back what it was given.
        if all(old is new for old, new in statistics):
            return outputs, None
        return outputs, tf.concat([tf.reshape(new, [-1]) for _, new in statistics], 0)


def _is_float(variable: Any) -> bool:
    return str(variable.dtype).startswith(("float", "bfloat"))
