import csv
import os
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

from braintumor.artifacts import GROUPS_FILE
from braintumor.data.arrivals import Arrivals, Match
from braintumor.data.contents import dataset_md5
from braintumor.data.growth import AddSummary, add_images, judge
from braintumor.data.slices import SliceRule
from braintumor.errors import UserError

COPY_CORRELATION = 0.9
THERE = {"train/glioma/a.jpg": 1, "train/meningioma/b.jpg": 2, "test/notumor/c.jpg": 3, "test/pituitary/d.jpg": 4}


def draw(path: Path, seed: int, mirrored: bool = False, quality: int = 95) -> Path:
    """A picture of its own for each seed: no two of them are alike."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(96, 96)), 2)
    grey = np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype(np.uint8)
    image = Image.fromarray(grey)
    path.parent.mkdir(parents=True, exist_ok=True)
    (ImageOps.mirror(image) if mirrored else image).save(path, quality=quality)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, seed in THERE.items():
        draw(tmp_path / "data" / name, seed)
    return tmp_path / "data"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def groups(folder: Path) -> list[str]:
    return (folder / GROUPS_FILE).read_text().splitlines()


def add(source: Path, data: Path, **options: object) -> AddSummary:
    summary = add_images(source, data, COPY_CORRELATION, **options)  # type: ignore[arg-type]
    assert not list(data.parent.glob(".data.*"))
    return summary


def test_new_images_come_and_every_kind_of_copy_stays_out(data: Path, source: Path) -> None:
    shutil.copyfile(data / "train/glioma/a.jpg", source_file := source / "x.jpg")
    (source / "Training/glioma").mkdir(parents=True)
    source_file.rename(source / "Training/glioma/same-bytes.jpg")
    with Image.open(data / "train/meningioma/b.jpg") as image:
        (source / "Testing/meningioma").mkdir(parents=True)
        image.save(source / "Testing/meningioma/same-pixels.png")
    draw(source / "Testing/notumor/mirrored.jpg", 3, mirrored=True, quality=60)
    draw(source / "Training/pituitary/new.jpg", 9)
    before = content(data)
    inodes = {name: (data / name).stat().st_ino for name in before}
    summary = add(source, data)
    added = {"train/pituitary/new.jpg": (source / "Training/pituitary/new.jpg").read_bytes()}
    assert content(data) == before | added
    assert {name: (data / name).stat().st_ino for name in before} == inodes
    fates = {fate.path: (fate.reason, fate.copy_of, fate.likeness) for fate in summary.fates}
    assert fates == {
        "Training/glioma/same-bytes.jpg": ("copy", "train/glioma/a.jpg", "same bytes"),
        "Testing/meningioma/same-pixels.png": ("copy", "train/meningioma/b.jpg", "same pixels"),
        "Testing/notumor/mirrored.jpg": ("copy", "test/notumor/c.jpg", "near copy"),
        "Training/pituitary/new.jpg": ("new", None, None),
    }
    assert summary.before["train"] == {"glioma": 1, "meningioma": 1, "notumor": 0, "pituitary": 0}
    assert summary.after["train"] == {"glioma": 1, "meningioma": 1, "notumor": 0, "pituitary": 1}
    assert summary.n_added == 1
    assert not summary.conflicts
    assert "other side of train/ and test/: 1" in str(summary)


def test_copies_come_if_somebody_chooses_so(data: Path, source: Path) -> None:
    (source / "glioma").mkdir()
    shutil.copyfile(data / "train/glioma/a.jpg", source / "glioma/a.jpg")
    shutil.copyfile(data / "train/glioma/a.jpg", source / "glioma/b.jpg")
    before = content(data)
    summary = add(source, data, copies="add")
    bytes_ = before["train/glioma/a.jpg"]
    assert content(data) == before | {"train/glioma/a-2.jpg": bytes_, "train/glioma/b.jpg": bytes_}
    assert summary.renamed == {"glioma/a.jpg": "train/glioma/a-2.jpg"}


@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
def test_the_same_source_added_again_changes_nothing(tmp_path: Path, data: Path, source: Path, is_zip: bool) -> None:
    for seed in (10, 11, 12):
        draw(source / f"Training/glioma/{seed}.jpg", seed)
    source = zipped(source, tmp_path / "source.zip") if is_zip else source
    assert add(source, data).n_added == 3
    version, inode = dataset_md5(data), data.stat().st_ino
    again = add(source, data)
    assert (again.n_added, again.is_changed, len(again.because("copy"))) == (0, False, 3)
    assert (dataset_md5(data), data.stat().st_ino) == (version, inode)


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in content(folder).items():
            file.writestr(name, text)
    return archive


def test_copies_within_the_source_are_told_and_of_equal_files_one_comes(data: Path, source: Path) -> None:
    draw(source / "Testing/glioma/first.jpg", 10)
    draw(source / "Training/glioma/second.jpg", 10)
    draw(source / "Training/glioma/near.jpg", 10, mirrored=True)
    summary = add(source, data)
    assert {fate.path: (fate.reason, fate.is_added, fate.copy_of) for fate in summary.fates} == {
        "Testing/glioma/first.jpg": ("new", True, None),
        "Training/glioma/near.jpg": ("new", True, "Testing/glioma/first.jpg"),
        "Training/glioma/second.jpg": ("repeat", False, "Testing/glioma/first.jpg"),
    }
    assert "test/glioma/first.jpg" in content(data)
    assert "train/glioma/second.jpg" not in content(data)


def test_a_file_under_two_labels_in_the_source_waits_for_somebody_to_decide(data: Path, source: Path) -> None:
    for label in ("glioma", "meningioma"):
        draw(source / f"Training/{label}/x.jpg", 10)
    draw(source / "Training/glioma/y.jpg", 10)
    draw(source / "Training/pituitary/z.jpg", 11)
    summary = add(source, data)
    assert set(content(data)) == {*THERE, "train/pituitary/z.jpg"}
    assert {fate.path: fate.conflict for fate in summary.conflicts} == {
        "Training/glioma/x.jpg": "Training/meningioma/x.jpg (meningioma)",
        "Training/glioma/y.jpg": "Training/meningioma/x.jpg (meningioma)",
        "Training/meningioma/x.jpg": "Training/glioma/x.jpg (glioma)",
    }
    assert add(source, data, copies="add").n_added == 4


def test_a_copy_under_another_label_is_a_conflict_with_both_paths(data: Path, source: Path) -> None:
    draw(source / "Training/meningioma/was-glioma.jpg", 1, mirrored=True)
    summary = add(source, data)
    assert [(fate.path, fate.conflict) for fate in summary.conflicts] == [
        ("Training/meningioma/was-glioma.jpg", "train/glioma/a.jpg (glioma)")
    ]
    assert "Training/meningioma/was-glioma.jpg (meningioma) is train/glioma/a.jpg (glioma)" in str(summary)
    assert set(content(data)) == set(THERE)


def test_a_conflict_is_seen_beside_a_closer_copy_of_the_right_label() -> None:
    places = {PurePosixPath("glioma/x.jpg"): ("train", "glioma")}
    matches = [Match(0, 1, True, "near copy", 0.91), Match(0, 0, True, "near copy", 0.99)]
    there = ["train/glioma/a.jpg", "train/notumor/b.jpg"]
    (fate,) = judge(places, there, Arrivals(matches, [0], []), "skip").values()
    assert (fate.copy_of, fate.correlation) == ("train/glioma/a.jpg", 0.99)
    assert fate.conflict == "train/notumor/b.jpg (notumor)"


def test_a_name_that_stands_for_another_image_gets_a_number(data: Path, source: Path) -> None:
    before = content(data)
    draw(source / "Training/glioma/A.JPG", 10)
    draw(source / "Training/glioma/a-2.jpg", 11)
    summary = add(source, data)
    assert content(data) == before | {
        "train/glioma/A-3.JPG": (source / "Training/glioma/A.JPG").read_bytes(),
        "train/glioma/a-2.jpg": (source / "Training/glioma/a-2.jpg").read_bytes(),
    }
    assert summary.renamed == {"Training/glioma/A.JPG": "train/glioma/A-3.JPG"}


def test_whatever_else_stands_in_the_data_set_stays(data: Path, source: Path) -> None:
    (data / "train/glioma/.hidden.jpg").write_bytes(b"1")
    (data / "train/glioma/notes.txt").write_bytes(b"2")
    (data / "unsorted").mkdir()
    draw(data / "unsorted/x.jpg", 20)
    (data / "empty").mkdir()
    (data / "train").chmod(0o775)
    before = content(data)
    draw(source / "Training/glioma/notes.jpg", 10)
    add(source, data)
    assert before.items() <= content(data).items()
    assert (data / "empty").is_dir()
    assert (data / "train").stat().st_mode & 0o777 == 0o775


def test_files_that_dvc_linked_out_of_its_cache_keep_their_bytes_and_rights(
    tmp_path: Path, data: Path, source: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (data / GROUPS_FILE).write_text("path,patient\ntrain/glioma/a.jpg,p1\n")
    for number, name in enumerate((GROUPS_FILE, "train/glioma/a.jpg")):
        (data / name).rename(cache / str(number))
        (cache / str(number)).chmod(0o444)
        os.link(cache / str(number), data / name)
    (data / "train/meningioma/b.jpg").rename(cache / "2")
    (data / "train/meningioma/b.jpg").symlink_to(cache / "2")
    before = content(cache)
    draw(source / "glioma/new.jpg", 10)
    (source / GROUPS_FILE).write_text("path,patient\nglioma/new.jpg,p2\n")
    add(source, data)
    assert content(cache) == before
    assert (data / "train/glioma/a.jpg").samefile(cache / "1")
    assert (data / "train/meningioma/b.jpg").is_symlink()
    assert groups(data) == ["path,patient", "train/glioma/a.jpg,p1", "train/glioma/new.jpg,p2"]


def test_without_hard_links_the_files_are_copied(data: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    before = content(data)
    draw(source / "glioma/new.jpg", 10)
    add(source, data)
    assert content(data) == before | {"train/glioma/new.jpg": (source / "glioma/new.jpg").read_bytes()}


def test_patients_are_joined_with_all_columns_and_one_number_is_one_person(data: Path, source: Path) -> None:
    (data / GROUPS_FILE).write_text("path,patient,scanner\ntrain/glioma/a.jpg,p1,A\ntest/notumor/c.jpg,p9,B\n")
    for name, seed in (("x", 10), ("y", 11), ("z", 12)):
        draw(source / f"Training/glioma/{name}.jpg", seed)
    (source / GROUPS_FILE).write_text(
        "path,patient,origin\nTraining/glioma/x.jpg,p1,phantom\nTraining/glioma/y.jpg,,\n"
    )
    summary = add(source, data)
    assert groups(data) == [
        "path,patient,scanner,origin",
        "test/notumor/c.jpg,p9,B,",
        "train/glioma/a.jpg,p1,A,",
        "train/glioma/x.jpg,p1,,phantom",
        "train/glioma/y.jpg,,,",
    ]
    assert "taken for the same people: 1, as p1; if they are others, give --patient-prefix" in str(summary)


def test_a_prefix_tells_the_patients_of_two_sources_apart(data: Path, source: Path) -> None:
    (data / GROUPS_FILE).write_text("path,patient\ntrain/glioma/a.jpg,p1\n")
    numbers = {"w": "p1", "x": "", "y": "volume-0123456789abcdef", "z": "patient-abcdef-0123456789abcdef"}
    for seed, name in enumerate(numbers, 10):
        draw(source / f"Training/glioma/{name}.jpg", seed)
    rows = [f"Training/glioma/{name}.jpg,{number}" for name, number in numbers.items()]
    (source / GROUPS_FILE).write_text("\n".join(["path,patient", *rows]))
    summary = add(source, data, patient_prefix="b-")
    # An empty number is nobody, and the names that are made of volumes and digests can't collide.
    assert groups(data)[2:] == [
        "train/glioma/w.jpg,b-p1",
        "train/glioma/x.jpg,",
        "train/glioma/y.jpg,volume-0123456789abcdef",
        "train/glioma/z.jpg,patient-abcdef-0123456789abcdef",
    ]
    assert "same people" not in str(summary)


def test_a_skipped_copy_still_tells_whose_image_it_is(data: Path, source: Path) -> None:
    (data / GROUPS_FILE).write_text(
        "path,patient\ntrain/glioma/a.jpg,\ntrain/meningioma/b.jpg,p2\ntest/notumor/c.jpg,volume-0\n"
    )
    shutil.copytree(data, source, dirs_exist_ok=True)
    (source / GROUPS_FILE).write_text(
        "path,patient\ntrain/glioma/a.jpg,p1\ntrain/meningioma/b.jpg,p5\ntest/notumor/c.jpg,p3\ntest/pituitary/d.jpg,p4\n"
    )
    before = content(data)
    summary = add(source, data)
    assert groups(data) == [
        "path,patient",
        "test/notumor/c.jpg,p3",
        "test/pituitary/d.jpg,p4",
        "train/glioma/a.jpg,p1",
        "train/meningioma/b.jpg,p2",
    ]
    assert {name: text for name, text in content(data).items() if name != GROUPS_FILE} == {
        name: text for name, text in before.items() if name != GROUPS_FILE
    }
    assert (summary.n_added, summary.is_changed) == (0, True)
    assert "another patient than their copy: 1, as train/meningioma/b.jpg is of p2, its copy of p5" in str(summary)


def test_a_near_copy_is_no_proof_of_a_patient(data: Path, source: Path) -> None:
    draw(source / "glioma/x.jpg", 1, mirrored=True)
    (source / GROUPS_FILE).write_text("path,patient\nglioma/x.jpg,p1\n")
    assert not add(source, data).is_changed
    assert not (data / GROUPS_FILE).exists()


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("source", "path\nx\n"),
        ("source", "path,patient\nglioma/gone.jpg,p\n"),
        ("source", "path,patient\nglioma/x.jpg,1\nglioma/x.jpg,2\n"),
        ("data", "path\nx\n"),
        ("data", "path,patient\nglioma/x.jpg,1\nglioma/x.jpg,2\n"),
    ],
)
def test_a_wrong_groups_csv_on_either_side_is_refused(data: Path, source: Path, where: str, text: str) -> None:
    draw(source / "glioma/x.jpg", 10)
    ((source if where == "source" else data) / GROUPS_FILE).write_text(text)
    before = content(data)
    with pytest.raises(UserError, match=r"groups\.csv"):
        add(source, data)
    assert content(data) == before


@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
def test_a_dry_run_tells_the_same_and_writes_nothing(
    tmp_path: Path, data: Path, source: Path, is_zip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    draw(source / "Training/glioma/a.jpg", 10)
    draw(source / "Training/notumor/copy.jpg", 1)
    source = zipped(source, tmp_path / "source.zip") if is_zip else source
    before = content(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")]}
    planned = add(source, data, dry_run=True)
    assert content(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")]} == stamps
    assert not list((tmp_path / "temporary").iterdir())
    assert str(add(source, data)) == str(planned)
    assert (planned.n_added, len(planned.conflicts)) == (1, 1)


def test_the_report_names_the_fate_of_every_image(tmp_path: Path, data: Path, source: Path) -> None:
    draw(source / "Training/glioma/a.jpg", 10)
    draw(source / "Testing/notumor/copy.jpg", 1)
    add(source, data, report=tmp_path / "report.csv", dry_run=True)
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows["Training/glioma/a.jpg"]["target"] == "train/glioma/a-2.jpg"
    assert rows["Testing/notumor/copy.jpg"] == {
        "path": "Testing/notumor/copy.jpg",
        "target": "",
        "declared_split": "test",
        "label": "notumor",
        "reason": "copy",
        "copy_of": "train/glioma/a.jpg",
        "likeness": "same bytes",
        "correlation": "1.0000",
        "conflict": "train/glioma/a.jpg (glioma)",
    }


def test_an_image_that_can_not_be_decoded_comes_and_is_named(data: Path, source: Path) -> None:
    (source / "glioma").mkdir()
    (source / "glioma/broken.jpg").write_bytes(b"no picture")
    summary = add(source, data)
    assert summary.unreadable == ["glioma/broken.jpg"]
    assert (data / "train/glioma/broken.jpg").read_bytes() == b"no picture"
    assert not add(source, data).is_changed


def write_volume(path: Path, seed: int) -> None:
    import nibabel

    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(64, 64, 16)), (2, 2, 1))
    x, y, z = np.mgrid[-1:1:64j, -1:1:64j, -1:1:16j]
    voxels = np.where(x**2 + y**2 + z**2 < 0.8, 500 + 400 * noise / np.abs(noise).max(), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([3.0, 3.0, 6.0, 1.0])), path)


@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
def test_slices_of_volumes_come_beside_pictures_and_only_once(
    tmp_path: Path, data: Path, source: Path, is_zip: bool
) -> None:
    write_volume(source / "Training/glioma/case.nii.gz", 1)
    draw(source / "Training/glioma/picture.jpg", 10)
    (source / GROUPS_FILE).write_text("path,patient\nTraining/glioma/case.nii.gz,p7\n")
    source = zipped(source, tmp_path / "source.zip") if is_zip else source
    rule = SliceRule(slices_per_volume=3)
    before = content(data)
    assert add(source, data, rule=rule).n_added == 4
    slices = sorted(set(content(data)) - set(before) - {"train/glioma/picture.jpg", GROUPS_FILE})
    assert len(slices) == 3
    assert all(PurePosixPath(path).match("train/glioma/*-axial-*.png") for path in slices)
    assert groups(data) == ["path,patient,plane", *(f"{path},p7,axial" for path in slices)]
    assert not add(source, data, rule=rule).is_changed


def test_a_wrong_volume_is_named_where_the_person_has_it(tmp_path: Path, data: Path, source: Path) -> None:
    write_volume(source / "Training/glioma/case.nii", 1)
    (source / "Training/glioma/other.nii").write_bytes(b"no volume")
    archive = zipped(source, tmp_path / "source.zip")
    before = content(data)
    with pytest.raises(UserError) as error:
        add(archive, data)
    assert f"{archive} holds" in str(error.value)
    assert "Training/glioma/other.nii" in str(error.value)
    assert content(data) == before


def test_there_must_be_a_data_set_to_add_to(tmp_path: Path, source: Path) -> None:
    draw(source / "glioma/x.jpg", 10)
    with pytest.raises(UserError, match="data is missing; run 'dvc pull' or 'braintumor data import'"):
        add(source, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failure_in_the_middle_leaves_the_data_set_as_it_was(
    data: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (10, 11):
        draw(source / f"glioma/{seed}.jpg", seed)
    before = content(data)

    def full(*files: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"glioma/10\.jpg can't be copied .*No space left"):
        add(source, data)
    assert content(data) == before
