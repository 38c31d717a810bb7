"""The step `train`."""

import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from braintumor import artifacts
from braintumor.data.dvc_remote import open_dataset
from braintumor.data.split_artifact import MadeSplit, load_split, refuse_other_data
from braintumor.evidence.plots import plot_learning_curve
from braintumor.evidence.predictions import make_predictions, write_table
from braintumor.labels import CLASS_NAMES
from braintumor.model import training
from braintumor.model.checkpoints import Checkpoints, checkpoint_address, training_key
from braintumor.model.densenet import Classifier, build_classifier, weights_digest
from braintumor.model.images import load_images
from braintumor.model.inference import BATCH_SIZE, predict
from braintumor.model.ood import fit_ood_score
from braintumor.model.saved import model_digest
from braintumor.model.servable import servable, temperature_of
from braintumor.params import Params
from braintumor.progress import Progress, note, silent, warn
from braintumor.registry import tracking

if TYPE_CHECKING:
    import keras

USED_SPLITS = ("train", "val", "calibration")


@dataclass(frozen=True)
class TrainingSummary:
    """What came out of a training."""

    model_digest: str
    epochs_run: int
    best_epoch: int
    best_val_loss: float
    best_val_accuracy: float
    temperature: float
    seconds: float
    resumed_after_epoch: int | None
    mlflow_run_id: str | None


def train(
    dataset: Path, splits: Path, output: Path, params: Params, progress: Progress = silent, *, image: str = ""
) -> TrainingSummary:
    """DenseNet201 is fine-tuned on the split's images; the best epoch is kept.

    Temperature and out-of-distribution threshold of the saved model are fitted on the calibration images, whose
    predictions stand in calibration.csv.

    The model is written before MLflow is asked to keep it: a server that is down costs a warning, not the training.
    A training that was broken off goes on after its last epoch, if it ran in this container `image` (with its digest).
    """
    started = time.monotonic()
    dataset = open_dataset(dataset, progress)
    made = load_split(splits)
    refuse_other_data(dataset, made.data_md5, splits)
    weights_sha256 = weights_digest(params.train)
    key = training_key(made.data_md5, made.sha256, params.train, weights_sha256, image)
    checkpoints = Checkpoints(checkpoint_address(output), key)
    training.make_reproducible(params.train.seed)
    classifier = build_classifier(params.train)
    images = {name: _load(dataset, made, name, params, progress) for name in USED_SPLITS}
    seen = made.rows[made.rows["split"].isin(USED_SPLITS)]
    # Before the training: what happens to the files meanwhile changes nothing of what was used, and loses no model.
    seen = seen.assign(sha256=[artifacts.sha256_of_file(dataset / path) for path in seen["path"]])
    with tracking.training_run(params, made.data_md5) as run:
        history = training.History(on_epoch=run.log_epoch)
        resumed_after = _fit(classifier, images, params, history, checkpoints, progress)
        model = _finish(classifier, images, made, params)
        calibration = _predictions(model, made.part("calibration"), images["calibration"])
        summary = _save(
            model, history, calibration, made, seen, weights_sha256, key, output, params, started, resumed_after,
            run.run_id,
        )  # fmt: skip
    # Elsewhere the model may yet be lost with its pod: evaluate, which has it in hand, clears there.
    if checkpoints.is_own_folder:
        checkpoints.clear()
    tracking.publish_if_reachable(params, model=output)
    return summary


def _load(dataset: Path, made: MadeSplit, name: str, params: Params, progress: Progress) -> training.LabelledImages:
    rows = made.part(name)
    advance = progress(f"train: decoding {name}", len(rows))
    pixels = load_images(dataset, list(rows["path"]), params.train.image_size_px, advance)
    labels = rows["label"].map(CLASS_NAMES.index).to_numpy(np.int64)
    return training.LabelledImages(pixels, labels)


def _fit(
    classifier: Classifier,
    images: dict[str, training.LabelledImages],
    params: Params,
    history: training.History,
    checkpoints: Checkpoints,
    progress: Progress,
) -> int | None:
    """Train, and return after which epoch of an earlier attempt it went on, if it did."""
    state = checkpoints.load()
    optimizer_state = state.optimizer if state else ()
    resumed_after = len(state.rows) if state else None
    if state is not None:
        training.restore(classifier, history, state)
        # Hundreds of megabytes, and in the network by now.
        del state
        note(f"train: goes on after epoch {len(history.epochs)} ({history.epochs[-1].phase}) of an earlier attempt")
    elif classifier.is_pretrained and params.train.head_epochs:
        advance = progress("train: head on cached features", params.train.head_epochs)
        training.fit_head(classifier, images["train"], images["val"], params.train, history, advance)
        checkpoints.save(training.state_of(classifier, history))
    if params.train.epochs:
        epochs_left = params.train.epochs - history.count("fine-tuning")
        steps = training.steps_per_epoch(len(images["train"].labels), params.train)
        advance = progress("train: fine-tuning", steps * epochs_left)
        training.fine_tune(
            classifier, images["train"], images["val"], params.train, history, advance,
            on_state=checkpoints.save, optimizer_state=optimizer_state,
        )  # fmt: skip
    return resumed_after


def _finish(
    classifier: Classifier, images: dict[str, training.LabelledImages], made: MadeSplit, params: Params
) -> "keras.Model":
    """The model to serve, with temperature and out-of-distribution score fitted to the network of the best epoch."""
    network, train, calibration = classifier.network, images["train"], images["calibration"]
    logits = network.predict(calibration.images, batch_size=BATCH_SIZE, verbose=0)
    # Copies would count as independent images, and the threshold would promise too much.
    one_a_group = made.part("calibration").reset_index(drop=True).drop_duplicates("group").index.to_numpy()
    share = params.train.ood_alarm_share
    if len(one_a_group) + 1 < 1 / share:
        warn(
            f"{len(one_a_group)} groups of calibration images are too few for train.ood_alarm_share {share}: more "
            "images like these will be called unlike the training's"
        )
    head = fit_ood_score(network, train.images, train.labels, calibration.images[one_a_group], share, params.train.seed)
    return servable(network, training.fit_temperature(logits, calibration.labels), head)


def _predictions(model: "keras.Model", rows: pd.DataFrame, images: training.LabelledImages) -> pd.DataFrame:
    outputs = predict(model, images.images)
    return make_predictions(rows, outputs.probabilities, outputs.ood_scores)


def _save(
    model: "keras.Model",
    history: training.History,
    calibration: pd.DataFrame,
    made: MadeSplit,
    seen: pd.DataFrame,
    weights_sha256: str | None,
    key: str,
    output: Path,
    params: Params,
    started: float,
    resumed_after: int | None,
    run_id: str | None,
) -> TrainingSummary:
    assert history.best is not None
    with artifacts.replacing_directory(output) as folder:
        model.save(folder / artifacts.MODEL)
        write_table(calibration, folder / artifacts.CALIBRATION)
        seen.to_csv(folder / artifacts.SEEN_IMAGES, index=False)
        summary = TrainingSummary(
            model_digest=model_digest(folder / artifacts.MODEL),
            epochs_run=len(history.epochs),
            best_epoch=history.best.epoch,
            best_val_loss=history.best.val_loss,
            best_val_accuracy=history.best.val_accuracy,
            temperature=temperature_of(model),
            seconds=round(time.monotonic() - started, 1),
            resumed_after_epoch=resumed_after,
            mlflow_run_id=run_id,
        )
        artifacts.write_json(
            folder / artifacts.TRAINING,
            asdict(summary)
            | {
                "data_md5": made.data_md5,
                "splits_sha256": made.sha256,
                "seen_images_sha256": artifacts.sha256_of_file(folder / artifacts.SEEN_IMAGES),
                "calibration_sha256": artifacts.sha256_of_file(folder / artifacts.CALIBRATION),
                "params": params.train.model_dump(),
                "git_commit": git_commit(),
                "weights_sha256": weights_sha256,
                "training_key": key,
                "images": seen["split"].value_counts().to_dict(),
            },
        )
        artifacts.write_json(folder / artifacts.LABELS, {"class_names": list(CLASS_NAMES)})
        pd.DataFrame(history.rows()).to_csv(folder / artifacts.HISTORY, index=False)
        plot_learning_curve(history.rows(), folder / artifacts.LEARNING_CURVE)
    return summary


def git_commit() -> str | None:
    """The commit of the code in use, '-dirty' if files differ from it; None outside a repository.

    An image has no repository: there BRAINTUMOR_GIT_COMMIT tells.
    """
    if built_from := os.environ.get("BRAINTUMOR_GIT_COMMIT", "").strip():
        return built_from
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
