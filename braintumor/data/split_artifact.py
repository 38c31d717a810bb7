"""A split that was made: read back and checked against its digests and the data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from braintumor import artifacts
from braintumor.errors import UserError

MADE_BY = "braintumor split"
# Facts of the split that every evaluation on it repeats.
SPLIT_FACTS = ("protocol", "claim", "nearest_neighbour_accuracy", "leaked_share", "declared_leaked_share")


@dataclass(frozen=True)
class MadeSplit:
    """`rows`: path, label, group, split (str), one row an image; `summary`: split.json."""

    rows: pd.DataFrame
    summary: dict[str, Any]

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


def load_split(folder: Path) -> MadeSplit:
    """The split in `folder`; refused if splits.csv is not the file that split.json describes."""
    summary = artifacts.read_json(folder / artifacts.SPLIT_SUMMARY, made_by=MADE_BY)
    path = folder / artifacts.SPLITS
    if not path.is_file():
        raise UserError(f"{path} is missing; run '{MADE_BY}' first")
    for key in ("data_md5", "splits_sha256", *SPLIT_FACTS):
        if key not in summary:
            raise UserError(f"{folder / artifacts.SPLIT_SUMMARY} has no {key}; run '{MADE_BY}' again")
    if artifacts.sha256_of_file(path) != summary["splits_sha256"]:
        raise UserError(f"{path} was changed after it was made; run '{MADE_BY}' again")
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    return MadeSplit(rows, summary)


def refuse_other_data(dataset: Path, data_md5: str, named_in: Path) -> None:
    """Raise UserError unless the files in `dataset` are the version `data_md5`."""
    from braintumor.data.manifest import dataset_md5

    found = dataset_md5(dataset)
    if found != data_md5:
        raise UserError(
            f"{dataset} holds data version {found}, but {named_in} was made from {data_md5}; "
            "run 'braintumor validate' and what follows it again, or 'dvc repro'"
        )
