"""Commands as a person types them, small data sets, and a real S3 server with a proxy that fails on demand."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import boto3
import pytest
from small_project import make_dataset, write_params

from braintumor.cli import main

KEY, SECRET = "tester", "tester-secret"


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture
def braintumor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command as a person types it; an exception that would be a traceback fails the test."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["braintumor", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        told = capfd.readouterr()
        assert "Traceback" not in told.err
        return Finished(code, told.out, told.err)

    return run


@pytest.fixture(scope="session")
def dataset_maker() -> Callable[..., Path]:
    """`make_dataset`, for test modules that can't import it."""
    return make_dataset


@pytest.fixture(scope="session")
def params_writer() -> Callable[..., Path]:
    """`write_params`, for test modules that can't import it."""
    return write_params


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """Ask for so many loopback ports that nobody listens at."""

    def find(count: int) -> list[int]:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            return [int(one.getsockname()[1]) for one in sockets]

    return find


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory, free_ports: Any) -> Iterator[str]:
    """The address of a SeaweedFS server with the buckets `weights` and `data`, on loopback."""
    folder = tmp_path_factory.mktemp("seaweed")
    identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    # Between the question for a port and its use another process may have got it.
    for attempt in (1, 2, 3, 4):
        ports = free_ports(8)
        with (folder / "log").open("w") as log, _seaweed(folder, ports, log) as server:
            try:
                address = f"http://127.0.0.1:{ports[3]}"
                if _wait_until_ready(address, server, folder / "log", is_last=attempt == 4):
                    yield address
                    return
            finally:
                server.kill()


def _seaweed(folder: Path, ports: list[int], log: IO[str]) -> subprocess.Popen[bytes]:
    names = ("master", "volume", "filer", "s3")
    command = [
        str(Path(sys.executable).with_name("weed")), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}",
        "-s3", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        # Each bucket takes several volumes; of the default eight none is left for the third.
        "-master.volumeSizeLimitMB=64", "-volume.max=100", "-master.telemetry=false",
        *(f"-{name}.port={port}" for name, port in zip(names, ports[:4], strict=True)),
        *(f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=log, stderr=log)


def _wait_until_ready(address: str, server: subprocess.Popen[bytes], log: Path, *, is_last: bool) -> bool:
    """Whether the server answers and takes objects; False if it ended, and there is another attempt."""
    client = boto3.client("s3", endpoint_url=address, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
                          region_name="us-east-1")  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                pass
        except urllib.error.HTTPError:
            pass
        except OSError:
            has_ended = server.poll() is not None
            if has_ended and not is_last:
                return False
            assert not has_ended and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
            continue
        try:
            for bucket in ("weights", "data"):
                client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=bucket, Key="ready", Body=b"")
            return True
        except Exception:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


@pytest.fixture(scope="session")
def s3_environment(s3: str) -> dict[str, str]:
    """boto3's own environment variables."""
    return {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def client(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server; its settings are in the environment for the test's own clients, too."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


# What the proxy does with a request: None lets it through, a number is the status of the answer.
Rule = Callable[[str, str], str | int | None]


@dataclass
class Proxy:
    """An HTTP proxy on loopback in front of the S3 server."""

    address: str
    rule: Rule = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path with query
    error: str = "InternalError"  # the code in answers that are no success
    may_go_on: threading.Event = field(default_factory=threading.Event)  # ends every stall
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fetched(self) -> list[str]:
        """The files that were asked for, by their md5; no lists of files."""
        paths = [path.partition("?")[0] for method, path in self.requests if method == "GET" and "/files/md5/" in path]
        return ["".join(path.rsplit("/", 2)[1:]) for path in paths if not path.endswith(".dir")]


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    """A proxy that lets everything through, until it is given a `rule`.

    A rule gives 'cut' (half of the body, then the connection ends), 'stall' (half of the body, then nothing), 'drop'
    (the request does not arrive), 'lost' (it does, and its answer does not), a status of 400 or more, or None.
    """
    upstream = s3.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with it.lock:
                it.requests.append((self.command, self.path))
                fate = it.rule(self.command, self.path)
            if fate == "drop":
                self.close_connection = True
                return
            if isinstance(fate, int):
                text = f"<Error><Code>{it.error}</Code><Message>as the test wants it</Message></Error>".encode()
                self.send(fate, [], text)
                return
            connection = http.client.HTTPConnection(upstream, timeout=30)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if fate == "lost":
                self.close_connection = True
                return
            self.send(response.status, response.getheaders(), content, fate)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def send(self, status: int, headers: list[tuple[str, str]], content: bytes, fate: object = None) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                    self.send_header(name, value)
            length = next((value for name, value in headers if name.lower() == "content-length"), str(len(content)))
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fate else content)
            self.wfile.flush()
            if fate:
                self.close_connection = True
            if fate == "stall":
                it.may_go_on.wait(60)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the client was killed

    with Server(("127.0.0.1", 0), Handler) as server:
        it = Proxy(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield it
        it.may_go_on.set()
        server.shutdown()
