"""A stand-in for the part of the Kubernetes API that holds TrainJobs: it keeps state, and enforces its rules.

It runs nothing. What would happen meanwhile is a list of functions, one of which is called before each answer to a
reader of a job. Any request can be refused, answered with an error, or lost.
"""

import contextlib
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema

Item = dict[str, Any]
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((Path(__file__).parents[1] / "contract/training_schemas.json").read_text())
)
JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/([^/]+)/trainjobs"


@dataclass
class TrainJobApi:
    """One namespace of one cluster, and how it misbehaves."""

    namespace: str = "team-a"
    token: str = "t0ken"
    has_trainer: bool = True
    has_rights: bool = True
    faults: dict[int, str] = field(default_factory=dict)  # by the number of the request, from 1: 503 or drop
    meanwhile: list[Callable[["TrainJobApi"], object]] = field(default_factory=list)
    stays: int = 0  # readers that still find a job which was deleted

    jobs: dict[str, Item] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    created: list[Item] = field(default_factory=list)
    port: int = 0

    @contextlib.contextmanager
    def serving(self, certificate: Path) -> Iterator["TrainJobApi"]:
        """It answers on `port` of 127.0.0.1, by TLS, as the real one."""
        lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    answer = api.answer(self.command, self.path, self.headers.get("Authorization") or "", body)
                if answer is None:
                    self.close_connection = True
                    return
                status, content = answer
                kind = "application/json" if content[:1] == b"{" else "text/plain"
                self.send_response(status)
                for key, value in (("Content-Type", kind), ("Content-Length", str(len(content)))):
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.port = server.server_port
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, method: str, target: str, authorization: str, body: bytes) -> tuple[int, bytes] | None:
        """Status and body; None: the connection ends without an answer."""
        path = target.partition("?")[0]
        self.requests.append(f"{method} {path}")
        fault = self.faults.get(len(self.requests))
        if fault == "drop":
            return None
        if fault is not None:
            return int(fault), b"upstream connect error"
        if authorization.lower() != f"bearer {self.token}":
            return status(401, "Unauthorized", "Unauthorized")
        if path == f"/api/v1/namespaces/{self.namespace}/pods/launcher-0":
            owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-7", "uid": "u-7",
                     "controller": True, "blockOwnerDeletion": True}  # fmt: skip
            return 200, json.dumps({"metadata": {"name": "launcher-0", "ownerReferences": [owner]}}).encode()
        match = re.fullmatch(f"{JOBS}(?:/([^/]+))?", path)
        if match is None or not self.has_trainer:
            return 404, b"404 page not found\n"
        if match[1] != self.namespace or not self.has_rights:
            return status(403, "Forbidden", "trainjobs.trainer.kubeflow.org is forbidden: no right to it")
        return {"GET": self._get, "DELETE": self._delete}[method](match[2]) if match[2] else self._create(body)

    def _get(self, name: str) -> tuple[int, bytes]:
        if self.meanwhile and name in self.jobs:
            self.meanwhile.pop(0)(self)
        job = self.jobs.get(name)
        if job is not None and "deletionTimestamp" in job["metadata"]:
            self.stays -= 1
            if self.stays < 0:
                del self.jobs[name]
                job = None
        if job is None:
            return status(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
        return 200, json.dumps(job).encode()

    def _delete(self, name: str) -> tuple[int, bytes]:
        if name not in self.jobs:
            return status(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
        if self.stays:
            self.jobs[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            del self.jobs[name]
        return 200, json.dumps({"kind": "Status", "status": "Success"}).encode()

    def _create(self, body: bytes) -> tuple[int, bytes]:
        job = json.loads(body)
        name = job["metadata"]["name"]
        if name in self.jobs:
            return status(409, "AlreadyExists", f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        try:
            SCHEMA.validate(job)
        except jsonschema.ValidationError as error:
            return status(422, "Invalid", error.message)
        self.created.append(json.loads(body))
        job["metadata"] |= {"namespace": self.namespace, "uid": str(uuid.uuid4())}
        self.jobs[name] = job
        return 201, json.dumps(job).encode()

    def end(self, kind: str, message: str = "jobset failed due to one or more job failures") -> None:
        """The one job has this condition."""
        (job,) = self.jobs.values()
        job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": "JobSet", "message": message}]}


def status(code: int, reason: str, message: str) -> tuple[int, bytes]:
    content = {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code}
    return code, json.dumps(content).encode()
