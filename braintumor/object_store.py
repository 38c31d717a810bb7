"""Objects in S3 or in a folder: the only door to boto3.

The endpoint, the region and the keys come from boto3's own environment variables. Every failure of a server is a
StoreError, a UserError that names the address.
"""

import errno
import fcntl
import hashlib
import io
import os
import re
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import quote

from braintumor.artifacts import NO_ROOM
from braintumor.errors import UserError

CONNECTIONS = 16  # of one store; as many threads can use it without waiting for each other
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0  # without a byte
ATTEMPTS = 3
BACK_OFF_S = 0.5  # before the second attempt; doubled before the third
BLOCK_BYTES = 1 << 20
PARTIAL = ".partial-"
LOCK = ".lock"
# Also a key with slashes, as AWS gives them, and an address that a Path has shortened.
LOGIN = re.compile(r"(//|s3:/)[^/\s]*(:\S*)?@")

EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
WRONG_KEYS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity"})
REFUSED = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "403"})
MISSING = frozenset({"NoSuchKey", "404"})
OTHER_VERSION = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})

T = TypeVar("T")


class StoreError(UserError):
    """A store can't be used; keys and passwords within an address are not in the message."""

    def __init__(self, message: str) -> None:
        super().__init__(LOGIN.sub(r"\1***@", message))


class ObjectMissing(StoreError):
    """There is no object of this key."""


class ObjectChanged(StoreError):
    """Somebody else wrote or removed the object since it was read."""


@dataclass(frozen=True)
class Stored:
    """An object's bytes, and a tag that changes when they do."""

    content: bytes
    tag: str


@dataclass(frozen=True)
class Listed:
    """An object in a listing."""

    key: str
    size: int  # bytes
    modified: datetime  # aware


class Store(ABC):
    """Objects below one address, by keys such as `files/md5/ab/cdef`; safe to share among threads."""

    address: str

    @abstractmethod
    def read(self, key: str) -> Stored | None:
        """The object, or None where there is none."""

    @abstractmethod
    def write(self, key: str, content: bytes) -> None:
        """The object is `content`, whole or not at all."""

    @abstractmethod
    def write_if(self, key: str, content: bytes, tag: str | None) -> None:
        """The object is `content`. Raises ObjectChanged unless it still had this tag; None: unless there was none."""

    @abstractmethod
    def download(self, key: str, file: Path) -> str:
        """`file` holds the object, whole or not at all; the hex md5 of what arrived. Raises ObjectMissing."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Listed]:
        """The objects whose key starts with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """There is no such object any more."""

    def name(self, key: str) -> str:
        """The object's full address, for messages."""
        return f"{self.address}/{key}"


def open_store(address: str | Path) -> Store:
    """The store at `s3://bucket/prefix` or in a folder; no connection is made yet."""
    text = str(address).strip()
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").strip("/").partition("/")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", bucket):
            raise StoreError(f"{text} names no bucket; write s3://BUCKET/PREFIX")
        return _Bucket(bucket, prefix.strip("/"))
    # A Path makes one slash of two.
    if not text or "://" in text or text.startswith("s3:"):
        raise StoreError(f"{text or 'an empty text'} is no address of a store; write s3://BUCKET/PREFIX or a folder")
    return _Folder(_expanded(text))


def cache_folder() -> Path:
    """Where copies of remote objects are kept: BRAINTUMOR_CACHE, else `braintumor` in the user's cache folder."""
    if chosen := os.environ.get("BRAINTUMOR_CACHE", "").strip():
        return _expanded(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "braintumor"


def _expanded(folder: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise StoreError(f"{folder} is in nobody's home folder; write the folder's full path") from error


def fetch_object(address: str, cache: Path | None = None) -> Path:
    """A local copy of `s3://bucket/key`, fetched once for each of its versions; it appears whole or not at all.

    `cache` defaults to `weights` in the cache folder. Raises UserError where the object can't be had.
    """
    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not address.startswith("s3://") or not bucket or not key.strip("/"):
        raise StoreError(f"{address} is not an object's address; write s3://BUCKET/KEY")
    # Told of by the whole address: the half of a password would not be known for one.
    open_store(address)
    store = _Bucket(bucket, "")
    tag = store.tag(key)
    target = (cache or cache_folder() / "weights") / quote(tag.strip('"'), safe="") / Path(key).name
    if target.is_file():
        # What is not used for long is evicted; another user's file keeps its time.
        with suppress(OSError):
            os.utime(target)
    else:
        store.download(key, target, tag)
    return target


class _Bucket(Store):
    """A bucket, or what stands below a prefix in it."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.address = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._client_lock = threading.Lock()
        self._made_client: Any = None

    @property
    def _client(self) -> Any:
        with self._client_lock:
            if self._made_client is None:
                import boto3
                from botocore.config import Config

                # The default session may not be shared by threads that make their clients at once.
                self._made_client = boto3.session.Session().client(
                    "s3",
                    config=Config(
                        connect_timeout=CONNECT_TIMEOUT_S,
                        read_timeout=READ_TIMEOUT_S,
                        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                        max_pool_connections=CONNECTIONS,
                    ),
                )
            return self._made_client

    def read(self, key: str) -> Stored | None:
        try:
            return self._retrying(key, lambda: self._read(key))
        except ObjectMissing:
            return None

    def _read(self, key: str) -> Stored:
        response = self._call("get_object", key)
        return Stored(response["Body"].read(), response["ETag"])

    def tag(self, key: str) -> str:
        """The tag of an object, which is not read. Raises ObjectMissing."""
        tag: str = self._call("head_object", key)["ETag"]
        return tag

    def write(self, key: str, content: bytes) -> None:
        self._put(key, content)

    def write_if(self, key: str, content: bytes, tag: str | None) -> None:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            self._put(key, content, **condition)
        except (ObjectChanged, ObjectMissing) as error:
            # An attempt may have arrived though its answer did not; then the next one finds its work done.
            if not (_was_repeated(error) and (found := self.read(key)) and found.content == content):
                raise ObjectChanged(_changed(self.name(key))) from error

    def _put(self, key: str, content: bytes, **condition: str) -> None:
        # One request, so that a killed process leaves no parts of an upload behind. A socket has to take bytes in one
        # go within the time limit, a file block by block.
        self._call("put_object", key, Body=io.BytesIO(content), **condition)

    def download(self, key: str, file: Path, tag: str | None = None) -> str:
        """As of every store; with `tag`, raises ObjectChanged where the object has another."""
        condition = {} if tag is None else {"IfMatch": tag}

        def fetch() -> str:
            body = self._call("get_object", key, **condition)["Body"]
            with _appearing(file) as target:
                return _copy(body.read, target)

        return self._retrying(key, fetch)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", None, Prefix=self._prefix + prefix, **more)
            for entry in page.get("Contents", []):
                yield Listed(entry["Key"].removeprefix(self._prefix), entry["Size"], entry["LastModified"])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._call("delete_object", key)

    def _call(self, operation: str, key: str | None, **arguments: Any) -> Any:
        """One call of the client; its failure is a UserError."""
        from botocore.exceptions import BotoCoreError, ClientError

        place = self.address if key is None else self.name(key)
        if key is not None:
            arguments["Key"] = self._prefix + key
        try:
            return getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        except ClientError as error:
            _refuse_answer(error, place, self._bucket)
        # ValueError: an address in AWS_ENDPOINT_URL that is none.
        except (BotoCoreError, ValueError) as error:
            _refuse_silence(error, place)

    def _retrying(self, key: str, fetch: Callable[[], T]) -> T:
        """What `fetch` gives; a body that breaks off or stalls is asked for again, which botocore does not do."""
        from botocore.exceptions import BotoCoreError

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return fetch()
            except BotoCoreError as error:
                if attempt == ATTEMPTS:
                    raise StoreError(
                        f"{self.name(key)} broke off or stalled {ATTEMPTS} times ({error}); look at the server and "
                        "the network, and run again: what has arrived is kept"
                    ) from error
                time.sleep(BACK_OFF_S * 2 ** (attempt - 1))
        raise AssertionError


def _was_repeated(error: UserError) -> bool:
    answer: dict[str, Any] = getattr(error.__cause__, "response", {})
    return bool(answer.get("ResponseMetadata", {}).get("RetryAttempts"))


def _changed(place: str) -> str:
    return f"{place} was changed by somebody else meanwhile; look at what stands there now, and run again"


def _refuse_answer(error: Any, place: str, bucket: str) -> NoReturn:
    """The server's refusal in words. `error` is botocore's ClientError."""
    detail = error.response.get("Error", {})
    code, said = str(detail.get("Code", "")), str(detail.get("Message", "")).strip()
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket":
        raise StoreError(f"{place}: the server has no bucket {bucket}; make it, or mend the address") from error
    if code in MISSING:
        raise ObjectMissing(f"{place} does not exist; check the address") from error
    if code in OTHER_VERSION:
        raise ObjectChanged(_changed(place)) from error
    if code in EXPIRED:
        remedy = "the session token has expired; get new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    elif code in WRONG_KEYS:
        remedy = "the server does not know these keys; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif code in REFUSED:
        remedy = "these keys may not do that; have the rights to read, write and list given to them"
    elif code == "RequestTimeTooSkewed":
        remedy = "this machine's clock and the server's differ; set the clock"
    elif code in OTHER_REGION:
        remedy = "the bucket is in another region; set AWS_DEFAULT_REGION"
    elif code == "NotImplemented":
        remedy = "the server can't do that; use one with conditional writes (AWS S3, SeaweedFS, MinIO, Ceph)"
    elif status is not None and status >= 500:
        remedy = f"the server failed with {status} {ATTEMPTS} times; look at its log, and run again"
    else:
        remedy = "check the address and AWS_ENDPOINT_URL"
    raise StoreError(f"{place}: {remedy} (the server says: {code} {said})") from error


def _refuse_silence(error: Exception, place: str) -> NoReturn:
    """A call that had no answer, in words."""
    kind = type(error).__name__
    if kind in {"NoCredentialsError", "PartialCredentialsError"}:
        remedy = "there are no keys; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif kind in {"UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError", "LoginRefreshRequired"}:
        remedy = "the login has expired; log in again"
    else:
        remedy = "no answer; check AWS_ENDPOINT_URL, the server and the network"
    raise StoreError(f"{place}: {remedy} ({error})") from error


class _Folder(Store):
    """The files of a folder; a key is a path below it."""

    def __init__(self, root: Path) -> None:
        self.address = str(root)
        self._root = root

    def read(self, key: str) -> Stored | None:
        with self._in_words(key):
            try:
                content = self._path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Stored(content, hashlib.sha256(content).hexdigest())

    def write(self, key: str, content: bytes) -> None:
        with self._in_words(key), _appearing(self._path(key)) as target:
            target.write(content)

    def write_if(self, key: str, content: bytes, tag: str | None) -> None:
        folder = self._path(key).parent
        with self._in_words(key):
            folder.mkdir(parents=True, exist_ok=True)
            # A file, since on NFS the lock of a folder is this machine's own; all who share the folder may open it.
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                found = self.read(key)
                if (found.tag if found else None) != tag:
                    raise ObjectChanged(_changed(self.name(key)))
                self.write(key, content)
            finally:
                os.close(descriptor)

    def download(self, key: str, file: Path) -> str:
        with self._in_words(key):
            try:
                source = self._path(key).open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise ObjectMissing(f"{self.name(key)} does not exist; check the address") from error

        def read(n_bytes: int) -> bytes:
            # What fails at the target is not this store's.
            with self._in_words(key):
                return source.read(n_bytes)

        with source, _appearing(file) as target:
            return _copy(read, target)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        with self._in_words(prefix):
            # Only below the folder that the prefix ends in.
            start = self._root / prefix.rpartition("/")[0]
            found = sorted((path.relative_to(self._root).as_posix(), path) for path in start.rglob("*"))
            for key, path in found:
                if key.startswith(prefix) and PARTIAL not in path.name and path.name != LOCK and path.is_file():
                    stat = path.stat()
                    yield Listed(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def delete(self, key: str) -> None:
        with self._in_words(key):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{key} is no key of an object in {self.address}")
        return self._root / key

    @contextmanager
    def _in_words(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "make room" if error.errno in NO_ROOM else "check the folder and its permissions"
            reason = os.strerror(error.errno or errno.EIO)
            raise StoreError(f"{self.name(key)} can't be reached ({reason}); {remedy}") from error


def _copy(read: Callable[[int], bytes], target: BinaryIO) -> str:
    """The hex md5 of all that `read` gave to `target`."""
    md5 = hashlib.md5(usedforsecurity=False)
    # To the empty read at the end, which is where botocore notices a body that is too short.
    while block := read(BLOCK_BYTES):
        md5.update(block)
        target.write(block)
    return md5.hexdigest()


@contextmanager
def _appearing(file: Path) -> Iterator[BinaryIO]:
    """A file to fill, which gets its name at the end; after an error it is gone."""
    # Of thousands of small files the folder is asked for once, not each time.
    if not file.parent.is_dir():
        file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{file.name[:100]}{PARTIAL}", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as target:
            yield target
            os.fchmod(target.fileno(), 0o644)
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
