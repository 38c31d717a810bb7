"""The digest of files that are made so as to have another's, or to break whoever reads them."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from braintumor.errors import UserError
from braintumor.model import saved
from braintumor.model.saved import model_digest

POLICY = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None}


def layer(name: str, number: object = None, **policy: Any) -> dict[str, Any]:
    """A layer whose id is `number`."""
    shared = {} if number is None else {"shared_object_id": number}
    return {"class_name": "Dense", "config": {"name": name, "dtype": {**POLICY, **policy}}, **shared}


def weights(fill: Callable[[h5py.File], object] = lambda file: file.create_dataset("a", data=np.zeros(3))) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        fill(file)
    return content.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(config: Any = (), content: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
        path = tmp_path / "model.keras"
        text = config if isinstance(config, bytes) else json.dumps(list(config)).encode()
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("config.json", text)
            archive.writestr("model.weights.h5", weights() if content is None else content)
        return path

    return write


def test_two_layers_that_are_one_object_are_another_model(write: Callable[..., Path]) -> None:
    digests = {
        model_digest(write([layer("a", a), layer("b", b)])) for a, b in ((None, None), (1, 2), (1, 1), (None, 1))
    }
    assert len(digests) == 4
    assert model_digest(write([layer("a", 140), layer("b", 150)])) == model_digest(
        write([layer("a", 9), layer("b", 8)])
    )


def test_dtype_policies_that_are_alike_count_as_one_and_others_do_not(write: Callable[..., Path]) -> None:
    plain = model_digest(write([layer("a"), layer("b")]))
    for numbers in ((1, 1), (5, 6)):
        a, b = (layer(name, shared_object_id=number) for name, number in zip("ab", numbers, strict=True))
        assert model_digest(write([a, b])) == plain
    half = {"name": "bfloat16"}
    apart = [layer("a", shared_object_id=1), layer("b", shared_object_id=2, config=half)]
    together = [layer("a", shared_object_id=1), layer("b", shared_object_id=1, config=half)]
    assert model_digest(write(apart)) != model_digest(write(together))


@pytest.mark.parametrize("number", [1.0, True, "1", [1]])
def test_an_id_that_is_the_same_to_keras_and_not_to_us_is_refused(number: object, write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="no whole number"):
        model_digest(write([layer("a", 1), layer("b", number)]))


def test_the_dtype_as_which_keras_reads_a_weight_counts(write: Callable[..., Path]) -> None:
    def fill(file: h5py.File) -> None:
        file.create_dataset("a", data=np.ones(3, np.float32)).attrs["dtype"] = "bfloat16"

    assert ml_dtypes.bfloat16  # what Keras makes of it
    plain = weights(lambda file: file.create_dataset("a", data=np.ones(3, np.float32)))
    assert model_digest(write((), weights(fill))) != model_digest(write((), plain))


def broken_archives(write: Callable[..., Path]) -> dict[str, Callable[[], object]]:
    def flip(path: Path, local: int, central: int, value: int) -> None:
        content = bytearray(path.read_bytes())
        for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
            place = -1
            while (place := content.find(mark, place + 1)) >= 0:
                content[place + offset] = value
        path.write_bytes(content)

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[45:49] = b"\xff\xff\xff\xff"
        path.write_bytes(content)

    return {
        "half a character": lambda: write(b'{"a":"\xff"}'),
        "too deep": lambda: write(b"[" * 100_000 + b"]" * 100_000),
        "too many digits": lambda: write(b"[" + b"1" * 10_000 + b"]"),
        "encrypted": lambda: flip(write(), 6, 8, 1),
        "an unknown compression": lambda: flip(write(), 8, 10, 97),
        "a compression without bounds": lambda: write((), None, zipfile.ZIP_BZIP2),
        "damaged in the middle": lambda: damage(write(range(5000), None, zipfile.ZIP_DEFLATED)),
        "a long configuration": lambda: write(b'"' + b" " * saved.MAX_CONFIG_BYTES + b'"', None, zipfile.ZIP_DEFLATED),
        "no HDF5": lambda: write((), b"junk"),
        "petabytes of zeros": lambda: write(
            (), weights(lambda file: file.create_dataset("a", shape=(10**13,), chunks=(1000,), dtype="f8"))
        ),
        "a chunk beyond its array": lambda: write(
            (), weights(lambda f: f.create_dataset("a", shape=(1,), maxshape=(None,), chunks=(10**8,), dtype="f8"))
        ),
        "texts": lambda: write((), weights(lambda file: file.create_dataset("a", data=["x"]))),
        "another file's values": lambda: write(
            (), weights(lambda f: f.create_dataset("a", shape=(4,), dtype="u1", external=[("/etc/hostname", 0, 4)]))
        ),
        "a link": lambda: write((), weights(lambda file: file.__setitem__("a", h5py.SoftLink("/b")))),
    }


NAMES = list(broken_archives(lambda *_: Path()))


@pytest.mark.parametrize("what", NAMES)
def test_whatever_somebody_uploads_is_a_model_or_refused(what: str, write: Callable[..., Path], tmp_path: Path) -> None:
    broken_archives(write)[what]()
    with pytest.raises(UserError):
        model_digest(tmp_path / "model.keras")


def test_a_folder_and_a_file_that_is_too_long_are_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is not a Keras model"):
        model_digest(tmp_path / "folder")
    with write().open("r+b") as file:
        file.truncate(saved.MAX_MODEL_BYTES + 1)
    with pytest.raises(UserError, match="longer than"):
        model_digest(tmp_path / "model.keras")
