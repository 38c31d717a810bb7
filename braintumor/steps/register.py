"""The step `register`."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braintumor import artifacts
from braintumor.artifacts import read_json, replacing_directory, sha256_of_file, write_json
from braintumor.errors import GateNotPassed, UserError
from braintumor.params import EvaluateParams, Params
from braintumor.progress import note
from braintumor.registry.settled import digest_of_folders, keep, registry_state, write_again
from braintumor.steps.resolve import confirm

# What checks and registers is imported where it is used: where all is as it was, none of it is loaded.
if TYPE_CHECKING:
    import pandas as pd

    from braintumor.data.split_artifact import MadeSplit
    from braintumor.registry.model_card import CardFacts
    from braintumor.registry.policy import Decision

TRAIN, EVALUATE, GATE, RESOLVE, REGISTER = (
    f"braintumor {step}" for step in ("train", "evaluate", "gate", "resolve", "register")
)
METRICS_TOLERANCE = 1e-9
IMAGE_COLUMNS = ["path", "label", "group"]
DIGESTS = ("data_md5", "splits_sha256", "model_digest", "predictions_sha256", "ood_scores_sha256")


@dataclass(frozen=True)
class Registration:
    """Where the model stands in the registry; `alias` is None if a newer version kept it."""

    model_name: str
    version: str
    alias: str | None
    run_id: str
    model_digest: str
    data_md5: str


@dataclass(frozen=True)
class _Evidence:
    """What was read from the steps' folders, after all of it was found to belong together."""

    training: dict[str, Any]
    metrics: dict[str, Any]
    evidence: dict[str, Any]
    decision: "Decision"


def register(
    model: Path,
    splits: Path,
    evaluation: Path,
    decision: Path,
    context: Path,
    validation: Path,
    output: Path,
    params: Params,
) -> Registration:
    """The model is a version in the registry, with alias, tags and card; registered twice it stays one version.

    All evidence is checked before the registry is touched: the digests of every file, the metrics recomputed from the
    predictions, the rules run again. May be killed at any point and run again.

    Raises GateNotPassed for a decision that closed the gate, UserError for evidence that is stale or was changed
    (nothing is registered), RegistryUnreachable if MLflow does not answer.
    """
    folders = (model, splits, evaluation, decision, context, validation)

    def inputs() -> dict[str, object]:
        return {"folders": digest_of_folders(*folders), "params": params.as_json()}

    given, before = inputs(), registry_state()
    if write_again(output, before, given):
        return Registration(**read_json(output / artifacts.REGISTRATION, REGISTER))
    evidence = _check_evidence(model, splits, evaluation, decision, context, params)

    def enter() -> Registration:
        return _enter(evidence, model, evaluation, decision, validation, params)

    registration = enter()
    if registration.alias is None:
        name, alias = registration.model_name, params.registration.alias
        note(f"{name} version {registration.version} is not the newest; the alias '{alias}' stays where it is")
    with replacing_directory(output) as folder:
        write_json(folder / artifacts.REGISTRATION, asdict(registration))
    settled = _settled_state(before, registration, enter)
    if settled is not None and inputs() == given:
        keep(output, settled, given)
        # It is registered, whatever else the registry keeps.
        with suppress(UserError):
            confirm(context, params.registration)
    return registration


def _settled_state(before: str | None, registration: Registration, enter: Callable[[], Registration]) -> str | None:
    """The state in which the registry lacks nothing: `enter` left it as it was, at the latest when called once more."""
    after = registry_state()
    if after is None or after == before:
        return after
    try:
        return after if enter() == registration and registry_state() == after else None
    # It is registered; the next run asks again.
    except UserError:
        return None


def _enter(
    evidence: _Evidence, model: Path, evaluation: Path, decision: Path, validation: Path, params: Params
) -> Registration:
    """MLflow has all of the evidence and the version; what is there already stays."""
    from braintumor.registry import tracking
    from braintumor.registry.model_card import version_tags, write_card
    from braintumor.registry.model_card_json import make_card_json
    from braintumor.registry.test_set_uses import earlier_decisions
    from braintumor.registry.versions import register_version

    uses = earlier_decisions(evidence.metrics["test_md5"], evidence.metrics["model_digest"])
    _refuse_untellable_evidence(evidence, uses, evaluation / artifacts.EVIDENCE)
    run_id = tracking.publish(params, model, evaluation, decision, validation)
    name, alias = params.registration.model_name, params.registration.alias
    facts = _facts_of_the_card(evidence, run_id, uses)
    tracking.publish_card(run_id, make_card_json(facts, name))
    version = register_version(
        model / artifacts.MODEL,
        name,
        alias,
        run_id,
        version_tags(facts),
        write_card(facts, tracking.run_page(run_id)),
    )
    tracking.record_registration(run_id, name, version.number)
    return Registration(
        model_name=name,
        version=version.number,
        alias=version.alias,
        run_id=run_id,
        model_digest=evidence.metrics["model_digest"],
        data_md5=evidence.metrics["data_md5"],
    )


def _refuse_untellable_evidence(found: _Evidence, uses: int, path: Path) -> None:
    """A card can be made of it; what nothing recomputes (robustness, mistakes, comparison) may have any form."""
    from braintumor.registry.model_card import CardFacts, version_tags, write_card
    from braintumor.registry.model_card_json import make_card_json

    facts = CardFacts(found.metrics, found.evidence, found.decision.as_json(), found.training, uses)
    try:
        write_card(facts, "")
        version_tags(facts)
        make_card_json(facts, "")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _stale(path, f"a section is not as it was written ({type(error).__name__}: {error})", EVALUATE) from error


def _facts_of_the_card(found: _Evidence, run_id: str, uses: int) -> "CardFacts":
    from braintumor.registry import tracking
    from braintumor.registry.model_card import CardFacts

    judgement = (found.metrics, found.evidence, found.decision.as_json())
    # A model that was promoted since keeps the page that a reviewer went by.
    if tracking.is_of_the_champion(found.evidence):
        judgement = tracking.published_judgement(run_id) or judgement
    return CardFacts(*judgement, found.training, uses)


def _check_evidence(
    model: Path, splits: Path, evaluation: Path, decision: Path, context: Path, params: Params
) -> _Evidence:
    from braintumor.data.split_artifact import SPLIT_FACTS, load_split
    from braintumor.evidence.metrics import compute_test_metrics
    from braintumor.evidence.of_scores import sections_of_scores
    from braintumor.evidence.predictions import read_predictions
    from braintumor.model.probes import PROBE_KINDS
    from braintumor.steps.gate import judge

    recorded = read_json(decision / artifacts.DECISION, GATE)
    if recorded.get("passed") is not True:
        raise GateNotPassed(f"{decision / artifacts.DECISION} closed the gate; nothing is registered")
    made = load_split(splits)
    training = read_json(model / artifacts.TRAINING, TRAIN)
    metrics = read_json(evaluation / artifacts.METRICS, EVALUATE)
    judged = judge(evaluation, context, params.gate)

    _refuse_other_digests(model, evaluation, context, made, training, metrics)
    for fact in SPLIT_FACTS:
        if fact in made.summary and metrics.get(fact) != made.summary[fact]:
            raise _stale(evaluation / artifacts.METRICS, f"its {fact} is not that of {splits}", EVALUATE)
    predictions, ood_scores = (
        read_predictions(evaluation / name) for name in (artifacts.PREDICTIONS, artifacts.OOD_SCORES)
    )
    _refuse_other_images(predictions, made, evaluation / artifacts.PREDICTIONS)
    _refuse_other_probes(ood_scores, predictions, params.evaluate, evaluation / artifacts.OOD_SCORES)
    figures = compute_test_metrics(predictions, ood_scores, params.evaluate)
    _refuse_other_metrics(figures, metrics, evaluation / artifacts.METRICS)
    sections = sections_of_scores(
        predictions,
        ood_scores,
        PROBE_KINDS,
        read_predictions(model / artifacts.CALIBRATION, made_by=TRAIN),
        training["temperature"],
        made.summary["statistics_importances"],
        params.evaluate,
    )
    _refuse_other_evidence(sections, metrics, evaluation / artifacts.EVIDENCE)
    if recorded != judged.as_json():
        raise _stale(
            decision / artifacts.DECISION, "the rules, run again on the files that are here, decide otherwise", GATE
        )
    evidence = read_json(evaluation / artifacts.EVIDENCE, EVALUATE)
    return _Evidence(training, metrics, evidence, judged)


def _refuse_other_digests(
    model: Path,
    evaluation: Path,
    context: Path,
    made: "MadeSplit",
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Every file names the same data, split, model and predictions, and they are the ones that lie here."""
    from braintumor.model.saved import model_digest

    current_data_md5 = read_json(context / artifacts.CONTEXT, RESOLVE).get("data_md5")
    digest = model_digest(model / artifacts.MODEL)
    trained, judged = model / artifacts.TRAINING, evaluation / artifacts.METRICS
    if made.data_md5 != current_data_md5:
        raise _stale(Path("the split"), f"it was made from data {made.data_md5}, not {current_data_md5}", "dvc repro")
    facts = [
        (trained, training, "data_md5", made.data_md5, TRAIN),
        (trained, training, "splits_sha256", made.sha256, TRAIN),
        (trained, training, "model_digest", digest, TRAIN),
        (trained, training, "calibration_sha256", _digest_of(model / artifacts.CALIBRATION), TRAIN),
        (trained, training, "seen_images_sha256", _digest_of(model / artifacts.SEEN_IMAGES), TRAIN),
        (judged, metrics, "data_md5", made.data_md5, EVALUATE),
        (judged, metrics, "splits_sha256", made.sha256, EVALUATE),
        (judged, metrics, "model_digest", digest, EVALUATE),
    ]
    for file, content, name, expected, command in facts:
        if content.get(name) != expected:
            raise _stale(file, f"its {name} is {content.get(name)}, here it is {expected}", command)
    for file in (evaluation / name for name in artifacts.JUDGED_FILES):
        if not file.is_file() or sha256_of_file(file) != metrics.get(artifacts.sha256_key(file.name)):
            raise _stale(file, f"{judged.name} belongs to another file", EVALUATE)


def _digest_of(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} is missing; run '{TRAIN}' again. Nothing is registered")
    return sha256_of_file(file)


def _refuse_other_images(predictions: "pd.DataFrame", made: "MadeSplit", path: Path) -> None:
    """The rows are the test images of the split, and repeat rightly what it knows of them."""
    from braintumor.evidence.predictions import SPLIT_COLUMNS

    test = made.test_images()
    columns = [*IMAGE_COLUMNS, *(name for name in SPLIT_COLUMNS if name in test)]
    _refuse_missing_columns(predictions, columns, path)
    expected = sorted(test[columns].itertuples(index=False, name=None))
    if sorted(predictions[columns].itertuples(index=False, name=None)) != expected:
        raise _stale(path, f"its {len(predictions)} rows are not the {len(test)} test images of the split", EVALUATE)


def _refuse_missing_columns(predictions: "pd.DataFrame", columns: list[str], path: Path) -> None:
    if missing := [column for column in columns if column not in predictions]:
        raise _stale(path, f"it has no column {', '.join(missing)}", EVALUATE)


def _refuse_other_metrics(figures: Mapping[str, Any], metrics: Mapping[str, Any], path: Path) -> None:
    for name, value in figures.items():
        if not _agree(value, metrics.get(name)):
            raise _stale(path, f"its {name} is not what {artifacts.PREDICTIONS} gives", EVALUATE)


def _refuse_other_probes(
    ood_scores: "pd.DataFrame", predictions: "pd.DataFrame", params: EvaluateParams, path: Path
) -> None:
    """Every kind of images unlike the training's is there, and none of its images is left out."""
    from braintumor.model.probes import PROBE_KINDS

    counts = ood_scores["kind"].value_counts()
    # Kinds made of slices take each different test image once; groups have no image in common.
    fewest = min(params.ood_probes, predictions["group"].nunique())
    if set(counts.index) != set(PROBE_KINDS) or not counts.between(fewest, params.ood_probes).all():
        raise _stale(path, "it lacks images of some kind, or has others", EVALUATE)


def _refuse_other_evidence(sections: Mapping[str, Any], metrics: Mapping[str, Any], path: Path) -> None:
    """The evidence is of the same files as the metrics, and says what predictions and scores say."""
    from braintumor.data.split_artifact import SPLIT_FACTS

    evidence = read_json(path, EVALUATE)
    for name in (*DIGESTS, *SPLIT_FACTS):
        if evidence.get(name) != metrics.get(name):
            raise _stale(path, f"its {name} is not that of the metrics", EVALUATE)
    for name, section in sections.items():
        if not _agree(section, evidence.get(name)):
            raise _stale(path, f"its section {name} is not what predictions and scores give", EVALUATE)


def _agree(expected: object, found: object) -> bool:
    """The same structure, and numbers that differ by 1e-9 at most; NaN agrees with nothing."""
    if isinstance(expected, Mapping):
        return (
            isinstance(found, Mapping)
            and expected.keys() == found.keys()
            and all(_agree(value, found[key]) for key, value in expected.items())
        )
    if isinstance(expected, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(expected) == len(found)
            and all(_agree(left, right) for left, right in zip(expected, found, strict=True))
        )
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return is_number and math.isclose(expected, found, rel_tol=0, abs_tol=METRICS_TOLERANCE)  # type: ignore[arg-type]
    return type(expected) is type(found) and bool(expected == found)


def _stale(file: Path, fact: str, command: str) -> UserError:
    return UserError(f"{file} is stale or was changed: {fact}; run '{command}' again. Nothing is registered")
