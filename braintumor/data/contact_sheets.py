"""Contact sheets: small pictures of the images that a person should look at side by side.

A sheet is a JPEG; page and sheet name the same images in the same order, so that nobody needs the picture to know what
is on it. Images that privacy keeps back are grey tiles, and a sheet of nothing else is not drawn.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from braintumor.data.oddities import KINDS
from braintumor.data.privacy import may_be_shown, shown_names
from braintumor.model.images import UnreadableImage, open_image, to_grey
from braintumor.params import PrivacyParams

LARGEST_GROUPS = 24
GROUPS_ACROSS = 24
CONFLICTING_GROUPS = 50
IMAGES_PER_GROUP = 12
IMAGES_PER_KIND = 60
IMAGES_PER_SHEET = 20
COLUMNS = 4

TILE_PX = 112
GAP_PX = 6
CAPTION_PX = 28
FONT_PX = 11
JPEG_QUALITY = 72
GROUND, HIDDEN, INK = (24, 24, 24), (96, 96, 96), (235, 235, 235)


@dataclass(frozen=True)
class Sheet:
    """Images that belong together, and their picture."""

    title: str  # the group, or the kind of oddity
    n_images: int  # as many there are; `names` may be fewer
    names: tuple[str, ...]  # '<shown name>, <label>, <declared split>' of each image, in the order of the tiles
    picture: bytes | None = None  # a JPEG; None: none of the images may be shown
    size: tuple[int, int] = (0, 0)  # of the picture: width and height


def draw_copies(dataset: Path, images: pd.DataFrame, privacy: PrivacyParams) -> dict[str, list[Sheet]]:
    """Sheets of groups of copies: the 'largest', some 'across' the declared splits, and label 'conflicts'.

    `images` is a manifest. Which groups are shown of those across the splits is left to chance, by a digest of the
    group: the same groups, whatever else there is.
    """
    groups = images.groupby("duplicate_group")
    facts = groups.agg(size=("path", "size"), splits=("declared_split", "nunique"), labels=("label", "nunique"))
    facts = facts[facts["size"] > 1].sort_index().sort_values("size", ascending=False, kind="stable")
    across = facts.index[facts["splits"] > 1]
    chosen: dict[str, tuple[list[str], str]] = {
        "largest": (list(facts.index[:LARGEST_GROUPS]), "declared_split"),
        "across": (sorted(across, key=_digest)[:GROUPS_ACROSS], "declared_split"),
        "conflicts": (list(facts.index[facts["labels"] > 1][:CONFLICTING_GROUPS]), "label"),
    }
    artist = _Artist(dataset, images, privacy)
    return {
        topic: [artist.draw(name, facts["size"][name], _mix(groups.get_group(name), column)) for name in names]
        for topic, (names, column) in chosen.items()
    }


def draw_odd_images(
    dataset: Path, images: pd.DataFrame, kinds: "pd.Series[Any]", privacy: PrivacyParams
) -> dict[str, list[Sheet]]:
    """Sheets of odd images by kind; `kinds` holds a tuple of kinds for each row of the manifest `images`."""
    artist = _Artist(dataset, images, privacy)
    sheets = {}
    for kind in KINDS:
        is_odd = np.array([kind in its for its in kinds], bool)
        if not is_odd.any():
            continue
        rows = images[is_odd].sort_values("path")
        shown = rows.head(IMAGES_PER_KIND)
        parts = [shown[start : start + IMAGES_PER_SHEET] for start in range(0, len(shown), IMAGES_PER_SHEET)]
        sheets[kind] = [artist.draw(kind, len(rows), part) for part in parts]
    return sheets


def _mix(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The first rows by path, taken in turns from each value of `column`, as many as a group may show."""
    turns = [list(part.index) for _, part in rows.sort_values("path").groupby(column)]
    taken = [index for turn in zip_longest(*turns) for index in turn if index is not None][:IMAGES_PER_GROUP]
    return rows.loc[taken].sort_values([column, "path"])


def _digest(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()


class _Artist:
    """Draws sheets of one manifest."""

    def __init__(self, dataset: Path, images: pd.DataFrame, privacy: PrivacyParams) -> None:
        self.dataset = dataset
        self.names = shown_names(images, privacy)
        self.is_shown = may_be_shown(images, privacy) & images["is_readable"]

    def draw(self, title: str, n_images: int, rows: pd.DataFrame) -> Sheet:
        """The sheet of `rows`, some of `n_images`."""
        names = [self.names[index] for index in rows.index]
        labels, splits = rows["label"].tolist(), rows["declared_split"].tolist()
        lines = tuple(f"{name}, {label}, {split}" for name, label, split in zip(names, labels, splits, strict=True))
        if not self.is_shown[rows.index].any():
            return Sheet(title, n_images, lines)
        # Pillow releases the interpreter lock while it decodes: threads are enough.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tiles = list(pool.map(self._tile, rows.index, rows["path"]))
        captions = [
            (Path(name).stem, f"{label}, {split}") for name, label, split in zip(names, labels, splits, strict=True)
        ]
        sheet = compose(tiles, captions)
        picture = io.BytesIO()
        sheet.save(picture, "JPEG", quality=JPEG_QUALITY, optimize=True)
        return Sheet(title, n_images, lines, picture.getvalue(), sheet.size)

    def _tile(self, index: Any, path: str) -> Image.Image | None:
        if not self.is_shown[index]:
            return None
        try:
            image = open_image(self.dataset / path)
            # Colours tell a banner or a drawn arrow; other modes become what the model sees.
            picture = image if image.mode == "RGB" else Image.fromarray(to_grey(image, self.dataset / path))
        except UnreadableImage:
            return None
        picture.thumbnail((TILE_PX, TILE_PX), Image.Resampling.BOX, reducing_gap=2.0)
        return picture.convert("RGB")


def compose(tiles: Sequence[Image.Image | None], captions: Sequence[tuple[str, str]]) -> Image.Image:
    """A numbered grid of tiles, each with its two lines; a tile that is None is grey."""
    columns = min(COLUMNS, len(tiles))
    width, height = TILE_PX + GAP_PX, TILE_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (columns * width + GAP_PX, -(-len(tiles) // columns) * height + GAP_PX), GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = GAP_PX + place % columns * width, GAP_PX + place // columns * height
        if tile is None:
            pen.rectangle((left, top, left + TILE_PX - 1, top + TILE_PX - 1), fill=HIDDEN)
            pen.text((left + TILE_PX // 2, top + TILE_PX // 2), "not shown", INK, font, anchor="mm")
        else:
            sheet.paste(tile, (left + (TILE_PX - tile.width) // 2, top + (TILE_PX - tile.height) // 2))
        for number, line in enumerate(caption):
            fitting = _fit(f"{place + 1} {line}" if number == 0 else line, font)
            pen.text((left, top + TILE_PX + 1 + number * (CAPTION_PX // 2)), fitting, INK, font)
    return sheet


def _fit(text: str, font: Any) -> str:
    """The text, its middle left out until it is no wider than a tile."""
    for count in range(len(text), 0, -1):
        shorter = text if count == len(text) else f"{text[: (count + 1) // 2]}…{text[len(text) - count // 2 :]}"
        if font.getlength(shorter) <= TILE_PX:
            return shorter
    return ""
