import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from braintumor import deployment
from braintumor.deployment import HookFailed, call_hook, check_address, configured_hook
from braintumor.errors import UserError
from braintumor.registry.ledger import Entry, Recorded

SECRET = "the hook's secret"


class Hook(ThreadingHTTPServer):
    """A deployment hook that keeps what it gets, and answers as `answer` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda request: respond(request, 200)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hooks/in-the-path"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The caller has given up."""


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.server.answer(self)

    def do_GET(self) -> None:
        self.server.calls.append((self.path, {}, b""))
        respond(self, 200)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def respond(request: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": "0", **headers}.items():
        request.send_header(name, value)
    request.end_headers()


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def recorded(action: str = "promoted", **changes: Any) -> Recorded:
    facts: dict[str, Any] = dict(
        index=3, action=action, version="5", before="4", after="5", who="anna", who_is_known=True, reason="better",
        override="", comparison="better", time="2026-01-01T00:00:00Z", digests={"data_md5": "d" * 32}, claim="",
        previous_sha256="a" * 64,
    )  # fmt: skip
    return Recorded(Entry(**facts | changes), "b" * 64, "run", True, "")


def test_hook_gets_the_entry_its_key_and_a_signature_over_both(hook: Hook) -> None:
    before = int(time.time())
    call_hook(recorded(reason="schärfer"), "brain-tumor", hook.address, SECRET)
    ((path, headers, body),) = hook.calls
    assert path == "/hooks/in-the-path"
    assert headers["content-type"] == "application/json"
    told = json.loads(body)
    assert {name: told[name] for name in ("model", "action", "before", "after", "index", "reason")} == {
        "model": "brain-tumor", "action": "promoted", "before": "4", "after": "5", "index": 3, "reason": "schärfer",
    }  # fmt: skip
    assert headers["idempotency-key"] == told["entry_sha256"] == "b" * 64
    assert before <= int(headers["x-braintumor-timestamp"]) <= time.time()
    signed = f"{'b' * 64}.{headers['x-braintumor-timestamp']}.".encode() + body
    digest = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["x-braintumor-signature"] == f"v1,{digest}"
    assert SECRET not in str(headers) + body.decode()


@pytest.mark.parametrize("action", ["promoted", "rolled back", "removed"])
def test_hook_is_called_for_each_change_of_the_champion_under_the_same_key(hook: Hook, action: str) -> None:
    for _ in range(2):
        call_hook(recorded(action), "brain-tumor", hook.address, SECRET)
    assert [headers["idempotency-key"] for _, headers, _ in hook.calls] == ["b" * 64] * 2


def test_hook_is_not_called_for_a_refused_version(hook: Hook) -> None:
    call_hook(recorded("refused"), "brain-tumor", hook.address, SECRET)
    assert hook.calls == []


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_success_counts_as_delivered(hook: Hook, status: int) -> None:
    hook.answer = lambda request: respond(request, status)
    call_hook(recorded(), "brain-tumor", hook.address, SECRET)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_is_not_followed(hook: Hook, status: int) -> None:
    hook.answer = lambda request: respond(request, status, Location="/elsewhere")
    with pytest.raises(HookFailed, match=f"redirects.*{status}"):
        call_hook(recorded(), "brain-tumor", hook.address, SECRET)
    assert [path for path, _, _ in hook.calls] == ["/hooks/in-the-path"]


@pytest.mark.parametrize("status", [400, 401, 404, 409, 429, 500, 503])
def test_an_answer_that_is_no_success_is_a_failure(hook: Hook, status: int) -> None:
    hook.answer = lambda request: respond(request, status)
    with pytest.raises(HookFailed, match=str(status)):
        call_hook(recorded(), "brain-tumor", hook.address, SECRET)


def test_a_hook_that_hangs_is_given_up(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "TIMEOUT_S", 0.3)
    may_end = threading.Event()
    hook.answer = lambda request: may_end.wait(20) and None
    began = time.monotonic()
    with pytest.raises(HookFailed, match="Timeout"):
        call_hook(recorded(), "brain-tumor", hook.address, SECRET)
    assert time.monotonic() - began < 5
    may_end.set()


def test_an_endless_answer_does_not_hold_the_call(hook: Hook) -> None:
    def drip(request: BaseHTTPRequestHandler) -> None:
        respond(request, 200, **{"Content-Length": str(10**9)})
        while True:
            request.wfile.write(b"x")
            time.sleep(0.05)

    hook.answer = drip
    began = time.monotonic()
    call_hook(recorded(), "brain-tumor", hook.address, SECRET)
    assert time.monotonic() - began < 5


def test_an_answer_that_is_cut_or_no_http_is_a_failure(hook: Hook) -> None:
    for answer in (lambda request: None, lambda request: request.wfile.write(b"what?\r\n\r\n") and None):
        hook.answer = answer
        with pytest.raises(HookFailed, match="does not answer"):
            call_hook(recorded(), "brain-tumor", hook.address, SECRET)


def test_what_went_wrong_names_neither_address_nor_secret(closed_port: int) -> None:
    for address in (f"http://user:pass-word@127.0.0.1:{closed_port}/in-the-path", "https://[::1]:1/in-the-path"):
        with pytest.raises(HookFailed, match="does not answer") as failure:
            call_hook(recorded(), "brain-tumor", address, SECRET)
        # The context, too, would be printed in a traceback.
        told = f"{failure.value} {failure.value.__cause__}"
        assert not any(part in told for part in ("in-the-path", "pass-word", "user", str(closed_port), SECRET))
        assert failure.value.__suppress_context__


@pytest.mark.parametrize(
    "address",
    [
        "https://deploy.example.org/hook", "http://127.0.0.1:8080/", "http://localhost/hook", "http://[::1]:9/",
        "http://serving.models.svc/hook", "http://serving.models.svc.cluster.local:8080/hook",
    ],
)  # fmt: skip
def test_https_this_machine_and_services_of_the_cluster_may_be_called(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "http://deploy.example.org/", "http://10.0.0.1/", "http://serving", "http://evil.svc.example.org/",
        "http://notsvc/", "http://127.0.0.1.example.org/", "http://127.0.0.1@example.org/", "http://svc/",
    ],
)  # fmt: skip
def test_plain_http_to_another_host_is_refused_unless_it_is_allowed(address: str) -> None:
    with pytest.raises(UserError, match="plain http"):
        check_address(address)
    check_address(address, is_http_allowed=True)


@pytest.mark.parametrize(
    "address", ["ftp://deploy.example.org/", "deploy.example.org", "https://", "https:///path", "http://[::1", "file:///etc",
                "https://host:port/"]
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="no https address") as error:
        check_address(address, is_http_allowed=True)
    assert address not in str(error.value)


def test_hook_is_what_the_environment_names(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRAINTUMOR_DEPLOY_HOOK", "BRAINTUMOR_DEPLOY_SECRET", "BRAINTUMOR_DEPLOY_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)
    assert configured_hook("brain-tumor") is None
    monkeypatch.setenv("BRAINTUMOR_DEPLOY_HOOK", hook.address)
    with pytest.raises(UserError, match="BRAINTUMOR_DEPLOY_SECRET"):
        configured_hook("brain-tumor")
    monkeypatch.setenv("BRAINTUMOR_DEPLOY_SECRET", SECRET)
    deploy = configured_hook("brain-tumor")
    assert deploy is not None
    deploy(recorded())
    assert len(hook.calls) == 1
    monkeypatch.setenv("BRAINTUMOR_DEPLOY_HOOK", "http://deploy.example.org/")
    with pytest.raises(UserError, match="plain http"):
        configured_hook("brain-tumor")
    monkeypatch.setenv("BRAINTUMOR_DEPLOY_ALLOW_HTTP", "true")
    assert configured_hook("brain-tumor") is not None
