import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from braintumor.data.splits import CLAIM_COPIES, CLAIM_LEAKS, CLAIM_PATIENTS
from braintumor.evidence.comparison import no_champion, not_comparable
from braintumor.evidence.doubts import percent, span
from braintumor.evidence.verdicts import SAME_MODEL
from braintumor.labels import CLASS_NAMES
from braintumor.registry.model_card import MAX_CARD, CardFacts, told_architecture, version_tags, write_card
from braintumor.registry.model_card_json import make_card_json

RUN_PAGE = "#/experiments/1/runs/" + "f" * 32
SECTIONS = (
    "What to doubt",
    "What to do now",
    "Model details",
    "Intended use",
    "Factors",
    "Metrics",
    "Evaluation data",
    "Training data",
    "Quantitative analyses",
    "Ethical considerations",
    "Caveats and recommendations",
)


def object_of(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
        "minProperties": 1,
    }


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
NUMBER = {"type": "number"}
DESCRIBED = list_of(object_of("description", description=TEXT))
# The Model Card Toolkit's fields, of schema 0.0.2, that a card of ours may have.
TOOLKIT = Draft202012Validator(
    object_of(
        "schema_version model_details model_parameters quantitative_analysis considerations",
        schema_version={"const": "0.0.2"},
        model_details=object_of(
            "name overview documentation version",
            name=TEXT,
            overview=TEXT,
            documentation=TEXT,
            version=object_of("name", name=TEXT, diff=TEXT),
            references=list_of(object_of("reference", reference={"type": "string", "format": "uri"})),
        ),
        model_parameters=object_of(
            "model_architecture data",
            model_architecture=TEXT,
            data=list_of(object_of("name description", name=TEXT, description=TEXT)),
            input_format=TEXT,
            output_format=TEXT,
        ),
        quantitative_analysis=object_of(
            "performance_metrics",
            performance_metrics=list_of(
                object_of(
                    "type value",
                    type=TEXT,
                    value=NUMBER,
                    slice=TEXT,
                    confidence_interval=object_of("lower_bound upper_bound", lower_bound=NUMBER, upper_bound=NUMBER),
                )
            ),
        ),
        considerations=object_of(
            "users use_cases limitations tradeoffs ethical_considerations",
            users=DESCRIBED,
            use_cases=DESCRIBED,
            limitations=DESCRIBED,
            tradeoffs=DESCRIBED,
            ethical_considerations=list_of(object_of("name", name=TEXT, mitigation_strategy=TEXT)),
        ),
    )
)


def check(name: str, reason: str, *, passed: bool = True, required: bool = False) -> dict[str, Any]:
    return {"name": name, "value": 1.0, "threshold": 0.9, "required": required, "passed": passed, "reason": reason}


@pytest.fixture
def facts(evaluation: Any) -> CardFacts:
    """Those of a model that passed and was compared with version 3."""
    training = copy.deepcopy(evaluation.training) | {"data_md5": "d" * 32, "git_commit": "c" * 40}
    training["params"] |= {"image_size_px": 64, "weights": "weights/backbone.h5"}
    decision = {
        "passed": True,
        "checks": [check("min_accuracy", "accuracy is high", required=True), check("max_ece", "ece is low")],
        "digests": {"metrics_sha256": "1" * 64},
    }
    metrics = evaluation.metrics | {"evidence_sha256": "2" * 64}
    return CardFacts(metrics, evaluation.evidence, decision, training, earlier_decisions=2)


def compared(facts: CardFacts, **changes: Any) -> CardFacts:
    comparison = facts.evidence["comparison"] | changes
    return replace(facts, evidence={**facts.evidence, "comparison": comparison})


def first_screen(card: str) -> str:
    return card.split("### Model details")[0]


def test_what_a_reviewer_decides_by_stands_before_all_else(facts: CardFacts) -> None:
    card = write_card(facts, RUN_PAGE)
    assert re.findall(r"^### (.+)$", card, re.MULTILINE) == list(SECTIONS)
    screen, metrics = first_screen(card), facts.metrics
    assert screen.startswith("Gate passed, no warnings.\n\n- **Better than the champion (version 3)**")
    assert "**A research tool, not a diagnostic device.**" in screen
    accuracy, interval = percent(metrics["accuracy"]), span(metrics["accuracy_interval"])
    assert f"| **{accuracy}**&ensp; | {interval} |" in screen
    for floor in ("nearest_neighbour_accuracy", "statistics_accuracy"):
        assert f"| {percent(metrics[floor])}&ensp; |" in screen
    found = facts.comparison["figures"]["accuracy"]
    assert f"| {percent(found['champion'])}&ensp; | this model {100 * found['difference']:+.1f} points" in screen
    assert "- **Patients unknown.**" in screen
    assert "`promotion.reason`" in screen and "`promotion.override`" not in screen
    assert f"[Report]({RUN_PAGE}/artifacts/evaluation/report.html)" in screen
    assert f"[Data Docs]({RUN_PAGE}/artifacts/data/data_docs/index.html)" in screen


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_every_class_has_its_row(facts: CardFacts, name: str) -> None:
    figures = facts.metrics["per_class"][name]
    assert f"| {name}&ensp; | {figures['n']}&ensp; | {figures['recall']:.3f} |" in write_card(facts, RUN_PAGE)


@pytest.mark.parametrize(
    ("comparison", "told", "needs_override"),
    [
        ({"verdict": "worse"}, "**Worse than the champion (version 3)**", True),
        (not_comparable("too little is left", "3"), "(version 3)**: too little is left.", True),
        ({"verdict": "no difference found"}, "**No difference found to the champion (version 3)**: accuracy", False),
        (no_champion(), "**There is no champion to compare it with yet.**", False),
    ],
)
def test_the_champion_decides_what_a_promotion_needs(
    facts: CardFacts, comparison: dict[str, Any], told: str, needs_override: bool
) -> None:
    screen = first_screen(write_card(compared(facts, **comparison), RUN_PAGE))
    assert told in screen
    assert ("Keep the champion." in screen) is needs_override
    assert ("`promotion.override`" in screen) is needs_override


def test_the_champion_itself_asks_for_nothing(facts: CardFacts) -> None:
    screen = first_screen(write_card(compared(facts, **not_comparable(SAME_MODEL, "3")), RUN_PAGE))
    assert "**It is the champion (version 3) itself.**" in screen and "`champion`" not in screen


def test_an_evaluation_without_a_comparison_needs_an_override(facts: CardFacts) -> None:
    bare = replace(facts, evidence={**facts.evidence, "comparison": None})
    assert "`promotion.override`" in write_card(bare, RUN_PAGE)
    assert version_tags(bare)["comparison.verdict"] == "not comparable"


def test_a_closed_gate_is_told_with_its_reasons_and_offers_no_promotion(facts: CardFacts) -> None:
    checks = [check("min_accuracy", "accuracy 0.5 is below 0.9", passed=False, required=True)]
    screen = first_screen(write_card(replace(facts, decision={"passed": False, "checks": checks}), RUN_PAGE))
    assert screen.startswith("Gate closed: accuracy 0.5 is below 0.9.")
    assert "may not be promoted" in screen and "`champion`" not in screen


def test_warnings_of_the_gate_are_counted_and_told(facts: CardFacts) -> None:
    checks = [check("max_ece", "ece 0.2 exceeds 0.1", passed=False), check("min_accuracy", "high", required=True)]
    warned = replace(facts, decision={**facts.decision, "checks": checks})
    assert write_card(warned, RUN_PAGE).startswith("Gate passed, 1 warning: ece 0.2 exceeds 0.1.")
    assert version_tags(warned)["gate.warnings"] == "1"


@pytest.mark.parametrize("claim", [CLAIM_COPIES, CLAIM_LEAKS, "patient-disjoint, and perfect"])
def test_the_card_claims_no_more_than_the_split(facts: CardFacts, claim: str) -> None:
    told = replace(facts, metrics={**facts.metrics, "claim": claim})
    texts = (write_card(told, RUN_PAGE), json.dumps(make_card_json(told, "name")))
    for text in texts:
        assert claim in text
        assert "no patient stands on both sides" not in text.lower()
    assert version_tags(told)["claim"] == claim
    disjoint = replace(facts, metrics={**facts.metrics, "claim": CLAIM_PATIENTS})
    assert "no patient stands on both sides" in write_card(disjoint, RUN_PAGE)


def test_copies_are_told_beside_the_figure_that_they_inflate(
    make_evaluation: Callable[..., Any], facts: CardFacts
) -> None:
    leaky = make_evaluation(leaky=True)
    told = replace(facts, metrics=leaky.metrics | {"evidence_sha256": ""}, evidence=leaky.evidence)
    metrics, screen = leaky.metrics, first_screen(write_card(told, RUN_PAGE))
    free, interval = percent(metrics["copy_free_accuracy"]), span(metrics["copy_free_accuracy_interval"])
    assert f"without a copy trained on&ensp; | {free}&ensp; | {interval} |" in screen


def test_how_often_the_test_set_was_used_is_told(facts: CardFacts) -> None:
    assert "2 other models were judged on these images" in write_card(facts, RUN_PAGE)
    assert "other models judged on these images: 2)" in first_screen(write_card(facts, RUN_PAGE))
    assert "No other model that this registry knows" in write_card(replace(facts, earlier_decisions=0), RUN_PAGE)


def test_mlflow_has_room_for_every_card(facts: CardFacts) -> None:
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersion

    assert SqlModelVersion.description.type.length == MAX_CARD
    endless = "of an endless reason " * 200
    checks = [check(f"c{number}", endless, passed=False) for number in range(40)]
    slices = [
        entry | {"stands_out": True, "told": f"{endless}{number}", "fact": endless, "value": endless}
        for number, entry in enumerate(facts.evidence["slices"])
    ]
    evidence = {**facts.evidence, "slices": slices, "comparison": not_comparable(endless, "3")}
    crowded = replace(facts, evidence=evidence, decision={**facts.decision, "checks": checks})
    card = write_card(crowded, RUN_PAGE)
    assert len(card) <= MAX_CARD
    assert set(SECTIONS) <= set(re.findall(r"^### (.+)$", card, re.MULTILINE))
    required = [check("c" * 500, endless, passed=False, required=True) for _ in range(40)]
    assert len(write_card(replace(crowded, decision={"passed": False, "checks": required}), RUN_PAGE)) <= MAX_CARD


def test_a_doubt_that_there_is_no_room_to_tell_is_named(facts: CardFacts) -> None:
    card = write_card(facts, RUN_PAGE)
    assert all(doubt.lead in card for doubt in facts.doubts) and len(facts.doubts) > 3


EVIL = "![x](http://evil.test/a.png) <img src=x> [a](b) | @root `c`\n# heading"


def test_a_name_out_of_the_data_can_be_no_link_picture_or_heading(facts: CardFacts) -> None:
    slices = [entry | {"stands_out": place == 0, "value": EVIL} for place, entry in enumerate(facts.evidence["slices"])]
    card = write_card(replace(facts, evidence={**facts.evidence, "slices": slices, "ood": None}), RUN_PAGE)
    assert "evil" in card
    for harmful in ("http://evil", "<img", "[a](b)", "| @root", "`c`", "\n# heading", "![x]"):
        assert harmful not in card


@pytest.mark.parametrize(
    "weights",
    ["s3://user:secret@store/models/b.h5", "s3://user:secret@b.h5", "/home/somebody/b.h5", "s3://x/b.h5?sig=secret"],
)
def test_of_an_address_of_weights_only_the_name_is_told(facts: CardFacts, weights: str) -> None:
    told = told_architecture({**facts.training, "params": {"image_size_px": 64, "weights": weights}})
    assert "trained from b.h5," in told
    assert not {"secret", "somebody", "user"} & set(re.findall(r"\w+", told))


def test_what_was_not_measured_is_said(facts: CardFacts) -> None:
    names = ("calibration", "conformal", "triage", "ood", "robustness", "slices")
    bare = replace(facts, evidence={**facts.evidence, **dict.fromkeys(names)})
    assert write_card(bare, RUN_PAGE).count("not measured") == len(names)
    assert not list(TOOLKIT.iter_errors(make_card_json(bare, "name")))


def test_the_same_facts_make_the_same_card(facts: CardFacts) -> None:
    other = replace(facts, evidence=json.loads(json.dumps(facts.evidence, sort_keys=True)))
    assert write_card(other, RUN_PAGE) == write_card(facts, RUN_PAGE)
    assert make_card_json(other, "name") == make_card_json(facts, "name")


def test_versions_can_be_filtered_by_their_tags(facts: CardFacts) -> None:
    tags = version_tags(facts)
    low = facts.metrics["accuracy_interval"][0]
    assert tags["comparison.verdict"] == "better" and tags["comparison.champion"] == "3"
    assert tags["accuracy_low"] == f"{low:.4f}" and tags["claim"] == CLAIM_COPIES
    assert tags["metrics_sha256"] == "1" * 64 and tags["evidence_sha256"] == "2" * 64
    assert int(tags["doubts"]) == len(facts.doubts)
    assert all(isinstance(value, str) and value for value in tags.values())


def test_the_card_for_programs_is_as_the_toolkits_schema_says(facts: CardFacts) -> None:
    Draft202012Validator.check_schema(TOOLKIT.schema)
    card = json.loads(json.dumps(make_card_json(facts, "brain-tumor"), allow_nan=False))
    assert [error.message for error in TOOLKIT.iter_errors(card)] == []
    figures = {
        (entry["type"], entry.get("slice")): entry for entry in card["quantitative_analysis"]["performance_metrics"]
    }
    low, high = facts.metrics["accuracy_interval"]
    assert figures["accuracy", None] == {
        "type": "accuracy",
        "value": facts.metrics["accuracy"],
        "confidence_interval": {"lower_bound": low, "upper_bound": high},
    }
    assert {("recall", name) for name in CLASS_NAMES} <= figures.keys()
    assert len(figures) == len(card["quantitative_analysis"]["performance_metrics"])
    limits = [entry["description"] for entry in card["considerations"]["limitations"]]
    assert any(text.startswith("Patients unknown.") for text in limits)
    assert card["model_details"]["version"]["name"] == facts.metrics["model_digest"]


def test_neither_card_names_an_image(facts: CardFacts) -> None:
    texts = (write_card(facts, RUN_PAGE), json.dumps(make_card_json(facts, "name")))
    assert facts.evidence["mistakes"]["confident"]
    for text in texts:
        assert not any(entry["path"] in text for entry in facts.evidence["mistakes"]["confident"])
