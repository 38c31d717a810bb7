"""Images as the model takes them: in memory, or, where there are too many, decoded once into shards on disk.

    <folder>/<key>/00000.pixels    a shard: uint8 pixels, then their CRC-32
    <folder>/locks/<key>           held shared by every process that uses the set; its time is that of the last use
    <folder>/locks/<key>.making    its byte of a shard's number is held by the process that decodes the shard

The key is a digest of all that decides the pixels: content and order of the images, their size, the code that decodes.
"""

import fcntl
import hashlib
import math
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import PIL
from numpy.typing import NDArray
from PIL import features

from braintumor.artifacts import NO_ROOM, sha256_of_file
from braintumor.data.dataset_cache import NO_LOCKS, SECONDS_A_DAY, Limits, read_limits
from braintumor.errors import UserError
from braintumor.model import images as decoding
from braintumor.object_store import cache_folder
from braintumor.progress import Advance, note

FORMAT = 1
MAX_SHARD_BYTES = 1 << 26
# File descriptors a set of images: a large one has thousands of shards.
OPEN_SHARDS = 256
CHECKSUM_BYTES = 4
# Read at a time where a shard is only summed up.
CHUNK_BYTES = 1 << 20
ROWS_AT_A_TIME = 1 << 16
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
KEY = re.compile("[0-9a-f]{64}")
EVICTED = ".evicted-"

Rows = NDArray[np.intp]


class Images(Protocol):
    """Images uint8 (n, size, size, 1) that are read by their row numbers; an ndarray is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, size, size, 1)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """The images of these rows, an integer array or a slice, in memory: (k, size, size, 1)."""


def decoded_folder() -> Path:
    """Where decoded images stand that are too many for memory: `decoded` in the cache folder."""
    return cache_folder() / "decoded"


def open_images(
    dataset: Path,
    rows: pd.DataFrame,
    size_px: int,
    in_memory: int,
    folder: Path,
    advance: Advance = lambda: None,
) -> Images:
    """The images at `rows["path"]` below `dataset`, in this order; more than `in_memory` of them are read from disk.

    Those are decoded once, into `folder`, where a killed process goes on and several share the work. What stands there
    is used where its content is that of the files: `rows["sha256"]` or `rows["md5"]` say which that is, without either
    the files are read. A file that is another one is refused, a damaged shard is made again. `advance` is called once
    an image. Raises UserError where the disk has no room, and leaves no half shard.
    """
    if len(rows) <= in_memory:
        return decoding.load_images(dataset, list(rows["path"]), size_px, advance)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digest = next((name for name in ("sha256", "md5") if name in rows), None)
        if digest is None:
            digest = "sha256"
            rows = rows.assign(sha256=list(pool.map(lambda path: _digest(dataset / path, "sha256"), rows["path"])))
        shards = _Shards(folder, _key(rows[digest], size_px), len(rows), size_px)
        try:
            hold = shards.hold()
            evict(folder, read_limits(), shards.key, shards.n_bytes(range(shards.n_shards)))
            _fill(shards, _Sources(dataset, rows["path"].to_numpy(), rows[digest].to_numpy(), digest), pool, advance)
        except OSError as error:
            raise UserError(
                f"{folder} can't take the decoded images ({error.strerror or error}); see to its permissions, or set "
                "BRAINTUMOR_CACHE to another folder"
            ) from error
    return DecodedImages(shards, hold)


class DecodedImages:
    """Images in shards on disk, of which none stays in memory; nobody evicts them as long as this lives."""

    def __init__(self, shards: "_Shards", hold: "_Descriptor") -> None:
        self._shards, self._hold = shards, hold
        # A shard that falls out while a thread still reads it is closed after that.
        self._opened = lru_cache(OPEN_SHARDS)(lambda number: _Descriptor(os.open(shards.file(number), os.O_RDONLY)))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, size, size, 1)."""
        return len(self), self._shards.size_px, self._shards.size_px, 1

    def __len__(self) -> int:
        return self._shards.n

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """The images of these rows, an integer array or a slice, in memory: (k, size, size, 1)."""
        shards = self._shards
        wanted = np.arange(*rows.indices(shards.n)) if isinstance(rows, slice) else np.asarray(rows)
        if wanted.size and not (wanted.dtype.kind in "iu" and 0 <= wanted.min() <= wanted.max() < shards.n):
            raise IndexError(f"{wanted} are no numbers of {shards.n} rows")
        images = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        places = place_of(wanted, shards.n)
        # In the order in which they lie on disk.
        for index in np.argsort(places):
            number, within = divmod(int(places[index]), shards.images_a_shard)
            try:
                # Named here, so that it stays open until it is read.
                shard = self._opened(number)
                n_read = os.preadv(shard.number, [images[index]], within * shards.image_bytes)
            except OSError as error:
                raise UserError(f"{shards.file(number)} can't be read ({error.strerror}); {AGAIN}") from error
            if n_read != shards.image_bytes:
                raise UserError(f"{shards.file(number)} was cut short; {AGAIN}")
        return images


AGAIN = "run the step again, which decodes what is missing"


def row_at(places: Rows, n: int) -> Rows:
    """Which of n rows lie at these places of the shards: neighbours come from all over the table.

    So every run of places holds the classes, and whatever else the table is sorted by, in nearly equal shares.
    """
    return places.astype(np.int64) * _stride(n) % n


def place_of(rows: Rows, n: int) -> Rows:
    """At which places of the shards these of n rows lie: the inverse of `row_at`."""
    return rows.astype(np.int64) * pow(_stride(n), -1, n) % n


def _stride(n: int) -> int:
    stride = max(1, round(n * GOLDEN_RATIO))
    while math.gcd(stride, n) > 1:
        stride += 1
    return stride


def _key(digests: "pd.Series[str]", size_px: int) -> str:
    """Hex SHA-256 of all that decides the pixels, and of their order."""
    decoder = [sha256_of_file(Path(decoding.__file__)), PIL.__version__, str(features.version("jpg"))]
    facts = [FORMAT, digests.name, len(digests), size_px, *decoder]
    key = hashlib.sha256(repr(facts).encode())
    for start in range(0, len(digests), ROWS_AT_A_TIME):
        key.update("".join(f"{digest}\n" for digest in digests.iloc[start : start + ROWS_AT_A_TIME]).encode())
    return key.hexdigest()


def _digest(path: Path, kind: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); run 'dvc pull' or 'braintumor data import'"
        ) from error


@dataclass(frozen=True)
class _Sources:
    """The files to decode: their paths below `dataset`, and their digests of the kind `digest`."""

    dataset: Path
    paths: NDArray[np.object_]
    digests: NDArray[np.object_]
    digest: str

    def decode(self, row: int, size_px: int) -> NDArray[np.uint8]:
        """The image of the row, (size, size)."""
        path = self.dataset / self.paths[row]
        grey = decoding.resize_square(decoding.decode_grey(path), size_px)
        if (found := _digest(path, self.digest)) != self.digests[row]:
            raise UserError(
                f"{path} has {self.digest} {found} instead of {self.digests[row]}: it was changed; run 'braintumor "
                "validate' and what follows it again, or 'dvc repro'"
            )
        return grey


@dataclass(frozen=True)
class _Shards:
    """Where the images of a set lie."""

    root: Path
    key: str
    n: int
    size_px: int

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        return self.size_px**2

    @property
    def images_a_shard(self) -> int:
        """A power of two, so that the blocks of an epoch's order don't straddle two shards."""
        return 1 << max(0, (MAX_SHARD_BYTES // self.image_bytes).bit_length() - 1)

    @property
    def n_shards(self) -> int:
        """How many there are; the last may be smaller."""
        return -(-self.n // self.images_a_shard)

    @property
    def folder(self) -> Path:
        """The folder of this set."""
        return self.root / self.key

    def file(self, number: int) -> Path:
        """A shard's file."""
        return self.folder / f"{number:05d}.pixels"

    def places(self, number: int) -> Rows:
        """The places in a shard."""
        return np.arange(number * self.images_a_shard, min((number + 1) * self.images_a_shard, self.n))

    def n_bytes(self, numbers: Iterable[int]) -> int:
        """Bytes that these shards take."""
        return sum(len(self.places(number)) * self.image_bytes + CHECKSUM_BYTES for number in numbers)

    def hold(self) -> "_Descriptor":
        """A lock that keeps the set from being evicted, which was used now."""
        file = _lock_file(self.root, self.key)
        hold = _Descriptor(_open_lock(file))
        _lock(hold.number, file, fcntl.LOCK_SH)
        os.utime(file)
        return hold

    def checksum(self, number: int) -> int:
        """What a shard's checksum starts from: one under another's name is none."""
        return zlib.crc32(f"{self.key}/{number}".encode())

    def is_intact(self, number: int) -> bool:
        """Whether the shard is there, as it was written."""
        try:
            with self.file(number).open("rb", buffering=0) as file:
                left = os.fstat(file.fileno()).st_size - CHECKSUM_BYTES
                if left + CHECKSUM_BYTES != self.n_bytes([number]):
                    return False
                checksum, chunk = self.checksum(number), bytearray(CHUNK_BYTES)
                while left > 0 and (n_read := file.readinto(memoryview(chunk)[:left])):
                    checksum = zlib.crc32(memoryview(chunk)[:n_read], checksum)
                    left -= n_read
                return file.read(CHECKSUM_BYTES) == checksum.to_bytes(CHECKSUM_BYTES, "little")
        except OSError:
            return False

    def write(self, number: int, pixels: NDArray[np.uint8]) -> None:
        """The shard holds these pixels; after an error it is as before, and nothing is left of them."""
        target = self.file(number)
        partial = target.with_name(f".{target.name}.partial")
        checksum = zlib.crc32(pixels.data, self.checksum(number))
        try:
            with partial.open("wb", buffering=0) as file:
                for content in (pixels.data.cast("B"), checksum.to_bytes(CHECKSUM_BYTES, "little")):
                    left = memoryview(content)
                    while left:
                        left = left[file.write(left) :]
                # Some file systems say only here that there is no room.
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _fill(shards: _Shards, sources: _Sources, pool: ThreadPoolExecutor, advance: Advance) -> None:
    """Every shard is on disk, intact."""
    shards.folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for number, is_intact in enumerate(pool.map(shards.is_intact, range(shards.n_shards))):
        if is_intact:
            _advance_all(shards, number, advance)
        else:
            missing.append(number)
    if shards.n_bytes(missing) > _room(shards.root):
        evict(shards.root, replace(read_limits(), max_bytes=0), shards.key)
    if shards.n_bytes(missing) > _room(shards.root):
        raise _no_room(shards, missing)
    file = _lock_file(shards.root, f"{shards.key}.making")
    lock = _Descriptor(_open_lock(file))

    def fill(number: int, how: int = 0) -> bool:
        if not _lock(lock.number, file, fcntl.LOCK_EX | how, number):
            return False
        try:
            if shards.is_intact(number):
                _advance_all(shards, number, advance)
            else:
                shards.write(number, _decode(shards, number, sources, pool, advance))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise _no_room(shards, [number for number in missing if not shards.file(number).exists()]) from error
        finally:
            _lock(lock.number, file, fcntl.LOCK_UN, number)
        return True

    left = missing
    while left:
        # What another process is decoding comes last: processes that start together share the work.
        passed = [number for number in left if not fill(number, fcntl.LOCK_NB)]
        if passed == left:
            note("waiting for another process, which decodes the same images")
            fill(passed.pop(0))
        left = passed


def _decode(
    shards: _Shards, number: int, sources: _Sources, pool: ThreadPoolExecutor, advance: Advance
) -> NDArray[np.uint8]:
    rows = row_at(shards.places(number), shards.n)
    pixels = np.empty((len(rows), shards.size_px, shards.size_px), np.uint8)

    def decode(index: int) -> None:
        pixels[index] = sources.decode(int(rows[index]), shards.size_px)

    # Pillow releases the interpreter lock while it decodes and resizes: threads are enough.
    decoded = [pool.submit(decode, index) for index in range(len(rows))]
    try:
        for future in decoded:
            future.result()
            advance()
    finally:
        for future in decoded:
            future.cancel()
    return pixels


def _advance_all(shards: _Shards, number: int, advance: Advance) -> None:
    for _ in shards.places(number):
        advance()


def _room(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _no_room(shards: _Shards, missing: Sequence[int]) -> UserError:
    return UserError(
        f"{shards.root} has room for {_room(shards.root) / 1e9:.1f} GB, but the images decoded at {shards.size_px} px "
        f"need {shards.n_bytes(missing) / 1e9:.1f} GB more; make room there, set BRAINTUMOR_CACHE to a folder that has "
        "it, or raise train.images_in_memory"
    )


def evict(folder: Path, limits: Limits, kept: str = "", n_bytes: int = 0) -> None:
    """No set of decoded images is left that no process uses and that is older, or more, than the limits allow.

    The least recently used go first. The set with the key `kept` stays, and counts as `n_bytes`.
    """
    for leftover in folder.glob(f"{EVICTED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    sets = [path for path in folder.iterdir() if KEY.fullmatch(path.name) and path.name != kept]
    size_of = {path: _size(path) for path in sets}
    total = sum(size_of.values()) + n_bytes
    for path in sorted(sets, key=lambda path: _last_use(folder, path.name)):
        is_too_old = time.time() - _last_use(folder, path.name) > limits.max_age_days * SECONDS_A_DAY
        if (is_too_old or total > limits.max_bytes) and _drop(path):
            total -= size_of[path]


def _size(path: Path) -> int:
    # Whoever evicts it meanwhile is welcome.
    with suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0


def _drop(path: Path) -> bool:
    """Whether the set is gone: nobody used it."""
    file = _lock_file(path.parent, path.name)
    lock = _Descriptor(_open_lock(file))
    if not _lock(lock.number, file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    # Half a set would be made whole again, but not deleted.
    evicted = Path(tempfile.mkdtemp(prefix=EVICTED, dir=path.parent))
    with suppress(FileNotFoundError):
        path.replace(evicted)
    shutil.rmtree(evicted, ignore_errors=True)
    return True


def _last_use(folder: Path, key: str) -> float:
    file = _lock_file(folder, key)
    return file.stat().st_mtime if file.exists() else 0.0


class _Descriptor:
    """An open file, closed with its last user."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _lock_file(folder: Path, name: str) -> Path:
    return folder / "locks" / name


def _open_lock(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)


def _lock(descriptor: int, file: Path, how: int, byte: int | None = None) -> bool:
    """Whether the lock of the file, or of one byte of it, was had; False only where `how` says not to wait."""
    try:
        if byte is None:
            fcntl.flock(descriptor, how)
        else:
            fcntl.lockf(descriptor, how, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{file} can't be locked ({error.strerror}); decoded images need a volume with locks across nodes (NFS 4 "
            "or CephFS, not mounted with nolock), or set BRAINTUMOR_CACHE to another folder"
        ) from error
    return True
