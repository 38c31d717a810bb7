"""The manifest: one row an image, with all that later steps have to know of it, and the version of the data set."""

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from braintumor.artifacts import GROUPS_FILE, MANIFEST
from braintumor.data.contents import Contents, file_md5s, list_contents, unopened, version_md5
from braintumor.data.duplicates import fingerprint, group_copies
from braintumor.data.fingerprint_store import (
    FINGERPRINT_PX,
    FingerprintFiles,
    Fingerprints,
    FingerprintStore,
    FingerprintWriter,
)
from braintumor.data.oddities import measure_oddities
from braintumor.data.patients import refuse_strangers, rows_of
from braintumor.errors import UserError, name_some
from braintumor.labels import PHANTOM
from braintumor.model.images import UnreadableImage, open_image, to_grey

MADE_BY = "braintumor validate"
DATA_MD5_KEY = b"data_md5"
# Starting a pool of processes takes longer than reading so few images.
WORTH_A_POOL = 1000
# More are kept on disk: so many are 180 MiB.
FINGERPRINTS_IN_MEMORY = 10_000
ROWS_IN_A_BATCH = 1000
BORDER_SHARE = 0.05

# Statistics are of the grey image, 0..255. Columns from `width` on are null where the image can't be decoded.
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # POSIX, relative to the data set
        pa.field("label", pa.string(), nullable=False),
        pa.field("declared_split", pa.string(), nullable=False),
        pa.field("patient", pa.string()),
        pa.field("is_phantom", pa.bool_(), nullable=False),
        pa.field("duplicate_group", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("md5", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("is_readable", pa.bool_(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("mode", pa.string()),
        pa.field("pixels_sha256", pa.string()),  # of the decoded grey pixels
        pa.field("mean", pa.float64()),
        pa.field("std", pa.float64()),
        pa.field("p01", pa.float64()),
        pa.field("p50", pa.float64()),
        pa.field("p99", pa.float64()),
        pa.field("border_mean", pa.float64()),  # of the outermost 5 % on each side
        pa.field("coloured_share", pa.float64()),  # of the pixels: channels more than 8 apart
        pa.field("coloured_line", pa.float64()),  # the same share of the most coloured row or column in the outer 10 %
        pa.field("white_line", pa.float64()),  # likewise, of pixels of 200 and above
        pa.field("sharpness", pa.float64()),  # root mean square of the Laplacian / std, as at 224 px; white noise: 4.47
        pa.field("mark_length", pa.float64()),  # of bright strokes that look drawn, / the longer side
    ]
)

# What an image says by itself, without groups.csv and the other images.
EXAMINED = pa.schema([field for field in SCHEMA if field.name not in {"patient", "is_phantom", "duplicate_group"}])

OnImage = Callable[[], None]


@dataclass(frozen=True)
class Survey:
    """A data set after every image was read: the manifest's frame and what stands beside the images."""

    images: pd.DataFrame
    contents: Contents
    data_md5: str


def survey(
    dataset: Path,
    workers: int,
    copy_correlation: float,
    on_image: OnImage = lambda: None,
    contents: Contents | None = None,
    scratch: Path | None = None,
) -> Survey:
    """Every image of `dataset` examined, and copies of one slice put into one duplicate group.

    `workers` processes read (0: one a core). An image that can't be decoded keeps its row, with `is_readable` false
    and the reason in `error`. Fingerprints of many images stay in `scratch` meanwhile (the system's temporary folder):
    18 KiB an image. Raises UserError for a missing folder, files that can't be opened and a wrong groups.csv.
    """
    contents = contents or list_contents(dataset)
    # Before the images are read, which may take hours.
    _read_groups(dataset, contents.images)
    with ExitStack() as stack:
        fingerprints: FingerprintStore
        if len(contents.images) <= FINGERPRINTS_IN_MEMORY:
            fingerprints = kept = np.zeros((len(contents.images), FINGERPRINT_PX, FINGERPRINT_PX), np.float16)
            rows = _examine_to_table(dataset, contents.images, workers, kept.__setitem__, on_image)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fingerprints-", dir=scratch))
            file = Path(folder, "fingerprints.npy")
            with FingerprintWriter(file) as writer:
                rows = _examine_to_table(dataset, contents.images, workers, lambda _, its: writer.append(its), on_image)
            fingerprints = stack.enter_context(FingerprintFiles([file]))
        groups = group_copies(
            rows["sha256"].to_pylist(), rows["pixels_sha256"].to_pylist(), fingerprints, copy_correlation
        )
    return compose(dataset, contents, rows, groups)


def compose(dataset: Path, contents: Contents, rows: pa.Table, groups: Sequence[str]) -> Survey:
    """The survey of `dataset` from what each image says by itself (EXAMINED), and the group of each."""
    paths = rows["path"].to_pylist()
    known_of = _read_groups(dataset, paths)
    known = [known_of.get(path, Known(None, is_phantom=False)) for path in paths]
    of_the_set = {
        "patient": [image.patient for image in known],
        "is_phantom": [image.is_phantom for image in known],
        "duplicate_group": list(groups),
    }
    for name, values in of_the_set.items():
        rows = rows.append_column(SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    md5s = dict(zip(paths, rows["md5"].to_pylist(), strict=True))
    others = [path for path in contents.versioned if path not in md5s]
    data_md5 = version_md5(md5s | file_md5s(dataset, others))
    return Survey(_as_frame(rows.select(SCHEMA.names)), contents, data_md5)


def write_manifest(images: pd.DataFrame, data_md5: str, path: Path) -> None:
    """`images` stand in `path`, sorted, with `data_md5` in the schema's metadata; the same rows give the same bytes."""
    ordered = images.sort_values("path", ignore_index=True)
    table = pa.Table.from_pandas(ordered, schema=SCHEMA, preserve_index=False)
    pq.write_table(table.replace_schema_metadata({DATA_MD5_KEY: data_md5.encode()}), path, compression="zstd")


def load_manifest(path: Path) -> tuple[pd.DataFrame, str]:
    """The manifest in `path` (the file, or the folder that holds it) and the `data_md5` that it was made from."""
    file = path / MANIFEST if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} is missing; run '{MADE_BY}' first (it leaves none after a critical finding)")
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is not valid parquet ({error}); run '{MADE_BY}' again") from error
    missing = [name for name in SCHEMA.names if name not in table.schema.names]
    data_md5 = (table.schema.metadata or {}).get(DATA_MD5_KEY, b"").decode()
    if missing or not data_md5:
        lacks = ", ".join([*missing, *([] if data_md5 else ["its data_md5"])])
        raise UserError(f"{file} lacks {lacks}; run '{MADE_BY}' again")
    return _as_frame(table.select(SCHEMA.names)), data_md5


@dataclass(frozen=True)
class Known:
    """What groups.csv says of an image."""

    patient: str | None
    is_phantom: bool


def _read_groups(dataset: Path, images: Sequence[str]) -> dict[str, Known]:
    """What groups.csv says of each image that it names; images it leaves out are real, and of unknown patients."""
    file = dataset / GROUPS_FILE
    try:
        rows = rows_of(dataset)
    except OSError as error:
        raise unopened(file, error) from error
    refuse_strangers(rows, images, str(file))
    origins = rows["origin"].str.strip() if "origin" in rows.columns else pd.Series("", index=rows.index)
    if strange := sorted(set(origins) - {"", PHANTOM}):
        raise UserError(f"{file} names the origin {name_some(strange)}; leave it empty, or write '{PHANTOM}'")
    return {
        path: Known(patient or None, is_phantom=origin == PHANTOM)
        for path, patient, origin in zip(rows["path"], rows["patient"], origins, strict=True)
    }


def examine_all(dataset: Path, paths: Sequence[str], workers: int) -> Iterator[tuple[dict[str, Any], Fingerprints]]:
    """What each image says by itself, a row of EXAMINED, and its fingerprint, in the order of `paths`."""
    processes = min(workers or os.cpu_count() or 1, 61)
    if processes == 1 or len(paths) < WORTH_A_POOL:
        yield from (_examine(dataset, path) for path in paths)
        return
    # 'spawn': a forked copy of a process with running threads (a progress bar, TensorFlow) may lock up.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            yield from pool.map(_examine, [dataset] * len(paths), paths, chunksize=32)
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that read {dataset} was killed, most likely for lack of memory; set validate.workers lower"
        ) from error


def _examine(dataset: Path, path: str) -> tuple[dict[str, Any], Fingerprints]:
    """One row of the manifest, all but patient and group, and the image's fingerprint."""
    file = dataset / path
    declared_split, label, _ = PurePosixPath(path).parts
    try:
        size_bytes, md5, sha256 = _digests(file)
    except OSError as error:
        raise unopened(file, error) from error
    record: dict[str, Any] = {
        "path": path,
        "label": label,
        "declared_split": declared_split,
        "size_bytes": size_bytes,
        "md5": md5,
        "sha256": sha256,
        "is_readable": True,
    }
    no_texture = np.zeros((FINGERPRINT_PX, FINGERPRINT_PX), np.float16)
    try:
        image = open_image(file)
        grey = to_grey(image, file)
    except UnreadableImage as error:
        # The same data set gives the same manifest, wherever it lies.
        return record | {"is_readable": False, "error": str(error).replace(str(file), path)}, no_texture
    size = {"width": image.width, "height": image.height, "mode": image.mode}
    statistics = _statistics(grey)
    return record | size | statistics | measure_oddities(image, grey, statistics["std"]), fingerprint(grey)


def _digests(file: Path) -> tuple[int, str, str]:
    """Size, md5 and SHA-256, read block by block: what is named like an image may be larger than the memory."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            md5.update(block)
            sha256.update(block)
        return content.tell(), md5.hexdigest(), sha256.hexdigest()


def _statistics(grey: NDArray[np.uint8]) -> dict[str, Any]:
    counts = np.bincount(grey.ravel(), minlength=256)
    levels = np.arange(256)
    mean = float(counts @ levels / grey.size)
    low, median, high = np.searchsorted(np.cumsum(counts), np.array([0.01, 0.5, 0.99]) * grey.size)
    return {
        "pixels_sha256": hashlib.sha256(str(grey.shape).encode() + grey.tobytes()).hexdigest(),
        "mean": mean,
        "std": float(np.sqrt(counts @ (levels - mean) ** 2 / grey.size)),
        "p01": float(low),
        "p50": float(median),
        "p99": float(high),
        "border_mean": _border_mean(grey),
    }


def _border_mean(grey: NDArray[np.uint8]) -> float:
    height, width = (max(1, round(side * BORDER_SHARE)) for side in grey.shape)
    is_border = np.ones(grey.shape, bool)
    is_border[height:-height, width:-width] = False
    return float(grey[is_border].mean())


def _examine_to_table(
    dataset: Path, paths: Sequence[str], workers: int, keep: Callable[[int, Fingerprints], None], on_image: OnImage
) -> pa.Table:
    """What each image says by itself; `keep` is given the fingerprints, each with its number."""
    records: list[dict[str, Any]] = []
    batches = []
    for number, (record, its_fingerprint) in enumerate(examine_all(dataset, paths, workers)):
        records.append(record)
        keep(number, its_fingerprint)
        on_image()
        # A dictionary takes 2 KiB, a row of a batch 0.3.
        if len(records) == ROWS_IN_A_BATCH:
            batches.append(pa.RecordBatch.from_pylist(records, schema=EXAMINED))
            records = []
    batches.append(pa.RecordBatch.from_pylist(records, schema=EXAMINED))
    return pa.Table.from_batches(batches, EXAMINED)


def _as_frame(table: pa.Table) -> pd.DataFrame:
    integers = {pa.int64(): pd.Int64Dtype()}
    frame = table.to_pandas(types_mapper=integers.get)
    assert isinstance(frame, pd.DataFrame)
    return frame
