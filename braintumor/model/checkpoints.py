"""States of a training between two epochs, kept where the loss of a node can't take them.

Each is one .npz file without pickled objects, named by the epochs that it holds and the SHA-256 of its bytes:
`<key>/00012-<sha256>.npz` in a folder or an object store. The key is a digest of all that decides what comes out.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.artifacts import source_digest
from braintumor.object_store import PARTIAL, open_store
from braintumor.params import TrainParams
from braintumor.progress import warn

ADDRESS = "BRAINTUMOR_CHECKPOINTS"
DEFAULT_FOLDER = "checkpoints"
FORMAT = 1
N_KEPT = 2
# What no training came back for is of no use any more.
MAX_AGE = timedelta(days=14)
KEY = r"[0-9a-f]{64}"
NAME = re.compile(rf"{KEY}/\d{{5}}-[0-9a-f]{{64}}\.npz")

Values = list[NDArray[Any]]


@dataclass(frozen=True)
class State:
    """A training after one of its epochs: the rows of its history, and the values of all variables in their order.

    After the head phase `optimizer` is empty. `best_weights` is None where the network's own weights are the best.
    """

    rows: list[dict[str, Any]]
    network: Values
    optimizer: Values
    best_weights: Values | None


def training_key(
    data_md5: str, splits_sha256: str, params: TrainParams, weights_sha256: str | None, image: str = ""
) -> str:
    """Hex SHA-256 of all that a training is made of: data, split, recipe, weights, image, code and libraries."""
    facts = {
        "data_md5": data_md5,
        "splits_sha256": splits_sha256,
        "params": params.model_dump(mode="json"),
        "weights_sha256": weights_sha256,
        "image": image,
        "source": source_digest(),
        "libraries": {name: version(name) for name in ("keras", "numpy", "tensorflow")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def checkpoint_address(output: Path) -> str | Path:
    """What BRAINTUMOR_CHECKPOINTS names; without it a folder beside `output`, which DVC deletes before each attempt."""
    return os.environ.get(ADDRESS, "").strip() or output.absolute().parent / DEFAULT_FOLDER


class Checkpoints:
    """The last states of the training `key` at `address`, `s3://bucket/prefix` or a folder.

    Whatever fails there costs a warning, told once, and never the training.
    """

    def __init__(self, address: str | Path, key: str) -> None:
        """Raises UserError if `address` is none; no connection is made yet."""
        self._key = key
        self._store = open_store(address)
        self.is_own_folder = isinstance(address, Path)  # nobody chose the place, and nobody else uses it
        self._good: list[str] = []
        self._told: set[str] = set()

    def load(self) -> State | None:
        """The newest state that is whole; None, with a warning if there are others, where none is."""
        names: list[str] = []
        with self._warning_once("can't be listed, so the training starts afresh"):
            names = self._names()
        for name in reversed(names):
            with self._warning_once(f"hold {name.rpartition('/')[2]}, which is of no use"):
                state = _unpack(self._read(name), self._key)
                self._good = [name]
                return state
        if names:
            warn(f"no checkpoint of this training at {self._store.address} is of use, so it starts afresh")
        return None

    def save(self, state: State) -> None:
        """The state stands at the address, with the one before it; after a failure the earlier ones stay."""
        with self._warning_once("can't be written"):
            content = _pack(state, self._key)
            name = f"{self._key}/{len(state.rows):05d}-{hashlib.sha256(content).hexdigest()}.npz"
            self._store.write(name, content)
            self._good = [*self._good, name][-N_KEPT:]
            with self._warning_once("can't be deleted"):
                # Later ones are there where they could not be read for a while: the next attempt may go on from them.
                for other in self._names():
                    if other not in self._good and _epochs(other) <= len(state.rows):
                        self._store.delete(other)

    def clear(self) -> None:
        """No state of this training is left, and none of another that is older than MAX_AGE."""
        oldest = datetime.now(UTC) - MAX_AGE
        with self._warning_once("can't be deleted"):
            for found in list(self._store.list()):
                is_own = found.key.startswith(f"{self._key}/")
                # The address may hold other people's files.
                if NAME.fullmatch(found.key) and (is_own or found.modified < oldest):
                    self._store.delete(found.key)
            if not self._store.address.startswith("s3://"):
                self._tidy(Path(self._store.address), oldest)

    def _tidy(self, root: Path, oldest: datetime) -> None:
        """A folder keeps nothing of files that a killed process did not finish, and no folder without checkpoints."""
        for folder in [path for path in root.iterdir() if re.fullmatch(KEY, path.name)] if root.is_dir() else []:
            for unfinished in folder.glob(f".*{PARTIAL}*"):
                if folder.name == self._key or unfinished.stat().st_mtime < oldest.timestamp():
                    unfinished.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
        # One that a person made stays, with its rights.
        if self.is_own_folder:
            with suppress(OSError):
                root.rmdir()

    def _names(self) -> list[str]:
        """Its own files, oldest first."""
        return sorted(found.key for found in self._store.list(f"{self._key}/") if NAME.fullmatch(found.key))

    def _read(self, name: str) -> bytes:
        stored = self._store.read(name)
        if stored is None:
            raise ValueError("it is gone")
        if not name.endswith(f"-{hashlib.sha256(stored.content).hexdigest()}.npz"):
            self._store.delete(name)
            raise ValueError("it is damaged, and deleted")
        return stored.content

    @contextmanager
    def _warning_once(self, failure: str) -> Iterator[None]:
        try:
            yield
        # Whatever it is, it must not cost the training.
        except Exception as error:
            if failure not in self._told:
                warn(f"the checkpoints at {self._store.address} {failure} ({error}); the training goes on")
            self._told.add(failure)


def clear_finished(key: object) -> None:
    """No state of the training `key`, whose model is safe, is left at BRAINTUMOR_CHECKPOINTS, where that is set."""
    address = os.environ.get(ADDRESS, "").strip()
    if address and isinstance(key, str) and re.fullmatch(KEY, key):
        Checkpoints(address, key).clear()


def _epochs(name: str) -> int:
    return int(name.partition("/")[2].partition("-")[0])


def _pack(state: State, key: str) -> bytes:
    facts = {"format": FORMAT, "key": key, "rows": state.rows, "is_best": state.best_weights is None}
    parts = {"network": state.network, "optimizer": state.optimizer, "best": state.best_weights or []}
    arrays = {f"{part}.{index}": value for part, values in parts.items() for index, value in enumerate(values)}
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpack(content: bytes, key: str) -> State:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        facts = json.loads(str(archive["facts"]))
        if (facts["format"], facts["key"]) != (FORMAT, key):
            raise ValueError("it is of another training")
        parts: dict[str, Values] = {"network": [], "optimizer": [], "best": []}
        # In the order in which they were written.
        for name in archive.files:
            if name != "facts":
                parts[name.partition(".")[0]].append(archive[name])
    return State(facts["rows"], parts["network"], parts["optimizer"], None if facts["is_best"] else parts["best"])
