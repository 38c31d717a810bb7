import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.artifacts import ACCEPTED
from braintumor.data.contents import dataset_md5
from braintumor.data.manifest import load_manifest
from braintumor.data.profile import Accepted, load_profile, write_accepted
from braintumor.errors import CriticalFinding, UserError
from braintumor.labels import CLASS_NAMES
from braintumor.params import Params
from braintumor.progress import Progress, silent
from braintumor.steps.validate import ValidationSummary, validate

Validate = Callable[..., ValidationSummary]


@pytest.fixture
def run(tmp_path: Path, params: Params) -> Validate:
    """Validate a data set right after resolving it; `accepted` is what resolve found, changes are of the section."""

    def run(
        dataset: Path,
        output: Path,
        accepted: Accepted | None = None,
        progress: Progress = silent,
        **changes: Any,
    ) -> ValidationSummary:
        limits = {"workers": 1, "min_images_per_class": 3, "max_side_px": 512, "min_intensity_std": 8.0} | changes
        small = params.model_copy(update={"validation": params.validation.model_copy(update=limits)})
        context = tmp_path / "resolve"
        context.mkdir(exist_ok=True)
        if dataset.exists():
            write_accepted(accepted, dataset_md5(dataset), context / ACCEPTED)
        return validate(dataset, context, output, small, progress)

    return run


def draw(path: Path, seed: int, side_px: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 190, (side_px // 4 + 1,) * 2, dtype=np.uint8)
    # Blobs: pure noise would look edge-filtered.
    Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC).save(path)


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


def test_a_sound_data_set_leaves_the_whole_artifact(run: Validate, dataset: Path, tmp_path: Path) -> None:
    copied = Image.open(dataset / "train/glioma/0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    copied.save(dataset / "test/glioma/copy.png")
    (dataset / "notes.txt").write_text("x")
    ticks: list[str] = []
    summary = run(dataset, tmp_path / "out", progress=lambda title, total: lambda: ticks.append(f"{total}"))
    assert names(tmp_path / "out") == {
        "manifest.parquet", "profile.parquet", "leakage.json", "difference.json", "findings.json", "odd_images.csv",
        "data_docs",
    }  # fmt: skip
    assert load_profile(tmp_path / "out/profile.parquet")[1] == summary.data_md5
    difference = json.loads((tmp_path / "out/difference.json").read_text())
    assert (difference["data_md5"], difference["accepted"]) == (summary.data_md5, None)
    assert difference["statement"].startswith("first version")
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


def test_the_same_images_give_the_same_bytes(run: Validate, dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "earlier")
    earlier = Accepted("1", "a" * 32, load_profile(tmp_path / "earlier/profile.parquet")[0])
    draw(dataset / "train/glioma/new.png", 99)
    for output in ("first", "second"):
        run(dataset, tmp_path / output, earlier)
    assert names(tmp_path / "first") == names(tmp_path / "second")
    # Great Expectations dates its pages.
    for name in names(tmp_path / "first") - {"data_docs"}:
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
    run: Validate, dataset: Path, tmp_path: Path, how: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.parquet").write_bytes(b"of an earlier, sound data set")
    named = spoil(dataset, how)
    with pytest.raises(CriticalFinding) as refusal:
        run(dataset, tmp_path / "out")
    assert named in str(refusal.value)
    assert str(tmp_path / "out/data_docs/index.html") in str(refusal.value)
    assert refusal.value.exit_code == 3
    assert names(tmp_path / "out") == {"findings.json", "data_docs"}
    findings = json.loads((tmp_path / "out/findings.json").read_text())["findings"]
    assert findings[0]["severity"] == "critical"
    assert names(tmp_path) == {"data", "out", "resolve"}


def test_many_culprits_are_counted_rather_than_listed(run: Validate, dataset: Path, tmp_path: Path) -> None:
    for number in range(14):
        (dataset / f"train/glioma/bad{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(CriticalFinding, match=r"bad09\.jpg is empty \(0 bytes\) and 4 more"):
        run(dataset, tmp_path / "out")


def test_a_missing_data_set_or_a_wrong_groups_csv_leaves_the_previous_output(
    run: Validate, dataset: Path, tmp_path: Path
) -> None:
    run(dataset, tmp_path / "out")
    before = pd.read_parquet(tmp_path / "out/manifest.parquet")
    with pytest.raises(UserError, match="nowhere is missing"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (dataset / "groups.csv").write_text("path\n")
    with pytest.raises(UserError, match=r"groups\.csv"):
        run(dataset, tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out/manifest.parquet"), before)
    assert names(tmp_path) == {"data", "out", "resolve"}


@pytest.fixture
def earlier(run: Validate, dataset: Path, tmp_path: Path) -> Accepted:
    """The data set as it is, accepted."""
    summary = run(dataset, tmp_path / "earlier")
    return Accepted("7", summary.data_md5, load_profile(tmp_path / "earlier/profile.parquet")[0])


def test_what_changed_since_the_last_accepted_version_stands_in_the_difference(
    run: Validate, dataset: Path, tmp_path: Path, earlier: Accepted
) -> None:
    (dataset / "train/glioma/0.png").rename(dataset / "train/notumor/was-glioma.png")
    draw(dataset / "train/glioma/new.png", 99)
    summary = run(dataset, tmp_path / "out", earlier)
    difference = json.loads((tmp_path / "out/difference.json").read_text())
    assert difference["accepted"] == {"version": "7", "data_md5": earlier.data_md5}
    assert difference["data_md5"] == summary.data_md5 != earlier.data_md5
    assert difference["images"]["added"] == [{"path": "train/glioma/new.png"}]
    assert difference["images"]["relabelled"] == [
        {"path": "train/notumor/was-glioma.png", "before": "glioma", "now": "notumor"}
    ]
    findings = json.loads((tmp_path / "out/findings.json").read_text())["findings"]
    assert {"added", "relabelled"} <= {finding["name"] for finding in findings}


def test_images_that_are_gone_stop_the_run_and_are_named(
    run: Validate, dataset: Path, tmp_path: Path, earlier: Accepted
) -> None:
    (dataset / "test/pituitary/0.png").unlink()
    with pytest.raises(CriticalFinding, match=r"25\.0% of class pituitary are gone .*test/pituitary/0\.png"):
        run(dataset, tmp_path / "out", earlier)
    assert names(tmp_path / "out") == {"findings.json", "data_docs"}
    run(dataset, tmp_path / "out", earlier, max_shrinkage=0.3)
    assert (tmp_path / "out/manifest.parquet").is_file()


def test_an_accepted_version_without_a_profile_is_told_and_nothing_is_compared(
    run: Validate, dataset: Path, tmp_path: Path
) -> None:
    summary = run(dataset, tmp_path / "out", Accepted("7", "a" * 32, None))
    assert [warning.partition(":")[0] for warning in summary.warnings] == ["not_compared"]
    difference = json.loads((tmp_path / "out/difference.json").read_text())
    assert difference["statement"].startswith("not compared")


def test_data_that_changed_since_it_was_resolved_is_refused_and_the_output_left(
    run: Validate, dataset: Path, tmp_path: Path, params: Params
) -> None:
    run(dataset, tmp_path / "out")
    before = (tmp_path / "out/manifest.parquet").read_bytes()
    draw(dataset / "train/glioma/new.png", 99)

    def progress(title: str, total: int) -> Callable[[], None]:
        pytest.fail("images are read, which may take minutes, before the refusal")

    with pytest.raises(UserError, match="run 'braintumor resolve' again"):
        validate(dataset, tmp_path / "resolve", tmp_path / "out", params, progress)
    assert (tmp_path / "out/manifest.parquet").read_bytes() == before


def test_data_that_changes_while_it_is_read_is_refused(run: Validate, dataset: Path, tmp_path: Path) -> None:
    def progress(title: str, total: int) -> Callable[[], None]:
        draw(dataset / "train/pituitary/2.png", 99)
        return lambda: None

    with pytest.raises(UserError, match="run 'braintumor resolve' again"):
        run(dataset, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_a_step_that_resolve_did_not_come_before_names_it(dataset: Path, tmp_path: Path, params: Params) -> None:
    with pytest.raises(UserError, match=r"accepted\.parquet is missing; run 'braintumor resolve' first"):
        validate(dataset, tmp_path / "resolve", tmp_path / "out", params)
