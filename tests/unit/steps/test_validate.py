import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.data.manifest import dataset_md5, load_manifest
from braintumor.errors import CriticalFinding, UserError
from braintumor.labels import CLASS_NAMES
from braintumor.params import ValidateParams
from braintumor.steps.validate import validate

PARAMS = ValidateParams(
    workers=1,
    min_images_per_class=3,
    require_test_images=True,
    min_side_px=32,
    max_side_px=512,
    max_class_imbalance=3.0,
    min_intensity_std=8.0,
    copy_correlation=0.9,
    max_leaked_share=0.05,
    min_intensity_mean=5.0,
    max_intensity_mean=200.0,
    max_shrinkage=0.01,
    max_statistic_drift=0.2,
    max_label_drift=0.05,
)


def draw(path: Path, seed: int, side_px: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three images to train and one to test of each class."""
    for index, label in enumerate(CLASS_NAMES):
        for number in range(3):
            draw(tmp_path / "data/train" / label / f"{number}.png", 10 * index + number)
        draw(tmp_path / "data/test" / label / "0.png", 10 * index + 5)
    return tmp_path / "data"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_sound_data_set_leaves_the_whole_artifact(dataset: Path, tmp_path: Path) -> None:
    copied = Image.open(dataset / "train/glioma/0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    copied.save(dataset / "test/glioma/copy.png")
    (dataset / "notes.txt").write_text("x")
    ticks: list[str] = []
    summary = validate(dataset, tmp_path / "out", PARAMS, lambda title, total: lambda: ticks.append(f"{total}"))
    assert names(tmp_path / "out") == {"manifest.parquet", "leakage.json", "findings.json", "data_docs"}
    images, data_md5 = load_manifest(tmp_path / "out")
    assert data_md5 == summary.data_md5 == dataset_md5(dataset)
    assert len(images) == summary.n_images == 17 == len(ticks)
    groups = images.set_index("path")["duplicate_group"]
    assert groups["train/glioma/0.png"] == groups["test/glioma/copy.png"]
    assert summary.n_groups == 16
    assert summary.leaked_share == pytest.approx(0.2)
    assert json.loads((tmp_path / "out/leakage.json").read_text())["leaked_test_images"] == 1
    findings = json.loads((tmp_path / "out/findings.json").read_text())
    assert findings["data_md5"] == data_md5
    assert {finding["name"] for finding in findings["findings"]} == {"leaked_share", "ignored_files"}
    assert summary.n_warnings == 2
    assert (tmp_path / "out/data_docs/index.html").is_file()


def test_the_same_images_give_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    for output in ("first", "second"):
        validate(dataset, tmp_path / output, PARAMS)
    for name in ("manifest.parquet", "leakage.json", "findings.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def spoil(dataset: Path, how: str) -> str:
    """Make the data set unfit, and return what the message has to name."""
    bad = dataset / "train/glioma/bad.jpg"
    match how:
        case "zero-byte":
            bad.write_bytes(b"")
        case "truncated":
            draw(bad, 99, 200)
            bad.write_bytes(bad.read_bytes()[:5000])
        case "foreign":
            bad.write_bytes(b"<html>not an image</html>")
        case "tiny":
            draw(bad, 99, 1)
        case "no class":
            for path in dataset.glob("*/notumor/*"):
                path.unlink()
            return "class notumor"
        case "no test":
            for path in dataset.glob("test/*/*"):
                path.unlink()
            return "no images under test/"
        case "empty":
            for path in dataset.glob("*/*/*"):
                path.unlink()
            return "no images in"
        case "elsewhere":
            draw(dataset / "val/glioma/bad.jpg", 99)
            return "val/glioma/bad.jpg"
    return "train/glioma/bad.jpg"


@pytest.mark.parametrize(
    "how", ["zero-byte", "truncated", "foreign", "tiny", "no class", "no test", "empty", "elsewhere"]
)
def test_a_critical_finding_leaves_findings_and_data_docs_and_nothing_to_go_on_with(
    dataset: Path, tmp_path: Path, how: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.parquet").write_bytes(b"of an earlier, sound data set")
    named = spoil(dataset, how)
    with pytest.raises(CriticalFinding) as refusal:
        validate(dataset, tmp_path / "out", PARAMS)
    assert named in str(refusal.value)
    assert str(tmp_path / "out/data_docs/index.html") in str(refusal.value)
    assert refusal.value.exit_code == 3
    assert names(tmp_path / "out") == {"findings.json", "data_docs"}
    findings = json.loads((tmp_path / "out/findings.json").read_text())["findings"]
    assert findings[0]["severity"] == "critical"
    assert names(tmp_path) == {"data", "out"}


def test_many_culprits_are_counted_rather_than_listed(dataset: Path, tmp_path: Path) -> None:
    for number in range(14):
        (dataset / f"train/glioma/bad{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(CriticalFinding, match=r"bad09\.jpg is empty \(0 bytes\) and 4 more"):
        validate(dataset, tmp_path / "out", PARAMS)


def test_a_missing_data_set_or_a_wrong_groups_csv_leaves_the_previous_output(dataset: Path, tmp_path: Path) -> None:
    validate(dataset, tmp_path / "out", PARAMS)
    before = pd.read_parquet(tmp_path / "out/manifest.parquet")
    with pytest.raises(UserError, match="nowhere is missing"):
        validate(tmp_path / "nowhere", tmp_path / "out", PARAMS)
    (dataset / "groups.csv").write_text("path\n")
    with pytest.raises(UserError, match=r"groups\.csv"):
        validate(dataset, tmp_path / "out", PARAMS)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out/manifest.parquet"), before)
    assert names(tmp_path) == {"data", "out"}
