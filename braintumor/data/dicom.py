"""DICOM files read: what a header says, without a word of whose it is, and the volume of a series.

DICOM's axes grow to the patient's left, back and head (PS3.3 C.7.6.2.1.1).
"""

import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from braintumor.data.nifti import Affine, to_canonical
from braintumor.data.slices import (
    AXIAL,
    MAX_VOXELS,
    LeftOut,
    Plane,
    Refused,
    Volume,
    Voxels,
    Window,
    make_volume,
    readable,
)
from braintumor.errors import name_some
from braintumor.model.images import MAX_PIXELS

DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
MAGIC_AT, MAGIC = 128, b"DICM"
NO_DICOM = "is damaged, or no DICOM file"
DAMAGED = "is damaged"
NO_DECODER = "is compressed as {syntax}, which can't be read here; unpack it first: dcmdjpeg, or gdcmconv --raw"

DIRECTORY = "1.2.840.10008.1.3.10"
MR_PICTURES = frozenset(f"1.2.840.10008.5.1.4.1.1.{ending}" for ending in ("4", "4.1", "4.3", "4.4"))
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
LOCALIZERS = "DICOM files of localizers"
# Values of ImageType.
NOT_SLICES = {
    "LOCALIZER": LOCALIZERS,
    "MOSAIC": "DICOM files of mosaics",
    "PROJECTION IMAGE": "DICOM files of projections",
    "MIP": "DICOM files of projections",
    "MINIP": "DICOM files of projections",
    "MNIP": "DICOM files of projections",
}
# What anonymisers write where a number was: it names nobody.
NO_PATIENT = re.compile(r"|0+|x+|none|null|n/?a|unknown|anon|anony|anonymous|anonymi[sz]ed|patient|test", re.IGNORECASE)

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Rows to the left, columns to the back: an axial picture then stays as it is stored.
AS_STORED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
COSINE_TOLERANCE = 0.01
GAP_TOLERANCE = 0.1
MAX_FRAMES = 1 << 16


@dataclass(frozen=True)
class Header:
    """What decides where a file belongs; empty where the file does not say."""

    path: PurePosixPath
    instance: str
    series: str
    study: str
    patient: str


@dataclass(frozen=True)
class Frame:
    """One picture of a file, before its pixels are read."""

    path: PurePosixPath
    index: int
    order: tuple[int, int, int]
    size: tuple[int, int]  # rows, columns
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing_mm: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float
    window: Window | None
    is_inverted: bool


@dataclass(frozen=True)
class Stack:
    """Frames of one orientation, one at each place, in order along the normal of their plane."""

    frames: list[Frame]
    gap_mm: float
    is_even: bool  # no slice is missing
    is_oriented: bool

    def affine(self) -> Affine:
        """From (column, row, slice) to right, front and head, in mm; where the origin is does not matter."""
        orientation = self.frames[0].orientation if self.is_oriented else None
        along_row, along_column = np.reshape(orientation or AS_STORED, (2, 3))
        row_gap_mm, column_gap_mm = self.frames[0].spacing_mm
        lps = np.eye(4)
        lps[:3, 0] = along_row * column_gap_mm
        lps[:3, 1] = along_column * row_gap_mm
        lps[:3, 2] = np.cross(along_row, along_column) * self.gap_mm
        return LPS_TO_RAS @ lps


@contextmanager
def silence() -> Iterator[None]:
    """pydicom and nibabel say nothing meanwhile: their warnings quote what stands in a file."""
    from pydicom.config import disable_value_validation

    loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel.global")]
    were_disabled = [logger.disabled for logger in loggers]
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, was_disabled in zip(loggers, were_disabled, strict=True):
                logger.disabled = was_disabled


def has_magic(file: IO[bytes]) -> bool:
    """Whether the file begins as DICOM does (PS3.10 7.1)."""
    return file.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC


def read_header(source: Path, path: PurePosixPath) -> Header:
    """The header of an MR picture; raises LeftOut for what is none, Refused for what may show a name or is damaged."""
    with readable(path, NO_DICOM):
        header = _read(source / path, stop_before_pixels=True)
        found = Header(
            path=path,
            instance=str(header.get("SOPInstanceUID") or ""),
            series=str(header.get("SeriesInstanceUID") or ""),
            study=str(header.get("StudyInstanceUID") or ""),
            patient=_patient_number(header.get("PatientID")),
        )
        _refuse_other_pictures(header)
    return found


def _refuse_other_pictures(header: Any) -> None:
    kind = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    modality = str(header.get("Modality") or ("MR" if kind in MR_PICTURES else ""))
    is_capture = kind == SECONDARY_CAPTURE or kind.startswith(f"{SECONDARY_CAPTURE}.")
    burned_in = str(header.get("BurnedInAnnotation") or "").upper()
    if not (kind or modality):
        raise Refused(NO_DICOM)
    if kind == DIRECTORY:
        raise LeftOut("DICOM directories")
    if burned_in == "YES":
        raise Refused("has text burned into its picture, which may name the patient")
    if is_capture and burned_in != "NO":
        raise Refused("is a captured screen, which may name the patient")
    if modality != "MR":
        is_code = re.fullmatch(r"[A-Z]{2,10}", modality)
        raise LeftOut(f"DICOM files of modality {modality}" if is_code else "DICOM files of unknown modality")
    if kind and kind not in MR_PICTURES and not is_capture:
        raise LeftOut("DICOM files without pictures")
    for value in _values(header.get("ImageType")):
        if str(value).upper() in NOT_SLICES:
            raise LeftOut(NOT_SLICES[str(value).upper()])
    if str(header.get("PhotometricInterpretation") or "MONOCHROME2") not in ("MONOCHROME1", "MONOCHROME2"):
        raise Refused("is in colour, which no MR slice is")
    if not header.get("Rows"):
        raise Refused("holds no pixels, or is cut short")


def _patient_number(value: Any) -> str:
    number = str(value or "").strip()
    return "" if NO_PATIENT.fullmatch(number) else number


def _read(file: Path, stop_before_pixels: bool) -> Any:
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with file.open("rb") as content:
        is_part_10 = has_magic(content)
    dataset = pydicom.dcmread(file, stop_before_pixels=stop_before_pixels, force=not is_part_10)
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


def read_series(source: Path, paths: Sequence[PurePosixPath], plane: Plane) -> Volume:
    """The volume of a series, its slices in their order in space; of several at one place the first is taken.

    Raises LeftOut for a localizer, Refused for what is damaged, of several sizes, or compressed in an unknown way.
    """
    found: list[Frame] = []
    for path in paths:
        with readable(path, DAMAGED):
            found += _frames(source, path)
    stack = _stack(found)
    remarks = []
    if len(stack.frames) < len(found):
        remarks.append("hold several images of each slice (4-D): the first was taken")
    if not stack.is_oriented:
        remarks.append("do not say how the head lies: shown as stored")
    pixels = _read_pixels(source, stack.frames)
    window = _common_window(stack.frames)
    if stack.frames[0].is_inverted:
        pixels = -pixels
        window = (-window[1], -window[0]) if window else None
    voxels, spacing_mm, axes = to_canonical(pixels.transpose(2, 1, 0), stack.affine())
    axis = axes[2] if plane == "acquired" else AXIAL
    if axis != axes[2] and not stack.is_even:
        raise Refused("is of a series whose slices are not evenly spaced; take the plane in which they were acquired")
    return make_volume(voxels, spacing_mm, axis, remarks, window)


def _frames(source: Path, path: PurePosixPath) -> list[Frame]:
    """What the header says of each picture in a file, be it one (MR Image) or many (Enhanced MR)."""
    header = _read(source / path, stop_before_pixels=True)
    of_frame = _values(header.get("PerFrameFunctionalGroupsSequence"))
    of_all = _values(header.get("SharedFunctionalGroupsSequence"))[:1]
    number = int(header.get("InstanceNumber") or 0)
    size = (int(header.Rows), int(header.Columns))
    count = int(header.get("NumberOfFrames") or 1)
    if count > MAX_FRAMES:
        raise Refused(f"says that it holds {count} pictures, too many for a scan of a head", path)
    frames = []
    for index in range(count):
        groups = [*of_frame[index : index + 1], *of_all]
        time = _element(header, groups, "FrameContentSequence", "TemporalPositionIndex")
        slope = _element(header, groups, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = _element(header, groups, "PixelValueTransformationSequence", "RescaleIntercept")
        orientation = _numbers(_element(header, groups, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
        frames.append(
            Frame(
                path=path,
                index=index,
                order=(int(time or 0), number, index),
                size=size,
                position=_numbers(_element(header, groups, "PlanePositionSequence", "ImagePositionPatient"), 3),
                orientation=orientation if _is_orientation(orientation) else None,
                spacing_mm=_pixel_spacing(header, groups),
                slope=1.0 if slope is None else float(slope),
                intercept=0.0 if intercept is None else float(intercept),
                window=_voi_window(header, groups),
                is_inverted=header.get("PhotometricInterpretation") == "MONOCHROME1",
            )
        )
    return frames


def _element(header: Any, groups: Sequence[Any], sequence: str, keyword: str) -> Any:
    """An element of a frame: from its own or the shared functional groups, else from the header; None if missing."""
    for group in groups:
        for item in _values(group.get(sequence))[:1]:
            if _values(item.get(keyword)):
                return item.get(keyword)
    return header.get(keyword) if _values(header.get(keyword)) else None


def _values(value: Any) -> list[Any]:
    """The values of an element that has none, one or several."""
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | bytes | int | float) else list(value)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    numbers = tuple(float(number) for number in _values(value))
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _is_orientation(numbers: tuple[float, ...] | None) -> bool:
    """Whether the six are two unit vectors at a right angle."""
    if numbers is None:
        return False
    vectors = np.reshape(numbers, (2, 3))
    return np.allclose(vectors @ vectors.T, np.eye(2), atol=COSINE_TOLERANCE)


def _pixel_spacing(header: Any, groups: Sequence[Any]) -> tuple[float, float]:
    """Between rows and between columns, in mm; where only their ratio is known, that."""
    spacing = _numbers(_element(header, groups, "PixelMeasuresSequence", "PixelSpacing"), 2)
    row_mm, column_mm = spacing or _numbers(header.get("PixelAspectRatio"), 2) or (1.0, 1.0)
    return (row_mm, column_mm) if min(row_mm, column_mm) > 0 else (1.0, 1.0)


def _voi_window(header: Any, groups: Sequence[Any]) -> Window | None:
    """The first linear window (PS3.3 C.11.2.1.2, C.11.2.1.3.2)."""
    centre, width, function = (
        next(iter(_values(_element(header, groups, "FrameVOILUTSequence", keyword))), None)
        for keyword in ("WindowCenter", "WindowWidth", "VOILUTFunction")
    )
    if centre is None or width is None or function not in (None, "LINEAR", "LINEAR_EXACT"):
        return None
    shift, narrower = (0.0, 0.0) if function == "LINEAR_EXACT" else (0.5, 1.0)
    middle, half = float(centre) - shift, (float(width) - narrower) / 2
    return (middle - half, middle + half) if math.isfinite(middle) and 0 < half < math.inf else None


def _stack(frames: list[Frame]) -> Stack:
    if len({(frame.size, frame.is_inverted) for frame in frames}) > 1:
        sizes = sorted({f"{columns} x {rows}" for rows, columns in (frame.size for frame in frames)})
        raise Refused(f"is of a series whose pictures differ in kind or size ({name_some(sizes)})")
    frames = sorted(frames, key=lambda frame: (frame.order, frame.path))
    orientations = [frame.orientation for frame in frames if frame.orientation is not None]
    if len(orientations) < len(frames):
        return Stack(frames, gap_mm=1.0, is_even=False, is_oriented=False)
    if not np.allclose(orientations, orientations[0], atol=COSINE_TOLERANCE):
        raise LeftOut(LOCALIZERS)
    positions = [frame.position for frame in frames if frame.position is not None]
    if len(positions) < len(frames):
        return Stack(frames, gap_mm=1.0, is_even=False, is_oriented=True)
    along_row, along_column = np.reshape(orientations[0], (2, 3))
    # At each height the first in order: that is what np.unique points at.
    heights_mm, firsts = np.unique(
        (np.array(positions) @ np.cross(along_row, along_column)).round(2), return_index=True
    )
    gaps_mm = np.diff(heights_mm)
    gap_mm = float(np.median(gaps_mm)) if len(gaps_mm) else 1.0
    return Stack(
        frames=[frames[first] for first in firsts],
        gap_mm=gap_mm,
        is_even=len(gaps_mm) > 0 and bool((np.abs(gaps_mm - gap_mm) <= GAP_TOLERANCE * gap_mm).all()),
        is_oriented=True,
    )


def _common_window(frames: Sequence[Frame]) -> Window | None:
    """One window for all slices, so that they can be compared: the median of what the frames say, if all do."""
    windows = [frame.window for frame in frames if frame.window is not None]
    if len(windows) < len(frames):
        return None
    low, high = np.median(windows, axis=0)
    return float(low), float(high)


def _read_pixels(source: Path, frames: Sequence[Frame]) -> Voxels:
    """The rescaled values of all frames: (frame, row, column)."""
    rows, columns = frames[0].size
    if rows * columns > MAX_PIXELS or len(frames) * rows * columns > MAX_VOXELS:
        raise Refused(f"is of a series of {len(frames)} x {columns} x {rows} pixels, too large for a scan of a head")
    pixels = np.empty((len(frames), rows, columns), np.float32)
    places: dict[PurePosixPath, list[int]] = defaultdict(list)
    for place, frame in enumerate(frames):
        places[frame.path].append(place)
    for path, of_file in places.items():
        stored, padding = _decode(source, path, [frames[place].index for place in of_file])
        for place, picture in zip(of_file, stored, strict=True):
            with readable(path, DAMAGED):
                pixels[place] = picture * np.float64(frames[place].slope) + frames[place].intercept
            if padding is not None and not (is_padding := picture == padding).all():
                pixels[place][is_padding] = pixels[place][~is_padding].min()
    return pixels


def _decode(source: Path, path: PurePosixPath, indices: list[int]) -> tuple[list[NDArray[Any]], int | None]:
    """The stored values of some frames of a file, and the value that fills what was not scanned."""
    from pydicom.pixels import get_decoder, iter_pixels

    with readable(path, DAMAGED):
        dataset = _read(source / path, stop_before_pixels=False)
        syntax = dataset.file_meta.TransferSyntaxUID
        padding = dataset.get("PixelPaddingValue")
        name = "an unknown format" if syntax.is_private or syntax.name == syntax else syntax.name
        has_pixels = "PixelData" in dataset
    if not has_pixels:
        raise Refused("holds no pixels, or is cut short", path)
    with readable(path, NO_DECODER.format(syntax=name)):
        decoder = get_decoder(syntax)
    if not decoder.is_available:
        raise Refused(NO_DECODER.format(syntax=name), path)
    with readable(path, f"is damaged, or compressed in a way that can't be read here ({name})"):
        # A list: the pixels are decoded here, where their errors are caught.
        return list(iter_pixels(dataset, indices=indices)), None if padding is None else int(padding)


def read_shipped(name: str) -> NDArray[np.float64]:
    """The first picture (height, width) of a file that pydicom ships for its own tests; nothing is fetched."""
    import pydicom
    from pydicom.pixels import pixel_array

    with silence():
        picture = np.asarray(pixel_array(Path(pydicom.__file__).parent / "data" / "test_files" / name, index=0), float)
    return picture if picture.ndim == 2 else picture.mean(axis=2)
