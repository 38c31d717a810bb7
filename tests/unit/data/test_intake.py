import fcntl
import os
import stat
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from braintumor.data.contents import dataset_md5
from braintumor.data.intake import import_dataset
from braintumor.data.layout import HIDDEN, NOT_IMAGES, OUTSIDE
from braintumor.errors import UserError

KAGGLE = (
    "Training/glioma/Tr-gl_1.jpg",
    "Training/meningioma_tumor/Tr-me_1.jpg",
    "Training/No_Tumor/Tr-no_1.JPG",
    "Training/pituitary/Tr-pi_1.png",
    "Testing/glioma_tumor/Te-gl_1.jpg",
    "Testing/notumor/Te-no_1.jpg",
)
IMPORTED = [
    "test/glioma/Te-gl_1.jpg",
    "test/notumor/Te-no_1.jpg",
    "train/glioma/Tr-gl_1.jpg",
    "train/meningioma/Tr-me_1.jpg",
    "train/notumor/Tr-no_1.JPG",
    "train/pituitary/Tr-pi_1.png",
]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"pixels of {name}".encode())
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in files(folder):
            file.write(folder / name, name)
    return archive


@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("around", ["", "archive/"], ids=["plain", "nested"])
def test_a_kaggle_layout_becomes_ours_byte_for_byte(tmp_path: Path, is_zip: bool, around: str) -> None:
    source = fill(tmp_path / "source", *(around + name for name in KAGGLE), around + "readme.txt", "__MACOSX/a.jpg")
    if is_zip:
        source = zipped(source, tmp_path / "archive.zip")
    ticks: list[int] = []
    summary = import_dataset(source, tmp_path / "data", lambda title, total: lambda: ticks.append(total))
    assert files(tmp_path / "data") == IMPORTED
    assert (tmp_path / "data/train/notumor/Tr-no_1.JPG").read_bytes().endswith(b"Training/No_Tumor/Tr-no_1.JPG")
    assert ticks == [6] * 6
    assert summary.n_images == 6
    assert summary.after["test"] == {"glioma": 1, "meningioma": 0, "notumor": 1, "pituitary": 0}
    assert (summary.skipped[HIDDEN], summary.skipped[NOT_IMAGES]) == (1, 1)
    assert not summary.is_flat
    assert "no images of" not in str(summary)
    assert not list(tmp_path.glob(".data.*"))


def test_an_image_stays_the_same_file(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    image = source / "Training/glioma/real.jpg"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(image)
    import_dataset(source, tmp_path / "data")
    assert (tmp_path / "data/train/glioma/real.jpg").read_bytes() == image.read_bytes()


def test_plain_class_folders_all_go_to_train_and_the_summary_says_so(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", "glioma/1.jpg", "no/2.jpg", "pituitary_tumor/3.jpg")
    summary = import_dataset(source, tmp_path / "data")
    assert files(tmp_path / "data") == ["train/glioma/1.jpg", "train/notumor/2.jpg", "train/pituitary/3.jpg"]
    assert summary.is_flat
    assert summary.before["train"] == dict.fromkeys(("glioma", "meningioma", "notumor", "pituitary"), 0)
    assert "no test folder" in str(summary)
    assert "no images of meningioma" in summary.notes
    assert "a single image of glioma, notumor, pituitary" in summary.notes


def test_our_own_layout_is_understood_and_hidden_files_stay_behind(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *IMPORTED, "train/glioma/.hidden.jpg", ".git/x.jpg", "stray.jpg")
    summary = import_dataset(source, tmp_path / "data")
    assert files(tmp_path / "data") == IMPORTED
    assert (summary.skipped[HIDDEN], summary.skipped[OUTSIDE]) == (2, 1)


def test_two_files_of_one_name_get_distinct_names_and_always_the_same(tmp_path: Path) -> None:
    names = ("Training/no/a.jpg", "Training/notumor/A.jpg", "Training/notumor/A-2.jpg", "train/no_tumor/a.jpg")
    source = fill(tmp_path / "source", *names)
    summaries = [import_dataset(source, tmp_path / f"data{number}") for number in (1, 2)]
    assert files(tmp_path / "data1") == [f"train/notumor/{name}" for name in ("A-2.jpg", "A-3.jpg", "a-4.jpg", "a.jpg")]
    assert (tmp_path / "data1/train/notumor/a.jpg").read_bytes() == b"pixels of Training/no/a.jpg"
    assert (tmp_path / "data1/train/notumor/A-2.jpg").read_bytes() == b"pixels of Training/notumor/A-2.jpg"
    assert summaries[0].renamed == summaries[1].renamed
    assert len(summaries[0].renamed) == 2
    for name in files(tmp_path / "data1"):
        assert (tmp_path / "data1" / name).read_bytes() == (tmp_path / "data2" / name).read_bytes()


def test_patients_are_carried_over_with_the_new_paths(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *(f"deep/{name}" for name in KAGGLE))
    (source / "deep/groups.csv").write_text(
        "path,patient\nTraining/No_Tumor/Tr-no_1.JPG,p1\nTesting/notumor/Te-no_1.jpg,p2\n"
    )
    summary = import_dataset(source, tmp_path / "data")
    assert summary.has_patients
    carried = (tmp_path / "data/groups.csv").read_text()
    assert carried == "path,patient\ntest/notumor/Te-no_1.jpg,p2\ntrain/notumor/Tr-no_1.JPG,p1\n"


@pytest.mark.parametrize("content", ["path,patient\nTraining/glioma/gone.jpg,p1\n", "file,patient\nx,y\n", ""])
def test_a_wrong_groups_csv_is_refused_and_the_target_stays(tmp_path: Path, content: str) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    (source / "groups.csv").write_text(content)
    fill(tmp_path / "data", "train/glioma/old.jpg")
    with pytest.raises(UserError, match=r"groups\.csv"):
        import_dataset(source, tmp_path / "data")
    assert files(tmp_path / "data") == ["train/glioma/old.jpg"]
    assert not list(tmp_path.glob(".data.*"))


def test_a_read_only_source_can_be_imported_and_the_copies_can_be_written(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    for path in [*source.rglob("*"), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    import_dataset(source, tmp_path / "data")
    assert (tmp_path / "data/train/glioma/Tr-gl_1.jpg").stat().st_mode & stat.S_IWUSR
    for path in [source, *source.rglob("*")]:
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("names", "fact"),
    [
        ((), "holds no images among its 0 files"),
        (("Training/glioma/readme.txt",), "holds no images among its 1 files"),
        (("cats/1.jpg", "dogs/2.jpg"), "in cats, dogs, but no class folder"),
        (("a/b/Training/glioma/1.jpg",), "no class folder"),
        (("one/glioma/1.jpg", "two/glioma/1.jpg"), "several data sets: one, two"),
        (("Training/glioma/1.jpg", "Training/astrocytoma/2.jpg"), "Training/astrocytoma, which is none of the four"),
    ],
)
def test_a_source_in_another_layout_is_refused(tmp_path: Path, names: tuple[str, ...], fact: str) -> None:
    (tmp_path / "source").mkdir()
    fill(tmp_path / "source", *names)
    with pytest.raises(UserError, match=fact):
        import_dataset(tmp_path / "source", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["../glioma/evil.jpg", "/glioma/evil.jpg", "glioma/../../evil.jpg", "C:/glioma/a.jpg"])
def test_a_zip_entry_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("glioma/1.jpg", b"x")
        archive.writestr(name, b"x")
    with pytest.raises(UserError, match="leads out of the archive"):
        import_dataset(tmp_path / "evil.zip", tmp_path / "data")
    assert files(tmp_path) == ["evil.zip"]


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("glioma/1.jpg")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(UserError, match="holds the link"):
        import_dataset(tmp_path / "evil.zip", tmp_path / "data")


def test_a_damaged_zip_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    archive = zipped(fill(tmp_path / "source", *KAGGLE), tmp_path / "archive.zip")
    content = bytearray(archive.read_bytes())
    place = content.index(b"Training/glioma/Tr-gl_1.jpg") + 30
    content[place : place + 8] = b"\xff" * 8
    archive.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        import_dataset(archive, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.glob(".data.*"))


def test_a_file_that_is_no_zip_and_a_missing_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        import_dataset(tmp_path / "notes.txt", tmp_path / "data")
    with pytest.raises(UserError, match="is missing"):
        import_dataset(tmp_path / "gone", tmp_path / "data")


def test_links_out_of_the_source_are_refused_and_links_within_are_followed(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    (source / "Training/glioma/linked.jpg").symlink_to(source / "Testing/notumor/Te-no_1.jpg")
    import_dataset(source, tmp_path / "data")
    assert not (tmp_path / "data/train/glioma/linked.jpg").is_symlink()
    assert (tmp_path / "data/train/glioma/linked.jpg").read_bytes() == b"pixels of Testing/notumor/Te-no_1.jpg"
    fill(tmp_path, "outside/glioma/secret.jpg")
    for end in (tmp_path / "outside", tmp_path / "outside/glioma/secret.jpg"):
        (source / "Training/glioma/out.jpg").symlink_to(end)
        with pytest.raises(UserError, match="leads out of the source"):
            import_dataset(source, tmp_path / "data")
        (source / "Training/glioma/out.jpg").unlink()


def test_a_target_that_is_no_data_set_is_never_replaced(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    fill(tmp_path / "home", "train/glioma/1.jpg", "letters/love.txt")
    fill(tmp_path / "pets", "train/cats/1.jpg")
    for target, foreign in (("home", "letters"), ("pets", "train/cats")):
        before = files(tmp_path / target)
        with pytest.raises(UserError, match=f"more than a data set: {foreign}"):
            import_dataset(source, tmp_path / target)
        assert files(tmp_path / target) == before


def test_source_and_target_may_not_lie_in_one_another(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    for target in (source, source / "data", tmp_path):
        with pytest.raises(UserError, match="lie in one another"):
            import_dataset(source, target)
    assert files(source) == sorted(KAGGLE)


def test_an_earlier_data_set_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "data", "train/glioma/old.jpg", "groups.csv", ".DS_Store")
    summary = import_dataset(fill(tmp_path / "source", *KAGGLE), tmp_path / "data", discard=True)
    assert files(tmp_path / "data") == IMPORTED
    assert summary.before["train"]["glioma"] == 1


def test_images_that_dvc_does_not_hold_are_not_replaced_unless_somebody_says_so(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    data = fill(tmp_path / "data", "train/glioma/old.jpg")
    for pointer in (None, "outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  path: data\n", "outs: []\n", "{"):
        if pointer is not None:
            (tmp_path / "data.dvc").write_text(pointer)
        with pytest.raises(UserError, match="run 'dvc add data' first, or give --discard"):
            import_dataset(source, data)
        assert files(data) == ["train/glioma/old.jpg"]
    (tmp_path / "data.dvc").write_text(f"outs:\n- md5: {dataset_md5(data)}.dir\n  path: data\n")
    import_dataset(source, data)
    assert files(data) == IMPORTED


def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("temporary", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    source = zipped(fill(tmp_path / "source", *KAGGLE, "Training/no/Tr-no_1.JPG"), tmp_path / "archive.zip")
    before = files(tmp_path)
    planned = import_dataset(source, tmp_path / "work/deep/data", dry_run=True)
    assert files(tmp_path) == before
    assert not list((tmp_path / "temporary").iterdir())
    assert not list((tmp_path / "work").iterdir())
    assert str(import_dataset(source, tmp_path / "work/deep/data")) == str(planned)
    assert planned.renamed == {"Training/no/Tr-no_1.JPG": "train/notumor/Tr-no_1-2.JPG"}


def test_a_target_moved_aside_by_a_killed_import_comes_back(tmp_path: Path) -> None:
    fill(tmp_path / ".data.previous-x1", "train/glioma/old.jpg")
    fill(tmp_path / ".data.partial-x1", "train/glioma/new.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        import_dataset(tmp_path / "empty", tmp_path / "data")
    assert files(tmp_path / "data") == ["train/glioma/old.jpg"]
    assert not list(tmp_path.glob(".data.*"))


def test_several_targets_moved_aside_are_named_rather_than_chosen_from(tmp_path: Path) -> None:
    for number in (1, 2):
        fill(tmp_path / f".data.previous-x{number}", "train/glioma/old.jpg")
    with pytest.raises(UserError, match=r"\.data\.previous-x1, .*\.data\.previous-x2"):
        import_dataset(fill(tmp_path / "source", *KAGGLE), tmp_path / "data")
    assert len(list(tmp_path.glob(".data.previous-*"))) == 2


def test_a_second_import_beside_a_running_one_is_refused(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", *KAGGLE)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another command is changing"):
        import_dataset(source, tmp_path / "data")
    os.close(folder)
    import_dataset(source, tmp_path / "data")
    assert files(tmp_path / "data") == IMPORTED
