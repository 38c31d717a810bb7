"""Which of very many images may resemble each other, found without comparing all with all (FAISS).

Each image is described by 128 whole numbers: its version at 32 x 32, projected on the directions in which a sample of
the images differs most. The directions are even or odd in rows and in columns, so that a mirrored image is described
by the same numbers with other signs. k-means divides the images into cells (an inverted file: Sivic & Zisserman 2003),
and an image is compared with those in the cells nearest to it, in each symmetry.

Sums and products of these whole numbers have no rounding error in float32, and the means of k-means are rounded to
whole numbers too: the same index finds the same neighbours with any number of threads and in any division of the work.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 128
# Of a description: each of its numbers fits into 8 bits.
LENGTH = 127
# Of images, for the directions.
SAMPLE = 16_384
READ_BLOCK = 512
# Cells: about this many times the root of the number of images. k-means sees so many images of each.
CELLS_PER_ROOT = 4
TRAINED_PER_CELL = 64
ITERATIONS = 10
# Cells that an image is compared with, in each symmetry.
PROBES = 32
# How much looser the search is than the decision at 96 x 96: copies resemble each other more here than there.
MARGIN = 0.10
# Neighbours of an image that are kept, in the whole set and in each of its samples: each an eighth of the one before.
KEPT = 32
THINNING = 8
# Whether the four parts of a description change sign (even; odd in columns; in rows; in both), by symmetry.
SIGNS = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32)

# The four parts of the images of these rows at 32 x 32, of unit length: (4, k, 256).
CoarseParts = Callable[[NDArray[np.intp]], NDArray[np.float32]]
Candidates = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True)
class NeighbourIndex:
    """The images by cells. Images without texture are not in it, and of equally described images the first alone."""

    widths: NDArray[np.int64]  # of the four parts of a description
    rows: NDArray[np.int64]  # of the images in the index, ascending
    descriptions: NDArray[np.int8]  # (n, DIMENSIONS)
    centroids: NDArray[np.int8]  # (cells, DIMENSIONS)
    cells: NDArray[np.int32]  # of each image
    twins: NDArray[np.int64]  # rows of images described like an earlier one, ascending
    originals: NDArray[np.int64]  # the row of that earlier one
    ranks: NDArray[np.int64]  # a drawn order of the images: the first of it are the samples


def build_index(count: int, coarse_parts: CoarseParts, seed: int) -> NeighbourIndex:
    """The index of the images 0 .. count - 1; `seed` draws samples and starts."""
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.permutation(count)[:SAMPLE])
    axes = _principal_axes(
        coarse_parts(sample[start : start + READ_BLOCK]) for start in range(0, len(sample), READ_BLOCK)
    )
    descriptions = np.zeros((count, DIMENSIONS), np.int8)
    for start in range(0, count, READ_BLOCK):
        rows = np.arange(start, min(start + READ_BLOCK, count))
        descriptions[rows] = _describe(coarse_parts(rows), axes)
    rows, twins, originals = _tell_twins(descriptions)
    descriptions = descriptions[rows]
    centroids = _train(descriptions, int(rng.integers(1 << 30)))
    return NeighbourIndex(
        widths=np.array([part.shape[1] for part in axes]),
        rows=rows,
        descriptions=descriptions,
        centroids=centroids,
        cells=_cells(descriptions, centroids),
        twins=twins,
        originals=originals,
        ranks=rng.permutation(len(rows)),
    )


class Search:
    """Candidates for copies, from an index; it holds the index a second time, in FAISS's order."""

    def __init__(self, index: NeighbourIndex) -> None:
        faiss = _load_faiss()
        self._index = index
        self._signs = np.repeat(SIGNS, index.widths, axis=1)
        n_cells = len(index.centroids)
        self._quantizer = _quantizer(index.centroids)
        self._inverted = faiss.IndexIVFScalarQuantizer(
            self._quantizer,
            DIMENSIONS,
            n_cells,
            faiss.ScalarQuantizer.QT_8bit_direct_signed,
            faiss.METRIC_INNER_PRODUCT,
            False,
        )
        self._inverted.is_trained = True
        order = np.argsort(index.cells, kind="stable")
        bounds = np.searchsorted(index.cells[order], np.arange(n_cells + 1))
        for cell, (start, end) in enumerate(pairwise(bounds)):
            members = np.ascontiguousarray(order[start:end], np.int64)
            codes = (index.descriptions[members].astype(np.int16) + 128).astype(np.uint8)
            if len(members):
                self._inverted.invlists.add_entries(
                    cell, len(members), faiss.swig_ptr(members), faiss.swig_ptr(np.ascontiguousarray(codes))
                )
        self._inverted.ntotal = len(index.rows)

    def candidates(self, rows: range, copy_correlation: float) -> Candidates:
        """Pairs of the images in `rows` with any others, and their symmetries, the most similar first.

        Of each image the KEPT most similar. Many copies of one slice may be so alike that these are but a clique of
        them; so an image with that many neighbours is paired with the KEPT most similar in a sample of an eighth of
        the images too, in an eighth of these, and so on, as long as it has so many. All the copies of a slice see the
        same few in one of these samples, which hold them together.
        """
        index = self._index
        inside = np.arange(*np.searchsorted(index.rows, [rows.start, rows.stop]))
        found = [self._twins(rows)]
        for selected in self._samples():
            if not len(inside):
                break
            places, others, symmetries, similarities = self._nearest(inside, selected)
            is_near = similarities > (copy_correlation - MARGIN) * LENGTH**2
            full = np.bincount(places[is_near], minlength=len(inside)) == KEPT
            is_near &= inside[places] != others
            found.append(
                (
                    index.rows[inside[places[is_near]]],
                    index.rows[others[is_near]],
                    symmetries[is_near],
                    similarities[is_near],
                )
            )
            inside = inside[full]
        first, second, symmetry, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((symmetry, second, first, -similarity))
        return first[order], second[order], symmetry[order]

    def _twins(self, rows: range) -> tuple[NDArray[Any], ...]:
        index = self._index
        inside = slice(*np.searchsorted(index.twins, [rows.start, rows.stop]))
        twins, originals = index.twins[inside], index.originals[inside]
        return twins, originals, np.zeros(len(twins), np.intp), np.full(len(twins), LENGTH**2, np.float32)

    def _samples(self) -> Iterator[NDArray[np.bool_] | None]:
        """The images to search in: all, then ever fewer."""
        yield None
        size = len(self._index.rows) // THINNING
        while size > KEPT:
            yield self._index.ranks < size
            size //= THINNING
        yield self._index.ranks < KEPT

    def _nearest(self, inside: NDArray[np.intp], selected: NDArray[np.bool_] | None) -> tuple[NDArray[Any], ...]:
        """The KEPT most similar of the selected images: place in `inside`, other, symmetry and similarity of each."""
        faiss = _load_faiss()
        selector = None if selected is None else faiss.IDSelectorBitmap(np.packbits(selected, bitorder="little"))
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(PROBES, len(self._index.centroids)))
        queries = self._index.descriptions[inside].astype(np.float32) * self._signs[:, None]
        similarities, others = self._inverted.search(queries.reshape(-1, DIMENSIONS), KEPT, params=parameters)
        # FAISS fills up with -1 where there are not as many.
        similarities, others = (
            np.moveaxis(found.reshape(len(SIGNS), len(inside), KEPT), 0, 1).reshape(len(inside), -1)
            for found in (np.where(others < 0, -np.inf, similarities), others)
        )
        symmetries = np.broadcast_to(np.repeat(np.arange(len(SIGNS)), KEPT), others.shape)
        kept = np.lexsort((symmetries, others, -similarities))[:, :KEPT]
        of_kept = (np.take_along_axis(column, kept, axis=1) for column in (others, symmetries, similarities))
        places = np.repeat(np.arange(len(inside)), KEPT)
        return places, *(column.ravel() for column in of_kept)


def _principal_axes(blocks: Iterable[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """The directions of most variance of all parts together, DIMENSIONS of them, by part: (256, width)."""
    moments = sum(np.matmul(parts.transpose(0, 2, 1), parts, dtype=np.float64) for parts in blocks)
    spectra = [np.linalg.eigh(moment) for moment in np.asarray(moments)]
    variances = np.concatenate([values for values, _ in spectra])
    is_kept = np.zeros(len(variances), bool)
    is_kept[np.argsort(-variances, kind="stable")[:DIMENSIONS]] = True
    chosen = np.split(is_kept, len(spectra))
    return [np.asarray(vectors[:, which], np.float32) for (_, vectors), which in zip(spectra, chosen, strict=True)]


def _describe(parts: NDArray[np.float32], axes: list[NDArray[np.float32]]) -> NDArray[np.int8]:
    values = np.concatenate([part @ its_axes for part, its_axes in zip(parts, axes, strict=True)], axis=1)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.rint(LENGTH * np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)).astype(np.int8)


def _tell_twins(descriptions: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The rows of the first of equal descriptions, those of the others, and the first of each of these."""
    textured = np.flatnonzero(descriptions.any(axis=1))
    as_bytes = np.ascontiguousarray(descriptions[textured]).view(f"V{DIMENSIONS}").ravel()
    _, firsts, groups = np.unique(as_bytes, return_index=True, return_inverse=True)
    firsts = textured[firsts]
    originals = firsts[groups]
    is_twin = originals != textured
    return np.sort(firsts), textured[is_twin], originals[is_twin]


def _train(descriptions: NDArray[np.int8], seed: int) -> NDArray[np.int8]:
    """The centres of the cells, rounded."""
    n_cells = max(1, min(len(descriptions) // TRAINED_PER_CELL, round(CELLS_PER_ROOT * len(descriptions) ** 0.5)))
    if not len(descriptions):
        return np.zeros((1, DIMENSIONS), np.int8)
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.permutation(len(descriptions))[: TRAINED_PER_CELL * n_cells])
    means = _load_faiss().Kmeans(
        DIMENSIONS,
        n_cells,
        niter=ITERATIONS,
        seed=seed,
        int_centroids=True,
        min_points_per_centroid=1,
        max_points_per_centroid=TRAINED_PER_CELL,
    )
    means.train(descriptions[sample].astype(np.float32))
    return np.asarray(means.centroids, np.int8)


def _quantizer(centroids: NDArray[np.int8]) -> Any:
    quantizer = _load_faiss().IndexFlatL2(DIMENSIONS)
    quantizer.add(centroids.astype(np.float32))
    return quantizer


def _cells(descriptions: NDArray[np.int8], centroids: NDArray[np.int8]) -> NDArray[np.int32]:
    """The cell of each image: of the nearest centre."""
    quantizer = _quantizer(centroids)
    cells = np.empty(len(descriptions), np.int32)
    for start in range(0, len(descriptions), 8192):
        block = descriptions[start : start + 8192].astype(np.float32)
        cells[start : start + len(block)] = quantizer.search(block, 1)[1][:, 0]
    return cells


def _load_faiss() -> Any:
    # Loading it takes a quarter of a second.
    import faiss

    return faiss
