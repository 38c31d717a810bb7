"""The profile: what of a manifest may leave the data set, so that later versions can be compared with it.

It holds no patient, and names as `privacy` shows them. MLflow keeps the profile of every model's data; `resolve`
brings that of the last accepted data version back as accepted.parquet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from braintumor.artifacts import ACCEPTED
from braintumor.data.privacy import shown_names
from braintumor.errors import UserError
from braintumor.params import PrivacyParams

DATA_MD5_KEY = b"data_md5"
VERSION_KEY = b"version"
PRESENT_KEY = b"present_data_md5"

# Columns as the manifest has them, except that `path` is the shown name.
STATISTICS = ("mean", "std", "p01", "p50", "p99", "border_mean", "width", "height")
PROFILE_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("declared_split", pa.string(), nullable=False),
        pa.field("duplicate_group", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("pixels_sha256", pa.string()),
        *(pa.field(name, pa.float64()) for name in STATISTICS),
    ]
)


@dataclass(frozen=True)
class Accepted:
    """The last accepted data version other than the present one, and the newest registered model trained on it."""

    version: str
    data_md5: str
    images: pd.DataFrame | None  # its profile; None where MLflow keeps none of it


def make_profile(images: pd.DataFrame, privacy: PrivacyParams) -> pd.DataFrame:
    """The profile of a manifest's images."""
    profile = images[PROFILE_SCHEMA.names].assign(path=shown_names(images, privacy))
    return profile.astype(dict.fromkeys(STATISTICS, float))


def write_profile(profile: pd.DataFrame, data_md5: str, path: Path) -> None:
    """`profile` stands in `path`, sorted, with `data_md5`; the same rows give the same bytes."""
    _write(profile, {DATA_MD5_KEY: data_md5}, path)


def load_profile(path: Path, made_by: str = "braintumor validate") -> tuple[pd.DataFrame, str]:
    """The profile in `path` and the `data_md5` of the data that it describes."""
    table = _read(path, made_by)
    data_md5 = _text(table, DATA_MD5_KEY)
    if data_md5 is None:
        raise UserError(f"{path} lacks its data_md5; run '{made_by}' again")
    return table.to_pandas(), data_md5


def write_accepted(accepted: Accepted | None, present_data_md5: str, path: Path) -> None:
    """What is known of the last accepted data version stands in `path`, an empty table if that is nothing.

    `present_data_md5` names the data that it was looked up for.
    """
    facts = {PRESENT_KEY: present_data_md5}
    if accepted is not None:
        facts |= {VERSION_KEY: accepted.version, DATA_MD5_KEY: accepted.data_md5}
    nothing = pd.DataFrame(columns=PROFILE_SCHEMA.names)
    _write(nothing if accepted is None or accepted.images is None else accepted.images, facts, path)


def load_accepted(context: Path) -> tuple[Accepted | None, str]:
    """The last accepted data version that `resolve` left in `context`, and the data that it was looked up for."""
    path, made_by = context / ACCEPTED, "braintumor resolve"
    table = _read(path, made_by)
    present, version, data_md5 = (_text(table, key) for key in (PRESENT_KEY, VERSION_KEY, DATA_MD5_KEY))
    if present is None or (version is None) != (data_md5 is None):
        raise UserError(f"{path} does not say what data it belongs to; run '{made_by}' again")
    if version is None or data_md5 is None:
        return None, present
    return Accepted(version, data_md5, table.to_pandas() if len(table) else None), present


def _write(profile: pd.DataFrame, facts: Mapping[bytes, str], path: Path) -> None:
    # Images with one shown name are one content in one folder: their rows are equal.
    ordered = profile.sort_values("path", ignore_index=True)
    table = pa.Table.from_pandas(ordered, schema=PROFILE_SCHEMA, preserve_index=False)
    metadata = {key: value.encode() for key, value in facts.items()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def _read(path: Path, made_by: str) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path} is missing; run '{made_by}' first")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not valid parquet ({error}); run '{made_by}' again") from error
    if not table.schema.equals(PROFILE_SCHEMA):
        raise UserError(f"{path} has other columns than a profile; run '{made_by}' again")
    return table


def _text(table: pa.Table, key: bytes) -> str | None:
    return (table.schema.metadata or {}).get(key, b"").decode() or None
