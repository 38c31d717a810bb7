"""The gate's rules: pure, they take numbers and give a verdict. Whatever is missing or not a number closes the gate."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from braintumor.artifacts import JUDGED_FILES, sha256_key
from braintumor.evidence.verdicts import BETTER, NO_CHAMPION, NO_DIFFERENCE, NOT_COMPARABLE, SAME_MODEL, WORSE
from braintumor.labels import CLASS_NAMES
from braintumor.params import Bound, GateParams, Rule

# 'declared' keeps copies of training images in the test set: its figures are for comparison only.
ALLOWED_PROTOCOLS = ("official", "grouped")

NEEDED_FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "tumour_sensitivity",
    "tumour_specificity",
    "nearest_neighbour_accuracy",
    "leaked_share",
    "ece",
    "ood_auroc",
)
NEEDED_CLASS_FIGURES = ("recall", "specificity", "precision", "f1")
NOT_WORSE = "not_worse_than_champion"
VERDICTS = (BETTER, NO_DIFFERENCE, NO_CHAMPION, NOT_COMPARABLE, WORSE)
NEEDED_DIGESTS = ("data_md5", "splits_sha256", "model_digest", *map(sha256_key, JUDGED_FILES))


@dataclass(frozen=True)
class Check:
    """One rule and what came of it; `value` is None where it is no finite number and no text."""

    name: str
    value: float | str | None
    threshold: float | str | None
    required: bool
    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The verdict on one evaluation, with the digests of all that was judged."""

    passed: bool
    checks: tuple[Check, ...]
    digests: dict[str, str | None]
    policy: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The content of decision.json."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks]}

    @property
    def failures(self) -> list[str]:
        """The reasons of the required checks that did not pass."""
        return [check.reason for check in self.checks if check.required and not check.passed]

    @property
    def warnings(self) -> list[str]:
        """The reasons of the other checks that did not pass."""
        return [check.reason for check in self.checks if not check.required and not check.passed]


def decide(
    metrics: Mapping[str, Any],
    comparison: object,
    policy: GateParams,
    current_data_md5: str,
    champion_version: str | None,
) -> Decision:
    """Judge the content of a metrics.json; a figure exactly at its bound passes.

    `comparison` is that section of evidence.json, None if there is none, and `champion_version` the champion that it
    has to be with, None for no champion. That the figures are complete, of the current data and of an allowed protocol
    is always required.
    """
    checks = (
        _complete_and_finite(metrics),
        _current_data(metrics, current_data_md5),
        _protocol_allowed(metrics),
        _bound("min_accuracy", "accuracy", metrics.get("accuracy"), policy.min_accuracy),
        *_optional_checks(metrics, policy),
        *_champion_checks(comparison, champion_version, policy.not_worse_than_champion),
    )
    return Decision(
        passed=all(check.passed for check in checks if check.required),
        checks=checks,
        digests={name: _text(metrics.get(name)) for name in NEEDED_DIGESTS},
        policy=policy.model_dump(),
    )


def _optional_checks(metrics: Mapping[str, Any], policy: GateParams) -> Iterator[Check]:
    interval = metrics.get("accuracy_interval")
    lowest = interval[0] if isinstance(interval, list | tuple) and interval else None
    recall_of, recall = _lowest_recall(metrics)
    figures = {
        "min_accuracy_low": ("lower end of the accuracy's interval", lowest, policy.min_accuracy_low),
        "min_copy_free_accuracy": (
            "accuracy on copy-free test images",
            metrics.get("copy_free_accuracy"),
            policy.min_copy_free_accuracy,
        ),
        "min_tumour_sensitivity": (
            "tumour sensitivity",
            metrics.get("tumour_sensitivity"),
            policy.min_tumour_sensitivity,
        ),
        "min_class_recall": (f"recall of {recall_of}", recall, policy.min_class_recall),
        "max_ece": ("expected calibration error", metrics.get("ece"), policy.max_ece),
        "min_ood_auroc": ("AUROC of images unlike the training's", metrics.get("ood_auroc"), policy.min_ood_auroc),
    }
    for name, (figure, value, bound) in figures.items():
        if bound is not None:
            yield _bound(name, figure, value, bound)


def _champion_checks(comparison: object, champion_version: str | None, rule: Rule | None) -> Iterator[Check]:
    if rule is None:
        return
    facts = comparison if isinstance(comparison, Mapping) else {}
    verdict = _text(facts.get("verdict"))
    problem = _comparison_problem(facts, verdict, champion_version)
    told = _text(facts.get("reason")) or "no reason is given"
    yield Check(
        name=NOT_WORSE,
        value=verdict,
        threshold=f"{BETTER}, {NO_DIFFERENCE} or {NO_CHAMPION}",
        required=rule.required,
        passed=problem is None,
        reason=problem or (told if verdict == NO_CHAMPION else f"{verdict}: {told}"),
    )


def _comparison_problem(facts: Mapping[str, Any], verdict: str | None, champion_version: str | None) -> str | None:
    """Why the comparison does not show that the model is no worse; None if it does."""
    if verdict is None:
        return "the evaluation has no comparison with the champion; run 'braintumor evaluate' again"
    compared_with = facts.get("champion")
    if compared_with != champion_version:
        there_is = "there is none" if champion_version is None else f"the champion is version {champion_version}"
        return (
            f"the comparison is with {'no champion' if compared_with is None else f'version {compared_with}'}, and "
            f"{there_is}; run 'braintumor evaluate' again"
        )
    if found := _non_finite(facts):
        return f"the comparison with the champion is unusable: {', '.join(found)} is not finite"
    if (verdict == NO_CHAMPION) != (champion_version is None) or verdict not in VERDICTS:
        return f"the comparison's verdict {verdict!r} is unknown, or contradicts its champion {compared_with!r}"
    told = _text(facts.get("reason")) or "no reason is given"
    if verdict == NO_CHAMPION or (verdict == NOT_COMPARABLE and told == SAME_MODEL):
        return None
    if verdict in (BETTER, NO_DIFFERENCE):
        return _contradiction(facts, verdict)
    return f"{verdict} {'than' if verdict == WORSE else 'with'} the champion: {told}"


def _contradiction(facts: Mapping[str, Any], verdict: str) -> str | None:
    """What of its own figures speaks against the comparison's verdict; None if nothing does."""
    figures = facts.get("figures")
    accuracy = figures.get("accuracy") if isinstance(figures, Mapping) else None
    interval = accuracy.get("interval") if isinstance(accuracy, Mapping) else None
    if not (isinstance(interval, list | tuple) and len(interval) == 2 and all(map(_is_difference, interval))):
        return f"the comparison says {verdict!r} without the interval of the accuracies' difference"
    # 'no difference found' may have any interval: the sign test has a say, too.
    if verdict == BETTER and interval[0] <= 0:
        return f"the comparison says {verdict!r}, and its interval begins at {interval[0]:+.4f}"
    return None


def _is_difference(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1


def is_share(value: object) -> bool:
    """Whether `value` is a real number in [0, 1]; a bool or a text is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _complete_and_finite(metrics: Mapping[str, Any]) -> Check:
    problems = [
        *(_share_problem(name, metrics.get(name)) for name in NEEDED_FIGURES),
        _interval_problem(metrics.get("accuracy_interval")),
        _copy_free_problem(metrics),
        _count_problem("n_test", metrics.get("n_test")),
        *_class_problems(metrics.get("per_class")),
        *(f"{name} is missing" for name in NEEDED_DIGESTS if _text(metrics.get(name)) is None),
        *(f"{place} is not finite" for place in _non_finite(metrics)),
    ]
    found = list(dict.fromkeys(problem for problem in problems if problem))
    return Check(
        name="complete_and_finite",
        value=f"{len(found)} problems",
        threshold="0 problems",
        required=True,
        passed=not found,
        reason=f"the metrics are unusable: {'; '.join(found)}" if found else "every needed figure is there and finite",
    )


def _share_problem(name: str, value: object) -> str | None:
    if value is None:
        return f"{name} is missing"
    return None if is_share(value) else f"{name} is {value!r}, not a number in 0..1"


def _count_problem(name: str, value: object) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return None
    return f"{name} is {value!r}, not a count above 0"


def _interval_problem(interval: object) -> str | None:
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_share, interval)):
        return None if interval[0] <= interval[1] else f"accuracy_interval {interval!r} is upside down"
    return f"accuracy_interval is {interval!r}, not two numbers in 0..1"


def _copy_free_problem(metrics: Mapping[str, Any]) -> str | None:
    """A split may have no copy-free test image, and says so; it can't just lack the figure."""
    if metrics.get("n_copy_free") == 0 and metrics.get("copy_free_accuracy", "") is None:
        return None
    return _share_problem("copy_free_accuracy", metrics.get("copy_free_accuracy"))


def _class_problems(per_class: object) -> list[str | None]:
    if not isinstance(per_class, Mapping):
        return ["per_class is missing"]
    problems: list[str | None] = [
        f"per_class holds the unknown class {name!r}" for name in per_class if name not in CLASS_NAMES
    ]
    for name in CLASS_NAMES:
        figures = per_class.get(name)
        if not isinstance(figures, Mapping):
            problems.append(f"class {name} is missing")
            continue
        problems.append(_count_problem(f"{name} n", figures.get("n")))
        problems += [_share_problem(f"{name} {figure}", figures.get(figure)) for figure in NEEDED_CLASS_FIGURES]
    return problems


def _non_finite(content: object, place: str = "") -> list[str]:
    """The places of all NaN and infinite numbers: JSON has none, though Python reads and writes them."""
    if isinstance(content, Mapping):
        items = [(f"{place} {key}".strip(), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        items = [(f"{place}[{index}]", value) for index, value in enumerate(content)]
    else:
        return [place] if isinstance(content, float) and not math.isfinite(content) else []
    return [found for inner, value in items for found in _non_finite(value, inner)]


def _current_data(metrics: Mapping[str, Any], current_data_md5: str) -> Check:
    value = _text(metrics.get("data_md5"))
    is_current = value is not None and value == current_data_md5
    return Check(
        name="current_data",
        value=value,
        threshold=current_data_md5,
        required=True,
        passed=is_current,
        reason=f"the figures are of the current data {current_data_md5}"
        if is_current
        else f"the figures are of data {value}, the current data are {current_data_md5}; train and evaluate again",
    )


def _protocol_allowed(metrics: Mapping[str, Any]) -> Check:
    value = _text(metrics.get("protocol"))
    is_allowed = value in ALLOWED_PROTOCOLS
    return Check(
        name="protocol_allowed",
        value=value,
        threshold=" or ".join(ALLOWED_PROTOCOLS),
        required=True,
        passed=is_allowed,
        reason=f"protocol '{value}' keeps copies of one image on one side"
        if is_allowed
        else f"protocol {value!r} can never pass: it is not one of {', '.join(ALLOWED_PROTOCOLS)}",
    )


def _lowest_recall(metrics: Mapping[str, Any]) -> tuple[str, Any]:
    """The class with the lowest recall, and that; or one whose recall is no number in 0..1."""
    per_class = metrics.get("per_class")
    figures = per_class if isinstance(per_class, Mapping) else {}
    recalls: dict[str, Any] = {
        name: figures[name].get("recall") if isinstance(figures.get(name), Mapping) else None for name in CLASS_NAMES
    }
    unusable = [name for name, recall in recalls.items() if not is_share(recall)]
    lowest = unusable[0] if unusable else min(recalls, key=lambda name: recalls[name])
    return lowest, recalls[lowest]


def _bound(name: str, figure: str, value: object, bound: Bound) -> Check:
    """The check of a figure against its bound: the highest value for a name that begins with 'max', else the lowest."""
    if not is_share(value):
        return Check(name, None, bound.value, bound.required, False, f"{figure} is {value!r}, not a number in 0..1")
    assert isinstance(value, int | float)
    is_highest = name.startswith("max_")
    is_kept = value <= bound.value if is_highest else value >= bound.value
    kept, broken = ("does not exceed", "exceeds") if is_highest else ("reaches", "is below")
    reason = f"{figure} {_figure(value, bound.value)} {kept if is_kept else broken} {bound.value}"
    return Check(name, float(value), bound.value, bound.required, is_kept, reason)


def _figure(value: float, threshold: float) -> str:
    """Four digits, or all of them where four would look like the threshold itself."""
    short = f"{value:.4f}"
    return repr(value) if float(short) == threshold != value else short


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
