import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from braintumor.cli import main
from braintumor.labels import CLASS_NAMES

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture
def braintumor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command as a person types it; an exception that would be a traceback fails the test."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["braintumor", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        told = capfd.readouterr()
        assert "Traceback" not in told.err
        return Finished(code, told.out, told.err)

    return run


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
        "evaluate": {"bootstrap_samples": 200},
        # What is tested is how the steps work together, not how good a network is after a minute.
        "gate": {"min_accuracy": {"value": 0.25, "required": True}},
    }
    for section, changes in [*small.items(), *sections.items()]:
        content[section] |= changes
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def dataset_maker() -> Callable[..., Path]:
    """`make_dataset`, for test modules that can't import it."""
    return make_dataset


@pytest.fixture(scope="session")
def params_writer() -> Callable[..., Path]:
    """`write_params`, for test modules that can't import it."""
    return write_params


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """Ask for so many loopback ports that nobody listens at."""

    def find(count: int) -> list[int]:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            return [int(one.getsockname()[1]) for one in sockets]

    return find
