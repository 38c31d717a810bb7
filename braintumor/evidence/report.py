"""The report of an evaluation: one page that loads nothing, in the order in which a reviewer asks.

Whatever it says comes from metrics.json, evidence.json and training.json; names and pictures come as privacy lets them
through.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from braintumor.artifacts import write_text
from braintumor.data.html_page import (
    Html,
    contents,
    element,
    figures,
    folded,
    heading,
    joined,
    link,
    listed,
    page,
    table,
)
from braintumor.errors import UserError
from braintumor.evidence import plots, report_sections
from braintumor.evidence.doubts import Doubt, find_doubts, missed_tumours, percent, span, told_name
from braintumor.evidence.gallery import Gallery
from braintumor.evidence.plots import PALE, WARNING_COLOUR, Dot
from braintumor.evidence.report_sections import Facts, dots_told, number, plot

MAX_BYTES = 5_000_000
# Of the pictures' width and height, where they are too large; the first at which the page is small enough.
PICTURE_SCALES = (0.75, 0.5, 0.35)
JPEG_QUALITY = 80
DIGEST_DIGITS = 12
SECTIONS = {
    "believed": "Can the figure be believed?",
    "fails": "Where does it fail?",
    "knows": "Does it know when it does not know?",
    "looks": "What does it look at?",
    "robust": "How robust is it?",
    "champion": "Compared with the champion",
    "made": "What it was made from",
}
UNKNOWN = "unknown"


def write_report(metrics: Facts, evidence: Facts, galleries: Sequence[Gallery], training: Facts, file: Path) -> None:
    """The report stands in `file`: the content of metrics.json, evidence.json and training.json, and the galleries.

    Pictures are made smaller where the page would exceed 5 MB; raises UserError where that is not enough.
    """
    text = _page(metrics, evidence, galleries, training)
    if (excess := len(text.encode()) - MAX_BYTES) > 0:
        limit = _picture_bytes(galleries) - excess
        scaled = ([_scaled(gallery, scale) for gallery in galleries] for scale in PICTURE_SCALES)
        fitting = next((smaller for smaller in scaled if _picture_bytes(smaller) <= limit), None)
        if fitting is None:
            raise UserError(f"{file} would exceed {MAX_BYTES / 1e6:g} MB; lower evaluate.gallery_images in params.yaml")
        text = _page(metrics, evidence, fitting, training)
    write_text(file, text)


def _picture_bytes(galleries: Sequence[Gallery]) -> int:
    """What the pictures take within the page, in base64."""
    return sum(4 * -(-len(gallery.picture) // 3) for gallery in galleries if gallery.picture)


def _scaled(gallery: Gallery, scale: float) -> Gallery:
    if gallery.picture is None:
        return gallery
    from PIL import Image

    with Image.open(io.BytesIO(gallery.picture)) as image:
        width, height = (max(1, round(scale * side)) for side in image.size)
        smaller = image.convert("RGB").resize((width, height))
    content = io.BytesIO()
    smaller.save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return Gallery(gallery.title, gallery.told, gallery.lines, content.getvalue(), smaller.size)


def _page(metrics: Facts, evidence: Facts, galleries: Sequence[Gallery], training: Facts) -> str:
    bodies = {
        "believed": report_sections.believed(metrics, evidence),
        "fails": report_sections.fails(metrics, evidence, galleries),
        "knows": report_sections.knows(evidence),
        "looks": report_sections.looks(evidence, galleries),
        "robust": report_sections.robust(evidence),
        "champion": report_sections.champion(evidence),
        "made": _made(metrics, evidence, training),
    }
    sections = [
        element("section", joined([heading(2, title, anchor), *bodies[anchor]]), f'aria-labelledby="{anchor}"')
        for anchor, title in SECTIONS.items()
    ]
    main = element("main", joined([_overview(metrics, evidence), *sections]))
    return page(f"Evaluation of model {metrics['model_digest'][:DIGEST_DIGITS]}", [_header(metrics), main])


def _header(metrics: Facts) -> Html:
    judged = (
        f"{metrics['n_test']:,} test images in {metrics['n_groups']:,} groups of copies or patients. Protocol "
        f"{metrics['protocol']}: {metrics['claim']}. Data {metrics['data_md5'][:DIGEST_DIGITS]}, model "
        f"{metrics['model_digest'][:DIGEST_DIGITS]}."
    )
    purpose = element("strong", "A research tool, not a diagnostic device.")
    parts = [
        element("div", joined([element("h1", "Evaluation"), purpose]), 'class="title"'),
        element("p", judged, 'class="lede"'),
        contents(SECTIONS.items()),
    ]
    return element("header", joined(parts))


def _overview(metrics: Facts, evidence: Facts) -> Html:
    """The first screen: what was reached, beside what needs no model, and what to doubt of it."""
    doubts = find_doubts(metrics, evidence)
    told = (
        listed(map(_doubt, doubts))
        if doubts
        else element("p", "None of this list's rules found anything. They are rules: read on.")
    )
    columns = [
        [figures(_cards(metrics, evidence)), _floors(metrics, evidence)],
        [heading(2, "What to doubt", "doubts"), told],
    ]
    return element("div", joined(element("div", joined(column)) for column in columns), 'class="side"')


def _doubt(doubt: Doubt) -> Html:
    return joined([element("strong", link(f"#{doubt.section}", doubt.lead)), doubt.told])


def _cards(metrics: Facts, evidence: Facts) -> Iterator[tuple[str, object, str]]:
    missed, n_tumours = missed_tumours(metrics)
    level = f"{metrics['confidence_level']:.0%} interval"
    yield "Accuracy", percent(metrics["accuracy"]), f"{span(metrics['accuracy_interval'])}, {level}"
    yield "Nearest neighbour", percent(metrics["nearest_neighbour_accuracy"]), "floor: looking images up"
    yield "Image statistics", percent(metrics["statistics_accuracy"]), "floor: without a look at the picture"
    sensitivity = span(metrics["tumour_sensitivity_interval"])
    yield (
        "Tumour sensitivity",
        percent(metrics["tumour_sensitivity"]),
        f"{sensitivity}; {missed:,} of {n_tumours:,} missed",
    )
    free = metrics.get("copy_free_accuracy")
    if free is None:
        yield "Copy-free accuracy", UNKNOWN, "no test image is free of copies"
    else:
        yield (
            "Copy-free accuracy",
            percent(free),
            f"{span(metrics['copy_free_accuracy_interval'])}; {metrics['n_copy_free']:,} images",
        )
    calibration, ood, triage = (evidence.get(name) for name in ("calibration", "ood", "triage"))
    if calibration is None:
        yield "Calibration error", UNKNOWN, "not measured"
    else:
        after = calibration["after"]
        chance = percent(after["ece_by_chance"][1])
        yield "Calibration error", percent(after["ece"]), f"{span(after['ece_interval'])}; chance: up to {chance}"
    if ood is None:
        yield "Strange images", UNKNOWN, "the model has no score for them"
    else:
        lowest = ood["kinds"][ood["lowest"]]["auroc"]
        yield "Strange images", f"{ood['auroc']:.2f}", f"mean AUROC; {told_name(ood['lowest'])} {lowest:.2f}"
    if triage is None or triage["test"] is None:
        yield "To refer", UNKNOWN, "no threshold is recommended"
    else:
        allowed = f"{triage['test']['n_referred']:,} images, for at most {triage['max_error']:.0%} errors"
        yield "To refer", percent(1 - triage["test"]["kept"]), allowed


def _floors(metrics: Facts, evidence: Facts) -> Html:
    dots = [Dot("model", metrics["accuracy"], metrics["accuracy_interval"])]
    if metrics["leaked_share"] and metrics.get("copy_free_accuracy") is not None:
        dots.append(Dot("model, copy-free", metrics["copy_free_accuracy"], metrics["copy_free_accuracy_interval"]))
    declared = (evidence.get("leakage") or {}).get("declared", [])
    fresh = [part for part in declared if part["part"] == "copy-free" and 0 < part["n"] < metrics["n_test"]]
    dots += [Dot("model, new images", part["accuracy"], part["accuracy_interval"]) for part in fresh]
    largest = max(entry["n"] for entry in metrics["per_class"].values()) / metrics["n_test"]
    dots += [
        Dot("nearest neighbour", metrics["nearest_neighbour_accuracy"], colour=WARNING_COLOUR, mark="D"),
        Dot("image statistics", metrics["statistics_accuracy"], colour=WARNING_COLOUR, mark="D"),
        Dot("largest class", largest, colour=PALE, mark="D"),
    ]
    caption = "The model beside what needs no model."
    if fresh:
        caption += " New images: without a copy in the declared training folder."
    drawing = plots.draw_dots(dots, "accuracy, and its interval", limits=(0, 1))
    return plot(drawing, f"Accuracy: {dots_told(dots)}.", caption, "plot beside")


def _made(metrics: Facts, evidence: Facts, training: Facts) -> Iterator[Html]:
    images = training.get("images") or {}
    parts = [f"{name} {images[name]:,}" for name in ("train", "val", "calibration") if name in images]
    val_accuracy, temperature = training.get("best_val_accuracy"), training.get("temperature")
    yield table(
        "Where the model and these figures come from",
        ("what", "which"),
        [
            ("Data version (md5)", metrics["data_md5"]),
            ("Test set (md5)", metrics.get("test_md5") or UNKNOWN),
            ("Split (sha256)", metrics["splits_sha256"]),
            ("Protocol, and what it may claim", f"{metrics['protocol']}: {metrics['claim']}"),
            ("Images used in training", ", ".join(parts) or UNKNOWN),
            ("Model (digest of architecture and weights)", metrics["model_digest"]),
            ("Starting weights (sha256)", training.get("weights_sha256") or "none: from scratch"),
            ("Code (commit)", training.get("git_commit") or UNKNOWN),
            ("Epochs run; kept", f"{training.get('epochs_run', UNKNOWN)}; {training.get('best_epoch', UNKNOWN)}"),
            ("Accuracy on validation images", UNKNOWN if val_accuracy is None else percent(val_accuracy)),
            ("Temperature", UNKNOWN if temperature is None else f"{temperature:.3f}"),
            ("Predictions (sha256)", metrics["predictions_sha256"]),
        ],
    )
    if params := list(_flat(training.get("params") or {})):
        yield folded("Parameters of the training", table("Parameters of the training", ("parameter", "value"), params))
    yield element(
        "p",
        f"For programs the same figures stand in metrics.json and evidence.json (schema version "
        f"{evidence['schema_version']}). docs/evidence.md tells how each is computed, and what of TRIPOD+AI and CLAIM "
        "it answers.",
    )


def _flat(params: Facts, before: str = "") -> Iterator[tuple[str, Html]]:
    for name in sorted(params):
        value = params[name]
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", number("null" if value is None else str(value))
