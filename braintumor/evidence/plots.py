"""Plots of a training and an evaluation that differ only where the figures do: PNG files, and SVG for the report."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braintumor.evidence.predictions import PROBABILITY_COLUMNS
from braintumor.labels import CLASS_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours: told apart with every common colour vision.
CLASS_COLOURS = dict(zip(CLASS_NAMES, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
TRAIN_COLOUR, VAL_COLOUR = "#999999", "#0072B2"
INK, PALE, WARNING_COLOUR = "#333333", "#999999", "#D55E00"

# Text as outlines: the same picture on every machine, whatever fonts it has.
SVG_STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "braintumor",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 8,
    "axes.edgecolor": PALE,
    "axes.linewidth": 0.7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": "#cccccc",
    "grid.linewidth": 0.4,
}
POINTS_PER_INCH = 72


@dataclass(frozen=True)
class Dot:
    """A figure of a dot plot; figures of one name stand in one row."""

    name: str
    value: float
    interval: Sequence[float] | None = None
    colour: str = VAL_COLOUR
    mark: str = "o"
    series: str = ""  # of a dot whose row has several


@dataclass(frozen=True)
class Drawing:
    """A plot that stands within a page."""

    svg: bytes
    size: tuple[int, int]  # width and height in CSS pixels


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


def draw_dots(
    dots: Sequence[Dot],
    x_label: str,
    *,
    title: str = "",
    reference: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
    is_share: bool = True,
) -> Drawing:
    """A row a name, a dot a figure, with its interval; `reference` is a vertical line and its name."""
    names = list(dict.fromkeys(dot.name for dot in dots))
    rows = dict(zip(names, range(len(names) - 1, -1, -1), strict=True))
    series = dict.fromkeys(dot.series for dot in dots if dot.series)
    height = 0.6 + 0.24 * len(names) + 0.18 * (bool(reference) + bool(series) + bool(title))
    with _panel((3.55, height)) as (axis, drawing):
        for dot in dots:
            row = rows[dot.name]
            if dot.interval is not None:
                axis.plot(dot.interval, [row, row], color=dot.colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt")
            label = dot.series if dot.series and series.pop(dot.series, "") is None else None
            axis.plot(
                dot.value, row, dot.mark, color=dot.colour, markersize=5.5, markeredgewidth=1.5, linestyle="none",
                clip_on=False, zorder=3, label=label,
            )  # fmt: skip
        if reference:
            axis.axvline(reference[0], color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
            axis.annotate(
                reference[1], (reference[0], 1), (0, 2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="bottom", fontsize=7.5,
            )  # fmt: skip
        axis.set_xlim(limits or span_of(dots, reference, is_share))
        if is_share:
            _percent_axis(axis.xaxis)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.set_yticks(list(rows.values()), names)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid()
        axis.set_axisbelow(True)
        axis.set_xlabel(x_label)
        if title:
            axis.set_title(title, loc="left", pad=14 if reference and reference[1] else 4)
        if any(dot.series for dot in dots):
            axis.figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.1, columnspacing=1)
    return drawing()


def span_of(
    dots: Sequence[Dot], reference: tuple[float, str] | None = None, is_share: bool = True
) -> tuple[float, float]:
    """The ends of an axis that shows all dots and intervals; shares end at 0 and 1."""
    seen = [end for dot in dots for end in (dot.value, *(dot.interval or ()))] + ([reference[0]] if reference else [])
    margin = max(0.02, 0.08 * (max(seen) - min(seen)))
    low, high = min(seen) - margin, max(seen) + margin
    return (max(0.0, low), min(1.0, high)) if is_share else (low, high)


def draw_reliability(bins: Sequence[Mapping[str, Any]], title: str) -> Drawing:
    """How often the answers of each bin of confidence are right; a dot's area grows with its number of images."""
    most = max((entry["n"] for entry in bins), default=1) or 1
    with _panel((2.7, 2.75)) as (axis, drawing):
        axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
        axis.annotate(
            "as sure as right", (0.12, 0.12), (-3, 3), textcoords="offset points", rotation=45,
            rotation_mode="anchor", fontsize=7,
        )  # fmt: skip
        for entry in (entry for entry in bins if entry["n"]):
            said, right, interval = entry["confidence"], entry["accuracy"], entry.get("accuracy_interval")
            axis.plot([said, said], [said, right], color=WARNING_COLOUR, linewidth=1)
            if interval is not None:
                axis.plot([said, said], interval, color=VAL_COLOUR, linewidth=3, alpha=0.3, solid_capstyle="butt")
            axis.scatter(said, right, s=10 + 90 * entry["n"] / most, color=VAL_COLOUR, zorder=3, clip_on=False)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title)
        axis.set_xlabel("confidence of the answer")
        axis.set_ylabel("share of right answers")
        _percent_axis(axis.xaxis)
        _percent_axis(axis.yaxis)
        axis.grid()
        axis.set_axisbelow(True)
    return drawing()


def draw_risk_coverage(
    curve: Sequence[Mapping[str, float]], max_error: float, recommended: tuple[float, float] | None
) -> Drawing:
    """Share of wrong answers among the images kept; `recommended` is (kept, accuracy) at the threshold."""
    kept = [point["kept"] for point in curve]
    wrong = [1 - point["accuracy"] for point in curve]
    with _panel((3.55, 2.6)) as (axis, drawing):
        axis.plot(kept, wrong, color=VAL_COLOUR, linewidth=1.6)
        axis.axhline(max_error, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
        axis.annotate(
            f"at most {max_error:.0%} wrong", (0.01, max_error), (0, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=7.5,
        )  # fmt: skip
        if recommended is not None:
            place = recommended[0], 1 - recommended[1]
            axis.plot(*place, "o", color=WARNING_COLOUR, markersize=7, zorder=3, clip_on=False)
            # Beside a rising curve there is room above on the left, and below on the right.
            is_above = place[0] > 0.6
            axis.annotate(
                "recommended", place, (-6, 6) if is_above else (6, -4), textcoords="offset points",
                ha="right" if is_above else "left", va="bottom" if is_above else "top",
                color=WARNING_COLOUR, fontsize=7.5,
            )  # fmt: skip
        top = max([*wrong, max_error, 1 - recommended[1] if recommended else 0])
        axis.set(xlim=(0, 1), ylim=(0, min(1.0, top * 1.25)))
        axis.set_xlabel("share of images kept, the most confident first")
        axis.set_ylabel("share of wrong answers")
        _percent_axis(axis.xaxis)
        _percent_axis(axis.yaxis)
        axis.grid()
        axis.set_axisbelow(True)
    return drawing()


def draw_severities(
    title: str, unit: str, severities: Sequence[float], accuracy: Sequence[float], clean: float
) -> Drawing:
    """Accuracy on images perturbed ever more, one small panel a kind; all panels have the same height."""
    with _panel((1.95, 1.85)) as (axis, drawing):
        places = np.arange(len(severities) + 1)
        axis.axhline(clean, color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
        axis.plot(
            places, [clean, *accuracy], color=VAL_COLOUR, marker="o", markersize=3.5, linewidth=1.5, clip_on=False
        )
        axis.set_xticks(places, ["none", *(f"{severity:g}" for severity in severities)])
        axis.set(ylim=(0, 1), title=title)
        # Two lines for every panel, so that all axes are as high.
        lines = textwrap.wrap(unit, 27)[:2]
        axis.set_xlabel("\n".join([*lines, " "][:2]), fontsize=7.5)
        _percent_axis(axis.yaxis)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
    return drawing()


@contextmanager
def _panel(size: tuple[float, float]) -> "Iterator[tuple[Axes, Callable[[], Drawing]]]":
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SVG_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        axis.spines[["top", "right"]].set_visible(False)
        content = BytesIO()
        yield axis, lambda: Drawing(content.getvalue(), (round(size[0] * 96), round(size[1] * 96)))
        figure.savefig(
            content, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}%"))


def curves(evidence: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Tables by file name, for `dvc plots`; what was not measured is a table without rows.

    reliability.csv: confidence, accuracy, n (bins that hold images); risk_coverage.csv: kept, wrong, threshold;
    robustness.csv: step (0 is untouched), and a column of accuracies for each perturbation;
    ood.csv: kind, auroc, flagged_share; slices.csv: slice, accuracy, low, high, n.
    """
    bins = [entry for entry in (evidence["calibration"] or {}).get("bins", []) if entry["n"]]
    curve = (evidence["triage"] or {}).get("curve", [])
    kinds = (evidence["ood"] or {}).get("kinds", {})
    return {
        "reliability.csv": pd.DataFrame(bins, columns=["confidence", "accuracy", "n"]),
        "risk_coverage.csv": pd.DataFrame(
            [(point["kept"], 1 - point["accuracy"], point["threshold"]) for point in curve],
            columns=["kept", "wrong", "threshold"],
        ),
        "robustness.csv": _robustness_curves(evidence["robustness"]),
        "ood.csv": pd.DataFrame(
            [(kind, kinds[kind]["auroc"], kinds[kind]["flagged_share"]) for kind in sorted(kinds)],
            columns=["kind", "auroc", "flagged_share"],
        ),
        "slices.csv": pd.DataFrame(
            [
                (entry["told"], entry["accuracy"], *entry["accuracy_interval"], entry["n"])
                for entry in evidence["slices"] or []
            ],
            columns=["slice", "accuracy", "low", "high", "n"],
        ),
    }


def _robustness_curves(robustness: Mapping[str, Any] | None) -> pd.DataFrame:
    if robustness is None:
        return pd.DataFrame({"step": []})
    kinds = robustness["kinds"]
    accuracy = {kind: pd.Series([robustness["clean_accuracy"], *kinds[kind]["accuracy"]]) for kind in sorted(kinds)}
    return pd.DataFrame(accuracy).rename_axis("step").reset_index()
