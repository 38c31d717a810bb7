import shutil
import tempfile
from pathlib import Path

import pytest

from braintumor.artifacts import GROUPS_FILE
from braintumor.data.contents import dataset_md5
from braintumor.data.growth import add_images
from braintumor.data.relabel import RelabelSummary, relabel
from braintumor.errors import UserError

THERE = ("train/glioma/a.jpg", "train/glioma/b.jpg", "train/pituitary/a.jpg", "test/notumor/c.jpg")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in THERE:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(f"pixels of {name}".encode())
    return tmp_path / "data"


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def correct(data: Path, *rows: str, header: str = "path,new_label", **options: bool) -> RelabelSummary:
    file = data.parent / "corrections.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    summary = relabel(file, data, **options)
    assert not list(data.parent.glob(".data.*"))
    return summary


def test_images_move_to_their_new_class_and_keep_split_name_and_file(data: Path) -> None:
    before = content(data)
    inode = (data / "train/glioma/b.jpg").stat().st_ino
    summary = correct(data, "train/glioma/b.jpg,meningioma", "test/notumor/c.jpg,no_tumor", "train/glioma/a.jpg,")
    before["train/meningioma/b.jpg"] = before.pop("train/glioma/b.jpg")
    assert content(data) == before
    assert (data / "train/meningioma/b.jpg").stat().st_ino == inode
    assert summary.moved == {"train/glioma/b.jpg": "train/meningioma/b.jpg"}
    assert summary.n_unchanged == 1
    assert summary.before["train"] == {"glioma": 2, "meningioma": 0, "notumor": 0, "pituitary": 1}
    assert summary.after["train"] == {"glioma": 1, "meningioma": 1, "notumor": 0, "pituitary": 1}
    assert not (data.parent / "data-removed").exists()


def test_the_list_of_odd_images_is_taken_as_it_is(data: Path) -> None:
    before = content(data)
    header = "path,label,reasons,score,new_label"
    rows = ('train/glioma/a.jpg,glioma,"a frame, an arrow",0.5,', 'train/glioma/b.jpg,glioma,"two\nlines",0.25,')
    summary = correct(data, *rows, header=header)
    assert (summary.is_changed, content(data)) == (False, before)
    correct(data, rows[0] + " Pituitary ", rows[1], header=header)
    assert content(data)["train/pituitary/a-2.jpg"] == "pixels of train/glioma/a.jpg"


def test_a_name_that_is_taken_gets_a_number_and_groups_csv_follows(data: Path) -> None:
    (data / GROUPS_FILE).write_text("path,patient,origin\ntrain/glioma/a.jpg,p1,phantom\ntrain/pituitary/a.jpg,p2,\n")
    correct(data, "train/glioma/a.jpg,pituitary")
    assert content(data) == {
        "train/glioma/b.jpg": "pixels of train/glioma/b.jpg",
        "train/pituitary/a.jpg": "pixels of train/pituitary/a.jpg",
        "train/pituitary/a-2.jpg": "pixels of train/glioma/a.jpg",
        "test/notumor/c.jpg": "pixels of test/notumor/c.jpg",
        GROUPS_FILE: "path,patient,origin\ntrain/pituitary/a-2.jpg,p1,phantom\ntrain/pituitary/a.jpg,p2,\n",
    }


def test_removed_images_stand_beside_the_data_set_and_come_back_with_their_patients(data: Path) -> None:
    (data / GROUPS_FILE).write_text(
        "path,patient\ntest/notumor/c.jpg,p3\ntrain/glioma/a.jpg,p1\ntrain/glioma/b.jpg,p2\n"
    )
    before = content(data)
    summary = correct(data, "train/glioma/a.jpg,remove", "train/glioma/b.jpg,Remove")
    removed = data.parent / "data-removed"
    assert content(removed) == {
        ".gitignore": "*\n",
        "train/glioma/a.jpg": before["train/glioma/a.jpg"],
        "train/glioma/b.jpg": before["train/glioma/b.jpg"],
        GROUPS_FILE: "path,patient\ntrain/glioma/a.jpg,p1\ntrain/glioma/b.jpg,p2\n",
    }
    assert content(data)[GROUPS_FILE] == "path,patient\ntest/notumor/c.jpg,p3\n"
    assert set(summary.removed) == {"train/glioma/a.jpg", "train/glioma/b.jpg"}
    assert f"'braintumor data import --add --copies add {removed}'" in str(summary)
    add_images(removed, data, 0.9)
    assert content(data) == before


def test_an_image_removed_later_takes_no_place_of_another(data: Path) -> None:
    correct(data, "train/glioma/a.jpg,remove")
    (data / "train/glioma/a.jpg").write_text("another image")
    correct(data, "train/glioma/a.jpg,remove")
    removed = content(data.parent / "data-removed")
    assert removed["train/glioma/a.jpg"] == "pixels of train/glioma/a.jpg"
    assert removed["train/glioma/a-2.jpg"] == "another image"


@pytest.mark.parametrize(
    "rows",
    [
        ("train/glioma/b.jpg,meningioma",),
        ("train/glioma/a.jpg,remove", "train/glioma/b.jpg,notumor"),
        # Names that change places, and one that becomes free.
        ("train/glioma/a.jpg,pituitary", "train/pituitary/a.jpg,glioma"),
        ("train/glioma/a.jpg,pituitary", "train/pituitary/a.jpg,remove"),
    ],
)
def test_corrections_applied_twice_do_no_harm_and_say_where_the_images_are(data: Path, rows: tuple[str, ...]) -> None:
    images = sorted(content(data).values())
    first = correct(data, *rows)
    once, inode = content(data), data.stat().st_ino
    kept = content(data.parent / "data-removed") if first.removed else {}
    second = correct(data, *rows)
    assert (content(data), data.stat().st_ino) == (once, inode)
    assert sorted([*once.values(), *(kept[name] for name in first.removed)]) == images
    assert (second.is_changed, len(second.already)) == (False, len(rows))
    assert set(first.moved.values()) <= set(second.already.values())


def test_new_rows_are_applied_beside_old_ones(data: Path) -> None:
    correct(data, "train/glioma/b.jpg,meningioma")
    summary = correct(data, "train/glioma/b.jpg,meningioma", "train/glioma/a.jpg,notumor")
    assert summary.already == {"train/glioma/b.jpg": "train/meningioma/b.jpg"}
    assert summary.moved == {"train/glioma/a.jpg": "train/notumor/a.jpg"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (("train/glioma/b.jpg,notumor", "train/glioma/z.jpg,notumor"), "row 3: train/glioma/z.jpg"),
        (("train/glioma/b.jpg,notumor", ",notumor", "/etc/passwd,remove"), "row 3: no path, row 4: /etc/passwd"),
        (("train/glioma/z.jpg,remove",), "row 2: train/glioma/z.jpg"),
        (("../data/train/glioma/a.jpg,remove",), "row 2: ../data/train/glioma/a.jpg"),
        (("train/glioma/b.jpg,notumor", "train/glioma/a.jpg,astro"), "row 3: new_label 'astro' is none of glioma,"),
        (
            ("train/glioma/b.jpg,notumor", "train/glioma/a.jpg,", "train/glioma/b.jpg,remove"),
            "rows 2 and 4: train/glioma/b.jpg is to be notumor and remove; keep one",
        ),
    ],
)
def test_a_wrong_row_is_named_and_nothing_changes(data: Path, rows: tuple[str, ...], told: str) -> None:
    before = content(data)
    with pytest.raises(UserError) as error:
        correct(data, *rows)
    assert told in str(error.value)
    assert content(data) == before
    assert sorted(path.name for path in data.parent.iterdir()) == ["corrections.csv", "data"]


@pytest.mark.parametrize("header", ["path;new_label", "file,new_label", "path,label"])
def test_a_file_without_the_columns_says_which_it_needs(data: Path, header: str) -> None:
    with pytest.raises(UserError, match="it needs path,new_label, with commas between"):
        correct(data, header=header)


def test_a_spreadsheet_s_spelling_of_paths_is_understood(data: Path) -> None:
    rows = ("data/train/glioma/a.jpg,notumor", " train\\glioma\\b.jpg ,notumor", "./train/pituitary/a.jpg,meningioma")
    assert set(correct(data, *rows, header="\ufeffpath,new_label").moved) == set(THERE[:3])


def test_a_dry_run_tells_the_same_and_writes_nothing(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    rows = ("train/glioma/a.jpg,pituitary", "train/glioma/b.jpg,remove")
    version = dataset_md5(data)
    planned = correct(data, *rows, dry_run=True)
    assert dataset_md5(data) == version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corrections.csv", "data", "temporary"]
    assert not list((tmp_path / "temporary").iterdir())
    assert str(correct(data, *rows)) == str(planned)


def test_a_missing_file_and_a_missing_data_set_are_named(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.csv is missing"):
        relabel(tmp_path / "gone.csv", data)
    shutil.rmtree(data)
    with pytest.raises(UserError, match="data is missing"):
        correct(data, "train/glioma/a.jpg,remove")


def test_removed_images_of_like_names_do_not_replace_one_another(data: Path) -> None:
    (data / "train/glioma/a-2.jpg").write_bytes(b"pixels of another")
    kept = data.parent / "data-removed/train/glioma/a.jpg"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"removed long ago")
    summary = correct(data, "train/glioma/a.jpg,remove", "train/glioma/a-2.jpg,remove")
    assert len(set(summary.removed.values())) == 2
    stand = {file.read_bytes() for file in (data.parent / "data-removed/train/glioma").iterdir()}
    assert stand == {b"removed long ago", b"pixels of another", b"pixels of train/glioma/a.jpg"}


def test_a_removed_image_is_a_file_where_the_data_set_holds_a_link(data: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache"
    (data / "train/glioma/a.jpg").rename(cached)
    (data / "train/glioma/a.jpg").symlink_to(cached)
    correct(data, "train/glioma/a.jpg,remove")
    kept = data.parent / "data-removed/train/glioma/a.jpg"
    assert not kept.is_symlink()
    assert kept.read_bytes() == b"pixels of train/glioma/a.jpg"


@pytest.mark.parametrize("row", ["train/glioma/a.jpg,remove,", "train/glioma/a.jpg,remove,oops"])
def test_a_row_with_too_many_fields_never_counts_as_nothing_to_do(data: Path, row: str) -> None:
    try:
        assert correct(data, row).removed
    except UserError as error:
        assert "more fields" in str(error)
        assert (data / "train/glioma/a.jpg").is_file()


def test_a_row_of_groups_csv_for_an_image_that_is_gone_is_refused(data: Path) -> None:
    (data / GROUPS_FILE).write_text("path,patient\ntrain/glioma/gone.jpg,p1\n")
    with pytest.raises(UserError, match=r"names images that are not there: train/glioma/gone\.jpg"):
        correct(data, "train/glioma/a.jpg,pituitary")
