import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.errors import UserError
from braintumor.model import image_store
from braintumor.model import images as decoding
from braintumor.model.image_store import Images, open_images, place_of, row_at
from braintumor.model.images import load_images

N, SIZE_PX, IMAGES_A_SHARD = 150, 32, 16
N_SHARDS = 10
SHARD_BYTES = IMAGES_A_SHARD * SIZE_PX**2

# Opens the images of a data set as its arguments say, and tells of every one of them.
OPENING = """
import sys, hashlib, resource
from pathlib import Path
import numpy as np, pandas as pd
from braintumor.errors import UserError
from braintumor.model import image_store
from braintumor.model import images as decoding
dataset, folder, shard_bytes, file_bytes = sys.argv[1:]
image_store.MAX_SHARD_BYTES = int(shard_bytes)
rows = pd.read_csv(Path(dataset) / "rows.csv", dtype=str)
decode, decoded = decoding.decode_grey, []
decoding.decode_grey = lambda path: decoded.append(path) or decode(path)
if file_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes), int(file_bytes)))
print("ready", flush=True)
sys.stdin.readline()
try:
    found = image_store.open_images(
        Path(dataset), rows, 32, 10, Path(folder), lambda: print("image", flush=True)
    )
    print(hashlib.sha256(found[np.arange(len(found))].tobytes()).hexdigest(), len(decoded), flush=True)
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise, and rows.csv with their paths and digests."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(N):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (24, 20), np.uint8)).save(path)
        rows.append({"path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    return folder


@pytest.fixture
def rows(dataset: Path) -> pd.DataFrame:
    return pd.read_csv(dataset / "rows.csv", dtype=str)


@pytest.fixture(scope="module")
def pixels(dataset: Path) -> np.ndarray:
    return load_images(dataset, [f"{number}.png" for number in range(N)], SIZE_PX)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded."""
    found: list[Path] = []
    decode = decoding.decode_grey
    monkeypatch.setattr(decoding, "decode_grey", lambda path: found.append(path) or decode(path))
    return found


@pytest.fixture
def opened(dataset: Path, rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Images]:
    """Open the images, or others, with shards of a few images."""
    monkeypatch.setattr(image_store, "MAX_SHARD_BYTES", SHARD_BYTES)

    def opened(other_rows: pd.DataFrame | None = None, **options: Path) -> Images:
        which = rows if other_rows is None else other_rows
        return open_images(
            options.get("dataset", dataset), which, SIZE_PX, 10, options.get("folder", tmp_path / "decoded")
        )

    return opened


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.pixels"))


def start(dataset: Path, folder: Path, file_bytes: int | None = None) -> "subprocess.Popen[str]":
    """A process that opens the images as soon as it is told to."""
    command = [sys.executable, "-c", OPENING, dataset, folder, str(SHARD_BYTES), str(file_bytes or "")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> str:
    """The last line of what the process said."""
    out, _ = process.communicate("go\n")
    assert process.returncode == 0
    return out.splitlines()[-1]


def test_few_images_are_in_memory_and_leave_nothing_on_disk(
    dataset: Path, rows: pd.DataFrame, pixels: np.ndarray, tmp_path: Path
) -> None:
    found = open_images(dataset, rows, SIZE_PX, N, tmp_path / "decoded")
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, pixels)
    assert not (tmp_path / "decoded").exists()


@pytest.mark.parametrize("digest", ["sha256", "md5", None])
def test_images_on_disk_equal_those_in_memory(
    opened: Callable[..., Images], dataset: Path, rows: pd.DataFrame, pixels: np.ndarray, tmp_path: Path, digest: str
) -> None:
    if digest == "md5":
        rows = rows.assign(md5=[hashlib.md5((dataset / path).read_bytes()).hexdigest() for path in rows["path"]])
    found = opened(rows[["path", *([digest] if digest else [])]])
    assert not isinstance(found, np.ndarray)
    assert found.shape == pixels.shape
    assert len(found) == N
    rng = np.random.default_rng(0)
    for wanted in (np.arange(N), rng.integers(0, N, 33), np.array([], np.intp), slice(3, 90), slice(140, 999)):
        np.testing.assert_array_equal(found[wanted], pixels[wanted])
        assert found[wanted].dtype == np.uint8
    assert len(shards_in(tmp_path / "decoded")) == N_SHARDS
    assert max(file.stat().st_size for file in shards_in(tmp_path / "decoded")) <= SHARD_BYTES + 4


@pytest.mark.parametrize("wrong", [np.array([N]), np.array([-1]), np.ones(N, bool)])
def test_rows_that_are_none_are_refused(opened: Callable[..., Images], wrong: np.ndarray) -> None:
    with pytest.raises(IndexError):
        opened()[wrong]


@pytest.mark.parametrize("n", [1, 2, 3, 10, 4096, 99_999])
def test_every_row_has_a_place_of_its_own_that_leads_back(n: int) -> None:
    rows = np.arange(n)
    assert sorted(row_at(rows, n)) == list(range(n))
    np.testing.assert_array_equal(place_of(row_at(rows, n), n), rows)


def test_progress_tells_of_every_image_whether_it_was_there_or_not(
    dataset: Path, rows: pd.DataFrame, tmp_path: Path, opened: Callable[..., Images]
) -> None:
    told: list[int] = []
    for n_told in (N, 2 * N):
        open_images(dataset, rows, SIZE_PX, 10, tmp_path / "decoded", lambda: told.append(1))
        assert len(told) == n_told


def test_second_attempt_decodes_nothing(opened: Callable[..., Images], decoded: list[Path], pixels: np.ndarray) -> None:
    opened()
    assert len(decoded) == N
    np.testing.assert_array_equal(opened()[np.arange(N)], pixels)
    assert len(decoded) == N


def flip_a_bit(shards: list[Path]) -> None:
    content = bytearray(shards[3].read_bytes())
    content[777] ^= 4
    shards[3].write_bytes(content)


def cut_short(shards: list[Path]) -> None:
    os.truncate(shards[3], 1000)


def empty(shards: list[Path]) -> None:
    os.truncate(shards[3], 0)


def swap(shards: list[Path]) -> None:
    shutil.copyfile(shards[4], shards[3])


def remove(shards: list[Path]) -> None:
    shards[3].unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, empty, swap, remove])
def test_damaged_shard_is_decoded_again_and_no_other(
    opened: Callable[..., Images],
    decoded: list[Path],
    pixels: np.ndarray,
    tmp_path: Path,
    damage: Callable[[list[Path]], None],
) -> None:
    opened()
    damage(shards_in(tmp_path / "decoded"))
    np.testing.assert_array_equal(opened()[np.arange(N)], pixels)
    assert len(decoded) == N + IMAGES_A_SHARD


def test_shard_that_is_cut_while_it_is_used_is_an_error_with_a_remedy(
    opened: Callable[..., Images], tmp_path: Path
) -> None:
    found = opened()
    for shard in shards_in(tmp_path / "decoded"):
        os.truncate(shard, 10)
    with pytest.raises(UserError, match="run the step again"):
        found[np.arange(N)]


def test_other_pixels_are_not_taken_for_these(
    opened: Callable[..., Images],
    dataset: Path,
    rows: pd.DataFrame,
    decoded: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened()
    # Another content, another order, another decoder.
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(other / "0.png")
    found = opened(rows[["path"]], dataset=other)
    assert not found[np.array([0])].any()
    turned = opened(rows[::-1])
    np.testing.assert_array_equal(turned[np.arange(3)], opened()[np.array([N - 1, N - 2, N - 3])])
    assert len(decoded) == 3 * N
    source = tmp_path / "images.py"
    source.write_text(Path(decoding.__file__).read_text() + "\n")
    monkeypatch.setattr(decoding, "__file__", str(source))
    opened()
    assert len(decoded) == 4 * N


def test_renamed_files_of_the_same_content_are_not_decoded_again(
    opened: Callable[..., Images], dataset: Path, rows: pd.DataFrame, decoded: list[Path], tmp_path: Path
) -> None:
    opened()
    shutil.copytree(dataset, tmp_path / "moved" / "data")
    opened(rows.assign(path="data/" + rows["path"]), dataset=tmp_path / "moved")
    assert len(decoded) == N


def test_file_that_was_changed_since_its_digest_was_taken_is_refused(
    opened: Callable[..., Images], dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset, tmp_path / "other")
    shutil.copyfile(dataset / "1.png", tmp_path / "other" / "0.png")
    with pytest.raises(UserError, match=r"0\.png has sha256 .* it was changed"):
        opened(dataset=tmp_path / "other")
    assert not list((tmp_path / "decoded").glob("*/.*"))


@pytest.mark.parametrize("with_digests", [True, False])
def test_missing_file_is_an_error_that_names_it(
    opened: Callable[..., Images], dataset: Path, rows: pd.DataFrame, tmp_path: Path, with_digests: bool
) -> None:
    shutil.copytree(dataset, tmp_path / "other")
    (tmp_path / "other" / "7.png").unlink()
    with pytest.raises(UserError, match=r"7\.png.*dvc pull"):
        opened(rows if with_digests else rows[["path"]], dataset=tmp_path / "other")


def test_killed_decoding_goes_on_and_gives_the_same_pixels(dataset: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "decoded"
    kept: dict[Path, int] = {}
    for n_told in (20, 75, 120):
        process = start(dataset, folder)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        told = 0
        while told < n_told:
            told += process.stdout.readline() == "image\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # What was whole is not written again.
        assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
        kept = {file: file.stat().st_mtime_ns for file in shards_in(folder)}
        assert 0 < len(kept) < N_SHARDS
    digest, n_decoded = finish(start(dataset, folder)).split()
    assert digest == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert int(n_decoded) < N - IMAGES_A_SHARD * 3
    assert len(shards_in(folder)) == N_SHARDS
    assert not list(folder.glob("*/.*"))


def test_processes_that_start_together_share_the_work(dataset: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    processes = [start(dataset, tmp_path / "decoded") for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(2) as pool:
        said = [line.split() for line in pool.map(finish, processes)]
    assert [digest for digest, _ in said] == [hashlib.sha256(pixels.tobytes()).hexdigest()] * 2
    assert sum(int(n_decoded) for _, n_decoded in said) == N


def test_disk_that_fills_up_is_told_with_the_room_that_is_needed(
    dataset: Path, pixels: np.ndarray, tmp_path: Path, opened: Callable[..., Images]
) -> None:
    folder = tmp_path / "decoded"
    said = finish(start(dataset, folder, file_bytes=SHARD_BYTES // 2))
    assert said.startswith(f"{folder} has room for ")
    assert "GB more; make room there, set BRAINTUMOR_CACHE" in said
    assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    np.testing.assert_array_equal(opened()[np.arange(N)], pixels)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root to mount a small disk")
def test_disk_that_is_too_small_is_told_before_anything_is_decoded(
    opened: Callable[..., Images], decoded: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine may not mount a small disk")
    try:
        with pytest.raises(UserError, match=r"has room for 0\.0 GB.*need 0\.0 GB more"):
            opened(folder=folder)
        assert not decoded
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_room_is_made_by_deleting_what_no_process_uses(
    opened: Callable[..., Images], rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_use = opened(rows[:140])
    opened(rows[:100])
    all_bytes = sum(file.stat().st_size for file in shards_in(tmp_path / "decoded"))
    monkeypatch.setattr(
        image_store,
        "_room",
        lambda folder: all_bytes - sum(file.stat().st_size for file in shards_in(folder)),
    )
    with pytest.raises(UserError, match="GB more; make room there"):
        opened()
    assert {len(list(folder.glob("*.pixels"))) for folder in (tmp_path / "decoded").glob("[!l]*")} == {9, 0}
    assert len(in_use[np.arange(140)]) == 140


def test_sets_beyond_the_limits_go_unless_they_are_in_use(
    opened: Callable[..., Images], rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "decoded"

    def sets() -> set[int]:
        return {
            sum(file.stat().st_size for file in path.glob("*.pixels")) // SIZE_PX**2 for path in folder.glob("[!l]*")
        }

    in_use = opened(rows[:20])
    for n in (30, 40, 50):
        opened(rows[:n])
    pass_time(folder, days=10)
    opened(rows[:40])
    assert sets() == {20, 30, 40, 50}
    monkeypatch.setenv("BRAINTUMOR_CACHE_DAYS", "9")
    opened(rows[:60])
    assert sets() == {20, 40, 60}
    pass_time(folder, days=1)
    opened(rows[:60])
    # 190 images: the least recently used set goes, of those that may.
    monkeypatch.setenv("BRAINTUMOR_CACHE_GB", str(160 * SIZE_PX**2 / 1e9))
    opened(rows[:70])
    assert sets() == {20, 60, 70}
    assert len(in_use[np.arange(20)]) == 20


def pass_time(folder: Path, days: float) -> None:
    """Everything was used so much longer ago."""
    for lock in (folder / "locks").iterdir():
        used = lock.stat().st_mtime - days * 86_400
        os.utime(lock, (used, used))


def test_folder_that_may_not_be_written_is_an_error_with_a_remedy(
    opened: Callable[..., Images], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="BRAINTUMOR_CACHE"):
        opened(folder=tmp_path / "file" / "decoded")


@pytest.mark.parametrize("most", [0, 3])
def test_threads_read_at_once_with_few_files_open(
    opened: Callable[..., Images], pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(image_store, "OPEN_SHARDS", most)
    found = opened()
    orders = [np.random.default_rng(seed).permutation(N) for seed in range(32)]
    with ThreadPoolExecutor(8) as pool:
        for order, read in zip(orders, pool.map(found.__getitem__, orders), strict=True):
            np.testing.assert_array_equal(read, pixels[order])
    assert n_open(tmp_path / "decoded") <= most
    del found
    assert n_open(tmp_path / "decoded") == 0


def n_open(folder: Path) -> int:
    """Descriptors of this process that are open on shards in the folder."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.readlink().parent.parent == folder and link.readlink().suffix == ".pixels" for link in links)
