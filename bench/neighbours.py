"""Copies among very many images by approximate neighbours: recall against the exact search, time, memory, parts.

    python bench/neighbours.py --images 50000 --exact --parts 1 4 --output build/bench
    python bench/neighbours.py --images 1000000 --parts 1 4 --folder /scratch --output build/bench
    python bench/neighbours.py --dataset FOLDER --exact --parts 1 4 --output build/bench

Synthetic fingerprints are those of `fingerprints.py`, written to a file that is removed at the end; with --dataset they
are of all images in a folder. Every division into parts must give the same groups, each part computed from the files
alone. Pairs are those of two images that are copies by the exact search, in whatever group they end up.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fingerprints import COPY_CORRELATION, draw_blocks, judge
from numpy.typing import NDArray

from braintumor.artifacts import write_json
from braintumor.data.duplicates import (
    COARSE_MARGIN,
    CopyIndex,
    Links,
    build_index,
    correlations,
    find_links,
    fingerprint,
    load_index,
    name_groups,
    parts,
    save_index,
    similar_pairs,
)
from braintumor.data.fingerprint_store import FINGERPRINT_PX, ROW_BYTES, FingerprintFiles, FingerprintWriter
from braintumor.labels import IMAGE_SUFFIXES
from braintumor.model.images import decode_grey

BLOCK = 512

Returned = TypeVar("Returned")


def main() -> None:
    """Make the fingerprints, group them, and leave the figures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--dataset", type=Path, help="a folder of images, instead of synthetic fingerprints")
    parser.add_argument("--exact", action="store_true", help="search exactly too, and compare")
    parser.add_argument("--parts", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, help="where the fingerprints are kept meanwhile")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file, index_file = Path(folder, "fingerprints.npy"), Path(folder, "index.npz")
        truth = of_folder(options.dataset, file) if options.dataset else draw(options.images, file, options.seed)
        with FingerprintFiles([file]) as store:
            result = measure(store, index_file, options.parts, options.exact, truth)
    result |= {"cores": os.cpu_count(), "machine": platform.machine()}
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / f"neighbours-{result['images']}.json", result)
    for name, value in result.items():
        print(f"{name:28} {value}")


def measure(
    store: FingerprintFiles, index_file: Path, divisions: list[int], is_compared: bool, truth: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Time, memory, and how right the groups are."""
    count = len(store)
    forget_peak()
    result: dict[str, Any] = {"images": count, "fingerprints_mib": round(count * ROW_BYTES / 2**20)}
    index, result["index"] = timed("index", lambda: build_index(store, seed=1, approximate_above=0))
    save_index(index, index_file)
    del index
    result["index_mib"] = round(index_file.stat().st_size / 2**20)
    result["peak_mib_index"] = peak_mib()
    names = [f"{row:012d}" for row in range(count)]
    groups: dict[int, list[str]] = {}
    for division in divisions:
        forget_peak()
        links, took = [], []
        for number, part in enumerate(parts(count, division)):
            found, seconds = timed(
                f"part {number + 1} of {division}", lambda part=part: search(store, index_file, part)
            )
            links.append(found)
            took.append(seconds)
        result[f"parts_{division}"] = took
        result[f"peak_mib_parts_{division}"] = peak_mib()
        groups[division], result["names"] = timed(
            "names", lambda links=links: name_groups(names, [None] * count, links)
        )
    first = groups[divisions[0]]
    result["same_groups_by_all_divisions"] = all(of == first for of in groups.values())
    result["groups"] = len(set(first))
    if truth is not None:
        result["by_truth"] = judge(first, truth)
    return result | (compare(store, names, first) if is_compared else {})


def search(store: FingerprintFiles, index_file: Path, part: range) -> Links:
    """The links of one part, as a task of its own finds them."""
    return find_links(store, load_index(index_file), part, COPY_CORRELATION)


def compare(store: FingerprintFiles, names: list[str], groups: list[str]) -> dict[str, Any]:
    """The groups against those of the exact search, and the pairs of the exact search that they hold together."""
    fingerprints = store[np.arange(len(store))]
    exact, took = timed(
        "exact", lambda: find_links(fingerprints, CopyIndex(len(store), None), range(len(store)), COPY_CORRELATION)
    )
    expected = name_groups(names, [None] * len(names), [exact])
    of_image = np.unique(groups, return_inverse=True)[1]
    n_pairs = n_held = 0
    for candidates in similar_pairs(fingerprints, COPY_CORRELATION - COARSE_MARGIN):
        for start in range(0, len(candidates.first), BLOCK):
            some = type(candidates)(*(getattr(candidates, name)[start : start + BLOCK] for name in vars(candidates)))
            is_copy = correlations(fingerprints, some) > COPY_CORRELATION
            n_pairs += int(is_copy.sum())
            n_held += int((of_image[some.first] == of_image[some.second])[is_copy].sum())
    against_exact = judge(groups, np.unique(expected, return_inverse=True)[1])
    n_exact = against_exact["true_groups"]
    return {
        "exact": took,
        "exact_pairs": n_pairs,
        "recall_of_pairs": n_held / n_pairs if n_pairs else None,
        "against_exact": against_exact,
        "recall_of_groups": 1 - (against_exact["torn_groups"] / n_exact),
    }


def draw(n_images: int, file: Path, seed: int) -> NDArray[np.int64]:
    """Synthetic fingerprints are in `file`; the true group of each."""
    truth, blocks = draw_blocks(n_images, np.random.default_rng(seed))
    with FingerprintWriter(file) as writer:
        writer.append(np.zeros((0, FINGERPRINT_PX, FINGERPRINT_PX), np.float16))
    header = file.stat().st_size
    # Written at their places by hand, as copies must not stand side by side.
    with file.open("r+b") as target:
        np.lib.format.write_array_header_1_0(
            target, {"descr": "<f2", "fortran_order": False, "shape": (n_images, FINGERPRINT_PX, FINGERPRINT_PX)}
        )
        for number, (places, some) in enumerate(blocks):
            for place, one in zip(places.tolist(), some, strict=True):
                os.pwrite(target.fileno(), one.tobytes(), header + place * ROW_BYTES)
            if number % 100 == 0:
                print(f"{number * len(places)} fingerprints are drawn", flush=True)
    return truth


def of_folder(dataset: Path, file: Path) -> None:
    """The fingerprints of all images under `dataset` are in `file`."""
    paths = sorted(path for path in dataset.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    with FingerprintWriter(file) as writer, ThreadPoolExecutor() as pool:
        for one in pool.map(lambda path: fingerprint(decode_grey(path)), paths):
            writer.append(one)


def timed(what: str, work: Callable[[], Returned]) -> tuple[Returned, dict[str, float]]:
    """The result of `work`, and its seconds by the clock and of processor time."""
    started, started_cpu = time.perf_counter(), time.process_time()
    returned = work()
    seconds = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
    }
    print(f"{what}: {seconds}, peak {peak_mib()} MiB", flush=True)
    return returned, seconds


def forget_peak() -> None:
    """The most memory is counted from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> int:
    """The most resident memory since `forget_peak`, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return round(int(kib) / 1024)


if __name__ == "__main__":
    main()
