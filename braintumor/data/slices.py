"""A volume in memory, and the few of its slices that become images.

Slices are shown as a radiologist looks at them: the patient's right on the image's left (axial, coronal), anterior up
(axial), superior up (coronal, sagittal), anterior on the left (sagittal). Oblique volumes are turned to the nearest of
these views. nibabel's page 'Radiological vs neurological conventions' compares the two.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from braintumor.errors import UserError
from braintumor.model.images import MAX_PIXELS, Grey

Voxels = NDArray[np.float32]
Window = tuple[float, float]  # the values shown as black and as white
Plane = Literal["acquired", "axial"]

AXIAL = 2
# 512 x 512 x 512 voxels; as float32 half a GiB.
MAX_VOXELS = 1 << 27
MAX_ASPECT = 16.0
SQUARE_TOLERANCE = 0.01
PERCENTILES = (0.5, 99.5)
# A window so many times wider or narrower than the values shows nothing but grey, or nothing but black and white.
WINDOW_MISFIT = 4.0
TISSUE_GREY = 0.1
# Of the slice with the most tissue, and of the slice's own area: below either a slice is nearly empty.
LEAST_TISSUE, LEAST_TISSUE_AREA = 0.25, 0.02
LESION_SHARE = 0.5
DIGEST_DIGITS = 16


class LeftOut(Exception):
    """There is nothing to import here, and nothing wrong: the text is the kind under which it is counted."""


class Refused(Exception):
    """A person has to see to it: the reason follows the file's name, and quotes no value of the file."""

    def __init__(self, reason: str, path: PurePosixPath | None = None) -> None:
        super().__init__(reason)
        self.path = path


@contextmanager
def readable(path: PurePosixPath, reason: str) -> Iterator[None]:
    """Whatever a library raises over the content of `path` becomes a refusal that quotes nothing of it."""
    try:
        yield
    except (LeftOut, Refused):
        raise
    except PermissionError:
        raise Refused("can't be opened; see to its permissions", path) from None
    # A damaged file can make pydicom and nibabel fail anywhere.
    except Exception:
        raise Refused(reason, path) from None


@dataclass(frozen=True)
class SliceRule:
    """Which slices of a volume become images: a few, far apart, since neighbours are near copies.

    A slice holds tissue if enough of it is brighter than the background. Of these slices the outer ones are left out,
    so that `middle_share` remains, and `slices_per_volume` of the rest are taken at even steps (all, if fewer remain).
    With a mask beside the volume, the slices with at least half the mask's largest area take the place of the middle:
    a slice of a tumour volume need not show the tumour.
    """

    plane: Plane = "acquired"  # as it was scanned (a NIfTI volume with cubic voxels: axial), or axial in any case
    slices_per_volume: int = 5
    middle_share: float = 0.6

    def __post_init__(self) -> None:
        if self.slices_per_volume < 1:
            raise UserError(f"{self.slices_per_volume} slices a volume are too few; take at least 1")
        if not 0 < self.middle_share <= 1:
            raise UserError(f"{self.middle_share} is no share of a volume's slices; take one above 0, at most 1")


@dataclass(frozen=True)
class Volume:
    """Voxels (x, y, z) that grow to the right, front and head, and how they are to be looked at."""

    voxels: Voxels
    spacing_mm: tuple[float, ...]
    axis: int  # perpendicular to the slices
    window: Window
    lesion: NDArray[np.bool_] | None
    remarks: tuple[str, ...]  # what a person should know; each follows 'N volumes'

    @property
    def digest(self) -> str:
        """A name that says nothing of the patient: it is made from the voxels alone."""
        digest = hashlib.sha256(str(self.voxels.shape).encode())
        digest.update(np.ascontiguousarray(self.voxels, "<f4").data)
        return digest.hexdigest()[:DIGEST_DIGITS]


def make_volume(
    voxels: Voxels,
    spacing_mm: tuple[float, ...],
    axis: int,
    remarks: Sequence[str],
    window: Window | None = None,
    lesion: NDArray[np.bool_] | None = None,
) -> Volume:
    """A volume without NaN, and with one window for all slices: the given one if it fits, else by percentiles."""
    is_finite = np.isfinite(voxels)
    if not is_finite.any():
        raise Refused("holds no finite voxel")
    if not is_finite.all():
        remarks = [*remarks, "hold NaN or infinite voxels: shown as dark as the darkest other"]
        voxels = np.where(is_finite, voxels, voxels[is_finite].min())
    low, high = (float(value) for value in np.percentile(voxels, PERCENTILES))
    if window is None or not _fits(window, low, high):
        window = (low, high)
    if window[1] <= window[0]:
        raise Refused("shows nothing: nearly all its voxels are alike")
    return Volume(voxels, spacing_mm, axis, window, lesion, tuple(remarks))


def _fits(window: Window, low: float, high: float) -> bool:
    """Whether a window shows the values between `low` and `high` in more than a few greys."""
    overlaps = window[0] < high and window[1] > low
    return overlaps and high - low <= WINDOW_MISFIT * (window[1] - window[0]) <= WINDOW_MISFIT**2 * (high - low)


def choose_slices(volume: Volume, rule: SliceRule) -> list[int]:
    """The indices of the slices that the rule takes, ascending."""
    low, high = volume.window
    in_plane = tuple(axis for axis in range(3) if axis != volume.axis)
    tissue = (volume.voxels > low + TISSUE_GREY * (high - low)).mean(axis=in_plane)
    holds_tissue = tissue >= max(LEAST_TISSUE * tissue.max(), LEAST_TISSUE_AREA)
    if not holds_tissue.any():
        raise Refused("shows next to nothing: none of its slices holds tissue")
    if volume.lesion is None:
        slices = np.flatnonzero(holds_tissue)
        margin = math.floor(len(slices) * (1 - rule.middle_share) / 2)
        slices = slices[margin : len(slices) - margin]
    else:
        lesion = volume.lesion.sum(axis=in_plane)
        slices = np.flatnonzero(lesion >= LESION_SHARE * lesion.max())
    steps = (np.arange(rule.slices_per_volume) + 0.5) * len(slices) / rule.slices_per_volume
    return [int(index) for index in slices[np.unique(steps.astype(int))]]


def show_slice(volume: Volume, index: int) -> Grey:
    """The slice as a radiologist sees it, uint8 (height, width), its pixels square."""
    low, high = volume.window
    plane = np.take(volume.voxels, index, volume.axis)
    grey = np.clip((plane - low) / (high - low), 0, 1) * 255
    across, down = (axis for axis in range(3) if axis != volume.axis)
    return _square(grey[::-1, ::-1].T, volume.spacing_mm[down], volume.spacing_mm[across])


def _square(grey: NDArray[np.floating[Any]], row_gap_mm: float, column_gap_mm: float) -> Grey:
    """The picture with pixels as wide as high: the coarser direction is interpolated."""
    finer_mm, coarser_mm = sorted((row_gap_mm, column_gap_mm))
    if coarser_mm > (1 + SQUARE_TOLERANCE) * finer_mm:
        height, width = (round(grey.shape[0] * row_gap_mm / finer_mm), round(grey.shape[1] * column_gap_mm / finer_mm))
        if coarser_mm > MAX_ASPECT * finer_mm or height * width > MAX_PIXELS:
            raise Refused(f"has voxels of {column_gap_mm:g} x {row_gap_mm:g} mm, too uneven for a picture")
        picture = Image.fromarray(np.ascontiguousarray(grey, np.float32))
        grey = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)
