"""Somebody's files, in a folder or a zip, read without trusting them."""

import errno
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Protocol

from braintumor.data.contents import is_hidden
from braintumor.errors import UserError, name_some
from braintumor.progress import Progress

ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
COPY_BLOCK = 1 << 20
# What Python's zipfile raises for a directory of entries that makes no sense.
BAD_DIRECTORY = (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, ValueError, struct.error, EOFError)


class Files(Protocol):
    """The files of a source, whether it is a folder or a zip."""

    paths: list[PurePosixPath]

    def open(self, path: PurePosixPath) -> IO[bytes]:
        """The file's bytes."""

    def size(self, path: PurePosixPath) -> int:
        """The file's length in bytes, unpacked."""


@contextmanager
def open_source(source: Path) -> Iterator[Files]:
    """The files of a folder or a zip; UserError for what is neither, is damaged, or leads out of the source."""
    if source.is_dir():
        yield FolderFiles(source)
        return
    try:
        archive = zipfile.ZipFile(source)
    except BAD_DIRECTORY as error:
        if zipfile.is_zipfile(source):
            raise _damaged(source, error) from error
        raise UserError(f"{source} is neither a folder nor a zip; unpack it, and import the folder") from error
    with archive:
        try:
            yield ZipFiles(source, archive)
        except (zipfile.BadZipFile, zlib.error, LZMAError, EOFError) as error:
            raise _damaged(source, error) from error
        except OSError as error:
            # Bzip2 tells of damage so; the system always gives a number.
            if error.errno is not None:
                raise
            raise _damaged(source, error) from error


class FolderFiles:
    """The files below a folder; links are followed only to files inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = sorted(self._walk())

    def open(self, path: PurePosixPath) -> IO[bytes]:
        """The file's bytes."""
        try:
            return (self.folder / path).open("rb")
        except OSError as error:
            raise _unopened(self.folder / path, error) from error

    def size(self, path: PurePosixPath) -> int:
        """The file's length in bytes."""
        return (self.folder / path).stat().st_size

    def _walk(self) -> Iterator[PurePosixPath]:
        for folder, folders, names in os.walk(self.folder, onerror=_refuse_folder):
            for path in [Path(folder, name) for name in [*folders, *names]]:
                if self._is_file(path):
                    yield PurePosixPath(path.relative_to(self.folder).as_posix())

    def _is_file(self, path: Path) -> bool:
        try:
            if path.is_symlink():
                self._refuse_link(path)
            return path.is_file()
        except OSError as error:
            raise _unopened(path, error) from error

    def _refuse_link(self, path: Path) -> None:
        end = Path(os.path.realpath(path))
        if self.folder not in end.parents:
            raise UserError(
                f"{printable(path)} is a link that leads out of the source, to {printable(end)}; replace it by the file"
            )
        if end.is_dir():
            raise UserError(f"{printable(path)} is a link to a folder; replace it by the folder, or remove it")


class ZipFiles:
    """The files in a zip; entries that would land outside it are refused, and so are links."""

    def __init__(self, source: Path, archive: zipfile.ZipFile) -> None:
        self.source = source
        self.archive = archive
        self.entries: dict[PurePosixPath, zipfile.ZipInfo] = {}
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            path = self._checked(entry)
            if path in self.entries:
                raise UserError(f"{source} holds {printable(path)} twice; unpack it, and import the folder")
            self.entries[path] = entry
        self.paths = sorted(self.entries)

    def open(self, path: PurePosixPath) -> IO[bytes]:
        """The entry's bytes, unpacked; no more than it says of itself, and its checksum is checked at their end."""
        try:
            return self.archive.open(self.entries[path])
        except (NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self.source} can't be unpacked ({error}); unpack it, and import the folder") from error
        except (*BAD_DIRECTORY, OSError) as error:
            raise _damaged(self.source, error) from error

    def size(self, path: PurePosixPath) -> int:
        """The entry's length in bytes, unpacked, as the archive says."""
        return self.entries[path].file_size

    def _checked(self, entry: zipfile.ZipInfo) -> PurePosixPath:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        has_drive = bool(path.parts) and path.parts[0].endswith(":")
        if path.is_absolute() or has_drive or ".." in path.parts:
            raise UserError(f"{self.source} holds {entry.filename!r}, which leads out of the archive; do not trust it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(
                f"{self.source} holds the link {entry.filename!r}; unpack it, and replace the link by its file"
            )
        if entry.flag_bits & 0x1:
            raise UserError(f"{self.source} is encrypted; unpack it, and import the folder")
        return path


def refuse_archives(source: Path, paths: Sequence[PurePosixPath]) -> None:
    """An archive among the files may hold half of the images: nobody would miss them."""
    packed = [
        printable(path)
        for path in paths
        if path.suffix.lower() in ARCHIVE_SUFFIXES and not path.name.lower().endswith(".nii.gz") and not is_hidden(path)
    ]
    if packed:
        raise UserError(
            f"{source} holds archives: {name_some(packed)}; unpack them, import the folder, or remove them from it"
        )


def refuse_full_disk(folder: Path, sizes: Iterable[int]) -> None:
    """Files of these sizes fit on the disk of `folder` (or of its nearest parent that exists)."""
    standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    disk = os.statvfs(standing)
    needed = sum(-(-size // disk.f_frsize) * disk.f_frsize for size in sizes)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise UserError(
            f"the images take {needed:,} bytes, and the disk of {standing} has {free:,} left; make room there, "
            "or take another folder (a small archive that says it is huge is not to be trusted)"
        )


def copy_file(files: Files, path: PurePosixPath, target: Path) -> None:
    """`target` is a new file with the bytes of `path`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.open(path) as original, target.open("xb") as copy:
            shutil.copyfileobj(original, copy, COPY_BLOCK)
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(
            f"{printable(path)} can't be copied to {printable(target)} ({error.strerror or error}); "
            "nothing was changed; see to the disk"
        ) from error


def unpack(files: Files, folder: Path, progress: Progress) -> None:
    """All files stand in `folder`, under their own paths; hidden ones stay behind."""
    paths = [path for path in files.paths if not is_hidden(path)]
    refuse_full_disk(folder, [files.size(path) for path in paths])
    advance = progress("unpacking the archive", len(paths))
    for path in paths:
        copy_file(files, path, folder / path)
        advance()


def printable(path: PurePath) -> str:
    """The path as text that can be printed and written: bytes that are no UTF-8 as \\udcXX."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _damaged(source: Path, error: Exception) -> UserError:
    return UserError(f"{source} is damaged ({error}); fetch it again")


def _unopened(path: Path, error: OSError) -> UserError:
    is_long = error.errno == errno.ENAMETOOLONG
    remedy = "shorten the names of its folders" if is_long else "see to its permissions"
    return UserError(f"{printable(path)} can't be opened ({error.strerror}); {remedy}")


def _refuse_folder(error: OSError) -> None:
    raise _unopened(Path(os.fsdecode(error.filename)), error) from error
