"""The step `train`."""

import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor import artifacts
from braintumor.data.dvc_remote import open_dataset
from braintumor.data.split_artifact import MadeSplit, load_split, refuse_other_data
from braintumor.evidence.plots import plot_learning_curve
from braintumor.evidence.predictions import make_predictions, write_table
from braintumor.labels import CLASS_NAMES
from braintumor.model import training
from braintumor.model.checkpoints import Checkpoints, State, checkpoint_address, training_key
from braintumor.model.densenet import Classifier, build_classifier, import_keras, weights_digest
from braintumor.model.distribution import (
    Placement,
    agree,
    end_together,
    lost_workers_as_message,
    make_strategy,
    placement,
)
from braintumor.model.engine import Engine
from braintumor.model.image_store import decoded_folder, open_images
from braintumor.model.inference import predict
from braintumor.model.ood import fit_ood_score
from braintumor.model.saved import model_digest
from braintumor.model.servable import servable, temperature_of
from braintumor.params import Params
from braintumor.progress import Progress, note, silent, warn
from braintumor.registry import tracking

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

USED_SPLITS = ("train", "val", "calibration")
# Of very many training images, those that the out-of-distribution score is fitted on; also images in memory at a time.
OOD_IMAGES = 10_000


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
    resumed_after_step: int | None  # of the next epoch
    mlflow_run_id: str | None


def train(
    dataset: Path, splits: Path, output: Path, params: Params, progress: Progress = silent, *, image: str = ""
) -> TrainingSummary | None:
    """DenseNet201 is fine-tuned on the split's images; the best epoch is kept.

    Temperature and out-of-distribution threshold of the saved model are fitted on the calibration images, whose
    predictions stand in calibration.csv.

    The model is written before MLflow is asked to keep it: a server that is down costs a warning, not the training.
    A training that was broken off goes on where it was, if it ran in this container `image` (with its digest). Of
    several workers, which `params.train.distribution` and the environment tell, the first does all this; the others
    help it to train, leave nothing, and return None.
    """
    started = time.monotonic()
    place = placement(params.train.distribution, os.environ)
    # It keeps back what TensorFlow tells about its start.
    import_keras()
    # Before TensorFlow computes anything: afterwards no worker could join the others.
    strategy = make_strategy(place, params.train.distribution)
    with lost_workers_as_message(place):
        summary = _train(dataset, splits, output, params, progress, image, place, strategy, started)
        # An orchestrator starts all workers again where one fails, but none that has ended well.
        end_together(strategy, place)
    return summary


def _train(
    dataset: Path,
    splits: Path,
    output: Path,
    params: Params,
    progress: Progress,
    image: str,
    place: Placement,
    strategy: "tf.distribute.Strategy",
    started: float,
) -> TrainingSummary | None:
    dataset = open_dataset(dataset, progress)
    made = load_split(splits)
    refuse_other_data(dataset, made.data_md5, splits)
    weights_sha256 = weights_digest(params.train)
    key = training_key(made.data_md5, made.sha256, params.train, weights_sha256, image)
    agree(strategy, place, {"the training's data, split, parameters, weights, image and code": key})
    training.make_reproducible(params.train.seed, xla=params.train.xla)
    classifier = build_classifier(params.train)
    seen = made.rows[made.rows["split"].isin(USED_SPLITS)]
    # Before the training: what happens to the files meanwhile changes nothing of what was used, and loses no model.
    seen = seen.assign(sha256=[artifacts.sha256_of_file(dataset / path) for path in seen["path"]])
    images = {name: _open(dataset, seen, name, params, progress) for name in USED_SPLITS}
    engine = training.make_engine(classifier, params.train, len(images["train"].labels), strategy, place)
    if not place.is_first:
        _fit(engine, classifier, images, params, training.History(on_epoch=lambda epoch: None), None, silent)
        training.outputs_of(engine, images["calibration"].images)
        return None
    checkpoints = Checkpoints(checkpoint_address(output), key)
    with tracking.training_run(params, made.data_md5) as run:
        history = training.History(on_epoch=run.log_epoch)
        resumed_after = _fit(engine, classifier, images, params, history, checkpoints, progress)
        model = _finish(engine, classifier, images, made, params)
        calibration = _predictions(model, made.part("calibration"), images["calibration"])
        summary = _save(
            model, history, calibration, made, seen, weights_sha256, key, output, params, started, resumed_after,
            run.run_id,
        )  # fmt: skip
    tracking.publish_if_reachable(params, model=output)
    # At the very end: DVC deletes the model of a command that did not end. Elsewhere the model may yet be lost with its
    # pod: evaluate, which has it in hand, clears there.
    if checkpoints.is_own_folder:
        checkpoints.clear()
    return summary


def _open(dataset: Path, seen: pd.DataFrame, name: str, params: Params, progress: Progress) -> training.LabelledImages:
    rows = seen[seen["split"] == name]
    advance = progress(f"train: decoding {name}", len(rows))
    size_px, in_memory = params.train.image_size_px, params.train.images_in_memory
    pixels = open_images(dataset, rows, size_px, in_memory, decoded_folder(), advance)
    labels = rows["label"].map(CLASS_NAMES.index).to_numpy(np.int64)
    return training.LabelledImages(pixels, labels)


def _fit(
    engine: Engine,
    classifier: Classifier,
    images: dict[str, training.LabelledImages],
    params: Params,
    history: training.History,
    checkpoints: Checkpoints | None,
    progress: Progress,
) -> tuple[int, int] | None:
    """Train, and return after which epoch, and step of the next, of an earlier attempt it went on, if it did.

    Without `checkpoints` this is not the first worker, which tells the others where to go on.
    """
    state = checkpoints.load(lambda found: training.check_state(engine, found)) if checkpoints else None
    state = training.state_for_all(engine, state)
    save = checkpoints.save if checkpoints else _forget
    first_step = state.step if state else 0
    resumed_after = (len(state.rows), state.step) if state else None
    if state is not None:
        training.restore(engine, history, state)
        note(f"train: goes on after {_told(history, first_step)} of an earlier attempt")
        # Hundreds of megabytes, and in the engine by now.
        del state
    elif classifier.is_pretrained and params.train.head_epochs:
        training.fit_head(engine, classifier, images["train"], images["val"], params.train, history, progress)
        _take_over(engine, history)
        save(training.state_of(engine, history))
    else:
        _take_over(engine, history)
    steps = training.steps_per_epoch(len(images["train"].labels), params.train)
    epochs_left = params.train.epochs - history.count("fine-tuning")
    advance = progress("train: fine-tuning", steps * epochs_left - first_step)
    training.fine_tune(engine, images["train"], images["val"], params.train, history, advance, save, first_step)
    return resumed_after


def _take_over(engine: Engine, history: training.History) -> None:
    """All workers begin with the first one's values: by processors of different kinds they differ in rounding."""
    if engine.placement.workers > 1:
        state = training.state_for_all(engine, training.state_of(engine, history))
        assert state is not None
        training.restore(engine, history, state)


def _forget(state: State) -> None:
    """The first worker keeps it for all."""


def _told(history: training.History, step: int) -> str:
    epoch = f"epoch {len(history.epochs)} ({history.epochs[-1].phase})" if history.epochs else ""
    return " and ".join(part for part in (epoch, f"step {step} of the next" if step else "") if part)


def _finish(
    engine: Engine,
    classifier: Classifier,
    images: dict[str, training.LabelledImages],
    made: MadeSplit,
    params: Params,
) -> "keras.Model":
    """The model to serve, with temperature and out-of-distribution score fitted to the network of the best epoch."""
    network, train, calibration = classifier.network, images["train"], images["calibration"]
    logits = training.outputs_of(engine, calibration.images)[-1]
    # Copies would count as independent images, and the threshold would promise too much.
    one_a_group = made.part("calibration").reset_index(drop=True).drop_duplicates("group").index.to_numpy()
    share = params.train.ood_alarm_share
    if len(one_a_group) + 1 < 1 / share:
        warn(
            f"{len(one_a_group)} groups of calibration images are too few for train.ood_alarm_share {share}: more "
            "images like these will be called unlike the training's"
        )
    some, few = (_drawn(n, params.train.seed) for n in (np.arange(len(train.labels)), one_a_group))
    head = fit_ood_score(
        network, train.images[some], train.labels[some], calibration.images[few], share, params.train.seed
    )
    return servable(network, training.fit_temperature(logits, calibration.labels), head)


def _drawn(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """All rows, in their order; of very many so many as the score needs, and memory holds."""
    if len(rows) <= OOD_IMAGES:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, OOD_IMAGES, replace=False))


def _predictions(model: "keras.Model", rows: pd.DataFrame, images: training.LabelledImages) -> pd.DataFrame:
    starts = range(0, max(1, len(rows)), OOD_IMAGES)
    parts = [predict(model, images.images[start : start + OOD_IMAGES]) for start in starts]
    scores = [part.ood_scores for part in parts if part.ood_scores is not None]
    probabilities = np.concatenate([part.probabilities for part in parts])
    return make_predictions(rows, probabilities, np.concatenate(scores) if scores else None)


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
    resumed_after: tuple[int, int] | None,
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
            resumed_after_epoch=resumed_after[0] if resumed_after else None,
            resumed_after_step=resumed_after[1] if resumed_after else None,
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
