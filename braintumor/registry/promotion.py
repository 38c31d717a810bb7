"""The rules of promotion: pure, they take facts and say what speaks against a version becoming the champion."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from braintumor.artifacts import EVIDENCE, sha256_key
from braintumor.evidence.verdicts import BETTER, NO_DIFFERENCE, WORSE
from braintumor.params import GateParams, PromoteParams
from braintumor.registry.ledger import Recorded
from braintumor.registry.policy import decide
from braintumor.registry.version_facts import VersionFacts
from braintumor.registry.versions import MODEL_SHA256

# Clocks of one installation agree to a few seconds; what was made later than this was dated wrongly.
MAX_CLOCK_SKEW = timedelta(minutes=5)
# What decision, metrics, evidence and the version's tags all name.
SHARED_DIGESTS = ("model_digest", "data_md5", "splits_sha256")
METRICS_SHA256, EVIDENCE_SHA256 = "metrics_sha256", sha256_key(EVIDENCE)
# Of a former champion: what it is, and what it was judged by.
IDENTITY = ("model_digest", MODEL_SHA256, "data_md5")
# Entries of before that file was hashed do not tell it.
NOT_IN_EVERY_ENTRY = (MODEL_SHA256,)
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Ruling:
    """What speaks against a promotion: `refusals` for good, `overridable` unless a reviewer overrides it."""

    refusals: tuple[str, ...]
    overridable: tuple[str, ...]

    def objections(self, override: str) -> tuple[str, ...]:
        """What is left of them where a reviewer gave the reason `override`, '' for none."""
        return self.refusals or (() if override else self.overridable)


def rule(
    facts: VersionFacts,
    champion: str | None,
    was_champion: Recorded | None,
    gate: GateParams,
    promote: PromoteParams,
    now: datetime,
) -> Ruling:
    """Judge whether the version may become the champion at the time `now`, by our own `gate`, not by its run's.

    `champion` is another version, or None. `was_champion` is the entry that made this one champion before: age,
    comparison and what its page shows don't count then, but it has to be the model of that entry.
    """
    refusals = [*_unfinished(facts, now), *_not_passed(facts), *_other_digests(facts)]
    if was_champion is None:
        refusals += [*_misleading_tags(facts), *_rules_again(facts, gate)]
        return Ruling(tuple(refusals), (*_worse(facts.comparison, champion), *_too_old(facts, promote, now)))
    refusals += [
        *_other_model(facts, was_champion),
        *_rules_again(facts, gate.model_copy(update={"not_worse_than_champion": None})),
    ]
    return Ruling(tuple(refusals), tuple(_judged_anew(facts, was_champion)))


def _unfinished(facts: VersionFacts, now: datetime) -> Iterator[str]:
    if facts.status != "READY":
        yield f"its status is {facts.status}, not READY"
    if facts.created > now + MAX_CLOCK_SKEW:
        yield (
            f"it was registered at {facts.created:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} now: "
            "mend the clock of MLflow's server"
        )


def _not_passed(facts: VersionFacts) -> Iterator[str]:
    for place, tags in (("its", facts.tags), ("its run's", facts.run_tags)):
        if tags.get("gate") != "passed":
            yield f"{place} tag 'gate' is {tags.get('gate')!r}, not 'passed'"
    if facts.decision.get("passed") is not True:
        yield "the gate's decision is that it did not pass"


def _other_digests(facts: VersionFacts) -> Iterator[str]:
    """Decision, metrics, evidence, tags and model file belong together."""
    found = facts.decision.get("digests")
    judged = found if isinstance(found, Mapping) else {}
    bindings: list[tuple[str, Mapping[str, object], str, object, str]] = [
        ("the decision", judged, METRICS_SHA256, facts.metrics_sha256, "metrics.json"),
        ("the decision", judged, EVIDENCE_SHA256, facts.evidence_sha256, "evidence.json"),
        ("metrics.json", facts.metrics, EVIDENCE_SHA256, facts.evidence_sha256, "evidence.json"),
    ]
    holders = {
        "the decision": judged,
        "metrics.json": facts.metrics,
        "evidence.json": facts.evidence,
        "a tag": facts.tags,
    }
    for name in SHARED_DIGESTS:
        is_model = name == "model_digest"
        expected = facts.model_digest if is_model else facts.metrics.get(name)
        whose = "the model file" if is_model else "metrics.json"
        bindings += [(place, holder, name, expected, whose) for place, holder in holders.items()]
    bindings.append(("a tag of its run", facts.run_tags, "model_digest", facts.model_digest, "the model file"))
    for place, holder, name, expected, whose in bindings:
        value = holder.get(name)
        if not isinstance(value, str) or not value or value != expected:
            yield f"{place} names {name} {_shown(value)}, and that of {whose} is {_shown(expected)}"


def _rules_again(facts: VersionFacts, gate: GateParams) -> Iterator[str]:
    data_md5 = facts.metrics.get("data_md5")
    champion = facts.comparison.get("champion")
    decision = decide(
        facts.metrics,
        facts.comparison or None,
        gate,
        data_md5 if isinstance(data_md5, str) else "",
        champion if isinstance(champion, str) else None,
    )
    for failure in decision.failures:
        yield f"by the gate's rules here, {failure}"


def _misleading_tags(facts: VersionFacts) -> Iterator[str]:
    """What the page shows of the metrics is what they say; a reviewer decides by it."""
    for name, tag in facts.tags.items():
        if name in facts.metrics and name not in SHARED_DIGESTS and not _says(tag, facts.metrics[name]):
            yield f"its tag {name} shows {tag[:40]!r}, and metrics.json says otherwise"


def _says(tag: str, value: object) -> bool:
    """Whether a tag repeats a text, a number to four digits, or an interval of two such numbers."""
    if isinstance(value, list):
        parts = tag.split(" to ")
        return len(parts) == len(value) == 2 and all(map(_says, parts, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return tag == str(value)
    try:
        return math.isclose(float(tag), value, rel_tol=0, abs_tol=0.5001e-4)
    except ValueError:
        return False


def _worse(comparison: Mapping[str, object], champion: str | None) -> Iterator[str]:
    verdict, compared_with = comparison.get("verdict"), comparison.get("champion")
    told = f"{verdict}: {comparison.get('reason')}"
    if champion is None:
        if verdict == WORSE:
            yield f"there is no champion now, but against {_version(compared_with)} it was {told}"
        return
    if not verdict:
        yield f"it was not compared with the champion, {_version(champion)}"
    elif compared_with != champion:
        yield f"it was compared with {_version(compared_with)} ({told}), and the champion now is {_version(champion)}"
    elif verdict not in (BETTER, NO_DIFFERENCE):
        yield f"the comparison with the champion, {_version(champion)}, says {told}"


def _too_old(facts: VersionFacts, promote: PromoteParams, now: datetime) -> Iterator[str]:
    age = now - facts.created
    if age > timedelta(days=promote.max_age_days):
        yield f"it was registered {age.days} days ago, and {promote.max_age_days} are allowed"


def _other_model(facts: VersionFacts, was_champion: Recorded) -> Iterator[str]:
    for name in IDENTITY:
        expected, value = was_champion.entry.digests.get(name), facts.digests[name]
        if value != expected and (expected is not None or name not in NOT_IN_EVERY_ENTRY):
            yield (
                f"its {name} is {_shown(value)}, and when it was champion "
                f"(entry {was_champion.entry.index}) it was {_shown(expected)}"
            )


def _judged_anew(facts: VersionFacts, was_champion: Recorded) -> Iterator[str]:
    recorded = was_champion.entry.digests
    changed = [name for name, value in facts.digests.items() if name not in IDENTITY and value != recorded.get(name)]
    if changed:
        yield (
            f"it was judged anew since it was champion (entry {was_champion.entry.index}): "
            f"{', '.join(changed)} are not those that were recorded"
        )


def _version(number: object) -> str:
    return "no champion" if number is None else f"version {number}"


def _shown(digest: object) -> str:
    return f"{digest[:SHOWN_DIGITS]}..." if isinstance(digest, str) and len(digest) > SHOWN_DIGITS else repr(digest)
