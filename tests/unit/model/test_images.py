from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from braintumor.model.images import UnreadableImage, decode_grey, load_images, resize_square


@pytest.fixture
def slice_file(tmp_path: Path) -> Path:
    path = tmp_path / "slice.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (120, 90), np.uint8)
    Image.fromarray(noise).save(path, quality=90)
    return path


def test_grey_and_colour_copies_of_an_image_give_the_same_pixels(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode in ("L", "RGB", "RGBA", "P", "LA"):
        grey.convert(mode).save(tmp_path / f"{mode}.png")
        np.testing.assert_array_equal(decode_grey(tmp_path / f"{mode}.png"), np.asarray(grey))


def test_sixteen_bit_image_spans_the_whole_range(tmp_path: Path) -> None:
    values = np.linspace(100, 4095, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "dicom.png")
    grey = decode_grey(tmp_path / "dicom.png")
    assert (grey.min(), grey.max()) == (0, 255)
    assert (np.diff(grey.ravel().astype(int)) >= 0).all()


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert decode_grey(tmp_path / "clear.png").max() == 0


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    pixels = np.zeros((40, 20), np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    grey = decode_grey(tmp_path / "turned.jpg")
    assert grey[-5:].mean() > 250 > 5 > grey[:5].mean()


@pytest.mark.parametrize("kept_bytes", [0, 1, 20, 500, 2000])
def test_damaged_file_is_named(slice_file: Path, kept_bytes: int) -> None:
    slice_file.write_bytes(slice_file.read_bytes()[:kept_bytes])
    with pytest.raises(UnreadableImage) as error:
        decode_grey(slice_file)
    assert str(slice_file) in str(error.value)


def test_text_named_jpg_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("patient 7, see next slice")
    with pytest.raises(UnreadableImage, match="is not an image"):
        decode_grey(tmp_path / "notes.jpg")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="is missing"):
        decode_grey(tmp_path / "gone.jpg")


def test_picture_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(UnreadableImage, match="10000 x 10000"):
        decode_grey(tmp_path / "huge.png")


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (40, 100), (100, 40), (1, 300)])
def test_resized_image_is_square_and_keeps_its_aspect_ratio(shape: tuple[int, int]) -> None:
    square = resize_square(np.full(shape, 200, np.uint8), 64)
    assert square.shape == (64, 64)
    lit_rows, lit_columns = (square > 100).any(axis=1).sum(), (square > 100).any(axis=0).sum()
    assert max(lit_rows, lit_columns) == 64
    expected = max(1, round(64 * min(shape) / max(shape)))
    assert min(lit_rows, lit_columns) == expected


def test_shrinking_keeps_the_mean() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (256, 256), np.uint8)
    assert abs(resize_square(noise, 64).mean() - noise.mean()) < 1


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for value in (10, 20, 30):
        Image.new("L", (8, 8), value).save(tmp_path / f"{value}.png")
    images = load_images(tmp_path, ["30.png", "10.png", "20.png"], 8)
    assert images.shape == (3, 8, 8, 1)
    assert images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [30, 10, 20]
