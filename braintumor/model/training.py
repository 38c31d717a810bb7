"""Training of the classifier: a head on cached features, then fine-tuning, then temperature."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.model.augmentation import augment
from braintumor.model.checkpoints import State
from braintumor.model.densenet import Classifier, import_keras
from braintumor.model.inference import BATCH_SIZE
from braintumor.params import TrainParams
from braintumor.progress import Advance

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 (n, size, size, 1) and their labels int64 (n,), indices into CLASS_NAMES."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """One row of the history; `train_loss` holds the class weights and the smoothing, `val_loss` neither."""

    epoch: int
    phase: str
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float


OnEpoch = Callable[[Epoch], None]
OnState = Callable[[State], None]


@dataclass
class History:
    """The epochs of a training so far, and the best of them: the lowest validation loss."""

    on_epoch: OnEpoch
    epochs: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None
    best_weights: list[NDArray[Any]] = field(default_factory=list)

    def add(self, epoch: Epoch, network: "keras.Model") -> None:
        """Keep the row, and the network's weights if it is the best so far; a loss that is not finite ends it all."""
        if not np.isfinite([epoch.train_loss, epoch.val_loss]).all():
            raise UserError(
                f"the loss became {epoch.train_loss} in epoch {epoch.epoch} ({epoch.phase}); lower train.learning_rate"
                " or choose precision float32"
            )
        self.epochs.append(epoch)
        if self.best is None or epoch.val_loss < self.best.val_loss:
            self.best, self.best_weights = epoch, network.get_weights()
        self.on_epoch(epoch)

    def rows(self) -> list[dict[str, Any]]:
        """The epochs as rows of history.csv."""
        return [asdict(epoch) for epoch in self.epochs]

    def count(self, phase: str) -> int:
        """How many epochs of the phase, 'head' or 'fine-tuning', have been run."""
        return sum(epoch.phase == phase for epoch in self.epochs)


def make_reproducible(seed: int) -> None:
    """The same inputs, seed and hardware give the same weights from here on."""
    keras = import_keras()
    import tensorflow as tf

    # Names that Keras counts up within a process stand in the saved model.
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def state_of(classifier: Classifier, history: History, optimizer: Any = None) -> State:
    """The training as it stands between two epochs."""
    best_weights = history.best_weights
    pairs = zip(best_weights, classifier.network.get_weights(), strict=True)
    is_best = all(np.array_equal(best, current) for best, current in pairs)
    return State(
        rows=history.rows(),
        # More than the weights: the seeds of the dropout, too.
        network=[variable.numpy() for variable in classifier.network.variables],
        optimizer=[variable.numpy() for variable in optimizer.variables] if optimizer is not None else [],
        best_weights=None if is_best else best_weights,
    )


def restore(classifier: Classifier, history: History, state: State) -> None:
    """The network and the history are as `state_of` found them; `fine_tune` takes the rest."""
    _assign(classifier.network.variables, state.network)
    history.epochs = [Epoch(**row) for row in state.rows]
    history.best = min(history.epochs, key=lambda epoch: epoch.val_loss)
    history.best_weights = classifier.network.get_weights() if state.best_weights is None else state.best_weights


def _assign(variables: Sequence[Any], values: Sequence[NDArray[Any]]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def fit_head(
    classifier: Classifier,
    train: LabelledImages,
    val: LabelledImages,
    params: TrainParams,
    history: History,
    advance: Advance,
) -> None:
    """The head is trained on features of the frozen backbone, which are computed once."""
    keras = import_keras()
    network = classifier.network
    extractor = keras.Model(network.input, network.get_layer("features").output)
    train_features = extractor.predict(train.images.astype(np.float32), batch_size=BATCH_SIZE, verbose=0)
    val_features = extractor.predict(val.images.astype(np.float32), batch_size=BATCH_SIZE, verbose=0)

    features = keras.Input(train_features.shape[1:])
    logits = network.get_layer("logits")
    head = keras.Model(features, logits(network.get_layer("dropout")(features)))
    _compile(head, keras.optimizers.Adam(params.head_learning_rate), params, xla=False)
    weights = sample_weights(train.labels, params)
    targets = np.eye(len(CLASS_NAMES), dtype=np.float32)[train.labels]
    for epoch in range(1, params.head_epochs + 1):
        started = time.monotonic()
        fitted = head.fit(
            train_features, targets, sample_weight=weights, batch_size=params.batch_size, epochs=1, verbose=0
        ).history
        val_loss, val_accuracy = score_logits(head.predict(val_features, batch_size=1024, verbose=0), val.labels)
        row = Epoch(
            epoch, "head", fitted["loss"][0], fitted["accuracy"][0], val_loss, val_accuracy,
            params.head_learning_rate, time.monotonic() - started,
        )  # fmt: skip
        history.add(row, network)
        advance()
    # The next phase starts from the best head, not from the last.
    network.set_weights(history.best_weights)


def fine_tune(
    classifier: Classifier,
    train: LabelledImages,
    val: LabelledImages,
    params: TrainParams,
    history: History,
    advance: Advance,
    on_state: OnState = lambda state: None,
    optimizer_state: Sequence[NDArray[Any]] = (),
) -> None:
    """All kernels are trained, on augmented images; the network ends with the weights of the best epoch.

    `on_state` hears of the state after every epoch. With the history and the network of such a state restored, and its
    `optimizer_state` given, the training goes on as if nothing had happened; on a CPU, to the last bit. With
    `params.ema_momentum` an epoch is judged, and kept, by the averaged weights; the training goes on with its own.
    """
    keras = import_keras()
    network = classifier.network
    steps = steps_per_epoch(len(train.labels), params)
    first = history.count("head")
    optimizer = make_optimizer(params, total_steps=steps * params.epochs)
    _compile(network, optimizer, params, xla=params.xla)
    if optimizer_state:
        optimizer.build(network.trainable_variables)
        _assign(optimizer.variables, optimizer_state)

    class Steps(keras.callbacks.Callback):  # type: ignore[name-defined]
        def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
            advance()

        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            if params.ema_momentum:
                # fit() ends by overwriting them with the averages.
                self.own_weights = [variable.numpy() for variable in network.trainable_variables]

    callback = Steps()
    while history.count("fine-tuning") < params.epochs and not _has_stopped_improving(history, params):
        number = history.count("fine-tuning") + 1
        started = time.monotonic()
        batches = training_batches(train, params, epoch=number)
        fitted = network.fit(batches, epochs=1, verbose=0, shuffle=False, callbacks=[callback]).history
        logits = network.predict(val.images.astype(np.float32), batch_size=BATCH_SIZE, verbose=0)
        val_loss, val_accuracy = score_logits(logits, val.labels)
        row = Epoch(
            first + number, "fine-tuning", fitted["loss"][0], fitted["accuracy"][0], val_loss, val_accuracy,
            float(optimizer.learning_rate), time.monotonic() - started,
        )  # fmt: skip
        history.add(row, network)
        if params.ema_momentum:
            _assign(network.trainable_variables, callback.own_weights)
        on_state(state_of(classifier, history, optimizer))
    network.set_weights(history.best_weights)


def _has_stopped_improving(history: History, params: TrainParams) -> bool:
    """Whether so many epochs of fine-tuning in a row were no better than one before them."""
    since_best = len(history.epochs) - (history.best.epoch if history.best else 0)
    return 0 < params.early_stopping_epochs <= min(since_best, history.count("fine-tuning"))


def _compile(network: "keras.Model", optimizer: Any, params: TrainParams, *, xla: bool) -> None:
    losses = import_keras().losses
    network.compile(
        optimizer,
        losses.CategoricalCrossentropy(from_logits=True, label_smoothing=params.label_smoothing),
        weighted_metrics=[],
        metrics=["accuracy"],
        jit_compile=xla,
    )


def steps_per_epoch(n_images: int, params: TrainParams) -> int:
    """Training steps of one epoch; the last, smaller batch counts."""
    return -(-n_images // params.batch_size)


def training_batches(train: LabelledImages, params: TrainParams, epoch: int) -> Any:
    """A tf.data.Dataset of one epoch: (images, one-hot labels, sample weights), shuffled and augmented by the seed."""
    import tensorflow as tf

    order = np.random.default_rng((params.seed, epoch)).permutation(len(train.labels))
    targets = np.eye(len(CLASS_NAMES), dtype=np.float32)[train.labels]
    weights = sample_weights(train.labels, params)

    def gather(step: Any, rows: Any) -> tuple[Any, ...]:
        images, labels, row_weights = tf.numpy_function(
            lambda index: (train.images[index], targets[index], weights[index]),
            [rows],
            [tf.uint8, tf.float32, tf.float32],
        )
        images = tf.ensure_shape(images, (None, *train.images.shape[1:]))
        return step, images, tf.ensure_shape(labels, (None, len(CLASS_NAMES))), tf.ensure_shape(row_weights, (None,))

    def vary(step: Any, images: Any, labels: Any, row_weights: Any) -> tuple[Any, Any, Any]:
        seed = tf.stack([tf.constant(params.seed, tf.int32), tf.cast(step, tf.int32) + epoch * 100_000])
        return augment(tf.cast(images, tf.float32), seed, params.augmentation), labels, row_weights

    batches = tf.data.Dataset.from_tensor_slices(order).batch(params.batch_size).enumerate().map(gather)
    # One call at a time: deterministic ops would make it so anyway. It runs ahead of the step that it feeds.
    return batches.map(vary).prefetch(tf.data.AUTOTUNE)


def sample_weights(labels: NDArray[np.int64], params: TrainParams) -> NDArray[np.float32]:
    """One weight an image, mean 1: all classes weigh the same with `class_weights`, else all images."""
    if not params.class_weights:
        return np.ones(len(labels), np.float32)
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    return (len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32)


def make_optimizer(params: TrainParams, total_steps: int) -> Any:
    """The optimiser with its schedule over `total_steps`; weight decay spares biases and BatchNorm."""
    keras = import_keras()
    rate: Any = params.learning_rate
    averaging = {"use_ema": True, "ema_momentum": params.ema_momentum} if params.ema_momentum else {}
    if params.schedule == "cosine":
        # Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983, with a linear warm-up.
        warmup_steps = round(total_steps * params.warmup_fraction)
        rate = keras.optimizers.schedules.CosineDecay(
            params.learning_rate * (0.01 if warmup_steps else 1),
            max(1, total_steps - warmup_steps),
            warmup_target=params.learning_rate if warmup_steps else None,
            warmup_steps=warmup_steps,
        )
    match params.optimizer:
        case "sgd":
            optimizer = keras.optimizers.SGD(
                rate, momentum=0.9, nesterov=True, weight_decay=params.weight_decay or None, **averaging
            )
        case "adam":
            optimizer = keras.optimizers.Adam(rate, **averaging)
        case "adamw":
            # Loshchilov & Hutter, ICLR 2019, arXiv:1711.05101.
            optimizer = keras.optimizers.AdamW(rate, weight_decay=params.weight_decay, **averaging)
    if params.optimizer != "adam" and params.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    if params.precision == "mixed_float16":
        return keras.mixed_precision.LossScaleOptimizer(optimizer)
    return optimizer


def score_logits(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, float]:
    """(mean negative log-likelihood, accuracy) of logits (n, 4) for labels (n,)."""
    from scipy.special import log_softmax

    likelihood = log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    return float(-likelihood.mean()), float((logits.argmax(axis=1) == labels).mean())


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature in 0.05..20 with the lowest negative log-likelihood (Guo et al. 2017, arXiv:1706.04599).

    Each label counts as (n + 1) / (n + 2) sure, as in Platt (1999): where all n answers are right, the plain likelihood
    has no minimum, and would make the model as confident as the range allows.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    n, n_classes = logits.shape
    doubt = n_classes / (n_classes - 1) / (n + 2)

    def loss(log_temperature: float) -> float:
        log_likelihoods = log_softmax(logits / np.exp(log_temperature), axis=1)
        on_labels = log_likelihoods[np.arange(n), labels].mean()
        return float(-(1 - doubt) * on_labels - doubt * log_likelihoods.mean())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))
