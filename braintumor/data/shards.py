"""The validation in parts: what tasks that each do a share of it leave for each other.

    scan      rows.parquet, fingerprints.npy         of a share of the images
    survey    rows.parquet                           of all images, from all scans
    search    fingerprints.npy, copy_index.npz       of all images: what a share of the search for copies needs
    match     links.parquet                          the copies of a share of the images, among all

Each is a folder with a seal.json beside these files: what it is, of which data, and the digests of its files. Nothing
is taken from a folder whose seal does not fit, so that a share which is missing, doubled, of other data or changed
afterwards ends the validation instead of changing its answer.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from braintumor.artifacts import read_json, sha256_of_file, write_json
from braintumor.data.contents import Contents, file_md5s, is_hidden, list_contents, stands_in_a_class, version_md5
from braintumor.data.duplicates import (
    SEARCH_BLOCK,
    Links,
    OnBlock,
    build_index,
    find_links,
    load_index,
    name_groups,
    parts,
    save_index,
)
from braintumor.data.dvc_remote import is_md5, list_version, open_remote
from braintumor.data.fingerprint_store import FingerprintFiles, FingerprintWriter
from braintumor.data.manifest import EXAMINED, OnImage, Survey, compose, examine_all
from braintumor.errors import UserError, name_some
from braintumor.labels import IMAGE_SUFFIXES

ROWS, FINGERPRINTS, COPY_INDEX = "rows.parquet", "fingerprints.npy", "copy_index.npz"
LINKS, SEAL = "links.parquet", "seal.json"
SHARD_FILES = frozenset({ROWS, FINGERPRINTS, COPY_INDEX, LINKS, SEAL})
AGAIN = "run the validation's tasks again, without their cached results"
# Rows held at once while a scan is written, and fingerprints while they are gathered: a few MiB each.
BATCH = 512
LINKS_SCHEMA = pa.schema([pa.field(side, pa.int64(), nullable=False) for side in ("first", "second")])

# By what a folder is: the task that makes it, and what it holds beside its seal.
TASKS = {"scan": "scan", "survey": "gather", "search": "gather", "match": "match"}
FILES = {
    "scan": {ROWS, FINGERPRINTS},
    "survey": {ROWS},
    "search": {FINGERPRINTS, COPY_INDEX},
    "match": {LINKS},
}
OF_THE_DATA = ("data_md5", "n_images", "images_sha256")
FACTS = {
    "scan": {*OF_THE_DATA, "share", "shares"},
    "survey": {*OF_THE_DATA, "search"},
    "search": {*OF_THE_DATA},
    "match": {*OF_THE_DATA, "search", "copy_correlation", "share", "shares"},
}
OF_A_SHARE = frozenset({"share", "files"})

Digests = Sequence[str] | None


@dataclass(frozen=True)
class Share:
    """One of `count` shares, numbered from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise UserError(f"there is no share {self.number} of {self.count}; number them from 0")

    def __str__(self) -> str:
        return f"share {self.number} of {self.count}"

    def of(self, length: int) -> range:
        """Its places among `length`; together the shares have each of them once, in order."""
        return range(length * self.number // self.count, length * (self.number + 1) // self.count)


@dataclass(frozen=True)
class Shards:
    """What `validate` takes of the tasks before it; the digests are those that these tasks told.

    None for a digest that nobody told: then a folder is held against its own seal alone.
    """

    survey: Path
    matches: Sequence[Path]
    survey_digest: str | None = None
    match_digests: Digests = None


def list_images(dataset: Path) -> tuple[str, list[str]]:
    """The md5 of a folder or of the data version of this md5, and its images, sorted; nothing is fetched."""
    if not dataset.is_dir() and is_md5(str(dataset)):
        listing = (PurePosixPath(path) for path in list_version(str(dataset), open_remote()))
        images = [path for path in listing if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)]
        return str(dataset), sorted(filter(stands_in_a_class, map(str, images)))
    contents = list_contents(dataset)
    return version_md5(file_md5s(dataset, contents.versioned)), contents.images


def write_scan(
    dataset: Path, images: Sequence[str], data_md5: str, share: Share, workers: int, folder: Path, on_image: OnImage
) -> None:
    """`folder` holds the rows and the fingerprints of a share of `images`, which are all those of the data version."""
    paths = [images[place] for place in share.of(len(images))]
    records: list[dict[str, Any]] = []
    with (
        FingerprintWriter(folder / FINGERPRINTS) as fingerprints,
        pq.ParquetWriter(folder / ROWS, EXAMINED, compression="zstd") as rows,
    ):
        for record, fingerprint in examine_all(dataset, paths, workers):
            records.append(record)
            fingerprints.append(fingerprint)
            on_image()
            if len(records) == BATCH:
                rows.write_table(pa.Table.from_pylist(records, schema=EXAMINED))
                records.clear()
        rows.write_table(pa.Table.from_pylist(records, schema=EXAMINED))
    _seal(folder, "scan", _facts(data_md5, images) | {"share": share.number, "shares": share.count})


def gather_scans(scans: Sequence[Path], digests: Digests, survey: Path, search: Path) -> None:
    """`survey` holds the rows of all scans, and `search` their fingerprints and the index of the search for copies.

    Raises UserError unless the scans are the shares of one data version, each there once, and as they were made.
    """
    facts, ordered = _read_shares("scan", scans, digests)
    whole = {name: facts[name] for name in OF_THE_DATA}
    table = pa.concat_tables([_read_table(folder / ROWS, EXAMINED) for folder in ordered])
    _refuse_other_images(table["path"].to_pylist(), whole, "the scans")
    with (
        FingerprintFiles([folder / FINGERPRINTS for folder in ordered]) as scanned,
        FingerprintWriter(search / FINGERPRINTS) as written,
    ):
        if len(scanned) != len(table):
            raise UserError(f"the scans hold {len(table)} rows, but {len(scanned)} fingerprints; {AGAIN}")
        for start in range(0, len(scanned), BATCH):
            written.append(scanned[np.arange(start, min(start + BATCH, len(scanned)))])
    with FingerprintFiles([search / FINGERPRINTS]) as fingerprints:
        save_index(build_index(fingerprints), search / COPY_INDEX)
    _seal(search, "search", whole)
    pq.write_table(table, survey / ROWS, compression="zstd")
    _seal(survey, "survey", whole | {"search": seal_digest(search)})


def write_match(
    search: Path,
    share: Share,
    copy_correlation: float,
    folder: Path,
    start: Callable[[int], OnBlock],
) -> None:
    """`folder` holds the links between the images of a share and all images. `start` is told the number of blocks."""
    facts = _unseal(search, "search", None)
    index = load_index(search / COPY_INDEX)
    with FingerprintFiles([search / FINGERPRINTS]) as fingerprints:
        if not len(fingerprints) == index.count == facts["n_images"]:
            raise UserError(f"{search} holds fingerprints and an index of different images; {AGAIN}")
        part = parts(len(fingerprints), share.count)[share.number]
        links = find_links(fingerprints, index, part, copy_correlation, start(-(-len(part) // SEARCH_BLOCK)))
    table = pa.table([pa.array(links.first), pa.array(links.second)], schema=LINKS_SCHEMA)
    pq.write_table(table, folder / LINKS, compression="zstd")
    whole = {name: facts[name] for name in OF_THE_DATA}
    found_in = {"search": seal_digest(search), "copy_correlation": copy_correlation}
    _seal(folder, "match", whole | found_in | {"share": share.number, "shares": share.count})


def assemble(dataset: Path, contents: Contents, shards: Shards, data_md5: str, copy_correlation: float) -> Survey:
    """The survey of the data version `data_md5`, from what the tasks left: the same as without them.

    Raises UserError unless it is all there, of this version, of this correlation, and as it was made.
    """
    digest = shards.survey_digest
    facts = _unseal(shards.survey, "survey", None if digest is None else [digest])
    table = _read_table(shards.survey / ROWS, EXAMINED)
    _refuse_other_images(table["path"].to_pylist(), facts, str(shards.survey))
    if facts["data_md5"] != data_md5:
        raise UserError(f"{shards.survey} is of data {facts['data_md5']}, not of {data_md5}; {AGAIN}")
    if table["path"].to_pylist() != contents.images:
        raise UserError(f"{shards.survey} is of other images than {dataset}; {AGAIN}")
    wanted = {name: facts[name] for name in (*OF_THE_DATA, "search")}
    wanted |= {"copy_correlation": copy_correlation}
    found, ordered = _read_shares("match", shards.matches, shards.match_digests)
    if wrong := [name for name, value in wanted.items() if found.get(name) != value]:
        raise UserError(f"the matches are of another {' and '.join(wrong)} than {shards.survey}; {AGAIN}")
    links = [_read_links(folder / LINKS, len(table)) for folder in ordered]
    groups = name_groups(table["sha256"].to_pylist(), table["pixels_sha256"].to_pylist(), links)
    surveyed = compose(dataset, contents, table, groups)
    if surveyed.data_md5 != data_md5:
        raise UserError(f"{shards.survey} and {dataset} together are data {surveyed.data_md5}, not {data_md5}; {AGAIN}")
    return surveyed


def seal_digest(folder: Path) -> str:
    """Hex SHA-256 of a folder's seal, and so of all that it holds."""
    return sha256_of_file(folder / SEAL)


def _facts(data_md5: str, images: Sequence[str]) -> dict[str, Any]:
    return {"data_md5": data_md5, "n_images": len(images), "images_sha256": _digest_of_names(images)}


def _digest_of_names(images: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(images)).encode()).hexdigest()


def _seal(folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
    files = {path.name: sha256_of_file(path) for path in folder.iterdir()}
    write_json(folder / SEAL, {"kind": kind, "files": files, **facts})


def _unseal(folder: Path, kind: str, digests: Digests) -> dict[str, Any]:
    """What the seal says; the folder holds what was sealed, no more and no less."""
    facts = read_json(folder / SEAL, f"the task '{TASKS[kind]}'")
    if facts.get("kind") != kind:
        raise UserError(f"{folder} is no {kind} but a {facts.get('kind')}; give the folders in their places")
    if missing := [name for name in sorted(FACTS[kind]) if name not in facts]:
        raise UserError(f"{folder / SEAL} lacks {name_some(missing)}; {AGAIN}")
    if digests is not None and seal_digest(folder) not in digests:
        raise UserError(f"{folder} is not what the task '{TASKS[kind]}' made; {AGAIN}")
    sealed = facts.get("files")
    present = {path.name for path in folder.iterdir()} - {SEAL}
    if odd := sorted(present ^ FILES[kind]):
        raise UserError(f"{folder} lacks {name_some(odd)}, or holds it though it should not; {AGAIN}")
    if not isinstance(sealed, dict) or sealed.keys() != FILES[kind]:
        raise UserError(f"{folder / SEAL} lacks the digests of its files; {AGAIN}")
    if changed := [name for name in sorted(sealed) if sha256_of_file(folder / name) != sealed[name]]:
        raise UserError(f"{folder} was changed after it was made ({name_some(changed)}); {AGAIN}")
    return facts


def _read_shares(kind: str, folders: Sequence[Path], digests: Digests) -> tuple[dict[str, Any], list[Path]]:
    """What all shares say of the whole, and their folders in order."""
    task = TASKS[kind]
    if not folders:
        raise UserError(f"there is nothing of the task '{task}'; {AGAIN}")
    if digests is not None and len(digests) != len(folders):
        raise UserError(f"of {len(digests)} tasks '{task}' there are {len(folders)} folders; {AGAIN}")
    facts = [_unseal(folder, kind, digests) for folder in folders]
    whole = [{name: value for name, value in some.items() if name not in OF_A_SHARE} for some in facts]
    for folder, other in zip(folders, whole, strict=True):
        if differing := [
            name for name in sorted(whole[0].keys() | other.keys()) if other.get(name) != whole[0].get(name)
        ]:
            raise UserError(f"{folder} differs from {folders[0]} in {name_some(differing)}; {AGAIN}")
    numbers = Counter(some.get("share") for some in facts)
    expected = range(whole[0]["shares"])
    if missing := [str(number) for number in expected if number not in numbers]:
        raise UserError(f"of {len(expected)} shares of '{task}' the validation lacks {name_some(missing)}; {AGAIN}")
    if len(folders) != len(expected):
        doubled = [str(number) for number, times in numbers.items() if times > 1 or number not in expected]
        raise UserError(f"of {len(expected)} shares of '{task}' {name_some(doubled)} came more than once; {AGAIN}")
    return whole[0], [folder for _, folder in sorted(zip((some["share"] for some in facts), folders, strict=True))]


def _read_table(file: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is not valid parquet ({error}); {AGAIN}") from error
    if not table.schema.equals(schema):
        raise UserError(f"{file} holds other columns than this version writes; {AGAIN}")
    return table


def _read_links(file: Path, n_images: int) -> Links:
    table = _read_table(file, LINKS_SCHEMA)
    first, second = (table[side].to_numpy().astype(np.intp) for side in LINKS_SCHEMA.names)
    if len(first) and not 0 <= min(first.min(), second.min()) <= max(first.max(), second.max()) < n_images:
        raise UserError(f"{file} links images that are not there; {AGAIN}")
    return Links(first, second)


def _refuse_other_images(paths: Sequence[str], facts: Mapping[str, Any], place: str) -> None:
    if len(paths) != facts["n_images"] or _digest_of_names(paths) != facts["images_sha256"]:
        raise UserError(
            f"{place} hold {len(paths)} images, not the {facts['n_images']} of {facts['data_md5']}; {AGAIN}"
        )
