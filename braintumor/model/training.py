"""Training of the classifier: a head on cached features, then fine-tuning, then temperature."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.interruption import deferred_interruptions
from braintumor.labels import CLASS_NAMES
from braintumor.model.batches import Batch, augmentation_draws, batches
from braintumor.model.checkpoints import State, pack, unpack
from braintumor.model.densenet import Classifier, import_keras
from braintumor.model.distribution import Placement, broadcast, sum_over_workers
from braintumor.model.engine import ALONE, Engine, Recipe
from braintumor.model.flat import NAMES, Values
from braintumor.model.image_store import Images
from braintumor.model.optimizers import FlatOptimizer, constant_rate, make_optimizer
from braintumor.params import TrainParams
from braintumor.progress import Advance, Progress

# Between two checkpoints within an epoch: what the loss of a node may cost, where an epoch takes hours.
CHECKPOINT_EVERY_S = 600.0


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 (n, size, size, 1) and their labels int64 (n,), indices into CLASS_NAMES."""

    images: Images
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
    best_values: Values = field(default_factory=dict)
    # What an earlier attempt spent on the epoch that goes on.
    seconds: float = 0.0

    def add(self, epoch: Epoch, values: Callable[[], Values]) -> None:
        """Keep the row, and the network's values if it is the best so far; a loss that is not finite ends it all."""
        if not np.isfinite([epoch.train_loss, epoch.val_loss]).all():
            raise UserError(
                f"the loss became {epoch.train_loss} in epoch {epoch.epoch} ({epoch.phase}); lower train.learning_rate"
                " or choose precision float32"
            )
        self.epochs.append(epoch)
        if self.best is None or epoch.val_loss < self.best.val_loss:
            self.best, self.best_values = epoch, values()
        self.on_epoch(epoch)

    def rows(self) -> list[dict[str, Any]]:
        """The epochs as rows of history.csv."""
        return [asdict(epoch) for epoch in self.epochs]

    def count(self, phase: str) -> int:
        """How many epochs of the phase, 'head' or 'fine-tuning', have been run."""
        return sum(epoch.phase == phase for epoch in self.epochs)


def make_reproducible(seed: int, *, xla: bool = False) -> None:
    """The same inputs, seed and hardware give the same weights from here on; with `xla`, which can't, nearly the same.

    XLA has no deterministic gradient of DenseNet's max pooling.
    """
    keras = import_keras()
    import tensorflow as tf

    # Names that Keras counts up within a process stand in the saved model.
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    if not xla:
        tf.config.experimental.enable_op_determinism()


def make_engine(
    classifier: Classifier, params: TrainParams, n_train: int, strategy: Any = None, placement: Placement = ALONE
) -> Engine:
    """The engine that fine-tunes the classifier on `n_train` images; it answers with features (n, 1920) and logits."""
    keras = import_keras()
    network = classifier.network
    model = keras.Model(network.input, [network.get_layer("features").output, network.output])
    total_steps = max(1, steps_per_epoch(n_train, params) * params.epochs)
    recipe = Recipe(
        seed=params.seed,
        batch_size=params.batch_size,
        label_smoothing=params.label_smoothing,
        augmentation=params.augmentation,
        ema_momentum=params.ema_momentum,
        scales_loss=params.precision == "mixed_float16",
        xla=params.xla,
    )
    return Engine(model, lambda decays: make_optimizer(params, total_steps, decays), recipe, strategy, placement)


def state_of(engine: Engine, history: History, step: int = 0, seconds: float = 0.0) -> State:
    """The training as it stands between two epochs, or after `step` steps of one, which took `seconds`."""
    kept = engine.kept()
    is_best = step == 0 and all(np.array_equal(value, kept[name]) for name, value in history.best_values.items())
    return State(history.rows(), step, engine.state(), None if is_best else history.best_values, seconds)


def check_state(engine: Engine, state: State) -> None:
    """Raises ValueError where the state is not one of such an engine."""
    own = engine.shapes()
    # Before there is an epoch, there is no best one.
    best = state.best or None
    for values, names in ((state.values, own.keys()), *([(best, NAMES)] if best else [])):
        if {name: value.shape for name, value in values.items()} != {name: own[name] for name in names}:
            raise ValueError("it is of another network, optimiser or precision")


def restore(engine: Engine, history: History, state: State) -> None:
    """Engine and history are as `state_of` found them; `fine_tune` goes on from the state's step.

    Raises ValueError as `check_state` does, before anything is changed.
    """
    check_state(engine, state)
    engine.load(state.values)
    history.seconds = state.seconds
    history.epochs = [Epoch(**row) for row in state.rows]
    history.best = min(history.epochs, key=lambda epoch: epoch.val_loss, default=None)
    history.best_values = engine.kept() if state.best is None else state.best


def state_for_all(engine: Engine, state: State | None) -> State | None:
    """The first worker's state, on every worker; what the others give is not looked at."""
    if engine.placement.workers == 1:
        return state
    packed = None if state is None else {"state": np.frombuffer(pack(state, ""), np.uint8)}
    found = broadcast(engine.strategy, engine.placement, packed)
    return None if found is None else unpack(found["state"].tobytes(), "")


def fit_head(
    engine: Engine,
    classifier: Classifier,
    train: LabelledImages,
    val: LabelledImages,
    params: TrainParams,
    history: History,
    progress: Progress,
) -> None:
    """The head is trained on features of the frozen backbone, which are computed once for each view of an image.

    The first view is the image itself, others are augmented. Of more than `params.images_in_memory` views a random part
    is taken. The engine ends with the best head.
    """
    n = len(train.labels)
    views = np.arange(n * params.head_views)
    if len(views) > params.images_in_memory:
        chosen = np.random.default_rng((params.seed, 0)).choice(views, params.images_in_memory, replace=False)
        views = np.sort(chosen)
    counts = [int((views < n).sum()), int((views >= n).sum()), len(val.labels)]
    advance = progress("train: features for the head", sum(_own_answers(engine, count) for count in counts))
    features = _view_features(engine, train, views, params, advance)
    val_features = outputs_of(engine, val.images, between=advance)[0]
    labels = train.labels[views % n]
    weights, targets = sample_weights(labels, params), one_hot(labels)
    head = _head_engine(classifier, features.shape[1], params)
    no_draws = np.zeros((len(views), 0), np.float32)
    advance = progress("train: head on cached features", params.head_epochs)
    for epoch in range(1, params.head_epochs + 1):
        started = time.monotonic()
        head.begin_epoch()
        order = np.random.default_rng((params.seed, 0, epoch)).permutation(len(views))
        for start in range(0, len(order), params.batch_size):
            rows = order[start : start + params.batch_size]
            head.train(Batch(features[rows], targets[rows], weights[rows], no_draws[rows]), len(rows))
        sums = head.sums
        val_loss, val_accuracy = score_logits(outputs_of(head, val_features)[0], val.labels)
        row = Epoch(
            epoch, "head", sums.loss / sums.images, sums.right / sums.images, val_loss, val_accuracy,
            params.head_learning_rate, time.monotonic() - started,
        )  # fmt: skip

        def values() -> Values:
            head.write(head.kept())
            return engine.model_values()

        history.add(row, values)
        advance()
    # The next phase starts from the best head, not from the last.
    engine.load(history.best_values)


def _view_features(
    engine: Engine, train: LabelledImages, views: NDArray[np.int64], params: TrainParams, advance: Advance
) -> NDArray[np.float32]:
    """Features (n, 1920) of views; view v is image v % n_images, as it is where v < n_images."""
    n = len(train.labels)
    plain, varied = views[views < n], views[views >= n]
    found = [outputs_of(engine, train.images, plain, between=advance)[0]]
    if len(varied):
        draws = augmentation_draws(params.seed, 0, varied)
        found.append(outputs_of(engine, train.images, varied % n, draws, between=advance)[0])
    return np.concatenate(found)


def _head_engine(classifier: Classifier, n_features: int, params: TrainParams) -> Engine:
    keras = import_keras()
    features = keras.Input((n_features,))
    layer = classifier.network.get_layer
    head = keras.Model(features, layer("logits")(layer("dropout")(features)))
    rate = constant_rate(params.head_learning_rate)
    recipe = Recipe(params.seed, params.batch_size, params.label_smoothing, augmentation=None)
    # One device: every worker trains the same head, and comes to the same.
    return Engine(head, lambda decays: FlatOptimizer("adam", rate, 0.0, tuple(decays)), recipe)


def fine_tune(
    engine: Engine,
    train: LabelledImages,
    val: LabelledImages,
    params: TrainParams,
    history: History,
    advance: Advance,
    on_state: Callable[[State], None] = lambda state: None,
    first_step: int = 0,
) -> None:
    """All kernels are trained, on augmented images; the model ends with the values of the best epoch.

    `on_state` hears of the state after every epoch, every ten minutes, and before SIGTERM or Ctrl-C end the process;
    these wait for the step under way, or the next one where several workers have to agree. With such a state restored
    and its step given as `first_step`, the training goes on as if nothing had happened; on a CPU, to the last bit. With
    `params.ema_momentum` an epoch is judged, and kept, by the averaged weights; the training goes on with its own.
    """
    n, batch_size = len(train.labels), params.batch_size
    n_steps = steps_per_epoch(n, params)
    placement, weights = engine.placement, sample_weights(train.labels, params)
    first = history.count("head")
    told = time.monotonic()
    is_alone = placement.workers == 1
    with deferred_interruptions() as interruption:

        def put_down(step: int) -> None:
            on_state(state_of(engine, history, step, time.monotonic() - started))
            interruption.leave()

        def between_answers() -> None:
            # Several workers wait for each other's answers.
            if interruption.is_asked and is_alone:
                put_down(n_steps)

        while history.count("fine-tuning") < params.epochs and not _has_stopped_improving(history, params):
            number = history.count("fine-tuning") + 1
            started, history.seconds = time.monotonic() - history.seconds, 0.0
            if not first_step:
                engine.begin_epoch()
            fed = batches(
                train.images, train.labels, weights, params, number, first_step, placement.rank, placement.workers
            )
            for step, batch in enumerate(fed, start=first_step + 1):
                engine.train(batch, min(batch_size, n - (step - 1) * batch_size), stop=interruption.is_asked)
                advance()
                if engine.is_stopped or (interruption.is_asked and is_alone):
                    put_down(step)
                if time.monotonic() - told > CHECKPOINT_EVERY_S:
                    on_state(state_of(engine, history, step, time.monotonic() - started))
                    told = time.monotonic()
            first_step = 0
            sums = engine.sums
            averaged = params.ema_momentum > 0
            logits = outputs_of(engine, val.images, averaged=averaged, between=between_answers)[-1]
            val_loss, val_accuracy = score_logits(logits, val.labels)
            row = Epoch(
                first + number, "fine-tuning", sums.loss / sums.images, sums.right / sums.images, val_loss,
                val_accuracy, engine.rate, time.monotonic() - started,
            )  # fmt: skip
            history.add(row, engine.kept)
            on_state(state_of(engine, history))
            if interruption.is_asked and is_alone:
                interruption.leave()
            told = time.monotonic()
    engine.load(history.best_values)
    engine.write(history.best_values)


def _has_stopped_improving(history: History, params: TrainParams) -> bool:
    """Whether so many epochs of fine-tuning in a row were no better than one before them."""
    since_best = len(history.epochs) - (history.best.epoch if history.best else 0)
    return 0 < params.early_stopping_epochs <= min(since_best, history.count("fine-tuning"))


def outputs_of(
    engine: Engine,
    images: Images,
    rows: NDArray[np.int64] | None = None,
    draws: NDArray[np.float32] | None = None,
    *,
    averaged: bool = False,
    between: Callable[[], None] = lambda: None,
) -> list[NDArray[np.float32]]:
    """All outputs of the engine's model for images, or those of `rows`; each worker computes a share of them.

    `between` is called before each of the engine's answers.
    """
    rows = np.arange(len(images)) if rows is None else rows
    placement, size = engine.placement, engine.rows_an_answer
    found = [np.zeros((len(rows), width), np.float32) for width in engine.widths]
    for start in range(placement.rank * size, len(rows), placement.workers * size):
        part = slice(start, start + size)
        between()
        outputs = engine.answers(images[rows[part]], None if draws is None else draws[part], averaged=averaged)
        for whole, output in zip(found, outputs, strict=True):
            whole[part] = output
    if placement.workers == 1:
        return found
    # Where one worker has the numbers, all others have zeros.
    return [sum_over_workers(engine.strategy, whole) for whole in found]


def _own_answers(engine: Engine, n_images: int) -> int:
    """How often this worker calls `between` in `outputs_of`."""
    size, placement = engine.rows_an_answer, engine.placement
    return len(range(placement.rank * size, n_images, placement.workers * size))


def steps_per_epoch(n_images: int, params: TrainParams) -> int:
    """Training steps of one epoch; the last, smaller batch counts."""
    return -(-n_images // params.batch_size)


def one_hot(labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Targets (n, 4)."""
    return np.eye(len(CLASS_NAMES), dtype=np.float32)[labels]


def sample_weights(labels: NDArray[np.int64], params: TrainParams) -> NDArray[np.float32]:
    """One weight an image, mean 1: all classes weigh the same with `class_weights`, else all images."""
    if not params.class_weights:
        return np.ones(len(labels), np.float32)
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    return (len(labels) / (np.count_nonzero(counts) * counts[labels])).astype(np.float32)


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
