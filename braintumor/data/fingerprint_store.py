"""Fingerprints of very many images on disk, read by row number in bounded memory.

A file is NumPy's own (.npy) of shape (n, 96, 96), float16: 18 KiB an image. It is read by pread, never mapped: the
pages of a mapped file count as the process's own memory, and a container is killed for them.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError

FINGERPRINT_PX = 96
DTYPE = np.dtype("<f2")
ROW_BYTES = FINGERPRINT_PX * FINGERPRINT_PX * DTYPE.itemsize

Fingerprints = NDArray[np.float16]


class FingerprintStore(Protocol):
    """Fingerprints by row number. An array (n, 96, 96) is one."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, rows: NDArray[np.intp], /) -> Fingerprints:
        """Those of `rows`, in that order: (k, 96, 96)."""
        ...


class FingerprintWriter:
    """Fingerprints written one after another. The file appears when all are there: on leaving without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._count = 0
        try:
            self._file: BinaryIO = self._part.open("wb", buffering=64 * ROW_BYTES)
        except OSError as error:
            raise self._unwritten(error) from error
        self._file.write(_header(0))

    def append(self, fingerprints: Fingerprints) -> None:
        """One fingerprint (96, 96), or several (k, 96, 96), are the next rows."""
        rows = np.ascontiguousarray(fingerprints, DTYPE).reshape(-1, FINGERPRINT_PX, FINGERPRINT_PX)
        self._count += len(rows)
        try:
            self._file.write(rows.data)
        except OSError as error:
            raise self._unwritten(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._file as file:
                if kind is None:
                    file.seek(0)
                    file.write(_header(self._count))
                    file.flush()
                    os.fsync(file.fileno())
            if kind is None:
                self._part.replace(self._path)
        except OSError as failure:
            # Closing writes what is left in the buffer: it fails again on the disk that was full before.
            if kind is None:
                raise self._unwritten(failure) from failure
        finally:
            self._part.unlink(missing_ok=True)

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"{self._path} can't be written ({error.strerror}); each image takes {ROW_BYTES} bytes there")


class FingerprintFiles:
    """The fingerprints of several files, as if they stood in one: the rows of the first file come first."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """All files are open. Raises UserError for one that is missing, cut off, or of anything else."""
        self._files: list[tuple[int, int]] = []  # file descriptor, place of the first row
        starts = [0]
        try:
            for path in paths:
                descriptor = _open(path)
                self._files.append((descriptor, 0))
                first, count = _layout(path, descriptor)
                self._files[-1] = descriptor, first
                starts.append(starts[-1] + count)
        except BaseException:
            self.close()
            raise
        self._starts = np.array(starts, np.intp)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: NDArray[np.intp], /) -> Fingerprints:
        """Those of `rows`, in that order: (k, 96, 96). Rows that follow each other are read at once."""
        wanted = np.asarray(rows, np.intp)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)} fingerprints")
        result = np.empty((len(wanted), FINGERPRINT_PX, FINGERPRINT_PX), DTYPE)
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        is_break = (np.diff(wanted) != 1) | (np.diff(numbers) != 0)
        starts = np.concatenate([[0], np.flatnonzero(is_break) + 1, [len(wanted)]]) if len(wanted) else np.zeros(1, int)
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            number = int(numbers[start])
            descriptor, first = self._files[number]
            place = first + int(wanted[start] - self._starts[number]) * ROW_BYTES
            _fill(descriptor, result[start:end].data.cast("B"), place)
        return result

    def close(self) -> None:
        """The files are closed."""
        while self._files:
            os.close(self._files.pop()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header(count: int) -> bytes:
    """Of the same length for every count: NumPy leaves room for digits."""
    buffer = io.BytesIO()
    shape = (count, FINGERPRINT_PX, FINGERPRINT_PX)
    np.lib.format.write_array_header_1_0(buffer, {"descr": DTYPE.str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path} can't be opened ({error.strerror}); make the fingerprints again") from error


def _layout(path: Path, descriptor: int) -> tuple[int, int]:
    """Where the first row stands, and how many there are."""
    header = os.pread(descriptor, len(_header(0)), 0)
    count, rest = divmod(os.fstat(descriptor).st_size - len(header), ROW_BYTES)
    if rest or header != _header(max(count, 0)):
        raise UserError(f"{path} is not a whole file of fingerprints; make the fingerprints again")
    return len(header), count


def _fill(descriptor: int, target: memoryview, place: int) -> None:
    while target:
        count = os.preadv(descriptor, [target], place)
        if not count:
            raise UserError("a file of fingerprints was cut off while it was read; make the fingerprints again")
        target, place = target[count:], place + count
