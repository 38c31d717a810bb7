"""What a step wrote is written again without MLflow, while all that it followed from has the same bytes.

To import MLflow and to ask it takes seconds. An SQLite store on this disk tells by its bytes that nothing in it has
changed since; of a server nobody can tell without asking it, so there nothing is kept.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from braintumor.artifacts import (
    digest_of_files,
    read_json,
    replacing_directory,
    sha256_of_file,
    source_digest,
    write_json,
)
from braintumor.errors import UserError
from braintumor.registry.server import DEFAULTS, database_file, tracking_uri

KEY = "key.json"
# Whose other versions may answer otherwise.
LIBRARIES = ("mlflow", "mlflow-skinny", "sqlalchemy", "pandas", "pyarrow", "numpy", "scikit-learn", "mapie")


def registry_state() -> str | None:
    """A digest of all that MLflow's answers follow from; None where this can't be told: a server, a write under way."""
    address = tracking_uri()
    file = database_file(address)
    if file is None or not file.is_file():
        return None
    settings = {**DEFAULTS, **os.environ}
    facts = {
        "address": address,
        "database": sha256_of_file(file),
        "settings": {name: value for name, value in settings.items() if name.startswith("MLFLOW_")},
        "code": source_digest(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    # Looked for last: with one of these beside it, the file alone is not what a reader would see.
    if any(file.with_name(f"{file.name}{end}").exists() for end in ("-journal", "-wal", "-shm")):
        return None
    return _digest(facts)


def digest_of_folders(*folders: Path) -> str:
    """A digest of every file in these folders, by its place and its bytes."""
    files = ((folder, sorted(path for path in folder.rglob("*") if path.is_file())) for folder in folders)
    return _digest([digest_of_files(folder, found) for folder, found in files])


def write_again(output: Path, state: str | None, inputs: Mapping[str, object]) -> bool:
    """Whether `output` is as `keep` found it, for the same state of the registry and the same `inputs`.

    What is kept is used whole or not at all; where it is damaged, the step has to ask.
    """
    if state is None:
        return False
    kept = _folder(output)
    try:
        record = read_json(kept / KEY, "")
        names = record["files"]
        if record["key"] != _key(state, inputs) or any(sha256_of_file(kept / name) != names[name] for name in names):
            return False
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return False
    with replacing_directory(output) as folder:
        for name in names:
            shutil.copyfile(kept / name, folder / name)
    return True


def keep(output: Path, state: str | None, inputs: Mapping[str, object]) -> None:
    """The files of `output` are kept beside it as what follows from this state and these `inputs`.

    `state` must have been the registry's before the step asked and after it: the caller sees to that.
    """
    if state is None:
        return
    files = sorted(path for path in output.iterdir() if path.is_file() and not path.name.startswith("."))
    with replacing_directory(_folder(output), may_hold=None) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        digests = {file.name: sha256_of_file(folder / file.name) for file in files}
        write_json(folder / KEY, {"key": _key(state, inputs), "files": digests})


def _folder(output: Path) -> Path:
    # Not in the output: DVC removes that before it runs the stage.
    output = output.absolute()
    return output.with_name(f".{output.name}.kept")


def _key(state: str, inputs: Mapping[str, object]) -> str:
    return _digest({"state": state, "inputs": dict(inputs)})


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
