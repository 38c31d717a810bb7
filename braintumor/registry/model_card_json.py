"""The model card for programs, in the schema of the Model Card Toolkit (github.com/tensorflow/model-card-toolkit)."""

from collections.abc import Iterator
from typing import Any

from braintumor.labels import CLASS_NAMES
from braintumor.registry.model_card import (
    CAVEATS,
    CLASS_FIGURES,
    DISCLAIMER,
    INTERVAL_FIGURES,
    OUT_OF_SCOPE,
    PEOPLE,
    PRIVACY,
    PURPOSE,
    CardFacts,
    told_analyses,
    told_architecture,
    told_claim,
    told_comparison,
    told_factors,
    told_misses,
    told_test_data,
    told_training_data,
    told_uses,
)

SCHEMA_VERSION = "0.0.2"
OVERALL = (
    "accuracy",
    *INTERVAL_FIGURES,
    "copy_free_accuracy",
    "macro_auroc",
    "tumour_auroc",
    "ece",
    "brier",
    "nll",
    "ood_auroc",
    "nearest_neighbour_accuracy",
    "statistics_accuracy",
)


def make_card_json(facts: CardFacts, model_name: str) -> dict[str, Any]:
    """The content of model_card.json: the same facts in the same words as on the version's page."""
    metrics, training = facts.metrics, facts.training
    passed = "The gate is passed." if facts.decision.get("passed") is True else "The gate is closed."
    return {
        "schema_version": SCHEMA_VERSION,
        "model_details": {
            "name": model_name,
            "overview": f"Classifier of brain MRI slices. {DISCLAIMER}",
            "documentation": " ".join([passed, *facts.failures, *facts.warnings, told_comparison(facts.comparison)]),
            "version": {"name": str(metrics["model_digest"]), "diff": told_comparison(facts.comparison)},
            "references": [{"reference": "https://doi.org/10.1145/3287560.3287596"}],
        },
        "model_parameters": {
            "model_architecture": told_architecture(training),
            "data": [
                {"name": f"training, data {training['data_md5']}", "description": told_training_data(training)},
                {"name": f"test {metrics['test_md5']}", "description": told_test_data(facts)},
            ],
            "input_format": "grey images (n, side, side, 1), 0 to 255",
            "output_format": f"probabilities (n, 4) of {', '.join(CLASS_NAMES)}, and a score (n, 1) of how unlike the "
            "training's an image is",
        },
        "quantitative_analysis": {"performance_metrics": list(_figures(facts))},
        "considerations": {
            "users": [{"description": "Researchers, and reviewers who look at the images themselves."}],
            "use_cases": [{"description": PURPOSE}, {"description": OUT_OF_SCOPE}],
            "limitations": [
                {"description": told}
                for told in (
                    told_claim(metrics),
                    *(f"{doubt.lead} {doubt.told}" for doubt in facts.doubts),
                    told_uses(facts.earlier_decisions),
                    CAVEATS,
                )
            ],
            "tradeoffs": [{"description": told} for told in told_analyses(facts.evidence)],
            "ethical_considerations": [
                {
                    "name": told_misses(metrics),
                    "mitigation_strategy": "Figures stand beside floors, intervals and doubts; a reviewer promotes.",
                },
                {"name": PEOPLE, "mitigation_strategy": told_factors(metrics, facts.evidence)},
                {"name": PRIVACY, "mitigation_strategy": "No file name and no image stands in this card."},
            ],
        },
    }


def _figures(facts: CardFacts) -> Iterator[dict[str, Any]]:
    """Each figure with its interval, of all images, of each class, of each slice, and of the champion."""
    metrics = facts.metrics
    for name in OVERALL:
        yield from _figure(name, metrics.get(name), metrics.get(f"{name}_interval"))
    for label in CLASS_NAMES:
        for name in CLASS_FIGURES:
            yield from _figure(name, metrics["per_class"][label].get(name), None, label)
    for entry in facts.evidence.get("slices") or []:
        label = f", {entry['label']} alone" if entry["label"] else ""
        yield from _figure("accuracy", entry["accuracy"], entry["accuracy_interval"], f"{entry['told']}{label}")
    for name, entry in sorted((facts.comparison.get("figures") or {}).items()):
        champion = f"champion, version {facts.comparison['champion']}, on images new to both"
        yield from _figure(name, entry["champion"], None, champion)
        yield from _figure(f"{name} less the champion's", entry["difference"], entry["interval"], champion)


def _figure(name: str, value: float | None, interval: Any, of: str | None = None) -> Iterator[dict[str, Any]]:
    if value is None:
        return
    bounds = {"lower_bound": interval[0], "upper_bound": interval[1]} if interval else None
    yield {
        "type": name,
        "value": value,
        **({"slice": of} if of else {}),
        **({"confidence_interval": bounds} if bounds else {}),
    }
