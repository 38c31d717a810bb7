"""Sources that nobody should trust: a clear message with the culprit, and the data set as it was."""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from braintumor.data.contents import list_contents
from braintumor.data.intake import import_dataset
from braintumor.errors import UserError

OLD = {"train/glioma/old.jpg": b"old"}
GIB = 1 << 30


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A data set that has to be the same after the test, with nothing beside it."""
    folder = tmp_path / "work/data"
    fill(folder, OLD)
    yield folder
    assert content(folder) == OLD
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def zipped(archive: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(archive, "w", method) as file:
        for name, text in files.items():
            file.writestr(name, text)
    return archive


def refused(source: Path, data: Path) -> str:
    with pytest.raises(UserError) as error:
        import_dataset(source, data, discard=True)
    return str(error.value)


@pytest.mark.parametrize("inner", ["more/Testing.zip", "Testing.ZIP", "glioma/rest.tar.gz", "glioma/rest.7z"])
@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
def test_an_archive_inside_is_named_since_it_may_hold_half_of_the_images(
    tmp_path: Path, data: Path, inner: str, is_zip: bool
) -> None:
    files = {"glioma/1.jpg": b"1", inner: b"PK", "__MACOSX/glioma/x.zip": b"", "glioma/.x.zip": b""}
    source = zipped(tmp_path / "a.zip", files) if is_zip else fill(tmp_path / "source", files)
    assert f"holds archives: {inner}; unpack them" in refused(source, data)


def test_an_encrypted_zip_is_refused(tmp_path: Path, data: Path) -> None:
    source = zipped(tmp_path / "a.zip", {"glioma/1.jpg": b"1"})
    set_flag(source)
    assert "is encrypted" in refused(source, data)


def set_flag(archive: Path) -> None:
    """Set the bit 'encrypted' of the first entry, in its own header and in the directory."""
    bytes_ = bytearray(archive.read_bytes())
    bytes_[6] |= 1
    bytes_[bytes_.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(bytes_)


def state_size(archive: Path, size: int) -> None:
    """Make every entry of the directory say that it unpacks to so many bytes."""
    bytes_ = bytearray(archive.read_bytes())
    place = bytes_.find(b"PK\x01\x02")
    while place >= 0:
        bytes_[place + 24 : place + 28] = struct.pack("<I", size)
        place = bytes_.find(b"PK\x01\x02", place + 4)
    archive.write_bytes(bytes_)


def test_an_entry_that_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path: Path, data: Path) -> None:
    source = zipped(tmp_path / "a.zip", {"glioma/1.jpg": bytes(50_000_000)})
    assert source.stat().st_size < 100_000
    state_size(source, 100)
    assert "is damaged" in refused(source, data)


def test_more_than_the_disk_holds_is_refused_with_the_needed_and_the_present_bytes(tmp_path: Path, data: Path) -> None:
    n_entries = shutil.disk_usage(tmp_path).free // (3 * GIB) + 2
    source = zipped(tmp_path / "a.zip", {f"glioma/{number}.jpg": b"" for number in range(n_entries)})
    state_size(source, 3 * GIB)
    message = refused(source, data)
    assert f"the images take {n_entries * 3 * GIB:,} bytes" in message
    assert f"the disk of {data} has" in message


@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
def test_a_full_disk_is_told_before_anything_is_copied(tmp_path: Path, is_zip: bool) -> None:
    files = {f"glioma/{number}.jpg": bytes(20_000) for number in range(20)}
    source = zipped(tmp_path / "a.zip", files) if is_zip else fill(tmp_path / "source", files)
    with small_disk(tmp_path / "disk") as disk:
        fill(disk / "data", OLD)
        message = refused(source, disk / "data")
        assert content(disk / "data") == OLD
        assert [path.name for path in disk.iterdir()] == ["data"]
    assert "the images take 409,600 bytes" in message
    assert "left; make room there" in message


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes rights that this user lacks")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_meanwhile_leaves_the_old_data_set(tmp_path: Path, data: Path) -> None:
    source = fill(tmp_path / "source", {"glioma/1.jpg": bytes(1000), "notumor/2.jpg": bytes(100_000)})
    program = """
import resource, signal, sys
from braintumor import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.argv = ["braintumor", "data", "import", *sys.argv[1:]]
cli.main()
"""
    command = [sys.executable, "-c", program, str(source), "--output", str(data), "--discard"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "notumor/2.jpg can't be copied" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, data: Path) -> None:
    source = fill(tmp_path / "source", {"glioma/1.jpg": b"1", "glioma/secret.jpg": b"2"})
    (source / "glioma/secret.jpg").chmod(0)
    with without_root_powers():
        message = refused(source, data)
    assert "glioma/secret.jpg can't be opened (Permission denied); see to its permissions" in message


def test_a_folder_that_may_not_be_read_is_named_rather_than_taken_for_empty(tmp_path: Path, data: Path) -> None:
    source = fill(tmp_path / "source", {"glioma/1.jpg": b"1", "notumor/secret.jpg": b"2"})
    (source / "notumor").chmod(0)
    with without_root_powers():
        message = refused(source, data)
    (source / "notumor").chmod(0o755)
    assert "source/notumor can't be opened (Permission denied)" in message


@contextmanager
def without_root_powers() -> Iterator[None]:
    """Root reads everything; for this thread not, if it is root."""
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root reads every file here")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    had, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    libc.capget(header, had)
    less[:] = had[:]
    less[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, less):
        pytest.skip("root reads every file here")
    try:
        yield
    finally:
        libc.capset(header, had)


def test_a_name_that_is_no_utf8_is_mended_and_told(tmp_path: Path) -> None:
    folder = fill(tmp_path / "source", {"glioma/plain.jpg": b"1"}) / "glioma"
    strange = os.fsencode(folder) + b"/M\xfcller.jpg"
    try:
        with open(strange, "wb") as file:  # noqa: PTH123
            file.write(b"2")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    summary = import_dataset(tmp_path / "source", tmp_path / "data")
    assert content(tmp_path / "data") == {"train/glioma/plain.jpg": b"1", "train/glioma/M_ller.jpg": b"2"}
    assert list_contents(tmp_path / "data").images == ["train/glioma/M_ller.jpg", "train/glioma/plain.jpg"]
    assert summary.renamed == {"glioma/M\\udcfcller.jpg": "train/glioma/M_ller.jpg"}
    str(summary).encode()


def test_names_that_are_too_long_are_cut_and_stay_distinct(tmp_path: Path) -> None:
    long = "ü" * 150
    files = {f"glioma/{long}{end}.jpg": end.encode() for end in ("a", "b")} | {f"no/{'x' * 251}.jpg": b"c"}
    source = zipped(
        tmp_path / "a.zip", files | {f"glioma/{'deep/' * 1000}d.jpg": b"d", f"no_tumor/{'x' * 251}.jpg": b"e"}
    )
    summary = import_dataset(source, tmp_path / "data")
    cut = "ü" * 125
    assert content(tmp_path / "data") == {
        f"train/glioma/{cut}.jpg": b"a",
        f"train/glioma/{'ü' * 124}-2.jpg": b"b",
        "train/glioma/d.jpg": b"d",
        f"train/notumor/{'x' * 251}.jpg": b"c",
        f"train/notumor/{'x' * 249}-2.jpg": b"e",
    }
    assert len(summary.renamed) == 3


def test_a_folder_that_is_too_deep_is_named(tmp_path: Path, data: Path) -> None:
    source = fill(tmp_path / "source", {"glioma/1.jpg": b"1"})
    here = os.open(source / "glioma", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        here, above = os.open("d" * 250, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    message = refused(source, data)
    assert "ddd can't be opened (File name too long); shorten the names of its folders" in message
    shutil.rmtree(source)


def test_names_that_some_file_system_takes_for_one_are_told_apart(tmp_path: Path) -> None:
    names = ("A.jpg", "a.JPG", "é.jpg", "e\u0301.jpg")
    source = zipped(tmp_path / "a.zip", {f"glioma/{name}": name.encode() for name in names})
    import_dataset(source, tmp_path / "data")
    assert content(tmp_path / "data") == {
        "train/glioma/A.jpg": b"A.jpg",
        "train/glioma/a-2.JPG": b"a.JPG",
        "train/glioma/e\u0301.jpg": "e\u0301.jpg".encode(),
        "train/glioma/é-2.jpg": "é.jpg".encode(),
    }


@pytest.mark.parametrize("name", ["astrocytoma/2.jpg", "healthy/deeper/2.jpg"])
def test_an_unknown_class_beside_class_folders_is_named(tmp_path: Path, data: Path, name: str) -> None:
    source = fill(tmp_path / "source", {"glioma/1.jpg": b"1", name: b"2", "cover.jpg": b"3"})
    assert f"holds images in {Path(name).parent}, which is none of the four classes" in refused(source, data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_never_ends_in_anything_but_a_message(tmp_path: Path, data: Path, method: int) -> None:
    files = {"glioma/1.jpg": b"1" * 200, "notumor/ü.png": b"2" * 50, "readme.md": b"3" * 200}
    good = zipped(tmp_path / "a.zip", files, method).read_bytes()
    random = np.random.default_rng(7)
    n_refused = 0
    for number in range(120):
        bytes_ = bytearray(good)
        for place in random.integers(0, len(good), 1 + number % 4):
            bytes_[place] = random.integers(0, 256)
        (tmp_path / "b.zip").write_bytes(bytes_[: len(good) - int(random.integers(0, 40)) * (number % 3 == 0)])
        try:
            import_dataset(tmp_path / "b.zip", data, discard=True, dry_run=number % 2 == 1)
        except UserError:
            n_refused += 1
        shutil.rmtree(data)
        fill(data, OLD)
    assert n_refused > 20


def test_a_zip_that_holds_a_path_twice_is_refused_rather_than_halved(tmp_path: Path) -> None:
    archive = tmp_path / "twice.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train/glioma/a.png", b"one")
        file.writestr("train\\glioma\\a.png", b"other")
    assert "holds train/glioma/a.png twice" in refused(archive, tmp_path / "data")
