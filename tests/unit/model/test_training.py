import numpy as np
import pytest
from scipy.special import softmax

from braintumor.errors import UserError
from braintumor.model import training
from braintumor.model.densenet import build_classifier
from braintumor.model.training import Epoch, History, LabelledImages
from braintumor.params import Params


def labelled(n: int, seed: int = 0) -> LabelledImages:
    """Images whose brightness is their class."""
    labels = np.arange(n) % 4
    noise = np.random.default_rng(seed).integers(0, 30, (n, 32, 32, 1))
    return LabelledImages((noise + labels[:, None, None, None] * 70).astype(np.uint8), labels.astype(np.int64))


def epoch(number: int, val_loss: float) -> Epoch:
    return Epoch(number, "head", 1.0, 0.5, val_loss, 0.5, 0.1, 1.0)


class Weights:
    """A network that is nothing but its weights."""

    def __init__(self) -> None:
        self.value = 0

    def get_weights(self) -> list[int]:
        return [self.value]


def test_history_keeps_the_weights_of_the_lowest_validation_loss() -> None:
    heard: list[Epoch] = []
    history, network = History(on_epoch=heard.append), Weights()
    for number, val_loss in enumerate((0.9, 0.4, 0.6), start=1):
        network.value = number
        history.add(epoch(number, val_loss), network)  # type: ignore[arg-type]
    assert history.best is heard[1]
    assert history.best_weights == [2]
    assert [row["val_loss"] for row in history.rows()] == [0.9, 0.4, 0.6]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_training(loss: float) -> None:
    with pytest.raises(UserError, match=r"lower train\.learning_rate"):
        History(on_epoch=lambda row: None).add(epoch(1, loss), Weights())  # type: ignore[arg-type]


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


def test_cosine_schedule_warms_up_and_ends_at_zero(recipe: Params) -> None:
    rate = training.make_optimizer(recipe.train, total_steps=100)._learning_rate
    rates = [float(rate(step)) for step in (0, 10, 55, 100)]
    peak = recipe.train.learning_rate
    assert rates == pytest.approx([peak * 0.01, peak, peak / 2, 0], abs=peak * 1e-3)


def test_constant_schedule_is_constant(recipe: Params) -> None:
    train = recipe.train.model_copy(update={"schedule": "constant", "optimizer": "adam"})
    assert float(training.make_optimizer(train, 100).learning_rate) == pytest.approx(train.learning_rate)


def test_batches_hold_every_image_once_and_repeat_with_the_seed(recipe: Params) -> None:
    train = labelled(10)

    def batches(number: int) -> list[tuple[np.ndarray, ...]]:
        return [
            tuple(part.numpy() for part in batch) for batch in training.training_batches(train, recipe.train, number)
        ]

    first, again, other = batches(1), batches(1), batches(2)
    assert [len(images) for images, _, _ in first] == [4, 4, 2]
    assert np.concatenate([targets for _, targets, _ in first]).sum(axis=0).tolist() == [3, 3, 2, 2]
    for one, two in zip(first, again, strict=True):
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)
    assert any((one[0] != two[0]).any() for one, two in zip(first, other, strict=True))
    assert all(images.min() >= 0 and images.max() <= 255 for images, _, _ in first)


def test_head_learns_from_features_of_the_frozen_backbone(recipe: Params) -> None:
    training.make_reproducible(1)
    train = recipe.train.model_copy(update={"head_epochs": 30, "head_learning_rate": 0.01, "dropout": 0.0})
    classifier = build_classifier(train)
    before = [weight.copy() for weight in classifier.backbone.get_weights()]
    history, advanced = History(on_epoch=lambda row: None), []
    training.fit_head(classifier, labelled(48), labelled(16, seed=1), train, history, lambda: advanced.append(1))
    assert len(history.epochs) == len(advanced) == 30
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    assert history.best is not None
    assert history.best.val_accuracy >= 0.75
    for one, two in zip(before, classifier.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
