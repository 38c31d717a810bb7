import gzip
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from braintumor.data import volumes
from braintumor.data.nifti import MASKS
from braintumor.data.pseudonyms import PATIENT_KEY_VARIABLE
from braintumor.data.slices import SliceRule
from braintumor.data.sources import FolderFiles
from braintumor.data.volumes import VolumeSummary, convert_volumes, is_volume
from braintumor.errors import UserError
from braintumor.labels import HASHED_PATIENT, UNKNOWN_PATIENT_PREFIX

KEY = "0123456789abcdef0123456789abcdef"
WHOLE = SliceRule(slices_per_volume=1000, middle_share=1)
RAS_TO_LPS = np.array([-1, -1, 1])

Voxels = NDArray[np.int16]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, KEY)


def head(seed: int = 0) -> Voxels:
    """A head (x, y, z to the right, front and head): a bright spot on its right, a grey one in front, its top dark."""
    x, y, z = np.meshgrid(np.arange(40), np.arange(48), np.arange(32), indexing="ij")
    is_inside = ((x - 20) / 17) ** 2 + ((y - 24) / 20) ** 2 + ((z - 16) / 14) ** 2 < 1
    noise = np.random.default_rng(seed).integers(0, 20, x.shape)
    voxels = np.where(is_inside, 300 + 3 * y + noise - 4 * np.maximum(z - 16, 0), noise // 10)
    voxels[(abs(x - 31) <= 2) & (abs(y - 24) <= 2) & is_inside] = 900
    voxels[(abs(x - 20) <= 2) & (abs(y - 38) <= 2) & is_inside] = 650
    return voxels.astype(np.int16)


PICTURE = head()[::-1, ::-1, 16].T


def slices_of(voxels: Voxels, plane: str, spacing_mm: tuple[float, float, float]) -> Iterator[tuple[Any, ...]]:
    """Pictures as a scanner stores them, each with orientation, position (both LPS) and pixel spacing."""
    (nx, ny, nz), (sx, sy, sz) = voxels.shape, spacing_mm
    corner = {"x": (nx - 1) * sx, "y": (ny - 1) * sy, "z": (nz - 1) * sz}
    match plane:
        case "axial":
            for k in range(nz):
                yield voxels[::-1, ::-1, k].T, [1, 0, 0, 0, 1, 0], (corner["x"], corner["y"], k * sz), (sy, sx)
        case "axial upside down":
            for k in range(nz):
                yield voxels[:, :, k].T, [-1, 0, 0, 0, -1, 0], (0, 0, k * sz), (sy, sx)
        case "coronal":
            for j in range(ny):
                yield voxels[::-1, j, ::-1].T, [1, 0, 0, 0, 0, -1], (corner["x"], j * sy, corner["z"]), (sz, sx)
        case "sagittal":
            for i in range(nx):
                yield voxels[i, ::-1, ::-1].T, [0, 1, 0, 0, 0, -1], (i * sx, corner["y"], corner["z"]), (sz, sy)


def mr(picture: NDArray[Any], **tags: Any) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID = dataset.SeriesInstanceUID = generate_uid()
    dataset.Modality = "MR"
    dataset.PatientID = "H-4711"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = picture.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = picture.astype("<i2").tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
        if value is None:
            delattr(dataset, keyword)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", MRImageStorage)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", "1.2.3")
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    voxels: Voxels,
    plane: str = "axial",
    spacing_mm: tuple[float, float, float] = (1, 1, 1),
    ending: str = ".dcm",
    **tags: Any,
) -> list[Path]:
    """One file a slice, in shuffled order of names; InstanceNumber counts the slices from the top."""
    series = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()} | tags
    found = list(slices_of(voxels, plane, spacing_mm))
    names = random.Random(1).sample(range(len(found)), len(found))
    paths = []
    for index, (picture, orientation, position, spacing) in enumerate(found):
        of_slice = {
            "InstanceNumber": len(found) - index,
            "ImageOrientationPatient": orientation,
            "ImagePositionPatient": [float(value) for value in np.array(position) * RAS_TO_LPS],
            "PixelSpacing": list(spacing),
        }
        dataset = mr(picture, **(of_slice | series))
        paths.append(save(dataset, folder / f"IM{names[index]:04d}{ending}"))
    return paths


def write_slice(path: Path, seed: int = 0, **tags: Any) -> Path:
    """A series of a single slice, another for each seed."""
    return save(mr(head(seed)[::-1, ::-1, 16].T, **tags), path)


def write_nifti(path: Path, voxels: NDArray[Any], affine: NDArray[Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def convert(source: Path, rule: SliceRule = WHOLE, work: Path | None = None) -> tuple[Path, VolumeSummary]:
    work = work or source.with_name(f"{source.name}-work")
    work.mkdir()
    summary = convert_volumes(source, FolderFiles(source).paths, work, rule)
    assert summary is not None
    return work, summary


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pictures(work: Path) -> list[NDArray[np.uint8]]:
    return [np.asarray(Image.open(path)) for path in sorted(work.rglob("*.png"))]


def groups(work: Path) -> pd.DataFrame:
    return pd.read_csv(work / "groups.csv", dtype=str, keep_default_na=False)


def patients(work: Path) -> dict[str, set[str]]:
    """The patients of each folder of slices."""
    rows = groups(work)
    return {str(folder): set(of) for folder, of in rows["patient"].groupby(rows["path"].str.rsplit("/", n=1).str[0])}


def middle(picture: NDArray[np.uint8], is_bright: Callable[[NDArray[np.uint8]], Any]) -> tuple[float, float]:
    """Where the matching pixels are, as shares of height and width."""
    rows, columns = np.nonzero(is_bright(picture))
    return rows.mean() / picture.shape[0], columns.mean() / picture.shape[1]


def test_a_source_of_pictures_alone_holds_no_volume_and_is_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "glioma").mkdir(parents=True)
    Image.new("L", (8, 8)).save(source / "glioma/a.png")
    (source / "README").write_text("no magic here")
    work = tmp_path / "work"
    work.mkdir()
    assert convert_volumes(source, FolderFiles(source).paths, work, WHOLE) is None
    assert not files(work)


@pytest.mark.parametrize("plane", ["axial", "axial upside down", "coronal", "sagittal"])
def test_a_series_shows_the_patients_right_on_the_left_and_the_front_above(tmp_path: Path, plane: str) -> None:
    source = tmp_path / "source"
    write_series(source / "Training/glioma/case", head(), plane)
    work, summary = convert(source, SliceRule(plane="axial", slices_per_volume=1))
    assert (summary.n_volumes, summary.n_slices) == (1, 1)
    (picture,) = pictures(work)
    assert picture.shape == (48, 40)
    right = middle(picture, lambda grey: grey > 230)
    front = middle(picture, lambda grey: (grey > 150) & (grey < 220))
    assert right[1] < 0.4
    assert right[0] == pytest.approx(0.5, abs=0.05)
    assert front[0] < 0.35
    assert front[1] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("plane", "shape", "spot"), [("coronal", (32, 40), "right"), ("sagittal", (32, 48), "front")])
def test_other_planes_have_the_top_above(tmp_path: Path, plane: str, shape: tuple[int, int], spot: str) -> None:
    source = tmp_path / "source"
    write_series(source / "glioma", head(), plane)
    work, _ = convert(source, SliceRule(slices_per_volume=1))
    (picture,) = pictures(work)
    assert picture.shape == shape
    is_tissue = (picture > 60) & (picture < 130)
    upper, lower = picture[: 32 // 2], picture[32 // 2 :]
    # The top of this head is darker.
    assert upper[is_tissue[: 32 // 2]].mean() < lower[is_tissue[32 // 2 :]].mean()
    brightest = middle(picture, lambda grey: grey >= (230 if spot == "right" else 150))
    # The patient's right (coronal) and front (sagittal) are on the left.
    assert brightest[1] < 0.4
    assert groups(work)["plane"].tolist() == [plane]


def test_dicom_and_nifti_give_the_same_slices_however_they_are_stored(tmp_path: Path) -> None:
    voxels = head()
    for plane in ("axial", "axial upside down", "coronal", "sagittal"):
        write_series(tmp_path / f"{plane}/glioma", voxels, plane)
    write_nifti(tmp_path / "ras/glioma/a.nii.gz", voxels)
    write_nifti(tmp_path / "lps/glioma/a.nii", voxels[::-1, ::-1].copy(), np.diag([-1.0, -1, 1, 1]))
    turned = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    write_nifti(tmp_path / "turned/glioma/a.nii", voxels.transpose(1, 2, 0).copy(), turned)
    rule = SliceRule(plane="axial")
    found = {}
    for source in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        work, _ = convert(source, rule)
        found[source.name] = {path.name: path.read_bytes() for path in work.rglob("*.png")}
    assert len(found) == 7
    assert all(slices == found["ras"] for slices in found.values())
    assert len(found["ras"]) == 5


def test_slices_are_sorted_by_place_not_by_name_or_number(tmp_path: Path) -> None:
    voxels = np.zeros((16, 16, 9), np.int16)
    rng = np.random.default_rng(0)
    for k in range(9):
        voxels[2:14, 2:14, k] = 100 * (k + 1) + rng.integers(0, 50, (12, 12))
    write_series(tmp_path / "source/glioma", voxels)
    work, _ = convert(tmp_path / "source")
    means = [picture.mean() for picture in pictures(work)]
    assert len(means) == 9
    assert means == sorted(means)


def test_without_places_the_instance_number_sorts(tmp_path: Path) -> None:
    voxels = np.zeros((16, 16, 9), np.int16)
    for k in range(9):
        voxels[2:14, 2:14, k] = 100 * (k + 1) + np.arange(12)
    nowhere = dict(ImageOrientationPatient=None, ImagePositionPatient=None)
    write_series(tmp_path / "source/glioma", voxels, **nowhere)
    work, summary = convert(tmp_path / "source")
    means = [picture.mean() for picture in pictures(work)]
    assert means == sorted(means, reverse=True)
    assert any("how the head lies" in note for note in summary.notes)


@pytest.mark.parametrize("ending", [".dcm", "", ".IMA", ".1.2.840"])
def test_dicom_is_found_by_content_and_by_suffix(tmp_path: Path, ending: str) -> None:
    write_series(tmp_path / "source/glioma", head(), ending=ending)
    work, summary = convert(tmp_path / "source", SliceRule())
    assert summary.n_slices == 5
    assert len(files(work)) == 6


def test_a_file_without_preamble_is_read_if_its_suffix_says_dicom(tmp_path: Path) -> None:
    source = tmp_path / "source/glioma"
    source.mkdir(parents=True)
    dataset = mr(PICTURE)
    del dataset.file_meta
    dataset.save_as(source / "a.dcm", implicit_vr=True, little_endian=True)
    _, summary = convert(tmp_path / "source")
    assert summary.n_slices == 1


def test_few_slices_are_taken_from_the_middle_and_far_apart(tmp_path: Path) -> None:
    write_series(tmp_path / "source/glioma", head())
    work, _ = convert(tmp_path / "source", SliceRule(slices_per_volume=4))
    indices = [int(path.stem[-3:]) for path in sorted(work.rglob("*.png"))]
    assert len(indices) == 4
    assert indices[0] >= 8
    assert indices[-1] <= 24
    assert set(np.diff(indices)) <= {3, 4, 5}


def test_an_enhanced_multi_frame_file_gives_what_its_single_frames_give(tmp_path: Path) -> None:
    voxels = head()
    write_series(tmp_path / "single/glioma", voxels, spacing_mm=(1, 1, 2), RescaleSlope=2, RescaleIntercept=-100)
    save(enhanced(voxels, (1, 1, 2)), tmp_path / "multi/glioma/a.dcm")
    single, _ = convert(tmp_path / "single")
    multi, summary = convert(tmp_path / "multi")
    assert summary.n_volumes == 1
    assert [path.name for path in sorted(single.rglob("*.png"))] == [path.name for path in sorted(multi.rglob("*.png"))]
    assert all(np.array_equal(a, b) for a, b in zip(pictures(single), pictures(multi), strict=True))


def enhanced(voxels: Voxels, spacing_mm: tuple[float, float, float]) -> Dataset:
    """An enhanced multi-frame file, its frames in shuffled order."""
    found = list(slices_of(voxels, "axial", spacing_mm))
    random.Random(2).shuffle(found)
    dataset = mr(np.stack([picture for picture, *_ in found]), SOPClassUID=EnhancedMRImageStorage)
    dataset.NumberOfFrames = len(found)
    shared, measures, values = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = list(found[0][3])
    values.RescaleSlope, values.RescaleIntercept = 2, -100
    shared.PixelMeasuresSequence, shared.PixelValueTransformationSequence = [measures], [values]
    dataset.SharedFunctionalGroupsSequence = [shared]
    of_frames = []
    for _, orientation, position, _ in found:
        frame, place, plane = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [float(value) for value in np.array(position) * RAS_TO_LPS]
        plane.ImageOrientationPatient = orientation
        frame.PlanePositionSequence, frame.PlaneOrientationSequence = [place], [plane]
        of_frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = of_frames
    return dataset


@pytest.mark.parametrize("is_windowed", [False, True])
def test_monochrome1_is_inverted(tmp_path: Path, is_windowed: bool) -> None:
    window, mirrored = ({"WindowCenter": centre, "WindowWidth": 601} for centre in (400, 601))
    negative = (1000 - head()).astype(np.int16)
    write_series(tmp_path / "plain/glioma", head(), **(window if is_windowed else {}))
    write_series(
        tmp_path / "negative/glioma",
        negative,
        PhotometricInterpretation="MONOCHROME1",
        **(mirrored if is_windowed else {}),
    )
    shown, inverted = (pictures(convert(tmp_path / name)[0]) for name in ("plain", "negative"))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(shown, inverted, strict=True))


def test_one_scale_for_all_slices_and_rescaled_values(tmp_path: Path) -> None:
    voxels = head()
    paths = write_series(tmp_path / "source/glioma", voxels)
    # The stored values of one slice are halved, and its slope says so.
    dataset = pydicom.dcmread(paths[16])
    dataset.PixelData = (dataset.pixel_array // 2).astype("<i2").tobytes()
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, 0
    save(dataset, paths[16])
    write_series(tmp_path / "plain/glioma", voxels)
    work, _ = convert(tmp_path / "source")
    plain, _ = convert(tmp_path / "plain")
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(pictures(work), pictures(plain), strict=True))


def test_the_window_of_the_file_is_used_unless_it_shows_nothing(tmp_path: Path) -> None:
    write_series(tmp_path / "given/glioma", head(), WindowCenter=400, WindowWidth=801)
    write_series(tmp_path / "nonsense/glioma", head(), WindowCenter=20000, WindowWidth=3)
    write_series(tmp_path / "none/glioma", head())
    works = [convert(tmp_path / name)[0] for name in ("given", "nonsense", "none")]
    given, nonsense, none = (np.asarray(Image.open(next(work.rglob("*-018.png")))) for work in works)
    # The window is from -0.5 to 799.5 (PS3.3 C.11.2.1.2).
    expected = np.clip((head()[::-1, ::-1, 18].T + 0.5) / 800 * 255, 0, 255)
    assert np.abs(given - expected).max() <= 0.5
    assert not np.array_equal(given, none)
    assert np.array_equal(nonsense, none)


def test_padding_does_not_take_the_contrast(tmp_path: Path) -> None:
    padded = head()
    padded[:8] = -32000
    write_series(tmp_path / "source/glioma", padded, PixelPaddingValue=-32000)
    work, _ = convert(tmp_path / "source", SliceRule(slices_per_volume=1))
    (picture,) = pictures(work)
    # The padding is on the right.
    assert not picture[:, -8:].any()
    assert picture[:, :32].std() > 40


def test_pixels_become_square(tmp_path: Path) -> None:
    write_series(tmp_path / "source/glioma", head(), "sagittal", spacing_mm=(1, 1, 3))
    work, _ = convert(tmp_path / "source", SliceRule(slices_per_volume=1))
    assert pictures(work)[0].shape == (96, 48)


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_jp2klossless", "MR_small_bigendian", "MR_small_implicit"])
def test_compressed_and_foreign_byte_orders_give_the_same_slice(tmp_path: Path, name: str) -> None:
    for file in ("MR_small", name):
        path = tmp_path / file / "glioma/a.dcm"
        path.parent.mkdir(parents=True)
        path.write_bytes(bundled(file).read_bytes())
    plain, _ = convert(tmp_path / "MR_small")
    other, _ = convert(tmp_path / name)
    assert len(pictures(plain)) == 1
    assert np.array_equal(pictures(plain)[0], pictures(other)[0])


def bundled(name: str) -> Path:
    path = get_testdata_file(f"{name}.dcm", download=False)
    assert isinstance(path, str)
    return Path(path)


def test_rle_written_here_is_read(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "source/glioma", head())
    write_series(tmp_path / "plain/glioma", head())
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        save(dataset, path)
    rle, _ = convert(tmp_path / "source")
    plain, _ = convert(tmp_path / "plain")
    assert all(np.array_equal(a, b) for a, b in zip(pictures(rle), pictures(plain), strict=True))


def test_a_compression_without_decoder_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "source/glioma/a.dcm"
    path.parent.mkdir(parents=True)
    path.write_bytes(bundled("MR_small_jpeg_ls_lossless").read_bytes())
    with pytest.raises(UserError, match=r"glioma/a\.dcm .*JPEG-LS Lossless.*gdcmconv --raw"):
        convert(tmp_path / "source")


CULPRITS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(bundled("MR_truncated").read_bytes()),
    "cut in the header": lambda path: path.write_bytes(bundled("MR_small").read_bytes()[:300]),
    "text": lambda path: path.write_text("this is no DICOM file, whatever its name says"),
    "empty": lambda path: path.write_bytes(b""),
    "without pixels": lambda path: save(mr(PICTURE, PixelData=None), path),
    "in colour": lambda path: save(
        mr(np.zeros((9, 9, 3)), Rows=9, Columns=9, SamplesPerPixel=3, PhotometricInterpretation="RGB"), path
    ),
    "burned in": lambda path: save(mr(PICTURE, BurnedInAnnotation="YES"), path),
    "captured": lambda path: save(mr(PICTURE, SOPClassUID=SecondaryCaptureImageStorage), path),
    "captured elsewhere": lambda path: save(mr(PICTURE, SOPClassUID=SecondaryCaptureImageStorage, Modality="OT"), path),
    "constant": lambda path: save(mr(np.full((32, 32), 7)), path),
    "nearly empty": lambda path: save(mr(np.eye(64) * np.arange(64) * (np.arange(64) < 20)), path),
    "huge": lambda path: save(mr(PICTURE, Rows=9000, Columns=9000), path),
    "many frames": lambda path: save(mr(PICTURE, NumberOfFrames=2_000_000_000), path),
}


REASONS = {
    "truncated": "is damaged",
    "cut in the header": "holds no pixels, or is cut short",
    "text": "is damaged, or no DICOM file",
    "empty": "is damaged, or no DICOM file",
    "without pixels": "holds no pixels",
    "in colour": "is in colour",
    "burned in": "has text burned in",
    "captured": "is a captured screen",
    "captured elsewhere": "is a captured screen",
    "constant": "shows nothing",
    "nearly empty": "shows n",
    "huge": "is of a series of 1 x 9000 x 9000 pixels, too large",
    "many frames": "says that it holds 2000000000 pictures",
}


@pytest.mark.parametrize("culprit", list(CULPRITS))
def test_what_is_wrong_is_refused_by_name(tmp_path: Path, culprit: str) -> None:
    source = tmp_path / "source"
    write_slice(source / "Training/glioma/fine/IM1.dcm")
    bad = source / "Training/glioma/bad/IM1.dcm"
    bad.parent.mkdir()
    CULPRITS[culprit](bad)
    with pytest.raises(UserError, match=rf"mend or remove: Training/glioma/bad/IM1\.dcm {REASONS[culprit]}"):
        convert(source)


def test_a_damaged_file_of_a_series_is_named_itself(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "source/glioma", head())
    paths[20].write_bytes(paths[20].read_bytes()[:-500])
    with pytest.raises(UserError, match=re.escape(f"remove: glioma/{paths[20].name} is damaged")):
        convert(tmp_path / "source")


def test_pictures_of_several_sizes_in_one_series_are_refused(tmp_path: Path) -> None:
    uid = generate_uid()
    write_series(tmp_path / "source/glioma/a", head(), SeriesInstanceUID=uid)
    write_series(tmp_path / "source/glioma/b", head()[:30], SeriesInstanceUID=uid)
    with pytest.raises(UserError, match=r"differ in kind or size \(30 x 48, 40 x 48\)"):
        convert(tmp_path / "source")


def test_a_series_of_two_patients_is_refused_without_their_numbers(tmp_path: Path) -> None:
    uid = generate_uid()
    write_series(tmp_path / "source/glioma/a", head(), SeriesInstanceUID=uid)
    write_series(tmp_path / "source/glioma/b", head(1), SeriesInstanceUID=uid, PatientID="H-0815")
    with pytest.raises(UserError, match="several patients") as caught:
        convert(tmp_path / "source")
    assert "0815" not in str(caught.value)
    assert "4711" not in str(caught.value)


def test_all_culprits_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(mr(np.full((32, 32), 7)), tmp_path / f"source/glioma/{name}.dcm")
    with pytest.raises(UserError, match=r"glioma/a\.dcm .*, glioma/b\.dcm .*, glioma/c\.dcm "):
        convert(tmp_path / "source")


def test_companions_of_a_study_are_left_out_and_counted(tmp_path: Path) -> None:
    source = tmp_path / "source/glioma"
    write_series(source / "t1", head())
    save(mr(PICTURE, Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), source / "ct.dcm")
    save(mr(PICTURE, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), source / "scout.dcm")
    save(mr(PICTURE, ImageType=["DERIVED", "PRIMARY", "MOSAIC"]), source / "mosaic.dcm")
    save(mr(PICTURE, Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", PixelData=None), source / "report.dcm")
    save(mr(PICTURE, SOPClassUID="1.2.840.10008.5.1.4.1.1.66", PixelData=None), source / "raw.dcm")
    (tmp_path / "source/DICOMDIR").write_bytes(bundled("MR_small").read_bytes())
    _, summary = convert(tmp_path / "source")
    assert summary.n_volumes == 1
    assert summary.skipped == {
        "DICOM files of localizers": 1,
        "DICOM files of modality CT": 1,
        "DICOM files of modality SR": 1,
        "DICOM files of mosaics": 1,
        "DICOM files without pictures": 1,
        volumes.OUTSIDE: 1,
    }


def test_three_orientations_in_one_series_are_a_localizer(tmp_path: Path) -> None:
    uid = generate_uid()
    for plane in ("axial", "coronal", "sagittal"):
        write_series(tmp_path / f"source/glioma/{plane}", head()[:32, :32], plane, SeriesInstanceUID=uid)
    write_series(tmp_path / "source/glioma/t1", head())
    _, summary = convert(tmp_path / "source", SliceRule())
    assert (summary.n_volumes, summary.n_slices) == (1, 5)
    assert summary.skipped == {"DICOM files of localizers": 96}


def test_a_source_in_which_nothing_is_to_be_imported_says_what_it_holds(tmp_path: Path) -> None:
    save(
        mr(PICTURE, Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2"),
        tmp_path / "source/glioma/ct.dcm",
    )
    with pytest.raises(UserError, match="gives no slice: it holds 1 DICOM files of modality CT"):
        convert(tmp_path / "source")


def test_several_images_at_one_place_give_the_first(tmp_path: Path) -> None:
    uid = generate_uid()
    write_series(tmp_path / "first/glioma", head())
    for echo in range(2):
        for path in write_series(tmp_path / f"both/glioma/{echo}", head(seed=echo), SeriesInstanceUID=uid):
            dataset = pydicom.dcmread(path)
            dataset.InstanceNumber += 100 * echo
            save(dataset, path)
    first, _ = convert(tmp_path / "first")
    both, summary = convert(tmp_path / "both")
    assert [path.name for path in sorted(first.rglob("*.png"))] == [path.name for path in sorted(both.rglob("*.png"))]
    assert summary.notes[1:] == ["1 volumes hold several images of each slice (4-D): the first was taken"]


def test_a_series_that_is_there_twice_is_taken_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in write_series(source / "glioma/a", head()):
        copy = source / "glioma/b" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    # The same voxels under other numbers, as another export has them.
    write_series(source / "glioma/c", head())
    _, summary = convert(source, SliceRule())
    assert (summary.n_volumes, summary.n_slices) == (1, 5)
    assert summary.skipped == {volumes.REPEATED: 64}


def test_a_series_in_two_class_folders_stays_in_both_for_validation_to_find(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in write_series(source / "glioma/a", head()):
        copy = source / "notumor" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    work, summary = convert(source, SliceRule())
    assert summary.n_volumes == 2
    assert len(set(groups(work)["patient"])) == 1


def test_gaps_forbid_another_plane_but_not_the_acquired_one(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "source/glioma", head(), "sagittal")
    for path in paths[10:20]:
        path.unlink()
    with pytest.raises(UserError, match="not evenly spaced"):
        convert(tmp_path / "source", SliceRule(plane="axial"), tmp_path / "work")
    _, summary = convert(tmp_path / "source", SliceRule())
    assert summary.n_slices == 5


def test_a_volume_of_flat_voxels_is_cut_as_it_was_scanned(tmp_path: Path) -> None:
    write_nifti(tmp_path / "source/glioma/a.nii", head(), np.diag([1.0, 5, 1, 1]))
    work, _ = convert(tmp_path / "source", SliceRule())
    assert {path.stem[17:-4] for path in work.rglob("*.png")} == {"coronal"}
    assert pictures(work)[0].shape == (32, 40)


def test_a_four_dimensional_file_gives_its_first_volume(tmp_path: Path) -> None:
    write_nifti(tmp_path / "plain/glioma/a.nii", head())
    write_nifti(tmp_path / "four/glioma/a.NII.GZ", np.stack([head(), head(1), head(2)], axis=-1))
    plain, _ = convert(tmp_path / "plain")
    four, summary = convert(tmp_path / "four")
    assert files(plain) == files(four)
    assert "1 volumes hold several images of each slice (4-D): the first was taken" in summary.notes


def test_nan_becomes_dark_and_is_told(tmp_path: Path) -> None:
    voxels = head().astype(np.float32)
    voxels[:, :6] = np.nan
    voxels[:, 6, 0] = np.inf
    write_nifti(tmp_path / "source/glioma/a.nii.gz", voxels)
    work, summary = convert(tmp_path / "source", SliceRule(slices_per_volume=1))
    assert not pictures(work)[0][-6:].any()
    assert pictures(work)[0].any()
    assert any("NaN" in note for note in summary.notes)


NIFTI_CULPRITS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("no volume"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(nifti_bytes(head())[:5000]),
    "truncated and packed": lambda path: path.write_bytes(gzip.compress(nifti_bytes(head()))[:2000]),
    "only NaN": lambda path: path.write_bytes(nifti_bytes(np.full((9, 9, 9), np.nan, np.float32))),
    "constant": lambda path: path.write_bytes(nifti_bytes(np.ones((9, 9, 9), np.int16))),
    "complex": lambda path: path.write_bytes(nifti_bytes(head().astype(np.complex64))),
    "in colour": lambda path: path.write_bytes(
        nifti_bytes(np.zeros((9, 9, 9), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))
    ),
    "a line": lambda path: path.write_bytes(nifti_bytes(np.arange(9, dtype=np.int16))),
    "without directions": lambda path: path.write_bytes(nifti_bytes(head(), np.diag([0.0, 1, 1, 1]))),
    "says it is huge": lambda path: path.write_bytes(huge_nifti()),
}


def nifti_bytes(voxels: NDArray[Any], affine: NDArray[Any] | None = None) -> bytes:
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    if affine is not None:
        image.header.set_sform(affine, code=1)
        image.header.set_qform(None, code=0)
        image._affine = None
    return bytes(image.to_bytes())


def huge_nifti() -> bytes:
    header = nibabel.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)).header
    header["dim"][1:4] = 30000
    return bytes(header.binaryblock) + bytes(4 + 9**3 * 2)


NIFTI_REASONS = {
    "text": "is damaged",
    "empty": "is damaged",
    "truncated": "is damaged",
    "truncated and packed": "is damaged",
    "only NaN": "holds no finite voxel",
    "constant": "shows nothing",
    "complex": "holds colours or complex",
    "in colour": "holds colours or complex",
    "a line": "is no volume of a head: its size is 9",
    "without directions": "has no valid orientation",
    "says it is huge": "is no volume of a head",
}


@pytest.mark.parametrize("culprit", list(NIFTI_CULPRITS))
def test_a_wrong_nifti_file_is_refused_by_name(tmp_path: Path, culprit: str) -> None:
    bad = tmp_path / f"source/glioma/bad.nii{'.gz' if 'packed' in culprit else ''}"
    write_nifti(tmp_path / "source/glioma/fine.nii", head())
    NIFTI_CULPRITS[culprit](bad)
    with pytest.raises(UserError, match=rf"mend or remove: glioma/bad\.nii(\.gz)? {NIFTI_REASONS[culprit]}"):
        convert(tmp_path / "source")


@pytest.mark.parametrize("name", ["case-seg", "case_mask", "case_dseg", "case_brain_mask", "case-labels", "whatever"])
def test_masks_are_counted_and_never_become_images(tmp_path: Path, name: str) -> None:
    write_nifti(tmp_path / "source/glioma/case.nii.gz", head())
    write_nifti(tmp_path / f"source/glioma/{name}.nii.gz", (head() > 200).astype(np.uint8))
    _, summary = convert(tmp_path / "source", SliceRule())
    assert summary.n_volumes == 1
    assert summary.skipped == {MASKS: 1}


def test_a_small_mask_with_any_name_is_counted_too(tmp_path: Path) -> None:
    lesion = np.zeros(head().shape, np.float32)
    lesion[10:12, 10:12, 10:12] = 1
    write_nifti(tmp_path / "source/glioma/case.nii.gz", head())
    write_nifti(tmp_path / "source/glioma/annotation.nii.gz", lesion)
    _, summary = convert(tmp_path / "source", SliceRule())
    assert summary.skipped == {MASKS: 1}


@pytest.mark.parametrize(
    ("volume", "mask"),
    [("case7.nii.gz", "case7-seg.nii.gz"), ("BraTS_1_t1ce.nii", "BraTS_1_seg.nii"), ("T1.nii", "seg.nii")],
)
def test_slices_are_taken_where_the_mask_is_largest(tmp_path: Path, volume: str, mask: str) -> None:
    lesion = np.zeros(head().shape, np.uint8)
    lesion[10:20, 10:20, 22:27] = 4
    lesion[12:14, 12:14, 27:30] = 1
    write_nifti(tmp_path / "source/glioma" / volume, head())
    write_nifti(tmp_path / "source/glioma" / mask, lesion)
    work, _ = convert(tmp_path / "source", SliceRule(slices_per_volume=3))
    assert [int(path.stem[-3:]) for path in sorted(work.rglob("*.png"))] == [22, 24, 26]


def test_a_mask_that_does_not_fit_its_volume_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "source/glioma/case.nii", head())
    write_nifti(tmp_path / "source/glioma/case-seg.nii", np.ones((9, 9, 9), np.uint8))
    with pytest.raises(UserError, match=r"case-seg\.nii is a mask that does not lie on the voxels"):
        convert(tmp_path / "source")


def test_the_tree_stays_and_pictures_are_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_series(source / "archive/Training/glioma_tumor/A/B", head())
    write_nifti(source / "archive/Testing/no_tumor/x.nii.gz", head(1))
    picture = source / "archive/Training/pituitary/p.jpg"
    picture.parent.mkdir()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(picture)
    (source / "archive/readme.txt").write_text("hello")
    before = {name: (source / name).read_bytes() for name in files(source)}
    work, _ = convert(source, SliceRule(slices_per_volume=1))
    names = files(work)
    assert [re.sub(r"[0-9a-f]{16}-axial-\d{3}", "SLICE", name) for name in names] == [
        "archive/Testing/no_tumor/SLICE.png",
        "archive/Training/glioma_tumor/SLICE.png",
        "archive/Training/pituitary/p.jpg",
        "archive/groups.csv",
        "archive/readme.txt",
    ]
    assert (work / "archive/Training/pituitary/p.jpg").read_bytes() == picture.read_bytes()
    assert {name: (source / name).read_bytes() for name in files(source)} == before
    assert list(groups(work / "archive")["path"]) == [name.removeprefix("archive/") for name in names[:2]]


def test_volumes_without_class_folder_are_refused_or_counted(tmp_path: Path) -> None:
    write_nifti(tmp_path / "source/scans/x.nii", head())
    with pytest.raises(UserError, match="no class folder"):
        convert(tmp_path / "source", work=tmp_path / "work")
    write_nifti(tmp_path / "source/train/glioma/x.nii", head())
    _, summary = convert(tmp_path / "source", work=tmp_path / "work-2")
    assert summary.skipped == {volumes.OUTSIDE: 1}
    write_nifti(tmp_path / "source/train/astrocytoma/x.nii", head())
    with pytest.raises(UserError, match="train/astrocytoma, which is none of the four classes"):
        convert(tmp_path / "source", work=tmp_path / "work-3")


def test_a_patient_has_one_hashed_name_over_series_folders_and_imports(tmp_path: Path) -> None:
    write_slice(tmp_path / "one/Training/glioma/a/1.dcm", 0)
    write_slice(tmp_path / "one/Testing/glioma/b/1.dcm", 1, PatientID=" h-4711 ")
    write_slice(tmp_path / "one/Training/glioma/c/1.dcm", 2, PatientID="H-0815")
    write_slice(tmp_path / "two/glioma/d/1.dcm", 3)
    one, summary = convert(tmp_path / "one")
    two, _ = convert(tmp_path / "two")
    (known,) = patients(one)["Testing/glioma"]
    assert HASHED_PATIENT.fullmatch(known)
    assert known in patients(one)["Training/glioma"]
    assert len(patients(one)["Training/glioma"]) == 2
    assert patients(two)["glioma"] == {known}
    assert summary.notes[0] == "3 volumes gave 3 slices"
    assert not any("patient" in note for note in summary.notes)


def test_another_key_gives_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slice(tmp_path / "source/glioma/1.dcm", 0)
    first, _ = convert(tmp_path / "source")
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, KEY[::-1])
    second, _ = convert(tmp_path / "source", work=tmp_path / "again")
    assert patients(first)["glioma"].isdisjoint(patients(second)["glioma"])
    assert [path.name for path in sorted(first.rglob("*.png"))] == [path.name for path in sorted(second.rglob("*.png"))]


def test_without_a_key_patients_stay_together_and_count_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PATIENT_KEY_VARIABLE)
    write_slice(tmp_path / "source/Training/glioma/a/1.dcm", 0)
    write_slice(tmp_path / "source/Testing/glioma/b/1.dcm", 1)
    write_slice(tmp_path / "source/Training/pituitary/c/1.dcm", 2, PatientID="H-0815")
    work, summary = convert(tmp_path / "source")
    found = patients(work)
    assert found["Training/glioma"] == found["Testing/glioma"] != found["Training/pituitary"]
    assert all(name.startswith(UNKNOWN_PATIENT_PREFIX) for names in found.values() for name in names)
    assert any("3 volumes have a patient number" in note and PATIENT_KEY_VARIABLE in note for note in summary.notes)
    again, _ = convert(tmp_path / "source", work=tmp_path / "again")
    assert groups(work).equals(groups(again))


@pytest.mark.parametrize("number", [None, "", "ANONYMOUS", "000000"])
def test_series_without_patient_keep_together_by_study(tmp_path: Path, number: str | None) -> None:
    study = generate_uid()
    write_slice(tmp_path / "source/glioma/a/1.dcm", 0, PatientID=number, StudyInstanceUID=study)
    write_slice(tmp_path / "source/glioma/b/1.dcm", 1, PatientID=number, StudyInstanceUID=study)
    write_slice(tmp_path / "source/pituitary/c/1.dcm", 2, PatientID=number)
    work, summary = convert(tmp_path / "source")
    found = patients(work)
    assert [len(names) for names in found.values()] == [1, 1]
    assert found["glioma"] != found["pituitary"]
    assert all(name.startswith(UNKNOWN_PATIENT_PREFIX) for names in found.values() for name in names)
    assert any("3 volumes have no patient number" in note for note in summary.notes)


def test_bids_subjects_are_patients_and_other_names_are_not(tmp_path: Path) -> None:
    write_nifti(tmp_path / "source/glioma/sub-01/anat/sub-01_T1w.nii.gz", head())
    write_nifti(tmp_path / "source/pituitary/sub-01_T2w.nii.gz", head(1))
    write_nifti(tmp_path / "source/meningioma/BraTS_1_t1.nii.gz", head(2))
    write_nifti(tmp_path / "source/meningioma/BraTS_1_flair.nii.gz", head(3))
    write_nifti(tmp_path / "source/meningioma/BraTS_2_t1.nii.gz", head(4))
    write_nifti(tmp_path / "source/notumor/x/one.nii.gz", head(5))
    write_nifti(tmp_path / "source/notumor/x/two.nii.gz", head(6))
    write_nifti(tmp_path / "source/notumor/y/one.nii.gz", head(7))
    work, _ = convert(tmp_path / "source", SliceRule(slices_per_volume=1))
    found = patients(work)
    assert found["glioma"] == found["pituitary"]
    assert HASHED_PATIENT.fullmatch(next(iter(found["glioma"])))
    # Two cases each: BraTS_1 and BraTS_2; the folders x and y.
    assert [len(found[name]) for name in ("meningioma", "notumor")] == [2, 2]
    unknown = found["meningioma"] | found["notumor"]
    assert all(name.startswith(UNKNOWN_PATIENT_PREFIX) for name in unknown)


def test_groups_of_the_source_are_kept_and_name_volumes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_nifti(source / "glioma/a.nii", head())
    write_series(source / "glioma/case", head(1))
    write_series(source / "pituitary/other", head(2))
    Image.new("L", (8, 8), 3).save(source / "glioma/p.png")
    (source / "groups.csv").write_text(
        "path,patient,origin\nglioma/p.png,P1,\nglioma/a.nii,P1,phantom\nglioma\\case,P2,\n", encoding="utf-8-sig"
    )
    work, _ = convert(source, SliceRule(slices_per_volume=1))
    rows = groups(work)
    assert list(rows.columns) == ["path", "patient", "origin", "plane"]
    assert dict(zip(rows["path"], rows["plane"], strict=True))["glioma/p.png"] == ""
    is_slice = rows["path"] != "glioma/p.png"
    assert all(
        plane in path for path, plane in zip(rows.loc[is_slice, "path"], rows.loc[is_slice, "plane"], strict=True)
    )
    assert sorted(zip(rows["patient"], rows["origin"], strict=True))[:3] == [("P1", ""), ("P1", "phantom"), ("P2", "")]
    # The other series carries the same PatientID: it is of the person whom the row of the first one names.
    assert rows.loc[rows["path"].str.startswith("pituitary"), "patient"].item() == "P2"
    assert (source / "groups.csv").read_text(encoding="utf-8-sig").count("\n") == 4
    assert set(rows["path"]) == set(files(work)) - {"groups.csv"}


def test_two_numbers_for_series_of_one_patient_are_refused_where_a_third_has_none(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number, name in enumerate(("first", "second", "third"), start=1):
        write_series(source / "glioma" / name, head(number))
    (source / "groups.csv").write_text("path,patient\nglioma/first,P1\nglioma/second,P2\n")
    with pytest.raises(UserError, match="the numbers P1, P2, and leaves others out"):
        convert(source)


def test_a_row_that_names_nothing_is_kept_for_the_importer_to_refuse(tmp_path: Path) -> None:
    write_nifti(tmp_path / "source/glioma/a.nii", head())
    (tmp_path / "source/groups.csv").write_text("path,patient\nglioma/b.nii,P1\n")
    work, _ = convert(tmp_path / "source")
    assert "glioma/b.nii" in set(groups(work)["path"])


def test_rows_that_give_one_series_two_patients_are_refused(tmp_path: Path) -> None:
    first, second, *_ = write_series(tmp_path / "source/glioma", head())
    (tmp_path / "source/groups.csv").write_text(f"path,patient\nglioma/{first.name},P1\nglioma/{second.name},P2\n")
    with pytest.raises(UserError, match="gives several patients"):
        convert(tmp_path / "source")


SECRETS = {
    "PatientName": "Sekret^Johanna",
    "PatientID": "H-4711-SEKRET",
    "PatientBirthDate": "19541231",
    "StudyDate": "20190517",
    "StudyTime": "141516.171819",
    "AccessionNumber": "ACC998877",
    "InstitutionName": "Klinikum Musterstadt",
    "ReferringPhysicianName": "Doktor^Wilhelm",
    "OtherPatientIDs": "ALT-5566",
    "PatientComments": "wohnt in der Hauptstrasse",
    "StudyID": "ST-31337",
    "DeviceSerialNumber": "SN0123498765",
}


def test_no_identifying_value_is_left_in_any_byte_name_or_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    study, series = generate_uid(), generate_uid()
    folder = tmp_path / "source/Training/glioma/Sekret_Johanna_19541231"
    paths = write_series(folder, head(), **SECRETS, StudyInstanceUID=study, SeriesInstanceUID=series)
    uids = {pydicom.dcmread(path).SOPInstanceUID for path in paths} | {study, series}
    sidecar = tmp_path / "source/Training/pituitary/sub-Johanna_T1w.nii"
    write_nifti(sidecar, head(1))
    with caplog.at_level("DEBUG"):
        work, summary = convert(tmp_path / "source")
    written = b"".join((work / name).read_bytes() for name in files(work)) + "\n".join(files(work)).encode()
    told = str(summary) + "".join(capfd.readouterr()) + caplog.text
    for secret in [*SECRETS.values(), *uids, "Sekret", "Johanna", "4711"]:
        assert secret.encode() not in written
        assert secret not in told
    for path in work.rglob("*.png"):
        assert chunks(path.read_bytes()) == {b"IHDR", b"IDAT", b"IEND"}
        assert not Image.open(path).info


def chunks(png: bytes) -> set[bytes]:
    """The kinds of chunk in a PNG."""
    kinds, place = set(), 8
    while place < len(png):
        kinds.add(png[place + 4 : place + 8])
        place += 12 + int.from_bytes(png[place : place + 4], "big")
    return kinds


def test_values_that_break_the_standard_are_not_quoted(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skipped = mr(PICTURE, PatientBirthDate="31. Dezember 1954", Modality="SEKRET NAME")
        skipped.SpecificCharacterSet = "SEKRET 2"
        damaged = mr(PICTURE, PatientID="x" * 99, PixelSpacing=[7.25, 1.5])
    save(skipped, tmp_path / "source/glioma/a.dcm")
    path = save(damaged, tmp_path / "source/glioma/b.dcm")
    path.write_bytes(path.read_bytes().replace(b"7.25\\1.5", b"SEKR\\ET."))
    caplog.clear()
    with pytest.raises(UserError, match=r"glioma/b\.dcm is damaged") as caught:
        convert(tmp_path / "source")
    told = str(caught.value) + "".join(capfd.readouterr()) + caplog.text + str([str(item.message) for item in recwarn])
    assert "SEKR" not in told
    assert "1954" not in told
    assert caught.value.__cause__ is None


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    write_series(tmp_path / "source/glioma", head())
    write_nifti(tmp_path / "source/pituitary/a.nii.gz", head(1))
    first, _ = convert(tmp_path / "source")
    second, _ = convert(tmp_path / "source", work=tmp_path / "again")
    assert files(first) == files(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files(first))


def test_progress_counts_headers_and_volumes(tmp_path: Path) -> None:
    write_series(tmp_path / "source/glioma", head())
    write_nifti(tmp_path / "source/pituitary/a.nii.gz", head(1))
    ticks: list[str] = []
    (tmp_path / "work").mkdir()
    convert_volumes(
        tmp_path / "source",
        FolderFiles(tmp_path / "source").paths,
        tmp_path / "work",
        SliceRule(),
        lambda title, total: lambda: ticks.append(f"{title}/{total}"),
    )
    assert ticks == ["reading DICOM headers/32"] * 32 + ["reading volumes/2"] * 2


def test_hidden_files_are_carried_but_never_read(tmp_path: Path) -> None:
    write_nifti(tmp_path / "source/glioma/a.nii", head())
    (tmp_path / "source/glioma/._a.dcm").write_bytes(b"\0" * 9)
    work, _ = convert(tmp_path / "source")
    assert "glioma/._a.dcm" in files(work)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "source/glioma/a.nii", head())
    path.chmod(0)
    with pytest.raises(UserError, match=r"glioma/a\.nii can't be opened"):
        convert(tmp_path / "source")


def test_mutated_files_are_read_or_refused_and_never_crash(tmp_path: Path) -> None:
    rng = random.Random(5)
    dicom = save(mr(PICTURE, WindowCenter=400, WindowWidth=800, PixelSpacing=[1, 1]), tmp_path / "a.dcm")
    samples = [("a.dcm", dicom.read_bytes()), ("a.nii", nifti_bytes(head()))]
    samples += [("a.dcm", bundled(name).read_bytes()) for name in ("MR_small_RLE", "MR_small_jp2klossless")]
    outcomes = set()
    for number in range(240):
        name, content = samples[number % len(samples)]
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 4, 16))):
            mutated[rng.randrange(min(len(mutated), 2000))] = rng.randrange(256)
        path = tmp_path / f"{number}/glioma/{name}"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(mutated[: rng.choice((len(mutated), len(mutated), rng.randrange(len(mutated))))]))
        try:
            convert(tmp_path / str(number))
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("glioma/a.nii", b"", True),
        ("glioma/a.nii.gz", b"", True),
        ("glioma/a.DCM", b"", True),
        ("glioma/a", bytes(128) + b"DICM", True),
        ("glioma/a", b"text", False),
        ("glioma/a.jpg", bytes(128) + b"DICM", False),
        (".cache/a.nii", b"", False),
        ("groups.csv", b"", False),
    ],
)
def test_volumes_are_told_by_name_or_content(tmp_path: Path, name: str, content: bytes, expected: bool) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert is_volume(PurePosixPath(name), lambda relative: (tmp_path / relative).open("rb")) is expected
