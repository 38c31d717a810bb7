import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.data import contact_sheets
from braintumor.data.contact_sheets import GAP_PX, HIDDEN, TILE_PX, Sheet, draw_copies, draw_odd_images
from braintumor.params import PrivacyParams

EVERYTHING = PrivacyParams(copy_images="all", hash_names=False)
Make = Callable[..., pd.DataFrame]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Images of one grey level each, and their manifest: rows (path, group), phantoms named."""

    def make(rows: list[tuple[str, str]], phantoms: tuple[str, ...] = ()) -> pd.DataFrame:
        for number, (path, _) in enumerate(rows):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((80, 60), 60 + 10 * (number % 16), np.uint8)).save(tmp_path / path)
        splits, labels, _ = zip(*(path.split("/") for path, _ in rows), strict=True)
        return pd.DataFrame(
            {
                "path": [path for path, _ in rows],
                "declared_split": splits,
                "label": labels,
                "duplicate_group": [group for _, group in rows],
                "sha256": [f"{number:064x}" for number in range(len(rows))],
                "is_phantom": [path in phantoms for path, _ in rows],
                "is_readable": True,
            }
        )

    return make


def tile(sheet: bytes, column: int) -> Any:
    """The colour in the middle of a tile of the first row."""
    place = GAP_PX + column * (TILE_PX + GAP_PX) + TILE_PX // 2, GAP_PX + 3 * TILE_PX // 4
    return Image.open(io.BytesIO(sheet)).convert("RGB").getpixel(place)


def titles(sheets: list[Sheet]) -> list[str]:
    return [sheet.title for sheet in sheets]


def test_groups_are_shown_by_size_across_the_splits_and_by_conflict(make: Make, tmp_path: Path) -> None:
    images = make(
        [
            ("train/glioma/1.png", "ga"),
            ("train/glioma/2.png", "ga"),
            ("train/glioma/3.png", "ga"),
            ("test/glioma/4.png", "gb"),
            ("train/glioma/5.png", "gb"),
            ("train/glioma/6.png", "gc"),
            ("train/pituitary/7.png", "gc"),
            ("train/pituitary/8.png", "gd"),
        ]
    )
    sheets = draw_copies(tmp_path, images, EVERYTHING)
    assert {topic: titles(its) for topic, its in sheets.items()} == {
        "largest": ["ga", "gb", "gc"],
        "across": ["gb"],
        "conflicts": ["gc"],
    }
    (conflict,) = sheets["conflicts"]
    assert conflict.names == ("train/glioma/6.png, glioma, train", "train/pituitary/7.png, pituitary, train")
    assert conflict.picture is not None
    assert Image.open(io.BytesIO(conflict.picture)).size == conflict.size
    # The sixth and seventh image are of level 110 and 120.
    assert [np.round(np.mean(tile(conflict.picture, column)), -1) for column in (0, 1)] == [110, 120]


def test_a_large_group_shows_images_of_both_splits(make: Make, tmp_path: Path) -> None:
    images = make([(f"train/glioma/{number:02d}.png", "g") for number in range(20)] + [("test/glioma/x.png", "g")])
    (sheet,) = draw_copies(tmp_path, images, EVERYTHING)["largest"]
    assert sheet.n_images == 21
    assert len(sheet.names) == contact_sheets.IMAGES_PER_GROUP
    assert sheet.names[0] == "test/glioma/x.png, glioma, test"


def test_images_that_privacy_keeps_back_are_grey_tiles_or_no_sheet(make: Make, tmp_path: Path) -> None:
    rows = [("train/glioma/1.png", "ga"), ("train/glioma/2.png", "ga"), ("train/glioma/3.png", "gb")]
    images = make([*rows, ("train/glioma/4.png", "gb")], phantoms=("train/glioma/1.png",))
    phantoms = PrivacyParams(copy_images="phantoms", hash_names=True)
    first, second = draw_copies(tmp_path, images, phantoms)["largest"]
    assert first.picture is not None
    assert np.allclose(tile(first.picture, 0), 60, atol=6)
    assert np.allclose(tile(first.picture, 1), HIDDEN, atol=6)
    assert first.names == ("train/glioma/000000000000.png, glioma, train",) * 2
    assert (second.picture, len(second.names)) == (None, 2)
    none = PrivacyParams(copy_images="none", hash_names=False)
    assert draw_copies(tmp_path, images, none)["largest"][0].picture is None


def test_an_image_that_can_not_be_decoded_is_a_grey_tile(make: Make, tmp_path: Path) -> None:
    images = make([("train/glioma/1.png", "g"), ("train/glioma/2.png", "g")])
    (tmp_path / "train/glioma/2.png").write_bytes(b"no image")
    (sheet,) = draw_copies(tmp_path, images, EVERYTHING)["largest"]
    assert sheet.picture is not None
    assert np.allclose(tile(sheet.picture, 1), HIDDEN, atol=6)


def test_odd_images_come_by_kind_in_sheets_of_bounded_size(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_sheets, "IMAGES_PER_KIND", 5)
    monkeypatch.setattr(contact_sheets, "IMAGES_PER_SHEET", 3)
    images = make([(f"train/glioma/{number}.png", f"g{number}") for number in range(8)])
    kinds = pd.Series([("arrows",), ("banner", "arrows"), *[("arrows",)] * 5, ()], dtype=object)
    sheets = draw_odd_images(tmp_path, images, kinds, EVERYTHING)
    assert list(sheets) == ["banner", "arrows"]
    assert [(sheet.n_images, len(sheet.names)) for sheet in sheets["arrows"]] == [(7, 3), (7, 2)]
    assert sheets["banner"][0].names == ("train/glioma/1.png, glioma, train",)


def test_the_same_images_give_the_same_sheets(make: Make, tmp_path: Path) -> None:
    images = make(
        [(f"{split}/glioma/{number}.png", f"g{number}") for number in range(40) for split in ("train", "test")]
    )
    first, second = (
        draw_copies(tmp_path, rows, EVERYTHING) for rows in (images, images.sample(frac=1, random_state=1))
    )
    assert len(first["across"]) == contact_sheets.GROUPS_ACROSS
    assert first == second


def test_long_and_foreign_names_fit_their_tile(make: Make, tmp_path: Path) -> None:
    name = "train/glioma/" + "a very long name " * 8 + "сріз 断層.png"
    images = make([(name, "g"), ("train/glioma/2.png", "g")])
    (sheet,) = draw_copies(tmp_path, images, EVERYTHING)["largest"]
    assert sheet.picture is not None
    width, _ = Image.open(io.BytesIO(sheet.picture)).size
    assert width == 2 * (TILE_PX + GAP_PX) + GAP_PX
    assert any(name in line for line in sheet.names)


def test_no_images_have_no_sheets(make: Make, tmp_path: Path) -> None:
    nothing = make([("train/glioma/1.png", "g")]).head(0)
    assert draw_copies(tmp_path, nothing, EVERYTHING) == {
        "largest": [],
        "across": [],
        "conflicts": [],
    }
    assert draw_odd_images(tmp_path, nothing, pd.Series([], dtype=object), EVERYTHING) == {}
