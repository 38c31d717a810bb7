"""Which of the images that arrive are copies: of an image that is there, or of one another.

The rule is that of `duplicates`: the same bytes, the same pixels, or fingerprints that correlate. Copies of copies do
not count here: an image is held back only for an image that it resembles itself.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from braintumor.data.duplicates import (
    COARSE_MARGIN,
    DECISION_BLOCK,
    SEARCH_BLOCK,
    SYMMETRIES,
    Pairs,
    correlations,
    fingerprint,
    similar_pairs,
)
from braintumor.data.fingerprint_store import FINGERPRINT_PX, Fingerprints
from braintumor.model.images import UnreadableImage, decode_grey
from braintumor.progress import Progress

Likeness = Literal["same bytes", "same pixels", "near copy"]
LIKENESSES: tuple[Likeness, ...] = ("same bytes", "same pixels", "near copy")


@dataclass(frozen=True)
class Match:
    """An arriving image and what it is a copy of."""

    arriving: int
    other: int  # among the images there, or among those that arrive
    is_there: bool
    likeness: Likeness
    correlation: float  # of the fingerprints; 1 for the same pixels

    @property
    def rank(self) -> tuple[int, float, int]:
        """Smaller for a closer likeness."""
        return LIKENESSES.index(self.likeness), -self.correlation, self.other


@dataclass(frozen=True)
class Arrivals:
    """What is known of the images that arrive."""

    matches: list[Match]  # the closest likeness of each pair; of two arriving images the later is `arriving`
    first_of_bytes: list[int]  # by arriving image: the first arriving image with the same bytes, itself or an earlier
    unreadable: list[int]


@dataclass(frozen=True)
class Looks:
    """All images there, then all that arrive: digests, and fingerprints (n, 96, 96)."""

    sha256: list[str]
    pixels_sha256: list[str | None]  # None: can't be decoded
    fingerprints: Fingerprints


def compare(
    there: Sequence[Path], arriving: Sequence[Path], labels: Sequence[str], copy_correlation: float, progress: Progress
) -> Arrivals:
    """Pairs of copies in which at least one image arrives; `labels` are of the images there, then of those arriving.

    An arriving image that equals one there, or an earlier arriving one, is not compared any further. Of many equal
    images one of each label is named.
    """
    looks = _look_at([*there, *arriving], progress("reading images", len(there) + len(arriving)))
    matches = _equal_ones(looks, labels, len(there))
    first_of_bytes = _first_of_each(looks.sha256[len(there) :])
    needs_no_search = {match.arriving for match in matches if match.is_there}
    needs_no_search |= {index for index, first in enumerate(first_of_bytes) if first != index}
    if len(needs_no_search) < len(arriving):
        matches += _near_copies(looks.fingerprints, len(there), needs_no_search, copy_correlation, progress)
    pixels = looks.pixels_sha256[len(there) :]
    return Arrivals(
        matches=_closest(matches),
        first_of_bytes=first_of_bytes,
        unreadable=[index for index, digest in enumerate(pixels) if digest is None],
    )


def _look_at(files: Sequence[Path], advance: Callable[[], None]) -> Looks:
    fingerprints = np.zeros((len(files), FINGERPRINT_PX, FINGERPRINT_PX), np.float16)

    def look(index: int) -> tuple[str, str | None]:
        digest = hashlib.sha256(files[index].read_bytes()).hexdigest()
        try:
            grey = decode_grey(files[index])
        except UnreadableImage:
            return digest, None
        finally:
            advance()
        fingerprints[index] = fingerprint(grey)
        return digest, hashlib.sha256(str(grey.shape).encode() + grey.tobytes()).hexdigest()

    # Pillow, NumPy and hashing release the interpreter lock: threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(look, range(len(files))))
    return Looks([digest for digest, _ in digests], [pixels for _, pixels in digests], fingerprints)


def _equal_ones(looks: Looks, labels: Sequence[str], n_there: int) -> list[Match]:
    of_bytes = _equal_pairs(looks.sha256, labels, n_there)
    of_pixels = _equal_pairs(looks.pixels_sha256, labels, n_there)
    return [
        *(_match(pair, n_there, "same bytes", 1.0) for pair in of_bytes),
        *(_match(pair, n_there, "same pixels", 1.0) for pair in of_pixels),
    ]


def _equal_pairs(values: Sequence[str | None], labels: Sequence[str], n_there: int) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of a value of which the later arrives, one earlier of each label; None equals nothing."""
    earlier: dict[str, dict[str, int]] = defaultdict(dict)
    for index, (value, label) in enumerate(zip(values, labels, strict=True)):
        if value is None:
            continue
        if index >= n_there:
            yield from ((first, index) for first in earlier[value].values())
        earlier[value].setdefault(label, index)


def _near_copies(
    fingerprints: Fingerprints,
    n_there: int,
    needs_no_search: Iterable[int],
    copy_correlation: float,
    progress: Progress,
) -> Iterator[Match]:
    # Nothing resembles an image without texture.
    fingerprints[[n_there + index for index in needs_no_search]] = 0
    n_blocks = -(-len(fingerprints) // SEARCH_BLOCK)
    advance = progress("comparing images", len(SYMMETRIES) * n_blocks * (n_blocks + 1) // 2)
    for candidates in similar_pairs(fingerprints, max(0.0, copy_correlation - COARSE_MARGIN)):
        arrives = np.flatnonzero(candidates.second >= n_there)
        for start in range(0, len(arrives), DECISION_BLOCK):
            block = arrives[start : start + DECISION_BLOCK]
            pairs = Pairs(candidates.first[block], candidates.second[block], candidates.symmetry[block])
            values = correlations(fingerprints, pairs)
            for place in np.flatnonzero(values > copy_correlation):
                pair = int(pairs.first[place]), int(pairs.second[place])
                yield _match(pair, n_there, "near copy", float(values[place]))
        advance()


def _match(pair: tuple[int, int], n_there: int, likeness: Likeness, correlation: float) -> Match:
    first, second = pair
    is_there = first < n_there
    return Match(second - n_there, first if is_there else first - n_there, is_there, likeness, correlation)


def _closest(matches: Sequence[Match]) -> list[Match]:
    """One match for each pair, sorted."""
    closest: dict[tuple[int, bool, int], Match] = {}
    for match in sorted(matches, key=lambda match: match.rank):
        closest.setdefault((match.arriving, not match.is_there, match.other), match)
    return [closest[pair] for pair in sorted(closest)]


def _first_of_each(digests: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    return [first.setdefault(digest, index) for index, digest in enumerate(digests)]
