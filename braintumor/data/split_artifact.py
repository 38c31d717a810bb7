"""A split that was made: read back and checked against its digests and the data set."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from braintumor import artifacts
from braintumor.data.split_check import check_split
from braintumor.data.splits import LEAKY_PROTOCOLS
from braintumor.errors import UserError

MADE_BY = "braintumor split"
# Facts of the split that every evaluation on it repeats.
SPLIT_FACTS = (
    "protocol",
    "claim",
    "test_md5",
    "nearest_neighbour_accuracy",
    "statistics_accuracy",
    "leaked_share",
    "declared_leaked_share",
)


@dataclass(frozen=True)
class MadeSplit:
    """`rows`: path, label, group, split (str), one row an image; `summary`: split.json.

    `floors`: path, neighbour_label, statistics_label (str), one row a test image: what a classifier says of it that
    looks training images up, and one that knows nothing but nine statistics.
    """

    rows: pd.DataFrame
    summary: dict[str, Any]
    floors: pd.DataFrame

    @property
    def data_md5(self) -> str:
        """The version of the data set that was split."""
        return str(self.summary["data_md5"])

    @property
    def sha256(self) -> str:
        """Digest of splits.csv."""
        return str(self.summary["splits_sha256"])

    def part(self, name: str) -> pd.DataFrame:
        """The rows of one of SPLIT_NAMES, which is never empty."""
        rows = self.rows[self.rows["split"] == name]
        if rows.empty:
            raise UserError(f"the split has no {name} images; change the section split of the parameters")
        return rows

    def test_images(self) -> pd.DataFrame:
        """The test rows with the floors, and `is_leaked`: a copy of the image, or its patient, was used in training."""
        used = set(self.rows.loc[self.rows["split"] != "test", "group"])
        rows = self.part("test").merge(self.floors, on="path", validate="one_to_one")
        return rows.assign(is_leaked=rows["group"].isin(used))


def load_split(folder: Path) -> MadeSplit:
    """The split in `folder`; refused if splits.csv and floors.csv are not the files that split.json describes."""
    summary = artifacts.read_json(folder / artifacts.SPLIT_SUMMARY, made_by=MADE_BY)
    path = folder / artifacts.SPLITS
    for file in (path, folder / artifacts.FLOORS):
        if not file.is_file():
            raise UserError(f"{file} is missing; run '{MADE_BY}' first")
    for key in ("data_md5", "splits_sha256", "floors_sha256", "statistics_importances", *SPLIT_FACTS):
        if key not in summary:
            raise UserError(f"{folder / artifacts.SPLIT_SUMMARY} has no {key}; run '{MADE_BY}' again")
    rows = _unchanged(path, summary["splits_sha256"])
    floors = _unchanged(folder / artifacts.FLOORS, summary["floors_sha256"])
    # Asked again of the file, whoever wrote it.
    if summary["protocol"] not in LEAKY_PROTOCOLS and (problems := check_split(rows)):
        raise UserError(f"{path} is no split: {'; '.join(problems)}; run '{MADE_BY}' again")
    return MadeSplit(rows, summary, floors)


def _unchanged(path: Path, sha256: str) -> pd.DataFrame:
    if artifacts.sha256_of_file(path) != sha256:
        raise UserError(f"{path} was changed after it was made; run '{MADE_BY}' again")
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_md5(rows: pd.DataFrame, md5_of: Mapping[str, str]) -> str:
    """The md5 that names a test set: the contents and labels of its images, whatever their names.

    `rows` are those of splits.csv, `md5_of` gives the md5 of each file by its path.
    """
    test = rows[rows["split"] == "test"]
    entries = sorted(f"{md5_of[path]} {label}" for path, label in zip(test["path"], test["label"], strict=True))
    return hashlib.md5("\n".join(entries).encode(), usedforsecurity=False).hexdigest()


def refuse_other_data(dataset: Path, data_md5: str, named_in: Path) -> None:
    """Raise UserError unless the files in `dataset` are the version `data_md5`."""
    from braintumor.data.contents import dataset_md5

    found = dataset_md5(dataset)
    if found != data_md5:
        raise UserError(
            f"{dataset} holds data version {found}, but {named_in} was made from {data_md5}; "
            "run 'braintumor validate' and what follows it again, or 'dvc repro'"
        )
