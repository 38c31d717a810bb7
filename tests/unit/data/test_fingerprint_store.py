import resource
from pathlib import Path

import numpy as np
import pytest

from braintumor.data.fingerprint_store import FingerprintFiles, Fingerprints, FingerprintWriter
from braintumor.errors import UserError


def draw(count: int, seed: int = 0) -> Fingerprints:
    return np.random.default_rng(seed).normal(size=(count, 96, 96)).astype(np.float16)


def write(path: Path, prints: Fingerprints) -> Path:
    with FingerprintWriter(path) as writer:
        for one in prints:
            writer.append(one)
    return path


def test_rows_come_back_in_any_order_across_the_files(tmp_path: Path) -> None:
    prints = draw(10)
    files = [
        write(tmp_path / f"{number}.npy", prints[rows])
        for number, rows in enumerate((slice(4), slice(0), slice(4, 10)))
    ]
    with FingerprintFiles(files) as store:
        assert len(store) == 10
        for rows in ([], [3], [3, 4], [9, 0, 4, 4, 3], list(range(10)), [5, 6, 7, 2, 1]):
            wanted = np.array(rows, np.intp)
            assert (store[wanted] == prints[wanted]).all()
        with pytest.raises(IndexError):
            store[np.array([10])]
        with pytest.raises(IndexError):
            store[np.array([-1])]


def test_numpy_reads_the_file_and_several_rows_are_appended_at_once(tmp_path: Path) -> None:
    prints = draw(7)
    with FingerprintWriter(tmp_path / "prints.npy") as writer:
        writer.append(prints[:5])
        writer.append(prints[5])
        writer.append(prints[6:])
    assert (np.load(tmp_path / "prints.npy") == prints).all()
    np.save(tmp_path / "by_numpy.npy", prints)
    with FingerprintFiles([tmp_path / "by_numpy.npy"]) as store:
        assert (store[np.arange(7)] == prints).all()


def test_the_file_appears_only_when_all_is_written(tmp_path: Path) -> None:
    def break_off() -> None:
        with FingerprintWriter(tmp_path / "prints.npy") as writer:
            writer.append(draw(2))
            assert not (tmp_path / "prints.npy").exists()
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_the_file_before(tmp_path: Path) -> None:
    write(tmp_path / "prints.npy", draw(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="can't be written"):
            write(tmp_path / "prints.npy", draw(8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(np.load(tmp_path / "prints.npy")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prints.npy"]


@pytest.mark.parametrize("damage", ["missing", "short", "long", "header", "empty", "other numbers"])
def test_what_is_not_a_whole_file_of_fingerprints_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "prints.npy", draw(3))
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other numbers":
        np.save(path, draw(3).astype(np.float32))
    else:
        path.write_bytes(
            {
                "short": content[:-1],
                "long": content + content[-18432:],
                "header": content.replace(b"f2", b"i2"),
                "empty": b"",
            }[damage]
        )
    with pytest.raises(UserError, match="make the fingerprints again"):
        FingerprintFiles([path])


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "prints.npy", draw(3))
    with FingerprintFiles([path]) as store:
        with path.open("r+b") as file:
            file.truncate(20_000)
        with pytest.raises(UserError, match="cut off"):
            store[np.arange(3)]
