"""The promoter: a service that brings ledger, alias and deployment into line, whenever something may have changed.

MLflow's webhook only wakes it: whatever it does rests on what it reads in the registry. The poll finds what no webhook
told, so a lost, forged or replayed call costs time at most.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import queue
import random
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING

from braintumor.deployment import HOOK_VARIABLE, SECRET_VARIABLE, configured_hook
from braintumor.errors import UserError
from braintumor.params import Profile
from braintumor.progress import note
from braintumor.registry import ledger, promotions
from braintumor.registry.provisioning import WEBHOOK_SECRET_VARIABLE
from braintumor.registry.server import connected

if TYPE_CHECKING:
    from fastapi import FastAPI

SIGNATURE_HEADER, SIGNATURE_VERSION = "X-MLflow-Signature", "v1"
TIMESTAMP_HEADER, DELIVERY_HEADER = "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"
MAX_AGE_S = 300  # of a webhook's call, before or after our clock
MAX_BODY_BYTES = 1 << 16
MAX_BODY_S = 10.0

MIN_GAP_S = 1.0  # between the beginnings of two rounds, however often somebody calls
JITTER = 0.1  # so that two promoters don't ask in step
MAX_DOUBLINGS, MAX_PAUSE_S = 4, 300.0
STUCK_AFTER_S = 900.0  # without the end of a round, beside the pause
SECONDS_BETWEEN_REFUSALS = 60.0  # in the log: who forges calls must not fill it

SECRETS = (
    WEBHOOK_SECRET_VARIABLE, SECRET_VARIABLE, HOOK_VARIABLE, "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip
LOGIN = re.compile(r"//[^/\s]*@")


@dataclass(frozen=True)
class Health:
    """What is known of the last round; `last_error` is empty after a round that came to its end."""

    last_round: str = ""
    last_good_round: str = ""
    last_error: str = ""
    entries: int = 0
    open_entries: int = 0
    head_sha256: str = ""


class Promoter:
    """Rounds of reconciling, each of which reads all facts anew."""

    def __init__(self, params: Profile) -> None:
        self.params = params
        self.health = Health()
        self._model_name = params.registration.model_name
        self._deploy = configured_hook(self._model_name)
        self._failures = 0
        self._healthy_until = time.monotonic() + STUCK_AFTER_S

    @property
    def is_stuck(self) -> bool:
        """Whether a round takes so long that only a new process helps."""
        return time.monotonic() > self._healthy_until

    def reconcile(self) -> Sequence[str]:
        """Ledger, alias, pages and hook are in line; a line for each thing that was done. Raises UserError."""
        outcomes = promotions.reconcile(self.params, deploy=self._deploy)
        return [str(outcome) for outcome in outcomes]

    def round(self) -> float:
        """One round; its failure is told and kept in `health`, not raised. Seconds until the next."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            undeployed = self._carry_out()
            self._look()
            if undeployed is not None:
                raise undeployed
        except Exception as error:
            self._failures += 1
            self._fail(now, error)
        else:
            if self.health.last_error:
                log("in order again")
            self._failures = 0
            self.health = replace(self.health, last_round=now, last_good_round=now, last_error="")
        pause = self._pause()
        self._healthy_until = time.monotonic() + pause + STUCK_AFTER_S
        return pause

    def _carry_out(self) -> promotions.NotDeployed | None:
        try:
            for line in self.reconcile():
                log(line)
        except promotions.NotDeployed as error:
            return error
        return None

    def _look(self) -> None:
        with connected() as client:
            entries = ledger.read(client, self._model_name)
        n_open, head = sum(entry.is_open for entry in entries), entries[-1].sha256 if entries else ""
        self.health = replace(self.health, entries=len(entries), open_entries=n_open, head_sha256=head)

    def _fail(self, now: str, error: Exception) -> None:
        # An error of ours must not end the service: the next promotion may well succeed.
        is_expected = isinstance(error, UserError)
        told = without_secrets(str(error) if is_expected else f"{type(error).__name__}: {error}")
        if told != self.health.last_error:
            log(told if is_expected else without_secrets("".join(traceback.format_exception(error))))
        self.health = replace(self.health, last_round=now, last_error=told)

    def _pause(self) -> float:
        poll = float(self.params.promote.poll_seconds)
        pause = min(poll * 2 ** min(self._failures, MAX_DOUBLINGS), max(poll, MAX_PAUSE_S))
        return pause * random.uniform(1 - JITTER, 1 + JITTER)


def promote_once(params: Profile) -> Sequence[str]:
    """What reviewers changed up to now is in the ledger and deployed; a line for each thing that was done.

    Raises UserError, also where the deployment hook did not take its call.
    """
    return Promoter(params).reconcile()


def serve(params: Profile, listen: str) -> None:
    """Rounds until SIGTERM or SIGINT, which let the one under way end; a webhook's call or the poll begins one.

    `listen` is HOST:PORT. Raises UserError for a set-up that can't work; after that nothing ends it.
    """
    promoter, wakes = Promoter(params), queue.SimpleQueue[bool]()
    secret = os.environ.get(WEBHOOK_SECRET_VARIABLE, "").strip()
    if not secret:
        log(f"{WEBHOOK_SECRET_VARIABLE} is not set: every webhook is refused, and the poll alone finds changes")
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        wakes.put(False)  # a queue.SimpleQueue, because a signal handler may call it at any time

    def wake() -> None:
        if wakes.empty():
            wakes.put(True)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with listening(listen, create_app(secret, wake, promoter)) as place:
            log(f"listening at {place}, asking every {params.promote.poll_seconds} s")
            while not is_stopping:
                # Emptied before, not after: a call that comes during the round is about what the round may have missed.
                while not wakes.empty():
                    wakes.get()
                began = time.monotonic()
                pause = promoter.round()
                if is_stopping:
                    break
                try:
                    wakes.get(timeout=pause)
                    time.sleep(max(0.0, began + MIN_GAP_S - time.monotonic()))
                except queue.Empty:
                    pass
            log("stopped")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def create_app(secret: str, wake: Callable[[], None], promoter: Promoter) -> "FastAPI":
    """POST /webhook, which calls `wake` for MLflow's own calls alone, and GET /health."""
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    app = FastAPI(openapi_url=None)
    n_refused, told = 0, -SECONDS_BETWEEN_REFUSALS

    def refuse(reason: str) -> None:
        nonlocal n_refused, told
        n_refused += 1
        if time.monotonic() - told >= SECONDS_BETWEEN_REFUSALS:
            log(f"refused {n_refused} webhook call(s), the last one because {reason}")
            n_refused, told = 0, time.monotonic()

    @app.post("/webhook")
    async def webhook(request: Request) -> Response:
        body = bytearray()
        try:
            async with asyncio.timeout(MAX_BODY_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        refuse(f"it is longer than {MAX_BODY_BYTES} bytes")
                        return Response(status_code=413)
        except (TimeoutError, ClientDisconnect):
            refuse("it did not arrive whole")
            return Response(status_code=408)
        reason = why_refused(secret, request.headers, bytes(body), time.time())
        if reason:
            refuse(reason)
            return Response(status_code=401)
        wake()
        return Response(status_code=204)

    @app.get("/health")
    async def health() -> Response:
        is_stuck = promoter.is_stuck
        status = "stuck" if is_stuck else "failing" if promoter.health.last_error else "ok"
        return JSONResponse({"status": status, **asdict(promoter.health)}, status_code=503 if is_stuck else 200)

    return app


def why_refused(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> str:
    """Why this is no call of MLflow's that it made just now; '' if it is. `now`: seconds since 1970.

    The signature: 'v1,' and the base64 of HMAC-SHA256 over 'delivery-id.timestamp.body'.
    """
    if not secret:
        return f"{WEBHOOK_SECRET_VARIABLE} is not set"
    delivery, timestamp = headers.get(DELIVERY_HEADER, ""), headers.get(TIMESTAMP_HEADER, "")
    version, _, signature = headers.get(SIGNATURE_HEADER, "").partition(",")
    expected = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    try:
        given = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        given = b""
    if version != SIGNATURE_VERSION or not hmac.compare_digest(given, expected):
        return "its signature is missing or wrong"
    if not re.fullmatch(r"[0-9]{1,12}", timestamp) or abs(now - int(timestamp)) > MAX_AGE_S:
        return "its time is not now: it is replayed, or the clocks differ"
    return ""


@contextmanager
def listening(listen: str, app: "FastAPI") -> Iterator[str]:
    """Inside the block the app answers at HOST:PORT; gives the place, with the port that 0 became."""
    import uvicorn

    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"--listen {listen!r} is no HOST:PORT; give it like 0.0.0.0:8080")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family)
    except OSError as error:
        raise UserError(f"--listen {listen} can't be used ({error.strerror}); give another place") from error
    config = uvicorn.Config(
        app, log_config=None, log_level="error", access_log=False, server_header=False, proxy_headers=False,
        ws="none", lifespan="off", timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = uvicorn.Server(config)
    # Not in the main thread: there the rounds are, and the signals.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def log(line: str) -> None:
    """A thing that happened, with its time, on stderr."""
    note(f"{datetime.now(UTC).isoformat(timespec='seconds')} {without_secrets(line)}")


def without_secrets(text: str) -> str:
    """`text` without the secrets of the environment and without logins in addresses."""
    for name in SECRETS:
        value = os.environ.get(name, "").strip()
        if value:
            text = text.replace(value, "***")
    return LOGIN.sub("//***@", text)
