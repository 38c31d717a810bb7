import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braintumor.artifacts import JUDGED_FILES, sha256_key
from braintumor.evidence.comparison import no_champion, not_comparable
from braintumor.evidence.verdicts import SAME_MODEL
from braintumor.labels import CLASS_NAMES
from braintumor.params import Bound, GateParams, Rule
from braintumor.registry.policy import (
    NEEDED_CLASS_FIGURES,
    NEEDED_DIGESTS,
    NEEDED_FIGURES,
    NOT_WORSE,
    Check,
    Decision,
    decide,
)

DATA_MD5 = "0123456789abcdef0123456789abcdef"
POLICY = GateParams(
    min_accuracy=Bound(value=0.92, required=True),
    min_accuracy_low=Bound(value=0.90, required=True),
    min_copy_free_accuracy=Bound(value=0.91, required=True),
    min_tumour_sensitivity=Bound(value=0.95, required=True),
    min_class_recall=Bound(value=0.80, required=True),
    max_ece=Bound(value=0.08, required=True),
    min_ood_auroc=Bound(value=0.85, required=True),
    not_worse_than_champion=Rule(required=True),
)
OPTIONAL = [name for name in GateParams.model_fields if name != "min_accuracy"]
GOOD: dict[str, Any] = {
    "data_md5": DATA_MD5,
    "splits_sha256": "a" * 64,
    "model_digest": "b" * 64,
    **{sha256_key(name): "c" * 64 for name in JUDGED_FILES},
    "protocol": "official",
    "n_test": 400,
    "accuracy": 0.97,
    "accuracy_interval": [0.95, 0.98],
    "balanced_accuracy": 0.97,
    "macro_f1": 0.97,
    "tumour_sensitivity": 0.99,
    "tumour_specificity": 0.98,
    "nearest_neighbour_accuracy": 0.6,
    "leaked_share": 0.0,
    "n_copy_free": 400,
    "copy_free_accuracy": 0.97,
    "ece": 0.02,
    "ood_auroc": 0.95,
    "per_class": {
        name: {"n": 100, "recall": 0.96, "specificity": 0.99, "precision": 0.97, "f1": 0.96} for name in CLASS_NAMES
    },
}
NO_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, None, "0.97", True, [], {}, -0.01, 1.01]


def changed(*path: Any, to: Any) -> dict[str, Any]:
    metrics = copy.deepcopy(GOOD)
    place = metrics
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return metrics


def without(*path: str) -> dict[str, Any]:
    metrics = copy.deepcopy(GOOD)
    place = metrics
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return metrics


def judge(metrics: dict[str, Any], policy: GateParams = POLICY) -> Decision:
    return decide(metrics, no_champion(), policy, DATA_MD5, None)


def compared(verdict: Any, champion: Any = "3", **changes: Any) -> dict[str, Any]:
    figures = {"accuracy": {"challenger": 0.97, "champion": 0.95, "difference": 0.02, "interval": [0.01, 0.03]}}
    told = {"verdict": verdict, "reason": "as it is", "champion": champion, "n": 400, "n_groups": 90, "n_excluded": 0}
    return {**told, "figures": figures, "only_challenger_right": 9, "only_champion_right": 1, **changes}


def judge_comparison(comparison: Any, champion_version: str | None = "3", **policy: Any) -> Decision:
    return decide(GOOD, comparison, POLICY.model_copy(update=policy), DATA_MD5, champion_version)


def check(decision: Decision, name: str) -> Check:
    return next(found for found in decision.checks if found.name == name)


def test_good_figures_pass_every_check() -> None:
    decision = judge(GOOD)
    assert decision.passed and all(found.passed for found in decision.checks)
    assert decision.digests == {name: GOOD[name] for name in NEEDED_DIGESTS}
    assert [found.name for found in decision.checks] == [
        "complete_and_finite",
        "current_data",
        "protocol_allowed",
        "min_accuracy",
        "min_accuracy_low",
        "min_copy_free_accuracy",
        "min_tumour_sensitivity",
        "min_class_recall",
        "max_ece",
        "min_ood_auroc",
        "not_worse_than_champion",
    ]


@pytest.mark.parametrize(
    ("path", "name", "floor"),
    [
        (("accuracy",), "min_accuracy", 0.92),
        (("accuracy_interval", 0), "min_accuracy_low", 0.90),
        (("copy_free_accuracy",), "min_copy_free_accuracy", 0.91),
        (("ood_auroc",), "min_ood_auroc", 0.85),
        (("tumour_sensitivity",), "min_tumour_sensitivity", 0.95),
        (("per_class", "meningioma", "recall"), "min_class_recall", 0.80),
    ],
)
def test_a_figure_passes_at_and_above_its_floor_and_not_below(path: tuple[Any, ...], name: str, floor: float) -> None:
    assert check(judge(changed(*path, to=math.nextafter(floor, 1))), name).passed
    assert judge(changed(*path, to=floor)).passed
    below = judge(changed(*path, to=math.nextafter(floor, 0)))
    assert not below.passed
    assert not check(below, name).passed
    # The reason must not read '0.92 is below 0.92'.
    assert str(floor) + " is below" not in check(below, name).reason


def test_a_figure_passes_at_and_below_its_ceiling_and_not_above() -> None:
    for value in (math.nextafter(0.08, 0), 0.08):
        assert judge(changed("ece", to=value)).passed
    above = judge(changed("ece", to=math.nextafter(0.08, 1)))
    assert not above.passed
    assert "0.08 exceeds" not in check(above, "max_ece").reason


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_bound_that_is_null_is_not_checked(name: str) -> None:
    decision = judge(GOOD, POLICY.model_copy(update={name: None}))
    assert decision.passed and name not in {found.name for found in decision.checks}
    assert decision.policy[name] is None


def test_the_accuracy_can_not_be_left_unchecked() -> None:
    with pytest.raises(ValueError, match="min_accuracy"):
        GateParams.model_validate(POLICY.model_dump() | {"min_accuracy": None})


def test_a_split_without_copy_free_images_is_complete_but_fails_a_required_bound_on_them() -> None:
    metrics = changed("copy_free_accuracy", to=None) | {"n_copy_free": 0}
    decision = judge(metrics)
    assert check(decision, "complete_and_finite").passed
    assert not decision.passed and not check(decision, "min_copy_free_accuracy").passed
    assert judge(metrics, POLICY.model_copy(update={"min_copy_free_accuracy": None})).passed
    assert not check(judge(metrics | {"n_copy_free": 5}), "complete_and_finite").passed


def test_the_class_with_the_lowest_recall_is_named() -> None:
    found = check(judge(changed("per_class", "pituitary", "recall", to=0.5)), "min_class_recall")
    assert "pituitary" in found.reason and found.value == 0.5


def test_a_floor_that_is_not_required_only_warns() -> None:
    lenient = POLICY.model_copy(update={"min_tumour_sensitivity": Bound(value=0.95, required=False)})
    decision = judge(changed("tumour_sensitivity", to=0.5), lenient)
    assert decision.passed
    assert not check(decision, "min_tumour_sensitivity").passed
    assert decision.failures == [] and len(decision.warnings) == 1


def test_integrity_is_required_though_no_floor_is() -> None:
    bounds: dict[str, Any] = dict.fromkeys(GateParams.model_fields, Bound(value=0, required=False))
    nothing = GateParams(**bounds | {NOT_WORSE: Rule(required=False)})
    assert judge(GOOD, nothing).passed
    for broken in (without("macro_f1"), changed("data_md5", to="other"), changed("protocol", to="declared")):
        assert not judge(broken, nothing).passed


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NEEDED_FIGURES)
def test_a_figure_that_is_no_number_in_0_to_1_closes_the_gate(name: str, value: Any) -> None:
    decision = judge(changed(name, to=value))
    assert not decision.passed
    assert name in check(decision, "complete_and_finite").reason
    json.dumps(decision.as_json(), allow_nan=False)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NEEDED_CLASS_FIGURES)
def test_a_class_figure_that_is_no_number_in_0_to_1_closes_the_gate(name: str, value: Any) -> None:
    decision = judge(changed("per_class", "notumor", name, to=value))
    assert not decision.passed
    assert f"notumor {name}" in check(decision, "complete_and_finite").reason


@pytest.mark.parametrize(
    "name", [*NEEDED_FIGURES, "accuracy_interval", "copy_free_accuracy", "n_test", "per_class", *NEEDED_DIGESTS]
)
def test_a_missing_key_closes_the_gate(name: str) -> None:
    decision = judge(without(name))
    assert not decision.passed
    assert name in check(decision, "complete_and_finite").reason


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_missing_class_closes_the_gate_and_is_named(name: str) -> None:
    decision = judge(without("per_class", name))
    assert not decision.passed
    assert name in check(decision, "complete_and_finite").reason
    assert name in check(decision, "min_class_recall").reason


@pytest.mark.parametrize("metrics", [{}, {"per_class": []}, {"per_class": {"glioma": 1}}, {"accuracy": {}}])
def test_any_other_shape_closes_the_gate(metrics: dict[str, Any]) -> None:
    decision = judge(metrics)
    assert not decision.passed
    json.dumps(decision.as_json(), allow_nan=False)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "400", math.nan])
@pytest.mark.parametrize("path", [("n_test",), ("per_class", "glioma", "n")])
def test_a_count_that_is_not_above_0_closes_the_gate(path: tuple[str, ...], value: Any) -> None:
    assert not judge(changed(*path, to=value)).passed


@pytest.mark.parametrize(
    "value", [None, [0.9], [0.9, math.nan], [0.9, 0.8], ["0.9", "0.95"], "0.9 to 0.95", [0.9, 1.1]]
)
def test_an_interval_that_is_none_closes_the_gate(value: Any) -> None:
    assert not judge(changed("accuracy_interval", to=value)).passed


def test_a_class_that_nobody_knows_closes_the_gate() -> None:
    assert not judge(changed("per_class", "cyst", to=GOOD["per_class"]["glioma"])).passed


def test_nan_anywhere_closes_the_gate() -> None:
    decision = judge(changed("confusion_matrix", to=[[1, 2], [math.nan, 3]]))
    assert not decision.passed
    assert "confusion_matrix[1][0]" in check(decision, "complete_and_finite").reason


@pytest.mark.parametrize("value", ["f" * 32, "", None, 7])
def test_figures_of_other_data_close_the_gate(value: Any) -> None:
    decision = judge(changed("data_md5", to=value))
    assert not decision.passed
    assert not check(decision, "current_data").passed


@pytest.mark.parametrize(("protocol", "may_pass"), [("official", True), ("grouped", True), ("declared", False)])
def test_a_protocol_that_keeps_the_leaks_can_never_pass(protocol: str, may_pass: bool) -> None:
    assert judge(changed("protocol", to=protocol)).passed is may_pass


@pytest.mark.parametrize("protocol", ["Official", "", None, ["official"], 1])
def test_an_unknown_protocol_closes_the_gate(protocol: Any) -> None:
    assert not judge(changed("protocol", to=protocol)).passed


@pytest.mark.parametrize("verdict", ["better", "no difference found"])
def test_a_model_that_is_not_worse_than_the_champion_passes(verdict: str) -> None:
    decision = judge_comparison(compared(verdict))
    assert decision.passed and check(decision, NOT_WORSE).value == verdict


def test_where_there_is_no_champion_nothing_can_be_worse() -> None:
    assert judge_comparison(no_champion(), None).passed


def test_the_champion_itself_is_not_worse_than_the_champion() -> None:
    assert judge_comparison(not_comparable(SAME_MODEL, "3")).passed
    assert not judge_comparison(not_comparable(SAME_MODEL, "2")).passed


UNPROVEN: dict[str, Any] = {
    "worse": compared("worse"),
    "not comparable": not_comparable("too few images are left", "3"),
    "missing": None,
    "empty": {},
    "no object": ["better"],
    "without a verdict": compared(None),
    "unknown verdict": compared("Better"),
    "a verdict that is no text": compared(["better"]),
    "with another champion": compared("better", champion="2"),
    "with a number for a champion": compared("better", champion=3),
    "with nobody": no_champion(),
    "not finite": compared("better", figures={"accuracy": {"interval": [math.nan, 0.03]}}),
    "contradictory": compared("no champion"),
    "better without figures": compared("better", figures={}),
    "equal without figures": compared("no difference found", figures={"accuracy": {"interval": [0.1]}}),
    "better against its figures": compared("better", figures={"accuracy": {"interval": [-0.4, -0.2]}}),
}


@pytest.mark.parametrize("comparison", UNPROVEN.values(), ids=UNPROVEN)
def test_a_model_that_was_not_shown_to_be_as_good_as_the_champion_does_not_pass(comparison: Any) -> None:
    decision = judge_comparison(comparison)
    assert not decision.passed
    assert decision.failures == [check(decision, NOT_WORSE).reason] and decision.failures != [""]
    json.dumps(decision.as_json(), allow_nan=False)


def test_a_verdict_that_nobody_knows_is_told_as_such() -> None:
    assert "'Better' is unknown" in check(judge_comparison(compared("Better")), NOT_WORSE).reason


@pytest.mark.parametrize("comparison", [compared("better"), compared("better", champion=None), None])
def test_a_comparison_with_a_champion_that_is_gone_does_not_pass(comparison: Any) -> None:
    assert not judge_comparison(comparison, None).passed


@pytest.mark.parametrize("comparison", UNPROVEN.values(), ids=UNPROVEN)
def test_where_the_comparison_is_not_required_it_only_warns(comparison: Any) -> None:
    decision = judge_comparison(comparison, not_worse_than_champion=Rule(required=False))
    assert decision.passed and decision.warnings == [check(decision, NOT_WORSE).reason]
    assert judge_comparison(comparison, not_worse_than_champion=None).warnings == []


NUMBERS = st.floats(0.95, 1)
FIGURES = st.fixed_dictionaries(dict.fromkeys((*NEEDED_CLASS_FIGURES,), NUMBERS) | {"n": st.integers(1, 500)})
PASSING = st.fixed_dictionaries(
    {name: st.just(GOOD[name]) for name in (*NEEDED_DIGESTS, "protocol", "accuracy_interval")}
    | dict.fromkeys((*NEEDED_FIGURES, "copy_free_accuracy"), NUMBERS)
    | {"ece": st.floats(0, 0.08), "n_copy_free": st.integers(0, 5000)}
    | {"n_test": st.integers(1, 5000), "per_class": st.fixed_dictionaries(dict.fromkeys(CLASS_NAMES, FIGURES))}
)
PLACES = st.sampled_from(
    [
        *((name,) for name in (*NEEDED_FIGURES, "copy_free_accuracy")),
        ("n_test",),
        ("accuracy_interval",),
        *(("per_class", label, name) for label in CLASS_NAMES for name in (*NEEDED_CLASS_FIGURES, "n")),
    ]
)


@given(PASSING, PLACES, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_no_metrics_with_a_needed_figure_that_is_not_finite_pass(
    metrics: dict[str, Any], place: tuple[str, ...], value: float
) -> None:
    assert judge(metrics).passed
    spoilt = copy.deepcopy(metrics)
    holder = spoilt
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    assert not judge(spoilt).passed
