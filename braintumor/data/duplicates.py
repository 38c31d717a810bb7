"""Copies of one slice: identical files, identical pixels, and recompressed, resized, mirrored or retouched versions.

Perceptual hashes (pHash, dHash) miss mirrored copies, and public brain MRI sets are full of them. So every image is
reduced to a fingerprint, its band-passed 96 x 96 version of even local contrast, and two images count as copies where
their fingerprints correlate above a threshold in one of the four symmetries that keep a rectangle in place.
Band-passing leaves edges and texture: two different slices share the outline of a head, hardly its gyri. Even local
contrast gives the gyri as much weight as the bright skull, which neighbouring slices of one head share, and makes the
fingerprint blind to what public sets do to their copies: saturation, sharpening, equalised histograms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from braintumor.labels import DECLARED_SPLITS, UNKNOWN_PATIENT_PREFIX

FINGERPRINT_PX = 96
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
# Images in a block of the search, and pairs in a block of the decision: 12 MiB and 72 MiB of floats.
SEARCH_BLOCK = 512
DECISION_BLOCK = 1024
# Identity, left-right, up-down, 180 degrees: the steps of rows and columns.
SYMMETRIES = ((1, 1), (1, -1), (-1, 1), (-1, -1))

Fingerprints = NDArray[np.float16]


@dataclass(frozen=True)
class Pairs:
    """Candidates for copies: image `first[i]` resembles image `second[i]` seen in symmetry `symmetry[i]`."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    symmetry: NDArray[np.intp]


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
    sha256: Sequence[str], pixels_sha256: Sequence[str | None], fingerprints: Fingerprints, copy_correlation: float
) -> list[str]:
    """The group of each image: images are in one group where a chain of copies links them.

    A group's name is 'g' and the first 12 hex digits of the smallest sha256 in it, so it does not depend on the order
    or the names of the files. `pixels_sha256` is None, and the fingerprint zero, where an image can't be decoded.
    """
    groups = _join_equal(len(sha256), _equal_values(sha256), _equal_values(pixels_sha256))
    _join_near_copies(groups, fingerprints, copy_correlation)
    smallest: dict[int, str] = {}
    for group, digest in zip(groups.tolist(), sha256, strict=True):
        smallest[group] = min(digest, smallest.get(group, digest))
    return [f"g{smallest[group][:12]}" for group in groups.tolist()]


def similar_pairs(fingerprints: Fingerprints, min_correlation: float) -> Iterator[Pairs]:
    """Pairs (first < second) that correlate above `min_correlation` at 32 x 32, in portions, in each symmetry once.

    Needs no n x n matrix: blocks of rows against blocks of columns. A mirror image differs in nothing but the sign of
    the odd part of each image: the products of the four parts (even or odd in rows and columns) cost as much as one
    symmetry, and their sums are the correlations in all four.
    """
    parts = _coarse_parts(fingerprints)
    starts = range(0, len(fingerprints), SEARCH_BLOCK)
    for top in starts:
        for left in (start for start in starts if start >= top):
            rows, columns = (parts[:, start : start + SEARCH_BLOCK] for start in (top, left))
            even, odd_columns, odd_rows, odd = np.matmul(rows, columns.transpose(0, 2, 1))
            # By the signs of `odd_rows` and `odd_columns`: those of `odd` are their product.
            alike, turned = even + odd, odd_rows + odd_columns
            unlike, mirrored = even - odd, odd_rows - odd_columns
            by_symmetry = (alike + turned, unlike + mirrored, unlike - mirrored, alike - turned)
            for symmetry, block in enumerate(by_symmetry):
                yield _hits(block, top, left, symmetry, min_correlation)


def correlations(fingerprints: Fingerprints, pairs: Pairs) -> NDArray[np.float32]:
    """The correlation of each pair at 96 x 96, in its symmetry."""
    result = np.empty(len(pairs.first), np.float32)
    for index, (rows, columns) in enumerate(SYMMETRIES):
        places = np.flatnonzero(pairs.symmetry == index)
        first = fingerprints[pairs.first[places]].astype(np.float32)
        second = fingerprints[pairs.second[places]][:, ::rows, ::columns].astype(np.float32)
        result[places] = np.einsum("nij,nij->n", first, second)
    return result


def _join_near_copies(groups: NDArray[np.int32], fingerprints: Fingerprints, copy_correlation: float) -> None:
    for candidates in similar_pairs(fingerprints, max(0.0, copy_correlation - COARSE_MARGIN)):
        for start in range(0, len(candidates.first), DECISION_BLOCK):
            block = _select(candidates, slice(start, start + DECISION_BLOCK))
            # What an earlier pair has joined needs no second proof: large groups have very many pairs.
            undecided = _select(block, groups[block.first] != groups[block.second])
            copies = _select(undecided, correlations(fingerprints, undecided) > copy_correlation)
            for first, second in zip(copies.first.tolist(), copies.second.tolist(), strict=True):
                if groups[first] != groups[second]:
                    groups[groups == groups[second]] = groups[first]


def _coarse_parts(fingerprints: Fingerprints) -> NDArray[np.float32]:
    """Each image at 32 x 32, of unit length, in four parts: (4, n, 256).

    The parts are even in rows and columns, odd in columns, odd in rows, odd in both; the product of two images is the
    sum of the products of their parts.
    """
    factor, half = FINGERPRINT_PX // COARSE_PX, COARSE_PX // 2
    parts = np.empty((4, len(fingerprints), half * half), np.float32)
    for start in range(0, len(fingerprints), SEARCH_BLOCK):
        some = fingerprints[start : start + SEARCH_BLOCK]
        coarse = some.reshape(len(some), COARSE_PX, factor, COARSE_PX, factor).mean(axis=(2, 4), dtype=np.float32)
        norms = np.linalg.norm(coarse, axis=(1, 2), keepdims=True)
        coarse = np.divide(coarse, 2 * norms, out=np.zeros_like(coarse), where=norms > 0)
        top, bottom = coarse[:, :half], coarse[:, : half - 1 : -1]
        for rows, halves in enumerate((top + bottom, top - bottom)):
            near, far = halves[:, :, :half], halves[:, :, : half - 1 : -1]
            for columns, quarter in enumerate((near + far, near - far)):
                parts[2 * rows + columns, start : start + len(some)] = quarter.reshape(len(some), -1)
    return parts


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


def _join_equal(count: int, *links: tuple[NDArray[np.intp], NDArray[np.intp]]) -> NDArray[np.int32]:
    first = np.concatenate([link[0] for link in links])
    second = np.concatenate([link[1] for link in links])
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(count, count))
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
