"""What a reviewer reads on a version's page in MLflow, where neither artifacts nor the run's metrics are shown.

The sections are those of a model card (Mitchell et al. 2019, doi:10.1145/3287560.3287596); before them stands what
decides: verdict, accuracy beside what needs no model, the champion, what to doubt, what to do now. All of it comes
from the files of the evaluation, and claims what the split's protocol allows, no more.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from braintumor import artifacts
from braintumor.data.splits import CLAIM_COPIES, CLAIM_LEAKS, CLAIM_PATIENTS
from braintumor.evidence.doubts import (
    NAMED_SLICES,
    Doubt,
    find_doubts,
    missed_tumours,
    named,
    percent,
    points,
    sentence,
    slice_name,
    span,
    told_name,
)
from braintumor.evidence.verdicts import BETTER, NO_CHAMPION, NO_DIFFERENCE, NOT_COMPARABLE, SAME_MODEL, WORSE
from braintumor.labels import CLASS_NAMES, NO_TUMOUR

# The column of a version's description in MLflow's store; PostgreSQL refuses a longer text.
MAX_CARD = 5000
# How much is told of each doubt, where there is room.
LENGTHS = (300, 240, 200, 170, 140, 110, 90)
# MLflow's pages leave no space between the columns of a table.
GAP = "&ensp;"
DIGEST_DIGITS = 12

CLASS_FIGURES = ("recall", "specificity", "precision", "f1", "auroc")
INTERVAL_FIGURES = {
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "macro F1",
    "tumour_sensitivity": "any tumour against none: sensitivity",
    "tumour_specificity": "specificity",
}
UNMEASURED = "not measured"

DISCLAIMER = "A research tool, not a diagnostic device."
PURPOSE = "Sorting single brain MRI slices into four classes, in research and beside reviewers who see the images."
OUT_OF_SCOPE = (
    "Not for diagnosis, nor to choose, delay or omit an examination or a treatment. It always names one of its "
    "classes: other organs, modalities, diseases and whole volumes are out of scope."
)
CLAIMS = {
    CLAIM_PATIENTS: (
        "copy-free, and no patient stands on both sides of the split, as far as the data set's patient numbers go."
    ),
    CLAIM_COPIES: (
        "no image has a copy on the other side of the split, but slices of one patient may: new patients may be "
        "recognised less well."
    ),
    CLAIM_LEAKS: "copies of training images are among the test images, and every figure is too high.",
}
PEOPLE = "Age, sex and scanner are not recorded: whom it serves worse is unknown."
PRIVACY = "Images may be patients'; the data set's privacy settings say what of them is shown."
CAVEATS = (
    "The figures hold for images from where the test images come from: measure it on your own first, refer what it is "
    "unsure of, and judge it again when the data change."
)


@dataclass(frozen=True)
class CardFacts:
    """The content of the files that a card is made of, and how many other models were judged on this test set."""

    metrics: Mapping[str, Any]
    evidence: Mapping[str, Any]
    decision: Mapping[str, Any]
    training: Mapping[str, Any]
    earlier_decisions: int

    @property
    def comparison(self) -> Mapping[str, Any]:
        """The section on the champion; not comparable where there is none."""
        found = self.evidence.get("comparison")
        if isinstance(found, Mapping):
            return found
        return {"verdict": NOT_COMPARABLE, "reason": "nothing was compared", "champion": None, "figures": {}}

    @property
    def warnings(self) -> list[str]:
        """The reasons of the checks that did not pass and are not required."""
        return [check["reason"] for check in self.decision["checks"] if not check["passed"] and not check["required"]]

    @property
    def failures(self) -> list[str]:
        """The reasons of the checks that closed the gate."""
        return [check["reason"] for check in self.decision["checks"] if not check["passed"] and check["required"]]

    @property
    def doubts(self) -> list[Doubt]:
        """What to doubt, without the comparison, which is told for itself."""
        return [doubt for doubt in find_doubts(self.metrics, self.evidence) if doubt.section != "champion"]


def write_card(facts: CardFacts, run_page: str) -> str:
    """The model card, Markdown of at most MAX_CARD characters; `run_page` is the run's address within MLflow's pages.

    Where room is scarce the picture goes first, then the doubts are told in short, and at the least named.
    """
    n = len(facts.doubts)
    ways = [
        (n, LENGTHS[0], True),
        *((n, length, False) for length in LENGTHS),
        *((n_told, LENGTHS[-1], False) for n_told in range(n - 1, -1, -1)),
    ]
    cards = [_card(facts, run_page, *way) for way in ways]
    ending = "\n\nCut here: the rest stands in the report."
    return next((card for card in cards if len(card) <= MAX_CARD), cards[-1][: MAX_CARD - len(ending)] + ending)


def version_tags(facts: CardFacts) -> dict[str, str]:
    """The tags of a version that passed the gate: figures with four digits to filter by, and where it comes from."""
    metrics, comparison = facts.metrics, facts.comparison
    figures = (
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "tumour_sensitivity",
        "nearest_neighbour_accuracy",
        "statistics_accuracy",
        "ece",
        "ood_auroc",
    )
    low, high = metrics["accuracy_interval"]
    digests = ("data_md5", "model_digest", "splits_sha256", "test_md5", "evidence_sha256")
    # In the order in which the list of versions shows them.
    return {
        "gate": "passed",
        "gate.warnings": str(len(facts.warnings)),
        "doubts": str(len(facts.doubts)),
        "comparison.verdict": SAME_MODEL if comparison["reason"] == SAME_MODEL else str(comparison["verdict"]),
        "comparison.champion": str(comparison["champion"] or "none"),
        "claim": str(metrics["claim"]),
        "protocol": str(metrics["protocol"]),
        "accuracy_interval": f"{low:.4f} to {high:.4f}",
        "accuracy_low": f"{low:.4f}",
        **{name: f"{metrics[name]:.4f}" for name in figures if metrics.get(name) is not None},
        "other_models_judged_on_this_test": str(facts.earlier_decisions),
        "git_commit": str(facts.training.get("git_commit") or "unknown"),
        **{name: str(metrics[name]) for name in digests},
        "metrics_sha256": str(facts.decision["digests"]["metrics_sha256"]),
    }


def told_comparison(comparison: Mapping[str, Any]) -> str:
    """What became of the comparison with the champion, as a sentence."""
    champion = f"the champion (version {comparison['champion']})" if comparison["champion"] else "the champion"
    leads = {
        BETTER: f"Better than {champion}",
        WORSE: f"Worse than {champion}",
        NO_DIFFERENCE: f"No difference found to {champion}",
        NOT_COMPARABLE: f"Not comparable with {champion}",
    }
    if comparison["verdict"] == NO_CHAMPION:
        return "There is no champion to compare it with yet."
    if comparison["reason"] == SAME_MODEL:
        return f"It is {champion} itself."
    return f"{leads.get(comparison['verdict'], f'Not judged against {champion}')}: {sentence_end(comparison['reason'])}"


def sentence_end(text: str) -> str:
    """The text with a full stop, its first letter as it is."""
    whole = sentence(text)
    return text[:1] + whole[1:]


def told_claim(metrics: Mapping[str, Any]) -> str:
    """The claim of the split's protocol and what it leaves open; of an unknown claim nothing is said."""
    claim = str(metrics["claim"])
    told = CLAIMS.get(claim, "what that allows to conclude is unknown here: conclude nothing.")
    return f"Protocol {metrics['protocol']}, claim '{claim}': {told}"


def told_uses(earlier_decisions: int) -> str:
    """How often the test set was used before, as a sentence."""
    if not earlier_decisions:
        return "No other model that this registry knows was judged on these images."
    models = "1 other model was" if earlier_decisions == 1 else f"{earlier_decisions} other models were"
    return f"{models} judged on these images: each makes such figures a little more optimistic."


def _card(facts: CardFacts, run_page: str, n_told: int, length: int, has_picture: bool) -> str:
    sections = {
        "What to doubt": _doubts(facts.doubts, n_told, length),
        "What to do now": f"{_next(facts)}\n\n{_links(run_page)}",
        **_sections(facts, _picture(run_page) if has_picture else ""),
    }
    first = [_verdict(facts), _floors(facts)]
    return "\n\n".join([*first, *(f"### {title}\n\n{content}" for title, content in sections.items())])


def _verdict(facts: CardFacts) -> str:
    if facts.decision.get("passed") is not True:
        lead = f"Gate closed: {_plain(_short('; '.join(facts.failures), LENGTHS[0]))}."
    elif facts.warnings:
        counted = "1 warning" if len(facts.warnings) == 1 else f"{len(facts.warnings)} warnings"
        others = [reason for reason in facts.warnings if not reason.startswith((WORSE, NOT_COMPARABLE))]
        told = f": {_plain(_short('; '.join(others), LENGTHS[0]))}" if others else ""
        lead = f"Gate passed, {counted}{told}."
    else:
        lead = "Gate passed, no warnings."
    verdict, _, reason = told_comparison(facts.comparison).partition(": ")
    # Of these the table has all that there is to say.
    if facts.comparison["verdict"] in (BETTER, WORSE) and facts.comparison.get("figures"):
        reason = ""
    champion = f"**{_plain(verdict)}**" + (f": {_plain(_short(reason, LENGTHS[0]))}" if reason else "")
    claim, protocol = (_plain(facts.metrics[name]) for name in ("claim", "protocol"))
    used = f"other models judged on these images: {facts.earlier_decisions}"
    told = f"Claim of the figures: **{claim}** (protocol {protocol}; {used}). **{DISCLAIMER}**"
    # The list of versions shows the first words, and Markdown as it is written.
    return f"{lead}\n\n" + "\n".join([f"- {champion}", f"- {told}"])


def _floors(facts: CardFacts) -> str:
    metrics, comparison = facts.metrics, facts.comparison
    level = f"{metrics['confidence_level']:.0%} interval"
    judged = f"{metrics['n_test']:,} test images, {metrics['n_groups']:,} groups of copies or patients"
    rows = [
        (f"**This model** ({judged})", f"**{percent(metrics['accuracy'])}**", span(metrics["accuracy_interval"])),
        *_fresh(facts),
        (
            "Nearest neighbour (floor): the most similar training image",
            percent(metrics["nearest_neighbour_accuracy"]),
            "",
        ),
        ("Image statistics (floor): how it was made, not what it shows", percent(metrics["statistics_accuracy"]), ""),
    ]
    if found := (comparison.get("figures") or {}).get("accuracy"):
        told = f"this model {points(found['difference'])} points, {' to '.join(map(points, found['interval']))}"
        name = f"Champion, version {_plain(comparison['champion'])} ({comparison['n']:,} images new to both)"
        rows.append((name, percent(found["champion"]), told))
    lines = [f"| {name}{GAP} | {value}{GAP} | {told} |" for name, value, told in rows]
    return "\n".join([f"| Accuracy | | {level} |", "|---|---|---|", *lines])


def _fresh(facts: CardFacts) -> Iterator[tuple[str, str, str]]:
    """The accuracy without copies, wherever there are copies."""
    metrics = facts.metrics
    if metrics["leaked_share"] and metrics.get("copy_free_accuracy") is not None:
        shown = percent(metrics["copy_free_accuracy"]), span(metrics["copy_free_accuracy_interval"])
        yield f"on the {metrics['n_copy_free']:,} without a copy trained on", *shown
    for part in (facts.evidence.get("leakage") or {}).get("declared", []):
        if part["part"] == "copy-free" and 0 < part["n"] < metrics["n_test"]:
            shown = percent(part["accuracy"]), span(part["accuracy_interval"])
            yield f"on the {part['n']:,} without a copy in the declared training folder", *shown


def _doubts(doubts: Sequence[Doubt], n_told: int, length: int) -> str:
    if not doubts:
        return "The rules found nothing. They are rules: read the report."
    lines = [f"- **{_plain(doubt.lead)}** {_plain(_short(doubt.told, length))}" for doubt in doubts[:n_told]]
    if rest := doubts[n_told:]:
        lines.append(f"- In the report: {_plain(' '.join(doubt.lead for doubt in rest))}")
    return "\n".join(lines)


def _next(facts: CardFacts) -> str:
    if facts.decision.get("passed") is not True:
        return "Nothing: it may not be promoted."
    verdict, reason = facts.comparison["verdict"], facts.comparison["reason"]
    if reason == SAME_MODEL:
        return "Nothing: it is the champion."
    if verdict in (BETTER, NO_DIFFERENCE, NO_CHAMPION):
        gain = " It is no better than the champion: leaving that in place is a choice, too." * (
            verdict == NO_DIFFERENCE
        )
        return (
            "If the doubts can be lived with: add the tag `promotion.reason`, then set the alias `champion` above (or "
            f"run `braintumor promote`). Otherwise leave it.{gain}"
        )
    return (
        "Keep the champion. Only with a reason why a model that is not shown to be as good may replace it: add the "
        "tags `promotion.reason` and `promotion.override`, then set the alias `champion` above (or run `braintumor "
        "promote --override`)."
    )


def _links(run_page: str) -> str:
    pages = {
        "Report": f"evaluation/{artifacts.REPORT}",
        "Evidence": f"evaluation/{artifacts.EVIDENCE}",
        "Data Docs": f"data/{artifacts.DATA_DOCS}/index.html",
    }
    return " · ".join(f"[{title}]({run_page}/artifacts/{page})" for title, page in pages.items())


def _sections(facts: CardFacts, picture: str) -> dict[str, str]:
    metrics, training = facts.metrics, facts.training
    return {
        "Model details": _details(metrics, training),
        "Intended use": f"{PURPOSE} {OUT_OF_SCOPE}",
        "Factors": _plain(_short(told_factors(metrics, facts.evidence), LENGTHS[0])),
        "Metrics": _checks(facts),
        "Evaluation data": _plain(told_test_data(facts)),
        "Training data": _plain(told_training_data(training)),
        "Quantitative analyses": _analyses(facts) + picture,
        "Ethical considerations": _plain(f"{told_misses(metrics)} {PEOPLE} {PRIVACY}"),
        "Caveats and recommendations": CAVEATS,
    }


def _details(metrics: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    commit = str(training.get("git_commit") or "unknown")
    return (
        f"{_plain(told_architecture(training))} Model `{_code(metrics['model_digest'])}`, code `{_code(commit)}`; for "
        f"programs `{artifacts.MODEL_CARD}` in the run."
    )


def told_architecture(training: Mapping[str, Any]) -> str:
    """What kind of model it is and what it started from, as a sentence."""
    recipe = training.get("params") or {}
    size, weights = recipe.get("image_size_px"), str(recipe.get("weights") or "unknown")
    begun = {"none": "scratch", "imagenet": "ImageNet's weights"}.get(weights, _name_of_file(weights))
    temperature = training.get("temperature")
    calibrated = f", temperature {temperature:.2f}" if isinstance(temperature, float) else ""
    return (
        f"DenseNet201, grey images of {size} x {size} px, trained from {begun}{calibrated}; also scores how unlike the "
        "training's an image is."
    )


def _name_of_file(address: str) -> str:
    """The last part of a path or an address: the rest may hold users, passwords and signatures."""
    return PurePosixPath(re.split(r"[?#;]", address, maxsplit=1)[0]).name.rpartition("@")[2]


def told_factors(metrics: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """Which slices were looked at, and which of them stand out."""
    slices = evidence.get("slices")
    if slices is None:
        return f"Slices: {UNMEASURED}."
    looked_at = f"Looked at by class and by {named(sorted({told_name(entry['fact']) for entry in slices}))}" * bool(
        slices
    )
    out = sorted(
        (entry for entry in slices if entry["stands_out"]), key=lambda entry: (entry["accuracy"], entry["told"])
    )
    if not out:
        return f"{looked_at or 'No slice is large enough to look at'}: no slice stands out."
    shown = [f"{slice_name(entry)} {percent(entry['accuracy'])} of {entry['n']:,}" for entry in out[:NAMED_SLICES]]
    more = f" and {len(out) - NAMED_SLICES} more" if len(out) > NAMED_SLICES else ""
    return f"{looked_at}. These stand out: {'; '.join(shown)}{more}; over all {percent(metrics['accuracy'])}."


def told_test_data(facts: CardFacts) -> str:
    """Which images it was tested on, what that allows to claim, and how used they are."""
    metrics = facts.metrics
    declared = metrics.get("declared_leaked_share")
    copies = f"{percent(metrics['leaked_share'])} have a copy among the images trained on" + (
        "" if declared is None else f", {percent(declared)} in the declared training folder"
    )
    return (
        f"{metrics['n_test']:,} images in {metrics['n_groups']:,} groups of copies or patients: {copies}. "
        f"{told_claim(metrics)} {told_uses(facts.earlier_decisions)}"
    )


def told_training_data(training: Mapping[str, Any]) -> str:
    """Which images it was trained on."""
    images = training.get("images") or {}
    uses = {"train": "to train on", "val": "to choose the epoch by", "calibration": "to calibrate by"}
    counted = [f"{images[name]:,} {told}" for name, told in uses.items() if name in images]
    data_md5 = str(training["data_md5"])[:DIGEST_DIGITS]
    return f"Data version {data_md5}: {', '.join(counted) or 'numbers of images unknown'}."


def told_misses(metrics: Mapping[str, Any]) -> str:
    """How many tumours it misses, as a sentence."""
    missed, n = missed_tumours(metrics)
    return f"A missed tumour harms more than a false alarm: {missed:,} of {n:,} are called {NO_TUMOUR}."


def _checks(facts: CardFacts) -> str:
    level = f"{facts.metrics['confidence_level']:.0%}"
    checks = facts.decision["checks"]
    required = [_told_check(check) for check in checks if check["required"]]
    n_others = len(checks) - len(required)
    return _plain(
        f"Intervals: {level}, from a bootstrap over groups. The gate requires: {', '.join(required)}; {n_others} more "
        f"{'check' if n_others == 1 else 'checks'} can only warn."
    )


def _told_check(check: Mapping[str, Any]) -> str:
    threshold = f" {check['threshold']:g}" if isinstance(check["threshold"], float) else ""
    return f"{told_name(check['name'])}{threshold}"


def _analyses(facts: CardFacts) -> str:
    metrics = facts.metrics
    lines = [f"| Class | Images | {' | '.join(f'{name}{GAP}' for name in CLASS_FIGURES)} |", "|---" * 7 + "|"]
    for name in CLASS_NAMES:
        figures = metrics["per_class"][name]
        values = " | ".join(_number(figures.get(figure)) for figure in CLASS_FIGURES)
        lines.append(f"| {name}{GAP} | {figures['n']}{GAP} | {values} |")
    overall = "; ".join(
        f"{title} {percent(metrics[name])} ({span(metrics[f'{name}_interval'])})"
        for name, title in INTERVAL_FIGURES.items()
    )
    told = "\n".join(f"- {_plain(line)}" for line in [f"{overall}.", *told_analyses(facts.evidence)])
    return "\n".join(lines) + f"\n\n{told}"


def _picture(run_page: str) -> str:
    run_id = run_page.rpartition("/")[2]
    path = f"get-artifact?path=evaluation/{artifacts.CONFUSION_MATRIX}&run_uuid={run_id}"
    return f"\n\n![Confusion matrix]({path})"


def told_analyses(evidence: Mapping[str, Any]) -> list[str]:
    """Calibration, prediction sets, referral, strange images and robustness, a sentence each."""
    found = {name: evidence.get(name) for name in ("calibration", "conformal", "triage", "ood", "robustness")}
    told = [
        ("Calibration error", found["calibration"], _told_calibration),
        ("Prediction sets", found["conformal"], _told_sets),
        ("Referral", found["triage"], _told_referral),
        ("Strange images", found["ood"], _told_strange),
        ("Robustness", found["robustness"], _told_robustness),
    ]
    return [f"{name}: {UNMEASURED if facts is None else tell(facts)}." for name, facts, tell in told]


def _told_calibration(found: Mapping[str, Any]) -> str:
    after = found["after"]
    return (
        f"{percent(after['ece'])} ({span(after['ece_interval'])}); chance alone explains up to "
        f"{percent(after['ece_by_chance'][1])}"
    )


def _told_sets(found: Mapping[str, Any]) -> str:
    if found["coverage"] is None:
        return "none, too few images to calibrate them by"
    return (
        f"{percent(found['coverage'])} ({span(found['coverage_interval'])}) hold the true class, "
        f"{found['confidence']:.0%} promised; {found['mean_size']:.2f} classes on average"
    )


def _told_referral(found: Mapping[str, Any]) -> str:
    if found["threshold"] is None or found["test"] is None:
        return "no threshold keeps the promise: refer all images"
    test = found["test"]
    rest = "" if test["accuracy"] is None else f"; {percent(1 - test['accuracy'])} of the others are wrong"
    return (
        f"{percent(1 - test['kept'])} of the test images have a top probability below {found['threshold']:.2f}, and go "
        f"to a radiologist{rest}"
    )


def _told_strange(found: Mapping[str, Any]) -> str:
    lowest = found["kinds"][found["lowest"]]
    return (
        f"AUROC {found['auroc']:.2f} on average; least for {told_name(found['lowest'])}, {lowest['auroc']:.2f} with "
        f"{lowest['flagged_share']:.0%} flagged"
    )


def _told_robustness(found: Mapping[str, Any]) -> str:
    return f"{percent(found['retained'])} of the accuracy is left when images are blurred, shifted and the like"


def _code(digest: str) -> str:
    """The first digits of a digest for a code span, whatever it holds."""
    digits, dirty, _ = digest.partition("-dirty")
    return re.sub(r"[^0-9A-Za-z]", "", digits)[:DIGEST_DIGITS] + dirty


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} ..."


ESCAPED = {character: f"&#{ord(character)};" for character in "&<>[]*_`|!#@~\\"}


def _plain(text: object) -> str:
    """Text that Markdown leaves as it is: a name out of the data set can be no link, picture, table or heading."""
    joined = " ".join(str(text).split())
    return "".join(ESCAPED.get(character, character) for character in joined).replace("://", "&#58;//")


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"
