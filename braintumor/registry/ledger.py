"""The record of promotions: a chain of MLflow runs that grows at its end alone, and shows every change made to it.

MLflow lets a run's parameter be logged once, and refuses a second value: of all who name the successor of a run at the
same time, one wins. Each entry holds the hash of the one before it (Haber and Stornetta, J. Cryptology 3 (1991),
doi:10.1007/BF00196791). The order is the chain's; the times in it are what the writers' clocks said.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import quote

from braintumor.errors import UserError
from braintumor.registry.server import CHAMPION, SERVER, error_code, spelled_alike

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

Action = Literal["promoted", "rolled back", "removed", "refused"]

# The parameters of an entry's run; MLflow lets nobody change them.
ENTRY, ENTRY_SHA256, NEXT = "entry", "entry_sha256", "next"
# The tags of the experiment: its first run, and the model whose ledger it is.
ROOT, LEDGER_OF = "ledger.root", "ledger.of"
# The tags of a run that are no display: the run before it, and how the deployment went.
PREVIOUS, HOOK = "previous", "hook"
# The status of a run whose entry is closed.
CLOSED = "FINISHED"
# The tag of a version: its last entry, as `entry_tag` writes it.
VERSION_ENTRY = "promotion.entry"
NOTE, RUN_NAME = "mlflow.note.content", "mlflow.runName"

# Limits of MLflow: of a parameter's value, of a tag's.
MAX_ENTRY_LENGTH, MAX_TAG_LENGTH = 6000, 8000
# What is cut where an entry gets too long, ever shorter; digests and hashes fit in 130.
FREE_TEXTS = ("who", "reason", "override", "comparison")
TEXT_LIMITS = (6000, 3000, 1500, 700, 300, 100)
OTHER_LIMIT = 130
CUT = " [...]"
RUNS_PER_PAGE = 1000
# Stores that refuse a second value of a parameter also if it comes at the same time; folders do not.
KEEPERS = (*SERVER, "sqlite", "postgresql", "mysql", "mssql")

EXPERIMENT_NOTE = (
    "Each run is one entry of the record of promotions, the newest first: which version became the champion, or was "
    "refused, by whom and why. A run that is still running is an entry whose consequences are being carried out. "
    "Edit and delete nothing here: `braintumor history --verify` finds it."
)


@dataclass(frozen=True)
class Entry:
    """One change of the champion, or one that was refused.

    `version` is the one it is about; of a removal, the one that was champion. `before` and `after` are the champions;
    those of a refusal are equal, and its `reason` says why. `override` is the reason given for one, "" if there was
    none. `comparison` is the verdict, or "". `claim` has the SHA-256 of each tag of the request it came from.
    """

    index: int
    action: Action
    version: str | None
    before: str | None
    after: str | None
    who: str
    who_is_known: bool
    reason: str
    override: str
    comparison: str
    time: str
    digests: dict[str, str]
    claim: str
    previous_sha256: str


@dataclass(frozen=True)
class Recorded:
    """An entry in the ledger; `is_open` until all that follows from it is done. `hook`: how the deployment went."""

    entry: Entry
    sha256: str
    run_id: str
    is_open: bool
    hook: str


@dataclass(frozen=True)
class Verification:
    """What is wrong with a ledger, in words; the hash of its last entry, None if there is none; its length."""

    problems: list[str]
    head_sha256: str | None
    n: int


class LedgerMoved(Exception):
    """Somebody else has appended an entry; read the ledger again."""


class LedgerBroken(UserError):
    """The ledger was changed, or a part of it is gone: nothing may be concluded from it."""


def experiment_name(model_name: str) -> str:
    """The MLflow experiment that is the ledger of this model."""
    return f"{model_name} promotions"


def entry_tag(recorded: Recorded) -> str:
    """What a version's tag `promotion.entry` says of its last entry; a ledger that was cut is found by it."""
    return f"{recorded.entry.index} {recorded.sha256}"


def what_happened(entry: Entry) -> str:
    """The entry in three words."""
    return f"{entry.action}{' to' if entry.action == 'rolled back' else ''} {_version(entry.version)}"


def champion_of(entries: Sequence[Recorded]) -> str | None:
    """The champion after the last entry."""
    return entries[-1].entry.after if entries else None


def was_champion(entries: Sequence[Recorded], version: str) -> Recorded | None:
    """The last entry that made this version the champion; None if none did."""
    return next((one for one in reversed(entries) if _is_change(one.entry) and one.entry.after == version), None)


def previous_champion(entries: Sequence[Recorded]) -> str | None:
    """What a rollback goes to: the champion before the last change; None if there was none."""
    return next((one.entry.before for one in reversed(entries) if _is_change(one.entry)), None)


def read(client: "MlflowClient", model_name: str) -> list[Recorded]:
    """The entries, the oldest first; none if there is no ledger yet. Nothing is written.

    Raises LedgerBroken for a chain that does not hold.
    """
    experiment = _find(client, model_name)
    if experiment is None:
        return []
    chain = _follow(client, experiment)
    if chain.problems:
        raise _broken(chain.problems[0])
    return chain.entries


def append(client: "MlflowClient", model_name: str, tail: Recorded | None, entry_facts: Mapping[str, Any]) -> Recorded:
    """The entry follows `tail` (None: it is the first), and is open; the ledger is made if need be.

    `entry_facts` are the fields of Entry but index and previous_sha256; texts that are too long are cut. If it raises
    something else than LedgerMoved, the entry may be in the ledger: read it again.

    Raises LedgerMoved if another entry follows `tail`; then this one is not in the ledger.
    """
    from mlflow.entities import Param

    if tail is None:
        experiment = _begin(client, model_name)
        before = client.get_run(experiment.tags[ROOT])
        index, champion, previous_sha256 = 0, None, _sha256(before.data.params[ENTRY])
    else:
        before = client.get_run(tail.run_id)
        index, champion, previous_sha256 = tail.entry.index, tail.entry.after, tail.sha256
    entry = Entry(**entry_facts, index=index + 1, previous_sha256=previous_sha256)
    entry, text = _fitted(entry)
    contradiction = _contradiction(entry, champion)
    if contradiction:
        raise ValueError(contradiction)
    if NEXT in before.data.params:
        raise LedgerMoved
    run = client.create_run(
        before.info.experiment_id, run_name=_unrecorded_name(entry.index), tags={PREVIOUS: before.info.run_id}
    )
    run_id = run.info.run_id
    sha256 = _sha256(text)
    try:
        client.log_batch(run_id, params=[Param(ENTRY, text), Param(ENTRY_SHA256, sha256)], synchronous=True)
    except Exception:
        # Whoever was faster tidies away what comes too late, perhaps while it is written.
        if NEXT in client.get_run(before.info.run_id).data.params:
            raise LedgerMoved from None
        raise
    if not _becomes_successor(client, before.info.run_id, run_id):
        with suppress(Exception):
            client.delete_run(run_id)
        raise LedgerMoved
    recorded = Recorded(entry, sha256, run_id, is_open=True, hook="")
    _show(client, model_name, recorded)
    return recorded


def close(client: "MlflowClient", recorded: Recorded, hook: str | None) -> None:
    """All that follows from the entry is done; `hook` says how the deployment went, None leaves what it says."""
    if hook is not None:
        set_hook(client, recorded, hook)
    client.set_terminated(recorded.run_id, CLOSED)


def set_hook(client: "MlflowClient", recorded: Recorded, text: str) -> None:
    """The entry tells how its deployment went."""
    _set_tags(client, recorded, {HOOK: _cut(text, MAX_TAG_LENGTH)})


def mend(client: "MlflowClient", model_name: str) -> None:
    """What writers who were killed have left behind is finished, or gone.

    An entry that nobody can record any more, because another one follows its predecessor, is deleted. One that its
    writer may still record stays, however old: a machine can sleep longer than any limit.

    Raises LedgerBroken for a chain that does not hold; then nothing was written.
    """
    experiment = _find(client, model_name)
    if experiment is None:
        return
    chain = _follow(client, experiment)
    if chain.problems:
        raise _broken(chain.problems[0])
    for recorded in chain.entries:
        if _is_undisplayed(chain.runs[recorded.run_id], recorded.entry):
            _show(client, model_name, recorded)
    for run in chain.strangers():
        if chain.is_beaten(run):
            client.delete_run(run.info.run_id)
    for other in _experiments_of(client, model_name):
        if _is_beginning(other, model_name) and other.lifecycle_stage == "active":
            # Whoever made it deletes it, too, perhaps at this moment.
            with suppress(Exception):
                client.delete_experiment(other.experiment_id)


def verify(client: "MlflowClient", model_name: str) -> Verification:
    """Everything that is wrong with the ledger, with how it is shown, and with what refers to it.

    Raises RegistryUnreachable where MLflow does not answer: that says nothing about the ledger.
    """
    try:
        experiment = _find(client, model_name)
    except LedgerBroken as error:
        return Verification([str(error)], None, 0)
    problems, entries = [], []
    if experiment is not None:
        chain = _follow(client, experiment)
        entries = chain.entries
        problems = [*chain.problems, *_display_problems(chain, model_name), *_strangers(chain)]
    problems += _registry_problems(client, model_name, entries)
    return Verification(problems, entries[-1].sha256 if entries else None, len(entries))


@dataclass(frozen=True)
class _Chain:
    """The chain as far as it can be followed, and every run of its experiment, deleted ones too."""

    root: "Run | None"
    entries: list[Recorded]
    problems: list[str]
    runs: "dict[str, Run]"

    def strangers(self) -> "list[Run]":
        """The runs that are not deleted, and no part of the chain."""
        known = {one.run_id for one in self.entries} | ({self.root.info.run_id} if self.root else set())
        return [run for name, run in self.runs.items() if name not in known and run.info.lifecycle_stage == "active"]

    def is_beaten(self, run: "Run") -> bool:
        """Whether another run follows the one that this was to follow: it can't be recorded any more."""
        before = self.runs.get(run.data.tags.get(PREVIOUS, ""))
        return before is not None and before.data.params.get(NEXT, run.info.run_id) != run.info.run_id


def _is_change(entry: Entry) -> bool:
    return entry.before != entry.after


def _broken(problem: str) -> LedgerBroken:
    return LedgerBroken(
        f"the ledger of promotions does not hold: {problem}; see 'braintumor history --verify', "
        "then bring MLflow's database back from a backup"
    )


def _find(client: "MlflowClient", model_name: str) -> "Experiment | None":
    """The ledger's experiment; None only if nothing says that there was one."""
    name = experiment_name(model_name)
    found = client.get_experiment_by_name(name)
    if found is None:
        traces = [*_renamed(client, model_name), *_tagged_versions(client, model_name)]
        found = client.get_experiment_by_name(name)  # made while we looked
        if found is None and traces:
            raise _broken(f"MLflow has no experiment {name!r} any more, but {traces[0]}")
    if found is not None and found.lifecycle_stage != "active":
        raise _broken(f"its experiment {name!r} was deleted")
    if found is not None and not found.tags.get(ROOT):
        raise _broken(f"the experiment {name!r} has no tag {ROOT}")
    return found


def _renamed(client: "MlflowClient", model_name: str) -> Iterator[str]:
    for experiment in _experiments_of(client, model_name):
        if not _is_beginning(experiment, model_name):
            yield f"experiment {experiment.experiment_id}, {experiment.name!r}, is its ledger"


def _tagged_versions(client: "MlflowClient", model_name: str) -> Iterator[str]:
    for number, tag in _entry_tags(client, model_name):
        yield f"version {number} names its entry {tag!r}"


def _experiments_of(client: "MlflowClient", model_name: str) -> "list[Experiment]":
    from mlflow.entities import ViewType

    # The name is compared here: signs in it would lead the filter astray.
    found, token = [], None
    while token != "":
        page = client.search_experiments(
            view_type=ViewType.ALL, filter_string=f"tags.`{LEDGER_OF}` LIKE '%'", page_token=token
        )
        found += page
        token = page.token or ""
    return [experiment for experiment in found if experiment.tags.get(LEDGER_OF) == model_name]


def _is_beginning(experiment: "Experiment", model_name: str) -> bool:
    return str(experiment.name).startswith(f"{experiment_name(model_name)} (beginning ")


def _entry_tags(client: "MlflowClient", model_name: str) -> Iterator[tuple[str, str]]:
    """Number and tag of each version that names an entry."""
    token = None
    while token != "":
        page = client.search_model_versions(f"name = '{model_name}'", page_token=token)
        for version in page:
            if VERSION_ENTRY in version.tags:
                yield str(version.version), version.tags[VERSION_ENTRY]
        token = page.token or ""


def _begin(client: "MlflowClient", model_name: str) -> "Experiment":
    """The ledger's experiment, with its first run; of two who make it at the same time, one wins."""
    from mlflow.entities import Param

    if not client.tracking_uri.startswith(KEEPERS):
        raise UserError(
            "a ledger needs MLflow on a database or a server, for two writers at once; "
            "let MLFLOW_TRACKING_URI name one, as sqlite:///mlflow.db or https://..."
        )
    found = _find(client, model_name)
    if found is not None:
        return found
    name, nonce = experiment_name(model_name), secrets.token_hex(16)
    made = client.create_experiment(f"{name} (beginning {nonce})", tags={LEDGER_OF: model_name, NOTE: EXPERIMENT_NOTE})
    text = json.dumps({"index": 0, "ledger": model_name, "nonce": nonce}, sort_keys=True)
    try:
        root = client.create_run(made, run_name="0000 beginning", tags={NOTE: EXPERIMENT_NOTE}).info.run_id
        client.log_batch(root, params=[Param(ENTRY, text), Param(ENTRY_SHA256, _sha256(text))], synchronous=True)
        client.set_terminated(root, CLOSED)
        client.set_experiment_tag(made, ROOT, root)
        client.rename_experiment(made, name)
    except Exception:
        # Somebody was first, who perhaps has deleted this beginning already; or the answer was lost.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        if found.experiment_id != made:
            with suppress(Exception):
                client.delete_experiment(made)
    found = _find(client, model_name)
    assert found is not None
    return found


def _becomes_successor(client: "MlflowClient", before: str, run_id: str) -> bool:
    """Whether `run_id` follows the run `before`; one run alone can."""
    try:
        client.log_param(before, NEXT, run_id, synchronous=True)
    except Exception:
        # Refused, or the answer was lost: the parameter tells.
        following = client.get_run(before).data.params.get(NEXT)
        if following is None:
            raise
        return bool(following == run_id)
    return True


def _follow(client: "MlflowClient", experiment: "Experiment") -> _Chain:
    """The chain from its first run on; it ends at the first run that can't be read."""
    runs = _all_runs(client, experiment.experiment_id)
    root = _run(client, runs, experiment.tags[ROOT])
    chain = _Chain(root, [], [], runs)
    if root is None:
        chain.problems.append(f"its first run {experiment.tags[ROOT]} is gone")
        return chain
    chain.problems.extend(_run_problems("the beginning", root, experiment))
    text = root.data.params.get(ENTRY, "")
    run, champion, previous_sha256 = root, None, _sha256(text)
    if not _is_beginning_of(text, experiment.tags.get(LEDGER_OF)):
        chain.problems.append(f"its first run {root.info.run_id} is no beginning of this ledger")
        return chain
    while (following := run.data.params.get(NEXT)) is not None:
        index = len(chain.entries) + 1
        place = f"entry {index}"
        found = _run(client, runs, following)
        if found is None:
            chain.problems.append(f"{place} is gone: MLflow has no run {following} any more")
            break
        run = found
        chain.problems.extend(_run_problems(place, run, experiment))
        entry, sha256 = _parsed(run.data.params.get(ENTRY, "")), _sha256(run.data.params.get(ENTRY, ""))
        if entry is None:
            chain.problems.append(f"{place} can't be read, nor what follows it: run {run.info.run_id}")
            break
        # Before anything else: a chain that comes back to an earlier run would never end.
        if entry.index != index:
            chain.problems.append(f"where entry {index} should stand, run {run.info.run_id} says {entry.index}")
            break
        if entry.previous_sha256 != previous_sha256:
            chain.problems.append(f"{place} follows another one than entry {index - 1} as it is now")
        contradiction = _contradiction(entry, champion)
        if contradiction:
            chain.problems.append(f"{place} {contradiction}")
        is_open = run.info.status != CLOSED
        chain.entries.append(Recorded(entry, sha256, run.info.run_id, is_open, run.data.tags.get(HOOK, "")))
        champion, previous_sha256 = entry.after, sha256
    return chain


def _all_runs(client: "MlflowClient", experiment_id: str) -> "dict[str, Run]":
    from mlflow.entities import ViewType

    runs: dict[str, Run] = {}
    token = None
    while token != "":
        page = client.search_runs(
            [experiment_id], run_view_type=ViewType.ALL, max_results=RUNS_PER_PAGE, page_token=token
        )
        runs |= {run.info.run_id: run for run in page}
        token = page.token or ""
    return runs


def _run(client: "MlflowClient", runs: "dict[str, Run]", run_id: str) -> "Run | None":
    """The run of this id, also if it is younger than `runs`, which then hold it, or of another experiment."""
    if run_id not in runs:
        try:
            found = client.get_run(run_id)
        except Exception as error:
            if error_code(error) not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            return None
        runs[run_id] = found
    return runs[run_id]


def _run_problems(place: str, run: "Run", experiment: "Experiment") -> Iterator[str]:
    if run.info.experiment_id != experiment.experiment_id:
        yield f"{place} is run {run.info.run_id} of another experiment"
    if run.info.lifecycle_stage != "active":
        yield f"{place} was deleted: run {run.info.run_id}"
    if run.data.params.get(ENTRY_SHA256) != _sha256(run.data.params.get(ENTRY, "")):
        yield f"{place} was changed: it does not have its hash, run {run.info.run_id}"


def _contradiction(entry: Entry, champion: str | None) -> str | None:
    """What can't be true of an entry, where `champion` was the champion before it."""
    if entry.before != champion:
        return f"says that {_version(entry.before)} was champion before it; it was {_version(champion)}"
    is_possible = {
        "promoted": entry.after == entry.version != entry.before and entry.version is not None,
        "rolled back": entry.after == entry.version != entry.before and entry.version is not None,
        "removed": entry.before == entry.version and entry.before is not None and entry.after is None,
        "refused": entry.after == entry.before,
    }
    if not is_possible[entry.action]:
        return (
            f"says {entry.action!r} of {_version(entry.version)}, with {_version(entry.before)} as champion before "
            f"and {_version(entry.after)} after"
        )
    return None


def _fitted(entry: Entry) -> tuple[Entry, str]:
    """The entry and its text, short enough for MLflow."""
    digests = {
        _cut(_printable(name), OTHER_LIMIT): _cut(_printable(value), OTHER_LIMIT)
        for name, value in entry.digests.items()
    }
    texts = {name: _printable(getattr(entry, name)) for name in FREE_TEXTS}
    for limit in TEXT_LIMITS:
        changes: dict[str, Any] = {name: _cut(text, limit) for name, text in texts.items()}
        entry = replace(entry, digests=digests, **changes)
        text = _text(entry)
        if len(text) <= MAX_ENTRY_LENGTH:
            return entry, text
    raise ValueError(f"an entry of {len(text)} characters without its texts")


def _printable(text: str) -> str:
    """One line without what a screen does not show: control characters, and those that turn the writing around."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


def _text(entry: Entry) -> str:
    # ASCII: the same bytes, and the same length, in every database.
    return json.dumps(asdict(entry), sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_beginning_of(text: str, model_name: str | None) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("index") == 0 and found.get("ledger") == model_name


def _parsed(text: str) -> Entry | None:
    """The entry that this is the text of; None if it is not exactly one."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(Entry)}:
        return None
    texts = ("who", "reason", "override", "comparison", "time", "claim", "previous_sha256")
    is_sound = (
        type(values["index"]) is int
        and values["action"] in get_args(Action)
        and all(values[name] is None or isinstance(values[name], str) for name in ("version", "before", "after"))
        and isinstance(values["who_is_known"], bool)
        and all(isinstance(values[name], str) for name in texts)
        and isinstance(values["digests"], dict)
        and all(isinstance(value, str) for value in values["digests"].values())
    )
    return Entry(**values) if is_sound else None


def _version(number: str | None) -> str:
    return "no version" if number is None else f"version {number}"


def _unrecorded_name(index: int) -> str:
    return f"{index:04} not recorded yet"


def _show(client: "MlflowClient", model_name: str, recorded: Recorded) -> None:
    """The run tells a reader what it is; until the entry is recorded it must not look like one."""
    _set_tags(client, recorded, _display(recorded, model_name))


def _set_tags(client: "MlflowClient", recorded: Recorded, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for is_last in (False, False, True):
        try:
            client.log_batch(recorded.run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
            return
        except Exception as error:
            # Of two who set a tag for the first time at once MLflow fails one; the next time it is there.
            if is_last or error_code(error) != "BAD_REQUEST":
                raise


def _display(recorded: Recorded, model_name: str) -> dict[str, str]:
    """Name and tags of an entry's run, as MLflow's pages show them."""
    entry = recorded.entry
    tags = {
        RUN_NAME: f"{entry.index:04} {what_happened(entry)}",
        "action": entry.action,
        "version": entry.version or "none",
        "champion_before": entry.before or "none",
        "champion_after": entry.after or "none",
        "who": entry.who if entry.who_is_known else f"{entry.who} (not checked)",
        "reason": entry.reason or "none given",
        "override": entry.override or "none",
        "comparison": entry.comparison or "none",
        "time": entry.time,
        NOTE: _note(recorded, model_name),
    }
    return {name: _cut(value, MAX_TAG_LENGTH) for name, value in tags.items()}


def _note(recorded: Recorded, model_name: str) -> str:
    """The entry as a page in Markdown."""
    entry = recorded.entry
    version = _link(model_name, entry.version)
    what = {
        "promoted": f"Promoted: {version} is the champion from here on.",
        "rolled back": f"Rolled back: {version} is the champion again.",
        "removed": f"Removed: {version} is champion no more, and no other version is.",
        "refused": f"Refused: {version}; the champion stays {_link(model_name, entry.before)}.",
    }[entry.action]
    checked = "" if entry.who_is_known else " (not checked by the server)"
    rows = {
        "Why it was refused" if entry.action == "refused" else "Reason": _escaped(entry.reason) or "none given",
        "By": _escaped(entry.who) + checked,
        "Time": _escaped(entry.time),
        "Champion before": _link(model_name, entry.before),
        "Champion after": _link(model_name, entry.after),
        "Compared with the champion before": _escaped(entry.comparison) or "not compared",
        "Override": _escaped(entry.override) or "none",
        **{_escaped(name): f"`{value.replace('`', '')}`" for name, value in sorted(entry.digests.items())},
        "This entry": f"{entry.index}, SHA-256 `{recorded.sha256}`",
        "The entry before": f"SHA-256 `{entry.previous_sha256}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"**{what}**\n\n| | |\n|---|---|\n{table}\n\n"
        "The parameter `entry` is the record; this page and the tags repeat it, and `braintumor history --verify` "
        "finds whatever was changed."
    )


def _link(model_name: str, version: str | None) -> str:
    if version is None:
        return "no version"
    return f"[version {_escaped(version)}](#/models/{quote(model_name, safe='')}/versions/{quote(version, safe='')})"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it stands: no link, picture or element can be smuggled into it."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|~$-])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _is_undisplayed(run: "Run", entry: Entry) -> bool:
    """Whether the writer of an entry was killed before its run told what it is."""
    return run.info.run_name == _unrecorded_name(entry.index) and "action" not in run.data.tags


def _display_problems(chain: _Chain, model_name: str) -> Iterator[str]:
    for recorded in chain.entries:
        run = chain.runs[recorded.run_id]
        if recorded.is_open and _is_undisplayed(run, recorded.entry):
            continue
        shown = {**run.data.tags, RUN_NAME: run.info.run_name}
        for name, value in _display(recorded, model_name).items():
            if shown.get(name) != value:
                what = {RUN_NAME: "name", NOTE: "description"}.get(name, f"tag {name!r}")
                yield (
                    f"entry {recorded.entry.index} is shown otherwise than it is recorded: its {what} was changed, "
                    f"run {recorded.run_id}"
                )


def _strangers(chain: _Chain) -> Iterator[str]:
    """Runs in the ledger's experiment that are neither entries nor what a killed writer leaves."""
    tail = (chain.entries[-1].run_id if chain.entries else chain.root.info.run_id) if chain.root else None
    for run in chain.strangers():
        is_left_over = run.data.tags.get(PREVIOUS) == tail or chain.is_beaten(run)
        if not is_left_over or not str(run.info.run_name).endswith(" not recorded yet"):
            yield f"run {run.info.run_id}, {str(run.info.run_name)[:80]!r}, stands among the entries and is none"


def _registry_problems(client: "MlflowClient", model_name: str, entries: Sequence[Recorded]) -> Iterator[str]:
    """What the registered model says, and the ledger does not."""
    by_tag = {entry_tag(one): one for one in entries}
    for number, tag in _entry_tags(client, model_name):
        if tag not in by_tag:
            yield f"version {number} names the entry {tag[:100]!r}, which the ledger does not hold"
        elif number not in (by_tag[tag].entry.version, by_tag[tag].entry.before):
            yield f"version {number} names entry {by_tag[tag].entry.index}, which is about another version"
    try:
        aliases = client.get_registered_model(model_name).aliases
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        aliases = {}
    champion = str(aliases[CHAMPION]) if CHAMPION in aliases else None
    if champion != champion_of(entries):
        yield (
            f"the alias '{CHAMPION}' is set to {_version(champion)}, the ledger's champion is "
            f"{_version(champion_of(entries))}; 'braintumor promoter --once' brings them together"
        )
    for alias in spelled_alike(aliases):
        yield f"there is an alias {alias!r}, which readers take for '{CHAMPION}'; remove it"
