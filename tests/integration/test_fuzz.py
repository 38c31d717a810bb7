"""Ten thousand damaged files: each is decoded to the size that it states or refused by name; none crashes or hangs.

As a script this file decodes mutants in a process of its own, which a decoder's native code may bring down:
`python tests/integration/test_fuzz.py FOLDER FAMILY SEED FIRST COUNT`.
"""

import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from braintumor.artifacts import FINDINGS, read_json

ROOT = Path(__file__).parents[2]
SEED = 20
MUTANTS = {"jpg": 10_000, "png": 1000, "tif": 1000, "bmp": 500}
# Of the processor, for one file; the slowest takes a hundredth of it.
LIMIT_SECONDS = 20
LIMIT_BYTES = 1 << 30

Random = np.random.Generator
Mutation = Callable[[bytearray, list[bytes], Random], bytearray]


def originals(family: str) -> list[bytes]:
    """A few phantoms in each variant of the format: grey, colour, palette, 16 bits, several frames."""
    slices = [Image.open(path) for path in sorted((ROOT / "data/train").rglob("*.jpg"))[::150]]
    small = [image.resize((48, 40)) for image in slices]
    sixteen_bits = [Image.fromarray(np.asarray(image, np.uint16) * 200) for image in small]
    exif = Image.Exif()
    exif[0x0112] = 6
    if family == "jpg":
        return [
            *(encoded(image, "JPEG") for image in slices[:2]),
            *(encoded(image, "JPEG", quality=70) for image in small),
            *(encoded(image, "JPEG", progressive=True) for image in small),
            *(encoded(image.convert("RGB"), "JPEG", exif=exif) for image in small),
            encoded(small[0].convert("RGB"), "JPEG", restart_marker_rows=1),
            encoded(small[0].convert("CMYK"), "JPEG"),
        ]
    if family == "png":
        return [
            *(encoded(image.convert(mode), "PNG") for image in small[:2] for mode in ("1", "L", "LA", "RGB", "RGBA")),
            encoded(small[0].convert("P"), "PNG", transparency=bytes(range(256))),
            encoded(sixteen_bits[0], "PNG"),
            encoded(small[0], "PNG", save_all=True, append_images=small[1:3]),
        ]
    if family == "tif":
        return [
            *(encoded(small[0], "TIFF", compression=name) for name in (None, "tiff_lzw", "tiff_adobe_deflate")),
            *(encoded(small[1].convert("RGB"), "TIFF", compression=name) for name in ("packbits", "jpeg", "zstd")),
            encoded(small[0].convert("1"), "TIFF", compression="group4"),
            encoded(small[0].convert("P"), "TIFF"),
            encoded(small[0].convert("F"), "TIFF"),
            encoded(sixteen_bits[0], "TIFF"),
            encoded(sixteen_bits[0], "TIFF", compression="tiff_lzw"),
            encoded(small[0], "TIFF", save_all=True, append_images=small[1:3]),
        ]
    return [encoded(small[0].convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flip_bits(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    for place in random.integers(len(content), size=random.integers(1, 20)):
        content[place] ^= 1 << random.integers(8)
    return content


def truncate(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    return content[: random.integers(len(content))]


def splice(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    other = others[random.integers(len(others))]
    return content[: random.integers(len(content))] + other[random.integers(len(other)) :]


def drop_or_repeat_a_part(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    first, last = sorted(random.integers(len(content), size=2))
    return content[:first] + content[first:last] * random.integers(3) + content[last:]


def overwrite_with_a_limit(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    """Extreme numbers, most of them in the header."""
    for _ in range(random.integers(1, 5)):
        reach = len(content) if random.random() < 0.2 else min(len(content), 700)
        limits = (b"\0", b"\xff", b"\x7f\xff", b"\xff\xff", b"\0\0", b"\0\0\0\0", b"\xff\xff\xff\xff", random.bytes(2))
        limit = limits[random.integers(len(limits))]
        place = random.integers(reach)
        content[place : place + len(limit)] = limit
    return content


def swap_markers(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    """JPEG segments turned into others: Huffman tables, frames, scans, restarts, ends."""
    markers = [place + 1 for place in range(len(content) - 1) if content[place] == 0xFF and content[place + 1] >= 0xC0]
    for _ in range(random.integers(1, 4)):
        if markers:
            place = markers[random.integers(len(markers))]
            content[place] = random.integers(0xC0, 0x100)
    return content


def change_stated_size(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    """A JPEG whose frame header tells of another picture."""
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    if frame >= 0:
        sides = (0, 1, 7, 31, 200, 1000, 5000, 65_500)
        content[frame + 5 : frame + 9] = struct.pack(">HH", *(sides[random.integers(len(sides))] for _ in range(2)))
    return content


def change_a_chunk(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    """A PNG chunk changed so that its checksum is right again."""
    starts = [place for place in range(4, len(content) - 8) if content[place : place + 4].isalpha()]
    if not starts:
        return content
    start = starts[random.integers(len(starts))]
    (length,) = struct.unpack(">I", content[start - 4 : start])
    end = start + 4 + length
    if length and end + 4 <= len(content):
        content[start + 4 + random.integers(min(length, 20))] = random.integers(256)
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[start:end]))
    return content


def change_a_tag(content: bytearray, others: list[bytes], random: Random) -> bytearray:
    """An entry of a TIFF directory with another tag, type, count or value."""
    if len(content) < 8:
        return content
    (directory,) = struct.unpack("<I", content[4:8])
    if directory + 2 <= len(content):
        (entries,) = struct.unpack("<H", content[directory : directory + 2])
        place = directory + 2 + 12 * int(random.integers(max(1, min(entries, 40)))) + int(random.choice((0, 2, 4, 8)))
        value = int(random.choice((0, 1, 3, 5, 8, 16, 65_535, 2**31 - 1, 2**32 - 1)))
        content[place : place + 4] = struct.pack("<I", value)
    return content


EVERYWHERE: list[Mutation] = [flip_bits, truncate, splice, drop_or_repeat_a_part, overwrite_with_a_limit]
MUTATIONS: dict[str, list[Mutation]] = {
    "jpg": [*EVERYWHERE, swap_markers, change_stated_size],
    "png": [*EVERYWHERE, change_a_chunk],
    "tif": [*EVERYWHERE, change_a_tag],
    "bmp": EVERYWHERE,
}


def mutants(family: str, seed: int, first: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Damaged files by number; a number and a seed always give the same one."""
    sources = originals(family)
    for number in range(first, first + count):
        random = np.random.default_rng([seed, number])
        content = bytearray(sources[random.integers(len(sources))])
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            mutation = MUTATIONS[family][random.integers(len(MUTATIONS[family]))]
            content = mutation(content or bytearray(1), sources, random)
        yield number, bytes(content)


def judge(path: Path) -> str:
    """'decoded' or 'refused'; an AssertionError, or whatever else goes wrong, for anything between."""
    from braintumor.model.images import UnreadableImage, decode_grey

    try:
        grey = decode_grey(path)
    except UnreadableImage as refusal:
        assert str(refusal).startswith(f"{path} "), refusal
        assert "memory" not in str(refusal), refusal
        return "refused"
    with Image.open(path) as image:
        stated = image.size
    assert grey.dtype == np.uint8
    # EXIF may have turned it.
    assert sorted(grey.shape) == sorted(stated)
    return "decoded"


def judge_all(folder: Path, family: str, seed: int, first: int, count: int) -> None:
    """Print what became of the mutants; the one under way stands in `folder`, named by its number."""
    # Memory that a file of some kilobytes asks for fails here, and not on somebody's machine.
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    verdicts: Counter[str] = Counter()
    for number, content in mutants(family, seed, first, count):
        path = folder / f"{number}.{family}"
        path.write_bytes(content)
        # The kernel ends the process, in whatever native loop it is.
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
        verdicts[judge(path)] += 1
        path.unlink()
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(verdicts))


@pytest.mark.parametrize("family", MUTANTS)
def test_every_damaged_file_is_decoded_or_refused_by_name(tmp_path: Path, family: str) -> None:
    arguments = [family, SEED, 0, MUTANTS[family]]
    ended = subprocess.run(
        [sys.executable, __file__, tmp_path, *map(str, arguments)],
        # One thread more of numpy's algebra takes a quarter of the address space.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, f"{[path.name for path in tmp_path.iterdir()]}: {ended.stderr[-2000:]}"
    assert "Warning" not in ended.stderr
    verdicts = json.loads(ended.stdout)
    assert sum(verdicts.values()) == MUTANTS[family]
    # Otherwise the mutations are too weak, or too strong, to try anything.
    assert min(verdicts["decoded"], verdicts["refused"]) > MUTANTS[family] / 20


@pytest.mark.filterwarnings("ignore:::PIL")
def test_validation_names_exactly_the_unreadable_files_and_passes_without_what_it_names(
    store: Path, tmp_path: Path, braintumor: Any, dataset_maker: Callable[..., Path], params_writer: Callable[..., Path]
) -> None:
    data = dataset_maker(tmp_path / "data")
    params_writer(tmp_path / "params.yaml")
    verdicts = {}
    for family, count in {"jpg": 300, "png": 50, "tif": 50, "bmp": 50}.items():
        for number, content in mutants(family, SEED, 0, count):
            path = data / "train/glioma" / f"{number}.{family}"
            path.write_bytes(content)
            verdicts[path.relative_to(data).as_posix()] = judge(path)
    assert braintumor("resolve").code == 0
    ended = braintumor("validate")
    assert ended.code == 3
    assert "Warning" not in ended.err

    findings = read_json(tmp_path / "build/validation" / FINDINGS, "")["findings"]
    named = {
        finding["name"]: [culprit.split(" ")[0] for culprit in finding["culprits"]]
        for finding in findings
        if finding["severity"] == "critical"
    }
    assert named["unreadable"] == sorted(path for path, verdict in verdicts.items() if verdict == "refused")
    # What can be decoded may still be of no use: a picture of one pixel.
    assert set(named) <= {"unreadable", "width", "height"}
    for path in {path for paths in named.values() for path in paths}:
        (data / path).unlink()
    for step in ("resolve", "validate", "split"):
        ended = braintumor(step)
        assert ended.code == 0, ended.err


if __name__ == "__main__":
    judge_all(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
