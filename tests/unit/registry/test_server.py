import base64
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.version import VERSION

from braintumor.errors import RegistryUnreachable, UserError
from braintumor.registry import server
from braintumor.registry.server import connected, server_time, spelled_alike

MAJOR = VERSION.partition(".")[0]


@dataclass
class Answers:
    """A server on loopback that gives one answer a path, and keeps what it was asked."""

    address: str = ""
    version: tuple[int, str] = (200, VERSION)
    api: tuple[int, str] = (200, "{}")
    date: str | None = "Wed, 21 Oct 2015 07:28:00 GMT"
    asked: list[str] = field(default_factory=list)
    credentials: set[str | None] = field(default_factory=set)


@pytest.fixture
def answers(no_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            it.asked.append(self.path.partition("?")[0])
            it.credentials.add(self.headers.get("Authorization"))
            status, text = {"/version": it.version, "/health": (200, "OK")}.get(it.asked[-1], it.api)
            self.send_response_only(status)
            if it.date is not None:
                self.send_header("Date", it.date)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = answer

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        it = Answers(f"http://127.0.0.1:{listener.server_port}")
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", it.address)
        monkeypatch.setattr(server, "_known_servers", set())
        yield it
        listener.shutdown()


def connect() -> None:
    with connected():
        pass


def test_a_server_of_our_major_version_is_asked_for_it_once(answers: Answers) -> None:
    answers.version = (200, f"{MAJOR}.999.0rc1\n")
    connect()
    connect()
    assert answers.asked.count("/version") == 1
    assert len(answers.asked) == 3


@pytest.mark.parametrize("version", ["2.22.0", "1.30.1", "13.17.2", "4.0.0"])
def test_a_server_of_another_major_version_is_refused_and_asked_nothing_else(answers: Answers, version: str) -> None:
    answers.version = (200, version)
    for _ in range(2):
        with pytest.raises(UserError, match=f"is MLflow {version}, and this is MLflow {VERSION}") as error:
            connect()
        assert not isinstance(error.value, RegistryUnreachable)
        assert error.value.exit_code == 2
    assert answers.asked == ["/version", "/version"]


@pytest.mark.parametrize("version", [(404, "Not Found"), (200, "<!doctype html>"), (200, ""), (200, "latest")])
def test_a_server_that_hides_its_version_is_refused(answers: Answers, version: tuple[int, str]) -> None:
    answers.version = version
    with pytest.raises(UserError, match="does not tell its version"):
        connect()


def test_a_server_that_does_not_let_us_in_says_so_itself(answers: Answers) -> None:
    answers.version = (401, "You are not authenticated")
    answers.api = (403, '{"error_code": "PERMISSION_DENIED", "message": "not for you"}')
    with pytest.raises(UserError, match=r"refuses \(PERMISSION_DENIED: not for you\)"):
        connect()


def test_the_version_is_asked_for_with_our_credentials_and_no_message_holds_them(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "top-secret")
    connect()
    assert answers.credentials == {"Basic " + base64.b64encode(b"ada:top-secret").decode()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answers.address.replace("//", "//ada:top-secret@"))
    answers.version = (200, "1.2.3")
    with pytest.raises(UserError, match="is MLflow") as error:
        connect()
    assert "top-secret" not in str(error.value)


def test_a_server_that_is_away_is_away_and_of_no_version(no_server: str) -> None:
    with pytest.raises(RegistryUnreachable):
        connect()


def test_a_database_is_of_our_version(store: Path) -> None:
    connect()


def test_the_time_is_the_servers(answers: Answers) -> None:
    with connected() as client:
        assert server_time(client) == datetime(2015, 10, 21, 7, 28, tzinfo=UTC)


@pytest.mark.parametrize("date", [None, "soon", ""])
def test_a_server_without_a_clock_is_not_believed_to_have_ours(answers: Answers, date: str | None) -> None:
    with connected() as client:
        answers.date = date
        with pytest.raises(RegistryUnreachable, match="does not tell the time"):
            server_time(client)


def test_the_time_of_a_database_is_ours(store: Path) -> None:
    with connected() as client:
        found = server_time(client)
    assert found.tzinfo is not None
    assert abs(datetime.now(UTC) - found) < timedelta(minutes=1)


def test_other_spellings_of_champion_are_found() -> None:
    others = ["Champion", "CHAMPION", " champion", "champion\u00a0", "\uff43hampion", "ch\u1d43mpion"]
    assert spelled_alike([*others, "champion", "challenger", "champions", "the champion"]) == sorted(others)
    assert spelled_alike({"champion": "1"}) == []
