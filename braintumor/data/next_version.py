"""The next version of a data set: made beside it out of hard links, then put in its place in one step.

A hard link costs no room and is safe, because nothing here writes into a file that exists: what changes is written as
a new file. That holds for files that DVC has linked out of its cache, too.
"""

import fcntl
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

from braintumor.artifacts import recover_interrupted, scratch_directory
from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES, DECLARED_SPLITS
from braintumor.progress import Progress


class Change(Protocol):
    """What a person is told of a data set before and after a command."""

    @property
    def is_changed(self) -> bool:
        """Whether it is another version now."""


Counts = dict[str, dict[str, int]]  # images, by declared split, then class


@contextmanager
def workplace(dataset: Path, dry_run: bool) -> Iterator[Path]:
    """An empty folder to work in, removed at the end; nobody else changes `dataset` meanwhile.

    What a killed command left beside `dataset` is put back or removed first. A dry run leaves all that alone, takes no
    lock, and works in the system's folder for temporary files.
    """
    if os.path.ismount(dataset):
        raise UserError(f"{dataset} is a mount point, which can't be replaced in one step; mount the folder around it")
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="braintumor-") as scratch:
            yield Path(scratch)
        return
    dataset.parent.mkdir(parents=True, exist_ok=True)
    with _alone(dataset):
        recover_interrupted(dataset)
        with scratch_directory(dataset) as folder:
            yield folder


def carry_over(dataset: Path, folder: Path, moves: Mapping[str, str | None], progress: Progress) -> None:
    """Every file of `dataset` stands in `folder`, too, where `moves` says (by path; None: nowhere) or where it stood.

    A path left out of `moves` stays. `folder` is empty before.
    """
    files, folders = _walk(dataset)
    advance = progress("carrying over what stays", len(files))
    for path in folders:
        (folder / path).mkdir()
    for path in files:
        if (place := moves.get(path, path)) is not None:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            link(dataset / path, folder / place)
        advance()
    for path in [".", *folders]:
        shutil.copymode(dataset / path, folder / path)


def link(original: Path, copy: Path) -> None:
    """`copy` is another name of the same file; a file of its own where the file system or its rules allow no links."""
    try:
        if original.is_symlink():
            copy.symlink_to(original.readlink())
        else:
            _link_or_copy(original, copy)
    except OSError as error:
        raise UserError(
            f"{original} can't be carried over to {copy} ({error.strerror}); nothing was changed; see to the disk"
        ) from error


def _link_or_copy(original: Path, copy: Path) -> None:
    try:
        os.link(original, copy)
    except OSError:
        shutil.copy2(original, copy)


def count_images(paths: Iterable[str]) -> Counts:
    """How many of the paths {train,test}/<class>/<name> are of each split and class."""
    counts = Counter(PurePosixPath(path).parts[:2] for path in paths)
    return {declared: {label: counts[declared, label] for label in CLASS_NAMES} for declared in DECLARED_SPLITS}


def total(counts: Counts) -> int:
    """How many images these are."""
    return sum(sum(of_class.values()) for of_class in counts.values())


def show_change(dataset: Path, before: Counts, after: Counts) -> list[str]:
    """The counts before and after, a line a split."""
    lines = [f"{brief(dataset)}: {total(before):,} images before, {total(after):,} after"]
    for declared in after:
        of_class = [_arrow(label, before[declared][label], after[declared][label]) for label in after[declared]]
        lines.append(f"  {declared}: {', '.join(of_class)}")
    return lines


def _arrow(label: str, before: int, after: int) -> str:
    return f"{label} {before:,}" if before == after else f"{label} {before:,} -> {after:,}"


def next_commands(dataset: Path, message: str) -> str:
    """What a person types to make the changed data set a version, and to use it."""
    folder = brief(dataset)
    return f"next: dvc add {folder} && git commit -m '{message}' {folder}.dvc && dvc repro validate"


def brief(path: Path) -> Path:
    """The path as a person types it here: without the current folder."""
    here = Path(os.path.realpath("."))
    return path.relative_to(here) if here in path.parents else path


@contextmanager
def _alone(dataset: Path) -> Iterator[None]:
    """No other command changes a data set in the same folder meanwhile; the lock goes with the process."""
    folder = os.open(dataset.parent, os.O_RDONLY)
    try:
        _lock(folder, dataset)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, dataset: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another command is changing a data set in {dataset.parent}; wait for it") from None
    except OSError:
        # Some network file systems can't lock a folder; there, two commands at a time are the person's own care.
        return


def _walk(dataset: Path) -> tuple[list[str], list[str]]:
    """Files (and links, to whatever) and folders below `dataset`, relative to it, sorted."""
    files: list[str] = []
    folders: list[str] = []
    for folder, names, others in os.walk(dataset, onerror=_refuse_folder):
        for name in names:
            path = Path(folder, name)
            (files if path.is_symlink() else folders).append(path.relative_to(dataset).as_posix())
        files += [Path(folder, name).relative_to(dataset).as_posix() for name in others]
    return sorted(files), sorted(folders)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} can't be opened ({error.strerror}); see to its permissions") from error
