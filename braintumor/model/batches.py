"""The training images of an epoch, batch by batch, in an order and with draws that follow from the seed alone."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braintumor.labels import CLASS_NAMES
from braintumor.model.augmentation import N_DRAWS
from braintumor.model.image_store import Images, row_at
from braintumor.params import TrainParams

# Batches that are gathered ahead of the step that takes them.
AHEAD = 2
# Images that lie side by side on disk and come within the same window; a window has at least so many such blocks.
MAX_BLOCK, MIN_BLOCKS = 1024, 16
DRAWN_AT_A_TIME = 1 << 16

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Batch:
    """Images of a training step, or one worker's share of it; rows that only fill a share up have weight 0."""

    images: NDArray[Any]  # uint8 (n, size, size, 1), or what a model takes that is none of images
    targets: NDArray[np.float32]  # (n, classes), one-hot
    weights: NDArray[np.float32]  # (n,)
    draws: NDArray[np.float32]  # (n, 6), for `augment`


class WindowedOrder:
    """An order of more images than memory holds, of which any slice can be had: `order[start:stop]`.

    Blocks of neighbouring places on disk are shuffled, and then the images within windows of some blocks each, so that
    few shards are read from at a time. In memory are the blocks' order and one window.
    """

    def __init__(self, n: int, seed: int, epoch: int, window: int) -> None:
        self._n, self._seed, self._epoch = n, seed, epoch
        self._block = min(MAX_BLOCK, max(1, window // MIN_BLOCKS))
        self._blocks_a_window = max(1, window // self._block)
        self._blocks = np.random.default_rng((seed, epoch)).permutation(-(-n // self._block))
        ends = np.cumsum(np.minimum((self._blocks + 1) * self._block, n) - self._blocks * self._block)
        self._starts = np.concatenate([[0], ends])[:: self._blocks_a_window]
        self._shuffled: tuple[int, Rows] = (-1, np.empty(0, np.intp))

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, positions: slice) -> Rows:
        """The row numbers at these positions of the epoch."""
        start, stop, stride = positions.indices(self._n)
        if stride != 1:
            raise ValueError("an order is read in slices without a step")
        found = []
        while start < stop:
            window = int(np.searchsorted(self._starts, start, side="right")) - 1
            first = int(self._starts[window])
            found.append(self._window(window)[start - first : stop - first])
            start += len(found[-1])
        return np.concatenate(found) if found else np.empty(0, np.intp)

    def _window(self, number: int) -> Rows:
        known, rows = self._shuffled
        if known != number:
            blocks = self._blocks[number * self._blocks_a_window : (number + 1) * self._blocks_a_window]
            places = (blocks[:, None] * self._block + np.arange(self._block)).reshape(-1)
            places = places[places < self._n]
            np.random.default_rng((self._seed, self._epoch, number)).shuffle(places)
            rows = row_at(places, self._n)
            self._shuffled = number, rows
        return rows


def epoch_order(n: int, seed: int, epoch: int, in_memory: int) -> Rows | WindowedOrder:
    """The row numbers of n images in the order of the epoch, each once; read slices of it.

    Up to `in_memory` images any order is as likely as any other; more are shuffled within windows of so many.
    """
    if n <= in_memory:
        return np.random.default_rng((seed, epoch)).permutation(n)
    return WindowedOrder(n, seed, epoch, in_memory)


def augmentation_draws(seed: int, epoch: int, positions: NDArray[np.intp]) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) for `augment`, (k, 6): those of a position in the epoch's order are always the same.

    A counter-based generator (Salmon et al., SC 2011) has those of any position without the others'.
    """
    draws = np.empty((len(positions), N_DRAWS), np.float32)
    parts = positions // DRAWN_AT_A_TIME
    for part in np.unique(parts):
        is_drawn = parts == part
        wanted = positions[is_drawn]
        first = int(wanted.min())
        generator = np.random.Philox(np.random.SeedSequence((seed, epoch)))
        # One block of the generator, 4 numbers of 64 bits, holds the six of an image.
        generator.advance(first)
        words = generator.random_raw(4 * (int(wanted.max()) + 1 - first)).astype("<u8").view("<u4").reshape(-1, 8)
        # The upper 24 bits: all that float32 holds below 1.
        draws[is_drawn] = (words[wanted - first, :N_DRAWS] >> 8) * np.float32(2**-24)
    return draws


def batches(
    images: Images,
    labels: NDArray[np.int64],
    weights: NDArray[np.float32],
    params: TrainParams,
    epoch: int,
    first_step: int = 0,
    rank: int = 0,
    workers: int = 1,
) -> Iterator[Batch]:
    """The batches of an epoch from `first_step` on, or worker `rank`'s even share of each; the last may be smaller.

    What doesn't divide by `workers` is filled up with images of the same batch, at weight 0. A thread gathers them
    ahead; what it runs into is raised here, and it ends with this iterator.
    """
    n = len(images)
    if not n == len(labels) == len(weights):
        raise ValueError(f"{n} images, {len(labels)} labels and {len(weights)} weights do not belong together")
    order = epoch_order(n, params.seed, epoch, params.images_in_memory)
    one_hot = np.eye(len(CLASS_NAMES), dtype=np.float32)

    def gather(step: int) -> Batch:
        start = step * params.batch_size
        size = min(params.batch_size, n - start)
        share = -(-size // workers)
        within = np.arange(rank * share, (rank + 1) * share)
        is_real = within < size
        within %= size
        rows = order[start : start + size][within]
        return Batch(
            images=images[rows],
            targets=one_hot[labels[rows]],
            weights=np.where(is_real, weights[rows], np.float32(0)),
            draws=augmentation_draws(params.seed, epoch, start + within),
        )

    return _ahead(gather, iter(range(first_step, -(-n // params.batch_size))))


def _ahead(gather: Callable[[int], Batch], steps: Iterator[int]) -> Iterator[Batch]:
    """What `gather` makes of each step, computed in a thread that is AHEAD steps ahead."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        waiting: deque[Future[Batch]] = deque(pool.submit(gather, step) for step in islice(steps, AHEAD))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(gather, step) for step in islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
