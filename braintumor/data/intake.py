"""From somebody's image folder or zip to the layout of this project: {train,test}/<class>/<name>.

Understood are the Kaggle layouts (Training/Testing or train/test, over class folders such as `glioma_tumor` or
`no_tumor`, in any case, with at most one folder around them) and plain class folders, which all go to train/.
Images are copied byte for byte.
"""

import fcntl
import io
import os
import shutil
import stat
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import pandas as pd

from braintumor.artifacts import GROUPS_FILE, recover_interrupted, replacing_directory
from braintumor.errors import UserError, name_some
from braintumor.labels import CLASS_NAMES, DECLARED_SPLITS
from braintumor.model.images import IMAGE_SUFFIXES
from braintumor.progress import Progress, silent

SPLIT_FOLDERS = {"training": "train", "train": "train", "testing": "test", "test": "test"}
CLASS_FOLDERS = {
    "glioma": "glioma",
    "glioma_tumor": "glioma",
    "meningioma": "meningioma",
    "meningioma_tumor": "meningioma",
    "no_tumor": "notumor",
    "notumor": "notumor",
    "no": "notumor",
    "pituitary": "pituitary",
    "pituitary_tumor": "pituitary",
}
LAYOUT = (
    "expected are Training/ and Testing/ (or train/, test/), each with the folders glioma, meningioma, notumor and "
    "pituitary (also glioma_tumor, no_tumor, ...), or these class folders alone, in the source or one folder below"
)
DESKTOP_FILES = (".DS_Store", "Thumbs.db")
HIDDEN = "hidden files"
NOT_IMAGES = "files that are no images"
OUTSIDE = "images outside the class folders"
COPY_BLOCK = 1 << 20


@dataclass(frozen=True)
class ImportSummary:
    """What was copied, and what was left behind."""

    source: Path
    target: Path
    n_images: int
    images_per_class: dict[str, dict[str, int]]  # by declared split, then class
    is_flat: bool  # class folders without Training/Testing: all images are in train/
    renamed: dict[str, str]  # target path by source path, where two files wanted one name
    skipped: dict[str, int]  # by kind
    missing_classes: list[str]
    has_patients: bool

    def __str__(self) -> str:
        counts = [f"{sum(of_class.values())} {declared}" for declared, of_class in self.images_per_class.items()]
        lines = [f"import: {self.n_images} images in {self.target} ({', '.join(counts)})", *self.notes]
        return "\n  ".join(lines)

    @property
    def notes(self) -> list[str]:
        """What a person should know before validating."""
        notes = [f"{count} {kind} were skipped" for kind, count in self.skipped.items() if count]
        if self.is_flat:
            notes.append("the source has no test folder: all images are in train/; move whole patients to test/")
        if self.missing_classes:
            notes.append(f"no images of {', '.join(self.missing_classes)}")
        if self.renamed:
            notes.append(f"{len(self.renamed)} images got another name, since two wanted the same")
        return notes


class Files(Protocol):
    """The files of a source, whether it is a folder or a zip."""

    paths: list[PurePosixPath]

    def open(self, path: PurePosixPath) -> IO[bytes]:
        """The file's bytes."""


@dataclass(frozen=True)
class Plan:
    """What goes where: target path (POSIX, relative) by source path, in sorted order."""

    root: PurePosixPath
    targets: dict[PurePosixPath, str]
    renamed: dict[str, str]
    skipped: dict[str, int]
    is_flat: bool


def import_dataset(source: Path, target: Path, progress: Progress = silent) -> ImportSummary:
    """Replace `target` by the images of `source`, a folder or .zip, in this project's layout.

    The images appear all at once at the end; after an error or a kill `target` is as before, at the latest when this
    runs again. Raises UserError for a source without images in a known layout, for links and zip entries that lead out
    of it, and for a target that holds something other than a data set.
    """
    source, target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    _refuse_overlap(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target), _open_source(source) as files:
        recover_interrupted(target)
        _refuse_foreign_target(target)
        plan = _plan(source, files.paths)
        with replacing_directory(target, may_hold=None) as folder:
            advance = progress("import: copying images", len(plan.targets))
            for path, place in plan.targets.items():
                _copy(files, path, folder / place)
                advance()
            has_patients = _carry_patients(source, files, plan, folder)
    return _summary(source, target, plan, has_patients)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """No other import fills the same target meanwhile; the lock goes with the process."""
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        _lock(folder, target)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, target: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another import into {target.parent} is running; wait for it") from None
    except OSError:
        # Some network file systems can't lock a folder; there, two imports at a time are the person's own care.
        return


def _refuse_overlap(source: Path, target: Path) -> None:
    if not source.exists():
        raise UserError(f"{source} is missing; give a folder or a .zip of images")
    if source == target or target in source.parents or source in target.parents:
        raise UserError(f"{source} and {target} lie in one another; import from, or to, a folder beside it")


def _refuse_foreign_target(target: Path) -> None:
    """Only a data set may be replaced: a mistyped target must not cost a home folder."""
    if target.is_file():
        raise UserError(f"{target} is a file; give a folder as the target")
    own = {GROUPS_FILE, *DESKTOP_FILES, *DECLARED_SPLITS}
    own |= {f"{declared}/{name}" for declared in DECLARED_SPLITS for name in (*CLASS_NAMES, *DESKTOP_FILES)}
    present = [path for pattern in ("*", "train/*", "test/*") for path in target.glob(pattern)]
    foreign = sorted({path.relative_to(target).as_posix() for path in present} - own)
    if foreign:
        raise UserError(
            f"{target} holds more than a data set: {name_some(foreign)}; give another target, or remove them"
        )


@contextmanager
def _open_source(source: Path) -> Iterator[Files]:
    if source.is_dir():
        yield FolderFiles(source)
        return
    if not zipfile.is_zipfile(source):
        raise UserError(f"{source} is neither a folder nor a zip; unpack it, and import the folder")
    try:
        with zipfile.ZipFile(source) as archive:
            yield ZipFiles(source, archive)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{source} is damaged ({error}); fetch it again") from error


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

    def _walk(self) -> Iterator[PurePosixPath]:
        for folder, folders, names in os.walk(self.folder, onerror=_refuse_folder):
            for name in [*folders, *names]:
                path = Path(folder, name)
                if path.is_symlink():
                    self._refuse_link(path)
            for name in names:
                path = Path(folder, name)
                if path.is_file():
                    yield PurePosixPath(path.relative_to(self.folder).as_posix())

    def _refuse_link(self, path: Path) -> None:
        end = Path(os.path.realpath(path))
        if self.folder not in end.parents:
            raise UserError(f"{path} is a link that leads out of the source, to {end}; replace it by the file")
        if end.is_dir():
            raise UserError(f"{path} is a link to a folder; replace it by the folder, or remove it")


class ZipFiles:
    """The files in a zip; entries that would land outside it are refused, and so are links."""

    def __init__(self, source: Path, archive: zipfile.ZipFile) -> None:
        self.source = source
        self.archive = archive
        self.entries = {self._checked(entry): entry for entry in archive.infolist() if not entry.is_dir()}
        self.paths = sorted(self.entries)

    def open(self, path: PurePosixPath) -> IO[bytes]:
        """The entry's bytes, unpacked; its checksum is checked at their end."""
        try:
            return self.archive.open(self.entries[path])
        except (NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self.source} can't be unpacked ({error}); unpack it, and import the folder") from error

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


def _plan(source: Path, paths: Sequence[PurePosixPath]) -> Plan:
    visible = [path for path in paths if not _is_hidden(path)]
    images = [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise UserError(f"{source} holds no images among its {len(paths)} files; {LAYOUT}")
    root = _find_root(source, images)
    _refuse_unknown_classes(source, root, images)
    places = {path: place for path in images if (place := _place(path, root)) is not None}
    targets, renamed = _distinct_names(places)
    return Plan(
        root=root,
        targets=targets,
        renamed=renamed,
        skipped={
            HIDDEN: len(paths) - len(visible),
            NOT_IMAGES: sum(path.name != GROUPS_FILE for path in set(visible) - set(images)),
            OUTSIDE: len(images) - len(places),
        },
        is_flat=not any(_is_split(path, root) for path in places),
    )


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _place(path: PurePosixPath, root: PurePosixPath) -> tuple[str, str] | None:
    """Declared split and class of an image, or None where it stands in no class folder below `root`."""
    if not path.is_relative_to(root):
        return None
    folders = [part.casefold() for part in path.relative_to(root).parts[:-1]]
    declared_split = "train"
    if folders and folders[0] in SPLIT_FOLDERS:
        declared_split = SPLIT_FOLDERS[folders.pop(0)]
    return (declared_split, CLASS_FOLDERS[folders[0]]) if folders and folders[0] in CLASS_FOLDERS else None


def _is_split(path: PurePosixPath, root: PurePosixPath) -> bool:
    return path.relative_to(root).parts[0].casefold() in SPLIT_FOLDERS


def _find_root(source: Path, images: Sequence[PurePosixPath]) -> PurePosixPath:
    """The folder that holds the split or class folders: the source itself, or the only such folder below it."""
    top = PurePosixPath()
    if any(_place(path, top) for path in images):
        return top
    candidates = sorted({PurePosixPath(path.parts[0]) for path in images if len(path.parts) > 1})
    roots = [root for root in candidates if any(_place(path, root) for path in images)]
    if len(roots) > 1:
        raise UserError(f"{source} holds several data sets: {name_some([str(r) for r in roots])}; import one of them")
    if not roots:
        folders = sorted({str(path.parent) for path in images})
        raise UserError(f"{source} holds {len(images)} images, in {name_some(folders)}, but no class folder; {LAYOUT}")
    return roots[0]


def _refuse_unknown_classes(source: Path, root: PurePosixPath, images: Sequence[PurePosixPath]) -> None:
    """A fifth class would vanish silently if its folder were only skipped."""
    unknown = {
        str(path.parent)
        for path in images
        if path.is_relative_to(root) and _place(path, root) is None and _is_beside_classes(path.relative_to(root))
    }
    if unknown:
        raise UserError(
            f"{source} holds images in {name_some(sorted(unknown))}, which is none of the four classes; "
            "move these images to a class folder, or remove them"
        )


def _is_beside_classes(path: PurePosixPath) -> bool:
    return len(path.parts) > 2 and path.parts[0].casefold() in SPLIT_FOLDERS


def _distinct_names(
    places: dict[PurePosixPath, tuple[str, str]],
) -> tuple[dict[PurePosixPath, str], dict[str, str]]:
    """A target for each image; of several with one name the first in sorted order keeps it, the rest get a number."""
    wanted: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for path, place in places.items():
        wanted[place][path.name.casefold()] += 1
    targets: dict[PurePosixPath, str] = {}
    renamed: dict[str, str] = {}
    taken: set[str] = set()
    for path in sorted(places):
        place, name, number = places[path], path.name, 1
        # Letter case is no difference everywhere, and a number must not take a name that another file came with.
        while (key := "/".join((*place, name.casefold()))) in taken or (number > 1 and wanted[place][name.casefold()]):
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        taken.add(key)
        targets[path] = "/".join((*place, name))
        if number > 1:
            renamed[str(path)] = targets[path]
    return targets, renamed


def _copy(files: Files, path: PurePosixPath, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.open(path) as original, target.open("xb") as copy:
            shutil.copyfileobj(original, copy, COPY_BLOCK)
    except OSError as error:
        raise UserError(f"{path} can't be copied to {target} ({error.strerror or error}); see to the disk") from error


def _carry_patients(source: Path, files: Files, plan: Plan, folder: Path) -> bool:
    """Write groups.csv with the paths of the copies, if the source has one."""
    places = [place for place in dict.fromkeys((plan.root, PurePosixPath())) if place / GROUPS_FILE in files.paths]
    if not places:
        return False
    base = places[0]
    with files.open(base / GROUPS_FILE) as file:
        content = file.read()
    name = f"{source / base / GROUPS_FILE}"
    try:
        rows = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise UserError(f"{name} is not valid CSV ({error}); it needs the columns path,patient") from error
    if not {"path", "patient"} <= set(rows.columns):
        raise UserError(f"{name} lacks a column; it needs path,patient")
    targets = {str(path): place for path, place in plan.targets.items()}
    originals = [str(base / path.replace("\\", "/")) for path in rows["path"]]
    unknown = sorted({path for path in originals if path not in targets})
    if unknown:
        raise UserError(
            f"{name} names images that are not imported: {name_some(unknown)}; correct or remove these rows"
        )
    carried = rows.assign(path=[targets[path] for path in originals]).sort_values("path")
    carried.to_csv(folder / GROUPS_FILE, index=False, lineterminator="\n")
    return True


def _summary(source: Path, target: Path, plan: Plan, has_patients: bool) -> ImportSummary:
    counts = Counter(PurePosixPath(place).parts[:2] for place in plan.targets.values())
    present = {label for _, label in counts}
    return ImportSummary(
        source=source,
        target=target,
        n_images=len(plan.targets),
        images_per_class={
            declared: {label: counts[declared, label] for label in CLASS_NAMES} for declared in DECLARED_SPLITS
        },
        is_flat=plan.is_flat,
        renamed=plan.renamed,
        skipped=plan.skipped,
        missing_classes=[label for label in CLASS_NAMES if label not in present],
        has_patients=has_patients,
    )


def _unopened(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} can't be opened ({error.strerror}); see to its permissions")


def _refuse_folder(error: OSError) -> None:
    raise _unopened(Path(error.filename), error) from error
