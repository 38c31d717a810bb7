"""Facts about a saved model that need no TensorFlow, of a file that anybody may have made."""

import hashlib
import io
import json
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braintumor.errors import UserError

if TYPE_CHECKING:
    import h5py

# Ours has 75 MB of weights, 0.7 MB of configuration and three members; a promoter has to read what anybody uploads.
MAX_MODEL_BYTES = 1 << 29
MAX_CONFIG_BYTES = 1 << 23
MAX_DIRECTORY_BYTES = 1 << 20

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
SHARED = "shared_object_id"
# zipfile unpacks these two in steps that it bounds.
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile, zlib and json raise for bytes that are not theirs; RuntimeError also where a member is encrypted.
NOT_READABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OverflowError, RuntimeError, NotImplementedError,
    MemoryError, IsADirectoryError,
)  # fmt: skip


def model_digest(path: Path) -> str:
    """Hex SHA-256 over a .keras file's architecture and weights.

    The file's own bytes hold the date of saving, so the same model saved twice differs there and agrees here. Two
    files of one digest predict alike: all that Keras makes a model of is in it. Raises UserError for what is no model.
    """
    try:
        config, weights = _members(path)
        digest = hashlib.sha256(_canonical(json.loads(config)).encode())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run 'braintumor train' first") from error
    except NOT_READABLE as error:
        raise UserError(
            f"{path} is not a Keras model ({str(error) or type(error).__name__}); run 'braintumor train' again"
        ) from error
    try:
        _add_weights(digest, weights)
    # h5py tells damage in any of these.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(f"the weights in {path} are damaged ({error}); run 'braintumor train' again") from error
    return digest.hexdigest()


def _members(path: Path) -> tuple[bytes, bytes]:
    """Configuration and weights, no longer than they may be."""
    if path.is_file() and path.stat().st_size > MAX_MODEL_BYTES:
        raise ValueError(f"it is longer than {MAX_MODEL_BYTES} bytes")
    with path.open("rb") as file:
        # Before it is read: a list of millions of members would fill the memory.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
            raise ValueError("it has too many members")
        with zipfile.ZipFile(file) as archive:
            return _member(archive, CONFIG, MAX_CONFIG_BYTES), _member(archive, WEIGHTS, MAX_MODEL_BYTES)


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > max_bytes:
        raise ValueError(f"{name} is longer than {max_bytes} bytes")
    if info.compress_type not in COMPRESSIONS:
        raise ValueError(f"{name} is compressed in an unknown way")
    with archive.open(info) as member:
        # With its length: without one, zipfile unpacks two gigabytes at once whatever was declared.
        return member.read(info.file_size)


def _canonical(config: Any) -> str:
    """The configuration as text, the same for the same model.

    Keras makes one object of all that have one `shared_object_id`, an address in the memory of whoever saved it: they
    are numbered. Equal dtype policies have no state, whether they are one object or many: their number is left out, as
    a model that was loaded and saved again may have other ones.
    """
    holders: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for holder in _holders(config):
        if type(holder[SHARED]) is not int:  # 1.0 and true are the same object to Keras
            raise ValueError(f"a {SHARED} is no whole number")
        holders[holder[SHARED]].append(holder)
    dropped = {number for number, alike in holders.items() if _is_one_policy(alike)}
    seen: dict[int, int] = {}

    def renumbered(item: Any) -> Any:
        if isinstance(item, dict):
            found = {name: renumbered(value) for name, value in item.items() if name != SHARED}
            if SHARED in item and item[SHARED] not in dropped:
                found[SHARED] = seen.setdefault(item[SHARED], len(seen))
            return found
        return [renumbered(one) for one in item] if isinstance(item, list) else item

    # Of those that share a number Keras builds the first in the file.
    return json.dumps(renumbered(config), sort_keys=len(dropped) == len(holders))


def _holders(config: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(config, dict):
        if SHARED in config:
            yield config
        for value in config.values():
            yield from _holders(value)
    elif isinstance(config, list):
        for item in config:
            yield from _holders(item)


def _is_one_policy(holders: list[Mapping[str, Any]]) -> bool:
    """Whether these are dtype policies of Keras' own, all alike."""
    return all(
        one == holders[0]
        and one.get("module") == "keras"
        and isinstance(one.get("class_name"), str)
        and one["class_name"].endswith("DTypePolicy")
        for one in holders
    )


def _add_weights(digest: Any, weights: bytes) -> None:
    import h5py
    import numpy as np

    left = MAX_MODEL_BYTES

    def add(name: str, item: object) -> None:
        nonlocal left
        if not isinstance(item, h5py.Dataset):
            return
        left -= _checked_size(name, item)
        if left < 0:
            raise ValueError(f"they are longer than {MAX_MODEL_BYTES} bytes")
        values = np.ascontiguousarray(item)
        digest.update(f"{name} {values.dtype.str} {item.shape}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8))
        # Keras reads the values as this dtype.
        if "dtype" in item.attrs:
            digest.update(f"{name} dtype {item.attrs['dtype']!r}\n".encode())

    with h5py.File(io.BytesIO(weights)) as file:
        # Not seen below, and followed by Keras. An exception in there would be SystemError.
        if link := file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else name):
            raise ValueError(f"{link} is a link to another place")
        file.visititems(add)  # in the order of names


def _checked_size(name: str, item: "h5py.Dataset") -> int:
    """Bytes of the dataset as it says itself; to read it takes as much, and one chunk."""
    if item.shape is None or item.dtype.hasobject or item.is_virtual or item.external:
        raise ValueError(f"{name} is no array of numbers of its own")
    chunk_bytes = item.dtype.itemsize
    for length in item.chunks or ():
        chunk_bytes *= length
    if chunk_bytes > MAX_MODEL_BYTES:
        raise ValueError(f"{name} has chunks of {chunk_bytes} bytes")
    n_bytes: int = item.size * item.dtype.itemsize
    return n_bytes
