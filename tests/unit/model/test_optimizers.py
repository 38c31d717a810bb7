from typing import Any

import numpy as np
import pytest

from braintumor.model.densenet import import_keras
from braintumor.model.optimizers import learning_rate, make_optimizer
from braintumor.params import Params

STEPS = 8


@pytest.mark.parametrize(
    ("optimizer", "schedule", "weight_decay"),
    [("sgd", "cosine", 0.01), ("sgd", "constant", 0.0), ("adam", "cosine", 0.0), ("adamw", "cosine", 0.01)],
)
def test_steps_are_those_of_keras(recipe: Params, optimizer: str, schedule: str, weight_decay: float) -> None:
    import tensorflow as tf

    keras = import_keras()
    params = recipe.train.model_copy(
        update={"optimizer": optimizer, "schedule": schedule, "weight_decay": weight_decay, "learning_rate": 0.05}
    )
    random = np.random.default_rng(0)
    begin = [random.normal(size=size).astype(np.float32) for size in (7, 3)]
    gradients = [[random.normal(size=size).astype(np.float32) for size in (7, 3)] for _ in range(STEPS)]

    rate: Any = learning_rate(params, STEPS) if schedule == "cosine" else params.learning_rate
    decay = weight_decay or None
    kinds = {
        "sgd": lambda: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=decay),
        "adam": lambda: keras.optimizers.Adam(rate),
        "adamw": lambda: keras.optimizers.AdamW(rate, weight_decay=decay),
    }
    theirs = kinds[optimizer]()
    expected = [keras.Variable(value, name=name) for value, name in zip(begin, ("kernel", "bias"), strict=True)]
    theirs.exclude_from_weight_decay(var_names=["bias"])
    theirs.build(expected)

    ours = make_optimizer(params, STEPS, [True, False])
    vectors = [tf.Variable(value) for value in begin]
    slots = [[tf.Variable(tf.zeros_like(value)) for value in begin] for _ in ours.slots]
    for step, gradient in enumerate(gradients):
        theirs.apply([tf.constant(value) for value in gradient])
        ours.apply(tf.constant(step, tf.int64), vectors, [tf.constant(value) for value in gradient], slots)
        for one, two in zip(vectors, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=2e-5, atol=1e-6)
    assert all(np.abs(vector.numpy() - value).min() > 0 for vector, value in zip(vectors, begin, strict=True))


def test_cosine_schedule_warms_up_and_ends_at_zero(recipe: Params) -> None:
    rate = learning_rate(recipe.train, total_steps=100)
    rates = [float(rate(step)) for step in (0, 10, 55, 100)]
    peak = recipe.train.learning_rate
    assert rates == pytest.approx([peak * 0.01, peak, peak / 2, 0], abs=peak * 1e-3)


def test_cosine_schedule_without_a_warm_up_begins_at_its_peak(recipe: Params) -> None:
    params = recipe.train.model_copy(update={"warmup_fraction": 0.0})
    assert float(learning_rate(params, 100)(0)) == pytest.approx(params.learning_rate)


def test_constant_schedule_is_constant(recipe: Params) -> None:
    params = recipe.train.model_copy(update={"schedule": "constant"})
    assert [learning_rate(params, 100)(step) for step in (0, 99)] == [params.learning_rate] * 2
