import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from braintumor.data import manifest
from braintumor.data.contents import dataset_md5, list_contents
from braintumor.data.manifest import load_manifest, survey, write_manifest
from braintumor.errors import UserError


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (48, 40), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_image(folder / "train/glioma/a.png", seed=1)
    write_image(folder / "train/notumor/b.jpg", seed=2, mode="RGB")
    write_image(folder / "test/pituitary/c.PNG", seed=3)
    return folder


def by_path(images: pd.DataFrame) -> pd.DataFrame:
    return images.set_index("path")


def test_a_row_holds_what_the_file_is(dataset: Path) -> None:
    grey = np.full((50, 40), 100, np.uint8)
    grey[10:20, 10:20] = 200
    Image.fromarray(grey).save(dataset / "train/glioma/known.png")
    content = (dataset / "train/glioma/known.png").read_bytes()
    row = by_path(survey(dataset, 1, 0.9).images).loc["train/glioma/known.png"]
    assert (row["label"], row["declared_split"]) == ("glioma", "train")
    assert row["patient"] is None
    assert (row["width"], row["height"], row["mode"], row["size_bytes"]) == (40, 50, "L", len(content))
    assert row["md5"] == hashlib.md5(content).hexdigest()
    assert row["sha256"] == hashlib.sha256(content).hexdigest()
    assert row["duplicate_group"] == "g" + row["sha256"][:12]
    assert row["mean"] == pytest.approx(grey.mean())
    assert row["std"] == pytest.approx(grey.std())
    assert (row["p01"], row["p50"], row["p99"], row["border_mean"]) == (100, 100, 200, 100)
    assert (row["coloured_share"], row["coloured_line"], row["white_line"], row["mark_length"]) == (0, 0, 0, 0)
    assert 0 < row["sharpness"] < 1
    assert row["is_readable"]


def test_rows_are_sorted_and_the_bytes_depend_neither_on_place_nor_on_the_number_of_processes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset / "train/glioma/damaged.png").write_bytes(b"nothing")
    write_manifest(survey(dataset, 1, 0.9).images, "0" * 32, tmp_path / "first.parquet")
    moved = dataset.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(manifest, "WORTH_A_POOL", 1)
    seen: list[int] = []
    write_manifest(survey(moved, 2, 0.9, lambda: seen.append(1)).images, "0" * 32, tmp_path / "second.parquet")
    assert len(seen) == 4
    assert (tmp_path / "first.parquet").read_bytes() == (tmp_path / "second.parquet").read_bytes()
    images, data_md5 = load_manifest(tmp_path / "first.parquet")
    assert images["path"].is_monotonic_increasing
    assert data_md5 == "0" * 32


def test_fingerprints_of_many_images_wait_on_disk_and_the_survey_is_the_same(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    in_memory = survey(dataset, 1, 0.9)
    monkeypatch.setattr(manifest, "FINGERPRINTS_IN_MEMORY", 0)
    monkeypatch.setattr(manifest, "ROWS_IN_A_BATCH", 1)
    sizes: list[int] = []
    on_disk = survey(
        dataset, 1, 0.9, lambda: sizes.append(len(list(scratch.glob("fingerprints-*/.*.part")))), scratch=scratch
    )
    assert sizes == [1] * len(in_memory.images)
    assert list(scratch.iterdir()) == []
    pd.testing.assert_frame_equal(on_disk.images, in_memory.images)
    assert on_disk.data_md5 == in_memory.data_md5


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty (0 bytes)"), (b"GIF, or not", "is not an image"), (None, "is damaged")],
    ids=["zero-byte", "foreign", "truncated"],
)
def test_a_file_that_can_not_be_decoded_keeps_its_row_with_the_reason(
    dataset: Path, content: bytes | None, reason: str
) -> None:
    path = dataset / "train/glioma/bad.jpg"
    if content is None:
        write_image(path, size=(200, 200))
        content = path.read_bytes()[:4000]
    path.write_bytes(content)
    row = by_path(survey(dataset, 1, 0.9).images).loc["train/glioma/bad.jpg"]
    assert not row["is_readable"]
    assert row["error"].startswith(f"train/glioma/bad.jpg {reason}")
    assert str(dataset) not in row["error"]
    assert row["width":].isna().all()
    assert row["sha256"] == hashlib.sha256(content).hexdigest()


def test_files_are_told_apart_by_what_they_are(dataset: Path) -> None:
    for name in ("stray.png", "train/stray.png", "train/glioma/deep/stray.png", "val/glioma/stray.png"):
        write_image(dataset / name)
    for name in (
        ".DS_Store",
        "train/Thumbs.db",
        "train/glioma/.hidden.png",
        "__MACOSX/train/glioma/x.png",
        "notes.txt",
    ):
        (dataset / name).parent.mkdir(parents=True, exist_ok=True)
        (dataset / name).write_bytes(b"x")
    (dataset / "groups.csv").write_text("path,patient\n")
    contents = list_contents(dataset)
    assert contents.images == ["test/pituitary/c.PNG", "train/glioma/a.png", "train/notumor/b.jpg"]
    assert contents.misplaced == ["stray.png", "train/glioma/deep/stray.png", "train/stray.png", "val/glioma/stray.png"]
    assert len(contents.ignored) == 5
    assert "groups.csv" not in contents.ignored
    assert len(contents.versioned) == 3 + 4 + 5 + 1


def test_masks_of_lesions_are_no_images_and_a_mask_of_nothing_is_misplaced(dataset: Path) -> None:
    for name in ("train/glioma/a.png", "test/pituitary/c.png", "train/glioma/gone.png", "glioma/a.png"):
        write_image(dataset / "masks" / name)
    contents = list_contents(dataset)
    assert contents.images == ["test/pituitary/c.PNG", "train/glioma/a.png", "train/notumor/b.jpg"]
    assert contents.masks == ["masks/test/pituitary/c.png", "masks/train/glioma/a.png"]
    assert contents.misplaced == ["masks/glioma/a.png", "masks/train/glioma/gone.png"]
    assert contents.ignored == []
    assert len(contents.versioned) == 3 + 4


def test_patients_come_from_groups_csv(dataset: Path) -> None:
    (dataset / "groups.csv").write_text("patient,path\np7,train/glioma/a.png\n,train/notumor/b.jpg\n")
    patients = by_path(survey(dataset, 1, 0.9).images)["patient"]
    assert patients["train/glioma/a.png"] == "p7"
    assert patients["train/notumor/b.jpg"] is None
    assert patients["test/pituitary/c.PNG"] is None


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("path,patient\ntrain/glioma/gone.png,p1\n", "train/glioma/gone.png"),
        ("path,subject\ntrain/glioma/a.png,p1\n", "lacks the column patient"),
        ("", "not valid CSV"),
        ("path,patient\ntrain/glioma/a.png,p1\ntrain/glioma/a.png,p2\n", "names images twice"),
    ],
)
def test_a_wrong_groups_csv_is_refused(dataset: Path, content: str, fact: str) -> None:
    (dataset / "groups.csv").write_text(content)
    with pytest.raises(UserError, match=fact) as refusal:
        survey(dataset, 1, 0.9)
    assert "groups.csv" in str(refusal.value)


def test_a_missing_folder_and_a_broken_link_are_refused(dataset: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        list_contents(dataset / "nowhere")
    (dataset / "train/glioma/link.png").symlink_to(dataset / "gone.png")
    with pytest.raises(UserError, match=r"link\.png can't be opened"):
        list_contents(dataset)


def test_a_pipe_among_the_images_is_refused_rather_than_waited_for(dataset: Path) -> None:
    os.mkfifo(dataset / "train/glioma/pipe.png")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        list_contents(dataset)


def dvc(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_GLOBAL_CONFIG_DIR": str(folder / ".config")}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_data_version_is_the_one_that_dvc_gives(dataset: Path, tmp_path: Path) -> None:
    for name in (
        ".DS_Store",
        "train/.hidden/x",
        "train/glioma/B.png",
        "train/glioma/ä ö.png",
        ".git/config",
        "a/.dvc/b",
    ):
        (dataset / name).parent.mkdir(parents=True, exist_ok=True)
        (dataset / name).write_bytes(name.encode())
    (dataset / "crlf.csv").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "elsewhere.png").write_bytes(b"linked")
    (dataset / "train/glioma/link.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inside.png").write_bytes(b"not followed")
    (dataset / "train/linked").symlink_to(tmp_path / "folder")
    assert dvc("init", "--no-scm", folder=tmp_path).returncode == 0
    added = dvc("add", "--no-commit", "data", folder=tmp_path)
    assert added.returncode == 0, added.stderr
    (out,) = yaml.safe_load((tmp_path / "data.dvc").read_text())["outs"]
    assert out["md5"] == dataset_md5(dataset) + ".dir"
    assert out["nfiles"] == len(list_contents(dataset).versioned)
    assert survey(dataset, 1, 0.9).data_md5 == dataset_md5(dataset)


def test_a_dvcignore_inside_the_data_is_refused_as_dvc_does(dataset: Path) -> None:
    (dataset / "train/.dvcignore").write_text("*.png\n")
    with pytest.raises(UserError, match="DVC refuses"):
        dataset_md5(dataset)


@pytest.mark.parametrize("damage", ["missing", "text", "no_md5", "no_column"])
def test_a_manifest_that_is_not_whole_is_refused(dataset: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "manifest.parquet"
    surveyed = survey(dataset, 1, 0.9)
    write_manifest(surveyed.images, surveyed.data_md5, path)
    table = pq.read_table(path)
    match damage:
        case "missing":
            path.unlink()
        case "text":
            path.write_text(json.dumps({"path": 1}))
        case "no_md5":
            pq.write_table(table.replace_schema_metadata({}), path)
        case "no_column":
            pq.write_table(table.drop_columns(["sha256"]), path)
    with pytest.raises(UserError, match="run 'braintumor validate'"):
        load_manifest(path)


def test_the_manifest_can_be_read_by_anyone(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    surveyed = survey(dataset, 1, 0.9)
    write_manifest(surveyed.images, surveyed.data_md5, path)
    assert pq.read_schema(path).metadata[b"data_md5"].decode() == dataset_md5(dataset)
    assert {"path", "label", "declared_split", "sha256", "duplicate_group"} <= set(pd.read_parquet(path).columns)
    assert pq.read_schema(path).field("width").type == pa.int64()
    pd.testing.assert_frame_equal(load_manifest(tmp_path)[0], surveyed.images)


def test_rows_of_groups_with_a_field_too_many_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "train/glioma/a.png")
    (tmp_path / "groups.csv").write_text("path,patient\ntrain/glioma/a.png,p1,p2\n")
    with pytest.raises(UserError, match="more fields"):
        survey(tmp_path, 1, 0.88)
