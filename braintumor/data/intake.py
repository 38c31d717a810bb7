"""From somebody's image folder or zip to the layout of this project, in the place of the data set that was there.

Images are copied byte for byte; slices are made of DICOM series and NIfTI volumes first. Which layouts are understood
stands in `layout`. The new data set appears all at once: after an error or a kill the old one is there, or the new one,
at the latest when the next command changes it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd
import yaml

from braintumor.artifacts import GROUPS_FILE, replacing_directory
from braintumor.data import patients
from braintumor.data.contents import MASKS, dataset_md5, is_hidden, mask_path
from braintumor.data.layout import Plan, distinct_names, plan_places
from braintumor.data.next_version import Counts, count_images, show_change, total, workplace
from braintumor.data.slices import SliceRule
from braintumor.data.sources import (
    Files,
    FolderFiles,
    copy_file,
    open_source,
    printable,
    refuse_archives,
    refuse_full_disk,
    unpack,
)
from braintumor.data.volumes import VolumeSummary, convert_volumes, is_volume
from braintumor.errors import UserError, name_some
from braintumor.labels import CLASS_NAMES, DECLARED_SPLITS, IMAGE_SUFFIXES
from braintumor.progress import Progress, silent

DESKTOP_FILES = (".DS_Store", "Thumbs.db")
DEFAULT_RULE = SliceRule()


@dataclass(frozen=True)
class Opened:
    """A source that is ready to be copied from; slices of its volumes are images of it."""

    source: Path
    files: Files
    plan: Plan
    rows: pd.DataFrame | None  # of its groups.csv, by source path; None if it has none
    volumes: VolumeSummary | None

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        notes = list(self.volumes.notes) if self.volumes else []
        skipped = self.plan.skipped | (self.volumes.skipped if self.volumes else {})
        notes += [f"skipped, {kind}: {count}" for kind, count in skipped.items() if count]
        if self.plan.is_flat:
            notes.append("the source has no test folder: all its images go to train/; move whole patients to test/")
        return notes


@dataclass(frozen=True)
class ImportSummary:
    """The data set before and after an import, and what was left behind."""

    source: Path
    target: Path
    before: Counts
    after: Counts
    is_flat: bool  # class folders without Training/Testing: all images are in train/
    renamed: dict[str, str]  # target path by source path, where the name could not stay
    skipped: dict[str, int]  # files by kind
    has_patients: bool
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([*show_change(self.target, self.before, self.after), *(f"  {note}" for note in self.notes)])

    @property
    def is_changed(self) -> bool:
        """Whether the data set may be another version now."""
        return True

    @property
    def n_images(self) -> int:
        """How many images the data set has now."""
        return total(self.after)


def import_dataset(
    source: Path,
    target: Path,
    progress: Progress = silent,
    *,
    rule: SliceRule = DEFAULT_RULE,
    discard: bool = False,
    dry_run: bool = False,
) -> ImportSummary:
    """Replace `target` by the images of `source`, a folder or .zip, in this project's layout.

    A dry run tells the same and changes nothing. Raises UserError for a source without images in a known layout, for
    links and zip entries that lead out of it, for a target that holds something other than a data set, and, unless
    `discard`, for one whose images would be lost, since DVC does not hold them.
    """
    source, target = resolved(source, target)
    with workplace(target, dry_run) as scratch, opened(source, scratch, rule, progress) as found:
        _refuse_foreign_target(target)
        before = count_images(_images_of(target))
        if not discard:
            _refuse_loss(target)
        refuse_full_disk(target, [found.files.size(path) for path in found.plan.places])
        targets = distinct_names(found.plan.places)
        if not dry_run:
            with replacing_directory(target, may_hold=None) as folder:
                _fill(folder, found, targets, progress)
        return _summary(found, target, before, targets)


def resolved(source: Path, target: Path) -> tuple[Path, Path]:
    """Both without links; UserError if the source is missing, or one lies in the other."""
    source, target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if not source.exists():
        raise UserError(f"{source} is missing; give a folder or a .zip of images")
    if source == target or target in source.parents or source in target.parents:
        raise UserError(f"{source} and {target} lie in one another; import from, or to, a folder beside it")
    return source, target


@contextmanager
def opened(source: Path, scratch: Path, rule: SliceRule, progress: Progress) -> Iterator[Opened]:
    """The source, and where its images go; slices of volumes are made in `scratch`, by `rule`."""
    with open_source(source) as files:
        refuse_archives(source, files.paths)
        volumes = None
        if any(is_volume(path, files.open) for path in files.paths):
            files, volumes = _converted(source, files, scratch, rule, progress)
        plan = plan_places(source, files.paths)
        yield Opened(source, files, plan, _read_patients(source, files, plan), volumes)


def renamed(targets: Mapping[PurePosixPath, str]) -> dict[str, str]:
    """Target path by source path of the images that could not keep their name."""
    return {printable(path): place for path, place in targets.items() if PurePosixPath(place).name != path.name}


def note_on_names(new_names: dict[str, str]) -> list[str]:
    """A note if any image got another name."""
    arrows = [f"{path} -> {place}" for path, place in new_names.items()]
    return [f"renamed: {len(arrows)}, as {name_some(arrows, limit=3)}"] if arrows else []


def few_images(after: Counts) -> list[str]:
    """Notes on classes that no model can learn."""
    of_class = {label: sum(counts[label] for counts in after.values()) for label in CLASS_NAMES}
    missing = [label for label, count in of_class.items() if count == 0]
    single = [label for label, count in of_class.items() if count == 1]
    notes = [f"no images of {', '.join(missing)}"] if missing else []
    return [*notes, *([f"a single image of {', '.join(single)}"] if single else [])]


def _converted(
    source: Path, files: Files, scratch: Path, rule: SliceRule, progress: Progress
) -> tuple[Files, VolumeSummary | None]:
    unpacked, slices = scratch / "unpacked", scratch / "slices"
    slices.mkdir()
    try:
        if not isinstance(files, FolderFiles):
            unpack(files, unpacked, progress)
            files = FolderFiles(unpacked)
        volumes = convert_volumes(files.folder, files.paths, slices, rule, progress)
        return (FolderFiles(slices) if volumes else files), volumes
    except UserError as error:
        # The scratch folder is gone when a person reads this.
        raise UserError(str(error).replace(str(unpacked), str(source)).replace(str(slices), str(source))) from error


def _read_patients(source: Path, files: Files, plan: Plan) -> pd.DataFrame | None:
    """The rows of the source's groups.csv, with paths from its top; None if it has no such file."""
    places = [place for place in (plan.root, PurePosixPath()) if place / GROUPS_FILE in files.paths]
    if not places:
        return None
    base = places[0]
    name = str(source / base / GROUPS_FILE)
    with files.open(base / GROUPS_FILE) as file:
        rows = patients.read_rows(file.read(), name)
    rows = rows.assign(path=[str(base / path) for path in rows["path"]])
    patients.refuse_strangers(rows, [str(path) for path in plan.places], name)
    return rows


def _refuse_foreign_target(target: Path) -> None:
    """Only a data set may be replaced: a mistyped target must not cost a home folder."""
    if target.is_file():
        raise UserError(f"{target} is a file; give a folder as the target")
    own = {GROUPS_FILE, MASKS, *DESKTOP_FILES, *DECLARED_SPLITS}
    own |= {f"{declared}/{name}" for declared in DECLARED_SPLITS for name in (*CLASS_NAMES, *DESKTOP_FILES)}
    present = [path for pattern in ("*", "train/*", "test/*") for path in target.glob(pattern)]
    foreign = sorted({printable(path.relative_to(target)) for path in present} - own)
    if foreign:
        raise UserError(
            f"{target} holds more than a data set: {name_some(foreign)}; give another target, or remove them"
        )


def _images_of(target: Path) -> list[str]:
    images = [path.relative_to(target) for path in target.glob("*/*/*") if path.suffix.lower() in IMAGE_SUFFIXES]
    return [path.as_posix() for path in images if not is_hidden(PurePosixPath(path))]


def _refuse_loss(target: Path) -> None:
    files = [path for path in target.rglob("*") if path.name not in DESKTOP_FILES and not path.is_dir()]
    if files and not _is_held_by_dvc(target):
        raise UserError(
            f"{target} holds {len(files):,} files in a state that DVC does not know: to replace them is to lose them; "
            f"run 'dvc add {target.name}' first, or give --discard"
        )


def _is_held_by_dvc(target: Path) -> bool:
    """Whether the .dvc file beside the data set names its present content."""
    pointer = target.with_name(f"{target.name}.dvc")
    try:
        content = yaml.safe_load(pointer.read_text(encoding="utf-8"))
        return str(content["outs"][0]["md5"]) == f"{dataset_md5(target)}.dir"
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, UserError):
        return False


def _fill(folder: Path, found: Opened, targets: dict[PurePosixPath, str], progress: Progress) -> None:
    advance = progress("import: copying images", len(targets))
    for path, place in targets.items():
        copy_file(found.files, path, folder / place)
        advance()
    copy_masks(found, targets, folder)
    if found.rows is not None:
        places = {str(path): place for path, place in targets.items()}
        patients.write_rows(patients.moved(found.rows, places), folder)


def copy_masks(found: Opened, targets: Mapping[PurePosixPath, str], folder: Path) -> None:
    """The masks of the images that became `targets` stand in `folder`, too; one that is there stays as it is."""
    for path, mask in found.plan.masks.items():
        if path in targets and not (place := folder / mask_path(targets[path])).exists():
            copy_file(found.files, mask, place)


def _summary(found: Opened, target: Path, before: Counts, targets: dict[PurePosixPath, str]) -> ImportSummary:
    after = count_images(targets.values())
    new_names = renamed(targets)
    return ImportSummary(
        source=found.source,
        target=target,
        before=before,
        after=after,
        is_flat=found.plan.is_flat,
        renamed=new_names,
        skipped=found.plan.skipped,
        has_patients=found.rows is not None,
        notes=[*found.notes, *few_images(after), *note_on_names(new_names)],
    )
