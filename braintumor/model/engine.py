"""The training step: one compiled function over flat vectors, on one device or on many that agree.

Each replica takes its share of a batch; gradients are summed over all replicas, once a step, as two vectors. Every
replica then makes the same update, so parameters never travel. What a step does depends on the parameters, the batch
and the number of the step alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from braintumor.model.augmentation import augment
from braintumor.model.batches import Batch
from braintumor.model.distribution import Placement
from braintumor.model.flat import NAMES, Layout, Values
from braintumor.model.optimizers import FlatOptimizer
from braintumor.params import Augmentation

if TYPE_CHECKING:
    import keras

# Trained vectors, a prefix of NAMES.
TRAINED = NAMES[:2]
AVERAGE = "average"
ALONE = Placement()
# Images of one forward pass on a device.
ANSWERED_AT_A_TIME = 64
# Of float16: begun with, and doubled after so many steps without an overflow (Micikevicius et al., ICLR 2018,
# arXiv:1710.03740; the numbers are those of Keras).
FIRST_SCALE, GROWTH_STEPS = 2.0**15, 2000


@dataclass(frozen=True)
class Recipe:
    """What a step needs to know beside model and optimiser.

    `augmentation` is None where batches are no images. `seed` is what dropout draws from, with the number of the step.
    """

    seed: int
    batch_size: int
    label_smoothing: float
    augmentation: Augmentation | None
    ema_momentum: float = 0.0
    scales_loss: bool = False
    xla: bool = False


@dataclass(frozen=True)
class Sums:
    """Sums over the images of an epoch so far: of the weighted loss, of right answers, of images."""

    loss: float = 0.0
    right: float = 0.0
    images: float = 0.0


class Engine:
    """Trains `model`, whose output is logits (n, 4), or features and logits, by flat copies of its variables.

    The model's own variables change when `write` is called, not before. `is_stopped` is True after a step that any
    worker was told to be the last.
    """

    def __init__(
        self,
        model: "keras.Model",
        make_optimizer: Callable[[Sequence[bool]], FlatOptimizer],
        recipe: Recipe,
        strategy: Any = None,
        placement: Placement = ALONE,
    ) -> None:
        """Takes the model's present values.

        `make_optimizer` is asked with whether each vector decays. `strategy` is a tf.distribute.Strategy, by default
        that of one device, whose workers `placement` tells.
        """
        import tensorflow as tf

        self.strategy = strategy or tf.distribute.get_strategy()
        self.replicas = int(self.strategy.num_replicas_in_sync)
        self.placement = placement
        self._local_replicas = self.replicas // placement.workers
        self._layout = Layout(model)
        self._optimizer = make_optimizer([name == "decayed" for name in TRAINED])
        self._recipe = recipe
        self._variables: dict[str, Any] = {}
        self.is_stopped = False
        with self.strategy.scope():
            values = self._layout.read()
            # An empty vector would be one without a gradient.
            self._trained = [name for name in TRAINED if values[name].size]
            for name, value in values.items():
                self._add(name, value)
            averages = (AVERAGE,) if recipe.ema_momentum else ()
            for slot in (*self._optimizer.slots, *averages):
                for name in self._trained:
                    self._add(f"{slot}.{name}", np.zeros_like(values[name]))
            self._add("step", np.int64(0))
            self._add("sums", np.zeros(3))
            if recipe.scales_loss:
                self._add("scale", np.float32(FIRST_SCALE))
                self._add("steps_without_overflow", np.int64(0))
        # (features) and 4: what `answers` gives for an image.
        self.widths = [int(output.shape[-1]) for output in model.outputs]
        # Of one device a shape left open spares a second compilation, for the smaller batch at the end of an epoch.
        spec = tf.TensorSpec
        signature = [
            spec((None, *model.input_shape[1:]), tf.uint8 if recipe.augmentation else tf.float32),
            spec((None, self.widths[-1])), spec((None,)), spec((None, None)), spec(()), spec(()),
        ]  # fmt: skip
        self._train = tf.function(
            self._train_on, autograph=False, input_signature=None if self._has_fixed_shapes else signature
        )
        self._forward = tf.function(self._answer, autograph=False)
        self._differentiate = tf.function(self._gradients, autograph=False, jit_compile=recipe.xla)

    def _add(self, name: str, value: Any) -> None:
        import tensorflow as tf

        # Each replica has its own, and all hold the same: they make the same update.
        self._variables[name] = tf.Variable(
            value,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            name=name.replace(".", "_"),
        )

    def state(self) -> Values:
        """All that the next step depends on: parameters, statistics, optimiser, number of the step, sums."""
        return {name: np.asarray(variable.numpy()) for name, variable in self._variables.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that `state` gives."""
        return {name: tuple(variable.shape) for name, variable in self._variables.items()}

    def load(self, values: Values) -> None:
        """The engine is as it was when `state` gave these values; names that are left out keep theirs.

        Raises ValueError for names or shapes that are not its own.
        """
        for name, value in values.items():
            if name not in self._variables or tuple(self._variables[name].shape) != value.shape:
                raise ValueError(f"{name} of the shape {value.shape} belongs to another network")
        for name, value in values.items():
            self._assign(name, value)

    def reload(self) -> None:
        """Parameters and statistics are those of the model's variables."""
        self.load(self.model_values())

    def model_values(self) -> Values:
        """Those of the model's own variables."""
        return self._layout.read()

    def kept(self) -> Values:
        """The values that an epoch is judged by, and kept by: the averages of the parameters, where there are any."""
        # The averages begin with the first step.
        averaged = self._recipe.ema_momentum > 0 and int(self._variables["step"].numpy()) > 0
        return {name: np.asarray(self._kept(name, averaged).numpy()) for name in NAMES}

    def write(self, values: Values) -> None:
        """The model's variables have these values, of which the engine itself takes no notice."""
        self._layout.write({name: values[name] for name in NAMES})

    def _kept(self, name: str, averaged: bool) -> Any:
        return self._variables[f"{AVERAGE}.{name}" if averaged and name in self._trained else name]

    def _assign(self, name: str, value: Any) -> None:
        import tensorflow as tf

        variable = self._variables[name]
        for own in self._local(variable):
            own.assign(tf.constant(value, variable.dtype))

    @property
    def sums(self) -> Sums:
        """Of all steps since `begin_epoch`."""
        return Sums(*(float(value) for value in self._variables["sums"].numpy()))

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizer.rate(self._variables["step"].numpy()))

    def begin_epoch(self) -> None:
        """The sums begin anew."""
        self._assign("sums", np.zeros(3))

    def train(self, batch: Batch, n_images: int, *, stop: bool = False) -> None:
        """One step on this worker's share of a batch of `n_images` in all; `stop` is told to all workers."""
        rows = self._rows_a_worker if self._has_fixed_shapes else len(batch.weights)
        parts = [_padded(part, rows) for part in (batch.images, batch.targets, batch.weights, batch.draws)]
        asked = self._train(*map(self._share, parts), np.float32(n_images), np.float32(stop))
        # Asking one device would mean to wait for it.
        self.is_stopped = stop if self.placement.workers == 1 else bool(self._local(asked)[0].numpy() > 0)

    def answers(
        self, images: NDArray[Any], draws: NDArray[np.float32] | None = None, *, averaged: bool = False
    ) -> list[NDArray[np.float32]]:
        """All outputs of the model for n images, which `draws` (n, 6) augment; with `averaged` by the averages.

        n is at most `rows_an_answer`. Only this worker's devices compute.
        """
        parts = [_padded(part, self.rows_an_answer) for part in (images, draws) if part is not None]
        outputs = self._forward(averaged, *map(self._share, parts))
        return [np.concatenate([part.numpy() for part in self._local(each)])[: len(images)] for each in outputs]

    @property
    def rows_an_answer(self) -> int:
        """Images that this worker's devices answer at a time."""
        return ANSWERED_AT_A_TIME * self._local_replicas

    @property
    def _has_fixed_shapes(self) -> bool:
        # Smaller batches are padded by images of no weight: several devices, and XLA, would compile them anew.
        return self.replicas > 1 or self._recipe.xla

    @property
    def _rows_a_worker(self) -> int:
        return -(-self._recipe.batch_size // self.replicas) * self._local_replicas

    def _share(self, part: NDArray[Any]) -> Any:
        """The part of each replica of this worker."""
        import tensorflow as tf

        if self.replicas == 1:
            return tf.constant(part)
        pieces = np.split(part, self._local_replicas)
        first = self.placement.rank * self._local_replicas
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(pieces[context.replica_id_in_sync_group - first])
        )

    def _local(self, value: Any) -> Sequence[Any]:
        results: Sequence[Any] = self.strategy.experimental_local_results(value)
        return results

    def _train_on(self, *batch: Any) -> Any:
        return self.strategy.run(self._step, args=batch)

    def _step(self, images: Any, targets: Any, weights: Any, draws: Any, n_images: Any, stop: Any) -> Any:
        """What a replica does with its share; returns how many workers were told to stop."""
        import tensorflow as tf

        recipe, own = self._recipe, self._variables
        context = tf.distribute.get_replica_context()
        step = tf.identity(own["step"])
        replica = tf.cast(context.replica_id_in_sync_group, tf.int64)
        seed = tf.stack([tf.constant(recipe.seed, tf.int64), step * self.replicas + replica])
        if recipe.augmentation is not None:
            images = augment(tf.cast(images, tf.float32), draws, recipe.augmentation)
        scale = tf.identity(own["scale"]) if recipe.scales_loss else tf.constant(1.0)
        vectors = [tf.identity(own[name]) for name in NAMES]
        gradients, statistics, loss, right = self._differentiate(
            vectors, seed, images, targets, weights, n_images, scale
        )
        counted = tf.reduce_sum(tf.cast(weights > 0, tf.float32))
        sums = tf.stack([loss, right, counted, stop])
        if self.replicas > 1:
            *gradients, sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [*gradients, sums])
            if statistics is not None:
                statistics = context.all_reduce(tf.distribute.ReduceOp.MEAN, statistics)
        own["sums"].assign_add(tf.cast(sums[:3], tf.float64))
        if statistics is not None:
            own["statistics"].assign(statistics)
        if recipe.scales_loss:
            gradients = [gradient / scale for gradient in gradients]
            is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
            tf.cond(is_finite, lambda: self._update(step, gradients), lambda: tf.constant(0.0))
            self._rescale(is_finite, scale)
        else:
            self._update(step, gradients)
        return sums[3]

    def _gradients(
        self, vectors: Any, seed: Any, images: Any, targets: Any, weights: Any, n_images: Any, scale: Any
    ) -> Any:
        """(gradients of the trained vectors, statistics, weighted loss, right answers), the latter two as sums."""
        import keras
        import tensorflow as tf

        trained = [vector for name, vector in zip(NAMES, vectors, strict=True) if name in self._trained]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(trained)
            outputs, statistics = self._layout.call(vectors, seed, images, training=True)
            logits = outputs[-1] if isinstance(outputs, list | tuple) else outputs
            losses = keras.losses.categorical_crossentropy(
                targets, logits, from_logits=True, label_smoothing=self._recipe.label_smoothing
            )
            loss = tf.reduce_sum(losses * weights)
            scaled = loss / n_images * scale
        gradients = tape.gradient(scaled, trained)
        is_right = tf.equal(tf.argmax(logits, axis=1), tf.argmax(targets, axis=1)) & (weights > 0)
        return gradients, statistics, loss, tf.reduce_sum(tf.cast(is_right, tf.float32))

    def _update(self, step: Any, gradients: Sequence[Any]) -> Any:
        import tensorflow as tf

        own, momentum = self._variables, self._recipe.ema_momentum
        vectors = [own[name] for name in self._trained]
        slots = [[own[f"{slot}.{name}"] for name in self._trained] for slot in self._optimizer.slots]
        rate = self._optimizer.apply(step, vectors, gradients, slots)
        for name in self._trained if momentum else ():
            average, value = own[f"{AVERAGE}.{name}"], tf.identity(own[name])
            average.assign(tf.where(step > 0, momentum * average + (1 - momentum) * value, value))
        own["step"].assign_add(1)
        return rate

    def _rescale(self, is_finite: Any, scale: Any) -> None:
        """Half the scale after an overflow, and twice after many steps without one."""
        import tensorflow as tf

        steps = tf.where(is_finite, self._variables["steps_without_overflow"] + 1, 0)
        grows = steps >= GROWTH_STEPS
        self._variables["scale"].assign(tf.where(is_finite, tf.where(grows, scale * 2, scale), scale / 2))
        self._variables["steps_without_overflow"].assign(tf.where(grows, tf.zeros_like(steps), steps))

    def _answer(self, averaged: bool, *parts: Any) -> Any:
        return self.strategy.run(self._outputs, args=(averaged, *parts))

    def _outputs(self, averaged: bool, images: Any, draws: Any = None) -> list[Any]:
        import tensorflow as tf

        images = tf.cast(images, tf.float32)
        if draws is not None and self._recipe.augmentation is not None:
            images = augment(images, draws, self._recipe.augmentation)
        vectors = [tf.identity(self._kept(name, averaged)) for name in NAMES]
        outputs, _ = self._layout.call(vectors, tf.zeros(2, tf.int64), images, training=False)
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _padded(part: NDArray[Any], rows: int) -> NDArray[Any]:
    """`part` with rows of zeros at its end, `rows` in all; images of weight 0 add nothing to loss and gradients."""
    missing = rows - len(part)
    if not missing:
        return part
    return np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])
