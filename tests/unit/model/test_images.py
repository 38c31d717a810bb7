import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from braintumor.model.images import MAX_PIXELS, UnreadableImage, decode_grey, load_images, resize_square

RAMP = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1))


def encoded(pixels: Any, kind: str, mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(np.asarray(pixels))
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def png_of_16_bits(pixels: Any, colour_type: int) -> bytes:
    """A PNG as Pillow can't write it: `pixels` is (height, width, samples)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def little_endian_tiff(pixels: Any, photometric: int) -> bytes:
    """An uncompressed TIFF in one strip, whose samples mean what tag 262 says."""
    height, width = pixels.shape[:2]
    samples = pixels[0, 0].size
    tags = {
        256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: photometric, 273: 150, 277: samples,
        278: height, 279: pixels.nbytes, 339: 3 if pixels.dtype.kind == "f" else 1,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return directory.ljust(150, b"\0") + pixels.tobytes()


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


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", None])
@pytest.mark.parametrize("pixels", [RAMP * np.uint16(16) + 100, RAMP * np.int32(70_000) - 9, RAMP * np.float32(0.1)])
def test_image_of_many_bits_is_scaled_by_its_own_range(tmp_path: Path, pixels: Any, compression: str | None) -> None:
    (tmp_path / "dicom.tif").write_bytes(encoded(pixels, "TIFF", compression=compression))
    np.testing.assert_array_equal(decode_grey(tmp_path / "dicom.tif"), RAMP)


def test_png_of_sixteen_bits_is_scaled_by_its_own_range(tmp_path: Path) -> None:
    (tmp_path / "dicom.png").write_bytes(encoded(RAMP * np.uint16(16), "PNG"))
    np.testing.assert_array_equal(decode_grey(tmp_path / "dicom.png"), RAMP)
    (tmp_path / "flat.png").write_bytes(encoded(np.full((9, 9), 3000, np.uint16), "PNG"))
    assert decode_grey(tmp_path / "flat.png").max() == 0


def test_large_image_is_scaled_like_a_small_one(tmp_path: Path) -> None:
    values = np.arange(2048 * 1024, dtype=np.int32).reshape(2048, 1024)
    (tmp_path / "large.tif").write_bytes(encoded(values, "TIFF"))
    expected = np.rint(values / values.max() * 255)
    np.testing.assert_array_equal(decode_grey(tmp_path / "large.tif"), expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("colour.jpg", encoded(RAMP, "JPEG", "RGB", quality=95)),
        ("progressive.jpg", encoded(RAMP, "JPEG", progressive=True, quality=95)),
        ("jpeg named so.png", encoded(RAMP, "JPEG", quality=95)),
        # Pillow writes and reads CMYK inverted, as Photoshop does.
        ("print.jpg", encoded(RAMP, "JPEG", "CMYK", quality=95)),
        ("print.tif", encoded(RAMP, "TIFF", "CMYK")),
        ("palette.png", encoded(RAMP, "PNG", "P")),
        ("palette.bmp", encoded(RAMP, "BMP", "P")),
        ("white is zero.tif", little_endian_tiff(255 - RAMP, photometric=0)),
        ("black is zero.tif", little_endian_tiff(RAMP * np.uint16(16), photometric=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_the_format_the_grey_is_the_same(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert np.abs(decode_grey(tmp_path / name).astype(int) - RAMP).max() <= 4


def test_black_and_white_image_keeps_its_two_levels(tmp_path: Path) -> None:
    fax = encoded(RAMP > 100, "TIFF", compression="group4")
    (tmp_path / "fax.tif").write_bytes(fax)
    np.testing.assert_array_equal(decode_grey(tmp_path / "fax.tif"), (RAMP > 100) * 255)


def test_transparency_of_a_palette_lies_on_black(tmp_path: Path) -> None:
    opacity = bytes(range(0, 256))
    (tmp_path / "palette.png").write_bytes(encoded(RAMP, "PNG", "P", transparency=opacity))
    indices = np.asarray(Image.fromarray(RAMP).convert("P"), float)
    assert np.abs(decode_grey(tmp_path / "palette.png") - RAMP * indices / 255).max() <= 2


NO_NUMBER = np.where(RAMP == 255, np.nan, RAMP).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("film.png", encoded(RAMP, "PNG", save_all=True, append_images=[Image.fromarray(RAMP[::-1])] * 2), "3 frames"),
        ("stack.tif", encoded(RAMP, "TIFF", save_all=True, append_images=[Image.fromarray(RAMP)] * 8), "9 frames"),
        ("camera.jpg", encoded(RAMP, "MPO", save_all=True, append_images=[Image.fromarray(RAMP)]), "2 frames"),
        ("film.gif.png", encoded(RAMP, "GIF"), "not an image in JPEG"),
        ("web.jpg", encoded(RAMP, "WEBP"), "not an image in JPEG"),
        ("nan.tif", encoded(NO_NUMBER, "TIFF"), "NaN"),
        ("infinite.tif", encoded(np.where(NO_NUMBER > 9, np.inf, 0).astype(np.float32), "TIFF"), "infinite"),
        ("lab.tif", encoded(RAMP[..., None].repeat(3, 2), "TIFF", "LAB"), "can't be turned to grey"),
        # What Pillow reads otherwise than it is meant, without saying so.
        ("colour.png", png_of_16_bits(RAMP[..., None].repeat(3, 2) * np.uint16(16), 2), "16 bits a colour"),
        ("opacity.png", png_of_16_bits(RAMP[..., None].repeat(2, 2) * np.uint16(16), 4), "16 bits a colour"),
        ("negative.tif", little_endian_tiff(RAMP * np.uint16(16), photometric=0), "white as zero"),
        ("negative float.tif", little_endian_tiff(RAMP.astype(np.float32), photometric=0), "white as zero"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_image_that_would_lose_something_is_refused(tmp_path: Path, name: str, content: bytes, fact: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=fact) as refusal:
        decode_grey(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)


def test_postscript_named_jpg_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "page.jpg").write_bytes(encoded(RAMP, "EPS"))
    with pytest.raises(UnreadableImage, match="is not an image"):
        decode_grey(tmp_path / "page.jpg")
    assert not (tmp_path / "started").exists()


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


def test_folder_and_file_without_rights_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UnreadableImage, match=r"folder\.jpg can't be read \(Is a directory\)"):
        decode_grey(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match=r"pipe\.jpg is empty"):
        decode_grey(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with pytest.raises(UnreadableImage, match=r"loop\.jpg can't be read \(Too many levels"):
        decode_grey(tmp_path / "loop.jpg")


def stating(content: bytes, marker: bytes, new: bytes) -> bytes:
    """The file with other numbers behind its first `marker`."""
    place = content.index(marker) + len(marker)
    return content[:place] + new + content[place + len(new) :]


DECODE_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from braintumor.model.images import UnreadableImage, decode_grey
with open("/proc/self/statm") as statm:
    present = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (present + (32 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        decode_grey(Path(path))
        print("decoded", path)
    except UnreadableImage as refusal:
        print("refused", refusal)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address space is measured on Linux")
def test_picture_that_would_fill_the_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("note", " " * 50_000_000, zip=True)
    endless = little_endian_tiff(RAMP, photometric=1)
    bombs = {
        "20000 x 20000.png": encoded(np.zeros((20_000, 20_000), bool), "PNG"),
        "12000 x 12000.png": encoded(np.zeros((12_000, 12_000), bool), "PNG"),
        "65000 x 65000.jpg": stating(encoded(RAMP, "JPEG"), b"\xff\xc0\0\x0b\x08", struct.pack(">HH", 65_000, 65_000)),
        "40 x 1000000.bmp": stating(encoded(RAMP, "BMP"), b"\x28\0\0\0", struct.pack("<ii", 40, 1_000_000)),
        "endless.tif": stating(endless, struct.pack("<HHI", 256, 4, 1), b"\xff" * 4),
        "text.png": encoded(RAMP, "PNG", pnginfo=text),
        "profile.png": encoded(RAMP, "PNG", icc_profile=bytes(50_000_000)),
    }
    for name, content in bombs.items():
        assert len(content) < 100_000
        (tmp_path / name).write_bytes(content)
    ended = subprocess.run(
        [sys.executable, "-c", DECODE_IN_LITTLE_MEMORY, *(tmp_path / name for name in bombs)],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    told = ended.stdout.splitlines()
    assert [line.partition(f"{tmp_path}/")[0] for line in told] == ["refused "] * len(bombs)
    assert all(name in line for name, line in zip(bombs, told, strict=True))
    assert ["pixels" in line for line in told] == [True] * 5 + [False] * 2
    assert ["too large" in line for line in told] == [False] * 5 + [True] * 2
    # Pillow's warnings are for programmers.
    assert ended.stderr == ""


def test_largest_image_is_decoded_and_a_larger_one_is_refused_with_its_size(tmp_path: Path) -> None:
    Image.new("1", (5000, 5001)).save(tmp_path / "larger.png")
    with pytest.raises(UnreadableImage, match="5000 x 5001"):
        decode_grey(tmp_path / "larger.png")
    Image.new("1", (5000, MAX_PIXELS // 5000)).save(tmp_path / "largest.png")
    assert decode_grey(tmp_path / "largest.png").size == MAX_PIXELS


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
