"""One table at the end: what happened, and where to look next."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braintumor import artifacts
from braintumor.errors import UserError
from braintumor.labels import SPLIT_NAMES

Row = tuple[str, str]


@dataclass(frozen=True)
class RunFiles:
    """What the steps left under one build folder; a file that is absent is None."""

    build: Path
    context: dict[str, Any] | None
    findings: dict[str, Any] | None
    leakage: dict[str, Any] | None
    split: dict[str, Any] | None
    training: dict[str, Any] | None
    metrics: dict[str, Any] | None
    decision: dict[str, Any] | None
    test_uses: dict[str, Any] | None
    registration: dict[str, Any] | None

    @classmethod
    def read(cls, build: Path) -> "RunFiles":
        """The files of the run in `build`; raises UserError if no step has run there."""
        places = {
            "context": (Path("resolve", artifacts.CONTEXT), "resolve"),
            "findings": (Path("validation", artifacts.FINDINGS), "validate"),
            "leakage": (Path("validation", artifacts.LEAKAGE), "validate"),
            "split": (Path("split", artifacts.SPLIT_SUMMARY), "split"),
            "training": (Path("model", artifacts.TRAINING), "train"),
            "metrics": (Path("evaluation", artifacts.METRICS), "evaluate"),
            "decision": (Path("gate", artifacts.DECISION), "gate"),
            "test_uses": (Path("gate", artifacts.TEST_USES), "gate"),
            "registration": (Path("registration", artifacts.REGISTRATION), "register"),
        }
        found = {
            name: artifacts.read_json(build / path, f"braintumor {step}") if (build / path).is_file() else None
            for name, (path, step) in places.items()
        }
        if not any(found.values()):
            raise UserError(f"{build} holds no outputs of a run; run 'dvc repro' or 'make demo' first")
        return cls(build, **found)


def summarise(run: RunFiles) -> Iterator[Row]:
    """Rows (what, value) in the order of the steps; a step whose inputs changed since is called stale, not shown."""
    data_md5 = (run.context or run.findings or {}).get("data_md5")
    yield "data version", str(data_md5)
    yield "images checked", _told(run.findings, {"data_md5": data_md5}, _images)
    yield "findings", _told(run.findings, {"data_md5": data_md5}, _findings)
    yield "copies", _told(run.leakage, {"data_md5": data_md5}, _copies)
    yield "split", _told(run.split, {"data_md5": data_md5}, _split)
    splits = {"splits_sha256": (run.split or {}).get("splits_sha256")}
    yield "training", _told(run.training, splits, _training)
    yield "floors", _told(run.split, {"data_md5": data_md5}, _floors)
    model = {"model_digest": (run.training or {}).get("model_digest"), **splits}
    yield "test accuracy", _told(run.metrics, model, _accuracy)
    yield "tumour sensitivity", _told(run.metrics, model, _sensitivity)
    yield "confidence", _told(run.metrics, model, _confidence)
    yield "gate", _told(run.decision, {}, lambda decision: _gate(decision, run))
    yield "test set", _told(run.test_uses, {"test_md5": (run.split or {}).get("test_md5")}, _uses)
    registered = {"model_digest": model["model_digest"]}
    yield "registered", _told(run.registration, registered, lambda registration: _version(registration, run))


def _told(content: dict[str, Any] | None, expected: dict[str, Any], tell: Callable[[dict[str, Any]], str]) -> str:
    if content is None:
        return "not run"
    if any(content.get(key) != value for key, value in expected.items()):
        return "stale: what it was made from has changed since; run 'dvc repro'"
    return tell(content)


def _images(findings: dict[str, Any]) -> str:
    return str(findings["n_images"])


def _findings(findings: dict[str, Any]) -> str:
    counts = {
        severity: sum(finding["severity"] == severity for finding in findings["findings"])
        for severity in ("critical", "warning")
    }
    return f"{counts['critical']} critical, {counts['warning']} warnings"


def _copies(leakage: dict[str, Any]) -> str:
    share = leakage["leaked_share"]
    leaked = "" if share is None else f"; {share:.1%} of the declared test images have a copy in training"
    return f"{leakage['n_copies']}{leaked}"


def _split(split: dict[str, Any]) -> str:
    sizes = ", ".join(f"{split['sizes'][name]} {name}" for name in SPLIT_NAMES)
    return f"{sizes} ({split['protocol']}; {split['claim']})"


def _training(training: dict[str, Any]) -> str:
    return (
        f"{training['epochs_run']} epochs in {training['seconds']:.0f} s, kept epoch {training['best_epoch']}, "
        f"val accuracy {training['best_val_accuracy']:.1%}"
    )


def _floors(split: dict[str, Any]) -> str:
    return (
        f"{split['nearest_neighbour_accuracy']:.1%} by the nearest neighbour, "
        f"{split['statistics_accuracy']:.1%} by nine statistics of how an image was made"
    )


def _uses(uses: dict[str, Any]) -> str:
    earlier = uses["earlier_decisions"]
    if earlier is None:
        return "how often it was used before is not known: MLflow did not answer"
    return f"used for {earlier} earlier decisions" if earlier != 1 else "used for 1 earlier decision"


def _accuracy(metrics: dict[str, Any]) -> str:
    low, high = metrics["accuracy_interval"]
    return (
        f"{metrics['accuracy']:.2%}  ({metrics['confidence_level']:.0%} interval {low:.1%} to {high:.1%}, "
        f"{metrics['n_test']} images, {metrics['n_groups']} groups)"
    )


def _sensitivity(metrics: dict[str, Any]) -> str:
    return f"{metrics['tumour_sensitivity']:.1%}, specificity {metrics['tumour_specificity']:.1%}"


def _confidence(metrics: dict[str, Any]) -> str:
    return (
        f"calibration error {metrics['ece']:.1%}; images unlike the training's told from these by an AUROC of "
        f"{metrics['ood_auroc']:.3f}"
    )


def _gate(decision: dict[str, Any], run: RunFiles) -> str:
    metrics = run.build / "evaluation" / artifacts.METRICS
    if run.metrics is None or decision["digests"].get("metrics_sha256") != artifacts.sha256_of_file(metrics):
        return "stale: the evaluation has changed since; run 'dvc repro'"
    failed = [check["reason"] for check in decision["checks"] if not check["passed"]]
    verdict = "passed" if decision["passed"] else "NOT PASSED"
    return "\n".join([f"{verdict}, {len(decision['checks'])} checks", *failed])


def _version(registration: dict[str, Any], run: RunFiles) -> str:
    if run.decision is None or not run.decision["passed"]:
        return "stale: the gate has not passed this model"
    alias = registration["alias"] or "alias left on a newer version"
    return f"{registration['model_name']} version {registration['version']} ({alias})"


def show_summary(build: Path) -> None:
    """Print the table and where to look next."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    run = RunFiles.read(build)
    table = Table(show_header=False, box=None, padding=(0, 2), pad_edge=False)
    for what, value in summarise(run):
        table.add_row(Text(what, style="bold"), Text(value))
    console = Console(highlight=False)
    console.print(table)
    console.print()
    console.print(f"Data Docs   {build / 'validation' / artifacts.DATA_DOCS / 'index.html'}", soft_wrap=True)
    console.print(f"Report      {build / 'evaluation' / artifacts.REPORT}", soft_wrap=True)
    console.print("MLflow UI   make ui", soft_wrap=True)
