"""Corrections of labels, out of a CSV that an annotator filled in: path,new_label.

What is taken out of the data set goes to a folder beside it, <data set>-removed, in the same layout: DVC keeps an
earlier version only of what somebody added to it. `data import --add` brings the images back from there.
"""

import filecmp
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from braintumor.artifacts import GROUPS_FILE, replacing_directory
from braintumor.data import patients
from braintumor.data.contents import list_contents, mask_path
from braintumor.data.layout import distinct_names
from braintumor.data.next_version import Counts, brief, carry_over, count_images, link, show_change, workplace
from braintumor.errors import UserError, name_some
from braintumor.labels import CLASS_FOLDERS, CLASS_NAMES, DECLARED_SPLITS
from braintumor.progress import Progress, silent

REMOVE = "remove"
PATH, NEW_LABEL = "path", "new_label"
FIRST_ROW = 2  # row 1 is the header
SHOWN = 5


@dataclass(frozen=True)
class Correction:
    """What a row of the CSV asks for."""

    row: int
    path: PurePosixPath  # relative to the data set
    label: str  # a class, or 'remove'


@dataclass(frozen=True)
class RelabelSummary:
    """The data set before and after the corrections."""

    dataset: Path
    before: Counts
    after: Counts
    moved: dict[str, str]  # new path by old path
    removed: dict[str, Path]  # file outside the data set by old path
    already: dict[str, str]  # where an image stands that an earlier run moved, by its old path
    n_unchanged: int  # images that have the label that is asked for

    def __str__(self) -> str:
        return "\n".join([*show_change(self.dataset, self.before, self.after), *(f"  {note}" for note in self.notes)])

    @property
    def is_changed(self) -> bool:
        """Whether there was anything to do."""
        return bool(self.moved or self.removed)

    @property
    def notes(self) -> list[str]:
        """What was done, and what a person should know of it."""
        notes = []
        if self.moved:
            notes.append(f"relabelled: {len(self.moved)}, as {_arrows(self.moved)}")
            notes.append("copies of these keep their label: 'braintumor validate' names those that disagree now")
        if self.removed:
            folder = brief(removed_folder(self.dataset))
            notes.append(f"taken out: {len(self.removed)}, as {name_some(list(self.removed), SHOWN)}")
            back = f"braintumor data import --add --copies add {folder}"
            notes.append(f"they stand in {folder}; '{back}' brings them back")
        if self.already:
            notes.append(f"corrected earlier: {len(self.already)}, as {_arrows(self.already)}")
        if self.n_unchanged:
            notes.append(f"labelled so already: {self.n_unchanged}")
        return notes if notes else ["nothing to do: no row has a new_label"]


def relabel(corrections: Path, dataset: Path, progress: Progress = silent, *, dry_run: bool = False) -> RelabelSummary:
    """The images that `corrections` names carry their new labels, or stand in <dataset>-removed.

    Takes a CSV with the columns path, relative to the data set, and new_label: a class, 'remove', or nothing. An image
    keeps its split and its name, with a number where that is taken; groups.csv follows. A dry run tells the same and
    changes nothing. Raises UserError, and changes nothing, for paths and labels that do not exist and for rows that
    contradict each other. Corrections that were applied before are told, and skipped.
    """
    dataset = Path(os.path.realpath(dataset))
    with workplace(dataset, dry_run) as scratch:
        there = list_contents(dataset)
        rows = patients.rows_of(dataset)
        patients.refuse_strangers(rows, there.images, str(dataset / GROUPS_FILE))
        asked = read_corrections(corrections, dataset.name)
        gone = [correction for correction in asked if str(correction.path) not in set(there.images)]
        already = {str(correction.path): _earlier(correction, there.images, dataset) for correction in gone}
        _refuse_unknown(corrections, dataset, [one for one in gone if not already[str(one.path)]])
        pending = [one for one in asked if one not in gone and one.label != one.path.parts[1]]
        removed = _outside(dataset, [str(one.path) for one in pending if one.label == REMOVE])
        # No image takes a path that another one leaves: the same file, applied twice, would move it back.
        to_move = {one.path: (one.path.parts[0], one.label) for one in pending if one.label != REMOVE}
        moved = {str(path): place for path, place in distinct_names(to_move, taken=there.versioned).items()}
        if pending and not dry_run:
            _keep(removed, dataset, rows, there.masks, scratch)
            _apply(moved, removed, dataset, rows, there.masks, progress)
    return RelabelSummary(
        dataset=dataset,
        before=count_images(there.images),
        after=count_images(moved.get(path, path) for path in there.images if path not in removed),
        moved=moved,
        removed=removed,
        already={path: place for path, place in already.items() if place},
        n_unchanged=len(asked) - len(gone) - len(pending),
    )


def read_corrections(file: Path, dataset_name: str) -> list[Correction]:
    """One correction for each path that has a new label, sorted by path; `dataset_name` may stand before a path.

    Raises UserError, naming the rows, for unknown labels and for a path with two labels.
    """
    wrong: list[str] = []
    corrections: dict[PurePosixPath, Correction] = {}
    for row, (path, new_label) in enumerate(_read_table(file), FIRST_ROW):
        label = _label(new_label)
        if label is None:
            wrong.append(f"row {row}: new_label {new_label!r} is none of {', '.join(CLASS_NAMES)}, {REMOVE}, or empty")
        elif label:
            correction = Correction(row, _path(path, dataset_name), label)
            first = corrections.setdefault(correction.path, correction)
            if first.label != label:
                wrong.append(f"rows {first.row} and {row}: {path} is to be {first.label} and {label}; keep one")
    if wrong:
        raise UserError(f"{file} was not applied; {'; '.join(wrong[:SHOWN])}{_more(wrong)}")
    return [corrections[path] for path in sorted(corrections)]


def removed_folder(dataset: Path) -> Path:
    """Where images stand that were taken out of `dataset`."""
    return dataset.with_name(f"{dataset.name}-removed")


def _read_table(file: Path) -> list[tuple[str, str]]:
    if not file.is_file():
        raise UserError(f"{file} is missing; give a CSV with the columns {PATH},{NEW_LABEL}")
    try:
        rows = patients.read_table(file)
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not valid CSV ({error}); it needs the columns {PATH},{NEW_LABEL}") from error
    if missing := [column for column in (PATH, NEW_LABEL) if column not in rows.columns]:
        raise UserError(
            f"{file} lacks the column {' and '.join(missing)} among {', '.join(map(str, rows.columns))}; "
            f"it needs {PATH},{NEW_LABEL}, with commas between"
        )
    return list(zip(rows[PATH], rows[NEW_LABEL], strict=True))


def _label(new_label: str) -> str | None:
    """The class in any of its spellings, 'remove', or '' for nothing; None for what is none of them."""
    folded = new_label.strip().casefold()
    return folded if folded in ("", REMOVE) else CLASS_FOLDERS.get(folded)


def _path(path: str, dataset_name: str) -> PurePosixPath:
    plain = PurePosixPath(path.strip().replace("\\", "/"))
    is_below_its_name = plain.parts[:1] == (dataset_name,) and dataset_name not in DECLARED_SPLITS
    return PurePosixPath(*plain.parts[1:]) if is_below_its_name else plain


def _earlier(correction: Correction, images: Sequence[str], dataset: Path) -> str | None:
    """Where the image stands if an earlier run has moved it, as far as its name tells."""
    path = correction.path
    if len(path.parts) != 3 or path.parts[0] not in DECLARED_SPLITS:
        return None
    if correction.label == REMOVE:
        kept = removed_folder(dataset) / path
        return str(brief(kept)) if kept.is_file() else None
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    place = re.compile(rf"{re.escape(path.parts[0])}/{correction.label}/{stem}(-\d+)?{suffix}")
    return next((image for image in images if place.fullmatch(image)), None)


def _refuse_unknown(file: Path, dataset: Path, unknown: Sequence[Correction]) -> None:
    if unknown:
        in_order = sorted(unknown, key=lambda one: one.row)
        culprits = name_some([f"row {one.row}: {one.path if one.path.parts else 'no path'}" for one in in_order], SHOWN)
        raise UserError(
            f"{file} was not applied; it names images that {dataset} does not hold ({culprits}); "
            "correct these rows, or empty their new_label"
        )


def _outside(dataset: Path, paths: Iterable[str]) -> dict[str, Path]:
    """A file beside the data set for each path; one that holds the same bytes already will do."""
    places: dict[str, Path] = {}
    given: set[str] = set()
    for path in paths:
        wanted = removed_folder(dataset) / path
        place, number = wanted, 1
        # Letter case is no difference everywhere.
        while str(place).casefold() in given or _holds_another(place, dataset / path):
            number += 1
            place = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        given.add(str(place).casefold())
        places[path] = place
    return places


def _holds_another(place: Path, image: Path) -> bool:
    return place.exists() and not filecmp.cmp(place, image, shallow=False)


def _keep(removed: Mapping[str, Path], dataset: Path, rows: pd.DataFrame, masks: Sequence[str], scratch: Path) -> None:
    """The images to remove stand outside the data set as well, with masks and rows of groups.csv, hidden from git."""
    if not removed:
        return
    folder = removed_folder(dataset)
    folder.mkdir(exist_ok=True)
    (scratch / ".gitignore").write_text("*\n")
    (scratch / ".gitignore").replace(folder / ".gitignore")
    places = {path: place.relative_to(folder).as_posix() for path, place in removed.items()}
    of_masks = {
        mask_path(path): folder / mask_path(place) for path, place in places.items() if mask_path(path) in masks
    }
    for number, (path, place) in enumerate([*removed.items(), *of_masks.items()]):
        place.parent.mkdir(parents=True, exist_ok=True)
        # Where a link is a copy in truth, it appears whole or not at all.
        # The image itself, where the data set holds a link into DVC's cache, which forgets it some day.
        link(Path(os.path.realpath(dataset / path)), scratch / str(number))
        (scratch / str(number)).replace(place)
    earlier, kept = patients.rows_of(folder), patients.moved(rows, places)
    if len(kept):
        earlier = earlier[~earlier["path"].isin(kept["path"])]
        patients.write_rows(patients.joined(earlier, kept), scratch)
        (scratch / GROUPS_FILE).replace(folder / GROUPS_FILE)


def _apply(
    moved: Mapping[str, str],
    removed: Iterable[str],
    dataset: Path,
    rows: pd.DataFrame,
    masks: Sequence[str],
    progress: Progress,
) -> None:
    moves: dict[str, str | None] = {**moved, **dict.fromkeys(removed)}
    of_masks = {
        mask_path(path): place and mask_path(place) for path, place in moves.items() if mask_path(path) in masks
    }
    with replacing_directory(dataset, may_hold=None) as folder:
        carry_over(dataset, folder, moves | of_masks, progress)
        if rows["path"].isin(list(moves)).any():
            kept = {path: place for path in rows["path"] if (place := moves.get(path, path)) is not None}
            patients.write_rows(patients.moved(rows, kept), folder)


def _arrows(places: Mapping[str, str]) -> str:
    return name_some([f"{path} -> {place}" for path, place in places.items()], SHOWN)


def _more(wrong: Sequence[str]) -> str:
    return f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
