import base64
import hashlib
import hmac
import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from braintumor import promoter
from braintumor.errors import RegistryUnreachable, UserError
from braintumor.params import Profile, load_params
from braintumor.promoter import MAX_BODY_BYTES, Promoter, create_app, listening, why_refused, without_secrets
from braintumor.registry import promotions

SECRET = "the webhook's secret"
NOW = 1_800_000_000.0


def signed(
    body: bytes = b"{}", secret: str = SECRET, at: float = NOW, delivery: str = "d-1", version: str = "v1"
) -> dict[str, str]:
    """The headers of MLflow's own call."""
    timestamp = str(int(at))
    digest = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": timestamp,
        "X-MLflow-Signature": f"{version},{base64.b64encode(digest).decode()}",
    }


@pytest.mark.parametrize("skew", [0, -299, 299])
def test_a_call_that_mlflow_signed_just_now_is_its_own(skew: int) -> None:
    assert why_refused(SECRET, signed(b"payload", at=NOW + skew), b"payload", NOW) == ""


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in signed().items() if key != name}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        without("X-MLflow-Signature"),
        without("X-MLflow-Timestamp"),
        without("X-MLflow-Delivery-Id"),
        signed(secret="another"),
        signed(secret=""),
        signed(b"another body"),
        signed(version="v2"),
        signed(version="V1"),
        signed() | {"X-MLflow-Delivery-Id": "d-2"},
        signed() | {"X-MLflow-Timestamp": str(int(NOW) + 1)},
        signed() | {"X-MLflow-Signature": "v1,"},
        signed() | {"X-MLflow-Signature": "v1"},
        signed() | {"X-MLflow-Signature": signed()["X-MLflow-Signature"][:-4]},
        signed() | {"X-MLflow-Signature": signed()["X-MLflow-Signature"].removeprefix("v1,")},
        signed() | {"X-MLflow-Signature": "v1,ä"},
        signed() | {"X-MLflow-Signature": "v1,****"},
    ],
)
def test_a_forged_or_unsigned_call_is_refused(headers: Mapping[str, str]) -> None:
    assert "signature" in why_refused(SECRET, headers, b"{}", NOW)


@pytest.mark.parametrize("at", [NOW - 301, NOW + 302, NOW - 3600, 0])
def test_a_replayed_call_is_refused(at: float) -> None:
    assert "replayed" in why_refused(SECRET, signed(at=at), b"{}", NOW)


@pytest.mark.parametrize("timestamp", ["", "now", "1e9", " 1800000000", "-1", "١٨٠٠٠٠٠٠٠٠", "9" * 5000, "1800000000.0"])
def test_a_signed_time_that_is_no_number_is_refused(timestamp: str) -> None:
    digest = hmac.new(SECRET.encode(), f"d-1.{timestamp}.".encode() + b"{}", hashlib.sha256).digest()
    headers = {
        "X-MLflow-Delivery-Id": "d-1",
        "X-MLflow-Timestamp": timestamp,
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
    }
    assert "replayed" in why_refused(SECRET, headers, b"{}", NOW)


def test_without_a_secret_every_call_is_refused() -> None:
    assert "BRAINTUMOR_WEBHOOK_SECRET" in why_refused("", signed(secret=""), b"{}", NOW)


@pytest.fixture
def profile() -> Profile:
    return load_params(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture
def reconciling(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> Promoter:
    for name in ("BRAINTUMOR_DEPLOY_HOOK", "BRAINTUMOR_DEPLOY_SECRET"):
        monkeypatch.delenv(name, raising=False)
    return Promoter(profile)


@pytest.fixture
def wakes() -> list[float]:
    return []


@pytest.fixture
def place(reconciling: Promoter, wakes: list[float]) -> Iterator[str]:
    with listening("127.0.0.1:0", create_app(SECRET, lambda: wakes.append(time.time()), reconciling)) as place:
        yield place


def ask(place: str, method: str, path: str, body: bytes | None = None, headers: Any = ()) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(place, timeout=10)
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_mlflows_own_call_wakes_also_when_it_comes_again(place: str, wakes: list[float]) -> None:
    headers = signed(at=time.time())
    assert [ask(place, "POST", "/webhook", b"{}", headers)[0] for _ in range(2)] == [204, 204]
    assert len(wakes) == 2


def test_a_call_of_a_stranger_does_nothing(place: str, wakes: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    assert ask(place, "POST", "/webhook", b"{}")[0] == 401
    assert ask(place, "POST", "/webhook", b"{}", signed(at=now, secret="guessed"))[0] == 401
    assert ask(place, "POST", "/webhook", b"{}", signed(at=now - 3600))[0] == 401
    assert ask(place, "POST", "/webhook", b"{} ", signed(at=now))[0] == 401
    for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
        assert ask(place, method, "/webhook", b"{}", signed(at=now))[0] == 405
    for path in ("/", "/docs", "/openapi.json", "/webhook/../webhook", "/metrics"):
        assert ask(place, "POST", path, b"{}", signed(at=now))[0] == 404
    assert ask(place, "POST", "/health", b"{}", signed(at=now))[0] == 405
    assert wakes == []
    # One line for all of them: who forges calls must not fill the log.
    assert capsys.readouterr().err.count("refused") == 1


def test_a_call_that_is_too_large_is_refused_whether_it_says_so_or_not(place: str, wakes: list[float]) -> None:
    body = b"x" * (MAX_BODY_BYTES + 1)
    headers = signed(body, at=time.time())
    assert ask(place, "POST", "/webhook", body, headers)[0] == 413
    connection = http.client.HTTPConnection(place, timeout=10)
    chunks = (b"x" * 1024 for _ in range(MAX_BODY_BYTES // 1024 + 1))
    connection.request("POST", "/webhook", chunks, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    fitting = body[:MAX_BODY_BYTES]
    assert ask(place, "POST", "/webhook", fitting, signed(fitting, at=time.time()))[0] == 204
    assert len(wakes) == 1


def test_a_call_that_never_ends_is_given_up(place: str, wakes: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promoter, "MAX_BODY_S", 0.3)
    host, _, port = place.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as caller:
        caller.sendall(b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{}")
        assert b" 408 " in caller.recv(4096)
    assert ask(place, "GET", "/health")[0] == 200
    assert wakes == []


def test_health_tells_the_last_round_and_is_bad_only_if_rounds_end_no_more(
    place: str, reconciling: Promoter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, content = ask(place, "GET", "/health")
    assert (status, json.loads(content)["status"]) == (200, "ok")

    def unreachable(*arguments: object, **options: object) -> list[promotions.Outcome]:
        raise RegistryUnreachable("MLflow at http://mlflow does not answer")

    monkeypatch.setattr(promotions, "reconcile", unreachable)
    pauses = [reconciling.round() for _ in range(7)]
    poll = reconciling.params.promote.poll_seconds
    # Twice as far apart each time, give or take a tenth by chance, and no further than five minutes.
    for pause, planned in zip(pauses, [2 * poll, 4 * poll, *[300] * 5], strict=True):
        assert 0.9 * planned <= pause <= 1.1 * planned
    status, content = ask(place, "GET", "/health")
    told = json.loads(content)
    assert (status, told["status"], told["last_good_round"]) == (200, "failing", "")
    assert "does not answer" in told["last_error"] and told["last_round"]
    assert capsys.readouterr().err.count("does not answer") == 1

    monkeypatch.setattr(promoter, "STUCK_AFTER_S", -1000.0)
    reconciling.round()
    status, content = ask(place, "GET", "/health")
    assert (status, json.loads(content)["status"]) == (503, "stuck")


def test_an_error_of_ours_ends_a_round_and_not_the_service(
    reconciling: Promoter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass-word")

    def wrong(*arguments: object, **options: object) -> list[promotions.Outcome]:
        raise ZeroDivisionError("at https://promoter:pass-word@mlflow/ with pass-word")

    monkeypatch.setattr(promotions, "reconcile", wrong)
    reconciling.round()
    assert reconciling.health.last_error == "ZeroDivisionError: at https://***@mlflow/ with ***"
    told = capsys.readouterr().err
    assert "in wrong" in told and "pass-word" not in told


def test_a_good_round_forgets_the_error(store: Path, reconciling: Promoter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotions, "reconcile", lambda params, deploy: [])
    reconciling.health = promoter.Health(last_error="away")
    pause = reconciling.round()
    assert reconciling.health.last_error == "" and reconciling.health.last_good_round
    assert abs(pause - reconciling.params.promote.poll_seconds) <= 0.1 * reconciling.params.promote.poll_seconds


@pytest.mark.parametrize("listen", ["", "8080", "host:", "127.0.0.1:port", "127.0.0.1:70000", "127.0.0.1:-1"])
def test_a_place_that_is_none_is_reported(listen: str, reconciling: Promoter) -> None:
    app = create_app(SECRET, lambda: None, reconciling)
    with pytest.raises(UserError, match="HOST:PORT"), listening(listen, app):
        pass


def test_a_port_in_use_is_reported(place: str, reconciling: Promoter) -> None:
    app = create_app(SECRET, lambda: None, reconciling)
    with pytest.raises(UserError, match="can't be used"), listening(place, app):
        pass
    with pytest.raises(UserError, match="can't be used"), listening("no.such.host.invalid:80", app):
        pass


def test_secrets_and_logins_are_taken_out_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINTUMOR_DEPLOY_HOOK", "https://hooks/in-the-path")
    told = without_secrets("https://hooks/in-the-path and s3://key:secret@bucket/a and mail@example.org")
    assert told == "*** and s3://***@bucket/a and mail@example.org"
    assert without_secrets("to https://ann:p@ss:w@rd@host/a") == "to https://***@host/a"
