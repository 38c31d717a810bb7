"""Decoding and resizing: the only place where a file becomes pixels."""

import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from braintumor.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
# A slice is at most a few megapixels; a larger picture is a mistake or an attack on memory.
MAX_PIXELS = 64_000_000

# What Pillow's decoders raise, by format, for damaged content.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, struct.error)

Grey = NDArray[np.uint8]


class UnreadableImage(UserError):
    """The file can't be decoded to the last pixel."""


def decode_grey(path: Path) -> Grey:
    """The image's luminance, uint8 (height, width); 16-bit and float images are scaled by their own range.

    Raises UnreadableImage for an empty, truncated or foreign file.
    """
    return to_grey(open_image(path), path)


def open_image(path: Path) -> Image.Image:
    """The fully decoded image, upright as its EXIF says, in its own mode."""
    try:
        if path.stat().st_size == 0:
            raise UnreadableImage(f"{path} is empty (0 bytes); replace or remove it")
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{path} has {image.width} x {image.height} pixels; scale it down or remove it")
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{path} is not an image; replace or remove it") from error
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path} is missing; run 'dvc pull' or 'braintumor data import'") from error
    except (*DECODER_ERRORS, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path} is damaged ({error}); replace or remove it") from error


def to_grey(image: Image.Image, path: Path) -> Grey:
    """The luminance of a decoded image, uint8 (height, width); transparency lies on black."""
    try:
        return _luminance(image, path)
    except DECODER_ERRORS as error:
        raise UnreadableImage(f"{path} can't be turned to grey ({error}); convert or remove it") from error


def _luminance(image: Image.Image, path: Path) -> Grey:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise UnreadableImage(f"{path} holds NaN or infinite pixels; replace or remove it")
        scale = 255.0 / (high - low) if high > low else 0.0
        return np.rint((values - low) * scale).astype(np.uint8)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.asarray(image.convert("L"))


def resize_square(grey: Grey, size_px: int) -> Grey:
    """The image on a black square of `size_px`, its aspect ratio kept; area-averaged where it shrinks."""
    image = Image.fromarray(grey)
    longest = max(image.size)
    width, height = (max(1, round(side * size_px / longest)) for side in image.size)
    shrinks = longest > size_px
    scaled = image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
    if width == height:
        return np.asarray(scaled)
    square = Image.new("L", (size_px, size_px))
    square.paste(scaled, ((size_px - width) // 2, (size_px - height) // 2))
    return np.asarray(square)


def load_images(
    dataset: Path, paths: Sequence[str], size_px: int, on_image: Callable[[], None] = lambda: None
) -> NDArray[np.uint8]:
    """Images of `dataset` as the model takes them: uint8 (n, size_px, size_px, 1), in the order of `paths`."""
    images = np.empty((len(paths), size_px, size_px, 1), np.uint8)

    def load(index: int) -> None:
        images[index, :, :, 0] = resize_square(decode_grey(dataset / paths[index]), size_px)
        on_image()

    # Pillow releases the interpreter lock while it decodes and resizes: threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(load, range(len(paths))))
    return images
