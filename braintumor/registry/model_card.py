"""What a reviewer reads on a version's page in MLflow, where neither artifacts nor the run's metrics are shown."""

from collections.abc import Mapping
from typing import Any

from braintumor.labels import CLASS_NAMES
from braintumor.registry.policy import Decision

FIGURES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "tumour_sensitivity": "Sensitivity, tumour against none",
    "tumour_specificity": "Specificity, tumour against none",
    "macro_auroc": "AUROC, mean of the classes",
    "tumour_auroc": "AUROC, tumour against none",
    "copy_free_accuracy": "Accuracy on images without a copy among those used in training",
    "ece": "Expected calibration error (0 is best)",
    "ood_auroc": "AUROC, images unlike the training's against the test images",
    "nearest_neighbour_accuracy": "Accuracy of a pixel 1-nearest-neighbour (the floor)",
    "statistics_accuracy": "Accuracy of nine statistics of how an image was made (the shortcut)",
}
CLASS_FIGURES = ("recall", "specificity", "precision", "f1", "auroc")


def write_card(
    metrics: Mapping[str, Any], decision: Decision, training: Mapping[str, Any], earlier_decisions: int
) -> str:
    """The model card, Markdown; `earlier_decisions` is how many other models were judged on the same test images."""
    return "\n\n".join(
        [
            "Sorts MRI slices of the brain into glioma, meningioma, no tumour and pituitary tumour (DenseNet201). "
            "**A research tool, not a diagnostic device.**",
            _provenance(metrics, training, earlier_decisions),
            f"### On {metrics['n_test']} test images{_of_groups(metrics)}\n\n{_figures(metrics)}",
            f"### Classes\n\n{_classes(metrics)}",
            f"### Gate\n\n{_checks(decision)}",
        ]
    )


def version_tags(metrics: Mapping[str, Any], training: Mapping[str, Any], earlier_decisions: int) -> dict[str, str]:
    """The tags of a version that passed the gate: the figures with four digits, and where it comes from."""
    figures = (
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "tumour_sensitivity",
        "nearest_neighbour_accuracy",
        "ece",
        "ood_auroc",
    )
    low, high = metrics["accuracy_interval"]
    return {
        **{name: f"{metrics[name]:.4f}" for name in figures},
        "accuracy_interval": f"{low:.4f} to {high:.4f}",
        **{name: str(metrics[name]) for name in ("protocol", "claim", "data_md5", "model_digest", "splits_sha256")},
        "test_md5": str(metrics["test_md5"]),
        "other_models_judged_on_this_test": str(earlier_decisions),
        "git_commit": str(training.get("git_commit") or "unknown"),
        "gate": "passed",
    }


def _provenance(metrics: Mapping[str, Any], training: Mapping[str, Any], earlier_decisions: int) -> str:
    rows = {
        "Data version": f"`{metrics['data_md5']}`",
        "Code": f"`{training.get('git_commit') or 'unknown'}`",
        "Protocol": f"{metrics['protocol']} (claim: {metrics['claim']})",
        "Test images with a copy on the training side of this split": _percent(metrics["leaked_share"]),
        "Declared test images with a copy in the declared training folder": _percent(metrics["declared_leaked_share"]),
        "Other models judged on these test images": _uses(earlier_decisions),
    }
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def _of_groups(metrics: Mapping[str, Any]) -> str:
    return f" in {metrics['n_groups']} groups of copies or patients" if "n_groups" in metrics else ""


def _figures(metrics: Mapping[str, Any]) -> str:
    level = f"{100 * metrics['confidence_level']:g} % interval" if "confidence_level" in metrics else "Interval"
    lines = [f"| Figure | Value | {level} |", "|---|---|---|"]
    for name, title in FIGURES.items():
        if metrics.get(name) is not None:
            interval = metrics.get(f"{name}_interval")
            bounds = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            lines.append(f"| {title} | {_number(metrics[name])} | {bounds} |")
    return "\n".join(lines)


def _classes(metrics: Mapping[str, Any]) -> str:
    lines = [f"| Class | Images | {' | '.join(CLASS_FIGURES)} |", "|---" * (2 + len(CLASS_FIGURES)) + "|"]
    for name in CLASS_NAMES:
        figures = metrics["per_class"][name]
        values = " | ".join(_number(figures.get(figure)) for figure in CLASS_FIGURES)
        lines.append(f"| {name} | {figures['n']} | {values} |")
    return "\n".join(lines)


def _checks(decision: Decision) -> str:
    lines = ["| Check | Verdict | Reason |", "|---|---|---|"]
    for check in decision.checks:
        verdict = "passed" if check.passed else "not passed" if check.required else "warning"
        lines.append(f"| {check.name} | {verdict} | {check.reason} |")
    return "\n".join(lines)


def _uses(earlier_decisions: int) -> str:
    if not earlier_decisions:
        return "none that this registry knows"
    return f"{earlier_decisions}; each one makes such figures a little more optimistic"


def _percent(share: float | None) -> str:
    return "none declared" if share is None else f"{100 * share:.1f} %"


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
