"""The sample's backbone: DenseNet201 pre-trained on phantoms of seeds that the sample does not use.

It knows drawn lesions on one template: good for the demo and the tests, for nothing else.
Run by `make pretrain-sample`; more than an hour on two cores.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from braintumor.data.sample import draw_sample
from braintumor.labels import CLASS_NAMES
from braintumor.model import training
from braintumor.model.densenet import build_classifier, save_backbone
from braintumor.model.images import load_images
from braintumor.params import TrainParams
from braintumor.progress import Progress, note


@dataclass(frozen=True)
class Round:
    """A training on phantoms of its own, from the best epoch of the round before."""

    seed: int
    epochs: int
    learning_rate: float


ROUNDS = (Round(1000, 10, 0.06), Round(2000, 7, 0.04))
PATIENTS_PER_CLASS = {"train": 1300, "test": 60}


def pretrain_sample(output: Path, params: TrainParams, progress: Progress) -> training.Epoch:
    """`output` holds the backbone's weights, kernels in 16 bits; the epoch of the last round that was kept is returned.

    The whole model stands beside it, as .keras.
    """
    training.make_reproducible(params.seed)
    classifier = build_classifier(params)
    for number in ROUNDS:
        recipe = params.model_copy(update={"epochs": number.epochs, "learning_rate": number.learning_rate})
        history = training.History(on_epoch=lambda epoch: note(f"pretrain: {epoch}"))
        with tempfile.TemporaryDirectory(prefix="phantoms-") as folder:
            phantoms = Path(folder) / "phantoms"
            draw_sample(phantoms, PATIENTS_PER_CLASS, seed=number.seed, progress=progress)
            train_images = _load(phantoms, "train", recipe, progress)
            val_images = _load(phantoms, "test", recipe, progress)
        steps = training.steps_per_epoch(len(train_images.labels), recipe) * recipe.epochs
        advance = progress(f"pretrain: phantoms of seed {number.seed}", steps)
        engine = training.make_engine(classifier, recipe, len(train_images.labels))
        training.fine_tune(engine, train_images, val_images, recipe, history, advance)
    output.parent.mkdir(parents=True, exist_ok=True)
    model = output.with_suffix(".keras")
    classifier.network.save(model)
    save_backbone(model, output)
    assert history.best is not None
    return history.best


def _load(phantoms: Path, part: str, params: TrainParams, progress: Progress) -> training.LabelledImages:
    files = sorted((phantoms / part).rglob("*.jpg"))
    paths = [file.relative_to(phantoms).as_posix() for file in files]
    images = load_images(phantoms, paths, params.image_size_px, progress(f"pretrain: decoding {part}", len(paths)))
    labels = pd.Series([file.parent.name for file in files]).map(CLASS_NAMES.index).to_numpy(np.int64)
    return training.LabelledImages(images, labels)
