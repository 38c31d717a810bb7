from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as reference

from braintumor.evidence.comparison import compare_with_champion, no_champion, not_comparable
from braintumor.labels import CLASS_NAMES
from braintumor.params import Params, load_params

FEW_SAMPLES = load_params(Path(__file__).parents[3] / "params.yaml").evaluate.model_copy(
    update={"bootstrap_samples": 100}
)
FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "tumour_sensitivity", "tumour_specificity")
Answers = NDArray[np.int64]


def truth_of(n: int, group_size: int = 1) -> tuple[Answers, Answers]:
    groups = np.arange(n) // group_size
    return groups % 4, groups


def sure_of(answers: Answers) -> NDArray[np.float64]:
    probabilities = np.full((len(answers), 4), 0.1)
    probabilities[np.arange(len(answers)), answers] = 0.7
    return probabilities


def answers_of(truth: Answers, groups: Answers, accuracy: float, seed: int) -> NDArray[np.float64]:
    """Probabilities of a model that is right on so many groups, and on all images of a group or none."""
    random = np.random.default_rng(seed)
    is_right = random.random(groups.max() + 1) < accuracy
    return sure_of(np.where(is_right[groups], truth, (truth + 1) % 4))


def none_of(truth: Answers) -> NDArray[np.bool_]:
    return np.zeros(len(truth), bool)


def test_figures_of_both_are_those_of_scikit_learn(params: Params) -> None:
    truth, groups = truth_of(200)
    ours, theirs = answers_of(truth, groups, 0.9, 1), answers_of(truth, groups, 0.8, 2)
    found = compare_with_champion(truth, ours, theirs, groups, none_of(truth), params.evaluate, "3")
    assert tuple(found["figures"]) == FIGURES
    for who, probabilities in (("challenger", ours), ("champion", theirs)):
        predicted = probabilities.argmax(axis=1)
        figures = {name: found["figures"][name][who] for name in FIGURES}
        assert figures["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
        assert figures["macro_f1"] == pytest.approx(reference.f1_score(truth, predicted, average="macro"))
    for figure in found["figures"].values():
        assert figure["difference"] == pytest.approx(figure["challenger"] - figure["champion"])
    only = ours.argmax(axis=1) == truth, theirs.argmax(axis=1) == truth
    assert found["only_challenger_right"] == (only[0] & ~only[1]).sum()
    assert found["only_champion_right"] == (only[1] & ~only[0]).sum()
    assert (found["champion"], found["n"], found["n_groups"], found["n_excluded"]) == ("3", 200, 200, 0)


def test_the_better_model_is_better_whichever_side_it_stands_on(params: Params) -> None:
    truth, groups = truth_of(400)
    strong, weak = answers_of(truth, groups, 0.97, 1), answers_of(truth, groups, 0.85, 2)
    sides = [(strong, weak), (weak, strong)]
    found = [compare_with_champion(truth, *pair, groups, none_of(truth), params.evaluate, "1") for pair in sides]
    assert [one["verdict"] for one in found] == ["better", "worse"]
    (low, high), mirrored = (one["figures"]["accuracy"]["interval"] for one in found)
    assert mirrored == pytest.approx([-high, -low])


def test_a_model_against_itself_shows_no_difference(params: Params) -> None:
    truth, groups = truth_of(200)
    ours = answers_of(truth, groups, 0.9, 1)
    found = compare_with_champion(truth, ours, ours, groups, none_of(truth), params.evaluate, "1")
    assert found["verdict"] == "no difference found"
    for figure in found["figures"].values():
        assert (figure["difference"], figure["interval"]) == (0, [0, 0])
    assert (found["only_challenger_right"], found["only_champion_right"]) == (0, 0)


def test_equally_good_models_are_rarely_told_apart(params: Params) -> None:
    truth, groups = truth_of(300)
    verdicts = [
        compare_with_champion(
            truth,
            answers_of(truth, groups, 0.9, seed),
            answers_of(truth, groups, 0.9, seed + 1000),
            groups,
            none_of(truth),
            params.evaluate,
            "1",
        )["verdict"]
        for seed in range(40)
    ]
    assert verdicts.count("no difference found") >= 34


def test_ten_copies_of_each_image_make_no_difference_certain(params: Params) -> None:
    truth, groups = truth_of(100)
    # Better on four images of a hundred: too few to tell.
    theirs = np.where(np.arange(100) < 6, (truth + 1) % 4, truth)
    ours = np.where(np.arange(100) < 2, (truth + 1) % 4, truth)
    verdicts = []
    for copies, is_grouped in ((1, True), (10, True), (10, False)):
        index = np.tile(np.arange(100), copies)
        names = groups[index] if is_grouped else np.arange(len(index))
        models = sure_of(ours[index]), sure_of(theirs[index])
        found = compare_with_champion(truth[index], *models, names, none_of(index), params.evaluate, "1")
        verdicts.append(found["figures"]["accuracy"]["interval"])
    assert verdicts[0] == pytest.approx(verdicts[1])
    assert np.diff(verdicts[2]) < 0.5 * np.diff(verdicts[0])


@pytest.mark.parametrize(
    ("n_ahead", "n_behind", "verdict"),
    [(4, 0, "no difference found"), (5, 0, "no difference found"), (6, 0, "better"), (0, 6, "worse"), (9, 1, "better")],
)
def test_a_handful_of_images_decides_nothing(params: Params, n_ahead: int, n_behind: int, verdict: str) -> None:
    # The interval alone leaves 0 out in each case. By the exact test 2 / 2 ** 6 is below 0.05, 2 / 2 ** 5 is not.
    truth, groups = truth_of(400)
    wrong = (truth + 1) % 4
    theirs = np.where(groups < n_ahead, wrong, truth)
    ours = np.where(groups >= 400 - n_behind, wrong, truth)
    models = sure_of(ours), sure_of(theirs)
    found = compare_with_champion(truth, *models, groups, none_of(truth), params.evaluate, "1")
    low, high = found["figures"]["accuracy"]["interval"]
    assert low > 0 or high < 0
    assert found["verdict"] == verdict
    told = f"few images: this model has more right in {n_ahead} groups, the champion in {n_behind}, and so uneven"
    assert (told in found["reason"]) == (verdict == "no difference found")


def test_a_few_groups_of_many_copies_do_not_outvote_the_others(params: Params) -> None:
    groups = np.append(np.repeat(np.arange(8), 20), np.arange(8, 140))
    truth = groups % 4
    wrong = (truth + 1) % 4
    ours, theirs = np.where((groups >= 8) & (groups < 28), wrong, truth), np.where(groups < 8, wrong, truth)
    models = sure_of(ours), sure_of(theirs)
    found = compare_with_champion(truth, *models, groups, none_of(truth), params.evaluate, "1")
    assert found["figures"]["accuracy"]["interval"][0] > 0
    assert found["verdict"] == "no difference found"
    assert found["reason"].endswith("this model has more right in 8 groups, the champion in 20")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_order_of_the_images_changes_nothing(seed: int) -> None:
    truth, groups = truth_of(160, group_size=2)
    models = answers_of(truth, groups, 0.9, 1), answers_of(truth, groups, 0.8, 2)
    is_excluded = groups % 10 == 0
    found = compare_with_champion(truth, *models, groups, is_excluded, FEW_SAMPLES, "1")
    order = np.random.default_rng(seed).permutation(len(truth))
    mixed = compare_with_champion(
        truth[order], *(model[order] for model in models), groups[order], is_excluded[order], FEW_SAMPLES, "1"
    )
    assert mixed == found


def test_what_the_champion_was_trained_on_does_not_count(params: Params) -> None:
    truth, groups = truth_of(300)
    ours = answers_of(truth, groups, 0.9, 1)
    # The champion knows half of the images by heart, and nothing of the others.
    is_known = groups % 2 == 1
    theirs = np.where(is_known[:, None], sure_of(truth), sure_of((truth + 1) % 4))
    is_excluded = is_known & (groups < 200)
    found = compare_with_champion(truth, ours, theirs, groups, is_excluded, params.evaluate, "1")
    assert (found["n"], found["n_excluded"]) == (200, 100)
    assert found["figures"]["accuracy"]["champion"] == pytest.approx(50 / 200)


@pytest.mark.parametrize(
    ("n", "group_size", "excluded", "reason"),
    [
        (99, 1, "none", "99 in 99 groups are left; 100 images in 30 groups are needed"),
        (116, 4, "none", "116 in 29 groups are left; 100 images in 30 groups are needed"),
        (140, 1, "the first 41", "99 in 99 groups are left, without the 41 that the champion or this model was"),
        (
            200,
            1,
            "a class",
            "left, without the 50 that the champion or this model was trained on, none of them pituitary",
        ),
        (120, 1, "all", "0 in 0 groups are left, without the 120"),
    ],
)
def test_too_little_to_compare_on_is_told(params: Params, n: int, group_size: int, excluded: str, reason: str) -> None:
    truth, groups = truth_of(n, group_size)
    is_excluded = {
        "none": none_of(truth),
        "the first 41": np.arange(n) < 41,
        "a class": truth == CLASS_NAMES.index("pituitary"),
        "all": ~none_of(truth),
    }[excluded]
    ours = answers_of(truth, groups, 0.9, 1)
    found = compare_with_champion(truth, ours, ours, groups, is_excluded, params.evaluate, "7")
    assert found["verdict"] == "not comparable"
    assert reason in found["reason"]
    assert (found["champion"], found["figures"], found["only_champion_right"]) == ("7", {}, None)
    assert found["n"] + found["n_excluded"] == n


def test_what_was_not_compared_has_the_same_keys(params: Params) -> None:
    truth, groups = truth_of(120)
    ours = answers_of(truth, groups, 0.9, 1)
    made = compare_with_champion(truth, ours, ours, groups, none_of(truth), params.evaluate, "1")
    assert no_champion().keys() == not_comparable("it takes other images", "1").keys() == made.keys()
    assert no_champion()["verdict"] == "no champion"
    assert not_comparable("it takes other images", "1")["reason"] == "it takes other images"
