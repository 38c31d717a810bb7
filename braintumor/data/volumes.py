"""From DICOM series and NIfTI volumes to a source of pictures that name nobody.

A PNG holds pixels alone, and its name comes from them. groups.csv names a patient as `pseudonyms` does. Without a key a
patient's volumes still share a name there, but one that comes from pixels and counts as unknown: the next import would
give the same patient another, so that nobody may say that patients are kept apart.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import pandas as pd
from PIL import Image

from braintumor.artifacts import GROUPS_FILE
from braintumor.data.contents import is_hidden
from braintumor.data.dicom import DICOM_SUFFIXES, Header, has_magic, read_header, read_series, silence
from braintumor.data.layout import plan_places
from braintumor.data.next_version import link
from braintumor.data.nifti import MASKS, bids_subject, case_name, is_mask, is_mask_of, is_nifti, read_nifti
from braintumor.data.patients import COLUMNS, read_rows, write_rows
from braintumor.data.pseudonyms import PATIENT_KEY_VARIABLE, patient_key, pseudonym
from braintumor.data.slices import LeftOut, Refused, SliceRule, choose_slices, show_slice
from braintumor.data.sources import printable
from braintumor.errors import UserError, name_some
from braintumor.labels import IMAGE_SUFFIXES, PLANE, PLANES, SPLIT_FOLDERS, UNKNOWN_PATIENT_PREFIX
from braintumor.model.images import Grey
from braintumor.progress import Progress, silent

OUTSIDE = "DICOM and NIfTI files outside the class folders"
REPEATED = "files of volumes that were there already"
NO_KEY = f"have a patient number that can't be told from others' later: {PATIENT_KEY_VARIABLE} is not set"
NO_NUMBER = f"have no patient number; the source's {GROUPS_FILE} may give one"

# What has to stay together: ('patient', number), ('stated', name), ('study', its UID) or ('case', folder, name).
Case = tuple[str, ...]


@dataclass(frozen=True)
class VolumeSummary:
    """What became of a source's volumes."""

    n_volumes: int
    n_slices: int
    skipped: dict[str, int]  # files by kind, a plural that follows its number
    notes: list[str]  # what a person should know before validating


@dataclass(frozen=True)
class Pending:
    """A series or a NIfTI file that is to be read."""

    place: PurePosixPath  # its class folder
    paths: tuple[PurePosixPath, ...]
    case: Case  # whose it is taken for: the patient that groups.csv states, else `origin`
    origin: Case  # what the file itself says
    masks: tuple[PurePosixPath, ...] = ()
    stated: PurePosixPath | None = None  # the path in groups.csv that names it, if one does


@dataclass(frozen=True)
class Slice:
    """An image that was written."""

    path: PurePosixPath
    volume: Pending
    digest: str  # of the volume
    plane: str


def convert_volumes(
    source: Path, paths: Sequence[PurePosixPath], work: Path, rule: SliceRule, progress: Progress = silent
) -> VolumeSummary | None:
    """None if `source` holds no volume; else `work`, an empty folder, holds what is to be imported in its stead.

    `paths` are the files of the folder `source`, relative to it, already checked not to lead out of it (hidden ones
    may be among them). `work` then has the same tree: slices (8-bit grey PNG, directly in the class folders) in the
    place of volumes, all other files the same bytes, and a groups.csv with a row for each slice after the rows of the
    source's own. A row there that names a volume, a DICOM file or a folder of them gives all its slices that patient.
    Raises UserError, naming the files, for what can't be imported.
    """
    with silence():
        volumes = {path for path in paths if is_volume(path, lambda path: _open(source / path))}
        if not volumes:
            return None
        conversion = _Conversion(source, paths, volumes, work, rule)
        pending = conversion.gather(progress)
        conversion.carry_other_files()
        conversion.convert(pending, progress)
        return conversion.summary()


class _Conversion:
    """A source on its way: what was written, left out and found wrong so far."""

    def __init__(
        self,
        source: Path,
        paths: Sequence[PurePosixPath],
        volumes: set[PurePosixPath],
        work: Path,
        rule: SliceRule,
    ) -> None:
        self.source = source
        self.volumes = volumes
        self.others = sorted(set(paths) - volumes)
        self.work = work
        self.rule = rule
        self.key = patient_key()
        self.root, self.place_of = _class_folders(source, paths, volumes)
        groups = [place for place in (self.root, PurePosixPath()) if place / GROUPS_FILE in self.others]
        self.groups_folder = groups[0] if groups else self.root
        self.columns, self.rows = self._read_groups(has_groups=bool(groups))
        self.skipped: Counter[str] = Counter({OUTSIDE: len(volumes - set(self.place_of))})
        self.wrong: dict[PurePosixPath, str] = {}
        self.remarks: Counter[str] = Counter()
        self.n_volumes = 0
        self.slices: list[Slice] = []

    def carry_other_files(self) -> None:
        """Everything but volumes and groups.csv stands in `work`."""
        for path in self.others:
            if path != self.groups_folder / GROUPS_FILE:
                (self.work / path).parent.mkdir(parents=True, exist_ok=True)
                link(Path(os.path.realpath(self.source / path)), self.work / path)

    def gather(self, progress: Progress) -> list[Pending]:
        """The series and NIfTI volumes in class folders, in order."""
        inside = sorted(self.volumes & set(self.place_of))
        nifti = [path for path in inside if is_nifti(path)]
        dicom = [path for path in inside if not is_nifti(path)]
        pending = self._gather_nifti(nifti) + self._gather_series(dicom, progress)
        self._refuse_wrong()
        return sorted(pending, key=lambda volume: (volume.place, volume.paths))

    def convert(self, pending: Sequence[Pending], progress: Progress) -> None:
        """The slices of all volumes and groups.csv are written; one volume stands in memory at a time."""
        advance = progress("reading volumes", len(pending))
        for volume in pending:
            try:
                self._convert(volume)
            except LeftOut as kind:
                self.skipped[str(kind)] += len(volume.paths)
            except Refused as reason:
                self.wrong[reason.path or volume.paths[0]] = str(reason)
            advance()
        self._refuse_wrong()
        if not self.slices and not any(path in self.place_of for path in self.others):
            left_out = [f"{count} {kind}" for kind, count in sorted(self.skipped.items()) if count]
            raise UserError(f"{self.source} gives no slice: it holds {', '.join(left_out)}; add MR volumes of heads")
        self._write_groups()

    def summary(self) -> VolumeSummary:
        """What to tell."""
        return VolumeSummary(
            n_volumes=self.n_volumes,
            n_slices=len(self.slices),
            skipped={kind: count for kind, count in sorted(self.skipped.items()) if count},
            notes=[
                f"{self.n_volumes} volumes gave {len(self.slices)} slices",
                *(f"{count} volumes {remark}" for remark, count in sorted(self.remarks.items())),
            ],
        )

    def _gather_nifti(self, paths: Sequence[PurePosixPath]) -> list[Pending]:
        volumes = [path for path in paths if not is_mask(path)]
        self.skipped[MASKS] += len(paths) - len(volumes)
        masks_in: dict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
        for mask in sorted(set(paths) - set(volumes)):
            masks_in[mask.parent].append(mask)
        cases = self._cases(volumes)
        return [
            self._pending(
                (path,),
                ("patient", subject) if (subject := bids_subject(path)) else cases[path],
                tuple(mask for mask in masks_in[path.parent] if is_mask_of(mask, path)),
            )
            for path in volumes
        ]

    def _gather_series(self, paths: Sequence[PurePosixPath], progress: Progress) -> list[Pending]:
        headers = self._read_headers(paths, progress)
        cases = self._cases([of_series[0].path for of_series in headers])
        pending = []
        for of_series in headers:
            first = of_series[0]
            if len({header.patient for header in of_series}) > 1:
                self.wrong[first.path] = "is of a series with files of several patients"
            case = ("study", first.study) if first.study else cases[first.path]
            case = ("patient", first.patient) if first.patient else case
            pending.append(self._pending(tuple(header.path for header in of_series), case))
        return pending

    def _read_headers(self, paths: Sequence[PurePosixPath], progress: Progress) -> list[list[Header]]:
        """The files of each series; a file that stands in one class folder twice is taken once."""
        advance = progress("reading DICOM headers", len(paths))
        series: dict[tuple[PurePosixPath, str], list[Header]] = defaultdict(list)
        seen: set[tuple[PurePosixPath, str]] = set()
        for path in paths:
            try:
                header = read_header(self.source, path)
                instance = (self.place_of[path], header.instance or str(path))
                if instance in seen:
                    raise LeftOut(REPEATED)
                seen.add(instance)
                series[self.place_of[path], header.series or str(path)].append(header)
            except LeftOut as kind:
                self.skipped[str(kind)] += 1
            except Refused as reason:
                self.wrong[path] = str(reason)
            advance()
        return list(series.values())

    def _pending(self, paths: tuple[PurePosixPath, ...], case: Case, masks: tuple[PurePosixPath, ...] = ()) -> Pending:
        nearest = (next((place for place in (path, *path.parents) if place in self.rows), None) for path in paths)
        named = [place for place in nearest if place]
        patients = {self.rows[place]["patient"] for place in named} - {""}
        if len(patients) > 1:
            self.wrong[paths[0]] = f"is of a volume to which {GROUPS_FILE} gives several patients"
        stated: Case = ("stated", patients.pop()) if patients else case
        return Pending(self.place_of[paths[0]], paths, stated, case, masks, named[0] if named else None)

    def _cases(self, paths: Sequence[PurePosixPath]) -> dict[PurePosixPath, Case]:
        """What seems to be of one person where nobody says so: a folder among others, or a name less its contrast."""
        below = {path: path.relative_to(self.place_of[path]).parts for path in paths}
        folders: dict[PurePosixPath, set[str]] = defaultdict(set)
        for path, parts in below.items():
            folders[self.place_of[path]].update(parts[:-1][:1])
        return {
            path: ("case", str(self.place_of[path]), parts[0])
            if len(parts) > 1 and len(folders[self.place_of[path]]) > 1
            else ("case", str(self.place_of[path]), case_name(path))
            for path, parts in below.items()
        }

    def _convert(self, pending: Pending) -> None:
        if is_nifti(pending.paths[0]):
            volume = read_nifti(self.source, pending.paths[0], pending.masks, self.rule.plane)
        else:
            volume = read_series(self.source, pending.paths, self.rule.plane)
        indices = choose_slices(volume, self.rule)
        plane = PLANES[volume.axis]
        stem = pending.place / f"{volume.digest}-{plane}"
        slices = [
            Slice(stem.with_name(f"{stem.name}-{index:03d}.png"), pending, volume.digest, plane) for index in indices
        ]
        if any((self.work / written.path).exists() for written in slices):
            raise LeftOut(REPEATED)
        for index, written in zip(indices, slices, strict=True):
            _write_png(show_slice(volume, index), self.work / written.path)
        self.slices += slices
        self.n_volumes += 1
        self.remarks.update(volume.remarks)

    def _refuse_wrong(self) -> None:
        if self.wrong:
            culprits = [f"{printable(path)} {reason}" for path, reason in sorted(self.wrong.items())]
            raise UserError(f"{self.source} holds what can't be imported; mend or remove: {name_some(culprits)}")

    def _read_groups(self, has_groups: bool) -> tuple[list[str], dict[PurePosixPath, dict[str, str]]]:
        """Columns and rows of the source's own groups.csv, by path relative to the source."""
        if not has_groups:
            return COLUMNS, {}
        file = self.source / self.groups_folder / GROUPS_FILE
        rows = read_rows(file.read_bytes(), str(file))
        records = [{str(column): str(value) for column, value in row.items()} for row in rows.to_dict("records")]
        return list(rows.columns), {self.groups_folder / row["path"]: row for row in records}

    def _write_groups(self) -> None:
        names = self._patient_names()
        volumes = {place for path in self.volumes for place in (path, *path.parents)}
        rows = [row for place, row in self.rows.items() if place not in volumes]
        for written in self.slices:
            stated = self.rows[written.volume.stated] if written.volume.stated else {}
            path = str(written.path.relative_to(self.groups_folder))
            rows.append(stated | {"path": path, "patient": names[written.volume.case], PLANE: written.plane})
        if rows:
            columns = list(dict.fromkeys([*self.columns, PLANE])) if self.slices else self.columns
            write_rows(pd.DataFrame(rows, columns=columns).fillna(""), self.work / self.groups_folder)

    def _patient_names(self) -> dict[Case, str]:
        """What stands in groups.csv for each case; a remark on those who count as unknown."""
        digests: dict[Case, set[str]] = defaultdict(set)
        for written in self.slices:
            digests[written.volume.case].add(written.digest)
        stated_of: dict[Case, set[str]] = defaultdict(set)
        for written in self.slices:
            if written.volume.case[0] == "stated":
                stated_of[written.volume.origin].add(written.volume.case[1])
        names = {}
        for case, of_case in digests.items():
            # groups.csv may name some of a patient's volumes alone: the others are of the same person.
            stated = sorted(stated_of[case])
            if len(stated) > 1 and case[0] != "case":
                raise UserError(
                    f"{self.source / self.groups_folder / GROUPS_FILE} gives the volumes of one patient the numbers "
                    f"{name_some(stated)}, and leaves others out; name them all, or mend the numbers"
                )
            if case[0] == "stated":
                names[case] = case[1]
            elif len(stated) == 1:
                names[case] = stated[0]
            elif case[0] == "patient" and self.key:
                names[case] = pseudonym(case[1], self.key)
            else:
                names[case] = UNKNOWN_PATIENT_PREFIX + min(of_case)
                self.remarks[NO_KEY if case[0] == "patient" else NO_NUMBER] += len(of_case)
        return names


def is_volume(path: PurePosixPath, open_file: Callable[[PurePosixPath], IO[bytes]]) -> bool:
    """Whether a file is DICOM, by name or content, or NIfTI, by name; hidden files and pictures are not opened."""
    if is_hidden(path) or path.suffix.lower() in IMAGE_SUFFIXES or path.name == GROUPS_FILE:
        return False
    if is_nifti(path) or path.suffix.lower() in DICOM_SUFFIXES:
        return True
    with open_file(path) as file:
        return has_magic(file)


def _open(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{printable(file)} can't be opened ({error.strerror}); see to its permissions") from error


def _class_folders(
    source: Path, paths: Sequence[PurePosixPath], volumes: set[PurePosixPath]
) -> tuple[PurePosixPath, dict[PurePosixPath, PurePosixPath]]:
    """The folder that holds the split or class folders, and the class folder of each picture and volume in one."""
    # The layout knows pictures by their suffix.
    as_picture = {path: path.with_name(f"{path.name}.png") if path in volumes else path for path in paths}
    plan = plan_places(source, list(as_picture.values()))
    place_of = {}
    for path, picture in as_picture.items():
        if picture in plan.places:
            below = path.relative_to(plan.root).parts
            depth = 2 if below[0].casefold() in SPLIT_FOLDERS else 1
            place_of[path] = plan.root.joinpath(*below[:depth])
    return plan.root, place_of


def _write_png(grey: Grey, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.fromarray(grey).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror or error}); see to the disk") from error
