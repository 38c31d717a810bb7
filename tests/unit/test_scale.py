"""The model of what a retraining costs."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("bench_scale", BENCH / "scale.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def numbers() -> dict[str, float]:
    return {name: entry["value"] for name, entry in json.loads((BENCH / "scale.json").read_text()).items()}


def test_every_number_says_where_it_is_from() -> None:
    for name, entry in json.loads((BENCH / "scale.json").read_text()).items():
        assert set(entry) == {"value", "source"}, name
        assert entry["value"] > 0
        assert len(entry["source"]) > 10


def test_more_images_cost_more_and_more_gpus_save_hours_but_no_gpu_hours(scale: Any, numbers: dict[str, float]) -> None:
    for few, many in pairwise((10_000, 100_000, 1_000_000, 10_000_000)):
        assert scale.cost(few, 1, numbers).hours < scale.cost(many, 1, numbers).hours
    for few, many in pairwise((1, 2, 4, 16)):
        one, other = (scale.cost(10_000_000, gpus, numbers) for gpus in (few, many))
        assert other.hours < one.hours
        assert other.gpu_hours_each * many > one.gpu_hours_each * few


def test_a_training_lasts_as_long_as_its_images_and_epochs_say(scale: Any, numbers: dict[str, float]) -> None:
    found = scale.cost(1_000_000, 1, numbers)
    trained = 1_000_000 * numbers["train_share"] * numbers["epochs"] / numbers["train_images_per_s"] / 3600
    assert trained < found.train_hours < 1.2 * trained
    assert found.wait_share == 0
    assert found.decoded_gb == pytest.approx(0.8 * 50.176)
    assert found.fingerprints_gb == pytest.approx(18)
