"""A sample data set of phantoms: synthetic MRI slices drawn on the MNI152 template, no patient data.

Good for the demo and the tests, for nothing else: the lesions are stylised and the faces are made of ellipsoids.

A patient is a slice position, a deformation, a contrast and, but for `notumor`, a lesion in three dimensions. All but
the lesion is drawn before the class is looked at, so that plane, contrast, noise or crop never give the class away.
One thing can't be equal: a pituitary mass shows only in slices through the sella. So every class has the same shares of
planes, and SELLAR_SHARE of the slices of the three other classes go through the sella too, in the same way.

Coordinates are millimetres in the template's space: x to the right, y to the front, z to the top.
"""

from __future__ import annotations

import csv
import functools
import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braintumor.artifacts import GROUPS_FILE, replacing_directory
from braintumor.data.contents import mask_path
from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES, NO_TUMOUR, PHANTOM, PLANE
from braintumor.progress import Progress, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

PLANES = ("axial", "coronal", "sagittal")  # the seed draws from them in this order
CONTRASTS = ("t1", "t1-enhanced", "t2")
PATIENTS_PER_CLASS = {"train": 100, "test": 33}
IMAGE_SIZE_PX = 128
JPEG_QUALITY = 83
# Each process of a pool loads the template anew, which takes seconds.
WORTH_A_POOL = 200

SELLAR_SHARE = 0.5
SEVERAL_SLICES_SHARE = 0.35
SKULL_STRIPPED_SHARE = 0.07
# A lesion covers at least a disc of this share of the image's width, in every slice.
MIN_LESION_SHARE = 0.09
# The grid on which a place for the lesion is sought.
COARSE_PX = 48

SELLA = np.array([0.0, 3.0, -29.0])
VENTRICLES = np.array([0.0, -15.0, 12.0])

# No voxel of the brain, its fluid included, is darker than this in the template held in memory.
BRAIN_T1 = 0.1
# The grain of the distance map of the cranium, and the size of the volume of noise.
CRANIUM_MM = 3
NOISE_VOXELS = 64

# Columns run to the right of the image, rows to its bottom, the normal out of it.
PLANE_AXES = {
    "axial": np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1]], dtype=float),
    "coronal": np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=float),
    "sagittal": np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]], dtype=float),
}
# Where the head is centred in the image, and the levels (mm along the normal) of slices that miss the sella.
HEAD_CENTRE = {"axial": (0, -16, 0), "coronal": (0, 0, -6), "sagittal": (0, -8, -8)}
LEVELS = {"axial": ((0, 52),), "coronal": ((-76, -14), (20, 46)), "sagittal": ((-46, -14), (14, 46))}
SELLAR_SPREAD = {"axial": (-4, 9), "coronal": (-7, 7), "sagittal": (-6, 6)}

# Air-filled, bony and other parts of the face: centre and radii in mm; the paired ones stand on both sides.
FACE = ((0, 38, -62), (60, 54, 66))
NOSE = ((0, 92, -62), (13, 16, 20))
NECK = ((0, -30), (56, 60))
AIRWAYS = (
    ((0, 20, -43), (13, 11, 8)),
    ((0, 48, -38), (11, 18, 9)),
    ((0, 52, -60), (9, 30, 12)),
    ((0, 6, -82), (11, 7, 34)),
    ((34, 48, -62), (12, 16, 14)),
    ((-34, 48, -62), (12, 16, 14)),
    ((44, -40, -44), (9, 11, 9)),
    ((-44, -40, -44), (9, 11, 9)),
)
EYES = (((32, 66, -34), (12.5, 12.5, 12.5)), ((-32, 66, -34), (12.5, 12.5, 12.5)))
CORD_RADIUS_MM = 6.0

# Intensities from 0 to 1 in each contrast; a lesion's are conspicuous in all three, which life does not grant.
TISSUE = {
    "t1": dict(csf=0.16, grey=0.45, white=0.66, bone=0.07, marrow=0.42, fat=0.88, muscle=0.36, air=0.01, eye=0.2),
    "t1-enhanced": dict(
        csf=0.14, grey=0.37, white=0.47, bone=0.06, marrow=0.4, fat=0.82, muscle=0.36, air=0.01, eye=0.18
    ),
    "t2": dict(csf=0.82, grey=0.5, white=0.36, bone=0.06, marrow=0.36, fat=0.66, muscle=0.22, air=0.01, eye=0.85),
}
LESION_TISSUE = {
    "t1": dict(necrosis=0.1, rim=0.84, oedema=0.3, meningioma=0.88, pituitary=0.8),
    "t1-enhanced": dict(necrosis=0.08, rim=0.86, oedema=0.26, meningioma=0.88, pituitary=0.82),
    "t2": dict(necrosis=0.97, rim=0.12, oedema=0.76, meningioma=0.96, pituitary=0.96),
}
# The grain of the unevenness of a lesion's surface.
BUMPS_MM = 4.5


@dataclass(frozen=True)
class Phantom:
    """One slice of a phantom patient: a grey image and the mask of its lesion, both (size_px, size_px)."""

    patient: int
    slice_number: int
    label: str
    image: NDArray[np.uint8]
    lesion: NDArray[np.bool_]
    plane: str
    contrast: str
    is_sellar: bool


@dataclass(frozen=True)
class SampleSummary:
    """What `draw_sample` wrote."""

    output: Path
    images: int
    masks: int
    patients: int
    images_per_class: dict[str, int]
    bytes: int


@dataclass(frozen=True)
class Template:
    """The head that every patient is a deformation of; volumes are indexed (x, y, z)."""

    t1: Floats  # 1 mm, 0 outside the brain
    t1_origin: Floats
    cranium: Floats  # CRANIUM_MM, signed distance in mm to the inside of the skull, negative within
    cranium_origin: Floats
    noise: Floats  # NOISE_VOXELS cubed, periodic, unit variance


@dataclass(frozen=True)
class Anatomy:
    """How one patient is built and scanned; drawn without looking at the class."""

    plane: str
    is_sellar: bool
    contrast: str
    slices: int
    slice_gap_mm: float
    axes: Floats  # (3, 3): columns, rows, normal of the image, scaled, in template space
    centre: Floats  # the template point in the middle of the middle slice
    waves: tuple[Floats, Floats, Floats]  # directions (K, 3), phases (K,), amplitudes (K, 3) in mm
    ventricle_growth: float
    field_of_view_mm: float
    is_mirrored: bool
    skull_mm: float
    scalp_mm: float
    is_skull_stripped: bool
    tissue: Mapping[str, float]  # intensity of each tissue, 0 to 1
    noise_offset: Floats
    exposure: float
    gamma: float
    bias: Floats  # (5,) coefficients of x, y, x^2, y^2, xy
    noise_level: float
    blur_px: float
    background: float


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid with an uneven surface, in template space."""

    label: str
    centre: Floats
    radii_mm: Floats  # (3,)
    unevenness: float
    core: float  # size of the necrotic core, as a share of the radius
    push: float  # how much of the tissue in its place it pushes aside
    shade: float  # added to its intensities
    lobe: Floats  # offset of a second, smaller lobe in mm


@functools.lru_cache(maxsize=1)
def load_template() -> Template:
    """The MNI152 template of nilearn's wheel stands in memory, once a process."""
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError as error:
        raise UserError(
            "nilearn, whose MNI152 template the phantoms are drawn on, is not installed here;"
            " run 'pip install braintumor[sample]'"
        ) from error
    from scipy import ndimage

    volume = load_mni152_template(resolution=1)
    t1 = np.asarray(volume.dataobj, dtype=np.float32)
    # The template is a mean over many heads: sharpened, its folds look like those of one.
    inside = t1 > 0
    t1 = np.where(inside, (t1 + 0.9 * (t1 - ndimage.gaussian_filter(t1, 1.6))).clip(BRAIN_T1, 1), 0)
    origin = volume.affine[:3, 3]

    margin = 20
    brain = np.pad(inside[::CRANIUM_MM, ::CRANIUM_MM, ::CRANIUM_MM], margin)
    dilated = ndimage.distance_transform_edt(~brain, sampling=CRANIUM_MM) < 10
    closed = ndimage.distance_transform_edt(dilated, sampling=CRANIUM_MM) > 8
    cranium = ndimage.distance_transform_edt(~closed, sampling=CRANIUM_MM)
    cranium -= ndimage.distance_transform_edt(closed, sampling=CRANIUM_MM)
    cranium = ndimage.gaussian_filter(cranium, 0.8)

    noise = np.random.default_rng(0).standard_normal((NOISE_VOXELS,) * 3)
    noise = ndimage.gaussian_filter(noise, 1.3, mode="wrap")
    return Template(
        t1=t1.astype(np.float32),
        t1_origin=origin.astype(np.float32),
        cranium=cranium.astype(np.float32),
        cranium_origin=(origin - margin * CRANIUM_MM).astype(np.float32),
        noise=(noise / noise.std()).astype(np.float32),
    )


def draw_patient(patient: int, label: str, seed: int, size_px: int = IMAGE_SIZE_PX) -> list[Phantom]:
    """The slices of one patient; the same (patient, label, seed) gives the same pixels whatever else is drawn.

    The lesion shows in every slice; the mask of `notumor` is empty.
    """
    template = load_template()
    # Slices that no lesion fits are drawn anew; they are rare, or the class would show in the choice of slices.
    for attempt in range(20):
        streams = np.random.SeedSequence([seed, patient, CLASS_NAMES.index(label), attempt]).spawn(3)
        anatomy_rng, lesion_rng, pixel_rng = map(np.random.default_rng, streams)
        anatomy = draw_anatomy(anatomy_rng, must_be_sellar=label == "pituitary")
        lesion = place_lesion(label, anatomy, template, lesion_rng) if label != NO_TUMOUR else None
        if lesion is None and label != NO_TUMOUR:
            continue
        middle = (anatomy.slices - 1) / 2
        phantoms = []
        for index in range(anatomy.slices):
            image, mask = render(anatomy, lesion, template, (index - middle) * anatomy.slice_gap_mm, size_px, pixel_rng)
            phantoms.append(
                Phantom(patient, index + 1, label, image, mask, anatomy.plane, anatomy.contrast, anatomy.is_sellar)
            )
        return phantoms
    raise RuntimeError(f"no place for a lesion in 20 slices of patient {patient}, {label}, seed {seed}")


def is_conspicuous(mask: NDArray[np.bool_]) -> bool:
    """True where the lesion is as large as a disc of MIN_LESION_SHARE of the image's width."""
    return bool(mask.mean() >= np.pi / 4 * MIN_LESION_SHARE**2)


def draw_anatomy(rng: np.random.Generator, must_be_sellar: bool) -> Anatomy:
    """One patient without a lesion, and the way it is scanned."""
    plane = str(rng.choice(PLANES))
    is_sellar = bool(rng.random() < SELLAR_SHARE) or must_be_sellar
    contrast = str(rng.choice(CONTRASTS))
    columns, rows, normal = PLANE_AXES[plane]

    spans = LEVELS[plane]
    level = rng.uniform(*spans[int(rng.integers(len(spans)))])
    past_sella = rng.uniform(*SELLAR_SPREAD[plane])
    through = SELLA + (past_sella if is_sellar else level - SELLA @ normal) * normal

    tilt = rotation(*np.deg2rad(rng.uniform([-9, -9, -6], [9, 9, 6])))
    turn = np.deg2rad(rng.normal(0, 6))
    spin = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    scale = rng.uniform(0.92, 1.08, size=3)
    axes = spin @ np.array([columns, rows, normal]) @ tilt.T
    jitter = rng.normal(0, 5, size=2)
    to_head = np.array(HEAD_CENTRE[plane]) - through
    centre = through + axes[0] * (to_head @ axes[0] + jitter[0]) + axes[1] * (to_head @ axes[1] + jitter[1])

    wave_length_mm = rng.uniform(55, 140, size=6)
    directions = rng.normal(size=(6, 3))
    directions *= (2 * np.pi / wave_length_mm / np.linalg.norm(directions, axis=1))[:, None]
    amplitudes = rng.normal(0, 1, size=(6, 3)) * (wave_length_mm / 55)[:, None] * 0.75

    tissue = {name: float(np.clip(value * rng.uniform(0.88, 1.12), 0, 1)) for name, value in TISSUE[contrast].items()}
    return Anatomy(
        plane=plane,
        is_sellar=is_sellar,
        contrast=contrast,
        slices=int(rng.integers(2, 5)) if rng.random() < SEVERAL_SLICES_SHARE else 1,
        slice_gap_mm=rng.uniform(2.5, 4.0),
        axes=(axes * scale).astype(np.float32),
        centre=centre.astype(np.float32),
        waves=(
            directions.astype(np.float32),
            rng.uniform(0, 2 * np.pi, size=6).astype(np.float32),
            amplitudes.astype(np.float32),
        ),
        ventricle_growth=rng.uniform(-0.25, 0.35),
        field_of_view_mm=rng.uniform(195, 240),
        is_mirrored=bool(rng.random() < 0.5),
        skull_mm=rng.uniform(4, 8),
        scalp_mm=rng.uniform(4, 8),
        is_skull_stripped=bool(rng.random() < SKULL_STRIPPED_SHARE),
        tissue=tissue,
        noise_offset=rng.uniform(0, NOISE_VOXELS, size=3).astype(np.float32),
        exposure=rng.uniform(0.6, 1.05),
        gamma=rng.uniform(0.85, 1.2),
        bias=rng.normal(0, 0.1, size=5).astype(np.float32),
        noise_level=rng.uniform(0.008, 0.03),
        blur_px=rng.uniform(0.0, 0.6),
        background=max(0.0, rng.normal(-0.02, 0.03)),
    )


def rotation(about_x: float, about_y: float, about_z: float) -> NDArray[np.float64]:
    """The rotation by three angles in radians, (3, 3)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos([about_x, about_y, about_z]), np.sin([about_x, about_y, about_z])
    x_turn = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y_turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    z_turn = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    turn: NDArray[np.float64] = x_turn @ y_turn @ z_turn
    return turn


def slice_points(anatomy: Anatomy, offset_mm: float, size_px: int) -> Floats:
    """The template point that each pixel of a slice shows, (size_px, size_px, 3)."""
    steps = ((np.arange(size_px, dtype=np.float32) + 0.5) / size_px - 0.5) * anatomy.field_of_view_mm
    columns, rows, normal = anatomy.axes
    across = -steps if anatomy.is_mirrored else steps
    points = anatomy.centre + offset_mm * normal + steps[:, None, None] * rows + across[None, :, None] * columns
    directions, phases, amplitudes = anatomy.waves
    points = points + np.sin(points @ directions.T + phases) @ amplitudes
    from_ventricles = points - VENTRICLES.astype(np.float32)
    near = np.exp(-(from_ventricles**2).sum(-1, keepdims=True) / (2 * 24**2))
    points = points - anatomy.ventricle_growth * near * from_ventricles
    return np.asarray(points, dtype=np.float32)


def sample_volume(volume: Floats, points: Floats, outside: float) -> Floats:
    """The volume at points given in voxels, linearly interpolated; (..., 3) in, (...) out."""
    from scipy import ndimage

    voxels = np.moveaxis(points, -1, 0)
    values: Floats = ndimage.map_coordinates(volume, voxels, order=1, cval=outside, output=np.float32)
    return values


def cranium_distance(template: Template, points: Floats) -> Floats:
    """Signed distance in mm to the inside of the skull, negative within."""
    return sample_volume(template.cranium, (points - template.cranium_origin) / CRANIUM_MM, outside=60)


def texture(template: Template, points: Floats, voxel_mm: float, offset: Floats) -> Floats:
    """Smooth noise of unit variance whose grain is about 3 * voxel_mm, the same at the same point."""
    from scipy import ndimage

    voxels = np.moveaxis(points / voxel_mm + offset, -1, 0)
    noise: Floats = ndimage.map_coordinates(template.noise, voxels, order=1, mode="grid-wrap", output=np.float32)
    return noise


def ellipsoid_distance(points: Floats, centre: Sequence[float], radii: Sequence[float]) -> Floats:
    """About the signed distance in mm to an ellipsoid, negative within."""
    radii_mm = np.asarray(radii, dtype=np.float32)
    scaled = (points - np.asarray(centre, dtype=np.float32)) / radii_mm
    distance: Floats = (np.sqrt(np.einsum("...i,...i", scaled, scaled)) - 1) * radii_mm.min()
    return distance


def soft(distance: Floats, width_mm: float = 1.2) -> Floats:
    """1 within (negative distance), 0 outside, with an edge of about width_mm."""
    share: Floats = np.clip(0.5 - distance / width_mm, 0, 1)
    return share


def place_lesion(label: str, anatomy: Anatomy, template: Template, rng: np.random.Generator) -> Lesion | None:
    """A lesion of the class that shows in every slice of the patient; None where none fits."""
    points = slice_points(anatomy, 0.0, COARSE_PX).reshape(-1, 3)
    # Away from the image's border, where the crop could hide it.
    rows, columns = np.divmod(np.arange(len(points)), COARSE_PX)
    is_shown = (np.minimum(rows, columns) > 3) & (np.maximum(rows, columns) < COARSE_PX - 4)
    depth = -cranium_distance(template, points)
    from_sella = np.linalg.norm(points - SELLA, axis=1)
    is_brain = sample_volume(template.t1, points - template.t1_origin, outside=0) > 0.3
    middle = (anatomy.slices - 1) / 2
    outer_slices = [slice_points(anatomy, side * middle * anatomy.slice_gap_mm, COARSE_PX) for side in (-1, 1)]
    for _ in range(12):
        radius, details = draw_lesion_shape(label, rng)
        if label == "glioma":
            is_place = is_brain & (depth > 0.65 * radius + 4) & (from_sella > radius + 12)
        elif label == "meningioma":
            is_place = (np.abs(depth - 0.45 * radius) < 3) & (from_sella > radius + 24) & (points[:, 2] > -42)
        else:
            is_place = from_sella < from_sella.min() + 3
        places = np.flatnonzero(is_place & is_shown)
        if not len(places):
            continue
        lesion = Lesion(label=label, centre=points[rng.choice(places)], **details)
        if all(is_conspicuous(lesion_mask(lesion, template, anatomy, outer)) for outer in outer_slices):
            return lesion
    return None


def draw_lesion_shape(label: str, rng: np.random.Generator) -> tuple[float, dict[str, Any]]:
    """The lesion's mean radius in mm, and all fields of a `Lesion` but its label and centre."""
    stretch = rng.uniform(0.85, 1.18, size=3)
    shade = rng.uniform(-0.07, 0.07)
    if label == "glioma":
        radius = rng.uniform(14, 23)
        details = dict(unevenness=rng.uniform(0.16, 0.27), core=rng.uniform(0.42, 0.62), push=0.35, lobe=np.zeros(3))
    elif label == "meningioma":
        radius = rng.uniform(13, 20)
        details = dict(unevenness=rng.uniform(0.0, 0.05), core=0.0, push=0.6, lobe=np.zeros(3))
    else:
        radius = rng.uniform(12, 18)
        details = dict(unevenness=rng.uniform(0.0, 0.06), core=0.0, push=0.5, lobe=np.array([0, 0, 0.8 * radius]))
    return radius, details | dict(radii_mm=(radius * stretch).astype(np.float32), shade=shade)


def lesion_distance(lesion: Lesion, points: Floats, unevenness: Floats) -> Floats:
    """Distance from the lesion's centre as a share of its radius: 1 on its surface."""
    distance: Floats = np.linalg.norm((points - lesion.centre) / lesion.radii_mm, axis=-1)
    if lesion.lobe.any():
        lobe = np.linalg.norm((points - lesion.centre - lesion.lobe) / (0.72 * lesion.radii_mm), axis=-1)
        distance = np.minimum(distance, lobe)
    return distance + lesion.unevenness * unevenness


def lesion_room(lesion: Lesion, template: Template, points: Floats, cranium: Floats) -> Floats:
    """1 where the lesion may grow, 0 elsewhere; (H, W, 3) and (H, W) in, (H, W) out."""
    room: Floats = np.ones_like(cranium)
    if lesion.label == "glioma":
        # Infiltrating, it stops at the brain's own surface.
        room = soft(cranium + 3, 2) * np.clip(
            sample_volume(template.t1, points - template.t1_origin, 0) / BRAIN_T1, 0, 1
        )
    elif lesion.label == "meningioma":
        room = soft(cranium)
    return room


def lesion_mask(lesion: Lesion, template: Template, anatomy: Anatomy, points: Floats) -> NDArray[np.bool_]:
    """True where the mass itself is, without oedema and dural tail; (H, W, 3) in, (H, W) out."""
    bumps = texture(template, points, BUMPS_MM, anatomy.noise_offset + 17)
    room = lesion_room(lesion, template, points, cranium_distance(template, points))
    return (lesion_distance(lesion, points, bumps) < 1) & (room > 0.5)


def render(
    anatomy: Anatomy,
    lesion: Lesion | None,
    template: Template,
    offset_mm: float,
    size_px: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One slice as a scanner would show it, and the lesion's mask; both (size_px, size_px)."""
    points = slice_points(anatomy, offset_mm, size_px)
    cranium = cranium_distance(template, points)
    brain_points = push_aside(points, lesion) if lesion else points
    t1 = sample_volume(template.t1, brain_points - template.t1_origin, outside=0)

    image = paint_head(anatomy, template, points, cranium, t1)
    mask = np.zeros((size_px, size_px), dtype=bool)
    if lesion:
        image = paint_lesion(image, anatomy, lesion, template, points, cranium, t1)
        mask = lesion_mask(lesion, template, anatomy, points)
    return scan(image, anatomy, rng), mask


def push_aside(points: Floats, lesion: Lesion) -> Floats:
    """The points that the tissue at `points` came from, before the mass grew."""
    offset = points - lesion.centre
    reach = 1.5 * float(lesion.radii_mm.mean())
    pushed: Floats = np.exp(-(offset**2).sum(-1, keepdims=True) / reach**2) * offset
    return points - lesion.push * pushed


def paint_head(anatomy: Anatomy, template: Template, points: Floats, cranium: Floats, t1: Floats) -> Floats:
    """Brain, fluid, skull, scalp and face as intensities 0 to 1, (size_px, size_px)."""
    tissue = anatomy.tissue
    grain = texture(template, points, 1.6, anatomy.noise_offset)
    shades = [tissue[name] for name in ("csf", "csf", "grey", "grey", "white")]
    brain = np.interp(t1, [0.0, 0.36, 0.62, 0.72, 0.92], shades) * (1 + 0.035 * grain)
    inside = soft(cranium)
    if anatomy.is_skull_stripped:
        stripped: Floats = inside * brain * soft(0.3 - t1, 0.2)
        return stripped

    shell = anatomy.skull_mm + anatomy.scalp_mm
    (neck_x, neck_y), neck_radii = NECK
    neck = np.hypot((points[..., 0] - neck_x) / neck_radii[0], (points[..., 1] - neck_y) / neck_radii[1]) - 1
    neck = np.maximum(neck * min(neck_radii), points[..., 2] + 30)
    face = np.minimum(ellipsoid_distance(points, *FACE), ellipsoid_distance(points, *NOSE))
    head = np.minimum(np.minimum(cranium - shell, neck), face)
    head += 0.7 * texture(template, points, 7, anatomy.noise_offset)

    patches = texture(template, points, 2.4, anatomy.noise_offset)
    # Muscle, with fat between its parts and a little bone.
    flesh = tissue["muscle"] + (tissue["fat"] - tissue["muscle"]) * np.clip(0.4 * patches - 0.2, 0, 0.6)
    flesh += (tissue["bone"] - flesh) * np.clip(-0.5 * patches - 0.4, 0, 0.7)
    flesh *= 1 + 0.05 * grain
    air = np.minimum.reduce([ellipsoid_distance(points, *airway) for airway in AIRWAYS]) + patches
    flesh += soft(air) * (tissue["air"] - flesh)
    eyes = np.minimum.reduce([ellipsoid_distance(points, *eye) for eye in EYES])
    flesh += soft(eyes - 2.5, 2) * (tissue["fat"] - flesh)
    flesh += soft(eyes) * (tissue["eye"] - flesh)

    skin = soft(np.abs(head + 0.5 * anatomy.scalp_mm) - 0.5 * anatomy.scalp_mm)
    flesh += skin * (tissue["fat"] * (1 + 0.06 * patches) - flesh)
    bone = tissue["bone"] + (tissue["marrow"] - tissue["bone"]) * soft(
        np.abs(cranium - 0.5 * anatomy.skull_mm) - 0.18 * anatomy.skull_mm
    )
    image: Floats = flesh + soft(cranium - anatomy.skull_mm) * (bone - flesh)
    image += inside * (brain - image)

    # The spinal cord goes on below the template's last slice.
    cord = np.hypot(points[..., 0], points[..., 1] + 42 + 0.1 * (points[..., 2] + 72)) - CORD_RADIUS_MM
    below = soft(points[..., 2] + 66, 6)
    image += below * soft(cord - 4) * (tissue["csf"] - image)
    image += below * soft(cord) * (tissue["white"] - image)
    image *= soft(head)
    return image


def paint_lesion(
    image: Floats,
    anatomy: Anatomy,
    lesion: Lesion,
    template: Template,
    points: Floats,
    cranium: Floats,
    t1: Floats,
) -> Floats:
    """The image with the lesion in it."""
    tissue = {name: value + lesion.shade for name, value in LESION_TISSUE[anatomy.contrast].items()}
    bumps = texture(template, points, BUMPS_MM, anatomy.noise_offset + 17)
    grain: Floats = 1 + 0.04 * texture(template, points, 1.6, anatomy.noise_offset + 31)
    radius = float(lesion.radii_mm.mean())
    distance = lesion_distance(lesion, points, bumps)
    room = lesion_room(lesion, template, points, cranium)
    if lesion.label == "glioma":
        oedema = np.clip((1.8 + 0.3 * bumps - distance) / 0.4, 0, 1) * room * np.clip((t1 - 0.45) / 0.25, 0, 1)
        image = image + 0.85 * oedema * (tissue["oedema"] * grain - image)
        mass: Floats = soft((distance - 1) * radius, 2.5) * room
        image = image + mass * (tissue["rim"] * grain * (1 + 0.12 * bumps) - image)
        # The core has an outline of its own, so that the rim is thick here and thin there.
        hollows = texture(template, points, BUMPS_MM, anatomy.noise_offset + 43)
        core = soft((distance - lesion.core + 0.13 * hollows) * radius, 2.5) * room
        image = image + core * (tissue["necrosis"] - image)
        return image
    if lesion.label == "meningioma":
        # The displaced vessels around it are dark in every contrast.
        cleft = soft((distance - 1) * radius - 1.5) * room
        image = image + cleft * (anatomy.tissue["bone"] - image)
        tail = soft((distance - 1.5) * radius) * soft(-cranium - 2.5) * room
        mass = (1 - (1 - soft((distance - 1) * radius)) * (1 - tail)) * room
        image = image + mass * (tissue["meningioma"] * grain - image)
        return image
    # Bone of the widened sella around it.
    mass = soft((distance - 1) * radius)
    image = image + soft((distance - 1) * radius - 2) * (anatomy.tissue["bone"] - image)
    image = image + mass * (tissue["pituitary"] * grain - image)
    return image


def scan(image: Floats, anatomy: Anatomy, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image with exposure, bias field, blur, Rician noise and background, as 8 bits."""
    from scipy import ndimage

    size_px = len(image)
    line = np.linspace(-1, 1, size_px, dtype=np.float32)
    x, y = line[None, :], line[:, None]
    bias = np.exp(sum(c * term for c, term in zip(anatomy.bias, (x, y, x * x, y * y, x * y), strict=True)))
    exposed = anatomy.exposure * bias * np.clip(image, 0, 1) ** anatomy.gamma
    signal = ndimage.gaussian_filter(exposed, anatomy.blur_px) + anatomy.background
    noise = anatomy.noise_level * rng.standard_normal((2, size_px, size_px), dtype=np.float32)
    magnitude = np.hypot(signal + noise[0], noise[1])
    return np.asarray((np.clip(magnitude, 0, 1) * 255).round(), dtype=np.uint8)


def draw_sample(
    output: Path,
    patients_per_class: Mapping[str, int] = PATIENTS_PER_CLASS,
    seed: int = 0,
    size_px: int = IMAGE_SIZE_PX,
    with_masks: bool = False,
    processes: int | None = None,
    progress: Progress = silent,
) -> SampleSummary:
    """A data set of phantoms stands at `output`, whole, or nothing does.

    `patients_per_class` maps each split to its number of patients in every class; no patient is in two splits. The
    files are `SPLIT/CLASS/CLASS-p00123-s2.jpg` (grey JPEG) and `groups.csv` (path below `output`, patient, origin,
    plane). With masks, the lesions of the test images stand in `masks/SPLIT/CLASS/` (PNG, 255 in the lesion).
    `processes` defaults to the number of cores, which import the caller's main module again.

    Raises UserError where `output` holds anything already.
    """
    output = Path(output)
    refuse_occupied(output)
    orders = list(number_patients(patients_per_class, seed, size_px))
    rows: list[tuple[str, str, str, str]] = []
    images_per_class: Counter[str] = Counter()
    masks = 0
    with replacing_directory(output, may_hold=None) as folder:
        advance = progress("sample: drawing patients", len(orders))
        for split, phantoms in draw_all(orders, processes):
            for phantom in phantoms:
                path = f"{split}/{phantom.label}/{file_stem(phantom)}.jpg"
                save_image(phantom.image, folder / path)
                if with_masks and split == "test" and phantom.lesion.any():
                    save_image(phantom.lesion * np.uint8(255), folder / mask_path(path))
                    masks += 1
                rows.append((path, f"p{phantom.patient:05d}", PHANTOM, phantom.plane))
                images_per_class[phantom.label] += 1
            advance()
        write_groups(rows, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return SampleSummary(output, len(rows), masks, len(orders), dict(images_per_class), size)


def refuse_occupied(folder: Path) -> None:
    """Raises UserError unless the folder is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name another one, or remove it first")


@dataclass(frozen=True)
class Order:
    """A patient to draw, and the split it belongs to."""

    split: str
    patient: int
    label: str
    seed: int
    size_px: int


def number_patients(patients_per_class: Mapping[str, int], seed: int, size_px: int) -> Iterator[Order]:
    """Every patient of the sample, numbered from 1 without a gap; the classes take turns."""
    patient = 0
    for split, patients in patients_per_class.items():
        for _ in range(patients):
            for label in CLASS_NAMES:
                patient += 1
                yield Order(split, patient, label, seed, size_px)


def draw_order(order: Order) -> tuple[str, list[Phantom]]:
    """The split and the slices of one ordered patient."""
    return order.split, draw_patient(order.patient, order.label, order.seed, order.size_px)


def draw_all(orders: list[Order], processes: int | None) -> Iterator[tuple[str, list[Phantom]]]:
    """The patients in order, drawn by several processes where that is worth their start."""
    processes = processes or os.cpu_count() or 1
    if processes == 1 or len(orders) < WORTH_A_POOL:
        yield from map(draw_order, orders)
        return
    # Spawned, because the caller may hold threads (a progress bar, TensorFlow) that do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(draw_order, orders, chunksize=8)


def file_stem(phantom: Phantom) -> str:
    """The name of a slice's file: class, patient and slice."""
    return f"{phantom.label}-p{phantom.patient:05d}-s{phantom.slice_number}"


def save_image(pixels: NDArray[np.uint8], path: Path) -> None:
    """The grey image is at `path`, in the format of its suffix."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    # Pillow finds the format in the name.
    content.name = path.name
    Image.fromarray(pixels).save(content, quality=JPEG_QUALITY, optimize=True)
    # Not by Pillow: it takes what a full disk holds of a JPEG for the whole.
    path.write_bytes(content.getvalue())


def write_groups(rows: Iterable[tuple[str, str, str, str]], folder: Path) -> None:
    """`groups.csv` lists which images show the same patient, that none of them exists, and the plane of each."""
    with (folder / GROUPS_FILE).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "patient", "origin", PLANE))
        writer.writerows(sorted(rows))
