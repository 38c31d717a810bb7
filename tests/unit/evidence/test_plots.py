from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from braintumor.evidence import plots
from braintumor.evidence.metrics import compute_metrics
from braintumor.evidence.predictions import make_predictions
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams


def evaluation(params: EvaluateParams) -> tuple[pd.DataFrame, dict[str, object]]:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), 80).astype(np.float32)
    rows = pd.DataFrame({"path": [f"{i:03d}.jpg" for i in range(80)], "label": CLASS_NAMES * 20, "group": range(80)})
    predictions = make_predictions(rows, probabilities)
    return predictions, compute_metrics(predictions, params)


def draw_all(folder: Path, params: EvaluateParams) -> list[bytes]:
    predictions, metrics = evaluation(params)
    rows = [
        {
            "epoch": n,
            "phase": phase,
            "train_loss": 1 / n,
            "val_loss": 1.2 / n,
            "train_accuracy": 0.5,
            "val_accuracy": 0.4,
        }
        for n, phase in enumerate(("head", "head", "fine-tuning", "fine-tuning"), start=1)
    ]
    plots.plot_learning_curve(rows, folder / "curve.png")
    plots.plot_confusion_matrix(metrics, folder / "confusion.png")
    plots.plot_roc_curves(predictions, metrics, folder / "roc.png")
    plots.plot_per_class(metrics, folder / "class.png")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_same_figures_give_the_same_files_and_no_plot_is_blank(tmp_path: Path, evaluate_params: EvaluateParams) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert draw_all(tmp_path / "one", evaluate_params) == draw_all(tmp_path / "two", evaluate_params)
    for path in (tmp_path / "one").iterdir():
        with Image.open(path) as image:
            assert min(image.size) >= 350
            assert len(set(image.convert("L").tobytes())) > 20


def test_every_class_has_a_colour_of_its_own() -> None:
    assert len(set(plots.CLASS_COLOURS.values())) == len(CLASS_NAMES)
