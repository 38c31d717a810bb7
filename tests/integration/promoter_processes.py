"""Promoters as processes, and what is around them: an MLflow server, a way to it that fails, and a deployment hook."""

import base64
import hashlib
import hmac
import http.client
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

from braintumor.params import Params
from braintumor.registry import ledger
from braintumor.steps.gate import gate
from braintumor.steps.register import register

ROOT = Path(__file__).parents[2]
STARTUP_S = 120
ROUND_S = 60  # within which a promoter has done what there is
SECRET, HOOK_SECRET = "the webhook's very secret", "the hook's very secret"
POLL_S = 1

# A process that starts in no time: forked where all is imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "braintumor.cli",
        "braintumor.promoter",
        "fastapi",
        "uvicorn",
        "mlflow.tracking.client",
        "mlflow.artifacts",
        "h5py",
    ]
)
# It runs the command as a person types it, on a machine whose clock may be wrong.
COMMAND = """
import datetime, os, sys, time
os.chdir(folder)
os.environ.update(environment)
output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1), os.dup2(output, 2)
right_time, right_datetime = time.time, datetime.datetime
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        return right_datetime.now(zone) + datetime.timedelta(hours=clock_hours)
time.time = lambda: right_time() + 3600 * clock_hours
for name, module in list(sys.modules.items()):
    if name.startswith("braintumor.") and hasattr(module, "datetime"):
        module.datetime = Shifted
sys.argv = ["braintumor", "promoter", *arguments]
from braintumor.cli import main
main()
"""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The caller is dead."""


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The handler answers at this address."""
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@dataclass
class Hook:
    """A deployment hook: what it got, and what it does before it answers with `status`."""

    address: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    before_answer: Callable[[], None] = lambda: None

    @property
    def keys(self) -> list[str]:
        """The idempotency keys in the order of their first call."""
        return list(dict.fromkeys(call["entry_sha256"] for call in self.calls))


@contextmanager
def serving_hook() -> Iterator[Hook]:
    """A hook that takes everything, and fails the call whose signature is wrong."""
    it = Hook()

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = self.body()
            key, timestamp = self.headers["Idempotency-Key"], self.headers["X-Braintumor-Timestamp"]
            digest = hmac.new(HOOK_SECRET.encode(), f"{key}.{timestamp}.".encode() + body, hashlib.sha256).digest()
            assert self.headers["X-Braintumor-Signature"] == f"v1,{base64.b64encode(digest).decode()}"
            assert json.loads(body)["entry_sha256"] == key
            it.calls.append(json.loads(body))
            it.before_answer()
            self.send_response(it.status)
            self.send_header("Content-Length", "0")
            if 300 <= it.status < 400:
                self.send_header("Location", it.address)
            self.end_headers()

    with served(Handler) as it.address:
        yield it


@dataclass
class Proxy:
    """A way to the MLflow server that sees every request, and may be away."""

    address: str = ""
    n_writes: int = 0
    n_requests: int = 0
    is_away: bool = False
    after_write: Callable[[int], None] = lambda number: None
    after_request: Callable[[int], None] = lambda number: None
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def proxy_to(server: str) -> Iterator[Proxy]:
    """A proxy that lets everything through."""
    it = Proxy()
    host = server.removeprefix("http://")

    class Handler(Quiet):
        def answer(self) -> None:
            body = self.body()
            if it.is_away:
                self.close_connection = True
                return
            connection = http.client.HTTPConnection(host, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body or None, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            is_write = self.command != "GET" and not self.path.partition("?")[0].endswith("/search")
            with it.lock:
                it.n_requests += 1
                it.n_writes += is_write
                it.after_request(it.n_requests)
                if is_write:
                    it.after_write(it.n_writes)
            self.send_response_only(response.status)
            for name, value in response.getheaders():
                if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    with served(Handler) as it.address:
        yield it


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """An MLflow server whose webhooks may call this machine."""
    from cryptography.fernet import Fernet

    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination", str(folder / "server-artifacts"), "--serve-artifacts",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_CACHE_TTL": "0",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTUP_S
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Registry:
    """Two registered versions of a model, '1' and '2', with neither champion nor ledger at first."""

    client: MlflowClient
    name: str
    params_file: Path

    def promote(self, version: str) -> None:
        """As the UI does it."""
        self.client.set_registered_model_alias(self.name, "champion", version)

    def poll_every(self, seconds: int) -> None:
        """Promoters that start from now on ask so seldom."""
        content = yaml.safe_load(self.params_file.read_text())
        content["promote"]["poll_seconds"] = seconds
        self.params_file.write_text(yaml.safe_dump(content))

    def remove(self) -> None:
        self.client.delete_registered_model_alias(self.name, "champion")

    @property
    def champion(self) -> str | None:
        found = self.client.get_registered_model(self.name).aliases.get("champion")
        return None if found is None else str(found)

    @property
    def entries(self) -> list[ledger.Recorded]:
        return ledger.read(self.client, self.name)

    @property
    def actions(self) -> list[tuple[str, str | None]]:
        return [(one.entry.action, one.entry.version) for one in self.entries]

    @property
    def n_open(self) -> int:
        return sum(one.is_open for one in self.entries)

    def check(self, hook: Hook | None = None) -> None:
        """All is in line, and every change was deployed, in order."""
        assert ledger.verify(self.client, self.name).problems == []
        assert self.n_open == 0
        assert self.champion == ledger.champion_of(self.entries)
        if hook is not None:
            assert hook.keys == [one.sha256 for one in self.entries if one.entry.action != "refused"]

    def clear(self) -> None:
        """There are no promotions, and there never were any."""
        if self.champion is not None:
            self.remove()
        for version in self.client.search_model_versions(f"name = '{self.name}'"):
            for tag in version.tags:
                if tag.startswith("promotion."):
                    self.client.delete_model_version_tag(self.name, version.version, tag)
        experiment = self.client.get_experiment_by_name(ledger.experiment_name(self.name))
        if experiment is not None:
            self.client.set_experiment_tag(experiment.experiment_id, ledger.LEDGER_OF, "nothing")
            self.client.rename_experiment(experiment.experiment_id, f"cleared {uuid.uuid4()}")
            self.client.delete_experiment(experiment.experiment_id)


def cleared_registry(server: str, folder: Path, make_folders: Callable[..., Any], params: Params) -> Registry:
    """The server holds both versions, and nothing else that matters; the parameters file is in `folder`."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["promote"]["poll_seconds"] = POLL_S
    params_file = folder / "promoter.yaml"
    params_file.write_text(yaml.safe_dump(content))
    registry = Registry(MlflowClient(server), params.registration.model_name, params_file)
    if not registry.client.search_registered_models():
        for seed in (1, 2):
            it = make_folders(f"build-{seed}", seed)
            gate(it.evaluation, it.context, it.validation, it.decision, params.gate)
            register(
                it.model, it.splits, it.evaluation, it.decision, it.context, it.validation, it.registration, params
            )
    registry.clear()
    return registry


@dataclass
class Promoters:
    """Starts promoters, each a process; what they say is in `log`."""

    registry: Registry
    environment: dict[str, str]
    log: Path
    started: list[BaseProcess] = field(default_factory=list)

    def start(self, *arguments: str, clock_hours: int = 0, **environment: str) -> BaseProcess:
        values = {
            "folder": str(self.registry.params_file.parent),
            "environment": self.environment | environment,
            "log": str(self.log),
            "clock_hours": clock_hours,
            "arguments": ["--params", str(self.registry.params_file), *arguments],
        }
        # `exec`, because the fork can't import a test module.
        process = FORKS.Process(target=exec, args=(COMMAND, values))
        process.start()
        self.started.append(process)
        return process

    def once(self, **options: Any) -> int | None:
        """A promoter has done what there is; its exit code."""
        process = self.start("--once", **options)
        process.join(ROUND_S)
        assert process.exitcode is not None, "it does not end"
        return process.exitcode

    def serve(self, **options: Any) -> tuple[BaseProcess, str]:
        """A promoter that serves, and its address."""
        n_before = len(self.said())
        process = self.start("--listen", "127.0.0.1:0", **options)
        found = wait_for(lambda: re.search(r"listening at (\S+),", self.said()[n_before:]))
        return process, f"http://{found[1]}"

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@contextmanager
def promoters_of(registry: Registry, server: str, hook: Hook, log: Path) -> Iterator[Promoters]:
    """No promoter yet; those that were started are gone afterwards, and have told no secret and shown no traceback."""
    environment = {
        "MLFLOW_TRACKING_URI": server,
        "BRAINTUMOR_WEBHOOK_SECRET": SECRET,
        "BRAINTUMOR_DEPLOY_HOOK": hook.address,
        "BRAINTUMOR_DEPLOY_SECRET": HOOK_SECRET,
    }
    it = Promoters(registry, environment, log)
    try:
        yield it
    finally:
        for process in it.started:
            process.kill()
            process.join()
    assert "Traceback" not in it.said()
    assert SECRET not in it.said() and HOOK_SECRET not in it.said()


def wait_for(is_so: Callable[[], Any], seconds: float = ROUND_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found
