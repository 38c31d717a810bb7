"""The files of a data set and its version, by their names and bytes alone: no image is decoded here."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from braintumor.artifacts import GROUPS_FILE
from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES, DECLARED_SPLITS, IMAGE_SUFFIXES

MASKS = "masks"
# What DVC never takes into a version, whatever .dvcignore says.
UNVERSIONED_FOLDERS = frozenset({".git", ".hg", ".dvc"})
UNVERSIONED_FILES = frozenset({".git"})


@dataclass(frozen=True)
class Contents:
    """The files of a data set, as POSIX paths relative to it, sorted."""

    images: list[str]  # {train,test}/<class>/<name>
    masks: list[str]  # of lesions in these images: masks/{train,test}/<class>/<name without suffix>.png
    misplaced: list[str]  # images anywhere else, and masks of no image or of several
    ignored: list[str]  # hidden files and other suffixes
    versioned: list[str]  # all that DVC counts, groups.csv included


def list_contents(dataset: Path) -> Contents:
    """All files of `dataset`, by what they are; no image is opened."""
    if not dataset.is_dir():
        raise UserError(f"{dataset} is missing; run 'dvc pull' or 'braintumor data import', or mend --dataset")
    versioned = sorted(_walk(dataset))
    visible = [path for path in versioned if not is_hidden(PurePosixPath(path))]
    pictures = [path for path in visible if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
    images = [path for path in pictures if stands_in_a_class(path)]
    of_images = Counter(mask_path(path) for path in images)
    masks = [path for path in pictures if of_images[path] == 1]
    taken = {*pictures, GROUPS_FILE}
    return Contents(
        images=images,
        masks=masks,
        misplaced=sorted(set(pictures) - set(images) - set(masks)),
        ignored=[path for path in versioned if path not in taken],
        versioned=versioned,
    )


def mask_path(image: str) -> str:
    """Where the mask of an image stands, if it has one; both are POSIX paths relative to the data set."""
    return str(PurePosixPath(MASKS) / PurePosixPath(image).with_suffix(".png"))


def dataset_md5(dataset: Path) -> str:
    """The md5 that DVC gives the folder (`outs[0].md5` of data.dvc, without '.dir'), computed from the files.

    Patterns in a .dvcignore outside the folder are not applied; one inside it is refused, as DVC does.
    """
    return version_md5(file_md5s(dataset, list_contents(dataset).versioned))


def version_md5(md5s: Mapping[str, str]) -> str:
    """DVC's md5 of a folder whose files have these md5s (dvc_data.hashfile.tree.Tree.digest)."""
    digest = hashlib.md5(b"[", usedforsecurity=False)
    for number, path in enumerate(sorted(md5s)):
        entry = json.dumps({"md5": md5s[path], "relpath": path}, sort_keys=True)
        digest.update((", " * (number > 0) + entry).encode())
    digest.update(b"]")
    return digest.hexdigest()


def file_md5s(dataset: Path, paths: Sequence[str]) -> dict[str, str]:
    """The md5 of each file."""

    def md5(path: str) -> str:
        try:
            with (dataset / path).open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except OSError as error:
            raise unopened(dataset / path, error) from error

    # Hashing and reading release the interpreter lock: threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(md5, paths), strict=True))


def _walk(dataset: Path) -> Iterator[str]:
    # Links to folders are not followed, links to files are: DVC does both so.
    for folder, folders, files in os.walk(dataset, onerror=_refuse_folder):
        folders[:] = [name for name in folders if name not in UNVERSIONED_FOLDERS]
        for name in files:
            if name in UNVERSIONED_FILES:
                continue
            path = Path(folder, name)
            _refuse_oddities(path)
            yield path.relative_to(dataset).as_posix()


def _refuse_oddities(path: Path) -> None:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a} has a name that is not UTF-8; rename the file") from None
    if path.name == ".dvcignore":
        raise UserError(f"{path} stands inside a data set, which DVC refuses; move it to the project's root")
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise unopened(path, error) from error
    if not is_regular:
        raise UserError(f"{path} is neither a file nor a folder; remove it")


def _refuse_folder(error: OSError) -> None:
    raise unopened(Path(error.filename), error) from error


def unopened(path: Path, error: OSError) -> UserError:
    """What to tell of a file of a data set that the system does not open."""
    return UserError(f"{path} can't be opened ({error.strerror}); mend it, or remove it and run 'dvc checkout'")


def is_hidden(path: PurePosixPath) -> bool:
    """Whether the path is what desktops and tools leave, rather than a person."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def stands_in_a_class(path: str) -> bool:
    """Whether this path is an image's, if it is an image: {train,test}/<class>/<name>."""
    parts = PurePosixPath(path).parts
    return len(parts) == 3 and parts[0] in DECLARED_SPLITS and parts[1] in CLASS_NAMES
