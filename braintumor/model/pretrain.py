"""The sample's backbone: DenseNet201 pre-trained on phantoms of a seed that the sample does not use.

It knows drawn lesions on one template: good for the demo and the tests, for nothing else.
Run by `make pretrain-sample`; about 45 minutes on two cores.
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from braintumor import artifacts
from braintumor.data.sample import draw_sample
from braintumor.labels import CLASS_NAMES
from braintumor.model import training
from braintumor.model.densenet import build_classifier, save_backbone, with_temperature
from braintumor.model.images import load_images
from braintumor.params import TrainParams
from braintumor.progress import Progress, note

PATIENTS_PER_CLASS = {"train": 1300, "test": 60}


def pretrain_sample(output: Path, params: TrainParams, seed: int, progress: Progress) -> list[training.Epoch]:
    """`output` holds the backbone's weights, kernels in 16 bits; the history of the training is returned."""
    training.make_reproducible(params.seed)
    with tempfile.TemporaryDirectory(prefix="phantoms-") as folder:
        phantoms = Path(folder) / "phantoms"
        draw_sample(phantoms, PATIENTS_PER_CLASS, seed=seed, progress=progress)
        train_images = _load(phantoms, "train", params, progress)
        val_images = _load(phantoms, "test", params, progress)
        classifier = build_classifier(params)
        history = training.History(on_epoch=lambda epoch: note(f"pretrain: {epoch}"))
        steps = training.steps_per_epoch(len(train_images.labels), params) * params.epochs
        training.fine_tune(classifier, train_images, val_images, params, history, progress("pretrain", steps))
        model = Path(folder) / artifacts.MODEL
        with_temperature(classifier.network, 1.0).save(model)
        save_backbone(model, output)
    return history.epochs


def _load(phantoms: Path, part: str, params: TrainParams, progress: Progress) -> training.LabelledImages:
    files = sorted((phantoms / part).rglob("*.jpg"))
    paths = [file.relative_to(phantoms).as_posix() for file in files]
    images = load_images(phantoms, paths, params.image_size_px, progress(f"pretrain: decoding {part}", len(paths)))
    labels = pd.Series([file.parent.name for file in files]).map(CLASS_NAMES.index).to_numpy(np.int64)
    return training.LabelledImages(images, labels)
