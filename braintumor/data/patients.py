"""groups.csv: who is shown by which image, and how its rows travel with the images.

A patient number that two sources share is taken for one person. To take two people for one costs a few images on one
side of a split; to take one for two would put the same anatomy into training and test, and nobody would see it.
"""

import io
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pandas as pd

from braintumor.artifacts import GROUPS_FILE, write_text
from braintumor.errors import UserError, name_some
from braintumor.labels import HASHED_PATIENT, UNKNOWN_PATIENT_PREFIX

COLUMNS = ["path", "patient"]


@dataclass(frozen=True)
class Joined:
    """The rows of a data set and of the images that came to it."""

    rows: pd.DataFrame
    is_changed: bool
    shared: list[str]  # patient numbers of both
    learnt: dict[str, str]  # patient by path: of an image there, told by a copy of it that was skipped
    disputed: dict[str, tuple[str, str]]  # by path: the patient there, and the one that such a copy tells


def read_rows(content: bytes, name: str) -> pd.DataFrame:
    """The rows of a groups.csv, all columns as text; UserError with `name` for what is none."""
    try:
        rows = read_table(io.BytesIO(content))
    except ValueError as error:
        raise UserError(f"{name} is not valid CSV ({error}); it needs the columns path,patient") from error
    if missing := [column for column in COLUMNS if column not in rows.columns]:
        raise UserError(f"{name} lacks the column {' and '.join(missing)}; it needs path,patient")
    rows = rows.assign(path=rows["path"].str.replace("\\", "/"), patient=rows["patient"].str.strip())
    if twice := sorted(set(rows.loc[rows["path"].duplicated(), "path"])):
        raise UserError(f"{name} names images twice: {name_some(twice)}; keep one row an image")
    return rows


def read_table(file: IO[bytes] | Path) -> pd.DataFrame:
    """The rows of a CSV, all columns as text; ValueError where a row has more fields than there are columns."""
    with warnings.catch_warnings():
        # Without this, and without index_col, pandas shifts the columns of such a file, or drops what is too much.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
        except pd.errors.ParserWarning:
            raise ValueError("rows have more fields than there are columns") from None


def rows_of(dataset: Path) -> pd.DataFrame:
    """The rows of the data set's own groups.csv; none if it has no such file."""
    file = dataset / GROUPS_FILE
    return read_rows(file.read_bytes(), str(file)) if file.is_file() else pd.DataFrame(columns=COLUMNS, dtype=str)


def moved(rows: pd.DataFrame, places: Mapping[str, str]) -> pd.DataFrame:
    """The rows of the images that have a new place, under it."""
    kept = rows[rows["path"].isin(list(places))]
    return kept.assign(path=[places[path] for path in kept["path"]])


def joined(there: pd.DataFrame, arriving: pd.DataFrame) -> pd.DataFrame:
    """The rows of both, with the columns of both; a column that one of them lacks is empty there."""
    return pd.concat([there, arriving], ignore_index=True).fillna("")


def with_prefix(rows: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """The rows with `prefix` before each patient number; names that were made of volumes are distinct already."""
    return rows.assign(patient=[prefix + name if _is_given(name) else name for name in rows["patient"]])


def join_rows(
    there: pd.DataFrame, arriving: pd.DataFrame, places: Mapping[str, str], equals: Mapping[str, str]
) -> Joined:
    """The rows there, and those that arrive under their new `places`, by source path, with the columns of both.

    `equals` are images there by the source path of what arrived with the same pixels, and was skipped: where nobody
    knew the patient of the one, the other tells; the first of several that tell.
    """
    added = moved(arriving, places)
    rows = joined(there, added)
    known: dict[str, str] = dict(zip(rows["path"], rows["patient"], strict=True))
    learnt: dict[str, str] = {}
    disputed: dict[str, tuple[str, str]] = {}
    for path, patient in zip(arriving["path"].astype(str), arriving["patient"].astype(str), strict=True):
        if path not in equals or not is_known(patient):
            continue
        twin = equals[path]
        if not is_known(known.get(twin, "")):
            learnt.setdefault(twin, patient)
        present = learnt.get(twin, known.get(twin, ""))
        if present != patient:
            disputed.setdefault(twin, (present, patient))
    unnamed = pd.DataFrame({"path": [path for path in learnt if path not in known], "patient": ""}, dtype=str)
    rows = joined(rows, unnamed)
    rows["patient"] = [learnt.get(path, patient) for path, patient in zip(rows["path"], rows["patient"], strict=True)]
    return Joined(
        rows=rows,
        is_changed=bool(len(added) or learnt),
        shared=sorted({name for name in added["patient"] if _is_given(name)} & set(there["patient"])),
        learnt=learnt,
        disputed=dict(sorted(disputed.items())),
    )


def write_rows(rows: pd.DataFrame, folder: Path) -> None:
    """The rows stand in the groups.csv of `folder`, sorted by path: a new file, whatever was linked to an old one."""
    text = rows.sort_values("path").to_csv(index=False, lineterminator="\n")
    write_text(folder / GROUPS_FILE, text)


def refuse_strangers(rows: pd.DataFrame, images: Collection[str], name: str) -> None:
    """Raise UserError if a row names something else than one of `images`."""
    if strangers := sorted(set(rows["path"]) - set(images)):
        raise UserError(f"{name} names images that are not there: {name_some(strangers)}; correct or remove these rows")


def is_known(patient: str) -> bool:
    """Whether this is a patient number, rather than nothing or a name for slices of one unknown patient."""
    return bool(patient) and not patient.startswith(UNKNOWN_PATIENT_PREFIX)


def _is_given(patient: str) -> bool:
    """Whether a person numbered this patient: other sources may use the same number for somebody else."""
    return is_known(patient) and not HASHED_PATIENT.fullmatch(patient)
