import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from braintumor.errors import RegistryUnreachable, UserError
from braintumor.registry import ledger
from braintumor.registry.ledger import Entry, LedgerBroken, LedgerMoved, Recorded
from braintumor.registry.server import connected

NAME = "brain-tumor-phantoms"
DIGESTS = {"model_digest": "a" * 64, "data_md5": "d" * 32, "decision_sha256": "b" * 64}


@pytest.fixture
def client(store: Path) -> Iterator[MlflowClient]:
    with connected() as client:
        yield client


def facts(action: str, version: str | None, before: str | None, **changes: Any) -> dict[str, Any]:
    after = {"removed": None, "refused": before}.get(action, version)
    known: dict[str, Any] = dict(
        action=action, version=version, before=before, after=after, who="ada", who_is_known=True,
        reason=f"because of {version}", override="", comparison="better", time="2026-01-02T03:04:05+00:00",
        digests={} if action == "removed" else DIGESTS, claim="c" * 64,
    )  # fmt: skip
    return known | changes


def extend(client: MlflowClient, action: str, version: str | None, **changes: Any) -> Recorded:
    """Append to the ledger as it is now."""
    entries = ledger.read(client, NAME)
    tail = entries[-1] if entries else None
    return ledger.append(client, NAME, tail, facts(action, version, ledger.champion_of(entries), **changes))


@pytest.fixture(scope="module")
def four_in_database(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Recorded]]:
    """A database with a ledger of four closed entries."""
    file = Path(shutil.copy(migrated_database, tmp_path_factory.mktemp("ledger")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        with connected() as client:
            for action, version in [("promoted", "1"), ("refused", "3"), ("promoted", "2"), ("rolled back", "1")]:
                ledger.close(client, extend(client, action, version), "not configured")
            return file, ledger.read(client, NAME)


@pytest.fixture
def four(store: Path, four_in_database: tuple[Path, list[Recorded]]) -> list[Recorded]:
    """The entries of a ledger of four, in the store."""
    file, entries = four_in_database
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(store)) as target:
        source.backup(target)
    return entries


def problems(client: MlflowClient) -> list[str]:
    """What `verify` finds; the alias, which no promoter sets in these tests, aside."""
    return [one for one in ledger.verify(client, NAME).problems if "alias 'champion'" not in one]


def experiment_of(client: MlflowClient) -> Any:
    return client.get_experiment_by_name(ledger.experiment_name(NAME))


def all_runs(client: MlflowClient, view: int = ViewType.ACTIVE_ONLY) -> list[Any]:
    return list(client.search_runs([experiment_of(client).experiment_id], run_view_type=view))


def change(database: Path, statement: str, *values: Any) -> None:
    """As somebody with the database's password could."""
    with closing(sqlite3.connect(database)) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


def set_param(database: Path, run_id: str, key: str, value: str) -> None:
    change(database, "UPDATE params SET value = ? WHERE run_uuid = ? AND key = ?", value, run_id, key)


# Reading and appending


def test_without_a_ledger_there_are_no_entries_and_reading_makes_none(client: MlflowClient, store: Path) -> None:
    before = store.read_bytes()
    assert ledger.read(client, NAME) == []
    assert ledger.verify(client, NAME) == ledger.Verification([], None, 0)
    ledger.mend(client, NAME)
    assert store.read_bytes() == before


def test_entries_come_back_in_order_each_with_the_hash_of_the_one_before(
    client: MlflowClient, four: list[Recorded]
) -> None:
    assert [one.entry.index for one in four] == [1, 2, 3, 4]
    assert [(one.entry.action, one.entry.version) for one in four] == [
        ("promoted", "1"), ("refused", "3"), ("promoted", "2"), ("rolled back", "1")
    ]  # fmt: skip
    for before, after in pairwise(four):
        assert after.entry.previous_sha256 == before.sha256
    assert four[0].entry == Entry(
        **facts("promoted", "1", None), index=1, previous_sha256=four[0].entry.previous_sha256
    )
    assert ledger.verify(client, NAME).head_sha256 == four[-1].sha256
    assert ledger.verify(client, NAME).n == 4
    assert problems(client) == []


def test_what_append_returns_is_what_is_read(client: MlflowClient) -> None:
    recorded = extend(client, "promoted", "1")
    assert ledger.read(client, NAME) == [recorded]
    assert recorded.is_open and recorded.hook == ""


def test_an_entry_is_open_until_it_is_closed(client: MlflowClient) -> None:
    first, second = extend(client, "promoted", "1"), extend(client, "promoted", "2")
    ledger.set_hook(client, first, "failing: no answer")
    ledger.close(client, second, "delivered 2026-01-02T03:04:06+00:00")
    assert [(one.is_open, one.hook) for one in ledger.read(client, NAME)] == [
        (True, "failing: no answer"), (False, "delivered 2026-01-02T03:04:06+00:00")
    ]  # fmt: skip
    ledger.close(client, first, None)
    ledger.close(client, first, None)
    assert [(one.is_open, one.hook) for one in ledger.read(client, NAME)[:1]] == [(False, "failing: no answer")]


def test_the_champion_is_what_the_last_entry_left(client: MlflowClient, four: list[Recorded]) -> None:
    assert ledger.champion_of([]) is None
    assert [ledger.champion_of(four[: n + 1]) for n in range(4)] == ["1", "1", "2", "1"]
    ledger.close(client, extend(client, "removed", "1"), None)
    assert ledger.champion_of(ledger.read(client, NAME)) is None


def test_the_previous_champion_is_the_one_before_the_last_change(client: MlflowClient, four: list[Recorded]) -> None:
    assert ledger.previous_champion([]) is None
    assert [ledger.previous_champion(four[: n + 1]) for n in range(4)] == [None, None, "1", "2"]
    extend(client, "removed", "1")
    assert ledger.previous_champion(ledger.read(client, NAME)) == "1"


def test_a_version_was_champion_if_an_entry_made_it_so(four: list[Recorded]) -> None:
    assert ledger.was_champion(four, "1") == four[3]
    assert ledger.was_champion(four[:3], "1") == four[0]
    assert ledger.was_champion(four, "2") == four[2]
    assert ledger.was_champion(four, "3") is None


def test_two_models_have_two_ledgers(client: MlflowClient, four: list[Recorded]) -> None:
    ledger.append(client, "other", None, facts("promoted", "7", None))
    assert len(ledger.read(client, "other")) == 1
    assert ledger.read(client, NAME) == four
    assert problems(client) == []


def test_a_model_may_have_any_name_that_mlflow_takes(client: MlflowClient) -> None:
    name = "100%_good \u00e9"
    ledger.append(client, name, None, facts("promoted", "7", None))
    ledger.mend(client, name)
    assert len(ledger.read(client, name)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        facts("promoted", "2", None),  # version 1 is champion
        facts("promoted", "1", "1"),
        facts("promoted", "2", "1", after="3"),
        facts("removed", "2", "1"),
        facts("refused", "2", "1", after="2"),
    ],
)
def test_an_entry_that_contradicts_the_ledger_is_not_written(client: MlflowClient, wrong: dict[str, Any]) -> None:
    first = extend(client, "promoted", "1")
    with pytest.raises(ValueError):
        ledger.append(client, NAME, first, wrong)
    assert ledger.read(client, NAME) == [first]
    assert len(all_runs(client)) == 2


def test_clocks_that_go_backwards_change_no_order(client: MlflowClient) -> None:
    for year, version in ((2031, "1"), (2026, "2"), (1999, "3")):
        run = extend(client, "promoted", version, time=f"{year}-01-02T03:04:05+00:00").run_id
        change(
            Path("mlflow.db"), "UPDATE runs SET start_time = ? WHERE run_uuid = ?", (year - 1970) * 31_000_000_000, run
        )
    assert [one.entry.version for one in ledger.read(client, NAME)] == ["1", "2", "3"]
    assert problems(client) == []


def test_many_entries_are_read_over_several_pages(
    client: MlflowClient, four: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "RUNS_PER_PAGE", 2)
    assert ledger.read(client, NAME) == four
    assert problems(client) == []


def test_texts_too_long_for_mlflow_are_cut_and_digests_are_not(client: MlflowClient) -> None:
    recorded = extend(
        client, "promoted", "1", reason="\u8d8a" * 9000, override="o" * 9000, who="w" * 9000, comparison="c" * 9000
    )
    assert ledger.read(client, NAME) == [recorded]
    run = client.get_run(recorded.run_id)
    assert 3000 < len(run.data.params["entry"]) <= 6000
    assert recorded.entry.digests == DIGESTS
    for text in (recorded.entry.reason, recorded.entry.override, recorded.entry.who, recorded.entry.comparison):
        assert len(text) > 90 and text.endswith("[...]")
    assert problems(client) == []


def test_a_digest_that_is_no_digest_does_not_stop_the_ledger(client: MlflowClient) -> None:
    recorded = extend(client, "refused", "1", digests={"model_digest": "x" * 100_000, "data_md5": "d" * 32})
    assert ledger.read(client, NAME) == [recorded]
    assert recorded.entry.digests["data_md5"] == "d" * 32


def test_odd_letters_are_kept_and_what_no_screen_shows_is_not(client: MlflowClient) -> None:
    recorded = extend(
        client, "promoted", "1", reason=" \u00fcber\x00all\n\u202egood \ud800 \U0001f9e0 ", who="Ad\u00e8le\t"
    )
    assert (recorded.entry.reason, recorded.entry.who) == ("\u00fcber all good \U0001f9e0", "Ad\u00e8le")
    assert ledger.read(client, NAME) == [recorded]
    assert problems(client) == []


def test_a_store_of_files_can_keep_no_ledger(no_store: Path) -> None:
    with pytest.raises(UserError, match="needs MLflow on a database or a server"):
        ledger.append(MlflowClient("databricks"), NAME, None, facts("promoted", "1", None))


# What MLflow's pages show


def test_a_list_of_runs_tells_the_story_by_names_and_tags(client: MlflowClient, four: list[Recorded]) -> None:
    runs = sorted(all_runs(client), key=lambda run: str(run.info.run_name))
    assert [run.info.run_name for run in runs] == [
        "0000 beginning", "0001 promoted version 1", "0002 refused version 3", "0003 promoted version 2",
        "0004 rolled back to version 1",
    ]  # fmt: skip
    tags = runs[3].data.tags
    told = ("action", "version", "champion_before", "champion_after", "who", "reason", "override", "comparison", "hook")
    assert [tags[name] for name in told] == [
        "promoted", "2", "1", "2", "ada", "because of 2", "none", "better", "not configured"
    ]  # fmt: skip
    assert all(run.info.status == "FINISHED" for run in runs)


def test_the_page_of_an_entry_shows_texts_as_they_are_and_leads_to_the_version(client: MlflowClient) -> None:
    recorded = extend(
        client, "promoted", "1", reason="[see](http://bad) <img src=x> | *bold*", who="ada", who_is_known=False
    )
    run = client.get_run(recorded.run_id)
    note = run.data.tags["mlflow.note.content"]
    assert r"| Reason | \[see\]\(http://bad\) &lt;img src=x> \| \*bold\* |" in note
    assert note.startswith(f"**Promoted: [version 1](#/models/{NAME}/versions/1) is the champion from here on.**")
    assert recorded.sha256 in note and DIGESTS["model_digest"] in note
    assert "ada (not checked by the server)" in note
    assert run.data.tags["who"] == "ada (not checked)"


# Two writers at once


def test_of_two_entries_after_the_same_one_the_second_is_refused_and_leaves_nothing(
    client: MlflowClient, four: list[Recorded]
) -> None:
    ledger.append(client, NAME, four[-1], facts("promoted", "5", "1"))
    runs = len(all_runs(client, ViewType.ALL))
    with pytest.raises(LedgerMoved):
        ledger.append(client, NAME, four[-1], facts("promoted", "6", "1"))
    with pytest.raises(LedgerMoved):
        ledger.append(client, NAME, None, facts("promoted", "6", None))
    assert [one.entry.version for one in ledger.read(client, NAME)] == ["1", "3", "2", "1", "5"]
    assert len(all_runs(client, ViewType.ALL)) == runs


class Interposed:
    """A client of which one call is preceded or followed by something else."""

    def __init__(self, client: MlflowClient, at: int | str, act: Callable[[], None], *, after: bool = False) -> None:
        self.client, self.at, self.act, self.after = client, at, act, after
        self.writes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not callable(found) or name.startswith(("get_", "search_")):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self.writes.append(name)
            is_here = self.at in (name, len(self.writes) - 1)
            if is_here and not self.after:
                self.act()
            answer = found(*arguments, **named)
            if is_here and self.after:
                self.act()
            return answer

        return call


def test_who_loses_between_making_the_run_and_naming_it_deletes_it(client: MlflowClient, four: list[Recorded]) -> None:
    def other() -> None:
        ledger.append(client, NAME, four[-1], facts("promoted", "5", "1"))

    slow: Any = Interposed(client, "log_param", other)
    with pytest.raises(LedgerMoved):
        ledger.append(slow, NAME, four[-1], facts("promoted", "6", "1"))
    assert [one.entry.version for one in ledger.read(client, NAME)][4:] == ["5"]
    assert len(all_runs(client)) == 6
    assert problems(client) == []


class LostAnswer(Exception):
    pass


def test_an_answer_that_is_lost_on_its_way_back_makes_no_second_entry(
    client: MlflowClient, four: list[Recorded]
) -> None:
    def lose() -> None:
        raise LostAnswer

    deaf: Any = Interposed(client, "log_param", lose, after=True)
    recorded = ledger.append(deaf, NAME, four[-1], facts("promoted", "5", "1"))
    assert ledger.read(client, NAME) == [*four, recorded]
    silent: Any = Interposed(client, "log_param", lose)
    with pytest.raises(LostAnswer):
        ledger.append(silent, NAME, recorded, facts("promoted", "6", "5"))
    assert ledger.read(client, NAME) == [*four, recorded]


def test_of_two_who_begin_the_ledger_at_once_one_wins(client: MlflowClient) -> None:
    def other() -> None:
        ledger.append(client, NAME, None, facts("promoted", "1", None))

    slow: Any = Interposed(client, "rename_experiment", other)
    with pytest.raises(LedgerMoved):
        ledger.append(slow, NAME, None, facts("promoted", "2", None))
    assert [one.entry.version for one in ledger.read(client, NAME)] == ["1"]
    assert [experiment.name for experiment in client.search_experiments()] == [ledger.experiment_name(NAME), "Default"]


WRITER = """
import sys, time
from pathlib import Path
from braintumor.registry import ledger
from braintumor.registry.server import connected
name, writer, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with connected() as client:
    ledger.read(client, name)
    Path(f"ready-{writer}").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    for number in range(count):
        while True:
            entries = ledger.read(client, name)
            before = ledger.champion_of(entries)
            facts = dict.fromkeys(("who", "reason", "override", "comparison", "time", "claim"), "")
            facts |= dict(action="promoted", version=writer + str(number), before=before, after=writer + str(number))
            facts |= dict(who_is_known=True, digests={})
            try:
                ledger.append(client, name, entries[-1] if entries else None, facts)
                break
            except ledger.LedgerMoved:
                ledger.mend(client, name)
"""


@pytest.mark.timeout(120)
def test_processes_that_begin_and_extend_one_ledger_at_once_lose_and_double_nothing(
    client: MlflowClient, tmp_path: Path
) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, NAME, writer, "4"], cwd=tmp_path, stderr=subprocess.PIPE)
        for writer in "123"
    ]
    while not all((tmp_path / f"ready-{writer}").exists() for writer in "123"):
        assert all(writer.poll() is None for writer in writers)
        threading.Event().wait(0.05)
    (tmp_path / "go").touch()
    for writer in writers:
        _, errors = writer.communicate(timeout=100)
        assert writer.returncode == 0, errors.decode()[-2000:]
    entries = ledger.read(client, NAME)
    assert sorted(str(one.entry.version) for one in entries) == sorted(f"{w}{n}" for w in "123" for n in range(4))
    ledger.mend(client, NAME)
    assert problems(client) == []
    assert len(all_runs(client)) == 13
    assert len(client.search_experiments()) == 2


def test_threads_after_the_same_entry_get_it_once(client: MlflowClient, four: list[Recorded]) -> None:
    start = threading.Barrier(6)

    def attempt(number: int) -> Recorded | None:
        start.wait()
        try:
            return ledger.append(client, NAME, four[-1], facts("promoted", str(10 + number), "1"))
        except LedgerMoved:
            return None

    with ThreadPoolExecutor(6) as pool:
        won = [one for one in pool.map(attempt, range(6)) if one is not None]
    assert len(won) == 1
    assert ledger.read(client, NAME) == [*four, *won]
    assert len(all_runs(client)) == 6


# A writer who is killed


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def test_wherever_a_writer_is_killed_the_ledger_holds_and_goes_on(client: MlflowClient) -> None:
    seen, number = set(), 0
    while True:
        name = f"model {number}"
        dying: Any = Interposed(client, number, kill, after=True)
        try:
            ledger.append(dying, name, None, facts("promoted", "1", None))
            break
        except Killed:
            seen.add(dying.writes[-1])
        found = ledger.read(client, name)
        ledger.mend(client, name)
        assert ledger.read(client, name) == found
        again = ledger.append(
            client, name, found[-1] if found else None, facts("promoted", "9", "1" if found else None)
        )
        ledger.mend(client, name)
        assert [one.entry.version for one in ledger.read(client, name)] == (["1", "9"] if found else ["9"])
        ledger.close(client, again, None)
        said = ledger.verify(client, name).problems
        assert all("alias 'champion'" in one for one in said), (number, said)
        names = [
            run.info.run_name
            for run in client.search_runs([client.get_experiment_by_name(f"{name} promotions").experiment_id])
        ]
        assert len(names) == len(found) + 2 and not any("not recorded" in one for one in names), names
        number += 1
    assert seen >= {"create_experiment", "rename_experiment", "create_run", "log_batch", "log_param"}
    beginnings = [one.name for one in client.search_experiments() if "beginning" in one.name]
    assert beginnings == []


def test_an_entry_that_may_still_be_recorded_is_left_alone_however_old(
    client: MlflowClient, four: list[Recorded], store: Path
) -> None:
    asleep: Any = Interposed(client, "log_param", kill)
    with pytest.raises(Killed):
        ledger.append(asleep, NAME, four[-1], facts("promoted", "5", "1"))
    (left,) = [run for run in all_runs(client) if "not recorded" in run.info.run_name]
    change(store, "UPDATE runs SET start_time = 0 WHERE run_uuid = ?", left.info.run_id)
    ledger.mend(client, NAME)
    assert client.get_run(left.info.run_id).info.lifecycle_stage == "active"
    assert problems(client) == []
    # The writer wakes up.
    client.log_param(four[-1].run_id, "next", left.info.run_id)
    ledger.mend(client, NAME)
    assert client.get_run(left.info.run_id).info.run_name == "0005 promoted version 5"
    assert ledger.champion_of(ledger.read(client, NAME)) == "5"


def test_an_entry_that_others_closed_before_its_writer_told_of_it_is_shown(client: MlflowClient) -> None:
    dying: Any = Interposed(client, "log_param", kill, after=True)
    with pytest.raises(Killed):
        ledger.append(dying, NAME, None, facts("promoted", "1", None))
    (recorded,) = ledger.read(client, NAME)
    ledger.close(client, recorded, None)
    ledger.mend(client, NAME)
    assert client.get_run(recorded.run_id).info.run_name == "0001 promoted version 1"
    assert problems(client) == []


# Somebody changes the past


def edited(recorded: Recorded, **changes: Any) -> str:
    text = ledger._text(replace(recorded.entry, **changes))
    assert text != ledger._text(recorded.entry)
    return text


def test_an_entry_that_was_changed_is_found(client: MlflowClient, four: list[Recorded], store: Path) -> None:
    set_param(store, four[1].run_id, "entry", edited(four[1], reason="another one"))
    assert any(one.startswith("entry 2 was changed") for one in problems(client))
    for use in (lambda: ledger.read(client, NAME), lambda: ledger.mend(client, NAME)):
        with pytest.raises(LedgerBroken, match="entry 2 was changed"):
            use()
    with pytest.raises(LedgerBroken):
        extend(client, "promoted", "5")


def test_an_entry_that_was_changed_together_with_its_hash_is_found(
    client: MlflowClient, four: list[Recorded], store: Path
) -> None:
    text = edited(four[1], who="eve")
    set_param(store, four[1].run_id, "entry", text)
    set_param(store, four[1].run_id, "entry_sha256", ledger._sha256(text))
    assert any("entry 3 follows another one than entry 2" in one for one in problems(client))
    with pytest.raises(LedgerBroken):
        ledger.read(client, NAME)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "can't be read"),
        ("nonsense", "can't be read"),
        ('{"index": 2}', "can't be read"),
        ("[]", "can't be read"),
        ("null", "can't be read"),
    ],
)
def test_an_entry_that_is_none_is_found(
    client: MlflowClient, four: list[Recorded], store: Path, text: str, said: str
) -> None:
    set_param(store, four[1].run_id, "entry", text)
    assert any(said in one for one in problems(client))
    with pytest.raises(LedgerBroken):
        ledger.read(client, NAME)


@pytest.mark.parametrize(
    "change_of",
    [{"index": True}, {"index": "2"}, {"action": "praised"}, {"version": 3}, {"who_is_known": "yes"}, {"who": None},
     {"digests": []}, {"digests": {"model_digest": 1}}, {"more": "x"}],
)  # fmt: skip
def test_a_field_of_another_kind_is_no_entry(change_of: dict[str, Any]) -> None:
    entry = Entry(**facts("promoted", "1", None), index=1, previous_sha256="f" * 64)
    assert ledger._parsed(json.dumps(asdict(entry))) == entry
    assert ledger._parsed(json.dumps(asdict(entry) | change_of)) is None


def test_a_link_that_was_changed_is_found(client: MlflowClient, four: list[Recorded], store: Path) -> None:
    set_param(store, four[0].run_id, "next", four[2].run_id)
    assert any("where entry 2 should stand" in one for one in problems(client))
    with pytest.raises(LedgerBroken):
        ledger.read(client, NAME)


def test_a_link_that_leads_back_or_nowhere_is_found(client: MlflowClient, four: list[Recorded], store: Path) -> None:
    client.log_param(four[3].run_id, "next", four[1].run_id)
    assert any("where entry 5 should stand" in one for one in problems(client))
    for nowhere in ("0" * 32, "no such/run", ""):
        set_param(store, four[3].run_id, "next", nowhere)
        assert any("entry 5 is gone" in one for one in problems(client)), nowhere
        with pytest.raises(LedgerBroken):
            ledger.read(client, NAME)


def test_a_deleted_entry_is_found_and_holds_again_when_it_is_restored(
    client: MlflowClient, four: list[Recorded]
) -> None:
    for recorded in (four[1], four[3]):
        client.delete_run(recorded.run_id)
        assert problems(client) == [f"entry {recorded.entry.index} was deleted: run {recorded.run_id}"]
        with pytest.raises(LedgerBroken, match="was deleted"):
            ledger.read(client, NAME)
        client.restore_run(recorded.run_id)
    assert ledger.read(client, NAME) == four


def test_an_entry_that_is_gone_for_good_is_found(client: MlflowClient, four: list[Recorded], store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection, connection:
        for table in ("params", "tags", "latest_metrics", "runs"):
            connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (four[1].run_id,))
    assert problems(client)[0].startswith("entry 2 is gone")
    with pytest.raises(LedgerBroken, match="entry 2 is gone"):
        ledger.read(client, NAME)


def tag_version(client: MlflowClient, recorded: Recorded) -> None:
    client.set_model_version_tag(NAME, str(recorded.entry.version), ledger.VERSION_ENTRY, ledger.entry_tag(recorded))


@pytest.fixture
def versions(client: MlflowClient, four: list[Recorded]) -> None:
    client.create_registered_model(NAME)
    for _ in range(3):
        client.create_model_version(NAME, source="somewhere")


@pytest.mark.usefixtures("versions")
def test_a_tail_that_was_cut_is_found_by_the_version_that_names_it(
    client: MlflowClient, four: list[Recorded], store: Path
) -> None:
    tag_version(client, four[2])
    tag_version(client, four[3])
    assert problems(client) == []
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("DELETE FROM params WHERE run_uuid = ? AND key = 'next'", (four[2].run_id,))
        for table in ("params", "tags", "runs"):
            connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (four[3].run_id,))
    assert len(ledger.read(client, NAME)) == 3
    assert problems(client) == [f"version 1 names the entry '4 {four[3].sha256}', which the ledger does not hold"]


@pytest.mark.usefixtures("versions")
def test_a_chain_that_was_written_anew_is_found_by_the_versions(
    client: MlflowClient, four: list[Recorded], store: Path
) -> None:
    tag_version(client, four[2])
    previous = four[0].entry.previous_sha256
    for recorded in four:
        text = edited(recorded, who="eve", previous_sha256=previous)
        previous = ledger._sha256(text)
        set_param(store, recorded.run_id, "entry", text)
        set_param(store, recorded.run_id, "entry_sha256", previous)
    assert len(ledger.read(client, NAME)) == 4
    assert any(one.startswith("version 2 names the entry") for one in problems(client))


@pytest.mark.usefixtures("versions")
def test_a_version_that_names_an_entry_about_another_version_is_found(
    client: MlflowClient, four: list[Recorded]
) -> None:
    client.set_model_version_tag(NAME, "2", ledger.VERSION_ENTRY, ledger.entry_tag(four[1]))
    assert problems(client) == ["version 2 names entry 2, which is about another version"]


@pytest.mark.usefixtures("versions")
def test_a_ledger_that_was_renamed_deleted_or_replaced_is_not_taken_for_none(
    client: MlflowClient, four: list[Recorded]
) -> None:
    experiment = experiment_of(client)
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(LedgerBroken, match="was deleted"):
        ledger.read(client, NAME)
    client.restore_experiment(experiment.experiment_id)
    client.rename_experiment(experiment.experiment_id, "away")
    for use in (
        lambda: ledger.read(client, NAME),
        lambda: ledger.append(client, NAME, None, facts("promoted", "1", None)),
    ):
        with pytest.raises(LedgerBroken, match="'away', is its ledger"):
            use()
    client.delete_experiment_tag(experiment.experiment_id, ledger.LEDGER_OF)
    tag_version(client, four[3])
    with pytest.raises(LedgerBroken, match="version 1 names its entry"):
        ledger.read(client, NAME)
    assert len(problems(client)) == 1
    client.create_experiment(ledger.experiment_name(NAME))
    with pytest.raises(LedgerBroken, match=r"has no tag ledger\.root"):
        ledger.read(client, NAME)


def test_another_beginning_is_found(client: MlflowClient, four: list[Recorded], store: Path) -> None:
    experiment = experiment_of(client)
    (root,) = [run for run in all_runs(client) if run.info.run_name == "0000 beginning"]
    for wrong in (four[0].run_id, "0" * 32):
        client.set_experiment_tag(experiment.experiment_id, ledger.ROOT, wrong)
        with pytest.raises(LedgerBroken, match="its first run"):
            ledger.read(client, NAME)
        assert problems(client)
    client.set_experiment_tag(experiment.experiment_id, ledger.ROOT, root.info.run_id)
    set_param(store, root.info.run_id, "entry", root.data.params["entry"].replace("}", " }"))
    assert problems(client)[0].startswith("the beginning was changed")


def test_an_entry_of_another_experiment_is_found(client: MlflowClient, four: list[Recorded]) -> None:
    other = ledger.append(client, "other", None, facts("promoted", "7", None))
    client.log_param(four[3].run_id, "next", other.run_id)
    assert any("another experiment" in one for one in problems(client))
    with pytest.raises(LedgerBroken):
        ledger.read(client, NAME)


def test_an_entry_whose_champion_before_is_not_the_champion_is_found(
    client: MlflowClient, four: list[Recorded]
) -> None:
    entry = Entry(**facts("promoted", "5", "2"), index=5, previous_sha256=four[3].sha256)
    run_id = client.create_run(experiment_of(client).experiment_id).info.run_id
    client.log_param(run_id, "entry", ledger._text(entry))
    client.log_param(run_id, "entry_sha256", ledger._sha256(ledger._text(entry)))
    client.log_param(four[3].run_id, "next", run_id)
    with pytest.raises(LedgerBroken, match="entry 5 says that version 2 was champion before it; it was version 1"):
        ledger.read(client, NAME)


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("reason", "tag 'reason'"),
        ("who", "tag 'who'"),
        ("mlflow.note.content", "description"),
        ("mlflow.runName", "name"),
    ],
)
def test_a_page_that_shows_something_else_is_found_and_breaks_nothing(
    client: MlflowClient, four: list[Recorded], tag: str, said: str
) -> None:
    client.set_tag(four[1].run_id, tag, "falsified")
    assert problems(client) == [
        f"entry 2 is shown otherwise than it is recorded: its {said} was changed, run {four[1].run_id}"
    ]
    assert [one.entry for one in ledger.read(client, NAME)] == [one.entry for one in four]
    ledger.mend(client, NAME)
    assert len(problems(client)) == 1


def test_a_run_that_looks_like_an_entry_is_found(client: MlflowClient, four: list[Recorded]) -> None:
    experiment_id = experiment_of(client).experiment_id
    plain = client.create_run(experiment_id, run_name="0005 promoted version 9").info.run_id
    client.create_run(experiment_id, run_name="0005 promoted version 8", tags={"previous": four[3].run_id})
    ledger.mend(client, NAME)
    assert sorted(one.split(", ", 1)[1] for one in problems(client)) == [
        f"'0005 promoted version {number}', stands among the entries and is none" for number in (8, 9)
    ]
    assert client.get_run(plain).info.lifecycle_stage == "active"
    assert ledger.read(client, NAME) == four


@pytest.mark.usefixtures("versions")
def test_an_alias_that_is_not_the_ledgers_champion_is_found(client: MlflowClient, four: list[Recorded]) -> None:
    client.set_registered_model_alias(NAME, "champion", "1")
    assert ledger.verify(client, NAME).problems == []
    client.set_registered_model_alias(NAME, "Champion", "2")
    client.set_registered_model_alias(NAME, "champion", "2")
    found = ledger.verify(client, NAME).problems
    assert len(found) == 2
    assert "'champion' is set to version 2, the ledger's champion is version 1" in found[0]
    assert "'Champion'" in found[1]


def test_a_server_that_is_away_is_not_a_broken_ledger(no_server: str) -> None:
    with pytest.raises(RegistryUnreachable), connected(is_patient=False) as client:
        ledger.verify(client, NAME)
