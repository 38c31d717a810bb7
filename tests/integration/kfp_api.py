"""A stand-in for the REST API of Kubeflow Pipelines (v2beta1): it keeps state and enforces the documented rules.

Written from the API's reference and the client's generated models. It runs nothing: a run stays as it was created until
a test says otherwise. A test can let any request fail, and look at what every request left.
"""

import contextlib
import json
import re
import ssl
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Item = dict[str, Any]
Fault = Literal["500", "drop", "lose"]  # answered with an error; dropped before; carried out, and the answer lost
HTTP_OF_CODE = {3: 400, 5: 404, 6: 409, 7: 403, 16: 401}
SORTABLE = {"created_at", "display_name", "updated_at", "finished_at"}
PREFIX = "/apis/v2beta1"


class ApiError(Exception):
    """An answer other than 200, with a code of gRPC."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> ApiError:
    return ApiError(3, f"Invalid input error: {message}")


@dataclass
class KfpApi:
    """The state of one cluster, and how it misbehaves."""

    token: str | None = None
    multi_user: bool = False
    namespaces: tuple[str, ...] = ("team-a",)  # that the token may use
    page_limit: int = 2
    faults: dict[int, Fault] = field(default_factory=dict)  # by the number of the request, from 1
    before: dict[str, Callable[["KfpApi"], object]] = field(default_factory=dict)  # somebody is faster, once a request
    front: Literal["none", "html", "redirect", "hang", "gateway"] = "none"  # what stands before the API

    experiments: dict[str, Item] = field(default_factory=dict)
    pipelines: dict[str, Item] = field(default_factory=dict)
    versions: dict[str, Item] = field(default_factory=dict)
    runs: dict[str, Item] = field(default_factory=dict)
    recurring_runs: dict[str, Item] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    enabled_after: list[Counter[str]] = field(default_factory=list)  # recurring runs by name, after each request
    address: str = ""
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def serving(self, tls: ssl.SSLContext | None = None) -> Iterator["KfpApi"]:
        """It answers at `address`, on a port of its own."""
        lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every answer waits for 40 ms

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    answer = api.answer(self.command, self.path, dict(self.headers.items()), body)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = handle_any

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.address = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.is_over.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def enabled(self, name: str) -> list[Item]:
        """The enabled recurring runs of this name."""
        return [run for run in self.recurring_runs.values() if run["display_name"] == name and run["mode"] == "ENABLE"]

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes] | None:
        """Status, headers and body; None: the connection ends without an answer."""
        url = urlsplit(target)
        self.requests.append(f"{method} {url.path}")
        self.headers.append({key.lower(): value for key, value in headers.items()})
        fault = self.faults.get(len(self.requests))
        json_type = {"Content-Type": "application/json"}
        if self.front == "hang":
            self.is_over.wait()
            return None
        if self.front == "html":
            return 200, {"Content-Type": "text/html"}, b"<!doctype html><title>Sign in</title>"
        if self.front == "redirect":
            return 302, {"Location": "/dex/auth?client_id=kubeflow"}, b""
        if self.front == "gateway":
            return 503, {"Content-Type": "text/plain"}, b"no healthy upstream"
        if fault == "drop":
            return None
        try:
            if fault == "500":
                raise ApiError(13, "Internal Server Error: the database is away")
            if self.token is not None and self.headers[-1].get("authorization") != f"Bearer {self.token}":
                raise ApiError(16, "Unauthenticated: Request header error: token is not valid")
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if somebody := self.before.pop(self.requests[-1], None):
                somebody(self)
            content = self._route(method, unquote(url.path), query, body)
            status = 200
        except ApiError as error:
            status = HTTP_OF_CODE.get(error.code, 500)
            detail = {"@type": "type.googleapis.com/google.rpc.Status", "code": error.code, "message": str(error)}
            content = {"error": str(error), "code": error.code, "message": str(error), "details": [detail]}
            if "/upload" in url.path:
                content = {"error_message": str(error), "error_details": str(error)}
        self.enabled_after.append(
            Counter(run["display_name"] for run in self.recurring_runs.values() if run["mode"] == "ENABLE")
        )
        if fault == "lose":
            return None
        return status, json_type, json.dumps(content).encode()

    def _route(self, method: str, path: str, query: dict[str, str], body: bytes) -> Item:
        name = path.removeprefix(PREFIX)
        routes: list[tuple[str, str, Callable[..., Item]]] = [
            ("GET", "/healthz", lambda: {"multi_user": True, "pipeline_store": "database"} if self.multi_user else {}),
            ("GET", "/experiments", lambda: self._list("experiments", self.experiments, query)),
            ("POST", "/experiments", lambda: self.create_experiment(json.loads(body))),
            ("GET", "/pipelines", lambda: self._list("pipelines", self.pipelines, query)),
            ("POST", "/pipelines", lambda: self.create_pipeline(json.loads(body))),
            ("POST", "/pipelines/upload_version", lambda: self._upload_version(query, body)),
            ("GET", "/pipelines/([^/]+)/versions", lambda pipeline: self._list_versions(pipeline, query)),
            ("GET", "/pipelines/([^/]+)/versions/([^/]+)", lambda _, version: self._get("versions", version)),
            ("GET", "/runs", lambda: self._list("runs", self.runs, query)),
            ("POST", "/runs", lambda: self._create_run(json.loads(body))),
            ("GET", "/runs/([^/]+)", lambda run: self._get("runs", run)),
            ("GET", "/recurringruns", lambda: self._list("recurringRuns", self.recurring_runs, query)),
            ("POST", "/recurringruns", lambda: self._create_recurring_run(json.loads(body))),
            ("DELETE", "/recurringruns/([^/]+)", lambda run: self._delete_recurring_run(run, query)),
        ]
        for verb, pattern, handle in routes:
            match = re.fullmatch(pattern, name)
            if match and verb == method:
                return handle(*match.groups())
        raise ApiError(5, f"Not Found: {method} {path}")

    def _get(self, kind: str, key: str) -> Item:
        if key not in getattr(self, kind):
            raise ApiError(5, f"ResourceNotFoundError: {kind} {key} not found")
        found: Item = getattr(self, kind)[key]
        return found

    def _namespace(self, given: str | None) -> str:
        if not self.multi_user:
            return ""
        if not given:
            raise invalid("Namespace cannot be empty in multi-user mode")
        if given not in self.namespaces:
            raise ApiError(7, f"PermissionDenied: User is not authorized in namespace {given}")
        return given

    def _list(self, field_name: str, items: dict[str, Item], query: dict[str, str]) -> Item:
        experiment = query.get("experiment_id")
        if experiment:
            self._get("experiments", experiment)
            chosen = [item for item in items.values() if item["experiment_id"] == experiment]
        else:
            namespace = self._namespace(query.get("namespace"))
            chosen = [item for item in items.values() if item["namespace"] == namespace]
        return self._page(field_name, chosen, query)

    def _list_versions(self, pipeline: str, query: dict[str, str]) -> Item:
        self._get("pipelines", pipeline)
        chosen = [version for version in self.versions.values() if version["pipeline_id"] == pipeline]
        return self._page("pipeline_versions", chosen, query)

    def _page(self, field_name: str, chosen: list[Item], query: dict[str, str]) -> Item:
        asked = [query.get("sort_by", ""), query.get("filter", "")]
        start = 0
        if query.get("page_token"):
            start, *before = json.loads(query["page_token"])
            if before != asked:
                raise invalid("page token does not match the sort_by and filter of the request")
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            if predicate["operation"] != "EQUALS" or predicate["key"] != "display_name":
                raise invalid(f"the stand-in knows no filter {predicate}")
            # As the real one does: names are compared without regard to case.
            wanted = predicate["stringValue"].lower()
            chosen = [item for item in chosen if item["display_name"].lower() == wanted]
        key, _, order = (query.get("sort_by") or "created_at asc").partition(" ")
        if key not in SORTABLE or order not in ("", "asc", "desc"):
            raise invalid(f"Invalid sorting field: {query.get('sort_by')}")
        chosen = sorted(chosen, key=lambda item: item[key], reverse=order == "desc")
        size = min(int(query.get("page_size") or 10), self.page_limit)
        answer: Item = {field_name: chosen[start : start + size], "total_size": len(chosen)}
        if start + size < len(chosen):
            answer["next_page_token"] = json.dumps([start + size, *asked])
        return {key: value for key, value in answer.items() if value}  # the API leaves out what is empty

    def _made(self, id_name: str, item: Item) -> Item:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")  # seconds alone, as in the real one
        return item | {id_name: str(uuid.uuid4()), "created_at": item.get("created_at", now)}

    def create_experiment(self, given: Item) -> Item:
        namespace = self._namespace(given.get("namespace"))
        self._must_be_new(self.experiments, given["display_name"], namespace, "Experiment")
        item = self._made("experiment_id", {"display_name": given["display_name"], "namespace": namespace})
        self.experiments[item["experiment_id"]] = item
        return item

    def create_pipeline(self, given: Item) -> Item:
        namespace = self._namespace(given.get("namespace"))
        name = given.get("display_name") or given.get("name") or ""
        if not name.strip():
            raise invalid("Pipeline name is empty")
        self._must_be_new(self.pipelines, name, namespace, "Pipeline")
        item = self._made("pipeline_id", {"display_name": name, "name": name, "namespace": namespace})
        self.pipelines[item["pipeline_id"]] = item
        return item

    def _must_be_new(self, items: dict[str, Item], name: str, namespace: str, kind: str) -> None:
        if any(
            (item["display_name"].lower(), item["namespace"]) == (name.lower(), namespace) for item in items.values()
        ):
            raise ApiError(6, f"Already exist error: {kind} {name} already exists. Use a different name")

    def _upload_version(self, query: dict[str, str], body: bytes) -> Item:
        pipeline = self._get("pipelines", query.get("pipelineid", ""))
        package = _uploaded_file(self.headers[-1].get("content-type", ""), body)
        name = query.get("name") or ""
        if not 1 <= len(name) <= 127:
            raise invalid("PipelineVersion.Name must have 1 to 127 characters")
        siblings = [one for one in self.versions.values() if one["pipeline_id"] == pipeline["pipeline_id"]]
        if any(one["display_name"] == name for one in siblings):
            raise ApiError(6, "Failed to create a pipeline version")
        spec = read_package(package)
        item = self._made(
            "pipeline_version_id",
            {"pipeline_id": pipeline["pipeline_id"], "display_name": name, "name": name, "pipeline_spec": spec},
        )
        self.versions[item["pipeline_version_id"]] = item
        self.uploads.append(package)
        return item

    def _started(self, given: Item) -> Item:
        """What runs and recurring runs are checked for."""
        if not given.get("display_name"):
            raise invalid("the name is empty")
        experiment = self._get("experiments", given.get("experiment_id", ""))
        self._namespace(experiment["namespace"])
        reference = given.get("pipeline_version_reference") or {}
        if not reference.get("pipeline_id") or not reference.get("pipeline_version_id"):
            raise invalid("both pipeline_id and pipeline_version_id are needed")
        version = self._get("versions", reference["pipeline_version_id"])
        if version["pipeline_id"] != reference["pipeline_id"]:
            raise invalid("the version belongs to another pipeline")
        spec = version["pipeline_spec"]
        inputs = spec.get("pipeline_spec", spec)["root"].get("inputDefinitions", {}).get("parameters", {})
        parameters = (given.get("runtime_config") or {}).get("parameters") or {}
        if unknown := sorted(set(parameters) - set(inputs)):
            raise invalid(f"parameter {unknown[0]} is not found in the pipeline's input definitions")
        for name, value in parameters.items():
            kind = {"STRING": str, "BOOLEAN": bool}.get(inputs[name]["parameterType"], object)
            if not isinstance(value, kind):
                raise invalid(f"input parameter {name} requires type {inputs[name]['parameterType']}")
        kept = {"display_name", "experiment_id", "pipeline_version_reference", "runtime_config", "service_account"}
        return {key: value for key, value in given.items() if key in kept} | {"namespace": experiment["namespace"]}

    def _create_run(self, given: Item) -> Item:
        item = self._made("run_id", self._started(given) | {"state": "PENDING", "finished_at": "1970-01-01T00:00:00Z"})
        self.runs[item["run_id"]] = item
        return item

    def _create_recurring_run(self, given: Item) -> Item:
        item = self._started(given)
        cron = ((given.get("trigger") or {}).get("cron_schedule") or {}).get("cron") or ""
        if len(cron.split()) != 6:
            raise invalid(f"Schedule cron is not supported: {cron}")
        concurrency = int(given.get("max_concurrency") or 0)
        if not 1 <= concurrency <= 10:
            raise invalid("Max concurrency of the recurring run must be at least 1 and at most 10")
        if given.get("mode") not in ("ENABLE", "DISABLE"):
            raise invalid("the mode of the recurring run is invalid")
        item |= {
            "trigger": given["trigger"],
            "mode": given["mode"],
            "status": "STATUS_UNSPECIFIED",  # until the controller has seen it
            "max_concurrency": str(concurrency),  # 64 bits: a string in JSON
        }
        if given.get("no_catchup"):  # false is left out
            item["no_catchup"] = True
        item = self._made("recurring_run_id", item)
        self.recurring_runs[item["recurring_run_id"]] = item
        return item

    def _delete_recurring_run(self, key: str, query: dict[str, str]) -> Item:
        self._get("recurring_runs", key)
        del self.recurring_runs[key]
        if query.get("propagation_policy") != "ORPHAN":
            for run in self.runs.values():
                if run.get("recurring_run_id") == key and run["state"] == "RUNNING":
                    run["state"] = "FAILED"  # Kubernetes removes what the schedule owns
        return {}


def read_package(text: str) -> Item:
    """The specification as the API gives it back; the text is cut as the real one cuts it."""
    pipeline: Item = {}
    platform: Item = {}
    for part in text.split("\n---\n"):
        try:
            document = yaml.safe_load(part)
        except yaml.YAMLError as error:
            raise invalid(f"Failed to parse the pipeline spec: {str(error).splitlines()[0]}") from error
        if not isinstance(document, dict):
            raise invalid("unknown template format: pipeline spec is invalid")
        if "kubernetes" in (document.get("platforms") or {}):
            platform = document
        else:
            pipeline = document
    if not {"pipelineInfo", "root", "deploymentSpec", "schemaVersion"} <= set(pipeline):
        raise invalid("No pipeline spec provided in yaml doc")
    return {"pipeline_spec": pipeline, "platform_spec": platform} if platform else pipeline


def _uploaded_file(kind: str, body: bytes) -> str:
    message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    for part in message.iter_parts():
        if part.get_param("name", header="content-disposition") == "uploadfile":
            if not str(part.get_filename()).endswith((".yaml", ".yml")):
                raise invalid("unexpected pipeline file format")
            return bytes(part.get_payload(decode=True)).decode()
    raise invalid("Failed to read pipeline from file")
