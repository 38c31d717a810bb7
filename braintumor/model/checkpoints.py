"""States of a training, kept where the loss of a node can't take them.

Each is one .npz file without pickled objects, named by the epochs that it holds, the steps of the next one, and the
SHA-256 of its bytes: `<key>/00012-00000000-<sha256>.npz` in a folder or an object store. The key is a digest of all
that decides what comes out.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from braintumor.artifacts import NO_ROOM, source_digest
from braintumor.model.flat import Values
from braintumor.object_store import PARTIAL, StoreError, open_store
from braintumor.params import TrainParams
from braintumor.progress import warn

ADDRESS = "BRAINTUMOR_CHECKPOINTS"
DEFAULT_FOLDER = "checkpoints"
FORMAT = 2
N_KEPT = 2
# What no training came back for is of no use any more.
MAX_AGE = timedelta(days=14)
KEY = r"[0-9a-f]{64}"
# Also names of the first format, which held no steps: they are too old at some time, like all.
NAME = re.compile(rf"{KEY}/\d{{5}}(-\d{{8}})?-[0-9a-f]{{64}}\.npz")


@dataclass(frozen=True)
class State:
    """A training after one of its epochs, or after `step` steps of the next one.

    `rows` is its history. `values` is all that the next step depends on, by name: parameters, statistics, optimiser,
    number of the step (which schedule and random numbers follow from), sums of the epoch. `best` holds the values of
    the best epoch; None where they are the present ones. `seconds` is the time that the next epoch has taken so far.
    """

    rows: list[dict[str, Any]]
    step: int
    values: Values
    best: Values | None
    seconds: float = 0.0


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

    Whatever fails there costs a warning, told once, and never the training. Only what this attempt has found or written
    is deleted: another one of the same key, at work at the same time, keeps its own.
    """

    def __init__(self, address: str | Path, key: str) -> None:
        """Raises UserError if `address` is none; no connection is made yet."""
        self._key = key
        self._store = open_store(address)
        self.is_own_folder = isinstance(address, Path)  # nobody chose the place, and nobody else uses it
        self._known: set[str] = set()
        self._good: list[str] = []
        self._unfinished: list[Path] = []
        self._told: set[str] = set()

    def load(self, check: Callable[[State], None] = lambda state: None) -> State | None:
        """The newest state that is whole; None, with a warning if there are others, where none is.

        `check` raises ValueError for one that is of no use.
        """
        names: list[str] = []
        with self._warning_once("can't be listed, so the training starts afresh"):
            names = self._names()
            self._known = set(names)
            self._unfinished = self._partials(Path(self._store.address) / self._key)
        for name in reversed(names):
            with self._warning_once(f"hold {name.rpartition('/')[2]}, which is of no use"):
                state = unpack(self._read(name), self._key)
                check(state)
                self._good = [name]
                return state
        if names:
            warn(f"no checkpoint of this training at {self._store.address} is of use, so it starts afresh")
        return None

    def save(self, state: State) -> None:
        """The state stands at the address, with the one before it; after a failure the earlier ones stay."""
        with self._warning_once("can't be written"):
            content = pack(state, self._key)
            place = f"{len(state.rows):05d}-{state.step:08d}"
            name = f"{self._key}/{place}-{hashlib.sha256(content).hexdigest()}.npz"
            # A killed attempt's, which were there when this one began: nobody writes at them any more.
            _unlink(self._unfinished)
            self._write(name, content, place)
            self._known.add(name)
            self._good = [*(good for good in self._good if good in self._known), name][-N_KEPT:]
            with self._warning_once("can't be deleted"):
                self._delete(self._older(place) - set(self._good))

    def clear(self, *, of_all_attempts: bool = False) -> None:
        """No state that this attempt, or one before it, wrote is left, and none of any training older than MAX_AGE.

        `of_all_attempts`: none of this training either, whoever wrote it.
        """
        oldest = datetime.now(UTC) - MAX_AGE
        with self._warning_once("can't be deleted"):
            for found in list(self._store.list()):
                is_done = found.key in self._known or (of_all_attempts and found.key.startswith(f"{self._key}/"))
                # The address may hold other people's files.
                if NAME.fullmatch(found.key) and (is_done or found.modified < oldest):
                    self._store.delete(found.key)
            if not self._store.address.startswith("s3://"):
                _unlink(self._unfinished)
                self._tidy(Path(self._store.address), oldest, of_all_attempts)

    def _write(self, name: str, content: bytes, place: str) -> None:
        """The object is there; where there is room for one less, all others but the last good one had to go."""
        try:
            self._store.write(name, content)
        except StoreError as error:
            spare = self._older(place) - set(self._good[-1:])
            if not (spare and isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_ROOM):
                raise
            self._tell("have no room for another", error)
            self._delete(spare)
            self._store.write(name, content)

    def _older(self, place: str) -> set[str]:
        # Later ones are there where they could not be read for a while: the next attempt may go on from them.
        return {name for name in self._known if _place(name) <= place}

    def _delete(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            self._store.delete(name)
            self._known.discard(name)

    def _tidy(self, root: Path, oldest: datetime, of_all_attempts: bool) -> None:
        """A folder keeps nothing of files that a killed process did not finish, and no folder without checkpoints."""
        for folder in [path for path in root.iterdir() if re.fullmatch(KEY, path.name)] if root.is_dir() else []:
            is_done = of_all_attempts and folder.name == self._key
            partials = self._partials(folder)
            _unlink(path for path in partials if is_done or path.stat().st_mtime < oldest.timestamp())
            with suppress(OSError):
                folder.rmdir()
        # One that a person made stays, with its rights.
        if self.is_own_folder:
            with suppress(OSError):
                root.rmdir()

    def _partials(self, folder: Path) -> list[Path]:
        """What a killed process did not finish there, or another has under its hands."""
        return [] if self._store.address.startswith("s3://") else sorted(folder.glob(f".*{PARTIAL}*"))

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
            self._tell(failure, error)

    def _tell(self, failure: str, error: Exception) -> None:
        if failure not in self._told:
            warn(f"the checkpoints at {self._store.address} {failure} ({error}); the training goes on")
        self._told.add(failure)


def clear_finished(key: object) -> None:
    """No state of the training `key`, whose model is safe, is left at BRAINTUMOR_CHECKPOINTS, where that is set."""
    address = os.environ.get(ADDRESS, "").strip()
    if address and isinstance(key, str) and re.fullmatch(KEY, key):
        Checkpoints(address, key).clear(of_all_attempts=True)


def _place(name: str) -> str:
    """Epochs and steps, in digits that sort."""
    return name.partition("/")[2].rpartition("-")[0]


def _unlink(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def pack(state: State, key: str) -> bytes:
    """The content of a checkpoint of the training `key`."""
    facts = {"format": FORMAT, "key": key, "rows": state.rows, "step": state.step, "is_best": state.best is None}
    facts["seconds"] = state.seconds
    parts = {"values": state.values, "best": state.best or {}}
    arrays = {f"{part}:{name}": value for part, values in parts.items() for name, value in values.items()}
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(content: bytes, key: str) -> State:
    """The state that `pack` was given; raises ValueError for that of another training."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        facts = json.loads(str(archive["facts"]))
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, not {FORMAT}")
        if facts["key"] != key:
            raise ValueError("it is of another training")
        parts: dict[str, Values] = {"values": {}, "best": {}}
        for file in archive.files:
            part, _, name = file.partition(":")
            if part in parts:
                parts[part][name] = archive[file]
    best = None if facts["is_best"] else parts["best"]
    return State(facts["rows"], facts["step"], parts["values"], best, facts["seconds"])
