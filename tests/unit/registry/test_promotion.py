from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from braintumor.artifacts import JUDGED_FILES, sha256_key
from braintumor.labels import CLASS_NAMES
from braintumor.params import Profile, Rule, load_params
from braintumor.registry.ledger import Entry, Recorded
from braintumor.registry.promotion import Ruling, rule
from braintumor.registry.version_facts import VersionFacts

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
MODEL, DATA, SPLITS = "a" * 64, "b" * 32, "c" * 64
MODEL_FILE = "9" * 64
DECISION_FILE, METRICS_FILE, EVIDENCE_FILE = "d" * 64, "e" * 64, "f" * 64
SHARED = {"model_digest": MODEL, "data_md5": DATA, "splits_sha256": SPLITS}


@pytest.fixture
def params() -> Profile:
    return load_params(Path(__file__).parents[3] / "params.yaml")


def make_facts(verdict: str = "better", against: str | None = "4", **changes: Any) -> VersionFacts:
    """Version 5, judged against version 4 yesterday; all that belongs together does."""
    figures = (
        "balanced_accuracy", "macro_f1", "tumour_sensitivity", "tumour_specificity", "nearest_neighbour_accuracy",
        "leaked_share", "ood_auroc", "copy_free_accuracy",
    )  # fmt: skip
    metrics = {
        **SHARED,
        **{sha256_key(name): "0" * 64 for name in JUDGED_FILES},
        "evidence_sha256": EVIDENCE_FILE,
        **dict.fromkeys(figures, 0.96),
        "accuracy": 0.96234,
        "accuracy_interval": [0.93, 0.98],
        "ece": 0.02,
        "n_test": 400,
        "protocol": "official",
        "per_class": {
            name: {"n": 100, **dict.fromkeys(("recall", "specificity", "precision", "f1"), 0.96)}
            for name in CLASS_NAMES
        },
    }
    comparison = {
        "verdict": verdict,
        "champion": against,
        "reason": "so the intervals say",
        "figures": {"accuracy": {"interval": [0.01, 0.05]}},
    }
    judged = {**SHARED, "metrics_sha256": METRICS_FILE, "evidence_sha256": EVIDENCE_FILE}
    facts = VersionFacts(
        name="tumours",
        version="5",
        status="READY",
        created=NOW - timedelta(days=1),
        tags={**SHARED, "gate": "passed", "accuracy": "0.9623", "accuracy_interval": "0.9300 to 0.9800"},
        run_id="r",
        run_tags={"gate": "passed", "model_digest": MODEL},
        decision={"passed": True, "digests": judged},
        metrics=metrics,
        evidence={**SHARED, "comparison": comparison},
        decision_sha256=DECISION_FILE,
        metrics_sha256=METRICS_FILE,
        evidence_sha256=EVIDENCE_FILE,
        model_digest=MODEL,
        model_sha256=MODEL_FILE,
    )
    return replace(facts, **changes)


def promoted(**digests: str) -> Recorded:
    """The entry that made version 5 the champion."""
    known = {**make_facts().digests, **digests}
    entry = Entry(
        2, "promoted", "5", "3", "5", "ann", True, "so", "", "better", "2026-03-01T12:00:00+00:00", known, "", "0" * 64
    )
    return Recorded(entry, "1" * 64, "run", False, "")


def judge(facts: VersionFacts, params: Profile, champion: str | None = "4", was: Recorded | None = None) -> Ruling:
    return rule(facts, champion, was, params.gate, params.promote, NOW)


def with_tag(name: str, value: str) -> dict[str, Any]:
    return {"tags": {**make_facts().tags, name: value}}


def with_metric(**changes: Any) -> dict[str, Any]:
    return {"metrics": {**make_facts().metrics, **changes}}


def with_decision(**digests: Any) -> dict[str, Any]:
    judged: Mapping[str, Any] = make_facts().decision["digests"]
    return {"decision": {"passed": True, "digests": {**judged, **digests}}}


@pytest.mark.parametrize("verdict", ["better", "no difference found"])
def test_a_sound_version_that_is_not_worse_than_the_champion_may_be_promoted(verdict: str, params: Profile) -> None:
    assert judge(make_facts(verdict), params) == Ruling((), ())


def test_where_no_champion_is_no_comparison_is_needed_but_a_worse_model_stays_worse(params: Profile) -> None:
    for facts in (make_facts("no champion", None), make_facts("not comparable"), make_facts(evidence=SHARED)):
        assert judge(facts, params, champion=None) == Ruling((), ())
    ruling = judge(make_facts("worse"), params, champion=None)
    assert ruling.overridable == ("there is no champion now, but against version 4 it was worse: so the intervals say",)


REFUSED = {
    "its status is PENDING_REGISTRATION, not READY": {"status": "PENDING_REGISTRATION"},
    "its tag 'gate' is None, not 'passed'": {"tags": {**SHARED}},
    "its tag 'gate' is 'PASSED', not 'passed'": with_tag("gate", "PASSED"),
    "its run's tag 'gate' is 'not passed', not 'passed'": {
        "run_tags": {"gate": "not passed", "model_digest": MODEL}
    },
    "the gate's decision is that it did not pass": {"decision": {**make_facts().decision, "passed": "yes"}},
    "the decision names metrics_sha256 '9', and that of metrics.json is eeeeeeeeeeee...": with_decision(
        metrics_sha256="9"
    ),
    "the decision names evidence_sha256 None, and that of evidence.json is ffffffffffff...": with_decision(
        evidence_sha256=None
    ),
    "the decision names model_digest 999999999999..., and that of the model file is aaaaaaaaaaaa...": with_decision(
        model_digest="9" * 64
    ),
    "the decision names splits_sha256 ['c'], and that of metrics.json is cccccccccccc...": with_decision(
        splits_sha256=["c"]
    ),
    "metrics.json names evidence_sha256 '8', and that of evidence.json is ffffffffffff...": with_metric(
        evidence_sha256="8"
    ),
    "evidence.json names data_md5 None, and that of metrics.json is bbbbbbbbbbbb...": {
        "evidence": {"model_digest": MODEL, "splits_sha256": SPLITS, "comparison": make_facts().evidence["comparison"]}
    },
    "a tag names model_digest '7', and that of the model file is aaaaaaaaaaaa...": with_tag("model_digest", "7"),
    "a tag of its run names model_digest None, and that of the model file is aaaaaaaaaaaa...": {
        "run_tags": {"gate": "passed"}
    },
    "its tag accuracy shows '0.9700', and metrics.json says otherwise": with_tag("accuracy", "0.9700"),
    "its tag accuracy shows 'very good', and metrics.json says otherwise": with_tag("accuracy", "very good"),
    "its tag accuracy_interval shows '0.9500 to 0.9800', and metrics.json says otherwise": with_tag(
        "accuracy_interval", "0.9500 to 0.9800"
    ),
    "by the gate's rules here, accuracy 0.9100 is below 0.92": {
        **with_metric(accuracy=0.91),
        **with_tag("accuracy", "0.91"),
    },
    "by the gate's rules here, protocol 'declared' can never pass: it is not one of official, grouped": with_metric(
        protocol="declared"
    ),
    "it was registered at 2026-06-01 12:06 UTC, and it is 2026-06-01 12:00 now: mend the clock of MLflow's server": {
        "created": NOW + timedelta(minutes=6)
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_override_helps_against(reason: str, params: Profile) -> None:
    ruling = judge(make_facts(**REFUSED[reason]), params)
    assert ruling.refusals == (reason,) and ruling.overridable == ()
    assert ruling.objections("I insist") == (reason,)


def test_a_clock_that_is_five_minutes_ahead_is_forgiven(params: Profile) -> None:
    assert judge(make_facts(created=NOW + timedelta(minutes=5)), params) == Ruling((), ())


def test_figures_that_are_no_numbers_are_refused(params: Profile) -> None:
    for value in (float("nan"), None, "0.99"):
        ruling = judge(make_facts(**with_metric(accuracy=value)), params)
        assert any("accuracy" in reason for reason in ruling.refusals)


def test_files_that_hold_something_else_are_refused_and_break_nothing(params: Profile) -> None:
    for changes in ({"decision": {"passed": True, "digests": [1]}}, {"metrics": {}}, {"evidence": {}}):
        assert judge(make_facts(**changes), params).refusals


OVERRIDABLE = {
    "the comparison with the champion, version 4, says worse: so the intervals say": make_facts("worse"),
    "the comparison with the champion, version 4, says not comparable: so the intervals say": make_facts(
        "not comparable"
    ),
    "the comparison with the champion, version 4, says splendid: so the intervals say": make_facts("splendid"),
    "it was not compared with the champion, version 4": make_facts(evidence=SHARED),
    "it was compared with version 3 (better: so the intervals say), and the champion now is version 4": make_facts(
        "better", "3"
    ),
    "it was compared with no champion (none: so the intervals say), and the champion now is version 4": make_facts(
        "none", None
    ),
    "it was registered 91 days ago, and 90 are allowed": make_facts(created=NOW - timedelta(days=91)),
}  # fmt: skip


@pytest.mark.parametrize("reason", OVERRIDABLE)
def test_what_a_reviewer_may_override_with_a_reason(reason: str, params: Profile) -> None:
    ruling = judge(OVERRIDABLE[reason], params)
    assert ruling == Ruling((), (reason,))
    assert ruling.objections("") == (reason,)
    assert ruling.objections("the champion can't be served") == ()


def test_age_is_counted_to_the_last_second(params: Profile) -> None:
    assert judge(make_facts(created=NOW - timedelta(days=90)), params) == Ruling((), ())
    assert judge(make_facts(created=NOW - timedelta(days=90, seconds=1)), params).overridable


def test_a_gate_that_forbids_worse_models_can_not_be_overridden(params: Profile) -> None:
    gate = params.gate.model_copy(update={"not_worse_than_champion": Rule(required=True)})
    strict = params.model_copy(update={"gate": gate})
    ruling = judge(make_facts("worse"), strict)
    assert ruling.refusals == ("by the gate's rules here, worse than the champion: so the intervals say",)
    assert judge(make_facts("worse"), strict, was=promoted()) == Ruling((), ())


def test_a_former_champion_may_come_back_however_old_and_whatever_it_was_compared_with(params: Profile) -> None:
    old = make_facts("worse", "1", created=NOW - timedelta(days=900), **with_tag("accuracy", "0.9"))
    assert judge(old, params, was=promoted()) == Ruling((), ())


def test_a_former_champion_has_to_be_the_model_that_it_was(params: Profile) -> None:
    ruling = judge(make_facts(), params, was=promoted(model_digest="6" * 64))
    assert ruling.refusals == (
        "its model_digest is aaaaaaaaaaaa..., and when it was champion (entry 2) it was 666666666666...",
    )


def test_a_former_champion_has_to_be_the_file_that_it_was_where_its_entry_tells(params: Profile) -> None:
    ruling = judge(make_facts(), params, was=promoted(model_sha256="6" * 64))
    assert ruling.refusals == (
        "its model_sha256 is 999999999999..., and when it was champion (entry 2) it was 666666666666...",
    )
    before = promoted()
    del before.entry.digests["model_sha256"]
    assert judge(make_facts(), params, was=before) == Ruling((), ())


def test_a_former_champion_still_needs_a_gate_that_it_passes(params: Profile) -> None:
    assert judge(make_facts(**with_metric(accuracy=0.91)), params, was=promoted()).refusals == (
        "by the gate's rules here, accuracy 0.9100 is below 0.92",
    )


def test_a_former_champion_that_was_judged_anew_needs_an_override(params: Profile) -> None:
    ruling = judge(make_facts(), params, was=promoted(metrics_sha256="5" * 64, decision_sha256="5" * 64))
    assert ruling == Ruling(
        (),
        (
            "it was judged anew since it was champion (entry 2): decision_sha256, metrics_sha256 are not those that "
            "were recorded",
        ),
    )
