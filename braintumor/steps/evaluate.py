"""The step `evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braintumor import artifacts
from braintumor.data.dvc_remote import open_dataset
from braintumor.data.split_artifact import SPLIT_FACTS, load_split, refuse_other_data
from braintumor.errors import UserError
from braintumor.evidence import plots
from braintumor.evidence.metrics import compute_metrics, make_predictions, read_predictions
from braintumor.model.checkpoints import clear_finished
from braintumor.model.images import load_images
from braintumor.model.inference import image_size_px, load_classifier, predict_probabilities
from braintumor.model.saved import model_digest
from braintumor.params import Params
from braintumor.progress import Progress, silent
from braintumor.registry import tracking

SCHEMA_VERSION = 1


def evaluate(
    dataset: Path, splits: Path, model: Path, output: Path, params: Params, progress: Progress = silent
) -> dict[str, Any]:
    """The model is scored on the test images of its own split; returns metrics.json."""
    dataset = open_dataset(dataset, progress)
    made = load_split(splits)
    refuse_other_data(dataset, made.data_md5, splits)
    digest = model_digest(model / artifacts.MODEL)
    training = artifacts.read_json(model / artifacts.TRAINING, made_by="braintumor train")
    _refuse_other_training(training, model, digest, made.data_md5, made.sha256)
    rows = made.part("test")
    classifier = load_classifier(model / artifacts.MODEL)
    advance = progress("evaluate: decoding test", len(rows))
    images = load_images(dataset, list(rows["path"]), image_size_px(classifier), advance)
    probabilities = predict_probabilities(classifier, images)

    with artifacts.replacing_directory(output) as folder:
        path = folder / artifacts.PREDICTIONS
        # Nine digits hold a 32-bit float exactly; the figures come from the file, as whoever checks them has it.
        make_predictions(rows, probabilities).to_csv(path, index=False, float_format="%.9g")
        predictions = read_predictions(path)
        metrics = {
            "schema_version": SCHEMA_VERSION,
            "data_md5": made.data_md5,
            "splits_sha256": made.sha256,
            "model_digest": digest,
            "predictions_sha256": artifacts.sha256_of_file(path),
            **{fact: made.summary[fact] for fact in SPLIT_FACTS},
            **compute_metrics(predictions, params.evaluate),
        }
        artifacts.write_json(folder / artifacts.METRICS, metrics)
        plots.plot_confusion_matrix(metrics, folder / artifacts.CONFUSION_MATRIX)
        plots.plot_roc_curves(predictions, metrics, folder / artifacts.ROC_CURVES)
        plots.plot_per_class(metrics, folder / artifacts.PER_CLASS)
    tracking.publish_if_reachable(params, model=model, evaluation=output)
    clear_finished(training.get("training_key"))
    return metrics


def _refuse_other_training(
    training: Mapping[str, Any], model: Path, digest: str, data_md5: str, splits_sha256: str
) -> None:
    facts = {"model_digest": digest, "data_md5": data_md5, "splits_sha256": splits_sha256}
    for key, value in facts.items():
        if training.get(key) != value:
            raise UserError(
                f"{model / artifacts.TRAINING} names {key} {training.get(key)}, but {value} was found: the model, "
                "the split and the data set don't belong together; run 'braintumor train' again, or 'dvc repro'"
            )
