import os
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from braintumor.errors import UserError
from braintumor.model import training
from braintumor.model.checkpoints import Checkpoints, State
from braintumor.model.densenet import Classifier, build_classifier, import_keras
from braintumor.model.flat import Values
from braintumor.model.training import Epoch, History, LabelledImages
from braintumor.params import Params
from braintumor.progress import silent


def labelled(n: int, seed: int = 0) -> LabelledImages:
    """Images whose brightness is their class."""
    labels = np.arange(n) % 4
    noise = np.random.default_rng(seed).integers(0, 30, (n, 32, 32, 1))
    return LabelledImages((noise + labels[:, None, None, None] * 70).astype(np.uint8), labels.astype(np.int64))


def epoch(number: int, val_loss: float) -> Epoch:
    return Epoch(number, "head", 1.0, 0.5, val_loss, 0.5, 0.1, 1.0)


def test_history_keeps_the_values_of_the_lowest_validation_loss() -> None:
    heard: list[Epoch] = []
    asked: list[int] = []
    history = History(on_epoch=heard.append)

    def values(number: int) -> Values:
        asked.append(number)
        return {"decayed": np.array([number], np.float32)}

    for number, val_loss in enumerate((0.9, 0.4, 0.6), start=1):
        history.add(epoch(number, val_loss), partial(values, number))
    assert history.best is heard[1]
    assert history.best_values["decayed"] == [2]
    # A copy of them costs time and memory.
    assert asked == [1, 2]
    assert [row["val_loss"] for row in history.rows()] == [0.9, 0.4, 0.6]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_training(loss: float) -> None:
    with pytest.raises(UserError, match=r"lower train\.learning_rate"):
        History(on_epoch=lambda row: None).add(epoch(1, loss), dict)


def test_class_weights_make_all_classes_weigh_the_same(recipe: Params) -> None:
    labels = np.array([0] * 10 + [1] * 5 + [2] * 4 + [3])
    weights = training.sample_weights(labels, recipe.train)
    assert weights.mean() == pytest.approx(1)
    assert [weights[labels == index].sum() for index in range(4)] == pytest.approx([5] * 4)
    equal = training.sample_weights(labels, recipe.train.model_copy(update={"class_weights": False}))
    assert (equal == 1).all()


def test_temperature_recovers_the_factor_that_logits_were_multiplied_by() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 4))
    labels = np.array([random.choice(4, p=row) for row in softmax(logits, axis=1)])
    for factor in (0.5, 1.0, 3.0):
        assert training.fit_temperature((logits * factor).astype(np.float32), labels) == pytest.approx(factor, rel=0.05)


def test_temperature_of_flawless_logits_claims_no_more_than_their_number_allows() -> None:
    labels = np.arange(48) % 4
    logits = np.eye(4)[labels] * 6.0
    temperature = training.fit_temperature(logits.astype(np.float32), labels)
    confidence = softmax(logits / temperature, axis=1).max()
    assert confidence == pytest.approx(49 / 50, abs=1e-3)


def test_score_is_the_mean_negative_log_likelihood() -> None:
    logits = np.log(np.array([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.3, 0.2]], np.float32))
    loss, accuracy = training.score_logits(logits, np.array([0, 1]))
    assert loss == pytest.approx(-(np.log(0.7) + np.log(0.25)) / 2, rel=1e-6)
    assert accuracy == 0.5


def test_head_learns_from_features_of_the_frozen_backbone(recipe: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    applications = import_keras().applications
    from keras.src.applications.densenet import DenseNet

    # All kinds of layers, and fewer of them.
    monkeypatch.setattr(applications, "DenseNet201", partial(DenseNet, [1, 1, 1, 1], name="densenet201"))
    training.make_reproducible(1)
    train = recipe.train.model_copy(update={"head_epochs": 30, "head_learning_rate": 0.01, "dropout": 0.0})
    classifier = build_classifier(train)
    before = [weight.copy() for weight in classifier.backbone.get_weights()]
    history, announced, done = History(on_epoch=lambda row: None), dict[str, int](), Counter[str]()

    def progress(title: str, total: int) -> Callable[[], None]:
        announced[title] = total
        return lambda: done.update([title])

    engine = training.make_engine(classifier, train, 200)
    training.fit_head(engine, classifier, labelled(200), labelled(16, seed=1), train, history, progress)
    assert len(history.epochs) == 30
    # 64 images at a time: four times for 200, once for 16.
    assert announced == done == {"train: features for the head": 5, "train: head on cached features": 30}
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    assert history.best is not None
    assert history.best.val_accuracy >= 0.75
    for one, two in zip(before, classifier.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def small_classifier(precision: str) -> Classifier:
    """A network that has all that the big one has: kernels, BatchNorm that trains, dropout, a head in 32 bits."""
    keras = import_keras()
    training.make_reproducible(5)
    keras.config.set_dtype_policy(precision)
    image = keras.Input((32, 32, 1), name="image")
    maps = keras.layers.BatchNormalization()(
        keras.layers.Conv2D(4, 3, strides=4)(keras.layers.Rescaling(1 / 255)(image))
    )
    features = keras.layers.GlobalAveragePooling2D(name="features")(keras.layers.Activation("relu")(maps))
    kept = keras.layers.Dropout(0.3, name="dropout")(features)
    logits = keras.layers.Dense(4, name="logits", dtype="float32")(kept)
    keras.config.set_dtype_policy("float32")
    network = keras.Model(image, logits)
    return Classifier(network, network, is_pretrained=True)


def trained(
    train: Any, state: State | None = None, advance: Callable[[], object] = lambda: None
) -> tuple[History, list[Any], list[State]]:
    """The history, all variables and the states of a training, which goes on from `state` where there is one."""
    classifier, history, states = small_classifier(train.precision), History(on_epoch=lambda row: None), []
    engine = training.make_engine(classifier, train, 24)
    if state is None:
        training.fit_head(engine, classifier, labelled(24), labelled(16, seed=1), train, history, silent)
        states.append(training.state_of(engine, history))
    else:
        training.restore(engine, history, state)
    training.fine_tune(
        engine, labelled(24), labelled(16, seed=1), train, history, advance, states.append, state.step if state else 0
    )
    return history, [variable.numpy() for variable in classifier.network.variables], states


def figures(history: History) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows()]


def recipe_with(recipe: Params, **changes: Any) -> Any:
    small = {"head_epochs": 3, "epochs": 3, "learning_rate": 0.01, "dropout": 0.3, "early_stopping_epochs": 0}
    return recipe.train.model_copy(update=small | changes)


@pytest.mark.parametrize(
    ("optimizer", "precision", "ema_momentum", "resumed_after"),
    [
        ("adamw", "float32", 0.0, ((3, 0), (4, 4))),
        ("adam", "mixed_float16", 0.8, ((3, 2), (4, 0))),
        ("sgd", "float32", 0.0, ((4, 6),)),
    ],
)
def test_training_goes_on_from_its_states_as_if_nothing_had_happened(
    recipe: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    precision: str,
    ema_momentum: float,
    resumed_after: tuple[tuple[int, int], ...],
) -> None:
    decay = 0.0 if optimizer == "adam" else 0.01
    train = recipe_with(recipe, optimizer=optimizer, precision=precision, weight_decay=decay, ema_momentum=ema_momentum)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", -1)
    history, variables, states = trained(train)
    # One after the head, after each of 6 steps, and after each epoch.
    places = [(epochs, step) for epochs in (3, 4, 5) for step in range(7)] + [(6, 0)]
    assert [(len(state.rows), state.step) for state in states] == places
    assert [(row["epoch"], row["phase"]) for row in history.rows()] == [
        (number, "head" if number <= 3 else "fine-tuning") for number in range(1, 7)
    ]
    by_place = {(len(state.rows), state.step): state for state in states}
    for number, place in enumerate(resumed_after):
        # As it comes back from its file.
        state, key = by_place[place], f"{number:064}"
        Checkpoints(tmp_path, key).save(state)
        again, resumed, later = trained(train, state=Checkpoints(tmp_path, key).load())
        assert len(later) == len(states) - 1 - states.index(state)
        assert figures(again) == figures(history)
        assert again.rows()[: place[0]] == history.rows()[: place[0]]
        assert again.best is not None and history.best is not None
        assert again.best.epoch == history.best.epoch
        # What the epoch had taken before counts.
        assert again.epochs[place[0]].seconds > state.seconds
        for one, two in zip(resumed, variables, strict=True):
            np.testing.assert_array_equal(one, two)


def test_signal_in_an_epoch_is_acted_on_after_the_step_under_way(recipe: Params) -> None:
    train, steps = recipe_with(recipe), []

    def advance() -> None:
        steps.append(1)
        if len(steps) == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    states: list[State] = []
    classifier, history = small_classifier("float32"), History(on_epoch=lambda row: None)
    engine = training.make_engine(classifier, train, 24)
    with pytest.raises(SystemExit) as end:
        training.fine_tune(engine, labelled(24), labelled(16), train, history, advance, states.append)
    assert end.value.code == 143
    assert [(len(state.rows), state.step) for state in states] == [(1, 0), (1, 2)]
    assert len(steps) == 8


def test_averaged_weights_are_judged_and_kept_while_the_training_goes_on_with_its_own(recipe: Params) -> None:
    train = recipe_with(recipe, epochs=2)

    def tuned(params: Any) -> tuple[list[Any], list[Values], list[State]]:
        """The network's kernels in the end, the values after every step, and the states after the epochs."""
        classifier, steps, states = small_classifier("float32"), [], []
        engine = training.make_engine(classifier, params, 24)
        training.fine_tune(
            engine, labelled(24), labelled(16, seed=1), params, History(on_epoch=lambda row: None),
            lambda: steps.append(engine.state()), states.append,
        )  # fmt: skip
        return [np.ravel(variable.numpy()) for variable in classifier.network.trainable_variables], steps, states

    _, steps, plain = tuned(train)
    found, _, averaged = tuned(train.model_copy(update={"ema_momentum": 0.8}))
    for own, expected in zip(averaged, plain, strict=True):
        for name in ("decayed", "undecayed"):
            np.testing.assert_allclose(own.values[name], expected.values[name], rtol=1e-5, atol=1e-6)
        assert own.rows[-1]["val_loss"] != expected.rows[-1]["val_loss"]
    average = steps[0]["decayed"]
    for values in steps[1:]:
        average = 0.8 * average + 0.2 * values["decayed"]
    # The second epoch is the better one; its averages are the network's at the end.
    assert averaged[1].rows[1]["val_loss"] < averaged[1].rows[0]["val_loss"]
    kernels = np.concatenate([found[0], found[4]])
    np.testing.assert_allclose(kernels, average, rtol=1e-4, atol=1e-5)


def test_state_of_another_network_changes_nothing(recipe: Params) -> None:
    classifier, history = small_classifier("float32"), History(on_epoch=lambda row: None)
    engines = {
        optimizer: training.make_engine(classifier, recipe_with(recipe, optimizer=optimizer), 24)
        for optimizer in ("sgd", "adamw")
    }
    history.add(epoch(1, 0.5), engines["sgd"].kept)
    good = training.state_of(engines["sgd"], history)
    training.check_state(engines["sgd"], good)
    before = engines["adamw"].state()
    shortened = dict(good.values, decayed=good.values["decayed"][1:])
    for optimizer, state in (
        ("adamw", good),
        ("sgd", State(good.rows, 0, shortened, None)),
        ("sgd", State(good.rows, 0, good.values, shortened)),
    ):
        with pytest.raises(ValueError, match="another network"):
            training.restore(engines[optimizer], History(on_epoch=lambda row: None), state)
    for name, value in engines["adamw"].state().items():
        np.testing.assert_array_equal(value, before[name])


def with_val_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float], done: int = 0) -> None:
    """The validation losses of the epochs to come, after `done` of them."""
    coming = iter(losses[done:])
    monkeypatch.setattr(training, "score_logits", lambda logits, labels: (next(coming), 0.5))


@pytest.mark.parametrize(
    ("losses", "stays_at", "resumed_after"),
    [
        # Three of the head; then the first epoch of fine-tuning is the best, and two worse ones end it all.
        ([1.0, 0.9, 0.8, 0.7, 0.75, 0.71], 4, (2, 3)),
        # Fine-tuning is never better than the head.
        ([1.0, 0.5, 0.8, 0.7, 0.6], 2, (1,)),
    ],
)
def test_best_epoch_and_early_stopping_survive_a_resume(
    recipe: Params,
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    stays_at: int,
    resumed_after: tuple[int, ...],
) -> None:
    train = recipe_with(recipe, epochs=9, early_stopping_epochs=2)
    with_val_losses(monkeypatch, losses)
    history, variables, states = trained(train)
    assert len(history.epochs) == len(losses)
    for state in [states[number] for number in resumed_after]:
        with_val_losses(monkeypatch, losses, done=len(state.rows))
        again, resumed, _ = trained(train, state=state)
        assert figures(again) == figures(history)
        assert again.best is not None
        assert again.best.epoch == stays_at
        for one, two in zip(resumed, variables, strict=True):
            np.testing.assert_array_equal(one, two)


def test_best_values_are_stored_once_where_they_are_the_present_ones(
    recipe: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_val_losses(monkeypatch, [1.0, 0.9, 0.95, 0.8, 0.85, 0.7])
    _, _, states = trained(recipe_with(recipe))
    # The head ends with its best values.
    assert [state.best is None for state in states] == [True, True, False, True]
