from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from braintumor.model import engine as engine_module
from braintumor.model.batches import Batch
from braintumor.model.densenet import import_keras
from braintumor.model.engine import FIRST_SCALE, Engine, Recipe
from braintumor.model.flat import NAMES, Values
from braintumor.model.optimizers import FlatOptimizer, constant_rate

N_FEATURES, SMOOTHING = 6, 0.1
NO_STATISTICS = [name for name in NAMES if name != "statistics"]


@pytest.fixture(scope="module")
def keras() -> Any:
    """Keras, computing to the last bit the same each time."""
    import tensorflow as tf

    found = import_keras()
    tf.config.experimental.enable_op_determinism()
    return found


def dense_model(keras: Any, dropout: float = 0.0, norm: bool | None = None, precision: str = "float32") -> Any:
    """Features to logits; with BatchNorm that trains, or rests, where `norm` is not None."""
    keras.utils.set_random_seed(3)
    features = keras.Input((N_FEATURES,))
    values = keras.layers.Dense(5, dtype=precision)(features)
    if norm is not None:
        values = keras.layers.BatchNormalization(momentum=0.9, trainable=norm)(values)
    values = keras.layers.Dropout(dropout)(keras.layers.Activation("tanh")(values))
    return keras.Model(features, keras.layers.Dense(4)(values))


def engine_of(model: Any, rate: float = 0.1, kind: str = "sgd", seed: int = 1, **recipe: Any) -> Engine:
    told = Recipe(seed, batch_size=8, label_smoothing=SMOOTHING, augmentation=None, **recipe)
    return Engine(model, lambda decays: FlatOptimizer(kind, constant_rate(rate), 0.0, tuple(decays)), told)


def batch(seed: int, n: int = 8) -> Batch:
    random = np.random.default_rng(seed)
    return Batch(
        random.normal(size=(n, N_FEATURES)).astype(np.float32),
        np.eye(4, dtype=np.float32)[random.integers(0, 4, n)],
        random.uniform(0.5, 1.5, n).astype(np.float32),
        np.zeros((n, 0), np.float32),
    )


def joined(one: Batch, two: Batch, weight: float) -> Batch:
    """The rows of both, the second's with this weight."""
    weights = np.concatenate([one.weights, np.full(len(two.weights), weight, np.float32)])
    parts = [np.concatenate([getattr(one, name), getattr(two, name)]) for name in ("images", "targets", "draws")]
    return Batch(parts[0], parts[1], weights, parts[2])


def assert_same(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def assert_close(found: Values, expected: Values) -> None:
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_steps_statistics_and_averages_are_those_of_keras(keras: Any) -> None:
    ours, theirs = dense_model(keras, norm=True), dense_model(keras, norm=True)
    engine = engine_of(ours, ema_momentum=0.8)
    theirs.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, use_ema=True, ema_momentum=0.8),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING),
    )
    before = engine.kept()
    np.testing.assert_array_equal(before["decayed"], engine.state()["decayed"])
    for seed in range(4):
        fed = batch(seed)
        engine.train(fed, 8)
        theirs.train_on_batch(fed.images, fed.targets, sample_weight=fed.weights)
    own = engine.state()
    engine.write(own)
    for one, two in zip(ours.variables, theirs.variables, strict=True):
        if "seed" not in one.path:
            np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-4, atol=1e-6, err_msg=one.path)
    # The averages; Keras puts them into the variables at the end.
    theirs.optimizer.finalize_variable_values(theirs.trainable_variables)
    engine.write(engine.kept())
    for one, two in zip(ours.trainable_variables, theirs.trainable_variables, strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-4, atol=1e-6, err_msg=one.path)
    assert np.abs(engine.kept()["decayed"] - own["decayed"]).max() > 1e-3
    assert_same(engine.state(), own)


def test_written_values_are_what_the_models_own_predictions_come_from(keras: Any) -> None:
    model = dense_model(keras, dropout=0.5, norm=True)
    engine, features = engine_of(model, ema_momentum=0.5), batch(9, 100).images
    before = model.predict(features, verbose=0)
    for seed in (1, 2):
        engine.train(batch(seed), 8)
    np.testing.assert_array_equal(model.predict(features, verbose=0), before)
    for averaged, values in ((False, engine.state()), (True, engine.kept())):
        engine.write(values)
        answers = [engine.answers(features[part], averaged=averaged)[0] for part in (slice(0, 64), slice(64, 100))]
        found = model.predict(features, verbose=0)
        np.testing.assert_allclose(np.concatenate(answers), found, rtol=1e-5, atol=1e-6)
        assert np.abs(found - before).max() > 1e-3


def test_sums_are_the_loss_and_the_right_answers_of_the_epoch(keras: Any) -> None:
    engine = engine_of(dense_model(keras), rate=0.0)
    engine.train(batch(0), 8)
    engine.begin_epoch()
    fed = [batch(1), batch(2), batch(3, n=5)]
    for each in fed:
        engine.train(each, len(each.weights))
    logits = np.concatenate([engine.answers(each.images)[0] for each in fed]).astype(np.float64)
    targets, weights = (np.concatenate([getattr(each, name) for each in fed]) for name in ("targets", "weights"))
    losses = -(log_softmax(logits, axis=1) * (targets * (1 - SMOOTHING) + SMOOTHING / 4)).sum(axis=1)
    assert engine.sums.loss == pytest.approx((losses * weights).sum(), rel=1e-5)
    assert engine.sums.right == (logits.argmax(axis=1) == targets.argmax(axis=1)).sum()
    assert engine.sums.images == 21


@pytest.mark.parametrize("norm", [None, False])
def test_rows_of_weight_0_change_nothing(keras: Any, norm: bool | None) -> None:
    plain, filled = (engine_of(dense_model(keras, norm=norm), kind="adamw") for _ in range(2))
    for seed in range(3):
        fed = batch(seed, n=5)
        plain.train(fed, 5)
        filled.train(joined(fed, batch(seed + 10, n=3), weight=0.0), 5)
    assert_close(filled.state(), plain.state())
    assert filled.sums.loss == pytest.approx(plain.sums.loss, rel=1e-6)
    assert (filled.sums.right, filled.sums.images) == (plain.sums.right, plain.sums.images)


def test_batch_norm_moves_its_statistics_where_it_trains_and_keeps_them_at_rest(keras: Any) -> None:
    for norm in (True, False):
        engine = engine_of(dense_model(keras, norm=norm))
        before = engine.state()
        engine.train(batch(1), 8)
        after = engine.state()
        assert before["statistics"].size
        assert (after["statistics"] != before["statistics"]).any() == norm
        assert (after["decayed"] != before["decayed"]).any()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_engine_goes_on_from_a_state_as_the_one_that_gave_it(keras: Any, kind: str) -> None:
    def make() -> Engine:
        return engine_of(dense_model(keras, dropout=0.4, norm=True), kind=kind, rate=0.01, ema_momentum=0.9)

    first, second = make(), make()
    for seed in range(3):
        first.train(batch(seed), 8)
    state = first.state()
    # A copy, which later steps don't change.
    kept = {name: value.copy() for name, value in state.items()}
    second.train(batch(99), 8)
    for seed in (3, 4):
        first.train(batch(seed), 8)
    assert_same(state, kept)
    second.load(state)
    for seed in (3, 4):
        second.train(batch(seed), 8)
    assert_same(second.state(), first.state())
    assert second.sums == first.sums


def test_state_of_another_network_is_refused_whole(keras: Any) -> None:
    engine = engine_of(dense_model(keras))
    before = engine.state()
    for wrong in ({"mean.decayed": before["decayed"]}, {"undecayed": before["undecayed"][1:]}):
        with pytest.raises(ValueError, match="another network"):
            engine.load({"decayed": before["decayed"] + 1} | wrong)
        assert_same(engine.state(), before)
    assert engine.shapes() == {name: value.shape for name, value in before.items()}


def test_dropout_depends_on_seed_and_step_alone(keras: Any) -> None:
    def losses(engine: Engine, n: int = 3) -> list[float]:
        """Of the same batch at the same parameters, step after step."""
        found = []
        for _ in range(n):
            engine.begin_epoch()
            engine.train(batch(1), 8)
            found.append(engine.sums.loss)
        return found

    def make(seed: int) -> Engine:
        return engine_of(dense_model(keras, dropout=0.5), rate=0.0, seed=seed)

    engine = make(seed=1)
    begin, first = engine.state(), losses(engine)
    assert len(set(first)) == 3
    keras.utils.set_random_seed(77)
    assert losses(make(seed=1)) == first
    assert set(losses(make(seed=2))).isdisjoint(first)
    engine.load(begin | {"step": np.int64(1)})
    assert losses(engine, n=2) == first[1:]


def test_overflow_of_float16_skips_the_step_and_halves_the_scale(keras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "GROWTH_STEPS", 2)
    engine = engine_of(dense_model(keras, precision="mixed_float16"), kind="adamw", ema_momentum=0.9, scales_loss=True)
    for name in NO_STATISTICS:
        assert engine.state()[name].dtype == np.float32

    def train(weight: float) -> tuple[bool, float, int]:
        """(whether anything but the scale and the sums changed, scale, steps) after a batch of this weight."""
        before, fed = engine.state(), batch(1)
        engine.train(Batch(fed.images, fed.targets, np.full(8, weight, np.float32), fed.draws), 8)
        after = engine.state()
        others = after.keys() - {"scale", "steps_without_overflow", "sums"}
        has_changed = any((after[name] != before[name]).any() for name in others)
        return has_changed, float(after["scale"]), int(after["step"])

    assert train(1.0) == (True, FIRST_SCALE, 1)
    assert train(1e6) == (False, FIRST_SCALE / 2, 1)
    assert train(1.0) == (True, FIRST_SCALE / 2, 2)
    assert train(1.0) == (True, FIRST_SCALE, 3)
    assert np.isfinite(engine.state()["decayed"]).all()


def test_scaled_loss_makes_the_step_of_the_plain_one(keras: Any) -> None:
    # Powers of two are lost by no rounding.
    plain, scaled = (engine_of(dense_model(keras), kind="adamw", scales_loss=scales) for scales in (False, True))
    for seed in range(3):
        for engine in (plain, scaled):
            engine.train(batch(seed), 8)
    assert_close(scaled.state(), plain.state())


def test_worker_that_is_told_to_stop_has_made_the_step(keras: Any) -> None:
    engine = engine_of(dense_model(keras))
    engine.train(batch(1), 8)
    assert not engine.is_stopped
    engine.train(batch(2), 8, stop=True)
    assert engine.is_stopped
    assert int(engine.state()["step"]) == 2


def test_smaller_batch_at_the_end_of_an_epoch_compiles_nothing_anew(
    keras: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    step: Callable[..., Any] = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self, *batch: traced.append(1) or step(self, *batch))  # type: ignore[func-returns-value]
    engine = engine_of(dense_model(keras))
    for n in (8, 5, 1):
        engine.train(batch(n, n), n)
    assert len(traced) == 1
