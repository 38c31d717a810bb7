"""The step `evaluate`."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor import artifacts
from braintumor.data import patients
from braintumor.data.dvc_remote import open_dataset
from braintumor.data.manifest import load_manifest
from braintumor.data.masks import load_masks
from braintumor.data.privacy import shown_names
from braintumor.data.split_artifact import SPLIT_FACTS, MadeSplit, load_split, refuse_other_data
from braintumor.errors import UserError
from braintumor.evidence import plots
from braintumor.evidence.comparison import compare_with_champion, no_champion, not_comparable
from braintumor.evidence.explanation import measure_explanation
from braintumor.evidence.gallery import Gallery, draw_galleries
from braintumor.evidence.metrics import compute_test_metrics
from braintumor.evidence.mistakes import find_label_errors, measure_mistakes
from braintumor.evidence.of_scores import arrays, sections_of_scores
from braintumor.evidence.predictions import (
    PROBABILITY_COLUMNS,
    SPLIT_COLUMNS,
    make_predictions,
    read_predictions,
    write_table,
)
from braintumor.evidence.report import write_report
from braintumor.evidence.shift import measure_robustness, robustness_images_scored
from braintumor.evidence.slices import facts_of, measure_slices
from braintumor.evidence.verdicts import SAME_MODEL
from braintumor.labels import CLASS_NAMES
from braintumor.model.checkpoints import clear_finished
from braintumor.model.images import load_images
from braintumor.model.inference import image_size_px, load_classifier, predict, predict_probabilities
from braintumor.model.probes import PROBE_KINDS, draw_probes
from braintumor.model.saved import model_digest
from braintumor.model.servable import temperature_of
from braintumor.params import Params
from braintumor.progress import Progress, silent
from braintumor.registry import tracking
from braintumor.registry.champion import ChampionUnusable, fetch_champion, groups_seen, score_champion

if TYPE_CHECKING:
    import keras

SCHEMA_VERSION = 2
EVIDENCE_SCHEMA_VERSION = 1
# On which the maps are checked: whether they depend on what was learnt, and where they point.
EXPLAINED_IMAGES = 64


@dataclass(frozen=True)
class _Subject:
    """A model with the test images of its split, and what is known of them; all rows are in the order of their paths.

    `rows` has the columns of `MadeSplit.test_images`, is_declared_copy, and those of the manifest; `images` are as
    large as the model takes them. `calibration` are the predictions that train left.
    """

    dataset: Path
    made: MadeSplit
    classifier: "keras.Model"
    digest: str
    training: dict[str, Any]
    manifest: pd.DataFrame
    calibration: pd.DataFrame
    rows: pd.DataFrame
    images: NDArray[np.uint8]


def evaluate(
    dataset: Path,
    validation: Path,
    splits: Path,
    model: Path,
    context: Path,
    output: Path,
    params: Params,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The model is scored on the test images of its own split, and beside the champion; returns metrics.json.

    Leaves the evidence (evidence.json, after docs/evidence.schema.json), a report that needs nothing else, and a list
    of probable label errors for annotators. Raises UserError for folders that don't belong together, and
    RegistryUnreachable where there is a champion, and MLflow does not answer.
    """
    subject = _load(open_dataset(dataset, progress), validation, splits, model, progress)
    probes = draw_probes(subject.images, params.evaluate.ood_probes, params.evaluate.seed)
    kinds = np.repeat([*probes], [len(images) for images in probes.values()])
    # At once: each call of the network costs a start of its own.
    outputs = predict(subject.classifier, np.concatenate([subject.images, *probes.values()]))
    if outputs.ood_scores is None:
        raise UserError(f"{model / artifacts.MODEL} has no out-of-distribution score; run 'braintumor train' again")
    n = len(subject.rows)

    with artifacts.replacing_directory(output) as folder:
        predictions = make_predictions(subject.rows, outputs.probabilities[:n], outputs.ood_scores[:n])
        write_table(predictions.assign(**subject.rows[list(SPLIT_COLUMNS)]), folder / artifacts.PREDICTIONS)
        write_table(pd.DataFrame({"kind": kinds, "ood_score": outputs.ood_scores[n:]}), folder / artifacts.OOD_SCORES)
        # The figures come from the files, as whoever checks them has them.
        predictions = read_predictions(folder / artifacts.PREDICTIONS)
        ood_scores = read_predictions(folder / artifacts.OOD_SCORES)
        bound = {
            "data_md5": subject.made.data_md5,
            "splits_sha256": subject.made.sha256,
            "model_digest": subject.digest,
            "predictions_sha256": artifacts.sha256_of_file(folder / artifacts.PREDICTIONS),
            "ood_scores_sha256": artifacts.sha256_of_file(folder / artifacts.OOD_SCORES),
            **{fact: subject.made.summary[fact] for fact in SPLIT_FACTS},
        }
        # Labels of images that were learnt are learnt with them.
        held_out = pd.concat([predictions[~predictions["is_leaked"]], subject.calibration], ignore_index=True)
        label_errors = find_label_errors(held_out)
        label_errors.to_csv(folder / artifacts.LABEL_ERRORS, index=False, lineterminator="\n")
        evidence = {
            "schema_version": EVIDENCE_SCHEMA_VERSION,
            **bound,
            **sections_of_scores(
                predictions,
                ood_scores,
                PROBE_KINDS,
                subject.calibration,
                temperature_of(subject.classifier),
                subject.made.summary["statistics_importances"],
                params.evaluate,
            ),
            "slices": _slices(subject, predictions, params),
            "mistakes": _mistakes(subject, predictions, label_errors, len(held_out), params),
            "comparison": _comparison(subject, context, predictions, params, progress),
            "robustness": _robustness(subject, params, progress),
            "explanation": _explanation(subject, params),
        }
        artifacts.write_json(folder / artifacts.EVIDENCE, evidence)
        metrics = {
            **bound,
            "schema_version": SCHEMA_VERSION,
            **compute_test_metrics(predictions, ood_scores, params.evaluate),
        }
        plots.plot_confusion_matrix(metrics, folder / artifacts.CONFUSION_MATRIX)
        plots.plot_roc_curves(predictions, metrics, folder / artifacts.ROC_CURVES)
        plots.plot_per_class(metrics, folder / artifacts.PER_CLASS)
        (folder / artifacts.CURVES).mkdir()
        for name, curve in plots.curves(evidence).items():
            curve.to_csv(folder / artifacts.CURVES / name, index=False, lineterminator="\n")
        galleries = _galleries(subject, predictions, params)
        write_report(metrics, evidence, galleries, subject.training, folder / artifacts.REPORT)
        metrics |= {
            artifacts.sha256_key(name): artifacts.sha256_of_file(folder / name) for name in artifacts.JUDGED_FILES
        }
        artifacts.write_json(folder / artifacts.METRICS, metrics)
    tracking.publish_if_reachable(params, model=model, evaluation=output)
    clear_finished(subject.training.get("training_key"))
    return metrics


def _load(dataset: Path, validation: Path, splits: Path, model: Path, progress: Progress) -> _Subject:
    made = load_split(splits)
    refuse_other_data(dataset, made.data_md5, splits)
    manifest, validated_md5 = load_manifest(validation / artifacts.MANIFEST)
    if validated_md5 != made.data_md5:
        raise UserError(
            f"{validation / artifacts.MANIFEST} is of data {validated_md5}, {splits} of {made.data_md5}; "
            "run 'braintumor split' again"
        )
    digest = model_digest(model / artifacts.MODEL)
    training = artifacts.read_json(model / artifacts.TRAINING, made_by="braintumor train")
    _refuse_other_training(training, model, digest, made)
    calibration = read_predictions(model / artifacts.CALIBRATION, made_by="braintumor train")
    in_declared_training = set(manifest.loc[manifest["declared_split"] == "train", "duplicate_group"])
    rows = made.test_images().merge(manifest.drop(columns="label"), on="path", validate="one_to_one")
    rows = rows.assign(is_declared_copy=rows["duplicate_group"].isin(in_declared_training))
    rows = rows.sort_values("path", ignore_index=True)
    classifier = load_classifier(model / artifacts.MODEL)
    advance = progress("evaluate: decoding test", len(rows))
    images = load_images(dataset, list(rows["path"]), image_size_px(classifier), advance)
    return _Subject(dataset, made, classifier, digest, training, manifest, calibration, rows, images)


def _refuse_other_training(training: Mapping[str, Any], model: Path, digest: str, made: MadeSplit) -> None:
    calibration = model / artifacts.CALIBRATION
    facts = {
        "model_digest": digest,
        "data_md5": made.data_md5,
        "splits_sha256": made.sha256,
        "calibration_sha256": artifacts.sha256_of_file(calibration) if calibration.is_file() else None,
    }
    for key, value in facts.items():
        if value is None or training.get(key) != value:
            raise UserError(
                f"{model / artifacts.TRAINING} names {key} {training.get(key)}, but {value} was found: the model, "
                "the split and the data set don't belong together; run 'braintumor train' again, or 'dvc repro'"
            )


def _slices(subject: _Subject, predictions: pd.DataFrame, params: Params) -> list[dict[str, Any]]:
    facts = facts_of(subject.manifest, patients.rows_of(subject.dataset), params.validation)
    known = predictions.merge(facts, on="path", how="left", validate="one_to_one")
    return measure_slices(known, params.evaluate)


def _mistakes(
    subject: _Subject, predictions: pd.DataFrame, label_errors: pd.DataFrame, n_checked: int, params: Params
) -> dict[str, Any]:
    names = dict(zip(subject.manifest["path"], shown_names(subject.manifest, params.privacy), strict=True))
    return measure_mistakes(predictions, label_errors, n_checked, names)


def _robustness(subject: _Subject, params: Params, progress: Progress) -> dict[str, Any] | None:
    chosen = _fixed_subset(subject.rows, params.evaluate.robustness_images)
    if not len(chosen):
        return None
    return measure_robustness(
        partial(predict_probabilities, subject.classifier),
        subject.images[chosen],
        subject.rows["label"].iloc[chosen].map(CLASS_NAMES.index).to_numpy(np.int64),
        params.evaluate.seed,
        progress("evaluate: robustness", robustness_images_scored(len(chosen))),
    )


def _fixed_subset(rows: pd.DataFrame, n: int) -> NDArray[np.int64]:
    """Places of `n` rows, from each class as many as there are, at most one of a group while there are others.

    The content decides which: the same images, whatever else is in the test set.
    """
    drawn = rows.assign(place=np.arange(len(rows))).sort_values("pixels_sha256", ignore_index=True)
    drawn["copy"] = drawn.groupby("group").cumcount()
    drawn["turn"] = drawn.sort_values("copy", kind="stable").groupby("label").cumcount()
    return np.sort(drawn.sort_values(["turn", "label"])["place"].to_numpy(np.int64)[:n])


def _explanation(subject: _Subject, params: Params) -> dict[str, Any] | None:
    if not params.evaluate.gallery_images:
        return None
    chosen = _fixed_subset(subject.rows, EXPLAINED_IMAGES)
    rows = subject.rows.iloc[chosen]
    masks = load_masks(subject.dataset, list(rows["path"]), subject.images.shape[1])
    truth = rows["label"].map(CLASS_NAMES.index).to_numpy(np.int64)
    return measure_explanation(subject.classifier, subject.images[chosen], truth, masks, params.evaluate.seed)


def _galleries(subject: _Subject, predictions: pd.DataFrame, params: Params) -> list[Gallery]:
    rows = subject.rows.assign(
        predicted=predictions["predicted"], confidence=predictions[list(PROBABILITY_COLUMNS)].max(axis=1)
    )
    return draw_galleries(subject.dataset, subject.classifier, rows, params.privacy, params.evaluate.gallery_images)


def _comparison(
    subject: _Subject, context: Path, predictions: pd.DataFrame, params: Params, progress: Progress
) -> dict[str, Any]:
    """The champion on the same images, less the groups of which either model was trained on an image."""
    facts = artifacts.read_json(context / artifacts.CONTEXT, "braintumor resolve").get("champion")
    if facts is None:
        return no_champion()
    version = str(facts["version"])
    if facts.get("model_digest") == subject.digest:
        return not_comparable(SAME_MODEL, version)
    try:
        with tempfile.TemporaryDirectory(prefix="braintumor-champion-") as folder:
            champion = fetch_champion(facts, params.registration.model_name, Path(folder))
            paths = list(subject.rows["path"])
            seen_groups = groups_seen(champion, subject.manifest)
            its_probabilities = score_champion(champion, subject.dataset, paths, subject.images, progress)
    except ChampionUnusable as error:
        return not_comparable(str(error), version)
    truth, probabilities, groups = arrays(predictions)
    return compare_with_champion(
        truth,
        probabilities,
        its_probabilities,
        groups,
        (subject.rows["duplicate_group"].isin(seen_groups) | subject.rows["is_leaked"]).to_numpy(bool),
        params.evaluate,
        version,
    )
