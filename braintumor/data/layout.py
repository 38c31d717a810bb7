"""Where the files of somebody's image set go: {train,test}/<class>/<name>.

Understood are the Kaggle layouts (Training/Testing or train/test, over class folders such as `glioma_tumor` or
`no_tumor`, in any case, with at most one folder around them) and plain class folders, which all go to train/.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from braintumor.artifacts import GROUPS_FILE
from braintumor.data.contents import is_hidden, mask_path
from braintumor.data.sources import printable
from braintumor.errors import UserError, name_some
from braintumor.labels import CLASS_FOLDERS, IMAGE_SUFFIXES, SPLIT_FOLDERS

LAYOUT = (
    "expected are Training/ and Testing/ (or train/, test/), each with the folders glioma, meningioma, notumor and "
    "pituitary (also glioma_tumor, no_tumor, ...), or these class folders alone, in the source or one folder below"
)
HIDDEN = "hidden files"
NOT_IMAGES = "files that are no images"
OUTSIDE = "images outside the class folders"
MAX_NAME_BYTES = 255
# What Python makes of bytes in a name that are no UTF-8, and what no file name of a data set may hold.
NOT_UTF8 = re.compile("[\ud800-\udfff]")

Place = tuple[str, str]  # declared split, class


@dataclass(frozen=True)
class Plan:
    """What of a source becomes an image of a data set."""

    root: PurePosixPath  # the folder of the source that holds the split or class folders
    places: dict[PurePosixPath, Place]  # by source path, sorted
    masks: dict[PurePosixPath, PurePosixPath]  # source path of the lesion's mask, by that of the image
    skipped: dict[str, int]  # files by kind
    is_flat: bool  # class folders without Training/Testing: all images go to train/


def plan_places(source: Path, paths: Sequence[PurePosixPath]) -> Plan:
    """Split and class of each image among the files of `source`; UserError for an unknown layout or class."""
    visible = [path for path in paths if not is_hidden(path)]
    images = [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise UserError(f"{source} holds no images among its {len(paths)} files; {LAYOUT}")
    root = _find_root(source, images)
    places = {path: place for path in sorted(images) if (place := _place(path, root)) is not None}
    is_flat = not any(_is_split(path, root) for path in places)
    known = set(images)
    beside = {path: root / mask_path(str(path.relative_to(root))) for path in places}
    masks = {path: beside[path] for path in places if beside[path] in known}
    others = known - set(places) - set(masks.values())
    _refuse_unknown_classes(source, root, others, is_flat)
    return Plan(
        root=root,
        places=places,
        masks=masks,
        skipped={
            HIDDEN: len(paths) - len(visible),
            NOT_IMAGES: sum(path.name != GROUPS_FILE for path in set(visible) - set(images)),
            OUTSIDE: len(others),
        },
        is_flat=is_flat,
    )


def distinct_names(places: Mapping[PurePosixPath, Place], taken: Iterable[str] = ()) -> dict[PurePosixPath, str]:
    """A target for each image: {train,test}/<class>/<name>, none of them in `taken`.

    Of several images with one name the first in sorted order keeps it, the rest get a number. Names that are no UTF-8
    or too long for a file system are mended.
    """
    wanted: dict[Place, Counter[str]] = defaultdict(Counter)
    for path, place in places.items():
        wanted[place][_key(path.name)] += 1
    used = {_key(path) for path in taken}
    targets: dict[PurePosixPath, str] = {}
    for path in sorted(places):
        place, name, number = places[path], _numbered(path, 1), 1
        # A number must not take a name that another file came with.
        while (key := _key("/".join((*place, name)))) in used or (number > 1 and wanted[place][_key(name)]):
            number += 1
            name = _numbered(path, number)
        used.add(key)
        targets[path] = "/".join((*place, name))
    return targets


def _numbered(path: PurePosixPath, number: int) -> str:
    tail = path.suffix if number == 1 else f"-{number}{path.suffix}"
    stem = NOT_UTF8.sub("_", path.stem)
    while len((stem + tail).encode()) > MAX_NAME_BYTES:
        stem = stem[:-1]
    return stem + tail


def _key(path: str) -> str:
    """Equal for paths that some file system takes for one: letter case and composed accents are no difference there."""
    return unicodedata.normalize("NFC", NOT_UTF8.sub("_", path)).casefold()


def _place(path: PurePosixPath, root: PurePosixPath) -> Place | None:
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
        raise UserError(
            f"{source} holds several data sets: {name_some([printable(root) for root in roots])}; import one of them"
        )
    if not roots:
        folders = sorted({printable(path.parent) for path in images})
        raise UserError(f"{source} holds {len(images)} images, in {name_some(folders)}, but no class folder; {LAYOUT}")
    return roots[0]


def _refuse_unknown_classes(
    source: Path, root: PurePosixPath, unplaced: Iterable[PurePosixPath], is_flat: bool
) -> None:
    """A fifth class would vanish silently if its folder were only skipped."""
    unknown = {
        printable(path.parent)
        for path in unplaced
        if path.is_relative_to(root) and _is_beside_classes(path.relative_to(root), is_flat)
    }
    if unknown:
        raise UserError(
            f"{source} holds images in {name_some(sorted(unknown))}, which is none of the four classes; "
            "move these images to a class folder, or remove them"
        )


def _is_beside_classes(path: PurePosixPath, is_flat: bool) -> bool:
    if is_flat:
        return len(path.parts) > 1
    return len(path.parts) > 2 and path.parts[0].casefold() in SPLIT_FOLDERS
