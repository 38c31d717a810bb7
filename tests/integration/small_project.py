"""A small data set and parameters for it, for tests that run the real steps."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from braintumor.labels import CLASS_NAMES

ROOT = Path(__file__).parents[2]


def draw_slice(path: Path, label: str, seed: int, side_px: int = 48) -> None:
    """An image whose class is its texture: a network can learn it, and no two are alike."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side_px, :side_px]
    wave = {"glioma": rows / 3, "meningioma": columns / 3, "notumor": (rows + columns) / 9, "pituitary": rows * 0}[
        label
    ]
    pixels = 110 + 60 * np.sin(wave + random.uniform(0, 6)) + random.normal(0, 25, (side_px, side_px))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_dataset(folder: Path, n_train: int = 20, n_test: int = 6) -> Path:
    """A small data set in the layout of data/."""
    for split, n in (("train", n_train), ("test", n_test)):
        for index, label in enumerate(CLASS_NAMES):
            for number in range(n):
                path = folder / split / label / f"{label}-{number:02d}.jpg"
                draw_slice(path, label, 1000 * (split == "test") + 100 * index + number)
    return folder


def write_params(path: Path, **sections: dict[str, Any]) -> Path:
    """The committed parameters for a small data set, with changes by section."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    small: dict[str, dict[str, Any]] = {
        "validate": {"min_images_per_class": 5, "workers": 1},
        "split": {"seed": 3, "val_fraction": 0.2, "calibration_fraction": 0.2},
        "train": {
            "image_size_px": 32,
            "head_epochs": 8,
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": 0.001,
            "optimizer": "sgd",
            "weights": str(ROOT / "weights/densenet201-phantoms.weights.h5"),
        },
        # Pictures and perturbations are test_evidence's.
        "evaluate": {"bootstrap_samples": 200, "ood_probes": 8, "robustness_images": 0, "gallery_images": 0},
        # What is tested is how the steps work together, not how good a network is after a minute.
        "gate": {"min_accuracy": {"value": 0.25, "required": True}},
    }
    for section, changes in [*small.items(), *sections.items()]:
        content[section] |= changes
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
