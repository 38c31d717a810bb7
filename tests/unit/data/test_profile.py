from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from braintumor.data.manifest import SCHEMA
from braintumor.data.profile import (
    PROFILE_SCHEMA,
    STATISTICS,
    Accepted,
    load_accepted,
    load_profile,
    make_profile,
    write_accepted,
    write_profile,
)
from braintumor.errors import UserError
from braintumor.params import PrivacyParams

OPEN = PrivacyParams(copy_images="all", hash_names=False)
HASHED = PrivacyParams(copy_images="none", hash_names=True)


@pytest.fixture
def images() -> pd.DataFrame:
    """Three rows of a manifest, of which two are the same file."""
    rows = [
        {
            "path": f"train/glioma/Jane Doe {number}.png",
            "label": "glioma",
            "declared_split": "train",
            "patient": "Jane Doe",
            "is_phantom": False,
            "duplicate_group": "g1",
            "size_bytes": 1,
            "md5": "m",
            "sha256": digit * 64,
            "is_readable": True,
            "pixels_sha256": "p",
            **dict.fromkeys(STATISTICS, 50),
        }
        for number, digit in enumerate("baa")
    ]
    frame = pd.DataFrame(rows, columns=SCHEMA.names)
    return frame.astype({"width": "Int64", "height": "Int64"})


def test_a_profile_comes_back_with_its_data_version(images: pd.DataFrame, tmp_path: Path) -> None:
    write_profile(make_profile(images, OPEN), "0" * 32, tmp_path / "p.parquet")
    profile, data_md5 = load_profile(tmp_path / "p.parquet")
    assert data_md5 == "0" * 32
    assert profile.columns.tolist() == PROFILE_SCHEMA.names
    assert profile["path"].tolist() == sorted(images["path"])
    assert profile["width"].tolist() == [50.0] * 3


def test_a_profile_tells_no_patient_and_no_name_where_names_are_hashed(images: pd.DataFrame, tmp_path: Path) -> None:
    write_profile(make_profile(images, HASHED), "0" * 32, tmp_path / "p.parquet")
    profile, _ = load_profile(tmp_path / "p.parquet")
    assert profile["path"].tolist() == [f"train/glioma/{digit * 12}.png" for digit in "aab"]
    # Uncompressed, so that a name could be seen.
    pq.write_table(pq.read_table(tmp_path / "p.parquet"), tmp_path / "plain.parquet", compression="none")
    assert b"Doe" not in (tmp_path / "plain.parquet").read_bytes()
    assert "patient" not in profile.columns


@pytest.mark.parametrize("privacy", [OPEN, HASHED])
def test_the_order_of_the_rows_does_not_show_in_the_bytes(
    images: pd.DataFrame, tmp_path: Path, privacy: PrivacyParams
) -> None:
    for name, frame in (("one", images), ("two", images.iloc[::-1])):
        write_profile(make_profile(frame, privacy), "0" * 32, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_accepted_version_comes_back_with_the_data_that_it_was_looked_up_for(
    images: pd.DataFrame, tmp_path: Path
) -> None:
    profile = make_profile(images, OPEN)
    write_accepted(Accepted("7", "a" * 32, profile), "b" * 32, tmp_path / "accepted.parquet")
    accepted, present = load_accepted(tmp_path)
    assert accepted is not None and (accepted.version, accepted.data_md5, present) == ("7", "a" * 32, "b" * 32)
    assert accepted.images is not None and len(accepted.images) == 3


def test_no_accepted_version_and_one_without_a_profile_are_told_apart(tmp_path: Path) -> None:
    write_accepted(None, "b" * 32, tmp_path / "accepted.parquet")
    assert load_accepted(tmp_path) == (None, "b" * 32)
    assert pq.read_table(tmp_path / "accepted.parquet").schema.names == PROFILE_SCHEMA.names
    write_accepted(Accepted("7", "a" * 32, None), "b" * 32, tmp_path / "accepted.parquet")
    assert load_accepted(tmp_path) == (Accepted("7", "a" * 32, None), "b" * 32)


def spoil(file: Path, how: str) -> None:
    table = pq.read_table(file)
    match how:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "no metadata":
            pq.write_table(table.replace_schema_metadata(None), file)
        case "a column less":
            pq.write_table(table.drop_columns(["sha256"]), file)
        case "another type":
            pq.write_table(table.set_column(0, "path", pa.array([1] * len(table))), file)


@pytest.mark.parametrize("how", ["missing", "truncated", "no metadata", "a column less", "another type"])
def test_a_damaged_profile_is_refused_with_the_step_to_run_again(
    images: pd.DataFrame, tmp_path: Path, how: str
) -> None:
    profile = make_profile(images, OPEN)
    write_profile(profile, "0" * 32, tmp_path / "profile.parquet")
    write_accepted(Accepted("7", "a" * 32, profile), "b" * 32, tmp_path / "accepted.parquet")
    for name in ("profile.parquet", "accepted.parquet"):
        spoil(tmp_path / name, how)
    with pytest.raises(UserError, match=r"profile\.parquet .*run 'braintumor validate'"):
        load_profile(tmp_path / "profile.parquet")
    with pytest.raises(UserError, match=r"accepted\.parquet .*run 'braintumor resolve'"):
        load_accepted(tmp_path)


def test_an_accepted_version_without_its_data_version_is_refused(images: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "accepted.parquet"
    write_accepted(Accepted("7", "a" * 32, make_profile(images, OPEN)), "b" * 32, file)
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"present_data_md5": "b" * 32, "version": "7"}), file)
    with pytest.raises(UserError, match="braintumor resolve"):
        load_accepted(tmp_path)
