import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from braintumor.errors import RegistryUnreachable, UserError
from braintumor.registry import ledger
from braintumor.registry.history import as_json, find_hash, history, show_history, verify_history
from braintumor.registry.ledger import LedgerBroken, Recorded
from braintumor.registry.server import connected

NAME = "brain-tumor-phantoms"
COMMAND = Path(sys.executable).with_name("braintumor")
PARAMS = Path(__file__).parents[3] / "params.yaml"


@pytest.fixture
def entries(store: Path) -> list[Recorded]:
    """A ledger of two entries, the second under way, and the alias as it says."""
    known: dict[str, Any] = dict(
        who="ada", who_is_known=True, comparison="better", time="2026-01-02T03:04:05+00:00", digests={}, claim=""
    )
    first = dict(action="promoted", version="1", before=None, after="1", reason="[bold]first[/bold]", override="")
    second = dict(action="promoted", version="2", before="1", after="2", reason="second", override="all the same")
    with connected() as client:
        client.create_registered_model(NAME)
        for _ in range(2):
            client.create_model_version(NAME, source="somewhere")
        one = ledger.append(client, NAME, None, known | first)
        ledger.close(client, one, "delivered 2026-01-02T03:04:06+00:00")
        ledger.append(client, NAME, one, known | second | dict(who="ben@host", who_is_known=False))
        client.set_registered_model_alias(NAME, "champion", "2")
        return ledger.read(client, NAME)


def test_before_anything_there_is_no_history_and_none_is_made(
    no_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert history(NAME) == []
    assert verify_history(NAME).n == 0
    show_history([], NAME)
    assert capsys.readouterr().out == f"No promotions of {NAME} at sqlite:///{no_store} yet.\n"
    with pytest.raises(UserError, match="none of the 0 entries"):
        find_hash([], "0" * 64)
    assert not no_store.exists()


def test_an_empty_ledger_names_its_server_without_the_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ana:hidden@mlflow.example.org")
    show_history([], NAME)
    assert capsys.readouterr().out == f"No promotions of {NAME} at https://mlflow.example.org yet.\n"


def test_the_table_has_a_row_an_entry_with_texts_as_they_are(
    entries: list[Recorded], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show_history(history(NAME), NAME)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "Entry"
    assert [re.split(r"\s{2,}", row.strip()) for row in rows] == [
        ["1", "2026-01-02 03:04:05", "promoted version 1", "ada", "[bold]first[/bold]", "delivered"],
        ["2", "2026-01-02 03:04:05", "promoted version 2", "ben@host (not checked)", "second [override: all the same]",
         "under way"],
    ]  # fmt: skip


def test_json_holds_every_field(entries: list[Recorded]) -> None:
    told = json.loads(as_json(entries, NAME))
    assert told["model_name"] == NAME
    assert [one["sha256"] for one in told["entries"]] == [one.sha256 for one in entries]
    assert told["entries"][1]["previous_sha256"] == entries[0].sha256
    assert told["entries"][1]["override"] == "all the same"
    assert [one["is_open"] for one in told["entries"]] == [False, True]


def test_a_hash_that_somebody_noted_is_found_or_missed(entries: list[Recorded]) -> None:
    assert find_hash(entries, f" {entries[0].sha256.upper()}\n") == entries[0]
    for wrong in ("0" * 64, entries[0].sha256[:10], ""):
        with pytest.raises(UserError, match="none of the 2 entries"):
            find_hash(entries, wrong)


def test_a_ledger_that_holds_is_verified(entries: list[Recorded]) -> None:
    assert verify_history(NAME) == ledger.Verification([], entries[1].sha256, 2)


def test_every_problem_is_named(entries: list[Recorded]) -> None:
    with connected() as client:
        client.set_tag(entries[0].run_id, "who", "eve")
        client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(LedgerBroken) as error:
        verify_history(NAME)
    assert "entry 1 is shown otherwise" in str(error.value)
    assert "'champion' is set to version 1" in str(error.value)


def test_a_server_that_is_away_says_nothing_about_the_ledger(no_server: str) -> None:
    with pytest.raises(RegistryUnreachable):
        history(NAME)
    with pytest.raises(RegistryUnreachable):
        verify_history(NAME)


@pytest.mark.timeout(120)
def test_the_command_ends_with_2_for_a_broken_ledger_and_for_a_missing_hash(
    entries: list[Recorded], store: Path
) -> None:
    def run(*options: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [COMMAND, "history", "--params", str(PARAMS), *options], cwd=store.parent, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    code, out, _ = run("--verify", "--contains", entries[0].sha256)
    assert code == 0 and entries[1].sha256 in out
    code, out, errors = run("--contains", "0" * 64)
    assert (code, out) == (2, "") and errors.startswith("Error: none of the 2 entries")
    with connected() as client:
        client.delete_run(entries[0].run_id)
    code, out, errors = run("--verify")
    assert (code, out) == (2, "") and "entry 1 was deleted" in errors and "Traceback" not in errors
