"""Copies of one slice: identical files, identical pixels, and recompressed, resized or mirrored versions.

Perceptual hashes (pHash, dHash) miss mirrored copies, and public brain MRI sets are full of them. So every image is
reduced to a fingerprint, its high-passed 96 x 96 version, and two images count as copies where their fingerprints
correlate above a threshold in one of the four symmetries that keep a rectangle in place. High-passing leaves edges and
texture: two different slices share the outline of a head, hardly its gyri.
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

FINGERPRINT_PX = 96
COARSE_PX = 32
HIGH_PASS_SIGMA_PX = 3.0
# Of 0..255, after high-passing: below it only noise and compression are left, which may resemble anything.
MIN_TEXTURE_STD = 0.75
# How much looser the search at 32 x 32 is than the decision at 96 x 96. Of the 19,313 pairs above 0.90 in 6,401 real
# slices it loses none: the smallest of their coarse correlations is 0.853.
COARSE_MARGIN = 0.15
# Images in a block of the search, and pairs in a block of the decision: 4 MiB and 72 MiB of floats.
SEARCH_BLOCK = 1024
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
    """The image high-passed at 96 x 96, of zero mean and unit length: float16 (96, 96); all zero if it has no texture.

    The aspect ratio is given up, so that a copy squeezed into a square still matches.
    """
    # Pillow widens this filter where it shrinks: the same slice stored at two sizes gives the same fingerprint.
    small = Image.fromarray(grey).resize((FINGERPRINT_PX, FINGERPRINT_PX), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.float32)
    texture = pixels - gaussian_filter(pixels, HIGH_PASS_SIGMA_PX)
    texture -= texture.mean()
    if float(texture.std()) < MIN_TEXTURE_STD:
        return np.zeros(texture.shape, np.float16)
    return np.asarray(texture / np.linalg.norm(texture), np.float16)


def group_copies(
    sha256: Sequence[str], pixels_sha256: Sequence[str | None], fingerprints: Fingerprints, copy_correlation: float
) -> list[str]:
    """The group of each image: images are in one group where a chain of copies links them.

    A group's name is 'g' and the first 12 hex digits of the smallest sha256 in it, so it does not depend on the order
    or the names of the files. `pixels_sha256` is None, and the fingerprint zero, where an image can't be decoded.
    """
    groups = _components(len(sha256), [_equal_values(sha256), _equal_values(pixels_sha256)])
    groups = _join_near_copies(groups, fingerprints, copy_correlation)
    smallest: dict[int, str] = {}
    for group, digest in zip(groups.tolist(), sha256, strict=True):
        smallest[group] = min(digest, smallest.get(group, digest))
    return [f"g{smallest[group][:12]}" for group in groups.tolist()]


def similar_pairs(fingerprints: Fingerprints, min_correlation: float) -> Iterator[Pairs]:
    """Pairs (first < second) that correlate above `min_correlation` at 32 x 32, in portions.

    Needs no n x n matrix: blocks of rows against blocks of columns, each pair and each symmetry once.
    """
    vectors = _coarse_vectors(fingerprints)
    starts = range(0, len(vectors), SEARCH_BLOCK)
    for symmetry, steps in enumerate(SYMMETRIES):
        seen = _seen_in(vectors, steps)
        for top in starts:
            for left in (start for start in starts if start >= top):
                block = vectors[top : top + SEARCH_BLOCK] @ seen[left : left + SEARCH_BLOCK].T
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


def _join_near_copies(
    groups: NDArray[np.int32], fingerprints: Fingerprints, copy_correlation: float
) -> NDArray[np.int32]:
    for candidates in similar_pairs(fingerprints, max(0.0, copy_correlation - COARSE_MARGIN)):
        for start in range(0, len(candidates.first), DECISION_BLOCK):
            block = _select(candidates, slice(start, start + DECISION_BLOCK))
            # What an earlier pair has joined needs no second proof: large groups have very many pairs.
            undecided = _select(block, groups[block.first] != groups[block.second])
            copies = _select(undecided, correlations(fingerprints, undecided) > copy_correlation)
            if len(copies.first):
                joined = (np.arange(len(groups)), _representatives(groups))
                groups = _components(len(groups), [joined, (copies.first, copies.second)])
    return groups


def _coarse_vectors(fingerprints: Fingerprints) -> NDArray[np.float32]:
    factor = FINGERPRINT_PX // COARSE_PX
    blocks = fingerprints.reshape(len(fingerprints), COARSE_PX, factor, COARSE_PX, factor)
    vectors = blocks.mean(axis=(2, 4), dtype=np.float32).reshape(len(fingerprints), COARSE_PX**2)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0), np.float32)


def _seen_in(vectors: NDArray[np.float32], steps: tuple[int, int]) -> NDArray[np.float32]:
    rows, columns = steps
    squares = vectors.reshape(-1, COARSE_PX, COARSE_PX)
    return np.ascontiguousarray(squares[:, ::rows, ::columns]).reshape(vectors.shape)


def _hits(block: NDArray[np.float32], top: int, left: int, symmetry: int, min_correlation: float) -> Pairs:
    """The pairs of one block, the most similar first: they join groups early and spare the rest."""
    rows, columns = np.nonzero(block > min_correlation)
    is_above_diagonal = rows + top < columns + left
    rows, columns = rows[is_above_diagonal], columns[is_above_diagonal]
    order = np.argsort(-block[rows, columns], kind="stable")
    return Pairs(rows[order] + top, columns[order] + left, np.full(len(rows), symmetry, np.intp))


def _select(pairs: Pairs, which: slice | NDArray[np.bool_]) -> Pairs:
    return Pairs(pairs.first[which], pairs.second[which], pairs.symmetry[which])


def _equal_values(values: Sequence[str | None]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Each image paired with the first one of the same value; None equals nothing."""
    first_with: dict[str, int] = {}
    places = [place for place, value in enumerate(values) if value is not None]
    firsts = [first_with.setdefault(str(values[place]), place) for place in places]
    return np.asarray(places, np.intp), np.asarray(firsts, np.intp)


def _representatives(groups: NDArray[np.int32]) -> NDArray[np.intp]:
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return first[inverse]


def _components(count: int, links: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> NDArray[np.int32]:
    first = np.concatenate([link[0] for link in links])
    second = np.concatenate([link[1] for link in links])
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)


def measure_leakage(images: pd.DataFrame) -> dict[str, Any]:
    """The content of leakage.json: copies, and what of the declared test images stands in the declared training images.

    Takes the manifest's columns path, label, declared_split, sha256, duplicate_group and patient.
    """
    groups = images["duplicate_group"]
    is_test = images["declared_split"] == "test"
    is_leaked = is_test & groups.isin(groups[~is_test])
    sizes = sorted(
        ((str(group), int(size)) for group, size in groups.value_counts().items()), key=lambda it: (-it[1], it[0])
    )
    patients = images["patient"].dropna()
    shared_patients = set(patients[is_test]) & set(patients[~is_test])
    return {
        "n_images": len(images),
        "n_groups": len(sizes),
        "n_copies": len(images) - len(sizes),
        "exact_copies": len(images) - int(images["sha256"].nunique()),
        "groups_across_splits": int(groups[is_leaked].nunique()),
        "leaked_test_images": int(is_leaked.sum()),
        "n_test": int(is_test.sum()),
        "leaked_share": float(is_leaked.sum() / is_test.sum()) if is_test.any() else None,
        "label_conflicts": _label_conflicts(images),
        "patients": {
            "known": int(patients.nunique()),
            "unknown": int(images["patient"].isna().sum()),
            "across_splits": len(shared_patients),
        },
        "largest_groups": [{"group": group, "size": size} for group, size in sizes[:10] if size > 1],
    }


def _label_conflicts(images: pd.DataFrame) -> list[dict[str, Any]]:
    labels = images.groupby("duplicate_group")["label"].nunique()
    conflicting = images[images["duplicate_group"].isin(labels.index[labels > 1])]
    return [
        {"group": str(group), "labels": sorted(set(rows["label"])), "paths": sorted(rows["path"])}
        for group, rows in conflicting.groupby("duplicate_group")
    ]
