"""The step `split`: every image on one side, no copy and no patient on two."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.artifacts import (
    DIFFERENCE,
    DROPPED,
    FLOORS,
    JOINED_GROUPS,
    MANIFEST,
    SPLIT_SUMMARY,
    SPLITS,
    read_json,
    replacing_directory,
    sha256_of_file,
    write_json,
)
from braintumor.data.contents import file_md5s, list_contents, version_md5
from braintumor.data.duplicates import measure_leakage
from braintumor.data.dvc_remote import open_dataset
from braintumor.data.manifest import load_manifest
from braintumor.data.split_artifact import test_md5
from braintumor.data.splits import Splits, make_splits, side_of, sizes_by_class
from braintumor.errors import UserError, name_some
from braintumor.evidence.neighbours import NEIGHBOUR_SIZE_PX, nearest_labels
from braintumor.evidence.statistics_floor import StatisticsFloor, statistics_floor
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
    statistics_accuracy: float
    warnings: list[str]


def split(
    dataset: Path, validation: Path, output: Path, params: SplitParams, progress: Progress = silent
) -> SplitSummary:
    """Leave splits.csv, floors.csv, dropped.csv, split.json and joined_groups.json in `output`.

    Raises UserError for a data set that is not the validated one.
    """
    dataset = open_dataset(dataset, progress)
    manifest, data_md5 = load_manifest(validation / MANIFEST)
    _refuse_changed_files(dataset, validation, manifest, data_md5)
    splits = make_splits(manifest, params)
    joined = _joined_groups(validation, manifest, data_md5, splits, params)
    warnings = [*splits.warnings, *(warning for group in joined for warning in _moves(group))]
    sizes = {name: int((splits.rows["split"] == name).sum()) for name in SPLIT_NAMES}
    with replacing_directory(output) as folder:
        test = splits.rows[splits.rows["split"] == "test"]
        by_statistics = _statistics_floor(manifest, splits.rows, params)
        floors = test[["path"]].assign(
            neighbour_label=_nearest_labels(dataset, splits.rows, progress), statistics_label=by_statistics.labels
        )
        floors.to_csv(folder / FLOORS, index=False, lineterminator="\n")
        splits.rows.to_csv(folder / SPLITS, index=False, lineterminator="\n")
        splits.dropped.to_csv(folder / DROPPED, index=False, lineterminator="\n")
        record = {
            "data_md5": data_md5,
            "splits_sha256": sha256_of_file(folder / SPLITS),
            "floors_sha256": sha256_of_file(folder / FLOORS),
            "test_md5": test_md5(splits.rows, dict(zip(manifest["path"], manifest["md5"], strict=True))),
            "protocol": params.protocol,
            "claim": splits.claim,
            "sizes": sizes,
            "groups": splits.rows.groupby("split")["group"].nunique().to_dict(),
            "sizes_by_class": sizes_by_class(splits.rows),
            "n_dropped": len(splits.dropped),
            "leaked_test_images": splits.leaked_test_images,
            "leaked_share": splits.leaked_share,
            "declared_leaked_share": measure_leakage(manifest)["leaked_share"],
            "nearest_neighbour_accuracy": float((floors["neighbour_label"] == test["label"]).mean()),
            "statistics_accuracy": float((floors["statistics_label"] == test["label"]).mean()),
            "statistics_importances": by_statistics.importances,
            "max_share_deviation_seen": splits.max_share_deviation,
            "warnings": splits.warnings,
        }
        write_json(folder / SPLIT_SUMMARY, record)
        # Apart from it: another accepted version changes this, and must not train the same split again.
        write_json(folder / JOINED_GROUPS, {"data_md5": data_md5, "joined_groups": joined})
    return SplitSummary(
        output=output,
        protocol=params.protocol,
        claim=splits.claim,
        sizes=sizes,
        n_dropped=len(splits.dropped),
        leaked_share=splits.leaked_share,
        nearest_neighbour_accuracy=record["nearest_neighbour_accuracy"],
        statistics_accuracy=record["statistics_accuracy"],
        warnings=warnings,
    )


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


def _nearest_labels(dataset: Path, rows: pd.DataFrame, progress: Progress) -> NDArray[np.str_]:
    advance = progress("split: nearest neighbours", len(rows))
    images = load_images(dataset, rows["path"].tolist(), NEIGHBOUR_SIZE_PX, advance)
    is_test = (rows["split"] == "test").to_numpy()
    return nearest_labels(images[~is_test], rows.loc[~is_test, "label"].tolist(), images[is_test])


def _statistics_floor(manifest: pd.DataFrame, rows: pd.DataFrame, params: SplitParams) -> StatisticsFloor:
    images = manifest.set_index("path").loc[rows["path"]].assign(split=rows["split"].to_numpy())
    is_test = images["split"] == "test"
    return statistics_floor(images[~is_test], images[is_test], params.seed)


def _joined_groups(
    validation: Path, manifest: pd.DataFrame, data_md5: str, splits: Splits, params: SplitParams
) -> list[dict[str, Any]]:
    """The groups that new images have joined since the last accepted data version, and the sides that they had."""
    difference = read_json(validation / DIFFERENCE, made_by="braintumor validate")
    if difference.get("data_md5") != data_md5:
        raise UserError(f"{validation / DIFFERENCE} is of other data than {MANIFEST}; run 'braintumor validate' again")
    of_patients = set(manifest.loc[manifest["patient"].notna(), "duplicate_group"])
    sides = dict(zip(splits.rows["group"], splits.rows["split"], strict=True))
    return [
        # Patients link groups further, and which they linked before is not known any more.
        {**joined, "side": None, "earlier_sides": {}}
        if joined["group"] in of_patients
        else {
            **joined,
            "side": sides.get(joined["group"], "dropped"),
            "earlier_sides": {group: side_of(group, params) for group in joined["earlier"]},
        }
        for joined in difference.get("joined_groups") or []
    ]


def _moves(joined: Mapping[str, Any]) -> list[str]:
    """A warning for each earlier group whose images change sides, which makes figures before and after differ."""
    side = joined["side"]
    bridges = name_some(joined["bridges"])
    return [
        f"group {group} moves from {earlier} to {side}: {bridges} joined it to others"
        for group, earlier in joined["earlier_sides"].items()
        # A declared test folder decides for itself, and what is dropped stands on no side.
        if side in ("train", "val", "calibration") and earlier != side
    ]
