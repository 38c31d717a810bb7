"""Masks of lesions, and what the commands that change a data set do with them."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from braintumor.data.contents import list_contents, mask_path
from braintumor.data.growth import add_images
from braintumor.data.intake import import_dataset
from braintumor.data.layout import OUTSIDE
from braintumor.data.masks import load_masks
from braintumor.data.relabel import relabel, removed_folder

IMAGES = ("train/glioma/a.jpg", "train/glioma/b.jpg", "test/pituitary/c.jpg", "test/notumor/d.jpg")


def draw(path: Path, seed: int) -> None:
    """A picture of its own for each seed: no two of them are alike."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(96, 96)), 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype(np.uint8)).save(path)


def outline(path: Path, width: int = 96, height: int = 96) -> None:
    """A mask that covers the upper left quarter."""
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2, : width // 2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images, of which the first and the third have masks."""
    for seed, name in enumerate(IMAGES):
        draw(tmp_path / "data" / name, seed)
    for name in (IMAGES[0], IMAGES[2]):
        outline(tmp_path / "data" / mask_path(name))
    return tmp_path / "data"


def correct(data: Path, row: str) -> None:
    (data.parent / "corrections.csv").write_text(f"path,new_label\n{row}\n")
    relabel(data.parent / "corrections.csv", data)


def test_masks_are_scaled_as_their_images_are(tmp_path: Path, data: Path) -> None:
    wide = "train/glioma/wide.jpg"
    draw(data / wide, 9)
    outline(data / mask_path(wide), width=96, height=48)
    Image.new("L", (96, 96)).save(data / mask_path("train/glioma/b.jpg"))
    masks = load_masks(data, [IMAGES[1], IMAGES[0], IMAGES[3], wide], 32)
    # Without a file, and with one that outlines nothing, there is none.
    assert sorted(masks) == [1, 3]
    expected = np.zeros((32, 32), bool)
    expected[:16, :16] = True
    np.testing.assert_array_equal(masks[1], expected)
    # The image lies in the middle of a black square, and so does its mask.
    expected = np.zeros((32, 32), bool)
    expected[8:16, :16] = True
    np.testing.assert_array_equal(masks[3], expected)


def test_a_mask_that_two_images_could_claim_is_misplaced(data: Path) -> None:
    draw(data / "train/glioma/a.png", 8)
    contents = list_contents(data)
    assert contents.masks == ["masks/test/pituitary/c.png"]
    assert contents.misplaced == ["masks/train/glioma/a.png"]


def test_a_mask_follows_its_image_to_another_class(data: Path) -> None:
    mask = (data / "masks/train/glioma/a.png").read_bytes()
    correct(data, "train/glioma/a.jpg,meningioma")
    assert list_contents(data).masks == ["masks/test/pituitary/c.png", "masks/train/meningioma/a.png"]
    assert (data / "masks/train/meningioma/a.png").read_bytes() == mask
    assert list_contents(data).misplaced == []


def test_a_mask_leaves_with_its_image_and_comes_back_with_it(data: Path) -> None:
    mask = (data / "masks/train/glioma/a.png").read_bytes()
    correct(data, "train/glioma/a.jpg,remove")
    assert list_contents(data).masks == ["masks/test/pituitary/c.png"]
    add_images(removed_folder(data), data, 0.9)
    assert list_contents(data).masks == ["masks/test/pituitary/c.png", "masks/train/glioma/a.png"]
    assert (data / "masks/train/glioma/a.png").read_bytes() == mask


@pytest.mark.parametrize("kind", ["folder", "zip", "folder in a folder"])
def test_masks_are_imported_with_their_images(tmp_path: Path, data: Path, kind: str) -> None:
    source = data
    if kind == "zip":
        source = tmp_path / "data.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in sorted(data.rglob("*.*")):
                archive.write(file, file.relative_to(data))
    if kind == "folder in a folder":
        (tmp_path / "around").mkdir()
        data.rename(tmp_path / "around" / "data")
        source = tmp_path / "around"
    target = tmp_path / "imported"
    summary = import_dataset(source, target)
    contents = list_contents(target)
    assert contents.images == sorted(IMAGES)
    assert contents.masks == ["masks/test/pituitary/c.png", "masks/train/glioma/a.png"]
    assert contents.misplaced == []
    assert summary.skipped[OUTSIDE] == 0
    # A data set with masks can be replaced like any other.
    import_dataset(source, target, discard=True)
    assert list_contents(target).versioned == contents.versioned


def test_masks_of_plain_class_folders_go_where_their_images_go(tmp_path: Path) -> None:
    source = tmp_path / "source"
    draw(source / "glioma_tumor/x.jpg", 1)
    outline(source / "masks/glioma_tumor/x.png")
    import_dataset(source, tmp_path / "data")
    assert list_contents(tmp_path / "data").masks == ["masks/train/glioma/x.png"]


def test_a_mask_that_is_there_is_never_written_over(tmp_path: Path, data: Path) -> None:
    before = {path: (data / path).read_bytes() for path in list_contents(data).versioned}
    source = tmp_path / "source"
    # Of another suffix, so that the image keeps its name, whose mask is there already.
    draw(source / "train/glioma/a.png", 7)
    outline(source / "masks/train/glioma/a.png", 20, 20)
    add_images(source, data, 0.9)
    assert (data / "train/glioma/a.png").is_file()
    assert {path: (data / path).read_bytes() for path in before} == before
