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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from braintumor.artifacts import write_json
from braintumor.data.duplicates import (
    FINGERPRINT_PX,
    HIGH_PASS_SIGMA_PX,
    SMOOTHING_SIGMA_PX,
    SYMMETRIES,
    Fingerprints,
    group_copies,
)

COPY_CORRELATION = 0.88
# Sizes of the groups in the public set, and how many groups there are of each.
SIZES = {1: 1429, 2: 1646, 3: 39, 4: 14, 5: 18, 7: 9, 9: 7, 12: 6, 16: 20, 22: 8, 28: 10, 38: 8, 48: 4, 65: 2}
# Of two neighbouring slices, and of a copy with its original.
NEIGHBOURS = (0.55, 0.84)
COPIES = (0.91, 1.0)
OUTLINES = 64
OUTLINE_SHARE = 0.3
TEXTURES = 512


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
    textures = np.stack([unit(band(rng.normal(size=(FINGERPRINT_PX, FINGERPRINT_PX)))) for _ in range(TEXTURES)])
    # Heads are nearly symmetric, so outlines resemble their mirror images.
    outlines = [unit(texture + texture[:, ::-1]) for texture in textures[:OUTLINES]]
    sizes = rng.choice(list(SIZES), n_images, p=np.array(list(SIZES.values())) / sum(SIZES.values()))
    truth = np.repeat(np.arange(n_images), sizes)[:n_images]
    places = rng.permutation(n_images)
    prints = np.empty((n_images, FINGERPRINT_PX, FINGERPRINT_PX), np.float16)
    original = textures[0]
    for index, place in enumerate(places):
        if index and truth[index] == truth[index - 1]:
            rows, columns = SYMMETRIES[rng.integers(len(SYMMETRIES))]
            copy = mixed(original, own(textures, rng), rng.uniform(*COPIES))
            prints[place] = copy[::rows, ::columns]
            continue
        if index % 2:
            original = mixed(original, own(textures, rng), rng.uniform(*NEIGHBOURS))
        else:
            original = mixed(outlines[rng.integers(OUTLINES)], own(textures, rng), OUTLINE_SHARE)
        prints[place] = original
    shuffled = np.empty_like(truth)
    shuffled[places] = truth
    return prints, shuffled


def band(noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Noise with the spectrum of a fingerprint."""
    smooth = gaussian_filter(noise, SMOOTHING_SIGMA_PX)
    return np.asarray(smooth - gaussian_filter(smooth, HIGH_PASS_SIGMA_PX))


def own(textures: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A texture like no other: two of the drawn ones, shifted."""
    first, second = (
        np.roll(textures[rng.integers(TEXTURES)], rng.integers(FINGERPRINT_PX, size=2), (0, 1)) for _ in range(2)
    )
    return unit(first + second)


def mixed(shared: NDArray[np.float32], own_part: NDArray[np.float32], correlation: float) -> NDArray[np.float32]:
    """A fingerprint that has about this correlation with `shared`."""
    return unit(correlation * shared + float(np.sqrt(1 - correlation**2)) * own_part)


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
