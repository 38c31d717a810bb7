"""A version of the data set out of DVC's own remote layout, without git or DVC.

A data version is the md5 of `files/md5/ab/cdef....dir`, a JSON list of paths and md5s; each file is the object
`files/md5/ab/cdef...` (DVC 3).
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from braintumor.artifacts import NO_ROOM
from braintumor.data.dataset_cache import MD5, DatasetCache, read_limits
from braintumor.errors import UserError, name_some
from braintumor.object_store import CONNECTIONS, ObjectMissing, Store, cache_folder, open_store
from braintumor.progress import Progress, silent

OBJECTS = "files/md5/"
LATEST = "latest"


@dataclass(frozen=True)
class Fault:
    """Why an object of the remote can't be used."""

    is_missing: bool
    said: str


def open_dataset(dataset: Path, progress: Progress = silent) -> Path:
    """The folder of a data set: `dataset` itself, or the data version of this md5, materialised in the cache.

    A path that is neither comes back as it is, for the step to complain of.
    """
    if dataset.is_dir():
        return dataset
    name = str(dataset)
    if name == LATEST:
        raise UserError(
            "the data set 'latest' is known to 'braintumor resolve' alone, so that all steps take the same version; "
            "give the md5 that it found"
        )
    if not is_md5(name):
        return dataset
    return materialise(name, open_remote(), cache_folder(), progress)


def is_md5(name: str) -> bool:
    """Whether this can be a data version; data.dvc has it with `.dir` at its end."""
    return MD5.fullmatch(name) is not None


def open_remote(address: str | None = None) -> Store:
    """DVC's remote at `address`, else at BRAINTUMOR_DATA_REMOTE."""
    address = address or os.environ.get("BRAINTUMOR_DATA_REMOTE", "").strip()
    if not address:
        raise UserError(
            "no data remote is known; set BRAINTUMOR_DATA_REMOTE to the address of DVC's remote, "
            "s3://BUCKET/PREFIX or a folder ('dvc remote list' shows it)"
        )
    return open_store(address)


def object_key(md5: str) -> str:
    """Where DVC keeps the object of this md5, with or without `.dir` at its end."""
    return f"{OBJECTS}{md5[:2]}/{md5[2:]}"


def list_version(md5: str, remote: Store) -> dict[str, str]:
    """The md5 of each file of a data version, by its path, sorted."""
    key = object_key(f"{md5}.dir")
    found = remote.read(key)
    if found is None:
        raise UserError(
            f"{remote.address} has no data version {md5} ({key} is missing); check the md5 and the address, or run "
            "'dvc push' on the machine that has the version"
        )
    if (actual := _md5(found.content)) != md5:
        raise UserError(damaged(remote, md5, [f"{key} ({_wrong(len(found.content), actual)})"]))
    return read_listing(found.content, remote.name(key))


def read_listing(content: bytes, place: str) -> dict[str, str]:
    """The md5 of each file in the text of a `.dir` object, by its path, sorted. `place` is for the message."""
    listing: dict[str, str] = {}
    try:
        for entry in json.loads(content):
            path, md5 = entry["relpath"], entry["md5"]
            if not isinstance(path, str) or not MD5.fullmatch(md5) or path in listing:
                raise ValueError(path)
            listing[path] = md5
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{place} is no directory of DVC 3 ({error}); look at who wrote it") from error
    if unsafe := [path for path in listing if not _stays_inside(path)]:
        raise UserError(f"{place} names files outside the data set: {name_some(unsafe)}; do not use this version")
    if parents := {str(parent) for path in listing for parent in PurePosixPath(path).parents} & set(listing):
        raise UserError(
            f"{place} names as a file what is a folder of others: {name_some(sorted(parents))}; do not use this version"
        )
    return dict(sorted(listing.items()))


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and "/".join(parts) == path and ".." not in parts and "\0" not in path


def materialise(md5: str, remote: Store, cache: Path, progress: Progress = silent) -> Path:
    """The folder in the cache that holds this data version, every file verified; it is this process's until it ends.

    What is there already is not fetched again, so a second attempt goes on where the first broke off. A folder that
    was changed since is mended. What the cache's limits do not allow is evicted; where the disk has no room for them,
    all that no process uses.
    """
    limits = read_limits()
    place = DatasetCache(cache)
    try:
        place.hold(md5)
        place.evict(limits)
        if not place.is_intact(md5):
            try:
                _make(md5, remote, place, progress)
            except (OSError, UserError) as error:
                if not _lacked_room(error):
                    raise
                place.evict(replace(limits, max_bytes=0))
                _make(md5, remote, place, progress)
            place.evict(limits)
    except OSError as error:
        raise _not_taken(cache, md5, error) from error
    return place.tree(md5)


@contextmanager
def open_files(dataset: Path, paths: Sequence[str], progress: Progress = silent) -> Iterator[Path]:
    """A folder that holds these files of a data set, perhaps among others, until the end of the block.

    Of a data version that is not in the cache only these files are fetched. They stay there for who needs the whole.
    """
    if dataset.is_dir() or not is_md5(str(dataset)):
        yield open_dataset(dataset, progress)
        return
    version, cache = str(dataset), cache_folder()
    with ExitStack() as held:
        try:
            folder = _part(version, paths, open_remote(), DatasetCache(cache), held, progress)
        except OSError as error:
            raise _not_taken(cache, version, error) from error
        yield folder


def _part(
    version: str, paths: Sequence[str], remote: Store, place: DatasetCache, held: ExitStack, progress: Progress
) -> Path:
    place.hold(version)
    place.evict(read_limits())
    if place.is_intact(version):
        return place.tree(version)
    scratch = held.enter_context(place.borrowing(version))
    whole = list_version(version, remote)
    listing = {path: whole[path] for path in paths}
    _fetch(version, listing, remote, place, scratch, progress)
    folder = scratch / version
    folder.mkdir()
    place.link(listing, folder)
    return folder


def _not_taken(cache: Path, version: str, error: OSError) -> UserError:
    return UserError(
        f"the cache {cache} can't take data version {version} ({error.strerror or error}); make room there, see to its "
        "permissions, or set BRAINTUMOR_CACHE to another folder"
    )


def _make(version: str, remote: Store, place: DatasetCache, progress: Progress) -> None:
    """The version's folder is in the cache."""
    with place.making(version) as scratch:
        # Whoever made it while we waited has done our work.
        if not place.is_intact(version):
            listing = list_version(version, remote)
            _fetch(version, listing, remote, place, scratch, progress)
            place.build(version, listing)


def _lacked_room(error: BaseException) -> bool:
    """Whether the disk was full, be it that the message says so already."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    return isinstance(cause, OSError) and cause.errno in NO_ROOM


def _fetch(
    version: str, listing: Mapping[str, str], remote: Store, place: DatasetCache, scratch: Path, progress: Progress
) -> None:
    """Every file of the version is in the cache."""
    paths: dict[str, list[str]] = defaultdict(list)
    for path, md5 in listing.items():
        paths[md5].append(path)

    def fetch(md5: str) -> Fault | None:
        if place.holds(md5):
            return None
        file = scratch / md5
        try:
            actual = remote.download(object_key(md5), file)
        except ObjectMissing:
            return Fault(True, f"{paths[md5][0]} ({object_key(md5)})")
        if actual != md5:
            size = file.stat().st_size
            file.unlink()
            return Fault(False, f"{paths[md5][0]} ({object_key(md5)}: {_wrong(size, actual)})")
        place.take(md5, file)
        return None

    advance = progress(f"fetching from {remote.address}", len(paths))
    faults: list[Fault] = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for fault in pool.map(fetch, paths):
            faults += [fault] if fault else []
            advance()
    if missing := [fault.said for fault in faults if fault.is_missing]:
        raise UserError(lacking(remote, version, missing))
    if faults:
        raise UserError(damaged(remote, version, [fault.said for fault in faults]))


def lacking(remote: Store, version: str, missing: Sequence[str]) -> str:
    """The message for files of a version that have no object."""
    return (
        f"{remote.address} lacks {len(missing)} files of data version {version}: {name_some(missing)}; "
        + _push_again(version)
    )


def damaged(remote: Store, version: str, objects: Sequence[str]) -> str:
    """The message for objects of a version that are not what their names say."""
    return f"{remote.address} holds damaged objects: {name_some(objects)}; remove them, " + _push_again(version)


def _push_again(version: str) -> str:
    # Seen with DVC 3.67: 'Everything is up to date', whatever is missing below a directory that stands there.
    return (
        f"remove {object_key(version + '.dir')} there, too, and run 'dvc push' on the machine that has the data (while "
        "that list stands there, DVC takes its files for pushed)"
    )


def _wrong(size: int, actual: str) -> str:
    return "it is empty" if size == 0 else f"its {size} bytes have md5 {actual}: cut short or changed"


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
