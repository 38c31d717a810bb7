"""The promoter as a service, against a real MLflow server: it is woken by MLflow alone, and deploys what it records."""

import base64
import hashlib
import hmac
import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from datetime import datetime
from multiprocessing.process import BaseProcess
from typing import Any

from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent
from promoter_processes import (
    ROUND_S,
    SECRET,
    Hook,
    Promoters,
    Proxy,
    Registry,
    wait_for,
)


def signed(body: bytes = b"{}", secret: str = SECRET, at: float | None = None) -> dict[str, str]:
    """The headers of MLflow's own call."""
    delivery, timestamp = str(uuid.uuid4()), str(int(time.time() if at is None else at))
    digest = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": timestamp,
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
        "Content-Type": "application/json",
    }


def call(
    address: str, body: bytes | None = b"{}", headers: Mapping[str, str] | None = None, method: str = "POST"
) -> int:
    request = urllib.request.Request(address, data=body, headers=dict(headers or {}), method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def health(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
        return dict(json.loads(answer.read()))


def test_once_carries_out_what_the_ui_did(registry: Registry, promoters: Promoters, hook: Hook) -> None:
    registry.promote("1")
    assert promoters.once() == 0
    assert registry.actions == [("promoted", "1")]
    registry.check(hook)
    assert promoters.once() == 0
    registry.remove()
    assert promoters.once() == 0
    assert registry.actions == [("promoted", "1"), ("removed", "1")]
    registry.check(hook)
    assert [call["after"] for call in hook.calls] == ["1", None]


def test_mlflows_own_webhook_wakes_the_service(registry: Registry, promoters: Promoters, hook: Hook) -> None:
    registry.poll_every(3600)
    process, address = promoters.serve()
    wait_for(lambda: health(address)["last_good_round"])
    events = [
        WebhookEvent(WebhookEntity.MODEL_VERSION_ALIAS, action)
        for action in (WebhookAction.CREATED, WebhookAction.DELETED)
    ]
    made = registry.client.create_webhook(f"w-{uuid.uuid4()}", f"{address}/webhook", events, secret=SECRET)
    try:
        tested = registry.client.test_webhook(made.webhook_id)
        assert (tested.success, tested.response_status) == (True, 204)
        registry.promote("1")
        wait_for(lambda: health(address)["entries"] == 1)
        registry.remove()
        wait_for(lambda: health(address)["entries"] == 2)
    finally:
        registry.client.delete_webhook(made.webhook_id)
    assert registry.actions == [("promoted", "1"), ("removed", "1")]
    registry.check(hook)
    told = health(address)
    assert (told["status"], told["open_entries"], told["last_error"]) == ("ok", 0, "")
    assert told["head_sha256"] == registry.entries[-1].sha256
    end(process)


def test_forged_calls_do_nothing_and_a_signed_one_only_wakes(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    registry.poll_every(3600)
    process, address = promoters.serve()
    wait_for(lambda: health(address)["last_good_round"])
    registry.promote("1")
    body = json.dumps({"data": {"name": registry.name, "alias": "champion", "version": "2"}}).encode()
    hour = 3600
    for forged, status in [
        ({}, 401),
        (signed(body, "guessed"), 401),
        (signed(b"{}"), 401),
        (signed(body, at=time.time() - hour), 401),
        (signed(body, at=time.time() + hour), 401),
    ]:
        assert call(f"{address}/webhook", body, forged) == status
    assert call(f"{address}/webhook", b"x" * 100_000, signed(b"x" * 100_000)) == 413
    assert call(f"{address}/webhook", None, signed(body), "GET") == 405
    assert call(f"{address}/webhook", body, signed(body), "PUT") == 405
    time.sleep(2)
    assert registry.actions == [] and registry.champion == "1"
    # Whatever it says: what is true stands in the registry.
    genuine = signed(body)
    assert call(f"{address}/webhook", body, genuine) == 204
    wait_for(lambda: registry.actions)
    round_ended = wait_for(lambda: health(address)["last_error"] == "" and health(address)["entries"])
    assert round_ended == 1
    assert [call(f"{address}/webhook", body, genuine) for _ in range(20)] == [204] * 20
    time.sleep(2)
    assert registry.actions == [("promoted", "1")]
    registry.check(hook)
    assert len(hook.calls) == 1
    end(process)


def test_the_poll_finds_what_no_webhook_told_also_after_the_server_was_away(
    registry: Registry, promoters: Promoters, hook: Hook, proxy: Proxy
) -> None:
    process, address = promoters.serve(MLFLOW_TRACKING_URI=proxy.address, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    registry.promote("1")
    wait_for(lambda: health(address)["entries"] == 1)
    proxy.is_away = True
    wait_for(lambda: health(address)["status"] == "failing")
    registry.remove()
    assert "does not answer" in health(address)["last_error"]
    assert process.is_alive()
    proxy.is_away = False
    wait_for(lambda: health(address)["entries"] == 2)
    assert health(address)["status"] == "ok"
    assert registry.actions == [("promoted", "1"), ("removed", "1")]
    registry.check(hook)
    end(process)


def test_once_says_that_the_server_is_away(promoters: Promoters, closed_port: int) -> None:
    assert (
        promoters.once(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{closed_port}", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0") == 5
    )


def test_a_hook_that_fails_holds_no_entry_up_and_is_told_the_newest_when_it_is_back(
    registry: Registry, promoters: Promoters, hook: Hook, closed_port: int
) -> None:
    registry.promote("1")
    assert promoters.once(BRAINTUMOR_DEPLOY_HOOK=f"http://127.0.0.1:{closed_port}/") == 2
    assert registry.actions == [("promoted", "1")] and registry.n_open == 1
    assert registry.entries[0].hook.startswith("failing")
    for status, change in [(500, registry.remove), (307, lambda: registry.promote("1"))]:
        hook.status = status
        change()
        assert promoters.once() == 2
    assert registry.actions == [("promoted", "1"), ("removed", "1"), ("rolled back", "1")]
    assert registry.n_open == 1 and registry.champion == "1"
    hook.status = 200
    hook.calls.clear()
    assert promoters.once() == 0
    registry.check()
    assert [one.hook.split()[0] for one in registry.entries] == ["superseded", "superseded", "delivered"]
    assert [call["index"] for call in hook.calls] == [3]


def test_a_call_that_fails_while_a_later_one_is_taken_is_not_made_up_for(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    hook.status = 500
    registry.promote("1")
    assert promoters.once() == 2
    registry.remove()

    def take_the_second() -> None:
        hook.status = 500 if hook.calls[-1]["index"] == 1 else 200

    hook.before_answer = take_the_second
    assert promoters.once() == 0
    hook.before_answer = lambda: None
    assert promoters.once() == 0
    # Told of the first entry now, it would serve what is champion no more.
    assert [call["index"] for call in hook.calls] == [1, 1, 2]
    assert registry.entries[0].hook.startswith("superseded by entry 2")
    registry.check(hook)


def test_the_service_tells_that_the_hook_fails_and_calls_it_until_it_is_back(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    hook.status = 503
    process, address = promoters.serve()
    registry.promote("1")
    wait_for(lambda: "503" in health(address)["last_error"])
    told = health(address)
    assert (told["status"], told["entries"], told["open_entries"]) == ("failing", 1, 1)
    hook.status = 200
    wait_for(lambda: health(address)["status"] == "ok")
    assert registry.entries[0].hook.startswith("delivered")
    registry.check(hook)
    end(process)


def test_a_promoter_whose_clock_is_wrong_does_the_same_but_for_webhooks(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    process, address = promoters.serve(clock_hours=1)
    registry.promote("1")
    assert call(f"{address}/webhook", b"{}", signed(b"{}")) == 401
    wait_for(lambda: health(address)["entries"] == 1)
    end(process)
    registry.promote("2")
    assert promoters.once(clock_hours=-1) == 0
    assert registry.actions == [("promoted", "1"), ("refused", "2")]
    registry.check(hook)
    # The ledger's times are the server's.
    ages = [time.time() - datetime.fromisoformat(one.entry.time).timestamp() for one in registry.entries]
    assert all(abs(age) < 60 for age in ages)


def test_a_promoter_that_is_asked_to_end_ends_its_round_first(
    registry: Registry, promoters: Promoters, hook: Hook
) -> None:
    process, address = promoters.serve()
    wait_for(lambda: health(address)["last_good_round"])
    is_called = threading.Event()

    def terminate() -> None:
        process.terminate()
        is_called.set()
        time.sleep(0.5)

    hook.before_answer = terminate
    registry.promote("1")
    assert is_called.wait(ROUND_S)
    process.join(ROUND_S)
    assert process.exitcode == 0
    registry.check(hook)
    assert len(hook.calls) == 1


def end(process: BaseProcess) -> None:
    """A promoter ends as Kubernetes asks it to."""
    process.terminate()
    process.join(ROUND_S)
    assert process.exitcode == 0
