"""The model as it is saved and served: the trained network with temperature and out-of-distribution score."""

from typing import TYPE_CHECKING

from braintumor.model.densenet import import_keras
from braintumor.model.inference import OOD_SCORE, PROBABILITIES
from braintumor.model.ood import OodHead, attach_ood_score

if TYPE_CHECKING:
    import keras


def servable(network: "keras.Model", temperature: float, ood_head: OodHead) -> "keras.Model":
    """The model to serve: probabilities = softmax(logits / temperature) (Guo et al., ICML 2017, arXiv:1706.04599).

    Its second output is the out-of-distribution score of `ood_head`.
    """
    keras = import_keras()
    cooled = keras.layers.Rescaling(1 / temperature, name="temperature", dtype="float32")(network.output)
    probabilities = keras.layers.Softmax(name="probabilities", dtype="float32")(cooled)
    outputs = {PROBABILITIES: probabilities, OOD_SCORE: attach_ood_score(network, ood_head)}
    return keras.Model(network.input, outputs, name=network.name)


def temperature_of(model: "keras.Model") -> float:
    """The temperature that a model's logits are divided by."""
    return float(1 / model.get_layer("temperature").scale)
