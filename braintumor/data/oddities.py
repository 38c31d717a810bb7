"""Odd images: what a person should look at before a model learns from it, and the list that annotators fill in.

The numbers are measured once, when the survey has the image decoded, and stand in the manifest. The kinds follow from
them and the thresholds of the day, so they are computed where they are needed and stored nowhere.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageChops
from scipy.ndimage import label

from braintumor.artifacts import write_text
from braintumor.params import ValidateParams

# What each kind looks at, in the order in which kinds are named.
NUMBERS_OF = {
    "mode": ("mode",),
    "not_square": ("width", "height"),
    "nearly_empty": ("std",),
    "brightness": ("mean",),
    "coloured": ("coloured_share",),
    "banner": ("coloured_line",),
    "white_frame": ("white_line",),
    "arrows": ("mark_length",),
    "edge_filtered": ("sharpness",),
}
KINDS = tuple(NUMBERS_OF)
# RGB with three equal channels is how half of the public sets store their grey.
USUAL_MODES = ("L", "RGB")

# Of 0..255: further apart than this, channels of a pixel show a colour; JPEG alone moves them by less.
COLOURED = 8
WHITE = 200
EDGE_SHARE = 0.1

# The size of the public slices: sharpness is stated as if at it, and marks are looked for near it, where drawn lines
# are 1 to 8 pixels thick.
PUBLIC_PX = 224
# The sides of the square that no mark fills: 1 + 1 + 2 + 4 + 5 pixels.
SQUARE_STEPS = (1, 2, 4, 5)
MIN_LINE, NEARLY_WHITE, WHITE_MARK = 225, 235, 240
MIN_CORE_PX = 12


def measure_oddities(image: Image.Image, grey: NDArray[np.uint8], std: float) -> dict[str, float]:
    """The numbers in the manifest that tell odd images.

    `grey` is the luminance (height, width) of the decoded `image`, and `std` its standard deviation.
    """
    is_coloured = _is_coloured(image)
    return {
        "coloured_share": 0.0 if is_coloured is None else float(is_coloured.mean()),
        "coloured_line": 0.0 if is_coloured is None else _fullest_line(is_coloured),
        "white_line": _fullest_line(grey >= WHITE),
        "sharpness": _sharpness(grey, std),
        "mark_length": _mark_length(grey),
    }


def odd_kinds(images: pd.DataFrame, params: ValidateParams) -> "pd.Series[Any]":
    """The kinds of oddity of each row of a manifest, a tuple in the order of KINDS; empty where there is none.

    An image that can't be decoded has no kinds: it is a finding of its own, and nothing is known of its pixels.
    """
    limits = params.odd_images
    is_odd = {
        "mode": ~images["mode"].isin(USUAL_MODES),
        "not_square": images["width"] != images["height"],
        "nearly_empty": images["std"] < params.min_intensity_std,
        "brightness": ~images["mean"].between(params.min_intensity_mean, params.max_intensity_mean),
        "coloured": images["coloured_share"] > limits.max_coloured_share,
        "banner": images["coloured_line"] > limits.max_coloured_line,
        "white_frame": images["white_line"] > limits.max_white_line,
        "arrows": images["mark_length"] > limits.max_mark_length,
        "edge_filtered": images["sharpness"] > limits.max_sharpness,
    }
    rows = zip(*(is_odd[kind].fillna(False).to_numpy(bool) for kind in KINDS), strict=True)
    kinds = [
        tuple(kind for kind, holds in zip(KINDS, row, strict=True) if holds) if is_readable else ()
        for row, is_readable in zip(rows, images["is_readable"], strict=True)
    ]
    return pd.Series(kinds, index=images.index, dtype=object, name="kinds")


def write_odd_images(images: pd.DataFrame, kinds: "pd.Series[Any]", path: Path) -> None:
    """`path` lists the odd images, sorted, for a person to look at: path,label,kinds,numbers,new_label.

    `numbers` holds what decided. `new_label` is empty, for a class or 'remove'; `braintumor data relabel` takes the
    file back, and leaves rows alone where it is still empty.
    """
    odd = images.assign(kinds=kinds)[kinds.map(len) > 0].sort_values("path")
    table = pd.DataFrame(
        {
            "path": odd["path"],
            "label": odd["label"],
            "kinds": odd["kinds"].map(" ".join),
            "numbers": [_numbers(row) for row in odd.to_dict("records")],
            "new_label": "",
        }
    )
    text = io.StringIO()
    table.to_csv(text, index=False, lineterminator="\n")
    write_text(path, text.getvalue())


def _numbers(row: Mapping[Any, Any]) -> str:
    names = [name for kind in row["kinds"] for name in NUMBERS_OF[kind]]
    return "; ".join(f"{name} {_shown(row[name])}" for name in names)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_coloured(image: Image.Image) -> NDArray[np.bool_] | None:
    """Which pixels (height, width) show a colour; None if there is none."""
    if len(image.getbands()) < 3 and image.mode not in {"P", "PA"}:
        return None
    red, green, blue = image.convert("RGB").split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    is_coloured = np.asarray(ImageChops.subtract(highest, lowest)) > COLOURED
    return is_coloured if is_coloured.any() else None


def _fullest_line(is_set: NDArray[np.bool_]) -> float:
    """The largest share of set pixels in a row or column of the outer tenth on each side."""
    shares = []
    for lines in (is_set, is_set.T):
        depth = max(1, round(len(lines) * EDGE_SHARE))
        shares += [float(lines[:depth].mean(axis=1).max()), float(lines[-depth:].mean(axis=1).max())]
    return max(shares)


def _sharpness(grey: NDArray[np.uint8], std: float) -> float:
    """The root mean square of the Laplacian over the standard deviation, as at 224 px; 0 without texture.

    A slice as it was reconstructed stays below 1, for neighbours resemble each other; a sharpening filter raises it,
    and white noise reaches sqrt(20). The share of pixels that lie on edges falls with the side, hence the scale.
    """
    if min(grey.shape) < 3 or std == 0:
        return 0.0
    values = grey.astype(np.int16)
    centre, rows, columns = values[1:-1, 1:-1], values[:, 1:-1], values[1:-1]
    laplacian = 4 * centre - rows[:-2] - rows[2:] - columns[:, :-2] - columns[:, 2:]
    # Summed as integers: the same number on every machine.
    squares = np.square(laplacian, dtype=np.int32).sum(dtype=np.int64)
    return float(np.sqrt(squares / laplacian.size * max(grey.shape) / PUBLIC_PX)) / std


def _mark_length(grey: NDArray[np.uint8]) -> float:
    """The length of all bright strokes that look drawn, as arrows are, over the longer side of the image.

    A stroke looks drawn where it is a long thin line on tissue, or where it is white in a picture that has hardly any
    white. Skull, vessels and fluid are sharp and bright too: a short mark in a bright picture is not told from them.
    """
    small = np.asarray(Image.fromarray(grey).reduce(max(1, round(max(grey.shape) / PUBLIC_PX))))
    if np.count_nonzero(small >= MIN_LINE) < MIN_CORE_PX:
        return 0.0
    ground = _opened(small)
    height = small - ground
    has_little_white = np.count_nonzero(small >= NEARLY_WHITE) < 0.01 * small.size
    core = (small >= MIN_LINE) & (height >= 100) & (ground >= 90)
    if has_little_white:
        core |= (small >= WHITE_MARK) & (height >= 150) & (ground >= 20)
    # Three slices of four end here: telling strokes apart costs more than finding their pixels.
    if np.count_nonzero(core) < MIN_CORE_PX:
        return 0.0
    strokes = _strokes((small >= 190) & (height >= 70) & (ground >= 20), small, height, ground)
    sides = ((strokes.row, small.shape[0]), (strokes.column, small.shape[1]))
    # A line along the border is a frame, or skin that the picture cuts off.
    is_inside = np.all([abs(centre / side - 0.5) <= 0.5 - EDGE_SHARE for centre, side in sides], axis=0)
    is_line = (strokes.length >= 20) & (strokes.width <= 3.2)
    is_line &= (strokes.level >= MIN_LINE) & (strokes.height >= 100) & (strokes.ground >= 90)
    is_white = (strokes.length >= 10) & (strokes.width <= 9)
    is_white &= (strokes.white_share >= 0.6) & (strokes.height >= 150) & has_little_white
    is_drawn = is_inside & (is_line | is_white)
    return float(strokes.length[is_drawn].sum()) / max(small.shape)


def _opened(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image without what is brighter than its surroundings and narrower than the square (grey-scale opening)."""
    padded = np.pad(pixels, sum(SQUARE_STEPS), mode="edge")
    return _extreme_of_squares(_extreme_of_squares(padded, np.minimum), np.maximum)


def _extreme_of_squares(pixels: NDArray[np.uint8], extreme: np.ufunc) -> NDArray[np.uint8]:
    # A few steps on whole arrays of bytes: ten times as fast as scipy's filter.
    for step in SQUARE_STEPS:
        pixels = extreme(pixels[:-step], pixels[step:])
        pixels = extreme(pixels[:, :-step], pixels[:, step:])
    return pixels


class _Strokes(NamedTuple):
    """Connected bright pixels, one value a stroke: length and width of a bar of the same moments, px, and means."""

    row: NDArray[np.float64]
    column: NDArray[np.float64]
    length: NDArray[np.float64]
    width: NDArray[np.float64]
    level: NDArray[np.float64]
    height: NDArray[np.float64]  # above the ground
    ground: NDArray[np.float64]
    white_share: NDArray[np.float64]


def _strokes(
    is_stroke: NDArray[np.bool_], level: NDArray[np.uint8], height: NDArray[np.uint8], ground: NDArray[np.uint8]
) -> _Strokes:
    names, count = label(is_stroke, np.ones((3, 3)))
    places = np.flatnonzero(is_stroke)
    rows, columns = np.divmod(places, is_stroke.shape[1])
    stroke = names.ravel()[places] - 1
    sizes = np.bincount(stroke, minlength=count)

    def mean(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(stroke, weights=values, minlength=count) / sizes

    row, column = mean(rows), mean(columns)
    row_variance = mean(rows * rows) - row**2
    column_variance = mean(columns * columns) - column**2
    covariance = mean(rows * columns) - row * column
    middle = (row_variance + column_variance) / 2
    spread = np.hypot((row_variance - column_variance) / 2, covariance)
    return _Strokes(
        row=row,
        column=column,
        # The variance along a bar is a twelfth of its length squared.
        length=np.sqrt(12 * np.maximum(middle + spread, 0)),
        width=np.sqrt(12 * np.maximum(middle - spread, 0)),
        level=mean(level.ravel()[places]),
        height=mean(height.ravel()[places]),
        ground=mean(ground.ravel()[places]),
        white_share=mean(level.ravel()[places] >= WHITE_MARK),
    )
