"""Plots of a training and an evaluation, as PNG files that differ only where the figures do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braintumor.evidence.metrics import PROBABILITY_COLUMNS
from braintumor.labels import CLASS_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours: told apart with every common colour vision.
CLASS_COLOURS = dict(zip(CLASS_NAMES, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
TRAIN_COLOUR, VAL_COLOUR = "#999999", "#0072B2"


@contextmanager
def _figure(path: Path, columns: int, size: tuple[float, float]) -> "Iterator[Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, metadata={"Software": None})


def plot_learning_curve(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy of train and val by epoch; a line marks where fine-tuning starts, a dot the best epoch."""
    rows = pd.DataFrame(history)
    best = int(rows["val_loss"].to_numpy().argmin())
    is_head = rows["phase"] == "head"
    with _figure(path, 2, (10, 3.8)) as axes:
        for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
            axis.plot(rows.index + 1, rows[f"train_{quantity}"], color=TRAIN_COLOUR, marker=".", label="train")
            axis.plot(rows.index + 1, rows[f"val_{quantity}"], color=VAL_COLOUR, marker=".", label="val")
            axis.scatter(
                best + 1, rows[f"val_{quantity}"].iloc[best], color=VAL_COLOUR, s=60, zorder=3, label="kept epoch"
            )
            if is_head.any() and not is_head.all():
                axis.axvline(
                    is_head.sum() + 0.5, color="black", linewidth=0.8, linestyle=":", label="fine-tuning starts"
                )
            axis.set_xlabel("epoch")
            axis.set_title(quantity)
            axis.grid(axis="y", linewidth=0.3)
        axes[0].set_ylim(bottom=0)
        axes[0].legend(frameon=False)


def plot_confusion_matrix(metrics: dict[str, Any], path: Path) -> None:
    """Counts of true against predicted class, shaded by the share of the true class."""
    confusion = np.asarray(metrics["confusion_matrix"])
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    with _figure(path, 1, (5.6, 4.8)) as (axis,):
        shaded = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for true in range(len(CLASS_NAMES)):
            for predicted in range(len(CLASS_NAMES)):
                share = shares[true, predicted]
                text = f"{confusion[true, predicted]}\n{share:.1%}"
                axis.text(predicted, true, text, ha="center", va="center", color="white" if share > 0.55 else "black")
        axis.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES)
        axis.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        low, high = metrics["accuracy_interval"]
        axis.set_title(f"accuracy {metrics['accuracy']:.1%} ({low:.1%} to {high:.1%})")
        axis.figure.colorbar(shaded, ax=axis, label="share of the true class", shrink=0.85)


def plot_roc_curves(predictions: pd.DataFrame, metrics: dict[str, Any], path: Path) -> None:
    """One-against-rest ROC curve of each class."""
    from sklearn.metrics import roc_curve

    with _figure(path, 1, (5.2, 4.8)) as (axis,):
        for name, column in zip(CLASS_NAMES, PROBABILITY_COLUMNS, strict=True):
            false_positive, true_positive, _ = roc_curve(predictions["label"] == name, predictions[column])
            auroc = metrics["per_class"][name]["auroc"]
            axis.plot(false_positive, true_positive, color=CLASS_COLOURS[name], label=f"{name} (AUROC {auroc:.3f})")
        axis.plot([0, 1], [0, 1], color="black", linewidth=0.6, linestyle=":")
        axis.set_xlabel("1 - specificity")
        axis.set_ylabel("sensitivity")
        axis.set_title("one class against the rest")
        axis.legend(frameon=False, loc="lower right")


def plot_per_class(metrics: dict[str, Any], path: Path) -> None:
    """Sensitivity, specificity and precision of each class, side by side."""
    quantities = {"recall": "sensitivity", "specificity": "specificity", "precision": "precision"}
    width = 0.26
    with _figure(path, 1, (7.2, 3.8)) as (axis,):
        for offset, (key, title) in enumerate(quantities.items()):
            values = [metrics["per_class"][name][key] for name in CLASS_NAMES]
            places = np.arange(len(CLASS_NAMES)) + (offset - 1) * width
            bars = axis.bar(places, values, width * 0.94, label=title, color=("#0072B2", "#56B4E9", "#999999")[offset])
            axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
        axis.set_xticks(range(len(CLASS_NAMES)), [f"{n} (n = {metrics['per_class'][n]['n']})" for n in CLASS_NAMES])
        axis.set_ylim(0, 1.05)
        axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
