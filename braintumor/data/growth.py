"""A data set grows by the images of a source; what was there keeps its path and its bytes.

Copies bring nothing new, and one that stands on the other side of a split leaks: they are skipped, unless somebody
chooses otherwise. Nothing is lost by that, since the source stays as it is.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import pandas as pd

from braintumor.artifacts import GROUPS_FILE, replacing_directory, write_text
from braintumor.data import patients
from braintumor.data.arrivals import LIKENESSES, Arrivals, Likeness, Match, compare
from braintumor.data.contents import list_contents
from braintumor.data.intake import (
    DEFAULT_RULE,
    Opened,
    copy_masks,
    few_images,
    note_on_names,
    opened,
    renamed,
    resolved,
)
from braintumor.data.layout import Place, distinct_names
from braintumor.data.next_version import Counts, carry_over, count_images, link, show_change, workplace
from braintumor.data.pseudonyms import refuse_other_key
from braintumor.data.slices import SliceRule
from braintumor.data.sources import FolderFiles, copy_file, printable, refuse_full_disk
from braintumor.errors import name_some
from braintumor.progress import Progress, silent

SHOWN_CONFLICTS = 20
SHOWN = 3

Copies = Literal["skip", "add"]
# Nothing like it; like an image there; the same bytes as an earlier one; the same bytes as one with another label.
Reason = Literal["new", "copy", "repeat", "contradiction"]


@dataclass(frozen=True)
class Fate:
    """What becomes of an image of the source, and why."""

    path: str  # in the source
    declared_split: str
    label: str
    reason: Reason
    is_added: bool
    copy_of: str | None = None  # the closest image: in the data set for a 'copy', in the source for all others
    likeness: Likeness | None = None
    correlation: float | None = None
    conflict: str | None = None  # a copy that carries another label, and which label


@dataclass(frozen=True)
class AddSummary:
    """The data set before and after it grew, and the fate of every image that arrived."""

    source: Path
    target: Path
    before: Counts
    after: Counts
    fates: list[Fate]
    renamed: dict[str, str]  # target path by source path
    unreadable: list[str]  # source paths of images that were added and can't be decoded
    is_changed: bool  # images or patient numbers came to the data set
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([*show_change(self.target, self.before, self.after), *(f"  {note}" for note in self.notes)])

    @property
    def n_added(self) -> int:
        """How many images the data set has more."""
        return sum(fate.is_added for fate in self.fates)

    @property
    def conflicts(self) -> list[Fate]:
        """Images with a copy, there or in the source, that carries another label."""
        return [fate for fate in self.fates if fate.conflict]

    def because(self, reason: Reason) -> list[Fate]:
        """The images with this reason."""
        return [fate for fate in self.fates if fate.reason == reason]


def add_images(
    source: Path,
    target: Path,
    copy_correlation: float,
    progress: Progress = silent,
    *,
    copies: Copies = "skip",
    patient_prefix: str = "",
    rule: SliceRule = DEFAULT_RULE,
    report: Path | None = None,
    dry_run: bool = False,
) -> AddSummary:
    """The data set `target` holds the images of `source`, too.

    Skipped, unless `copies` is 'add', are copies of what is there, of byte-identical images in the source all but the
    first, and all of them if they carry several labels. Rows of the source's groups.csv are joined to those there, its
    patient numbers behind `patient_prefix`. A dry run tells the same and changes nothing; `report` is a CSV with the
    fate of every image. Raises UserError as `import_dataset` does, and for a target that is missing.
    """
    source, target = resolved(source, target)
    with workplace(target, dry_run) as scratch, opened(source, scratch, rule, progress) as found:
        there = list_contents(target)
        rows = patients.rows_of(target)
        patients.refuse_strangers(rows, there.images, str(target / GROUPS_FILE))
        if found.volumes:
            refuse_other_key(rows["patient"])
        files = _on_disk(found, scratch, progress)
        labels = [PurePosixPath(path).parts[1] for path in there.images]
        labels += [label for _, label in found.plan.places.values()]
        images = [target / path for path in there.images]
        arrivals = compare(images, list(files.values()), labels, copy_correlation, progress)
        fates = judge(found.plan.places, there.images, arrivals, copies)
        added = {path: place for path, place in found.plan.places.items() if fates[path].is_added}
        if isinstance(found.files, FolderFiles):
            refuse_full_disk(target, [found.files.size(path) for path in added])
        targets = distinct_names(added, taken=there.versioned)
        joined = _join_patients(rows, found, targets, fates, arrivals, patient_prefix)
        if report:
            _write_report(report, fates, targets)
        if not dry_run and (targets or joined.is_changed):
            with replacing_directory(target, may_hold=None) as folder:
                carry_over(target, folder, {}, progress)
                _fill(folder, found, files, targets, progress)
                if joined.is_changed:
                    patients.write_rows(joined.rows, folder)
        return _summary(found, target, there.images, targets, fates, joined, arrivals)


def judge(
    places: Mapping[PurePosixPath, Place], there: Sequence[str], arrivals: Arrivals, copies: Copies
) -> dict[PurePosixPath, Fate]:
    """The fate of each image of a source, by its path; `places` are in the order that `arrivals` counts in."""
    paths = list(places)
    label_of = [label for _, label in places.values()]
    of_bytes: dict[int, list[int]] = defaultdict(list)
    for index, first in enumerate(arrivals.first_of_bytes):
        of_bytes[first].append(index)
    matches: dict[int, list[Match]] = defaultdict(list)
    for match in sorted(arrivals.matches, key=lambda match: match.rank):
        matches[match.arriving].append(match)

    def name(match: Match) -> tuple[str, str]:
        """Path and label of what the match is with."""
        if match.is_there:
            return there[match.other], PurePosixPath(there[match.other]).parts[1]
        return printable(paths[match.other]), label_of[match.other]

    fates = {}
    for index, path in enumerate(paths):
        own = label_of[index]
        first = arrivals.first_of_bytes[index]
        of_there = [match for match in matches[index] if match.is_there]
        closest = next(iter(of_there or matches[index]), None)
        others = [name(match) for match in of_there or matches[index]]
        others += [(printable(paths[twin]), label_of[twin]) for twin in of_bytes[first]]
        rivals = [f"{other} ({label})" for other, label in others if label != own]
        reason: Reason = "repeat" if first != index else "new"
        if any(label_of[twin] != own for twin in of_bytes[first]):
            reason = "contradiction"
        if of_there:
            reason = "copy"
        fates[path] = Fate(
            path=printable(path),
            declared_split=places[path][0],
            label=own,
            reason=reason,
            is_added=reason == "new" or copies == "add",
            copy_of=name(closest)[0] if closest else None,
            likeness=closest.likeness if closest else None,
            correlation=closest.correlation if closest else None,
            conflict=rivals[0] if rivals else None,
        )
    return fates


def _on_disk(found: Opened, scratch: Path, progress: Progress) -> dict[PurePosixPath, Path]:
    """A file for each image of the source, where an image can be decoded from; a zip's are unpacked in `scratch`."""
    paths = list(found.plan.places)
    if isinstance(found.files, FolderFiles):
        return {path: found.files.folder / path for path in paths}
    refuse_full_disk(scratch, [found.files.size(path) for path in paths])
    advance = progress("import: unpacking images", len(paths))
    unpacked = {path: scratch / "images" / f"{index}{path.suffix}" for index, path in enumerate(paths)}
    for path, file in unpacked.items():
        copy_file(found.files, path, file)
        advance()
    return unpacked


def _fill(
    folder: Path,
    found: Opened,
    files: Mapping[PurePosixPath, Path],
    targets: Mapping[PurePosixPath, str],
    progress: Progress,
) -> None:
    advance = progress("import: copying images", len(targets))
    for path, place in targets.items():
        if isinstance(found.files, FolderFiles):
            copy_file(found.files, path, folder / place)
        else:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            link(files[path], folder / place)
        advance()
    copy_masks(found, targets, folder)


def _join_patients(
    there: pd.DataFrame,
    found: Opened,
    targets: Mapping[PurePosixPath, str],
    fates: Mapping[PurePosixPath, Fate],
    arrivals: Arrivals,
    prefix: str,
) -> patients.Joined:
    arriving = pd.DataFrame(columns=patients.COLUMNS, dtype=str) if found.rows is None else found.rows
    equals = {
        str(path): fate.copy_of
        for path, fate in fates.items()
        if fate.reason == "copy" and not fate.is_added and fate.copy_of and fate.likeness != "near copy"
    }
    paths = list(found.plan.places)
    for index, first in enumerate(arrivals.first_of_bytes):
        if first != index and paths[index] not in targets and paths[first] in targets:
            equals[str(paths[index])] = targets[paths[first]]
    places = {str(path): place for path, place in targets.items()}
    return patients.join_rows(there, patients.with_prefix(arriving, prefix), places, equals)


def _write_report(report: Path, fates: Mapping[PurePosixPath, Fate], targets: Mapping[PurePosixPath, str]) -> None:
    rows = [{"target": targets.get(path), **asdict(fate)} for path, fate in fates.items()]
    columns = ["path", "target", "declared_split", "label", "reason", "copy_of", "likeness", "correlation", "conflict"]
    table = pd.DataFrame(rows, columns=columns)
    write_text(report, table.to_csv(index=False, lineterminator="\n", float_format="%.4f"))


def _summary(
    found: Opened,
    target: Path,
    there: Sequence[str],
    targets: Mapping[PurePosixPath, str],
    fates: Mapping[PurePosixPath, Fate],
    joined: patients.Joined,
    arrivals: Arrivals,
) -> AddSummary:
    before, after = count_images(there), count_images([*there, *targets.values()])
    paths = list(fates)
    unreadable = [printable(paths[index]) for index in arrivals.unreadable if fates[paths[index]].is_added]
    new_names = renamed(targets)
    return AddSummary(
        source=found.source,
        target=target,
        before=before,
        after=after,
        fates=list(fates.values()),
        renamed=new_names,
        unreadable=unreadable,
        is_changed=bool(targets) or joined.is_changed,
        notes=[
            *found.notes,
            *_notes_on_copies(list(fates.values())),
            *_notes_on_conflicts(list(fates.values())),
            *_notes_on_patients(joined),
            *note_on_names(new_names),
            *_note_on_unreadable(unreadable),
            *few_images(after),
        ],
    )


def _notes_on_copies(fates: Sequence[Fate]) -> list[str]:
    copies = [fate for fate in fates if fate.reason == "copy"]
    across = [fate for fate in copies if fate.copy_of and PurePosixPath(fate.copy_of).parts[0] != fate.declared_split]
    repeats = [fate for fate in fates if fate.reason == "repeat"]
    near = [fate for fate in fates if fate.reason == "new" and fate.copy_of]
    notes = []
    if copies:
        kinds = Counter(fate.likeness for fate in copies)
        counted = ", ".join(f"{kinds[kind]} {kind}" for kind in LIKENESSES if kinds[kind])
        notes.append(f"{_done(copies)}, copies of what is there: {len(copies)} ({counted}), as {_pairs(copies)}")
    if across and not across[0].is_added:
        notes.append(
            f"of these, the copy stands on the other side of train/ and test/: {len(across)}; "
            "with --copies add they come too, and the split keeps each with its copy"
        )
    if repeats:
        notes.append(f"{_done(repeats)}, held twice by the source: {len(repeats)}, as {_pairs(repeats)}")
    if near:
        notes.append(f"added, though copies of others in the source: {len(near)}, as {_pairs(near)}")
    return notes


def _notes_on_conflicts(fates: Sequence[Fate]) -> list[str]:
    """Each with both paths: somebody has to decide."""
    conflicts = [f"  {fate.path} ({fate.label}) is {fate.conflict}" for fate in fates if fate.conflict]
    held_back = [fate for fate in fates if fate.reason == "contradiction" and not fate.is_added]
    if not conflicts:
        return []
    notes = [
        f"conflicts, copies under another label: {len(conflicts)}; correct the source, or 'braintumor data relabel'",
        *conflicts[:SHOWN_CONFLICTS],
    ]
    if len(conflicts) > SHOWN_CONFLICTS:
        notes.append(f"  and {len(conflicts) - SHOWN_CONFLICTS} more; --report FILE lists all")
    if held_back:
        notes.append(f"skipped, the same file under two labels in the source: {len(held_back)}")
    return notes


def _notes_on_patients(joined: patients.Joined) -> list[str]:
    notes = []
    if joined.shared:
        notes.append(
            f"patient numbers that occur on both sides, taken for the same people: {len(joined.shared)}, as "
            f"{name_some(joined.shared, SHOWN)}; if they are others, give --patient-prefix"
        )
    if joined.learnt:
        told = [f"{path} is of {patient}" for path, patient in sorted(joined.learnt.items())]
        notes.append(
            f"images there that got the patient number of their copy: {len(told)}, as {name_some(told, SHOWN)}"
        )
    if joined.disputed:
        told = [f"{path} is of {own}, its copy of {other}" for path, (own, other) in joined.disputed.items()]
        notes.append(f"images there with another patient than their copy: {len(told)}, as {name_some(told, SHOWN)}")
    return notes


def _note_on_unreadable(paths: Sequence[str]) -> list[str]:
    told = f"added, though they can't be decoded, so that 'braintumor validate' will refuse them: {len(paths)}, as "
    return [told + name_some(paths, SHOWN)] if paths else []


def _done(fates: Sequence[Fate]) -> str:
    return "added" if fates[0].is_added else "skipped"


def _pairs(fates: Sequence[Fate]) -> str:
    return name_some([f"{fate.path} is {fate.copy_of}" for fate in fates], SHOWN)
