import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.artifacts import sha256_of_file, write_json
from braintumor.data.contents import dataset_md5
from braintumor.data.manifest import load_manifest, survey, write_manifest
from braintumor.data.split_artifact import load_split
from braintumor.data.splits import make_splits, side_of
from braintumor.errors import UserError
from braintumor.evidence.statistics_floor import STATISTICS
from braintumor.labels import CLASS_NAMES, SPLIT_NAMES
from braintumor.params import SplitParams
from braintumor.steps.split import split

PARAMS = SplitParams(
    protocol="official",
    seed=20,
    test_fraction=0.2,
    val_fraction=0.2,
    calibration_fraction=0.2,
    max_share_deviation=0.1,
)


def draw(path: Path, seed: int) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40), dtype=np.uint8))
    image.save(path)
    return image


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 30 + 8 images a class, one of them mirrored into training, and its manifest."""
    root = tmp_path_factory.mktemp("made")
    for index, label in enumerate(CLASS_NAMES):
        for number in range(38):
            folder = "train" if number < 30 else "test"
            image = draw(root / "data" / folder / label / f"{number}.png", 100 * index + number)
    image.transpose(Image.Transpose.ROTATE_180).save(root / "data/train/pituitary/turned.png")
    surveyed = survey(root / "data", 1, 0.9)
    (root / "validation").mkdir()
    write_manifest(surveyed.images, surveyed.data_md5, root / "validation/manifest.parquet")
    write_json(root / "validation/difference.json", {"data_md5": surveyed.data_md5, "accepted": None})
    return root


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Data set, validation and output; each test has its own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data", tmp_path / "validation", tmp_path / "split"


def test_official_leaves_a_split_that_later_steps_accept(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    summary = split(dataset, validation, output, PARAMS)
    rows = pd.read_csv(output / "splits.csv")
    dropped = pd.read_csv(output / "dropped.csv")
    record = json.loads((output / "split.json").read_text())
    assert list(rows.columns) == ["path", "label", "group", "split"]
    assert dropped.to_dict("records") == [
        {
            "path": "train/pituitary/turned.png",
            "label": "pituitary",
            "group": rows.set_index("path").loc["test/pituitary/37.png", "group"],
            "reason": "copy of a test image",
        }
    ]
    assert record["data_md5"] == dataset_md5(dataset)
    assert record["splits_sha256"] == sha256_of_file(output / "splits.csv")
    assert record["sizes"] == summary.sizes == {name: int((rows["split"] == name).sum()) for name in SPLIT_NAMES}
    assert record["sizes"]["test"] == 32
    assert record["sizes_by_class"]["test"] == dict.fromkeys(CLASS_NAMES, 8)
    assert (record["protocol"], record["claim"]) == ("official", "copy-free, patients unknown")
    assert (record["n_dropped"], record["leaked_test_images"], record["leaked_share"]) == (1, 0, 0.0)
    assert 0 <= record["nearest_neighbour_accuracy"] <= 0.6
    assert record["max_share_deviation_seen"] >= 0
    assert 0 <= record["statistics_accuracy"] <= 0.6
    assert record["groups"]["test"] == 32
    assert json.loads((output / "joined_groups.json").read_text())["joined_groups"] == []
    made = load_split(output)
    assert made.sha256 == record["splits_sha256"]
    test = rows[rows["split"] == "test"].set_index("path")
    floors = made.floors.set_index("path")
    assert list(floors.columns) == ["neighbour_label", "statistics_label"]
    assert list(floors.index) == list(test.index)
    assert record["floors_sha256"] == sha256_of_file(output / "floors.csv")
    assert record["nearest_neighbour_accuracy"] == (floors["neighbour_label"] == test["label"]).mean()
    assert record["statistics_accuracy"] == (floors["statistics_label"] == test["label"]).mean()
    assert set(record["statistics_importances"]) == set(STATISTICS)


def test_the_name_of_the_test_set_follows_contents_and_labels_not_names(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    names = []
    for change in ("none", "renamed", "train side", "relabelled"):
        match change:
            case "renamed":
                (dataset / "test/glioma/30.png").rename(dataset / "test/glioma/other.png")
            case "train side":
                draw(dataset / "train/glioma/new.png", 999)
            case "relabelled":
                (dataset / "test/glioma/31.png").rename(dataset / "test/notumor/31-glioma.png")
        surveyed = survey(dataset, 1, 0.9)
        write_manifest(surveyed.images, surveyed.data_md5, validation / "manifest.parquet")
        write_json(validation / "difference.json", {"data_md5": surveyed.data_md5})
        split(dataset, validation, output, PARAMS)
        names.append(json.loads((output / "split.json").read_text())["test_md5"])
    assert names[0] == names[1] == names[2] != names[3]


def test_groups_that_a_new_image_joined_are_listed_with_their_sides(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    manifest, data_md5 = load_manifest(validation / "manifest.parquet")
    joined = manifest.loc[manifest["path"] == "train/glioma/3.png", "duplicate_group"].item()
    side = make_splits(manifest, PARAMS).rows.set_index("path").loc["train/glioma/3.png", "split"]
    names = (f"g{number:012x}" for number in range(1000))
    other = next(name for name in names if side_of(name, PARAMS) != side)
    groups = [{"group": joined, "earlier": sorted([joined, other]), "bridges": ["train/glioma/3.png"]}]
    write_json(validation / "difference.json", {"data_md5": data_md5, "joined_groups": groups})
    summary = split(dataset, validation, output, PARAMS)
    record = json.loads((output / "joined_groups.json").read_text())
    assert record["joined_groups"] == [
        {**groups[0], "side": side, "earlier_sides": {joined: side, other: side_of(other, PARAMS)}}
    ]
    assert [warning for warning in summary.warnings if other in warning and "train/glioma/3.png" in warning]
    with_joined = (output / "split.json").read_bytes()
    write_json(validation / "difference.json", {"data_md5": data_md5, "accepted": None})
    split(dataset, validation, output, PARAMS)
    assert (output / "split.json").read_bytes() == with_joined


def test_a_difference_of_other_data_is_refused(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    write_json(validation / "difference.json", {"data_md5": "0" * 32})
    with pytest.raises(UserError, match=r"difference\.json is of other data"):
        split(dataset, validation, output, PARAMS)


def test_a_split_with_a_group_on_two_sides_is_refused_whoever_wrote_it(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    split(dataset, validation, output, PARAMS)
    rows = pd.read_csv(output / "splits.csv", dtype=str)
    test_group = rows.loc[rows["split"] == "test", "group"].iloc[0]
    rows.loc[rows.index[rows["split"] == "train"][0], "group"] = test_group
    rows.to_csv(output / "splits.csv", index=False, lineterminator="\n")
    record = json.loads((output / "split.json").read_text())
    write_json(output / "split.json", record | {"splits_sha256": sha256_of_file(output / "splits.csv")})
    with pytest.raises(UserError, match="share a group with images on another side"):
        load_split(output)


@pytest.mark.parametrize("file", ["splits.csv", "floors.csv"])
def test_a_split_that_was_changed_or_lost_a_file_is_refused(folders: tuple[Path, Path, Path], file: str) -> None:
    dataset, validation, output = folders
    split(dataset, validation, output, PARAMS)
    content = (output / file).read_text()
    (output / file).write_text(content.replace("glioma", "notumor"))
    with pytest.raises(UserError, match=rf"{file} was changed after it was made; run 'braintumor split' again"):
        load_split(output)
    (output / file).unlink()
    with pytest.raises(UserError, match=rf"{file} is missing; run 'braintumor split' first"):
        load_split(output)


def test_a_split_of_an_earlier_version_without_floors_is_refused(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    split(dataset, validation, output, PARAMS)
    record = json.loads((output / "split.json").read_text())
    del record["floors_sha256"]
    write_json(output / "split.json", record)
    with pytest.raises(UserError, match=r"split\.json has no floors_sha256; run 'braintumor split' again"):
        load_split(output)


def test_declared_counts_its_leak_and_grouped_has_none(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    declared = split(dataset, validation, output, PARAMS.model_copy(update={"protocol": "declared"}))
    assert (declared.claim, declared.leaked_share) == ("leaks kept", 1 / 32)
    assert pd.read_csv(output / "dropped.csv").empty
    grouped = split(dataset, validation, output, PARAMS.model_copy(update={"protocol": "grouped"}))
    assert (grouped.leaked_share, grouped.n_dropped) == (0.0, 0)
    assert sum(grouped.sizes.values()) == 153


def test_the_same_manifest_gives_the_same_bytes(folders: tuple[Path, Path, Path]) -> None:
    dataset, validation, output = folders
    split(dataset, validation, output, PARAMS)
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    split(dataset, validation, output, PARAMS)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first


@pytest.mark.parametrize("change", ["edited", "added", "removed", "beside"])
def test_a_data_set_that_is_not_the_validated_one_is_refused(folders: tuple[Path, Path, Path], change: str) -> None:
    dataset, validation, output = folders
    split(dataset, validation, output, PARAMS)
    before = (output / "splits.csv").read_bytes()
    match change:
        case "edited":
            draw(dataset / "train/glioma/3.png", 999)
        case "added":
            draw(dataset / "train/glioma/3000.png", 999)
        case "removed":
            (dataset / "train/glioma/3.png").unlink()
        case "beside":
            (dataset / "groups.csv").write_text("path,patient\n")
    named = "a file beside the images" if change == "beside" else "train/glioma/3"
    with pytest.raises(UserError, match="run 'braintumor validate' again") as refusal:
        split(dataset, validation, output, PARAMS)
    assert named in str(refusal.value)
    assert (output / "splits.csv").read_bytes() == before
    assert {path.name for path in output.parent.iterdir()} == {"data", "validation", "split"}


def test_a_missing_manifest_or_data_set_and_an_impossible_split_leave_nothing(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    dataset, validation, output = folders
    with pytest.raises(UserError, match=r"manifest\.parquet is missing; run 'braintumor validate'"):
        split(dataset, tmp_path / "nowhere", output, PARAMS)
    with pytest.raises(UserError, match="nowhere is missing"):
        split(tmp_path / "nowhere", validation, output, PARAMS)
    with pytest.raises(UserError, match="leaves classes without images"):
        split(dataset, validation, output, PARAMS.model_copy(update={"val_fraction": 1e-9}))
    assert not output.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "validation"}
