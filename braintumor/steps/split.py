"""The step `split`: every image on one side, no copy and no patient on two."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from braintumor.artifacts import (
    DROPPED,
    MANIFEST,
    SPLIT_SUMMARY,
    SPLITS,
    replacing_directory,
    sha256_of_file,
    write_json,
)
from braintumor.data.duplicates import measure_leakage
from braintumor.data.manifest import file_md5s, list_contents, load_manifest, version_md5
from braintumor.data.splits import Splits, make_splits, sizes_by_class
from braintumor.errors import UserError, name_some
from braintumor.evidence.neighbours import NEIGHBOUR_SIZE_PX, nearest_neighbour_accuracy
from braintumor.labels import SPLIT_NAMES
from braintumor.model.images import load_images
from braintumor.params import SplitParams
from braintumor.progress import Progress, silent


@dataclass(frozen=True)
class SplitSummary:
    """How the data set was divided, and how far looking images up gets on it."""

    output: Path
    protocol: str
    claim: str
    sizes: dict[str, int]
    n_dropped: int
    leaked_share: float
    nearest_neighbour_accuracy: float
    warnings: list[str]


def split(
    dataset: Path, validation: Path, output: Path, params: SplitParams, progress: Progress = silent
) -> SplitSummary:
    """Leave splits.csv, dropped.csv and split.json in `output`; refuse a data set that is not the validated one."""
    manifest, data_md5 = load_manifest(validation / MANIFEST)
    _refuse_changed_files(dataset, validation, manifest, data_md5)
    splits = make_splits(manifest, params)
    floor = _nearest_neighbour_floor(dataset, splits.rows, progress)
    sizes = {name: int((splits.rows["split"] == name).sum()) for name in SPLIT_NAMES}
    with replacing_directory(output) as folder:
        splits.rows.to_csv(folder / SPLITS, index=False, lineterminator="\n")
        splits.dropped.to_csv(folder / DROPPED, index=False, lineterminator="\n")
        record = {
            "data_md5": data_md5,
            "splits_sha256": sha256_of_file(folder / SPLITS),
            "protocol": params.protocol,
            "claim": splits.claim,
            "sizes": sizes,
            "sizes_by_class": sizes_by_class(splits.rows),
            "n_dropped": len(splits.dropped),
            "leaked_test_images": splits.leaked_test_images,
            "leaked_share": splits.leaked_share,
            "declared_leaked_share": measure_leakage(manifest)["leaked_share"],
            "nearest_neighbour_accuracy": floor,
            "max_share_deviation_seen": splits.max_share_deviation,
            "warnings": splits.warnings,
        }
        write_json(folder / SPLIT_SUMMARY, record)
    return _summary(output, params, splits, sizes, floor)


def _refuse_changed_files(dataset: Path, validation: Path, manifest: pd.DataFrame, data_md5: str) -> None:
    md5s = file_md5s(dataset, list_contents(dataset).versioned)
    if version_md5(md5s) == data_md5:
        return
    validated: Mapping[str, str] = dict(zip(manifest["path"], manifest["md5"], strict=True))
    images = {path: md5 for path, md5 in md5s.items() if path in validated or path.startswith(("train/", "test/"))}
    changed = sorted(path for path in {*validated, *images} if validated.get(path) != images.get(path))
    differs = name_some(changed) if changed else "a file beside the images"
    raise UserError(
        f"{dataset} is not what {validation / MANIFEST} was made from ({differs} differs); "
        "run 'braintumor validate' again"
    )


def _nearest_neighbour_floor(dataset: Path, rows: pd.DataFrame, progress: Progress) -> float:
    advance = progress("split: nearest neighbours", len(rows))
    images = load_images(dataset, rows["path"].tolist(), NEIGHBOUR_SIZE_PX, advance)
    is_test = (rows["split"] == "test").to_numpy()
    labels = rows["label"].to_numpy(dtype=str)
    return nearest_neighbour_accuracy(
        images[~is_test], labels[~is_test].tolist(), images[is_test], labels[is_test].tolist()
    )


def _summary(output: Path, params: SplitParams, splits: Splits, sizes: dict[str, int], floor: float) -> SplitSummary:
    return SplitSummary(
        output=output,
        protocol=params.protocol,
        claim=splits.claim,
        sizes=sizes,
        n_dropped=len(splits.dropped),
        leaked_share=splits.leaked_share,
        nearest_neighbour_accuracy=floor,
        warnings=splits.warnings,
    )
