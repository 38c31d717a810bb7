"""The way to the MLflow server: its address, how long we wait for it, and its failures in words."""

import errno
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braintumor.errors import RegistryUnreachable, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
SERVER = ("http://", "https://")
DEFAULT_DATABASE = "mlflow.db"
ARTIFACT_FOLDER = "mlartifacts"
CHAMPION = "champion"

# MLflow's own defaults wait four minutes for a server that is away. A value that the user sets comes first.
RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}
# For calls that must not hold anybody up: at most 2 x 5 s and a pause.
IMPATIENCE = {**RETRIES, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
# Read by MLflow when it is first imported. A value that the user sets comes first.
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    # The address that MLflow prints holds the user and password that MLFLOW_TRACKING_URI may have.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

UNREACHABLE_CODES = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "ENDPOINT_NOT_FOUND", "DEADLINE_EXCEEDED"}
)
REFUSED_CODES = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"})
# MLflow lets these libraries' exceptions through when its database or artifact store fails.
# Failures of the disk and the limits of the machine that we run on.
OWN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO)
TRANSPORT_LIBRARIES = frozenset({"requests", "urllib3", "sqlalchemy", "botocore", "boto3", "s3transfer"})

# The servers that this process has found to be of our major version.
_known_servers: set[str] = set()


def tracking_uri() -> str:
    """The address in MLFLOW_TRACKING_URI, else an SQLite database in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"{SQLITE}{Path.cwd() / DEFAULT_DATABASE}"


def database_file(address: str) -> Path | None:
    """The absolute path of an SQLite store's file; None for every other store."""
    return Path(address.removeprefix(SQLITE)).absolute() if address.startswith(SQLITE) else None


def shown_address() -> str:
    """The address in use, without user and password."""
    address = tracking_uri()
    return _hide_password(address, address)


def run_address(experiment_id: str, run_id: str) -> str | None:
    """The page of the run in the server's UI, without user and password; None for a store that is no server."""
    address = tracking_uri()
    if not address.startswith(SERVER):
        return None
    return f"{_hide_password(address, address).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def holds_nothing_yet() -> bool:
    """Whether the store is an SQLite database that nobody has made yet."""
    file = database_file(tracking_uri())
    return file is not None and not file.exists()


@contextmanager
def connected(*, is_patient: bool = True) -> Iterator["MlflowClient"]:
    """A client of the server; inside the block a failure of MLflow is a UserError.

    A server that is away is known within 15 s. With `is_patient` False every later call is as short of breath.

    Raises RegistryUnreachable where the server, its database or its artifact store does not answer, and UserError for
    a server of another major version of MLflow.
    """
    address = tracking_uri()
    # MLflow's SQLite store looks its own address up in the environment again.
    with environment({"MLFLOW_TRACKING_URI": address}):
        try:
            client = _client(address)
            if database_file(address) is None:
                with environment(_unless_set(IMPATIENCE)):
                    _check_major_version(client, address)
            with environment(_unless_set(RETRIES if is_patient else IMPATIENCE)):
                yield client
        except UserError:
            raise
        except Exception as error:
            explained = _explain(address, error)
            if explained is None:
                raise
            raise explained from error


def error_code(error: Exception) -> str | None:
    """MLflow's name of what went wrong, such as RESOURCE_DOES_NOT_EXIST."""
    code = getattr(error, "error_code", None)
    return code if isinstance(code, str) else None


def server_time(client: "MlflowClient") -> datetime:
    """What the server's clock says, to the second, in UTC; for a database that is this machine's clock."""
    address = client.tracking_uri
    if not address.startswith(SERVER):
        return datetime.now(UTC)
    try:
        return parsedate_to_datetime(_get(address, "/health").headers["Date"]).astimezone(UTC)
    except (KeyError, ValueError):
        raise RegistryUnreachable(
            f"MLflow at {_hide_password(address, address)} does not tell the time; let answers keep their header Date"
        ) from None


def spelled_alike(aliases: Iterable[str]) -> list[str]:
    """The aliases that a reader takes for 'champion', and MLflow does not: in capitals, wide letters or with spaces."""
    return sorted(
        alias
        for alias in aliases
        if alias != CHAMPION and unicodedata.normalize("NFKC", alias).casefold().strip() == CHAMPION
    )


def _check_major_version(client: "MlflowClient", address: str) -> None:
    """The server answers; raises UserError where it is of another major version than this client."""
    from mlflow.version import VERSION

    theirs = ""
    if address.startswith(SERVER) and address not in _known_servers:
        answer = _get(address, "/version")
        theirs = answer.text.strip() if answer.status_code == 200 else ""
        if theirs.partition(".")[0].isdecimal():
            if theirs.partition(".")[0] != VERSION.partition(".")[0]:
                raise _other_version(address, f"is MLflow {theirs[:20]}", VERSION)
            _known_servers.add(address)
    # It also tells whether we may ask at all, where /version did not answer because we may not.
    client.search_experiments(max_results=1)
    if address.startswith(SERVER) and address not in _known_servers:
        raise _other_version(address, "does not tell its version at /version", VERSION)


def _other_version(address: str, fact: str, ours: str) -> UserError:
    return UserError(
        f"the server at {_hide_password(address, address)} {fact}, and this is MLflow {ours}; nothing was read or "
        "written there; install the server's major version here, or ours there (see its notes on 'mlflow db upgrade')"
    )


def _get(address: str, path: str) -> Any:
    """The server's answer, asked as MLflow's client asks: with its credentials, certificates and patience."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    return http_request(get_default_host_creds(address), path, "GET")


def _client(address: str) -> "MlflowClient":
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=address)


def _explain(address: str, error: Exception) -> UserError | None:
    """The error in words, or None for one that is not the registry's."""
    from mlflow.exceptions import MlflowException

    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = _hide_password(address, lines[0])
    shown = _hide_password(address, address)
    code = error_code(error)
    library = type(error).__module__.partition(".")[0]
    # MLflow tells of a file that it could not write while downloading as if the server had failed.
    if isinstance(error, OSError | MlflowException) and any(os.strerror(one) in str(error) for one in OWN_DISK):
        told = _hide_password(address, " ".join(lines))
        return RegistryUnreachable(f"this machine can't write what it reads from MLflow ({told}); make room there")
    if library in TRANSPORT_LIBRARIES or (isinstance(error, MlflowException) and code in UNREACHABLE_CODES):
        return RegistryUnreachable(
            f"MLflow at {shown} does not answer ({reason}); "
            "start it or mend MLFLOW_TRACKING_URI, then run this again: it finishes what is missing"
        )
    if isinstance(error, MlflowException) and code in REFUSED_CODES:
        return UserError(
            f"MLflow at {shown} refuses ({reason}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, and let the server allow this host name"
        )
    if isinstance(error, MlflowException):
        return UserError(f"MLflow at {shown} can't do this: {reason}")
    if isinstance(error, OSError):
        return RegistryUnreachable(
            f"the artifact store of MLflow at {shown} can't be written ({reason}); let the server keep artifacts "
            "(--serve-artifacts), or mend the place, then run this again: it finishes what is missing"
        )
    if isinstance(error, ModuleNotFoundError):
        return UserError(f"MLFLOW_TRACKING_URI {shown} needs the Python package {error.name}")
    return None


def _hide_password(address: str, text: str) -> str:
    """`text` without the user and password that `address` holds."""
    credentials, at, _ = address.partition("://")[2].rpartition("@")
    return text.replace(credentials + at, "") if at else text


def _unless_set(defaults: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in defaults.items() if name not in os.environ}


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Inside the block the environment has these values; afterwards it is as it was."""
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
