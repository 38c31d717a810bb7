"""What to doubt: whatever in an evaluation's figures should make a reviewer hesitate, as sentences with the figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from braintumor.evidence.leakage import is_inflated
from braintumor.evidence.triage import breaks_promise
from braintumor.labels import CLASS_NAMES, NO_TUMOUR

# From here on a figure is worth a sentence. The gate has its own bounds, which are stricter or not, as its params say.
WIDE_INTERVAL = 0.06
CLOSE_TO_FLOOR = 0.05
LOW_RECALL = 0.9
LOW_SENSITIVITY = 0.95
LARGE_ECE = 0.05
LOW_OOD_AUROC = 0.9
LOW_FLAGGED = 0.5
FALSE_ALARMS = 0.1
LARGE_LOSS = 0.1
MANY_LABEL_ERRORS = 0.01
FEW_IMAGES = 30
NAMED_SLICES = 3
NAMED_KINDS = 3

NOT_MEASURED = {
    "calibration": "calibration",
    "conformal": "prediction sets",
    "triage": "referral",
    "ood": "recognition of images unlike the training's",
    "robustness": "robustness",
    "explanation": "what the model looks at",
    "slices": "slices",
    "leakage": "leakage",
    "shortcut": "shortcuts",
    "mistakes": "mistakes and labels",
    "comparison": "the comparison with the champion",
}


@dataclass(frozen=True)
class Doubt:
    """A reason to hesitate, and the section of the report (its anchor) that shows the figures."""

    lead: str
    told: str
    section: str


def find_doubts(metrics: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[Doubt]:
    """All doubts that metrics.json and evidence.json give rise to, in the order of the report's sections."""
    rules = (
        _leaky, _patients, _interval, _leakage, _shortcut,
        _sensitivity, _classes, _slices, _label_errors,
        _confidence, _coverage, _triage, _ood, _explanation, _robustness, _comparison, _not_measured,
    )  # fmt: skip
    return [doubt for rule in rules for doubt in rule(metrics, evidence)]


def percent(share: float) -> str:
    """A share as a reader wants it; 99.96 % is not all of it, nor 0.04 % nothing."""
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}"


def span(interval: Sequence[float]) -> str:
    """The ends of an interval of shares."""
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def points(difference: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * difference:+.1f}"


def missed_tumours(metrics: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the tumours are called no tumour, and how many tumours there are."""
    column = CLASS_NAMES.index(NO_TUMOUR)
    rows = [row for name, row in zip(CLASS_NAMES, metrics["confusion_matrix"], strict=True) if name != NO_TUMOUR]
    return sum(row[column] for row in rows), sum(map(sum, rows))


def mean_of_bins(bins: Sequence[Mapping[str, Any]], figure: str) -> float:
    """The mean over all images of a bin's figure, confidence or accuracy."""
    filled = [entry for entry in bins if entry["n"]]
    return float(sum(entry["n"] * entry[figure] for entry in filled) / sum(entry["n"] for entry in filled))


def named(names: Sequence[str]) -> str:
    """The names in a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _leaky(metrics: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    share = metrics["leaked_share"]
    if not share:
        return
    told = (
        f"{percent(share)} of the test images have a copy among those that were trained on (protocol "
        f"{metrics['protocol']})"
    )
    lead = "Inflated by copies."
    if (found := evidence.get("leakage")) is not None:
        if (advantage := found["advantage"]["split"]) and not is_inflated(advantage):
            lead = "Tested on copies."
        parts = {part["part"]: part for part in found["split"]}
        if parts["with copies"]["n"] and parts["copy-free"]["n"]:
            told += (
                f": there the accuracy is {percent(parts['with copies']['accuracy'])}, elsewhere "
                f"{percent(parts['copy-free']['accuracy'])}"
            )
    yield Doubt(lead, f"{told}. Go by the copy-free figure.", "leakage")


def _patients(metrics: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[Doubt]:
    if "patients unknown" in metrics["claim"]:
        yield Doubt(
            "Patients unknown.",
            "Every figure here is too high if slices of one patient stand in training and test.",
            "leakage",
        )


def _interval(metrics: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[Doubt]:
    low, high = metrics["accuracy_interval"]
    if high - low > WIDE_INTERVAL:
        yield Doubt(
            "Few independent images.",
            f"{metrics['n_test']:,} test images are {metrics['n_groups']:,} groups of copies or patients; the "
            f"{metrics['confidence_level']:.0%} interval of the accuracy, {span([low, high])}, is "
            f"{100 * (high - low):.1f} points wide.",
            "intervals",
        )
    if scarce := [name for name in CLASS_NAMES if metrics["per_class"][name]["n"] < FEW_IMAGES]:
        counts = named([f"{metrics['per_class'][name]['n']} of {name}" for name in scarce])
        yield Doubt("A class with few images.", f"The test set holds {counts}.", "classes")


def _leakage(metrics: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("leakage")
    if found is None:
        return
    difference, interval = found["over_neighbour"]["difference"], found["over_neighbour"]["interval"]
    if interval[0] <= CLOSE_TO_FLOOR:
        yield Doubt(
            "Close to the floor." if interval[0] > 0 else "Not above the floor.",
            f"Looking up the most similar training image scores {percent(metrics['nearest_neighbour_accuracy'])}; the "
            f"model adds {points(difference)} points ({points(interval[0])} to {points(interval[1])}).",
            "leakage",
        )
    declared = {part["part"]: part for part in found["declared"]}
    free, everything = declared["copy-free"], declared["all"]
    if free["n"] and everything["accuracy"] - free["accuracy"] > CLOSE_TO_FLOOR / 2:
        yield Doubt(
            "Worse on new images.",
            f"On the {free['n']:,} test images without a copy in the declared training folder the accuracy is "
            f"{percent(free['accuracy'])} ({span(free['accuracy_interval'])}), on all "
            f"{percent(everything['accuracy'])}.",
            "leakage",
        )


def _shortcut(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("shortcut")
    if found is not None and found["warning"]:
        lead = "A shortcut." if found["share_of_gain"] is not None else "No better than guessing."
        yield Doubt(lead, sentence(found["warning"]), "shortcut")


def _sensitivity(metrics: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[Doubt]:
    interval = metrics["tumour_sensitivity_interval"]
    if interval[0] < LOW_SENSITIVITY:
        missed, n = missed_tumours(metrics)
        yield Doubt(
            "Missed tumours.",
            f"{missed:,} of {n:,} tumours are called {NO_TUMOUR}: a sensitivity of "
            f"{percent(metrics['tumour_sensitivity'])} ({span(interval)}).",
            "classes",
        )


def _classes(metrics: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[Doubt]:
    name = min(CLASS_NAMES, key=lambda label: metrics["per_class"][label]["recall"])
    entry = metrics["per_class"][name]
    if entry["recall"] >= LOW_RECALL:
        return
    row = metrics["confusion_matrix"][CLASS_NAMES.index(name)]
    count, taken_for = max((count, other) for count, other in zip(row, CLASS_NAMES, strict=True) if other != name)
    yield Doubt(
        f"Weakest on {name}.",
        f"{percent(entry['recall'])} of its {entry['n']:,} images are recognised; {count} are taken for {taken_for}.",
        "classes",
    )


def _slices(metrics: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    out = [entry for entry in evidence.get("slices") or [] if entry["stands_out"]]
    if not out:
        return
    out.sort(key=lambda entry: (entry["accuracy"], entry["told"]))
    shown = [
        f"{percent(entry['accuracy'])} of {slice_name(entry)} ({entry['n']:,} images; the rest "
        f"{percent(_rest(metrics, entry))})"
        for entry in out[:NAMED_SLICES]
    ]
    rest = f"; and {len(out) - NAMED_SLICES} more" if len(out) > NAMED_SLICES else ""
    lead = "A slice stands out." if len(out) == 1 else f"{len(out)} slices stand out."
    yield Doubt(lead, f"Right are {'; '.join(shown)}{rest}.", "slices")


def slice_name(entry: Mapping[str, Any]) -> str:
    """A slice as a reader names it."""
    label = f", {entry['label']} alone" if entry["label"] else ""
    return f"{told_name(entry['fact'])} {entry['value']}{label}"


def _rest(metrics: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """The accuracy of the images outside a slice, of its class if it has one."""
    if entry["label"]:
        n, accuracy = (metrics["per_class"][entry["label"]][figure] for figure in ("n", "recall"))
    else:
        n, accuracy = metrics["n_test"], metrics["accuracy"]
    return float((n * accuracy - entry["n"] * entry["accuracy"]) / (n - entry["n"]))


def _label_errors(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("mistakes")
    if found is not None and found["n_label_errors"] > MANY_LABEL_ERRORS * found["n_checked"]:
        share = found["n_label_errors"] / found["n_checked"]
        yield Doubt(
            "Labels that may be wrong.",
            f"{found['n_label_errors']:,} of {found['n_checked']:,} labels ({percent(share)}) contradict the "
            "predictions so clearly that a person should look at them.",
            "mistakes",
        )


def _confidence(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("calibration")
    if found is None:
        return
    ece, by_chance = found["after"]["ece"], found["after"]["ece_by_chance"][1]
    if ece <= max(LARGE_ECE, by_chance):
        return
    said, right = (mean_of_bins(found["bins"], figure) for figure in ("confidence", "accuracy"))
    yield Doubt(
        "Over-confident." if said > right else "Under-confident.",
        f"It is {percent(said)} sure on average and right in {percent(right)} of the images; a calibration error of "
        f"{percent(ece)}, where chance explains {percent(by_chance)}.",
        "calibration",
    )


def _coverage(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("conformal")
    if found is None:
        return
    if found["coverage"] is None:
        yield Doubt("No prediction sets.", sentence(found["remark"]), "conformal")
        return
    promised = found["confidence"]
    if found["coverage_interval"][1] < promised:
        yield Doubt(
            "Sets that promise too much.",
            f"{percent(found['coverage'])} ({span(found['coverage_interval'])}) of the prediction sets hold the true "
            f"class, {promised:.0%} were promised.",
            "conformal",
        )
    low = [
        name for name, entry in found["per_class"].items() if entry["n"] and entry["coverage_interval"][1] < promised
    ]
    if low:
        told = named([f"{percent(found['per_class'][name]['coverage'])} of {name}" for name in low])
        yield Doubt(
            "Classes that the sets miss.",
            f"The prediction sets hold the true class for {told}; {promised:.0%} were promised.",
            "conformal",
        )


def _triage(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("triage")
    if found is None:
        return
    if found["threshold"] is None:
        yield Doubt("Nothing to leave to the model.", sentence(found["remark"]), "triage")
        return
    test = found["test"]
    if breaks_promise(test, found["max_error"]):
        high, low = (1 - end for end in test["accuracy_interval"])
        yield Doubt(
            "The referral threshold keeps too many errors.",
            f"Of the test images that it keeps, {percent(1 - test['accuracy'])} ({span([low, high])}) are wrong; at "
            f"most {percent(found['max_error'])} were allowed.",
            "triage",
        )


def _ood(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("ood")
    if found is None:
        return
    weak = sorted(
        (kind for kind, entry in found["kinds"].items() if entry["auroc"] < LOW_OOD_AUROC),
        key=lambda kind: (found["kinds"][kind]["auroc"], kind),
    )
    unnoticed = [kind for kind in weak if found["kinds"][kind]["flagged_share"] < LOW_FLAGGED]
    blurred = [kind for kind in weak if kind not in unnoticed]
    if unnoticed:
        yield Doubt("Strange images pass.", f"The model hardly notices {_strange(found, unnoticed)}.", "ood")
    if blurred:
        yield Doubt(
            "Strange images score like test images.",
            f"The model tells {_strange(found, blurred)} less well from test images.",
            "ood",
        )
    if found["in_distribution"]["flagged_share"] > FALSE_ALARMS:
        yield Doubt(
            "False alarms.",
            f"{percent(found['in_distribution']['flagged_share'])} of the test images are called unlike the "
            "training's.",
            "ood",
        )


def _strange(found: Mapping[str, Any], kinds: Sequence[str]) -> str:
    told = [
        f"{told_name(kind)} (AUROC {found['kinds'][kind]['auroc']:.2f}, "
        f"{found['kinds'][kind]['flagged_share']:.0%} flagged)"
        for kind in kinds[:NAMED_KINDS]
    ]
    more = len(kinds) - NAMED_KINDS
    return named([*told, f"{more} more {'kind' if more == 1 else 'kinds'}"] if more > 0 else told)


def _explanation(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("explanation")
    if found is None:
        return
    random = found["randomisation"]
    if not random["passed"]:
        alike = max(stage["similarity"] for stage in (random["stages"][0], random["stages"][-1]))
        yield Doubt(
            "Heat maps that don't depend on the model.",
            f"With weights drawn at random they resemble the true ones by {alike:.2f}, where at most "
            f"{random['limit']:.2f} is allowed: don't read them.",
            "sanity",
        )
    place = found["localisation"]
    if place is None:
        return
    if place["pointing_game"] <= 2 * max(place["chance"], place["pointing_game_randomised"]):
        yield Doubt(
            "Looks elsewhere.",
            f"The maps peak within the lesion in {percent(place['pointing_game'])} of {place['n']} images; by chance "
            f"it would be {percent(place['chance'])}, without anything learnt "
            f"{percent(place['pointing_game_randomised'])}.",
            "localisation",
        )


def _robustness(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("robustness")
    if found is None:
        return
    clean = found["clean_accuracy"]
    lost = {kind: clean - min(entry["accuracy"]) for kind, entry in found["kinds"].items()}
    weak = sorted((kind for kind in lost if lost[kind] > LARGE_LOSS), key=lambda kind: (-lost[kind], kind))
    if not weak:
        return
    told = [f"{percent(min(found['kinds'][kind]['accuracy']))} under {told_name(kind)}" for kind in weak[:NAMED_KINDS]]
    more = len(weak) - NAMED_KINDS
    rest = f"; {_more(more)} over {LARGE_LOSS * 100:.0f} points" if more > 0 else ""
    yield Doubt(
        f"Not robust to {told_name(weak[0])}.",
        f"From {percent(clean)} on {found['n']} test images the accuracy falls to {named(told)} at worst{rest}.",
        "robust",
    )


def _more(kinds: int) -> str:
    return "one more kind costs" if kinds == 1 else f"{kinds} more kinds cost"


def _comparison(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    found = evidence.get("comparison")
    if found is None:
        return
    leads = {
        "worse": "Worse than the champion.",
        "not comparable": "Not comparable with the champion.",
        "no difference found": "No better than the champion.",
    }
    if found["verdict"] in leads:
        yield Doubt(leads[found["verdict"]], sentence(found["reason"]), "champion")


def _not_measured(_: Mapping[str, Any], evidence: Mapping[str, Any]) -> Iterator[Doubt]:
    missing = [told for name, told in NOT_MEASURED.items() if evidence.get(name) is None]
    if missing:
        yield Doubt("Not measured.", f"Nothing is known of {named(missing)}.", "made")


def told_name(name: str) -> str:
    """The name of a figure or kind, as words."""
    return name.replace("_", " ")


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    text = text.replace(" %", "%")
    ended = text if text.endswith((".", "!", "?")) else f"{text}."
    return ended[:1].upper() + ended[1:]
