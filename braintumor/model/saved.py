"""Facts about a saved model that need no TensorFlow."""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

from braintumor.errors import UserError


def model_digest(path: Path) -> str:
    """Hex SHA-256 over a .keras file's architecture and weights.

    The file's own bytes hold the date of saving, so the same model saved twice differs there and agrees here.
    """
    import h5py
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            weights = archive.read("model.weights.h5")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run 'braintumor train' first") from error
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a Keras model ({error}); run 'braintumor train' again") from error

    digest = hashlib.sha256(json.dumps(_without_addresses(config), sort_keys=True).encode())

    def add(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            values = np.asarray(item)
            digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).tobytes())

    try:
        with h5py.File(io.BytesIO(weights)) as file:
            file.visititems(add)  # in the order of names
    except (OSError, RuntimeError) as error:
        raise UserError(f"the weights in {path} are damaged ({error}); run 'braintumor train' again") from error
    return digest.hexdigest()


def _without_addresses(config: Any) -> Any:
    """The configuration without Keras' `shared_object_id`, an address in the memory of whoever saved it."""
    if isinstance(config, dict):
        return {key: _without_addresses(value) for key, value in config.items() if key != "shared_object_id"}
    if isinstance(config, list):
        return [_without_addresses(item) for item in config]
    return config
