"""NIfTI files read: their voxels turned to the right, front and head, and the masks beside them."""

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.data.slices import (
    AXIAL,
    MAX_VOXELS,
    LeftOut,
    Plane,
    Refused,
    Volume,
    Voxels,
    make_volume,
    readable,
)

Affine = NDArray[np.float64]

NIFTI_SUFFIXES = (".nii", ".nii.gz")
DAMAGED = "is damaged, or no NIfTI volume"
MASKS = "masks"
MASK_VALUES = 8
# Of the largest to the median voxel size; below it the volume was scanned in no plane rather than another.
CUBIC = 1.2
MASK_NAME = re.compile(r"(?:(?P<of>.+)[-_. ])?(?P<kind>[a-z]*seg|[a-z]*mask|labels?|labelmap|roi)", re.IGNORECASE)
CONTRAST_ENDING = re.compile(
    r"(?:^|[-_. ])(?:t1|t1w|t1n|t1c|t1ce|t1gd|t2|t2w|t2f|t2star|flair|pd|pdw|dwi|adc)$", re.IGNORECASE
)
BIDS_SUBJECT = re.compile(r"(?:^|_)sub-([A-Za-z0-9]+)")


def is_nifti(path: PurePosixPath) -> bool:
    """Whether the name says so; a file .nii.gz can't be told by its first bytes."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def is_mask(path: PurePosixPath) -> bool:
    """Whether the name says so: BraTS's '-seg', BIDS's '_dseg' and '_mask', 'roi', 'labels'."""
    return MASK_NAME.fullmatch(_stem(path)) is not None


def is_mask_of(mask: PurePosixPath, volume: PurePosixPath) -> bool:
    """Whether the names say that a mask shows what is ill in a volume: 'case7-seg' in 'case7' and in 'case7-t1c'."""
    match = MASK_NAME.fullmatch(_stem(mask))
    if not match or "brain" in _stem(mask).lower():
        return False
    return (match["of"] or "").lower() in (_stem(volume).lower(), case_name(volume).lower())


def case_name(path: PurePosixPath) -> str:
    """The file's name without suffix and contrast: the same for 'case7_t1.nii' and 'case7_flair.nii'."""
    return CONTRAST_ENDING.sub("", _stem(path))


def bids_subject(path: PurePosixPath) -> str | None:
    """The label in BIDS's 'sub-<label>', in the file's name or else in the nearest folder's."""
    matches = (BIDS_SUBJECT.search(part) for part in reversed(path.parts))
    return next((match[1] for match in matches if match), None)


def _stem(path: PurePosixPath) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE) if is_nifti(path) else path.stem


def read_nifti(source: Path, path: PurePosixPath, masks: Sequence[PurePosixPath], plane: Plane) -> Volume:
    """The first volume of a NIfTI file, with the union of its masks; raises Refused, and LeftOut for another mask."""
    import nibabel

    with readable(path, DAMAGED):
        image = nibabel.load(source / path)
        is_oriented = bool(image.header["sform_code"] or image.header["qform_code"])
        slice_axis = _slice_axis(image)
        affine = np.asarray(image.affine, np.float64)
        stored, has_more = _first_volume(image)
        voxels, spacing_mm, axes = to_canonical(stored, affine)
    if _is_label_map(voxels):
        raise LeftOut(MASKS)
    remarks = []
    if has_more:
        remarks.append("hold several images of each slice (4-D): the first was taken")
    if not is_oriented:
        remarks.append("do not say how the head lies: their right and left are a guess")
    lesion = np.zeros(voxels.shape, bool)
    for mask in masks:
        lesion |= _read_mask(source, mask, voxels.shape, affine)
    axis = axes[slice_axis] if plane == "acquired" and slice_axis is not None else AXIAL
    return make_volume(voxels, spacing_mm, axis, remarks, lesion=lesion if lesion.any() else None)


def _slice_axis(image: Any) -> int | None:
    """The axis across the scanned slices: as the header says, else the one with the longest voxels."""
    stated = image.header.get_dim_info()[2]
    sizes = [float(size) for size in image.header.get_zooms()[:3]]
    if stated is not None or len(sizes) < 3:
        return stated if len(sizes) == 3 else None
    return int(np.argmax(sizes)) if max(sizes) > CUBIC * float(np.median(sizes)) else None


def _first_volume(image: Any) -> tuple[Voxels, bool]:
    """Voxels (i, j, k), and whether the file holds more volumes than one."""
    shape = image.shape
    if len(shape) < 2 or 0 in shape or math.prod(shape[:3]) > MAX_VOXELS:
        raise Refused(f"is no volume of a head: its size is {' x '.join(map(str, shape))}")
    if image.get_data_dtype().kind not in "biuf":
        raise Refused("holds colours or complex numbers, which no MR slice does")
    first = (slice(None),) * min(len(shape), 3) + (0,) * (len(shape) - 3)
    voxels = np.asarray(image.dataobj[first], np.float32)
    return voxels.reshape(*voxels.shape, *(1,) * (3 - voxels.ndim)), math.prod(shape[3:]) > 1


def _is_label_map(voxels: Voxels) -> bool:
    """Whether these are labels, whatever the file's name: a scan has more than a few different values."""
    # The few voxels say it of almost every scan, and sooner.
    if len(np.unique(voxels[::4, ::4, ::4])) > MASK_VALUES:
        return False
    return 1 < len(np.unique(voxels)) <= MASK_VALUES


def _read_mask(source: Path, path: PurePosixPath, shape: tuple[int, ...], affine: Affine) -> NDArray[np.bool_]:
    import nibabel

    with readable(path, DAMAGED):
        image = nibabel.load(source / path)
        stored, _ = _first_volume(image)
        own = np.asarray(image.affine, np.float64)
        voxels, _, _ = to_canonical(stored, own)
    if voxels.shape != shape or not np.allclose(own[:3, :3], affine[:3, :3], atol=0.05):
        raise Refused("is a mask that does not lie on the voxels of its volume", path)
    # Labels count from one, probabilities from one half.
    return voxels >= 0.5


def to_canonical(voxels: Voxels, affine: Affine) -> tuple[Voxels, tuple[float, ...], list[int]]:
    """The voxels turned so that x, y, z grow to the right, front and head; their spacing in mm; where each axis went.

    `affine` leads from (i, j, k) to right, front and head. Nothing is resampled: axes change places and direction.
    """
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import apply_orientation, io_orientation

    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise Refused("has no valid orientation")
    orientation = io_orientation(affine)
    axes = [int(axis) for axis in orientation[:, 0]]
    sizes = voxel_sizes(affine)
    spacing_mm = tuple(float(sizes[axes.index(axis)]) for axis in range(3))
    return apply_orientation(voxels, orientation), spacing_mm, axes
