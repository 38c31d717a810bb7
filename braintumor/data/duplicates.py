"""Copies of one slice: identical files, identical pixels, and recompressed, resized, mirrored or retouched versions.

Perceptual hashes (pHash, dHash) miss mirrored copies, and public brain MRI sets are full of them. So every image is
reduced to a fingerprint, its band-passed 96 x 96 version of even local contrast, and two images count as copies where
their fingerprints correlate above a threshold in one of the four symmetries that keep a rectangle in place.
Band-passing leaves edges and texture: two different slices share the outline of a head, hardly its gyri. Even local
contrast gives the gyri as much weight as the bright skull, which neighbouring slices of one head share, and makes the
fingerprint blind to what public sets do to their copies: saturation, sharpening, equalised histograms.
"""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from braintumor.data import neighbours
from braintumor.data.fingerprint_store import FINGERPRINT_PX, Fingerprints, FingerprintStore
from braintumor.errors import UserError
from braintumor.labels import DECLARED_SPLITS, UNKNOWN_PATIENT_PREFIX

COARSE_PX = 32
# The band: finer structures are at the mercy of compression and resizing, coarser ones are the outline of the head.
SMOOTHING_SIGMA_PX = 0.7
HIGH_PASS_SIGMA_PX = 2.0
# Texture is divided by its own local standard deviation, over this distance, plus a share of that of the whole image:
# without it the noise of the background would count as much as the head.
CONTRAST_SIGMA_PX = 3.0
CONTRAST_FLOOR = 0.3
# Of 0..255, in the band: below it only noise and compression are left, which may resemble anything.
MIN_TEXTURE_STD = 0.5
# How much looser the search at 32 x 32 is than the decision at 96 x 96.
COARSE_MARGIN = 0.15
# More images than these are searched by an index of neighbours: the time of the exact search grows with the square of
# their number.
APPROXIMATE_ABOVE = 50_000
# Images in a block of the search, and pairs in a block of the decision: 4 MiB of floats and 36 MiB of fingerprints.
SEARCH_BLOCK = 512
DECISION_BLOCK = 1024
DECISION_PORTION = 64
# Identity, left-right, up-down, 180 degrees: the steps of rows and columns.
SYMMETRIES = ((1, 1), (1, -1), (-1, 1), (-1, -1))

OnBlock = Callable[[], None]


@dataclass(frozen=True)
class Pairs:
    """Candidates for copies: image `first[i]` resembles image `second[i]` seen in symmetry `symmetry[i]`."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    symmetry: NDArray[np.intp]


@dataclass(frozen=True)
class Links:
    """Proven copies: image `first[i]` and image `second[i]`. A pair that others already link is left out."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]


@dataclass(frozen=True)
class CopyIndex:
    """What a search for copies needs beside the fingerprints: made once, and the same file for every part."""

    count: int
    neighbours: neighbours.NeighbourIndex | None  # None: the search is exact


def fingerprint(grey: NDArray[np.uint8]) -> Fingerprints:
    """The band-passed image of even local contrast, zero mean and unit length: float16 (96, 96); 0 without texture.

    The aspect ratio is given up, so that a copy squeezed into a square still matches.
    """
    # Pillow widens this filter where it shrinks: the same slice stored at two sizes gives the same fingerprint.
    small = Image.fromarray(grey).resize((FINGERPRINT_PX, FINGERPRINT_PX), Image.Resampling.BILINEAR)
    smooth = gaussian_filter(np.asarray(small, dtype=np.float32), SMOOTHING_SIGMA_PX)
    texture = smooth - gaussian_filter(smooth, HIGH_PASS_SIGMA_PX)
    contrast = float(texture.std())
    if contrast < MIN_TEXTURE_STD:
        return np.zeros(texture.shape, np.float16)
    local_contrast = np.sqrt(gaussian_filter(texture**2, CONTRAST_SIGMA_PX))
    even = texture / (local_contrast + CONTRAST_FLOOR * contrast)
    even -= even.mean()
    return np.asarray(even / np.linalg.norm(even), np.float16)


def group_copies(
    sha256: Sequence[str],
    pixels_sha256: Sequence[str | None],
    fingerprints: FingerprintStore,
    copy_correlation: float,
    approximate_above: int = APPROXIMATE_ABOVE,
) -> list[str]:
    """The group of each image: images are in one group where a chain of copies links them.

    A group's name is 'g' and the first 12 hex digits of the smallest sha256 in it, so it does not depend on the order
    or the names of the files. `pixels_sha256` is None, and the fingerprint zero, where an image can't be decoded.
    """
    index = build_index(fingerprints, approximate_above=approximate_above)
    everything = range(len(fingerprints))
    return name_groups(sha256, pixels_sha256, [find_links(fingerprints, index, everything, copy_correlation)])


def build_index(fingerprints: FingerprintStore, seed: int = 0, approximate_above: int = APPROXIMATE_ABOVE) -> CopyIndex:
    """What `find_links` needs; above `approximate_above` images an index of neighbours, drawn with `seed`."""
    count = len(fingerprints)
    if count <= approximate_above:
        return CopyIndex(count, None)
    found = neighbours.build_index(count, lambda rows: _coarse_parts(fingerprints[rows]), seed)
    return CopyIndex(count, found)


def save_index(index: CopyIndex, path: Path) -> None:
    """`index` stands in `path`, whole or not at all."""
    arrays: dict[str, Any] = {"count": np.array(index.count)}
    if index.neighbours is not None:
        arrays |= {field.name: getattr(index.neighbours, field.name) for field in fields(index.neighbours)}
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_index(path: Path) -> CopyIndex:
    """The index that `save_index` wrote. Raises UserError where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        count = int(arrays.pop("count"))
        return CopyIndex(count, neighbours.NeighbourIndex(**arrays) if arrays else None)
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not the index of a search for copies ({error}); make it again") from error


def parts(count: int, n_parts: int) -> list[range]:
    """`count` images in `n_parts` ranges of whole blocks of the search; some are empty where there are few blocks."""
    n_blocks = -(-count // SEARCH_BLOCK)
    bounds = [min(count, n_blocks * part // n_parts * SEARCH_BLOCK) for part in range(n_parts + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def find_links(
    fingerprints: FingerprintStore,
    index: CopyIndex,
    part: range,
    copy_correlation: float,
    on_block: OnBlock = lambda: None,
) -> Links:
    """The copies of the images in `part`, one of `parts`, among all images.

    The links of all parts together give the same groups, however many parts there are: which pairs are compared, and
    how they are decided, is the same for every division. `on_block` is called after each SEARCH_BLOCK images.
    """
    if len(fingerprints) != index.count:
        raise ValueError(f"the index is of {index.count} images, not of {len(fingerprints)}")
    min_correlation = max(0.0, copy_correlation - COARSE_MARGIN)
    forest = _Forest(index.count)
    proven = [_no_links()]
    if index.neighbours is None:
        coarse = _coarse_of_all(fingerprints)
        for start in _block_starts(part, index.count):
            for candidates in _similar_pairs_of_block(coarse, start, min_correlation):
                proven.append(_prove(fingerprints, candidates, copy_correlation, forest))
            on_block()
    else:
        search = neighbours.Search(index.neighbours)
        for start in _block_starts(part, index.count):
            rows = range(start, min(start + SEARCH_BLOCK, index.count))
            candidates = Pairs(*search.candidates(rows, copy_correlation))
            proven.append(_prove(fingerprints, candidates, copy_correlation, forest))
            on_block()
    return Links(*(np.concatenate([getattr(some, side) for some in proven]) for side in ("first", "second")))


def name_groups(sha256: Sequence[str], pixels_sha256: Sequence[str | None], links: Iterable[Links]) -> list[str]:
    """The group of each image, from equal bytes, equal pixels and the `links` of all parts."""
    pairs = [_equal_values(sha256), _equal_values(pixels_sha256), *((some.first, some.second) for some in links)]
    groups = _join(len(sha256), pairs).tolist()
    smallest: dict[int, str] = {}
    for group, digest in zip(groups, sha256, strict=True):
        smallest[group] = min(digest, smallest.get(group, digest))
    names = {group: f"g{digest[:12]}" for group, digest in smallest.items()}
    return [names[group] for group in groups]


def similar_pairs(fingerprints: FingerprintStore, min_correlation: float) -> Iterator[Pairs]:
    """Pairs (first < second) that correlate above `min_correlation` at 32 x 32, in portions, in each symmetry once.

    Needs no n x n matrix: blocks of rows against blocks of columns. A mirror image differs in nothing but the sign of
    the odd part of each image: the products of the four parts (even or odd in rows and columns) cost as much as one
    symmetry, and their sums are the correlations in all four.
    """
    coarse = _coarse_of_all(fingerprints)
    for start in range(0, len(fingerprints), SEARCH_BLOCK):
        yield from _similar_pairs_of_block(coarse, start, min_correlation)


def correlations(fingerprints: FingerprintStore, pairs: Pairs) -> NDArray[np.float64]:
    """The correlation of each pair at 96 x 96, in its symmetry.

    The sums are exact, and so the same in whatever order and company pairs are decided: a product of two fingerprints'
    pixels is a multiple of 2**-48, and a sum of them up to 1 fits into a float64 without rounding.
    """
    result = np.empty(len(pairs.first), np.float64)
    rows, places = np.unique(np.concatenate([pairs.first, pairs.second]), return_inverse=True)
    pixels = fingerprints[rows]
    firsts, seconds = np.split(places, 2)
    for index, (down, across) in enumerate(SYMMETRIES):
        those = np.flatnonzero(pairs.symmetry == index)
        # Portions that stay in the processor's cache.
        for start in range(0, len(those), DECISION_PORTION):
            some = those[start : start + DECISION_PORTION]
            first = pixels[firsts[some]].astype(np.float64)
            second = pixels[seconds[some]][:, ::down, ::across].astype(np.float64)
            result[some] = np.einsum("nij,nij->n", first, second)
    return result


class _Forest:
    """Which images a chain of proven copies already links."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count)

    def roots(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """One image of each row's group, the same for all of the group."""
        roots = self._parents[rows]
        while (above := self._parents[roots]).tobytes() != roots.tobytes():
            roots = above
        self._parents[rows] = roots
        return np.asarray(roots, np.intp)

    def join(self, first: int, second: int) -> bool:
        """Both are in one group; false if they were before."""
        one, other = self._root(first), self._root(second)
        self._parents[max(one, other)] = min(one, other)
        return one != other

    def _root(self, row: int) -> int:
        parents = self._parents
        while (above := int(parents[row])) != row:
            parents[row] = parents[above]
            row = above
        return row


def _prove(fingerprints: FingerprintStore, candidates: Pairs, copy_correlation: float, forest: _Forest) -> Links:
    """The candidates that are copies, without those that others link already; `forest` knows them afterwards."""
    proven = [_no_links()]
    while len(candidates.first):
        # What an earlier pair has joined needs no proof: large groups have very many pairs.
        candidates = _select(candidates, forest.roots(candidates.first) != forest.roots(candidates.second))
        block = _select(candidates, slice(0, DECISION_BLOCK))
        candidates = _select(candidates, slice(DECISION_BLOCK, None))
        copies = _select(block, correlations(fingerprints, block) > copy_correlation)
        is_news = [forest.join(*pair) for pair in zip(copies.first.tolist(), copies.second.tolist(), strict=True)]
        news = _select(copies, np.array(is_news, bool))
        proven.append(Links(news.first, news.second))
    return Links(*(np.concatenate([getattr(some, side) for some in proven]) for side in ("first", "second")))


def _no_links() -> Links:
    return Links(np.zeros(0, np.intp), np.zeros(0, np.intp))


def _block_starts(part: range, count: int) -> range:
    """The blocks of a part are those of the whole: the same products, whoever computes them."""
    if part.step != 1 or (part.start % SEARCH_BLOCK and part) or (part.stop % SEARCH_BLOCK and part.stop != count):
        raise ValueError(f"{part} is not made of whole blocks of {SEARCH_BLOCK} of {count} images")
    return range(part.start, part.stop, SEARCH_BLOCK)


def _similar_pairs_of_block(coarse: NDArray[np.float32], start: int, min_correlation: float) -> Iterator[Pairs]:
    """Its pairs with every second block after it, round the end: no block has more work than another."""
    count = coarse.shape[1]
    n_blocks = -(-count // SEARCH_BLOCK)
    this = start // SEARCH_BLOCK
    for step in range(n_blocks // 2 + 1):
        other = (this + step) % n_blocks
        # Of an even number of blocks, the one opposite is met from both sides.
        if 2 * step == n_blocks and other < this:
            continue
        top, left = min(this, other) * SEARCH_BLOCK, max(this, other) * SEARCH_BLOCK
        rows, columns = (coarse[:, place : place + SEARCH_BLOCK] for place in (top, left))
        even, odd_columns, odd_rows, odd = np.matmul(rows, columns.transpose(0, 2, 1))
        # By the signs of `odd_rows` and `odd_columns`: those of `odd` are their product.
        alike, turned = even + odd, odd_rows + odd_columns
        unlike, mirrored = even - odd, odd_rows - odd_columns
        by_symmetry = (alike + turned, unlike + mirrored, unlike - mirrored, alike - turned)
        for symmetry, block in enumerate(by_symmetry):
            yield _hits(block, top, left, symmetry, min_correlation)


def _coarse_of_all(fingerprints: FingerprintStore) -> NDArray[np.float32]:
    count = len(fingerprints)
    blocks = [np.arange(start, min(start + SEARCH_BLOCK, count)) for start in range(0, count, SEARCH_BLOCK)]
    result = np.empty((4, count, (COARSE_PX // 2) ** 2), np.float32)
    for rows in blocks:
        result[:, rows[0] : rows[-1] + 1] = _coarse_parts(fingerprints[rows])
    return result


def _coarse_parts(fingerprints: Fingerprints) -> NDArray[np.float32]:
    """Each image at 32 x 32, of unit length, in four parts: (4, n, 256).

    The parts are even in rows and columns, odd in columns, odd in rows, odd in both; the product of two images is the
    sum of the products of their parts.
    """
    factor, half = FINGERPRINT_PX // COARSE_PX, COARSE_PX // 2
    pixels = fingerprints.astype(np.float32)
    # Sums of slices: `mean` over two axes of float16 takes four times as long.
    rows = sum(pixels[:, start::factor] for start in range(1, factor)) + pixels[:, ::factor]
    coarse = sum(rows[:, :, start::factor] for start in range(1, factor)) + rows[:, :, ::factor]
    norms = np.linalg.norm(coarse, axis=(1, 2), keepdims=True)
    coarse = np.divide(coarse, 2 * norms, out=np.zeros_like(coarse), where=norms > 0)
    top, bottom = coarse[:, :half], coarse[:, : half - 1 : -1]
    parts = []
    for halves in (top + bottom, top - bottom):
        near, far = halves[:, :, :half], halves[:, :, : half - 1 : -1]
        parts += [near + far, near - far]
    return np.stack([part.reshape(len(fingerprints), -1) for part in parts])


def _hits(block: NDArray[np.float32], top: int, left: int, symmetry: int, min_correlation: float) -> Pairs:
    """The pairs of one block, the most similar first: they join groups early and spare the rest."""
    # On the flat block: in two dimensions `nonzero` takes longer than the product.
    places = np.flatnonzero(block > min_correlation)
    places = places[np.argsort(-block.ravel()[places], kind="stable")]
    first, second = places // block.shape[1] + top, places % block.shape[1] + left
    is_above_diagonal = first < second
    first, second = first[is_above_diagonal], second[is_above_diagonal]
    return Pairs(first, second, np.full(len(first), symmetry, np.intp))


def _select(pairs: Pairs, which: slice | NDArray[np.bool_]) -> Pairs:
    return Pairs(pairs.first[which], pairs.second[which], pairs.symmetry[which])


def _equal_values(values: Sequence[str | None]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Each image paired with the first one of the same value; None equals nothing."""
    first_with: dict[str, int] = {}
    places = [place for place, value in enumerate(values) if value is not None]
    firsts = [first_with.setdefault(str(values[place]), place) for place in places]
    return np.asarray(places, np.intp), np.asarray(firsts, np.intp)


def _join(count: int, pairs: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> NDArray[np.int32]:
    first = np.concatenate([one for one, _ in pairs])
    second = np.concatenate([other for _, other in pairs])
    graph = coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)


def measure_leakage(images: pd.DataFrame) -> dict[str, Any]:
    """The content of leakage.json: copies, and what of the declared test images stands in the declared training images.

    `copies` counts groups of several images, and their images: within a declared split, and across the splits.

    Takes the manifest's columns path, label, declared_split, sha256, duplicate_group and patient.
    """
    groups = images["duplicate_group"]
    is_test = images["declared_split"] == "test"
    is_leaked = is_test & groups.isin(groups[~is_test])
    sizes = sorted(
        ((str(group), int(size)) for group, size in groups.value_counts().items()), key=lambda it: (-it[1], it[0])
    )
    patients = images["patient"].dropna()
    known = patients[~patients.astype(str).str.startswith(UNKNOWN_PATIENT_PREFIX)]
    shared_patients = set(patients[is_test]) & set(patients[~is_test])
    return {
        "n_images": len(images),
        "n_groups": len(sizes),
        "n_copies": len(images) - len(sizes),
        "exact_copies": len(images) - int(images["sha256"].nunique()),
        "copies": _copies_by_place(images),
        "groups_across_splits": int(groups[is_leaked].nunique()),
        "leaked_test_images": int(is_leaked.sum()),
        "n_test": int(is_test.sum()),
        "leaked_share": float(is_leaked.sum() / is_test.sum()) if is_test.any() else None,
        "label_conflicts": _label_conflicts(images),
        "patients": {
            "known": int(known.nunique()),
            "unknown": len(images) - len(known),
            "across_splits": len(shared_patients),
        },
        "largest_groups": [{"group": group, "size": size} for group, size in sizes[:10] if size > 1],
    }


def _copies_by_place(images: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Groups of several images, and their images: in one declared split alone, or across them."""
    groups = images.groupby("duplicate_group")["declared_split"].agg(size="size", splits="nunique", split="first")
    groups = groups[groups["size"] > 1]
    place = groups["split"].where(groups["splits"] == 1, "across")
    sizes = groups["size"].groupby(place)
    return {
        name: {"groups": int((place == name).sum()), "images": int(sizes.sum().get(name, 0))}
        for name in (*DECLARED_SPLITS, "across")
    }


def _label_conflicts(images: pd.DataFrame) -> list[dict[str, Any]]:
    labels = images.groupby("duplicate_group")["label"].nunique()
    conflicting = images[images["duplicate_group"].isin(labels.index[labels > 1])]
    return [
        {"group": str(group), "labels": sorted(set(rows["label"])), "paths": sorted(rows["path"])}
        for group, rows in conflicting.groupby("duplicate_group")
    ]
