"""How long the search takes on very many synthetic fingerprints, how much memory, and whether it is right.

    python bench/fingerprints.py --images 100000 --output build/bench

The fingerprints are like real ones: groups of copies of the sizes found in a public set of 6,401 images, mirrored and
altered; slices that share an outline, and neighbouring slices that resemble each other short of being copies.
"""

import argparse
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from braintumor.artifacts import write_json
from braintumor.data.duplicates import HIGH_PASS_SIGMA_PX, SMOOTHING_SIGMA_PX, SYMMETRIES, group_copies
from braintumor.data.fingerprint_store import FINGERPRINT_PX, Fingerprints

COPY_CORRELATION = 0.88
# Sizes of the groups in the public set, and how many groups there are of each.
SIZES = {1: 1429, 2: 1646, 3: 39, 4: 14, 5: 18, 7: 9, 9: 7, 12: 6, 16: 20, 22: 8, 28: 10, 38: 8, 48: 4, 65: 2}
# Of two neighbouring slices, and of a copy with its original.
NEIGHBOURS = (0.55, 0.84)
COPIES = (0.91, 1.0)
OUTLINES = 64
OUTLINE_SHARE = 0.3
TEXTURES = 512
BLOCK = 512

Block = tuple[NDArray[np.int64], Fingerprints]


def main() -> None:
    """Draw the fingerprints, group them, and leave the figures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    prints, truth = draw(options.images, np.random.default_rng(options.seed))
    before_mib = peak_mib()
    digests = [f"{index:012d}" for index in range(len(prints))]
    started, started_cpu = time.perf_counter(), time.process_time()
    groups = group_copies(digests, [None] * len(digests), prints, COPY_CORRELATION)
    result = {
        "images": len(prints),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "peak_mib": peak_mib(),
        "peak_mib_before": before_mib,
        "fingerprints_mib": round(prints.nbytes / 2**20),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **judge(groups, truth),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "fingerprints.json", result)
    for name, value in result.items():
        print(f"{name:16} {value}")


def draw(n_images: int, rng: np.random.Generator) -> tuple[Fingerprints, NDArray[np.int64]]:
    """Fingerprints in random order, and the true group of each."""
    truth, blocks = draw_blocks(n_images, rng)
    prints = np.empty((n_images, FINGERPRINT_PX, FINGERPRINT_PX), np.float16)
    for places, some in blocks:
        prints[places] = some
    return prints, truth


def draw_blocks(n_images: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], Iterator[Block]]:
    """The true group of each image, then the fingerprints in blocks, with the place of each."""
    sizes = rng.choice(list(SIZES), n_images, p=np.array(list(SIZES.values())) / sum(SIZES.values()))
    groups = np.repeat(np.arange(n_images), sizes)[:n_images]
    places = rng.permutation(n_images)
    truth = np.empty_like(groups)
    truth[places] = groups
    return truth, _blocks(groups, places, rng)


def _blocks(groups: NDArray[np.int64], places: NDArray[np.int64], rng: np.random.Generator) -> Iterator[Block]:
    textures = np.stack([unit(band(rng.normal(size=(FINGERPRINT_PX, FINGERPRINT_PX)))) for _ in range(TEXTURES)])
    # Heads are nearly symmetric, so outlines resemble their mirror images.
    outlines = units(textures[:OUTLINES] + textures[:OUTLINES, :, ::-1])
    shiftable = np.tile(textures, (1, 2, 2))
    last = textures[:1]
    for start in range(0, len(groups), BLOCK):
        of_group, first = np.unique(groups[start : start + BLOCK], return_index=True)
        # Every second group is a neighbouring slice of the group before it.
        fresh = mixed(
            outlines[rng.integers(OUTLINES, size=len(of_group))], own(shiftable, len(of_group), rng), OUTLINE_SHARE
        )
        is_continued = bool(start) and groups[start] == groups[start - 1]
        originals = np.where(of_group[:, None, None] % 2, np.roll(fresh, 1, axis=0), fresh)
        is_neighbour = np.flatnonzero(of_group % 2)
        if of_group[0] % 2:
            originals[0] = last[0]
        likeness = rng.uniform(*NEIGHBOURS, len(is_neighbour))
        originals[is_neighbour] = mixed(originals[is_neighbour], own(shiftable, len(is_neighbour), rng), likeness)
        if is_continued:
            originals[0] = last[0]
        last = originals[-1:]
        of_image = np.searchsorted(of_group, groups[start : start + BLOCK])
        likeness = rng.uniform(*COPIES, len(of_image))
        some = mixed(originals[of_image], own(shiftable, len(of_image), rng), likeness)
        for symmetry, chosen in enumerate(
            rng.integers(len(SYMMETRIES), size=len(of_image))[None] == np.arange(4)[:, None]
        ):
            rows, columns = SYMMETRIES[symmetry]
            some[chosen] = some[chosen][:, ::rows, ::columns]
        is_original = np.zeros(len(of_image), bool)
        is_original[first[int(is_continued) :]] = True
        some[is_original] = originals[of_image[is_original]]
        yield places[start : start + BLOCK], some.astype(np.float16)


def band(noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Noise with the spectrum of a fingerprint."""
    smooth = gaussian_filter(noise, SMOOTHING_SIGMA_PX)
    return np.asarray(smooth - gaussian_filter(smooth, HIGH_PASS_SIGMA_PX))


def own(shiftable: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Textures like no other: sums of two of the drawn ones, shifted."""
    result = np.zeros((count, FINGERPRINT_PX, FINGERPRINT_PX), np.float32)
    for _ in range(2):
        numbers, (tops, lefts) = rng.integers(TEXTURES, size=count), rng.integers(FINGERPRINT_PX, size=(2, count))
        for place, (number, top, left) in enumerate(zip(numbers, tops, lefts, strict=True)):
            result[place] += shiftable[number, top : top + FINGERPRINT_PX, left : left + FINGERPRINT_PX]
    return units(result)


def mixed(
    shared: NDArray[np.float32], own_part: NDArray[np.float32], correlation: float | NDArray[np.float64]
) -> NDArray[np.float32]:
    """Fingerprints that have about these correlations with `shared`."""
    weight = np.broadcast_to(np.asarray(correlation, np.float32), len(shared))[:, None, None]
    return units(weight * shared + np.sqrt(1 - weight**2) * own_part)


def units(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each of zero mean and unit length."""
    centred = values - values.mean(axis=(1, 2), keepdims=True)
    return np.asarray(centred / np.linalg.norm(centred, axis=(1, 2), keepdims=True))


def unit(values: NDArray[Any]) -> NDArray[np.float32]:
    """Zero mean, unit length."""
    centred = values - values.mean()
    return np.asarray(centred / np.linalg.norm(centred), np.float32)


def judge(groups: list[str], truth: NDArray[np.int64]) -> dict[str, int]:
    """How many true groups were found, torn apart, or joined with another."""
    found: dict[int, set[str]] = {}
    holds: dict[str, set[int]] = {}
    for name, number in zip(groups, truth.tolist(), strict=True):
        found.setdefault(number, set()).add(name)
        holds.setdefault(name, set()).add(number)
    return {
        "true_groups": len(found),
        "groups": len(holds),
        "torn_groups": sum(len(names) > 1 for names in found.values()),
        "false_groups": sum(len(numbers) > 1 for numbers in holds.values()),
    }


def peak_mib() -> int:
    """The most memory that this process has had, MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
