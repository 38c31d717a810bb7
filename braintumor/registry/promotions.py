"""The alias `champion` and the ledger in line: what reviewers set is judged, recorded, shown, deployed, or put back.

The alias is what the world uses, the ledger the record of it. Whoever reconciles may be killed between any two calls,
and somebody else may reconcile at the same time: an entry is appended after the last one that was read, or not at all,
and stays open until all that follows from it is done.
"""

import hashlib
import re
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braintumor.errors import GateNotPassed, UserError
from braintumor.params import Profile
from braintumor.registry import ledger
from braintumor.registry.history import DELIVERED
from braintumor.registry.ledger import LedgerMoved, Recorded
from braintumor.registry.promotion import Ruling, rule
from braintumor.registry.rights import BY, REVIEWER, REVIEWERS_TAGS, ServerRights, server_rights
from braintumor.registry.server import (
    CHAMPION,
    REFUSED_CODES,
    connected,
    error_code,
    holds_nothing_yet,
    server_time,
)
from braintumor.registry.tracking import user_name
from braintumor.registry.version_facts import UnfitVersion, UnknownVersion, VersionFacts, read_facts
from braintumor.registry.versions import version_by_number

if TYPE_CHECKING:
    from mlflow import MlflowClient

Deploy = Callable[[Recorded], None]

# What a request consists of, as tags of the version, with BY, which the server's plugin writes, and nobody else can.
REASON, OVERRIDE = REVIEWERS_TAGS
CLAIMED_BY = "promotion.claimed_by"
# In the order in which they are removed: what is left of an interrupted removal must not override anything.
REQUEST = (OVERRIDE, CLAIMED_BY, REASON, BY)
# What the command line adds to its tags: the entry that it asks for, and when. They say nothing of any other request.
ASKED_FOR = re.compile(r"(?P<text>.*) \[entry (?P<index>[0-9]{1,9}) at (?P<time>[0-9T:+-]{25})\]", re.DOTALL)
REQUEST_LASTS = timedelta(minutes=5)
# What became of the version, for its page.
OUTCOME = "promotion.outcome"
NONE_GIVEN = "none given"
UNKNOWN_USER = "in the UI, user unknown"
OVERRIDE_HINT = f"; a reviewer may override this: give the version the tag {OVERRIDE} with a reason, and set it again"
SUPERSEDED, FAILING = "superseded", "failing: "
# What our own rules may raise for facts that nobody foresaw.
NOT_JUDGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

MAX_TEXT_CHARACTERS = 1000
MAX_SHOWN_CHARACTERS = 1500
MAX_VERSION = 2**31 - 1
MAX_ROUNDS = 20
PROMOTER_WAIT_S, POLL_S = 60.0, 2.0


@dataclass(frozen=True)
class Outcome:
    """A thing that was done, and the entry it belongs to; as text, a line for a log."""

    recorded: Recorded
    what: str

    def __str__(self) -> str:
        return f"entry {self.recorded.entry.index}: {self.what}"


class CanNotBeJudged(GateNotPassed):
    """The version's files are such that the rules themselves fail on them."""


class NotDeployed(UserError):
    """The deployment hook did not take its call; all else is done, and the hook is called again next time."""


def promote(model_name: str, version: str, reason: str, override: str, params: Profile) -> Outcome:
    """The version is the champion, and the ledger says so; `override` is the reason for going against the rules, or ''.

    Where the server lets only its promoter write the ledger, its entry is waited for. Raises GateNotPassed for a
    version that may not be promoted, UserError for an unknown one and without the right: nothing is changed then.
    """
    reason, override = _checked_text("reason", reason), _checked_text("override", override, may_be_empty=True)
    if not version.isdecimal() or not 0 < int(version) <= MAX_VERSION:
        raise UserError(f"{version!r} is no version; give the number that the page of {model_name} shows")
    with _asking(model_name) as client:
        rights = _reviewers_rights()
        entries = _in_line(client, model_name, params, rights)
        return _promote(client, model_name, str(int(version)), reason, override, params, rights, entries)


def rollback(model_name: str, reason: str, params: Profile) -> Outcome:
    """The champion before the last change is champion again, and the ledger says so. Raises as `promote` does."""
    reason = _checked_text("reason", reason)
    with _asking(model_name) as client:
        rights = _reviewers_rights()
        entries = _in_line(client, model_name, params, rights)
        previous = ledger.previous_champion(entries)
        if previous is None:
            raise UserError(
                f"{model_name} had no champion before the present one: there is nothing to go back to; "
                "promote a version with 'braintumor promote', or remove the alias 'champion' on the version's page"
            )
        return _promote(client, model_name, previous, reason, "", params, rights, entries)


def reconcile(params: Profile, who: str | None = None, deploy: Deploy | None = None) -> list[Outcome]:
    """Ledger, alias, version pages and deployment are in line; what was done, in order.

    `who` stands in the ledger where nothing tells who set the alias. `deploy` is called for each change of champion,
    the oldest first, and again next time where it raised UserError: until it took the call, or a newer change is to be
    deployed. The newest is told at least once. Without `deploy` that is left to somebody who has it. Raises NotDeployed
    after all else where it raised UserError.
    """
    if holds_nothing_yet():
        return []
    with connected() as client:
        return _reconcile(client, params.registration.model_name, params, who or UNKNOWN_USER, deploy)[0]


def _reconcile(
    client: "MlflowClient", model_name: str, params: Profile, who: str, deploy: Deploy | None
) -> tuple[list[Outcome], Sequence[Recorded]]:
    """What was done, and the ledger, which the alias agrees with."""
    outcomes: list[Outcome] = []
    ledger.mend(client, model_name)
    carried_out: set[str] = set()
    for _ in range(MAX_ROUNDS):
        entries = ledger.read(client, model_name)
        for recorded in entries:
            if recorded.is_open and recorded.run_id not in carried_out:
                _carry_out(client, model_name, entries, recorded)
                carried_out.add(recorded.run_id)
        # After the ledger: what is appended is judged on an alias that is at least as new.
        try:
            appended = _record_change(client, model_name, params, who, entries)
        except LedgerMoved:
            continue
        if appended is None:
            return outcomes + _finish(client, entries, deploy, outcomes), entries
        outcomes.append(Outcome(appended, _told(appended)))
    raise UserError(f"the champion of {model_name} changes faster than it can be recorded; try again in a minute")


def _record_change(
    client: "MlflowClient", model_name: str, params: Profile, who: str, entries: Sequence[Recorded]
) -> Recorded | None:
    """The entry of the alias' last change, or of its refusal; None where the ledger knows it already."""
    champion, alias = ledger.champion_of(entries), _alias(client, model_name)
    if alias == champion:
        return None
    facts: dict[str, Any] = dict(before=champion, override="", comparison="", digests={})
    found: Mapping[str, str] = {}
    now = server_time(client)
    former = None if champion is None else version_by_number(client, model_name, champion)
    if champion is not None and (alias is None or former is None):
        found = {} if former is None else dict(former.tags)
        tags = _of_this_request(found, entries, now)
        reason = "the version was deleted" if former is None else tags.get(REASON, "").strip() or NONE_GIVEN
        facts |= dict(action="removed", version=champion, after=None, reason=reason)
    else:
        assert alias is not None
        version = version_by_number(client, model_name, alias)
        if version is None:  # gone since, and its alias with it
            raise LedgerMoved
        found = dict(version.tags)
        tags = _of_this_request(found, entries, now)
        facts |= _judged(client, model_name, alias, tags, params, entries, now)
    name, is_known = _author(tags, entries, who)
    facts |= dict(who=name, who_is_known=is_known, time=now.isoformat(timespec="seconds"), claim=_claim(found))
    return ledger.append(client, model_name, entries[-1] if entries else None, facts)


def _judged(
    client: "MlflowClient",
    model_name: str,
    version: str,
    tags: Mapping[str, str],
    params: Profile,
    entries: Sequence[Recorded],
    now: datetime,
) -> dict[str, Any]:
    """What the rules make of a version that the alias was set to, as fields of an entry."""
    champion, override = ledger.champion_of(entries), tags.get(OVERRIDE, "").strip()
    refused = dict(action="refused", version=version, after=champion)
    try:
        facts, ruling = _ruling(client, model_name, version, params, entries, now)
    except UnknownVersion:
        raise LedgerMoved from None
    except UnfitVersion as error:
        return refused | dict(reason=str(error))
    except CanNotBeJudged as error:
        return refused | dict(reason=str(error))
    known = dict(comparison=str(facts.comparison.get("verdict") or ""), digests=facts.digests)
    if objections := ruling.objections(override):
        hint = "" if ruling.refusals else OVERRIDE_HINT
        return refused | known | dict(reason="; ".join(objections) + hint)
    return known | dict(
        action="promoted" if ledger.was_champion(entries, version) is None else "rolled back",
        version=version,
        after=version,
        reason=tags.get(REASON, "").strip() or NONE_GIVEN,
        override=f"{override} (despite: {'; '.join(ruling.overridable)})" if ruling.overridable else "",
    )


def _ruling(
    client: "MlflowClient", model_name: str, version: str, params: Profile, entries: Sequence[Recorded], now: datetime
) -> tuple[VersionFacts, Ruling]:
    with tempfile.TemporaryDirectory(prefix="braintumor-facts-") as scratch:
        facts = read_facts(client, model_name, version, Path(scratch))
    champion, was_champion = ledger.champion_of(entries), ledger.was_champion(entries, version)
    try:
        return facts, rule(facts, champion, was_champion, params.gate, params.promote, now)
    # Whoever uploaded them must not keep us from all that comes after.
    except NOT_JUDGED as error:
        raise CanNotBeJudged(
            f"version {version} of {model_name} may not be promoted: its files can't be judged "
            f"({type(error).__name__}); register the model again ('braintumor register')"
        ) from error


def _next_index(entries: Sequence[Recorded]) -> int:
    return entries[-1].entry.index + 1 if entries else 1


def _of_this_request(tags: Mapping[str, str], entries: Sequence[Recorded], now: datetime) -> Mapping[str, str]:
    """The tags without what the command line asked for in a request that came to nothing, and without its marks.

    Where the server says when the alias was set, that is the time of the request; else it is `now`.
    """
    _, _, signed = tags.get(BY, "").rpartition(" at ")
    when = (_time(signed.partition(" #")[0]) if server_rights() is not None else None) or now
    kept = dict(tags)
    for name in (OVERRIDE, CLAIMED_BY, REASON):
        asked = ASKED_FOR.fullmatch(kept.get(name, ""))
        if asked is None:
            continue
        time_asked = _time(asked["time"])
        is_meant = (
            int(asked["index"]) == _next_index(entries)
            and time_asked is not None
            and abs(when - time_asked) <= REQUEST_LASTS
        )
        if is_meant:
            kept[name] = asked["text"]
        else:
            del kept[name]
    return kept


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else None


def _author(tags: Mapping[str, str], entries: Sequence[Recorded], otherwise: str) -> tuple[str, bool]:
    """Who made the request, and whether the server vouches for it."""
    if server_rights() is None:
        return tags.get(CLAIMED_BY, "").strip() or otherwise, False
    by = tags.get(BY, "")
    # What an earlier request left: whoever set the alias now went around the plugin.
    is_used = any(_claimed(one).get(BY) == _sha256(by) for one in entries)
    return (UNKNOWN_USER, False) if not by or is_used else (by.rpartition(" at ")[0], True)


def _carry_out(client: "MlflowClient", model_name: str, entries: Sequence[Recorded], recorded: Recorded) -> None:
    """The registry shows what the entry says, and the request that it came from is gone; twice is as good as once."""
    entry = recorded.entry
    if entry.action == "refused":
        _put_back(client, model_name, entries, recorded)
    concerned = {entry.version} if entry.before == entry.after else {entry.version, entry.before}
    for number in sorted(number for number in concerned if number is not None):
        version = version_by_number(client, model_name, number)
        if version is None:
            continue
        for name, value in _page(number, entries).items():
            if version.tags.get(name) != value:
                _show(client, model_name, number, name, value)
        if number == entry.version:
            _remove_request(client, model_name, number, version.tags, _claimed(recorded))


def _show(client: "MlflowClient", model_name: str, version: str, name: str, value: str) -> None:
    """The version has the tag; of two who give it for the first time at once, MLflow fails one."""
    try:
        client.set_model_version_tag(model_name, version, name, value)
    except Exception:
        found = version_by_number(client, model_name, version)
        if found is None or found.tags.get(name) != value:
            raise


def _put_back(client: "MlflowClient", model_name: str, entries: Sequence[Recorded], recorded: Recorded) -> None:
    refused, champion = recorded.entry.version, ledger.champion_of(entries)
    assert refused is not None
    if champion == refused or _alias(client, model_name) != refused:
        return
    version = version_by_number(client, model_name, refused)
    # Another request since: the next judgement is about that.
    if version is None or _request(version.tags) != _claimed(recorded):
        return
    if champion is not None and version_by_number(client, model_name, champion) is not None:
        client.set_registered_model_alias(model_name, CHAMPION, champion)
    else:
        client.delete_registered_model_alias(model_name, CHAMPION)


def _remove_request(
    client: "MlflowClient", model_name: str, version: str, tags: Mapping[str, str], claimed: Mapping[str, str]
) -> None:
    for name in REQUEST:
        if name in claimed and name in tags and _sha256(tags[name]) == claimed[name]:
            client.delete_model_version_tag(model_name, version, name)


def _page(version: str, entries: Sequence[Recorded]) -> dict[str, str]:
    """The tags that tell on the version's page what became of it."""
    about = [one for one in entries if one.entry.version == version]
    last = about[-1]
    made = ledger.was_champion(entries, version)
    ended = next(
        (one for one in entries if made and one.entry.index > made.entry.index and one.entry.before != one.entry.after),
        None,
    )
    if made is not None and ended is None:
        told = f"champion since {made.entry.time} (entry {made.entry.index})"
    elif last.entry.action == "refused":
        told = f"refused {last.entry.time} (entry {last.entry.index}): {last.entry.reason}"
    else:
        assert made is not None and ended is not None
        told = (
            f"champion until {ended.entry.time}, since {made.entry.time} "
            f"(entries {made.entry.index} and {ended.entry.index})"
        )
    return {OUTCOME: told[:MAX_SHOWN_CHARACTERS], ledger.VERSION_ENTRY: ledger.entry_tag(last)}


def _finish(
    client: "MlflowClient", entries: Sequence[Recorded], deploy: Deploy | None, done: Sequence[Outcome]
) -> list[Outcome]:
    """Entries from which nothing more follows are closed; the outcomes of the deployment hook."""
    changes = [one for one in entries if one.entry.action != "refused"]
    outcomes: list[Outcome] = []
    failing: tuple[Recorded, str] | None = None
    last_delivered = max((one.entry.index for one in changes if one.hook.startswith(DELIVERED)), default=0)
    for recorded in entries:
        if recorded not in changes or (deploy is None and not recorded.hook.startswith(FAILING)):
            if recorded.is_open:
                ledger.close(client, recorded, None)
        elif deploy is not None and recorded.is_open and recorded.entry.index < last_delivered:
            # Another promoter was faster.
            ledger.close(client, recorded, None if _is_told(recorded) else f"{SUPERSEDED} by entry {last_delivered}")
        elif deploy is not None and _is_due(recorded, changes[-1]):
            # Before the call: whoever is killed after it must not tell the deployment of the older one next time.
            if failing is not None:
                ledger.close(client, failing[0], f"{SUPERSEDED} by entry {recorded.entry.index}: {failing[1]}")
                failing = None
            try:
                deploy(recorded)
            except UserError as error:
                failing = (recorded, str(error))
                if recorded.hook != f"{FAILING}{error}":
                    ledger.set_hook(client, recorded, f"{FAILING}{error}")
                continue
            ledger.close(client, recorded, f"{DELIVERED} {datetime.now(UTC).isoformat(timespec='seconds')}")
            outcomes.append(Outcome(recorded, f"the deployment hook was told of {_version(recorded.entry.after)}"))
        elif deploy is not None and recorded.is_open:
            # Whoever told the hook was killed before the entry was closed.
            ledger.close(client, recorded, None)
    if failing:
        told = "".join(f"{outcome}; " for outcome in [*done, *outcomes])
        late, reason = failing
        raise NotDeployed(f"{told}entry {late.entry.index} is recorded, but {reason}; it is called again next time")
    return outcomes


def _is_due(recorded: Recorded, newest: Recorded) -> bool:
    """Whether the deployment hook has to be told; of what somebody without a hook closed, of the newest alone."""
    return not _is_told(recorded) and (recorded.is_open or recorded is newest)


def _is_told(recorded: Recorded) -> bool:
    return recorded.hook.startswith((DELIVERED, SUPERSEDED))


def _promote(
    client: "MlflowClient",
    model_name: str,
    version: str,
    reason: str,
    override: str,
    params: Profile,
    rights: ServerRights | None,
    entries: Sequence[Recorded],
) -> Outcome:
    champion = ledger.champion_of(entries)
    if champion == version:
        recorded = ledger.was_champion(entries, version)
        assert recorded is not None
        return Outcome(recorded, f"version {version} is the champion already; nothing to do")
    _, ruling = _ruling(client, model_name, version, params, entries, server_time(client))
    if objections := ruling.objections(override):
        remedy = (
            "no override helps: mend that, or promote another version"
            if ruling.refusals
            else "if it shall be the champion all the same, give --override with the reason"
        )
        raise GateNotPassed(
            f"version {version} of {model_name} may not be promoted: {'; '.join(objections)}; {remedy}. "
            f"The champion stays {_version(champion)}"
        )
    mark = f" [entry {_next_index(entries)} at {server_time(client).isoformat(timespec='seconds')}]"
    wanted = {OVERRIDE: override, REASON: reason}
    if rights is None:
        wanted[CLAIMED_BY] = f"{user_name()}@{socket.gethostname()} (command line)"
    request = {name: f"{value}{mark}" if value else "" for name, value in wanted.items()}
    _request_promotion(client, model_name, version, request)
    return _await_entry(client, model_name, version, params, rights, len(entries), request)


def _request_promotion(client: "MlflowClient", model_name: str, version: str, request: Mapping[str, str]) -> None:
    """The alias is set, after the tags that say why; what an earlier request left there is gone.

    Where it fails before the alias is set, the tags are gone again, as far as the server lets us.
    """
    try:
        found = version_by_number(client, model_name, version)
        tags = {} if found is None else found.tags
        for name, value in request.items():
            if value and tags.get(name) != value:
                client.set_model_version_tag(model_name, version, name, value)
            elif not value and name in tags:
                client.delete_model_version_tag(model_name, version, name)
        client.set_registered_model_alias(model_name, CHAMPION, version)
    except Exception:
        # An answer may be lost, and the alias set all the same: then the tags are what it rests on.
        with suppress(Exception):
            if _alias(client, model_name) != version:
                _withdraw(client, model_name, version, request)
        raise


def _withdraw(client: "MlflowClient", model_name: str, version: str, request: Mapping[str, str]) -> None:
    """The tags of our own request are gone; those of somebody else stay."""
    found = version_by_number(client, model_name, version)
    for name, value in request.items():
        if found is not None and value and found.tags.get(name) == value:
            client.delete_model_version_tag(model_name, version, name)


def _in_line(
    client: "MlflowClient", model_name: str, params: Profile, rights: ServerRights | None
) -> Sequence[Recorded]:
    """The ledger, after all that was changed before is in it."""
    deadline = time.monotonic() + PROMOTER_WAIT_S
    while True:
        entries, alias = _ledger_and_alias(client, model_name, params, rights)
        if ledger.champion_of(entries) == alias:
            return entries
        _wait(deadline, f"the alias 'champion' of {model_name} was changed before, so nothing was done now")


def _await_entry(
    client: "MlflowClient",
    model_name: str,
    version: str,
    params: Profile,
    rights: ServerRights | None,
    n_before: int,
    request: Mapping[str, str],
) -> Outcome:
    """What became of the request, after the first `n_before` entries."""
    deadline = time.monotonic() + PROMOTER_WAIT_S
    while True:
        entries, alias = _ledger_and_alias(client, model_name, params, rights)
        own = [one for one in entries[n_before:] if one.entry.version == version and one.entry.action != "removed"]
        if own and own[-1].entry.action == "refused":
            raise GateNotPassed(f"version {version} of {model_name} was refused: {own[-1].entry.reason}")
        if own:
            return Outcome(own[-1], _told(own[-1]))
        if alias != version and alias == ledger.champion_of(entries):
            _withdraw(client, model_name, version, request)
            raise UserError(
                f"somebody else set the champion of {model_name} to {_version(alias)} before version {version} was "
                "recorded; look at 'braintumor history', then promote again if it is still right"
            )
        _wait(deadline, f"the alias 'champion' of {model_name} is set to version {version}")


def _ledger_and_alias(
    client: "MlflowClient", model_name: str, params: Profile, rights: ServerRights | None
) -> tuple[Sequence[Recorded], str | None]:
    """Ledger and alias, brought into line by us where the server lets us."""
    if rights is None or rights.may_record:
        try:
            _, entries = _reconcile(client, model_name, params, UNKNOWN_USER, None)
            return entries, ledger.champion_of(entries)
        except Exception as error:
            if error_code(error) not in REFUSED_CODES:
                raise
    return ledger.read(client, model_name), _alias(client, model_name)


def _wait(deadline: float, fact: str) -> None:
    if time.monotonic() > deadline:
        raise UserError(
            f"{fact}, but no promoter has recorded it within {PROMOTER_WAIT_S:.0f} s; it does so as soon as it runs: "
            "start 'braintumor promoter' with an account that may write the ledger, or look at its log"
        )
    time.sleep(POLL_S)


def _reviewers_rights() -> ServerRights | None:
    """The rights at a server that has our plugin; None at every other. Raises UserError for somebody who has none."""
    rights = server_rights()
    if rights is not None and REVIEWER not in rights.roles:
        raise UserError(
            f"{rights.user} may not set the alias 'champion': that takes the role '{REVIEWER}'; nothing was changed. "
            "Ask the server's administrator for it, or a reviewer to promote the version"
        )
    return rights


def _asking(model_name: str) -> Any:
    if holds_nothing_yet():
        raise UnknownVersion(f"MLflow has no {model_name} yet; run the pipeline first ('dvc repro')")
    return connected()


def _alias(client: "MlflowClient", model_name: str) -> str | None:
    """The version that the alias 'champion' is set to."""
    try:
        found = client.get_registered_model(model_name).aliases.get(CHAMPION)
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if found is None else str(found)


def _request(tags: Mapping[str, str]) -> dict[str, str]:
    """The request in a version's tags, as the SHA-256 of each."""
    return {name: _sha256(tags[name]) for name in REQUEST if name in tags}


def _claim(tags: Mapping[str, str]) -> str:
    return " ".join(f"{name}={digest}" for name, digest in _request(tags).items())


def _claimed(recorded: Recorded) -> dict[str, str]:
    """What `_claim` wrote, as `_request` gives it."""
    return dict(part.split("=", 1) for part in recorded.entry.claim.split() if "=" in part)


def _told(recorded: Recorded) -> str:
    entry = recorded.entry
    who = entry.who if entry.who_is_known else f"{entry.who} (not checked)"
    if entry.action == "refused":
        return f"version {entry.version} was refused, set by {who}: {entry.reason}; champion: {_version(entry.after)}"
    change = f"champion {_version(entry.before)} -> {_version(entry.after)}"
    override = f"; override: {entry.override}" if entry.override else ""
    what = (
        f"the champion was rolled back to version {entry.version}"
        if entry.action == "rolled back"
        else f"version {entry.version} was {entry.action}"
    )
    return f"{what} by {who}: {entry.reason}{override}; {change}"


def _checked_text(option: str, text: str, *, may_be_empty: bool = False) -> str:
    """The text on one line."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    if (not line and (text or not may_be_empty)) or len(line) > MAX_TEXT_CHARACTERS:
        raise UserError(
            f"--{option} has {len(line)} characters; say in 1 to {MAX_TEXT_CHARACTERS} why, for those who read "
            "the ledger later"
        )
    return line


def _version(number: str | None) -> str:
    return "none" if number is None else f"version {number}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
