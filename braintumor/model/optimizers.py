"""Optimisers over a few long vectors instead of hundreds of variables.

The mathematics is that of `keras.optimizers`. There each of a network's variables brings operations of its own, which
take longer to compile than the network itself, and as many calls a step; here one fused operation updates a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from braintumor.model.densenet import import_keras
from braintumor.params import TrainParams

MOMENTUM = 0.9
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
SLOTS = {"sgd": ("momentum",), "adam": ("mean", "square"), "adamw": ("mean", "square")}


@dataclass(frozen=True)
class FlatOptimizer:
    """SGD with Nesterov momentum, Adam or AdamW.

    `decays` says for each vector whether the weight decay applies to it. `rate` is a schedule, step -> learning rate.
    """

    kind: str
    rate: Any
    weight_decay: float
    decays: tuple[bool, ...]

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the vectors that it keeps for each vector of parameters; all begin with zeros."""
        return SLOTS[self.kind]

    def apply(self, step: Any, vectors: Sequence[Any], gradients: Sequence[Any], slots: Sequence[Sequence[Any]]) -> Any:
        """Update the variables in place, and return the learning rate; `step` counts from 0 (int64 scalar).

        `slots` holds, for each name in the property's order, a variable for each vector.
        """
        import tensorflow as tf

        rate = tf.cast(self.rate(step), tf.float32)
        number = tf.cast(step + 1, tf.float32)
        for index, (vector, gradient) in enumerate(zip(vectors, gradients, strict=True)):
            if self.weight_decay and self.decays[index]:
                # Loshchilov & Hutter, ICLR 2019, arXiv:1711.05101.
                vector.assign_sub(vector * (rate * self.weight_decay))
            own = [of_name[index].handle for of_name in slots]
            if self.kind == "sgd":
                tf.raw_ops.ResourceApplyKerasMomentum(
                    var=vector.handle, accum=own[0], lr=rate, grad=gradient, momentum=MOMENTUM, use_nesterov=True
                )
            else:
                tf.raw_ops.ResourceApplyAdam(
                    var=vector.handle, m=own[0], v=own[1], beta1_power=BETA_1**number, beta2_power=BETA_2**number,
                    lr=rate, beta1=BETA_1, beta2=BETA_2, epsilon=EPSILON, grad=gradient,
                )  # fmt: skip
        return rate


def make_optimizer(params: TrainParams, total_steps: int, decays: Sequence[bool]) -> FlatOptimizer:
    """The optimiser of `params` with its schedule over `total_steps`."""
    # The rules forbid a decay with 'adam'.
    return FlatOptimizer(params.optimizer, learning_rate(params, total_steps), params.weight_decay, tuple(decays))


def learning_rate(params: TrainParams, total_steps: int) -> Any:
    """step -> learning rate: constant, or a cosine after a linear warm-up."""
    keras = import_keras()
    if params.schedule == "constant":
        return constant_rate(params.learning_rate)
    # Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983, with a linear warm-up.
    warmup_steps = round(total_steps * params.warmup_fraction)
    return keras.optimizers.schedules.CosineDecay(
        params.learning_rate * (0.01 if warmup_steps else 1),
        max(1, total_steps - warmup_steps),
        warmup_target=params.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


def constant_rate(rate: float) -> Any:
    """step -> `rate`."""
    return lambda step: rate
