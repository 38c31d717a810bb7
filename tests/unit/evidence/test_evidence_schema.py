import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

SCHEMA = Draft202012Validator(json.loads((Path(__file__).parents[3] / "docs" / "evidence.schema.json").read_text()))
Place = tuple[str | int, ...]


def problems(evidence: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in SCHEMA.iter_errors(evidence)]


@pytest.fixture(scope="module")
def small(evaluation: Any) -> dict[str, Any]:
    """Evidence with two of whatever it lists."""
    return first_two(evaluation.evidence)


def first_two(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: part if name in ("split", "declared") else first_two(part) for name, part in value.items()}
    return [first_two(part) for part in value[:2]] if isinstance(value, list) else value


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """Every key and every item within, however deep."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield (*above, name)
        yield from places(part, (*above, name))


def at(evidence: Any, place: Place) -> Any:
    for name in place:
        evidence = evidence[name]
    return evidence


def changed(evidence: dict[str, Any], place: Place, value: object) -> dict[str, Any]:
    other = copy.deepcopy(evidence)
    at(other, place[:-1])[place[-1]] = value
    return other


def test_schema_is_one_itself() -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)


@pytest.mark.parametrize("traits", [{}, {"leaky": True}, {"shortcut": True}, {"sharpened": 3}])
def test_what_the_measuring_functions_return_is_as_the_schema_says(
    make_evaluation: Callable[..., Any], traits: dict[str, Any]
) -> None:
    evidence = make_evaluation(**traits).evidence
    assert problems(json.loads(json.dumps(evidence, allow_nan=False))) == []


def test_evidence_without_heat_maps_is_complete(evaluation: Any) -> None:
    assert problems(evaluation.evidence | {"explanation": None}) == []
    assert problems(evaluation.evidence | {"calibration": None})


def test_evidence_without_a_champion_robustness_or_lesions_is_complete(evaluation: Any) -> None:
    from braintumor.evidence.comparison import no_champion

    evidence = copy.deepcopy(evaluation.evidence) | {"comparison": no_champion(), "robustness": None}
    evidence["explanation"]["localisation"] = None
    assert problems(evidence) == []


def test_no_key_may_be_missing_or_added(small: dict[str, Any]) -> None:
    assert problems(small) == []
    free = {"kinds", "per_class", "figures", "importances", "sizes"}  # what they hold is named by the data
    for place in {place for place in places(small) if isinstance(place[-1], str)}:
        if len(place) > 1 and place[-2] in free:
            continue
        without = copy.deepcopy(small)
        del at(without, place[:-1])[place[-1]]
        assert not SCHEMA.is_valid(without), place
    for section in ("calibration", "conformal", "triage", "ood", "robustness", "leakage", "shortcut", "comparison"):
        assert not SCHEMA.is_valid(changed(small, (section, "remarks"), "more")), section
    assert not SCHEMA.is_valid(small | {"more": 1})


def test_every_figure_must_be_a_number_and_no_share_may_exceed_one(small: dict[str, Any]) -> None:
    figures = [place for place in places(small) if isinstance(at(small, place), int | float)]
    assert len(figures) > 200
    for place in figures:
        assert not SCHEMA.is_valid(changed(small, place, "NaN")), place
    for place in [
        ("leaked_share",),
        ("calibration", "after", "ece"),
        ("calibration", "after", "ece_interval", 1),
        ("conformal", "coverage"),
        ("conformal", "per_class", "glioma", "coverage"),
        ("triage", "curve", 0, "accuracy"),
        ("ood", "kinds", "noise", "auroc"),
        ("robustness", "kinds", "noise", "accuracy", 0),
        ("slices", 0, "accuracy"),
        ("leakage", "split", 0, "accuracy"),
        ("mistakes", "confident", 0, "confidence"),
        ("comparison", "figures", "accuracy", "champion"),
    ]:
        assert not SCHEMA.is_valid(changed(small, place, 1.01)), place
        assert not SCHEMA.is_valid(changed(small, place, -0.01)), place


def test_an_interval_has_two_ends(small: dict[str, Any]) -> None:
    for wrong in ([0.1], [0.1, 0.2, 0.3], None, "0.1 to 0.2"):
        assert not SCHEMA.is_valid(changed(small, ("calibration", "after", "ece_interval"), wrong)), wrong
