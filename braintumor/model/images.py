"""Decoding and resizing: the only place where a file becomes pixels."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from braintumor.errors import UserError

# Pillow knows forty formats more, and would start Ghostscript for a PostScript file that is named .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
# A slice is at most a few megapixels; a larger picture is a mistake or an attack on memory.
MAX_PIXELS = 25_000_000
# Pixels that are scaled at a time, so that a large picture is never in memory as 64-bit floats.
SCALED_AT_A_TIME = 1 << 20

PHOTOMETRIC_TAG, WHITE_IS_ZERO = 262, 0

Grey = NDArray[np.uint8]

# Pillow warns of headers that it can live with; those that matter are refused here, by name.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(UserError):
    """The file can't be decoded to the last pixel, or not to the pixels that it means."""


def decode_grey(path: Path) -> Grey:
    """The image's luminance, uint8 (height, width); 16-bit and float images are scaled by their own range.

    Raises UnreadableImage, with the path, for whatever is not one whole picture of a decent size.
    """
    return to_grey(open_image(path), path)


def open_image(path: Path) -> Image.Image:
    """The fully decoded image, upright as its EXIF says, in its own mode."""
    try:
        if path.stat().st_size == 0:
            raise UnreadableImage(f"{path} is empty (0 bytes); replace or remove it")
        with Image.open(path, formats=FORMATS) as image:
            _refuse_by_header(image, path)
            image.load()
            return ImageOps.exif_transpose(image)
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage(f"{path} is missing; run 'dvc pull' or 'braintumor data import'") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{path} is not an image in JPEG (8 bits), PNG, BMP or TIFF format; convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{path} has more than {MAX_PIXELS} pixels; scale it down or remove it") from error
    except MemoryError as error:
        raise UnreadableImage(f"{path} needs more memory than there is; free some, or remove the file") from error
    # Whatever a decoder's code runs into on a damaged file comes through: KeyError, OverflowError, struct.error, ...
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise UnreadableImage(f"{path} can't be read ({error.strerror}); mend or remove it") from error
        raise UnreadableImage(f"{path} is damaged ({error or type(error).__name__}); replace or remove it") from error


def _refuse_by_header(image: ImageFile.ImageFile, path: Path) -> None:
    """Raise UnreadableImage, before a pixel is decoded, where decoding would take too much or lose something."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UnreadableImage(f"{path} has {image.width} x {image.height} pixels; resize or remove it")
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise UnreadableImage(f"{path} holds {frames} frames; save each as a file of its own, or remove it")
    # Pillow cuts such pixels to their upper halves: a picture of 12 bits would come out black.
    if image.format != "BMP" and image.mode in {"L", "LA", "RGB", "RGBA", "CMYK"} and _is_of_16_bits(image):
        raise UnreadableImage(f"{path} has 16 bits a colour; save it with 8 bits, or as 16-bit grey")
    # Pillow inverts only pictures of 8 bits.
    if (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO
        and image.mode not in {"1", "L"}
    ):
        raise UnreadableImage(f"{path} counts white as zero, and would come out inverted; save it with black as zero")


def _is_of_16_bits(image: ImageFile.ImageFile) -> bool:
    return any(";16" in str(tile.args) for tile in image.tile)


def to_grey(image: Image.Image, path: Path) -> Grey:
    """The luminance of a decoded image, uint8 (height, width); transparency lies on black."""
    try:
        return _luminance(image, path)
    except (ValueError, MemoryError) as error:
        raise UnreadableImage(f"{path} can't be turned to grey ({error}); convert or remove it") from error


def _luminance(image: Image.Image, path: Path) -> Grey:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _scaled_by_own_range(np.asarray(image), path)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.asarray(image.convert("L"))


def _scaled_by_own_range(values: NDArray[np.generic], path: Path) -> Grey:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise UnreadableImage(f"{path} holds NaN or infinite pixels; replace or remove it")
    scale = 255.0 / (high - low) if high > low else 0.0
    flat = values.reshape(-1)
    grey = np.empty(flat.shape, np.uint8)
    for start in range(0, flat.size, SCALED_AT_A_TIME):
        part = slice(start, start + SCALED_AT_A_TIME)
        grey[part] = np.rint((flat[part].astype(np.float64) - low) * scale)
    return grey.reshape(values.shape)


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
