"""The sections of the report, each in answer to one question of a reader: what was found, the plot, the numbers.

Mappings are put in an order of their own here: evidence.json is written with sorted keys.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from braintumor.data.html_page import (
    Html,
    bar,
    element,
    folded,
    heading,
    joined,
    link,
    picture,
    table,
)
from braintumor.evidence import plots
from braintumor.evidence.doubts import (
    NAMED_SLICES,
    mean_of_bins,
    missed_tumours,
    named,
    percent,
    points,
    sentence,
    slice_name,
    span,
    told_name,
)
from braintumor.evidence.gallery import Gallery
from braintumor.evidence.plots import PALE, WARNING_COLOUR, Dot, Drawing
from braintumor.labels import CLASS_NAMES

Facts = Mapping[str, Any]

INTERVAL_FIGURES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy (mean recall of the classes)",
    "macro_f1": "Macro F1",
    "tumour_sensitivity": "Tumour sensitivity (any tumour against none)",
    "tumour_specificity": "Tumour specificity",
}
AUROC_FIGURES = {"macro_auroc": "AUROC, mean of the classes", "tumour_auroc": "AUROC, any tumour against none"}
CALIBRATION_FIGURES = {
    "ece": "Calibration error (ECE, bins of equal width)",
    "ece_equal_mass": "the same, bins of equally many images",
    "classwise_ece": "the same, mean of the classes",
    "brier": "Brier score (summed over classes)",
    "nll": "Negative log-likelihood",
}
COPY_PARTS = {
    ("split", "all"): "all test images",
    ("split", "with copies"): "copy trained on",
    ("split", "copy-free"): "no copy trained on",
    ("declared", "with copies"): "declared copy",
    ("declared", "copy-free"): "no declared copy",
}
METHODS = {"grad-cam": "Grad-CAM", "hirescam": "HiResCAM", "layercam": "LayerCAM"}
SHOWN_MISTAKES = 6
CURVE_ROWS = 12


def believed(metrics: Facts, evidence: Facts) -> Iterator[Html]:
    """Can the figure be believed?"""
    yield from _intervals(metrics, evidence)
    yield heading(3, "Copies, and the floor", "leakage")
    yield from _given(evidence, "leakage", _leakage, metrics)
    yield heading(3, "Shortcuts", "shortcut")
    yield from _given(evidence, "shortcut", _shortcut)


def fails(metrics: Facts, evidence: Facts, galleries: Sequence[Gallery]) -> Iterator[Html]:
    """Where does it fail?"""
    yield from _classes(metrics)
    yield heading(3, "Slices", "slices")
    yield from _given(evidence, "slices", _slices, metrics)
    yield heading(3, "Mistakes, and labels that may be mistaken", "mistakes")
    yield from _given(evidence, "mistakes", _mistakes, galleries)


def knows(evidence: Facts) -> Iterator[Html]:
    """Does it know when it does not know?"""
    yield heading(3, "Calibration", "calibration")
    yield from _given(evidence, "calibration", _calibration)
    yield heading(3, "Prediction sets", "conformal")
    yield from _given(evidence, "conformal", _conformal)
    yield heading(3, "What to refer to a radiologist", "triage")
    yield from _given(evidence, "triage", _triage)
    yield heading(3, "Images unlike the training's", "ood")
    yield from _given(evidence, "ood", _ood)


def looks(evidence: Facts, galleries: Sequence[Gallery]) -> Iterator[Html]:
    """What does it look at?"""
    yield from _given(evidence, "explanation", _explanation)
    if galleries:
        yield heading(3, "Galleries", "galleries")
        yield element("div", joined(map(_gallery, galleries)), 'class="sheets"')


def robust(evidence: Facts) -> Iterator[Html]:
    """How robust is it?"""
    yield from _given(evidence, "robustness", _robustness)


def champion(evidence: Facts) -> Iterator[Html]:
    """Compared with the champion."""
    yield from _given(evidence, "comparison", _comparison)


def plot(drawing: Drawing, alt: str, caption: str = "", name: str = "plot") -> Html:
    """A figure; `alt` says what it shows."""
    image = picture(drawing.svg, alt, drawing.size)
    inner = joined([image, element("figcaption", caption)]) if caption else image
    return element("figure", inner, f'class="{name}"')


def dots_told(dots: Iterable[Dot]) -> str:
    """What a dot plot of shares shows, for whoever does not see it."""
    return "; ".join(
        f"{dot.name}{', ' + dot.series if dot.series else ''} {percent(dot.value)}"
        + (f" ({span(dot.interval)})" if dot.interval else "")
        for dot in dots
    )


def number(value: float | str | None) -> Html:
    """A cell that does not break: a share, a text, or nothing where nothing is known."""
    text = "" if value is None else value if isinstance(value, str) else percent(value)
    return element("span", text, 'class="figure"')


def count(amount: int, one: str, many: str) -> str:
    """So many of them, in words that fit."""
    return f"{amount:,} {one if amount == 1 else many}"


def _given(evidence: Facts, name: str, show: Any, *more: Any) -> Iterator[Html]:
    found = evidence.get(name)
    if found is None:
        yield element("p", f"Not measured in this evaluation. {WHY_NOT.get(name, '')}".strip(), 'class="warning"')
    else:
        yield from show(found, *more)


WHY_NOT = {
    "robustness": "The parameter evaluate.robustness_images is 0.",
    "explanation": "The parameter evaluate.gallery_images is 0.",
    "ood": "The model gives no score of how unlike the training's an image is.",
}


def _intervals(metrics: Facts, evidence: Facts) -> Iterator[Html]:
    yield heading(3, "Intervals", "intervals")
    yield _finding(
        f"Over resampled groups the accuracy lies between {' and '.join(map(percent, metrics['accuracy_interval']))} "
        f"in {metrics['confidence_level']:.0%} of cases."
    )
    yield _text(
        "Whole groups of copies or patients are drawn again (percentile bootstrap), so that a copy adds no certainty. "
        "The interval knows nothing of other hospitals, scanners or trainings."
    )
    rows = [
        (what, number(metrics[name]), number(span(metrics[f"{name}_interval"])))
        for name, what in INTERVAL_FIGURES.items()
    ]
    if (leakage := evidence.get("leakage")) is not None:
        found = leakage["per_group"]
        each = "Accuracy, each group counted once"
        rows.insert(1, (each, number(found["accuracy"]), number(span(found["accuracy_interval"]))))
    rows += [(what, number(f"{metrics[name]:.3f}"), Html("")) for name, what in AUROC_FIGURES.items()]
    yield table("Figures of the test images", ("figure", "value", "interval"), rows)


def _leakage(found: Facts, metrics: Facts) -> Iterator[Html]:
    finding = f"The model stands {_above(found['over_neighbour'])} the nearest neighbour"
    if declared := metrics.get("declared_leaked_share"):
        finding += f"; {percent(declared)} of the declared test images have a copy in the declared training folder"
    parts = [
        (f"{what} ({part['n']:,})", part)
        for (kind, name), what in COPY_PARTS.items()
        for part in found[kind]
        if part["part"] == name and part["n"] and (name == "all" or part["n"] < metrics["n_test"])
    ]
    dots = [dot for name, part in parts for dot in _beside_floors(name, part)]
    columns = ("images", "groups", "model", "interval", "nearest neighbour", "statistics")
    rows = [
        (
            name,
            part["n"],
            part["n_groups"],
            number(part["accuracy"]),
            number(span(part["accuracy_interval"])),
            number(part["neighbour_accuracy"]),
            number(part["statistics_accuracy"]),
        )
        for name, part in parts
    ]
    told = [
        _text(
            "A copy is the same slice again, often mirrored, resized or re-encoded. The nearest neighbour takes the "
            "label of the most similar training image, pixel by pixel: a model that is not clearly above it may be "
            "looking images up."
        ),
        *(_text(_told_advantage(kind, found["advantage"][kind])) for kind in ("split", "declared")),
        *map(_warning, found["warnings"]),
    ]
    drawn = plot(plots.draw_dots(dots, "accuracy"), f"Accuracy with and without copies: {dots_told(dots)}.")
    numbers = table("Accuracy with and without copies", ("test images", *columns), rows)
    yield _pair(f"{finding}.", [drawn], [part for part in told if part], numbers)


def _above(found: Facts) -> str:
    difference, (low, high) = found["difference"], found["interval"]
    side = "below" if difference < 0 else "above"
    return f"{abs(100 * difference):.1f} points ({points(low)} to {points(high)}) {side}"


def _beside_floors(name: str, part: Facts) -> Iterator[Dot]:
    yield Dot(name, part["accuracy"], part["accuracy_interval"], series="model")
    yield Dot(name, part["neighbour_accuracy"], colour=WARNING_COLOUR, mark="D", series="nearest neighbour")
    yield Dot(name, part["statistics_accuracy"], colour=PALE, mark="s", series="statistics")


def _told_advantage(kind: str, gain: Facts | None) -> str:
    if gain is None:
        return ""
    whose = "that this training used" if kind == "split" else "in the declared training folder, used or not,"
    told = f"Images with a copy {whose} score {_signed(gain)} points more than the others"
    same = gain["same_mix"]
    return f"{told}; at the same mix of classes {_signed(same)}." if same else f"{told}."


def _signed(found: Facts) -> str:
    return f"{points(found['difference'])} ({' to '.join(map(points, found['interval']))})"


def _shortcut(found: Facts) -> Iterator[Html]:
    finding = (
        f"{len(found['statistics'])} statistics of how an image was made reach {percent(found['accuracy'])}, without a "
        "look at it"
    )
    if (gain := found["share_of_gain"]) is not None:
        finding += f": {gain:.0%} of what the model gains over naming the largest class ({percent(found['chance'])})"
    yield _finding(f"{finding}.")
    yield _text(f"The model stands {_above(found['over_statistics'])} them.")
    failed = found["where_statistics_fail"]
    if failed["n"]:
        yield _text(
            f"On the {failed['n']:,} images that the statistics sort wrongly it scores {percent(failed['accuracy'])} "
            f"({span(failed['accuracy_interval'])}): close to its accuracy elsewhere if it goes by what is shown."
        )
    if found["warning"]:
        yield _warning(found["warning"])
    lost = sorted(found["importances"].items(), key=lambda item: (-item[1], item[0]))
    top = max([value for _, value in lost] + [0.001])
    rows = [(told_name(name), number(points(value)), bar(value / top)) for name, value in lost]
    numbers = table("Points of the statistics' accuracy that are lost without each", ("statistic", "points", ""), rows)
    yield folded("What the statistics go by", numbers)


def _classes(metrics: Facts) -> Iterator[Html]:
    yield heading(3, "Classes", "classes")
    missed, n_tumours = missed_tumours(metrics)
    per_class = metrics["per_class"]
    worst = min(CLASS_NAMES, key=lambda name: per_class[name]["recall"])
    yield _finding(
        f"{missed:,} of {n_tumours:,} tumours are missed; the class least often recognised is {worst}, in "
        f"{percent(per_class[worst]['recall'])} of its images."
    )
    columns = ("recall", "specificity", "precision", "f1")
    rows = [
        (
            number(name),
            per_class[name]["n"],
            *(number(per_class[name][column]) for column in columns),
            number(f"{per_class[name]['auroc']:.3f}"),
        )
        for name in CLASS_NAMES
    ]
    classes = table("Each class against the rest", ("class", "images", *columns, "AUROC"), rows)
    yield element("div", joined([_confusion(metrics), classes]), 'class="plots"')


def _confusion(metrics: Facts) -> Html:
    # A table is its own text alternative; shaded by the share of the true class.
    head = [Html("<td></td>"), *(element("th", name, 'scope="col"') for name in CLASS_NAMES)]
    rows = []
    for name, row in zip(CLASS_NAMES, metrics["confusion_matrix"], strict=True):
        shares = [amount / sum(row) for amount in row]
        cells = [
            element(
                "td",
                joined([f"{amount:,}", element("small", percent(share))]),
                f'style="--shade: {55 * share:.0f}%"',
            )
            for amount, share in zip(row, shares, strict=True)
        ]
        rows.append(element("tr", joined([element("th", name, 'scope="row"'), *cells])))
    inner = [
        element("caption", "True class (rows) and predicted class (columns)"),
        element("thead", element("tr", joined(head))),
        element("tbody", joined(rows)),
    ]
    return element("div", element("table", joined(inner), 'class="matrix"'), 'class="wide"')


def _slices(found: Sequence[Facts], metrics: Facts) -> Iterator[Html]:
    if not found:
        yield _text("The images differ in nothing that is known of them.")
        return
    standing_out = sorted((entry for entry in found if entry["stands_out"]), key=lambda entry: entry["accuracy"])
    out = [f"{slice_name(entry)} ({percent(entry['accuracy'])})" for entry in standing_out]
    shown = [*out[:NAMED_SLICES], *([f"{len(out) - NAMED_SLICES} more"] if len(out) > NAMED_SLICES else [])]
    yield _finding(
        f"{count(len(out), 'slice is', 'slices are')} clearly worse than the rest: {named(shown)}."
        if out
        else "No slice is clearly worse than the rest."
    )
    yield _text(
        "A slice stands out (orange) where the interval of its difference to the rest lies below 0, at a level shared "
        "among all that are compared; of slices of one class only these are listed. Dashed: the accuracy of all."
    )
    dots: dict[str, list[Dot]] = {}
    for entry in found:
        name = f"{entry['value']}{', ' + entry['label'] if entry['label'] else ''} ({entry['n']:,})"
        colour = WARNING_COLOUR if entry["stands_out"] else plots.VAL_COLOUR
        dots.setdefault(entry["fact"], []).append(Dot(name, entry["accuracy"], entry["accuracy_interval"], colour))
    limits = plots.span_of([dot for of_fact in dots.values() for dot in of_fact])
    drawn = [
        plot(
            plots.draw_dots(
                of_fact, "accuracy", title=told_name(fact), reference=(metrics["accuracy"], ""), limits=limits
            ),
            f"Accuracy by {told_name(fact)}: {dots_told(of_fact)}.",
        )
        for fact, of_fact in dots.items()
    ]
    yield element("div", joined(drawn), 'class="plots"')
    columns = ("macro_recall", "tumour_sensitivity", "tumour_specificity", "mean_confidence", "ece")
    rows = [
        (
            entry["told"],
            entry["n"],
            entry["n_groups"],
            number(entry["accuracy"]),
            number(span(entry["accuracy_interval"])),
            *(number(entry[column]) for column in columns),
            "stands out" if entry["stands_out"] else "",
        )
        for entry in found
    ]
    head = ("slice", "images", "groups", "accuracy", "interval", *map(told_name, columns[:-1]), "ECE", "remark")
    yield folded("The numbers as a table", table("Slices", head, rows))


def _mistakes(found: Facts, galleries: Sequence[Gallery]) -> Iterator[Html]:
    yield _finding(
        f"{count(found['n_wrong'], 'test image is', 'test images are')} sorted wrongly; "
        f"{count(found['n_label_errors'], 'label', 'labels')} of {found['n_checked']:,} that were checked may be wrong."
    )
    if any(gallery.picture for gallery in galleries):
        yield _text(joined(["Pictures:", link("#galleries", "galleries")]))
    rows = [
        (row["path"], number(row["label"]), number(row["predicted"]), number(row["confidence"]))
        for row in found["confident"]
    ]
    head = ("image", "label", "predicted", "confidence")
    if rows:
        yield table("The most confident mistakes", head, rows[:SHOWN_MISTAKES])
    if rest := rows[SHOWN_MISTAKES:]:
        yield folded(f"{len(rest)} more", table("Further confident mistakes", head, rest))
    if found["label_errors"]:
        yield folded(*_label_errors(found["label_errors"]))


def _label_errors(errors: Sequence[Facts]) -> tuple[str, Html]:
    rows = [
        (row["path"], number(row["label"]), number(row["suggested"]), number(f"{row['quality']:.3f}")) for row in errors
    ]
    told = _text(
        "Confident learning (Northcutt et al. 2021) on predictions of images that were not trained on. All of them "
        "stand in label_errors.csv, for annotators; 'braintumor data relabel' takes it back. Quality: 0 bad, 1 good."
    )
    numbers = table("Labels to look at, the worst first", ("image", "label", "suggested", "quality"), rows)
    return f"{count(len(rows), 'label', 'labels')} to look at", joined([told, numbers])


def _calibration(found: Facts) -> Iterator[Html]:
    said, right = (mean_of_bins(found["bins"], figure) for figure in ("confidence", "accuracy"))
    before, after = found["before"], found["after"]
    finding = (
        f"The model is {percent(said)} sure on average and right in {percent(right)}; calibration error "
        f"{percent(after['ece'])} ({span(after['ece_interval'])}), before the temperature {percent(before['ece'])}."
    )
    drawn = [
        plot(plots.draw_reliability(found[bins], title), f"Reliability diagram, {title}: {_bins_told(found[bins])}")
        for bins, title in (("bins_before", "before the temperature"), ("bins", "as the model answers"))
    ]
    told = [
        _text(
            "Each dot is a bin of confidence, its area the number of images. On the dashed line, of the answers given "
            "with 80% confidence 80% are right; dots below it are over-confident."
        ),
        _text(
            f"The temperature, {found['temperature']:.2f}, is fitted on the calibration images. So few groups would "
            f"give a perfect model an error of up to {percent(after['ece_by_chance'][1])}."
        ),
    ]
    rows = [
        (
            what,
            number(f"{before[name]:.4f}"),
            number(f"{after[name]:.4f}"),
            number(_ends(after.get(f"{name}_interval"))),
        )
        for name, what in CALIBRATION_FIGURES.items()
    ]
    bins = [
        (
            number(f"{entry['low']:.1%} to {entry['high']:.1%}"),
            entry["n"],
            number(entry["confidence"]),
            number(entry["accuracy"]),
            number(span(entry["accuracy_interval"]) if entry["accuracy_interval"] else None),
        )
        for entry in found["bins"]
        if entry["n"]
    ]
    numbers = [
        table("Smaller is better", ("figure", "before", "after", "interval"), rows),
        table("Bins, as the model answers", ("confidence", "images", "mean", "right", "interval"), bins),
    ]
    yield _pair(finding, drawn, told, joined(numbers))


def _ends(interval: Sequence[float] | None) -> str | None:
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else None


def _bins_told(bins: Sequence[Facts]) -> str:
    filled = [entry for entry in bins if entry["n"]]
    below = sum(entry["accuracy"] < entry["confidence"] for entry in filled)
    top = filled[-1]
    return (
        f"{below} of {len(filled)} bins lie below the diagonal; of the {top['n']:,} most confident answers, "
        f"{percent(top['confidence'])} sure on average, {percent(top['accuracy'])} are right."
    )


def _conformal(found: Facts) -> Iterator[Html]:
    if found["coverage"] is None:
        yield _warning(found["remark"])
        return
    promised = found["confidence"]
    finding = (
        f"Sets of {found['mean_size']:.2f} classes on average hold the true one for {percent(found['coverage'])} of "
        f"the images; {promised:.0%} were promised."
    )
    per_class = [(name, found["per_class"][name]) for name in CLASS_NAMES if found["per_class"][name]["n"]]
    dots = [Dot("all", found["coverage"], found["coverage_interval"], plots.INK)]
    for name, entry in per_class:
        title = f"{name} ({entry['n']:,})"
        dots.append(Dot(title, entry["coverage"], entry["coverage_interval"], plots.CLASS_COLOURS[name]))
    drawing = plots.draw_dots(dots, "share of sets with the true class", reference=(promised, "promised"))
    drawn = plot(drawing, f"Coverage of the prediction sets: {dots_told(dots)}; promised {promised:.0%}.")
    told = [_text(f"Instead of one class, as many as it takes: {found['method']}.")]
    if found["single_correct"] is not None:
        told.append(
            _text(
                f"{percent(found['single'])} of the sets hold one class alone; of these "
                f"{percent(found['single_correct'])} are right."
            )
        )
    if found["remark"]:
        told.append(_text(sentence(found["remark"])))
    n = sum(found["sizes"].values())
    sizes = [
        (number("1 class" if size == "1" else f"{size} classes"), amount, bar(amount / n))
        for size, amount in sorted(found["sizes"].items())
    ]
    classes = [
        (
            number(name),
            entry["n"],
            entry["n_calibration"],
            number(entry["coverage"]),
            number(span(entry["coverage_interval"])),
            number(f"{entry['mean_size']:.2f}"),
        )
        for name, entry in per_class
    ]
    head = ("class", "images", "groups to calibrate", "coverage", "interval", "mean size")
    numbers = [
        table("Size of the sets", ("size", "images", ""), sizes),
        table("Coverage by class", head, classes),
    ]
    yield _pair(finding, [drawn], told, joined(numbers))


def _triage(found: Facts) -> Iterator[Html]:
    test, curve = found["test"], found["curve"]
    is_keeping = test is not None and test["accuracy"] is not None
    finding = (
        f"Referring answers below {percent(found['threshold'])} confidence hands over {test['n_referred']:,} images "
        f"({percent(1 - test['kept'])}); of those kept {percent(1 - test['accuracy'])} are wrong."
        if is_keeping
        else "No threshold is recommended."
        if found["threshold"] is None
        else "At the recommended threshold every test image is referred."
    )
    recommended = (test["kept"], test["accuracy"]) if is_keeping else None
    alt = f"Share of wrong answers by share of images kept: {percent(1 - curve[-1]['accuracy'])} wrong if all are kept"
    if recommended:
        alt += f", {percent(1 - recommended[1])} if the recommended {percent(recommended[0])} are"
    drawn = plot(plots.draw_risk_coverage(curve, found["max_error"], recommended), f"{alt}.")
    how = "The least confident images are referred first."
    if found["threshold"] is not None:
        how += (
            " The threshold is chosen on calibration images, so that at most "
            f"{percent(found['max_error'])} of the answers kept are wrong."
        )
    told = [
        _text(how),
        _text(sentence(found["remark"])),
        _text(
            f"Area under the curve {found['aurc']:.4f} ({_ends(found['aurc_interval'])}); {found['aurc_perfect']:.4f} "
            f"if all mistakes came last, {found['aurc_random']:.4f} if confidence told nothing."
        ),
    ]
    step = max(1, len(curve) // CURVE_ROWS)
    rows = [
        (number(point["kept"]), number(1 - point["accuracy"]), number(point["threshold"]))
        for point in [*curve[:-1:step], curve[-1]]
    ]
    head = ("images kept", "wrong among them", "confidence at least")
    yield _pair(finding, [drawn], told, table("Kept and wrong", head, rows))


def _ood(found: Facts) -> Iterator[Html]:
    kinds = sorted(found["kinds"].items(), key=lambda item: (item[1]["auroc"], item[0]))
    lowest = found["kinds"][found["lowest"]]
    finding = (
        f"Hardest to notice: {told_name(found['lowest'])}, AUROC {lowest['auroc']:.2f}, {lowest['flagged_share']:.0%} "
        f"flagged. Of the test images themselves {percent(found['in_distribution']['flagged_share'])} are flagged."
    )
    dots = []
    for kind, entry in kinds:
        dots.append(Dot(told_name(kind), entry["auroc"], series="AUROC"))
        dots.append(Dot(told_name(kind), entry["flagged_share"], colour=WARNING_COLOUR, mark="x", series="flagged"))
    drawing = plots.draw_dots(dots, "AUROC, and share flagged", limits=(0, 1), is_share=False)
    alt = "; ".join(f"{dot.name} {dot.series} {dot.value:.2f}" for dot in dots)
    drawn = plot(drawing, f"Images unlike the training's: {alt}.")
    told = _text(
        f"The model gives each image a score; above {found['threshold']:g} it calls the image unlike those it was "
        "trained on. An AUROC of 1: every such image scores above every test image; 0.5: chance."
    )
    rows = [
        (
            number(told_name(kind)),
            entry["told"],
            entry["n"],
            number(f"{entry['auroc']:.3f}"),
            number(entry["flagged_share"]),
        )
        for kind, entry in kinds
    ]
    numbers = table("Images unlike the training's", ("kind", "what they are", "images", "AUROC", "flagged"), rows)
    yield _pair(finding, [drawn], [told], numbers)


def _explanation(found: Facts) -> Iterator[Html]:
    yield heading(3, "Do the heat maps depend on the model?", "sanity")
    random = found["randomisation"]
    stages, limit = random["stages"], random["limit"]
    first, last = stages[0], stages[-1]
    so = "so they tell of the model" if random["passed"] else "so do not read them"
    finding = (
        f"The maps resemble those of a network that has learnt nothing by {last['similarity']:.2f}, and those with new "
        f"weights in {told_name(first['randomised'])} alone by {first['similarity']:.2f}; at most {limit:.2f} is "
        f"allowed, {so}."
    )
    dots = [
        Dot(
            told_name(stage["randomised"]),
            stage["similarity"],
            colour=plots.VAL_COLOUR if stage["similarity"] <= limit else WARNING_COLOUR,
        )
        for stage in stages
    ]
    drawing = plots.draw_dots(dots, "similarity to the true maps", reference=(limit, "limit"), is_share=False)
    alt = "; ".join(f"{dot.name} {dot.value:.2f}" for dot in dots)
    told = _text(
        f"{METHODS.get(found['method'], found['method'])} at {found['layer']}, {found['map_px']} x {found['map_px']} "
        f"cells, {random['n']} images. Weights are drawn anew from the output downwards, and the maps should change "
        "with them (Adebayo et al. 2018). Similarity: rank correlation."
    )
    rows = [(told_name(stage["randomised"]), number(f"{stage['similarity']:.3f}")) for stage in stages]
    numbers = table("Similarity of the maps", ("randomised, and all above it", "similarity"), rows)
    yield _pair(finding, [plot(drawing, f"Similarity to the true maps by what is randomised: {alt}.")], [told], numbers)
    yield heading(3, "Do they point at the lesion?", "localisation")
    yield from _localisation(found["localisation"])


def _localisation(found: Facts | None) -> Iterator[Html]:
    if found is None:
        yield _text("Unknown: the outline of the lesion is known of no test image.")
        return
    yield _finding(
        f"The map's peak lies within the lesion in {percent(found['pointing_game'])} of {found['n']:,} images; a place "
        f"drawn at random would in {percent(found['chance'])}, a network that has learnt nothing in "
        f"{percent(found['pointing_game_randomised'])}."
    )
    yield _text(f"Overlap by chance: {percent(found['overlap_chance'])}.")
    entries = [
        *((name, found["per_class"][name]) for name in CLASS_NAMES if name in found["per_class"]),
        ("all", found),
    ]
    rows = [
        (number(name), entry["n"], number(entry["pointing_game"]), number(entry["overlap"])) for name, entry in entries
    ]
    yield table("Maps and lesions", ("class", "images", "peak within", "overlap"), rows)


def _gallery(gallery: Gallery) -> Html:
    # The lines bring their numbers along.
    lines = element("ul", joined(element("li", line) for line in gallery.lines), 'class="plain"')
    title = element("strong", f"{gallery.title}. ")
    caption = element("figcaption", joined([title, gallery.told, folded("image by image", lines)]))
    if gallery.picture is None:
        return element("figure", joined([_text("Not shown: privacy keeps these images back."), caption]))
    alt = f"{gallery.title}: {count(len(gallery.lines), 'image', 'images')}, named below. {gallery.told}"
    return element("figure", joined([picture(gallery.picture, alt, gallery.size), caption]))


def _robustness(found: Facts) -> Iterator[Html]:
    clean = found["clean_accuracy"]
    kinds = sorted(found["kinds"].items(), key=lambda item: (min(item[1]["accuracy"]), item[0]))
    worst, entry = kinds[0]
    yield _finding(
        f"Perturbed images keep {percent(found['retained'])} of the accuracy on average; {told_name(worst)} costs "
        f"most: from {percent(clean)} down to {percent(min(entry['accuracy']))}."
    )
    yield _text(f"The same {found['n']:,} test images, perturbed ever more, the worst first. Dashed: untouched.")
    drawn = [
        plot(
            plots.draw_severities(told_name(kind), one["unit"], one["severities"], one["accuracy"], clean),
            f"Accuracy under {told_name(kind)} by {one['unit']}: untouched {percent(clean)}, {', '.join(_steps(one))}.",
        )
        for kind, one in kinds
    ]
    yield element("div", joined(drawn), 'class="small"')
    kept = [(told_name(kind), number(one["retained"]), bar(one["retained"])) for kind, one in kinds]
    rows = [
        (told_name(kind), one["unit"], number(f"{severity:g}"), number(accuracy))
        for kind, one in kinds
        for severity, accuracy in zip(one["severities"], one["accuracy"], strict=True)
    ]
    numbers = [
        table("Mean accuracy over the severities, of the untouched", ("perturbation", "retained", ""), kept),
        table("Accuracy by severity", ("perturbation", "unit", "severity", "accuracy"), rows),
    ]
    yield folded("The numbers as tables", joined(numbers))


def _steps(one: Facts) -> list[str]:
    pairs = zip(one["severities"], one["accuracy"], strict=True)
    return [f"at {severity:g} {percent(accuracy)}" for severity, accuracy in pairs]


def _comparison(found: Facts) -> Iterator[Html]:
    finding = f"{found['verdict'].capitalize()}: {found['reason']}."
    if not found["figures"]:
        yield _finding(finding)
        return
    entries = [(told_name(name).replace("f1", "F1"), found["figures"][name]) for name in INTERVAL_FIGURES]
    dots = [Dot(name, 100 * entry["difference"], [100 * end for end in entry["interval"]]) for name, entry in entries]
    drawing = plots.draw_dots(dots, "this model less the champion, points", reference=(0, "equal"), is_share=False)
    alt = "; ".join(f"{dot.name} {dot.value:+.1f}" for dot in dots)
    without = f", without {found['n_excluded']:,} that it or this model was trained on" if found["n_excluded"] else ""
    told = _text(
        f"Version {found['champion']} on the same {found['n']:,} images in {found['n_groups']:,} groups{without}. Only "
        f"this model is right on {found['only_challenger_right']:,}, only the champion on "
        f"{found['only_champion_right']:,}."
    )
    rows = [
        (
            name,
            number(entry["challenger"]),
            number(entry["champion"]),
            number(points(entry["difference"])),
            number(" to ".join(map(points, entry["interval"]))),
        )
        for name, entry in entries
    ]
    numbers = table("This model and the champion", ("figure", "this model", "champion", "points", "interval"), rows)
    yield _pair(finding, [plot(drawing, f"Differences to the champion in points: {alt}.")], [told], numbers)


def _pair(finding: str, drawn: Sequence[Html], told: Sequence[Html], numbers: Html) -> Html:
    """Plots beside what they say; their numbers fold out."""
    text = element("div", joined([_finding(finding), *told, folded("The numbers as a table", numbers)]))
    return element("div", joined([element("div", joined(drawn), 'class="plots"'), text]), 'class="pair"')


def _finding(text: str) -> Html:
    return element("p", text, 'class="finding"')


def _text(content: str) -> Html:
    return element("p", content) if content else Html("")


def _warning(text: str) -> Html:
    return element("p", joined([element("strong", "Warning:", 'class="warning"'), sentence(text)]))
