from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter

from braintumor.data.manifest import survey
from braintumor.data.oddities import KINDS, measure_oddities, odd_kinds, write_odd_images
from braintumor.params import Params, ValidateParams

SIDE_PX = 224
NUMBERS = ["coloured_share", "coloured_line", "white_line", "sharpness", "mark_length"]

Grey = NDArray[np.uint8]


@pytest.fixture
def limits(params: Params) -> ValidateParams:
    return params.validation


def slice_of_a_head(side_px: int = SIDE_PX, tissue: int = 110, rim: int = 180) -> Grey:
    """Tissue with soft structures in a brighter rim, on a dark background."""
    rows, columns = np.mgrid[:side_px, :side_px] / side_px - 0.5
    radius = np.hypot(rows / 0.42, columns / 0.36)
    grain = gaussian_filter(np.random.default_rng(0).standard_normal((side_px, side_px)), 0.9)
    values = np.where(radius < 1, np.where(radius < 0.9, tissue + 20 * grain / grain.std(), rim), 5)
    return np.clip(values, 0, 255).astype(np.uint8)


def coloured(n_pixels: int, difference: int = 40) -> Image.Image:
    """The first pixels of the middle are bluish."""
    colours = np.repeat(slice_of_a_head()[..., None], 3, axis=2)
    blue = colours[80:144, 80:144, 2]
    blue[np.unravel_index(np.arange(n_pixels), blue.shape)] += np.uint8(difference)
    return Image.fromarray(colours)


def with_line(share: float, level: int, depth: int = 3, turned: int = 0) -> Image.Image:
    grey = slice_of_a_head()
    grey[depth, : round(share * SIDE_PX)] = level
    return Image.fromarray(np.rot90(grey, turned))


def with_banner(share: float) -> Image.Image:
    colours = np.repeat(slice_of_a_head()[..., None], 3, axis=2)
    colours[-5, : round(share * SIDE_PX)] = (20, 60, 160)
    return Image.fromarray(colours)


def with_arrow(length_px: int, level: int = 255, width_px: int = 2, side_px: int = SIDE_PX) -> Image.Image:
    return draw_arrow(Image.fromarray(slice_of_a_head(side_px)), length_px, level, width_px)


def with_arrow_among_white(length_px: int, width_px: int, tissue: int = 150) -> Image.Image:
    return draw_arrow(Image.fromarray(slice_of_a_head(tissue=tissue, rim=250)), length_px, 255, width_px)


def draw_arrow(image: Image.Image, length_px: int, level: int, width_px: int) -> Image.Image:
    """A slanting stroke on the tissue, its measures as at 224 px."""
    scale = image.width / SIDE_PX
    tip = ((80 + 0.8 * length_px) * scale, (140 - 0.6 * length_px) * scale)
    ImageDraw.Draw(image).line(((80 * scale, 140 * scale), tip), fill=level, width=round(width_px * scale))
    return image


def of_tissue_with_stroke(depth_px: int) -> Image.Image:
    """Tissue to the border, and a stroke along it."""
    tissue = np.tile(np.linspace(100, 180, SIDE_PX).astype(np.uint8), (SIDE_PX, 1))
    tissue[depth_px : depth_px + 2, 60:120] = 255
    return Image.fromarray(tissue)


def sharpened(percent: int) -> Image.Image:
    return Image.fromarray(slice_of_a_head()).filter(ImageFilter.UnsharpMask(1.5, percent, 0))


def of_deviation(std: float) -> Image.Image:
    waves = np.tile(np.sin(np.linspace(0, 2 * np.pi, SIDE_PX, endpoint=False)) * np.sqrt(2) * std, (SIDE_PX, 1))
    return Image.fromarray(np.rint(100 + waves).astype(np.uint8))


def of_mean(mean: float) -> Image.Image:
    grey = slice_of_a_head().astype(float)
    return Image.fromarray(np.rint(0.3 * (grey - grey.mean()) + mean).astype(np.uint8))


def of_dark_mean(mean: float) -> Image.Image:
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX] - SIDE_PX / 2
    spot = np.exp(-(rows**2 + columns**2) / (2 * 25**2))
    return Image.fromarray(np.rint(spot * mean / spot.mean()).astype(np.uint8))


# A picture of the kind, and a twin that is just none.
TWINS: list[tuple[str, Callable[[], Image.Image], Callable[[], Image.Image]]] = [
    ("coloured", lambda: coloured(760), lambda: coloured(740)),
    ("coloured", lambda: coloured(760, difference=9), lambda: coloured(760, difference=8)),
    ("banner", lambda: with_banner(0.82), lambda: with_banner(0.78)),
    ("white_frame", lambda: with_line(0.82, 200), lambda: with_line(0.78, 255)),
    ("white_frame", lambda: with_line(1.0, 200, turned=1), lambda: with_line(1.0, 199, turned=1)),
    ("white_frame", lambda: with_line(1.0, 205, depth=21, turned=2), lambda: with_line(1.0, 205, depth=23, turned=2)),
    ("arrows", lambda: with_arrow(40), lambda: with_arrow(6)),
    ("arrows", lambda: with_arrow(40, level=240), lambda: with_arrow(40, level=200)),
    ("arrows", lambda: with_arrow(16, width_px=4), lambda: with_arrow(16, level=235, width_px=4)),
    ("arrows", lambda: with_arrow_among_white(40, 2), lambda: with_arrow_among_white(16, 4, tissue=60)),
    ("arrows", lambda: with_arrow_among_white(40, 2), lambda: with_arrow_among_white(40, 6)),
    ("arrows", lambda: of_tissue_with_stroke(30), lambda: of_tissue_with_stroke(15)),
    ("edge_filtered", lambda: sharpened(220), lambda: sharpened(160)),
    ("nearly_empty", lambda: of_deviation(7.6), lambda: of_deviation(8.4)),
    ("brightness", lambda: of_mean(202), lambda: of_mean(198)),
    ("brightness", lambda: of_dark_mean(4.8), lambda: of_dark_mean(5.2)),
    ("not_square", lambda: Image.fromarray(slice_of_a_head()[1:]), lambda: Image.fromarray(slice_of_a_head())),
]


def kinds_of(image: Image.Image, limits: ValidateParams, folder: Path) -> tuple[str, ...]:
    """The kinds that an image has when it lies in a data set, as PNG."""
    path = folder / "data/train/glioma/it.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    kinds: tuple[str, ...] = odd_kinds(survey(folder / "data", 1, 0.9).images, limits).iloc[0]
    return kinds


@pytest.mark.parametrize("pair", range(len(TWINS)), ids=[kind for kind, _, _ in TWINS])
def test_a_picture_of_each_kind_is_told_from_a_twin_that_is_just_none(
    pair: int, limits: ValidateParams, tmp_path: Path
) -> None:
    kind, odd, plain = TWINS[pair]
    assert kinds_of(odd(), limits, tmp_path) == (kind,)
    assert kinds_of(plain(), limits, tmp_path) == ()


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_a_mode_other_than_grey_and_rgb_is_odd_though_it_holds_the_same_slice(
    mode: str, limits: ValidateParams, tmp_path: Path
) -> None:
    grey = slice_of_a_head()
    match mode:
        case "I;16":
            image = Image.fromarray(grey.astype(np.uint16) * 257)
        case "1":
            image = Image.fromarray(grey > 60)
        case _:
            image = Image.fromarray(grey).convert("RGB" if mode in {"CMYK", "RGBA"} else "L").convert(mode)
    path = tmp_path / "data/train/glioma/it.tif"
    path.parent.mkdir(parents=True)
    image.save(path)
    images = survey(tmp_path / "data", 1, 0.9).images
    assert images.loc[0, "mode"] == mode
    kinds = odd_kinds(images, limits).iloc[0]
    assert "mode" in kinds
    # Black and white dots are white lines and sharp edges as well.
    assert mode == "1" or kinds == ("mode",)


def test_a_grey_slice_is_no_oddity_whether_it_is_stored_as_grey_or_as_rgb(
    limits: ValidateParams, tmp_path: Path
) -> None:
    grey = Image.fromarray(slice_of_a_head())
    assert kinds_of(grey, limits, tmp_path) == ()
    assert kinds_of(grey.convert("RGB"), limits, tmp_path) == ()


def test_the_numbers_are_the_shares_and_lengths_that_were_drawn() -> None:
    grey = np.full((100, 200), 60, np.uint8)
    grey[:, 15] = 255
    grey[::2, 15] = 199
    colours = np.repeat(grey[..., None], 3, axis=2)
    colours[2, :150, 0] += 9
    numbers = measure_oddities(Image.fromarray(colours), grey, float(grey.std()))
    assert numbers["coloured_share"] == pytest.approx(150 / 20_000)
    assert numbers["coloured_line"] == pytest.approx(150 / 200)
    assert numbers["white_line"] == pytest.approx(50 / 100)
    arrow = with_arrow(40)
    assert numbers_of(arrow)["mark_length"] == pytest.approx(40 / SIDE_PX, rel=0.1)


def test_colours_of_a_palette_count_as_well() -> None:
    tinted = coloured(2000)
    share = numbers_of(tinted.quantize(256))["coloured_share"]
    assert share == pytest.approx(numbers_of(tinted)["coloured_share"], rel=0.1)


def test_white_noise_has_the_sharpness_that_theory_gives_it() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (SIDE_PX, SIDE_PX), dtype=np.uint8)
    assert numbers_of(Image.fromarray(noise))["sharpness"] == pytest.approx(np.sqrt(20), rel=0.02)


def test_the_same_edge_is_as_sharp_at_every_size() -> None:
    sharpness = []
    for side_px in (112, 224, 448):
        rows, columns = np.mgrid[:side_px, :side_px] / side_px - 0.5
        disc = Image.fromarray(np.where(np.hypot(rows, columns) < 0.3, 200, 20).astype(np.uint8))
        sharpness.append(numbers_of(disc)["sharpness"])
    assert sharpness == pytest.approx([sharpness[0]] * 3, rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (3, 3), (13, 1)])
def test_pictures_too_small_for_a_measure_have_finite_numbers(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    assert np.isfinite(list(numbers_of(Image.fromarray(pixels)).values())).all()
    assert np.isfinite(list(numbers_of(Image.new("RGB", size, (255, 0, 0))).values())).all()


def test_an_arrow_is_found_at_five_times_the_size_and_in_every_mirror_image() -> None:
    arrow = with_arrow(40, width_px=3)
    length = numbers_of(arrow)["mark_length"]
    assert numbers_of(with_arrow(40, width_px=3, side_px=5 * SIDE_PX))["mark_length"] == pytest.approx(length, rel=0.1)
    for transposition in Image.Transpose:
        assert numbers_of(arrow.transpose(transposition))["mark_length"] == pytest.approx(length)


def test_kinds_belong_to_the_rows_whatever_their_order(limits: ValidateParams, tmp_path: Path) -> None:
    images = survey(a_mixed_data_set(tmp_path), 1, 0.9).images
    kinds = odd_kinds(images, limits)
    shuffled = images.sample(frac=1, random_state=3)
    assert not shuffled["path"].is_monotonic_increasing
    pd.testing.assert_series_equal(odd_kinds(shuffled, limits), kinds.loc[shuffled.index])
    write_odd_images(images, kinds, tmp_path / "first.csv")
    write_odd_images(shuffled, odd_kinds(shuffled, limits), tmp_path / "second.csv")
    assert (tmp_path / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()


def test_an_image_that_can_not_be_decoded_has_no_numbers_and_no_kinds(limits: ValidateParams, tmp_path: Path) -> None:
    images = survey(a_mixed_data_set(tmp_path), 1, 0.9).images.set_index("path", drop=False)
    damaged = images.loc["train/pituitary/damaged.png"]
    assert not damaged["is_readable"]
    assert damaged[NUMBERS].isna().all()
    assert odd_kinds(images, limits)["train/pituitary/damaged.png"] == ()
    assert images.loc[images["is_readable"], NUMBERS].notna().all(axis=None)


def test_the_list_names_kinds_and_numbers_and_leaves_the_new_label_to_a_person(
    limits: ValidateParams, tmp_path: Path
) -> None:
    images = survey(a_mixed_data_set(tmp_path), 1, 0.9).images
    write_odd_images(images, odd_kinds(images, limits), tmp_path / "odd.csv")
    assert (tmp_path / "odd.csv").read_text() == (
        "path,label,kinds,numbers,new_label\n"
        '"train/glioma/a frame, white.png",glioma,not_square white_frame,width 224; height 200; white_line 1,\n'
        "train/notumor/empty.png,notumor,nearly_empty brightness,std 0; mean 0,\n"
        "train/notumor/tinted.png,notumor,coloured,coloured_share 0.0399,\n"
    )


def test_a_data_set_without_odd_images_gives_a_list_without_rows(limits: ValidateParams, tmp_path: Path) -> None:
    path = tmp_path / "data/train/glioma/plain.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(slice_of_a_head()).save(path)
    images = survey(tmp_path / "data", 1, 0.9).images
    write_odd_images(images, odd_kinds(images, limits), tmp_path / "odd.csv")
    assert (tmp_path / "odd.csv").read_text() == "path,label,kinds,numbers,new_label\n"


def test_every_kind_can_be_found(limits: ValidateParams) -> None:
    odd: dict[str, Any] = {
        "is_readable": True,
        "mode": "CMYK",
        "width": 10,
        "height": 9,
        "std": 0.0,
        "mean": 255.0,
        **dict.fromkeys(NUMBERS, 9.0),
    }
    assert odd_kinds(pd.DataFrame([odd]), limits).iloc[0] == KINDS


def numbers_of(image: Image.Image) -> dict[str, float]:
    grey = np.asarray(image.convert("L"))
    return measure_oddities(image, grey, float(grey.std()))


def a_mixed_data_set(folder: Path) -> Path:
    """A frame, a tint, an empty image, a damaged one and a sound one."""
    pictures = {
        "train/glioma/a frame, white.png": with_line(1.0, 255).crop((0, 0, 224, 200)),
        "train/glioma/plain.png": Image.fromarray(slice_of_a_head()),
        "train/notumor/empty.png": Image.new("L", (224, 224)),
        "train/notumor/tinted.png": coloured(2000),
    }
    for name, picture in pictures.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / "data" / name)
    (folder / "data/train/pituitary").mkdir()
    (folder / "data/train/pituitary/damaged.png").write_bytes(b"nothing")
    return folder / "data"
