"""Data versions on this machine: files by their md5, shared by the versions and by the processes of a node.

    objects/ab/cdef...      verified files, read-only
    datasets/<md5>/         a data version, hard links to them
    indexes/<md5>.json      what each of its files looked like when it was made
    locks/<md5>             held shared by every process that uses the version; its time is that of the last use
    locks/<md5>.making      held by the process that makes it
    locks/objects           held shared while something is made; alone by who evicts
    weights/<tag>/          fetched weights; their time is that of the last use

The kernel drops a lock with its process, however that ends.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from braintumor.artifacts import replacing_directory, scratch_directory, write_text
from braintumor.errors import UserError
from braintumor.progress import note

SECONDS_A_DAY = 86_400
# What a broken-off download has fetched is kept so long for the next attempt.
KEEP_UNUSED_OBJECTS_S = SECONDS_A_DAY
MD5 = re.compile("[0-9a-f]{32}")
HIDDEN = re.compile(r"\.[0-9a-f]{32}\.(partial|previous|evicted)-.+")

NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS})
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP})

# Open as long as the process lives: a version in use is not evicted.
_held: dict[Path, int] = {}


class Seen(NamedTuple):
    """What tells a changed file from the one that was verified, without reading it."""

    size: int  # bytes
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Limits:
    """Beyond these the cache gives up what no process uses."""

    max_age_days: float
    max_bytes: float


def read_limits() -> Limits:
    """BRAINTUMOR_CACHE_DAYS (14) and BRAINTUMOR_CACHE_GB (50)."""
    return Limits(_positive("BRAINTUMOR_CACHE_DAYS", 14), _positive("BRAINTUMOR_CACHE_GB", 50) * 1e9)


def _positive(variable: str, default: float) -> float:
    text = os.environ.get(variable, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"{variable} is {text!r}; give a number above 0, or leave it out for {default:g}")
    return value


@dataclass(frozen=True)
class DatasetCache:
    """The cache in the folder `root`, which is made when it is needed."""

    root: Path

    def tree(self, version: str) -> Path:
        """The folder of a data version."""
        return self.root / "datasets" / version

    def object(self, md5: str) -> Path:
        """Where the file of this md5 stands."""
        return self.root / "objects" / md5[:2] / md5[2:]

    def hold(self, version: str) -> None:
        """The version is not evicted as long as this process lives, and was used now."""
        lock = self._lock_file(version)
        if lock not in _held:
            descriptor = _open_lock(lock)
            # Waits for somebody who is evicting it, no longer.
            _flock(descriptor, lock, fcntl.LOCK_SH)
            _held[lock] = descriptor
        os.utime(lock)

    def is_intact(self, version: str) -> bool:
        """Whether the version's folder holds what was verified, as far as sizes, times and inodes tell."""
        index = self._read_index(version)
        if index is None or not self.tree(version).is_dir():
            return False
        return _look(self.tree(version)) == {path: seen for path, (_, seen) in index.items()}

    @contextmanager
    def making(self, version: str) -> Iterator[Path]:
        """A folder to download into; nobody else makes this version meanwhile, and nobody evicts objects."""
        self.tree(version).parent.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process, which fetches data version {version}"
        with (
            self._locked(f"{version}.making", fcntl.LOCK_EX, waiting),
            self._locked("objects", fcntl.LOCK_SH),
            scratch_directory(self.tree(version)) as scratch,
        ):
            yield scratch

    def holds(self, md5: str) -> bool:
        """Whether the file of this md5 is there; it is read and verified."""
        try:
            return _md5_of_file(self.object(md5)) == md5
        except FileNotFoundError:
            return False

    def take(self, md5: str, file: Path) -> None:
        """The verified `file` is the cache's now."""
        target = self.object(md5)
        file.chmod(0o444)
        try:
            file.replace(target)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)

    def build(self, version: str, listing: Mapping[str, str]) -> None:
        """The version's folder holds the files that `listing` names (md5 by path), all of them in the cache already."""
        tree = self.tree(version)
        with replacing_directory(tree, may_hold=None) as partial:
            self.link(listing, partial)
            seen = _look(partial)
            # Before the folder has its name: a folder without an index would have to be read again.
            content = {path: [md5, *seen[path]] for path, md5 in listing.items()}
            write_text(self._index(version), json.dumps(content))

    def link(self, listing: Mapping[str, str], folder: Path) -> None:
        """`folder` holds the files that `listing` names (md5 by path), all of them in the cache already."""
        for parent in sorted({(folder / path).parent for path in listing}):
            parent.mkdir(parents=True, exist_ok=True)
        for path, md5 in listing.items():
            _link(self.object(md5), folder / path)

    @contextmanager
    def borrowing(self, version: str) -> Iterator[Path]:
        """A folder to download into and to link a part of the version in, until the end; nobody evicts objects.

        Several processes may do so at once, each for a part of its own.
        """
        self.tree(version).parent.mkdir(parents=True, exist_ok=True)
        with self._locked("objects", fcntl.LOCK_SH), scratch_directory(self.tree(version)) as scratch:
            yield scratch

    def evict(self, limits: Limits) -> None:
        """What no process uses is gone: versions beyond the limits, files that are left over, and weights of long ago.

        Versions unused for too long go first, then the least recently used ones until the rest has room. While
        somebody makes a version nothing is evicted: whoever is last does it.
        """
        with self._locked("objects", fcntl.LOCK_EX | fcntl.LOCK_NB) as is_alone:
            if is_alone:
                self._evict(limits)

    def _evict(self, limits: Limits) -> None:
        now = time.time()
        max_age_s = limits.max_age_days * SECONDS_A_DAY
        for weights in self.root.glob("weights/*/[!.]*"):
            if now - weights.stat().st_mtime > max_age_s:
                weights.unlink()
        for leftover in self.tree("").glob(".*"):
            if HIDDEN.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)
        objects = {file.parent.name + file.name: file.stat() for file in self._object_files()}
        kept: dict[str, dict[int, int]] = {}  # bytes by inode, of each version
        used: set[str] = set()
        by_use = sorted(self._versions(), key=self._last_use)
        for version in by_use:
            index = self._read_index(version)
            is_too_old = now - self._last_use(version) > max_age_s
            if (is_too_old or index is None) and self._drop(version):
                continue
            entries = list((index or {}).values())
            # A copy, where the file system can't link, takes its room twice.
            kept[version] = {seen.inode: seen.size for _, seen in entries} | {
                objects[md5].st_ino: objects[md5].st_size for md5, _ in entries if md5 in objects
            }
        for version in by_use:
            if _total(kept.values()) <= limits.max_bytes:
                break
            if version in kept and self._drop(version):
                del kept[version]
        for version in kept:
            used |= {md5 for md5, _ in (self._read_index(version) or {}).values()}
        room = limits.max_bytes - _total(kept.values())
        for md5, stat in sorted(objects.items(), key=lambda entry: -entry[1].st_mtime):
            if md5 in used:
                continue
            if now - stat.st_mtime > KEEP_UNUSED_OBJECTS_S or stat.st_size > room:
                self.object(md5).unlink(missing_ok=True)
            else:
                room -= stat.st_size

    def _drop(self, version: str) -> bool:
        """Whether the version is gone: nobody used it."""
        with self._locked(version, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_unused:
            if not is_unused:
                return False
            tree = self.tree(version)
            evicted = Path(tempfile.mkdtemp(prefix=f".{version}.evicted-", dir=tree.parent))
            tree.replace(evicted)
            self._index(version).unlink(missing_ok=True)
            shutil.rmtree(evicted, ignore_errors=True)
        return True

    def _versions(self) -> list[str]:
        folder = self.tree("")
        return [path.name for path in folder.iterdir() if MD5.fullmatch(path.name)] if folder.is_dir() else []

    def _object_files(self) -> Iterator[Path]:
        for folder in (self.root / "objects").glob("??"):
            yield from (file for file in folder.iterdir() if MD5.fullmatch(folder.name + file.name))

    def _last_use(self, version: str) -> float:
        lock = self._lock_file(version)
        return lock.stat().st_mtime if lock.exists() else 0.0

    def _lock_file(self, name: str) -> Path:
        return self.root / "locks" / name

    def _index(self, version: str) -> Path:
        return self.root / "indexes" / f"{version}.json"

    def _read_index(self, version: str) -> dict[str, tuple[str, Seen]] | None:
        """md5 and looks of each file by path; None where there is no index, or it is damaged."""
        try:
            content = json.loads(self._index(version).read_bytes())
            return {path: (md5, Seen(*map(int, seen))) for path, (md5, *seen) in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @contextmanager
    def _locked(self, name: str, how: int, told_when_waiting: str = "") -> Iterator[bool]:
        """Whether the lock was had; always, unless `how` says not to wait."""
        lock = self._lock_file(name)
        descriptor = _open_lock(lock)
        try:
            is_had = _flock(descriptor, lock, how | fcntl.LOCK_NB)
            if not is_had and not how & fcntl.LOCK_NB:
                if told_when_waiting:
                    note(told_when_waiting)
                is_had = _flock(descriptor, lock, how)
            yield is_had
        finally:
            os.close(descriptor)


def _md5_of_file(file: Path) -> str:
    """Hex md5 of the file's bytes, as DVC names files."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _look(folder: Path) -> dict[str, Seen]:
    """What each file below `folder` looks like, by POSIX path; {} where the folder is missing."""
    found: dict[str, Seen] = {}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(folder / prefix) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{prefix}{entry.name}/")
                        continue
                    stat = entry.stat(follow_symlinks=False)
                    found[prefix + entry.name] = Seen(stat.st_size, stat.st_mtime_ns, stat.st_ino)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def _link(original: Path, copy: Path) -> None:
    try:
        copy.hardlink_to(original)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copy2(original, copy)


def _total(versions: Iterable[Mapping[int, int]]) -> int:
    together: dict[int, int] = {}
    for sizes in versions:
        together |= sizes
    return sum(together.values())


def _open_lock(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)


def _flock(descriptor: int, file: Path, how: int) -> bool:
    """Whether the lock was had; False only where `how` says not to wait. `file` is for the message."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{file} can't be locked ({error.strerror}); the cache needs a volume with locks across nodes (NFS 4 "
            "or CephFS, not mounted with nolock), or set BRAINTUMOR_CACHE to another folder"
        ) from error
    return True
