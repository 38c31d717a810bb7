"""Galleries of the report: test images beside what speaks, to the model, for their class.

Picture and lines name the same images in the same order, so that nobody needs the picture to know what is on it. Images
that privacy keeps back are grey tiles, and a gallery of nothing else has no picture.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from braintumor.data.contact_sheets import GAP_PX, GROUND, HIDDEN, INK
from braintumor.data.privacy import may_be_shown, shown_names
from braintumor.labels import CLASS_NAMES
from braintumor.model.gradcam import heat_maps, overlay
from braintumor.model.images import decode_grey, resize_square
from braintumor.model.inference import image_size_px
from braintumor.params import PrivacyParams

if TYPE_CHECKING:
    import keras

PANEL_PX = 150
CAPTION_PX = 17
FONT_PX = 13
MAX_BYTES = 250_000
JPEG_QUALITIES = (80, 60, 40)
# A phone shows so many panels side by side, and still a lesion.
PANELS_ACROSS = 4
HOW_TO_READ = (
    "Each image stands beside a copy with the heat map of {shown}: the lighter the colour, the more speaks for the "
    "class there; the white line is at half of the peak."
)
ONE_A_GROUP = "Of copies of one slice, or slices of one patient, one is shown."


@dataclass(frozen=True)
class Gallery:
    """Images that belong together, and their picture."""

    title: str
    told: str  # one or two sentences: which images these are, and how to read the picture
    lines: tuple[str, ...]  # what the picture shows, a line a tile, in the order of the tiles
    picture: bytes | None = None  # a JPEG; None: none of the images may be shown
    size: tuple[int, int] = (0, 0)  # of the picture: width and height


def draw_galleries(
    dataset: Path, model: "keras.Model", rows: pd.DataFrame, privacy: PrivacyParams, n: int
) -> list[Gallery]:
    """Galleries of at most `n` right, wrong and most uncertain images; none where `n` is 0 or there are no such images.

    `rows` holds path, group, label, predicted, confidence (of the predicted class), sha256 and is_phantom of each test
    image. A gallery shows one image of a group at most, lest it be filled by copies of one.
    """
    rows = rows.sort_values("path", ignore_index=True)
    is_right = rows["label"] == rows["predicted"]
    artist = _Artist(dataset, model, rows, privacy)
    right = _of_each_class(rows[is_right], n)
    wrong = rows[~is_right].sort_values("confidence", ascending=False, kind="stable").drop_duplicates("group")[:n]
    uncertain = rows.sort_values("confidence", kind="stable").drop_duplicates("group")[:n]
    kinds = {
        "Right": (right, f"{len(right)} of {is_right.sum():,} images that the model names rightly, of each class."),
        "Wrong": (wrong, f"{len(wrong)} of {(~is_right).sum():,} mistakes: those that the model is surest of."),
        "Most uncertain": (uncertain, "The images whose most probable class is least probable."),
    }
    return [
        artist.draw(title, f"{told} {ONE_A_GROUP}", chosen) for title, (chosen, told) in kinds.items() if len(chosen)
    ]


def _of_each_class(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """`n` rows of different groups, the classes in turn; of each those with the first digests: chance chooses."""
    ordered = rows.sort_values("sha256").drop_duplicates("group")
    turn = ordered.groupby("label").cumcount()
    return ordered.assign(turn=turn).sort_values(["turn", "label"], kind="stable")[:n].sort_values(["label", "path"])


class _Artist:
    """Draws galleries of one set of predictions."""

    def __init__(self, dataset: Path, model: "keras.Model", rows: pd.DataFrame, privacy: PrivacyParams) -> None:
        self.dataset = dataset
        self.model = model
        self.names = shown_names(rows, privacy).to_dict()
        self.is_shown = may_be_shown(rows, privacy)

    def draw(self, title: str, told: str, rows: pd.DataFrame) -> Gallery:
        """The gallery of `rows`; where all are wrong, with the heat map of the true class, too."""
        is_wrong = bool((rows["label"] != rows["predicted"]).all())
        columns = ["predicted", "label"] if is_wrong else ["predicted"]
        numbered = enumerate(rows.itertuples(), 1)
        lines = tuple(f"{number} {self.names[row.Index]}: {_verdict(row)}" for number, row in numbered)
        shown = "the predicted class, then with that of the true one" if is_wrong else "the predicted class"
        told = f"{told} {HOW_TO_READ.format(shown=shown)}"
        is_shown = self.is_shown[rows.index].to_numpy(bool)
        if not is_shown.any():
            return Gallery(title, told, lines)
        panels = iter(self._panels(rows[is_shown], columns))
        tiles = [next(panels) if may else None for may in is_shown]
        captions = [
            (f"{number} {Path(self.names[row.Index]).stem}", _verdict(row))
            for number, row in enumerate(rows.itertuples(), 1)
        ]
        sheet = _compose(tiles, captions, n_panels=1 + len(columns))
        return Gallery(title, told, lines, _as_jpeg(sheet), sheet.size)

    def _panels(self, rows: pd.DataFrame, columns: Sequence[str]) -> list[list[Image.Image]]:
        greys = [decode_grey(self.dataset / path) for path in rows["path"]]
        size_px = image_size_px(self.model)
        images = np.stack([resize_square(grey, size_px)[..., None] for grey in greys])
        classes = np.stack([rows[column].map(CLASS_NAMES.index) for column in columns], axis=1)
        large = [resize_square(grey, PANEL_PX) for grey in greys]
        maps = heat_maps(self.model, images, classes)
        return [
            [Image.fromarray(image).convert("RGB"), *(overlay(image, heat) for heat in of_image)]
            for image, of_image in zip(large, maps, strict=True)
        ]


def _verdict(row: object) -> str:
    label, predicted, confidence = (getattr(row, name) for name in ("label", "predicted", "confidence"))
    said = f"{predicted} {confidence:.1%}"
    return said if predicted == label else f"{said}, is {label}"


def _compose(
    tiles: Sequence[list[Image.Image] | None], captions: Sequence[tuple[str, str]], n_panels: int
) -> Image.Image:
    """A grid of tiles of `n_panels` panels and two lines each; a tile that is None is grey."""
    columns = min(max(1, PANELS_ACROSS // n_panels), len(tiles))
    width, height = n_panels * PANEL_PX + GAP_PX, PANEL_PX + 2 * CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (columns * width + GAP_PX, -(-len(tiles) // columns) * height + GAP_PX), GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = GAP_PX + place % columns * width, GAP_PX + place // columns * height
        if tile is None:
            right, bottom = left + n_panels * PANEL_PX, top + PANEL_PX
            pen.rectangle((left, top, right - 1, bottom - 1), fill=HIDDEN)
            pen.text(((left + right) // 2, (top + bottom) // 2), "not shown", INK, font, anchor="mm")
        for number, panel in enumerate(tile or []):
            sheet.paste(panel, (left + number * PANEL_PX, top))
        for number, line in enumerate(caption):
            pen.text((left, top + PANEL_PX + 1 + number * CAPTION_PX), _fit(line, n_panels * PANEL_PX, font), INK, font)
    return sheet


def _fit(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, its end left out until it is no wider."""
    while text and font.getlength(text) > width_px:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text


def _as_jpeg(sheet: Image.Image) -> bytes:
    """The picture, in the best of JPEG_QUALITIES that stays below MAX_BYTES, or the last."""
    for quality in JPEG_QUALITIES:
        content = io.BytesIO()
        sheet.save(content, "JPEG", quality=quality, optimize=True)
        if content.tell() <= MAX_BYTES:
            break
    return content.getvalue()
