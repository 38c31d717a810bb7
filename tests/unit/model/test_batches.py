import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.model.batches import AHEAD, MIN_BLOCKS, Batch, augmentation_draws, batches, epoch_order
from braintumor.model.image_store import place_of
from braintumor.params import Params, TrainParams

N = 203
LABELS = np.sort(np.random.default_rng(0).integers(0, len(CLASS_NAMES), N))
WEIGHTS = np.random.default_rng(1).uniform(0.5, 2, N).astype(np.float32)


class Numbered:
    """Images that show the number of their row; `read` holds the rows of each batch that was asked for."""

    shape = (N, 2, 2, 1)

    def __init__(self, broken_row: int = -1) -> None:
        self.read: list[np.ndarray] = []
        self.broken_row = broken_row

    def __len__(self) -> int:
        return N

    def __getitem__(self, rows: Any) -> np.ndarray:
        self.read.append(rows)
        if self.broken_row in rows:
            raise UserError("a shard was cut short")
        return np.repeat(rows.astype(np.uint8), 4).reshape(-1, 2, 2, 1)


@pytest.fixture(params=[N, 64], ids=["all in memory", "windows"])
def train(request: pytest.FixtureRequest, recipe: Params) -> TrainParams:
    return recipe.train.model_copy(update={"seed": 5, "batch_size": 16, "images_in_memory": request.param})


def epoch(params: TrainParams, number: int = 1, **options: int) -> list[Batch]:
    return list(batches(Numbered(), LABELS, WEIGHTS, params, number, **options))


def rows_of(batch: Batch) -> list[int]:
    return [int(image[0, 0, 0]) for image in batch.images]


def assert_equal(some: Batch, other: Batch) -> None:
    for name in ("images", "targets", "weights", "draws"):
        np.testing.assert_array_equal(getattr(some, name), getattr(other, name))


def test_every_image_comes_once_an_epoch_with_its_label_and_weight(train: TrainParams) -> None:
    found = epoch(train)
    assert [len(batch.images) for batch in found] == [16] * 12 + [11]
    rows = np.concatenate([rows_of(batch) for batch in found])
    assert sorted(rows) == list(range(N))
    np.testing.assert_array_equal(np.concatenate([batch.targets for batch in found]), np.eye(4)[LABELS[rows]])
    np.testing.assert_array_equal(np.concatenate([batch.weights for batch in found]), WEIGHTS[rows])
    draws = augmentation_draws(train.seed, 1, np.arange(N))
    np.testing.assert_array_equal(np.concatenate([batch.draws for batch in found]), draws)
    assert all(batch.weights.dtype == batch.draws.dtype == np.float32 for batch in found)


def test_order_and_draws_repeat_with_the_seed_and_differ_between_epochs(train: TrainParams) -> None:
    for some, other in zip(epoch(train), epoch(train), strict=True):
        assert_equal(some, other)
    other_seed = train.model_copy(update={"seed": 6})
    for other in (epoch(train, 2)[0], epoch(other_seed)[0]):
        assert rows_of(epoch(train)[0]) != rows_of(other)
        assert not np.isin(epoch(train)[0].draws, other.draws).any()


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_shares_of_all_workers_together_are_the_global_batch(train: TrainParams, workers: int) -> None:
    shares = [epoch(train, rank=rank, workers=workers) for rank in range(workers)]
    for whole, *parts in zip(epoch(train), *shares, strict=True):
        size = len(whole.images)
        assert {len(part.images) for part in parts} == {-(-size // workers)}
        together = [np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "targets", "draws")]
        weights = np.concatenate([part.weights for part in parts])
        assert_equal(Batch(together[0][:size], together[1][:size], weights[:size], together[2][:size]), whole)
        assert not weights[size:].any()
        assert set(together[0][size:, 0, 0, 0]) <= set(rows_of(whole))


def test_worker_without_an_image_of_the_last_batch_has_a_row_of_no_weight(recipe: Params) -> None:
    params = recipe.train.model_copy(update={"batch_size": N - 1})
    last = epoch(params, rank=2, workers=3)[-1]
    assert last.weights.tolist() == [0]
    assert last.images.shape == (1, 2, 2, 1)


@pytest.mark.parametrize("step", [1, 7, 12, 13])
def test_epoch_goes_on_at_any_step_without_reading_what_came_before(train: TrainParams, step: int) -> None:
    images = Numbered()
    rest = list(batches(images, LABELS, WEIGHTS, train, 1, first_step=step))
    for some, other in zip(rest, epoch(train)[step:], strict=True):
        assert_equal(some, other)
    assert len(images.read) == 13 - step


def test_draws_of_a_slice_are_that_slice_of_all_draws() -> None:
    positions = np.arange(70_000, 140_000)
    draws = augmentation_draws(3, 1, positions)
    assert draws.shape == (70_000, 6)
    assert 0 <= draws.min() < 0.001 < 0.999 < draws.max() < 1
    assert len(np.unique(draws)) > 0.98 * draws.size
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.01)
    for part in (slice(0, 1), slice(10, 42), slice(60_000, None), slice(None, None, 1234)):
        np.testing.assert_array_equal(augmentation_draws(3, 1, positions[part]), draws[part])
    assert augmentation_draws(3, 1, positions[:0]).shape == (0, 6)


def test_neighbours_of_the_windowed_order_come_from_many_blocks_and_a_window_from_few() -> None:
    n, window = 40_000, 4000
    order = epoch_order(n, 1, 1, window)[0:n]
    blocks = place_of(order, n) // (window // MIN_BLOCKS)
    for start in range(0, n, window):
        assert len(np.unique(blocks[start : start + window])) <= MIN_BLOCKS
        for batch in blocks[start : start + window].reshape(-1, 32):
            assert len(np.unique(batch)) > 8
    # Windows hold other images in the next epoch, in another order.
    other = epoch_order(n, 1, 2, window)[0:window]
    assert np.isin(order[:window], other).mean() < 0.5
    block = window // MIN_BLOCKS
    assert (place_of(order[:window], n) % block != place_of(other, n) % block).any()


def test_every_window_holds_the_classes_of_a_sorted_table_in_even_shares() -> None:
    n, window = 40_000, 4000
    order = epoch_order(n, 1, 1, window)[0:n]
    for start in range(0, n, window):
        shares = np.bincount(order[start : start + window] * 4 // n, minlength=4) / window
        assert abs(shares - 0.25).max() < 0.01


@pytest.mark.parametrize(("n", "in_memory"), [(1, 1), (2, 1), (17, 1), (100, 99), (2049, 1024), (5000, 17)])
def test_windowed_order_can_be_read_in_any_slices(n: int, in_memory: int) -> None:
    order = epoch_order(n, 1, 1, in_memory)
    whole = order[0:n]
    assert len(order) == n
    assert sorted(whole) == list(range(n))
    for size in (1, 7, 1000):
        parts = [epoch_order(n, 1, 1, in_memory)[start : start + size] for start in range(0, n, size)][:50]
        np.testing.assert_array_equal(np.concatenate(parts), whole[: 50 * size])


def test_order_of_ten_million_images_takes_less_than_a_byte_an_image() -> None:
    n = 10_000_000
    tracemalloc.start()
    order = epoch_order(n, 1, 1, 50_000)
    rows = [order[start : start + 32] for start in range(0, n, 400_000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(np.concatenate(rows))) == 25 * 32
    assert peak < n


def test_error_of_the_reading_thread_reaches_the_consumer(train: TrainParams) -> None:
    broken = rows_of(epoch(train)[5])[3]
    iterator = batches(Numbered(broken_row=broken), LABELS, WEIGHTS, train, 1)
    for _ in range(5):
        next(iterator)
    with pytest.raises(UserError, match="cut short"):
        next(iterator)
    assert not reading_threads()


def test_no_thread_is_left_and_few_batches_are_read_ahead(train: TrainParams) -> None:
    images = Numbered()
    iterator = batches(images, LABELS, WEIGHTS, train, 1)
    for _ in range(3):
        next(iterator)
    assert reading_threads()
    del iterator
    assert not reading_threads()
    assert len(images.read) <= 3 + AHEAD
    epoch(train)
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_labels_of_other_images_are_refused(train: TrainParams) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        batches(Numbered(), LABELS[1:], WEIGHTS, train, 1)
