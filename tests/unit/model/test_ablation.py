import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from braintumor.data.split_artifact import MadeSplit
from braintumor.labels import CLASS_NAMES
from braintumor.params import Params, load_params

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    specification = importlib.util.spec_from_file_location("ablation", ROOT / "bench" / "ablation.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # dataclasses look their module up.
    sys.modules["ablation"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made() -> MadeSplit:
    """Groups of one to three images; there are twice as many of the first class."""
    rows = [
        {"path": f"{split}/{number}-{copy}.png", "label": CLASS_NAMES[number % 5 % 4], "group": f"{split}-{number}"}
        | {"split": split}
        for split, n_groups in (("train", 100), ("val", 20), ("calibration", 20), ("test", 20))
        for number in range(n_groups)
        for copy in range(1 + number % 3)
    ]
    return MadeSplit(pd.DataFrame(rows), {"splits_sha256": "s"}, floors=pd.DataFrame())


def test_fewer_training_images_are_whole_groups_in_the_shares_of_the_classes(
    bench: ModuleType, made: MadeSplit
) -> None:
    parts = bench.divide(made, 80)
    assert 80 <= len(parts.train) <= 92
    share = parts.train["label"].value_counts() / len(parts.train)
    expected = made.part("train")["label"].value_counts(normalize=True)
    assert (share - expected).abs().max() < 0.03
    assert not set(parts.train["group"]) & set(parts.held_out["group"])
    # Whatever is not trained on is held out, and nothing of the test is.
    assert len(parts.held_out) == len(made.part("train")) - len(parts.train) + len(made.part("val"))
    assert not parts.held_out["path"].str.startswith("test").any()
    assert bench.divide(made, 0).held_out.equals(made.part("val"))
    assert bench.divide(made, 80).train.equals(parts.train)


def test_recipe_that_is_the_base_or_contradicts_it_is_left_out(bench: ModuleType) -> None:
    def left_out(params: Params) -> set[str]:
        return {name for name, recipe in bench.RECIPES.items() if not bench.is_one(recipe, params.train)}

    sample, scratch = (load_params(ROOT / "params" / f"{name}.yaml") for name in ("sample", "real-cpu"))
    assert left_out(sample) == set()
    assert left_out(scratch) == {"no-smoothing", "no-head-phase", "head-alone", "batch-norm-trains", "no-weights"}


def keep(bench: ModuleType, output: Path, key: str, rows: pd.DataFrame, is_right: np.ndarray, **row: Any) -> None:
    """A run that gives 0.7 to the true class where it is right, else to the next."""
    answered = (bench.labels_of(rows) + ~is_right) % 4
    probabilities = np.full((len(rows), 4), 0.1, np.float32)
    probabilities[np.arange(len(rows)), answered] = 0.7
    bench.keep_run(output, {"key": key, "cpu_seconds": 60} | row, {"plain": probabilities, "both": probabilities})


def test_differences_are_those_of_the_same_images_with_the_seeds_pooled(
    bench: ModuleType, made: MadeSplit, tmp_path: Path, params: Params
) -> None:
    rows = made.part("val")
    random = np.random.default_rng(0)
    base, better = random.random(len(rows)) < 0.5, np.ones(len(rows), bool)
    for key, is_right in {"a": base, "b": ~base, "c": better, "d": base}.items():
        keep(bench, tmp_path, key, rows, is_right)
    assert bench.done_runs(tmp_path)[["key", "cpu_seconds"]].to_numpy().tolist() == [[key, 60] for key in "abcd"]
    both, one, again = (bench.summed(tmp_path, keys, rows, False) for keys in (["a", "b"], ["c"], ["d"]))
    assert bench.share_right(both.sum(axis=0)) == pytest.approx(0.5)
    assert bench.macro_recall(both.sum(axis=0)) == pytest.approx(0.5)
    assert bench.mean_loss(one.sum(axis=0)) == pytest.approx(-np.log(0.7), rel=1e-6)
    # Whatever is drawn, each image gains one half: the pairing takes all the spread away.
    assert bench.difference(one, both, "accuracy", params.evaluate) == "**+50.0 (+50.0 to +50.0)**"
    first = bench.summed(tmp_path, ["a"], rows, False)
    assert bench.difference(again, first, "nll", params.evaluate) == "+0.000 (+0.000 to +0.000)"
    # Flawless on 20 groups does not mean 100 %.
    assert bench.estimate(one, "accuracy", params.evaluate) == "100.0 % (83.2 to 100.0)"


def test_rows_in_another_order_have_the_same_figures(
    bench: ModuleType, made: MadeSplit, tmp_path: Path, params: Params
) -> None:
    rows = made.part("val")
    is_right = np.random.default_rng(0).random(len(rows)) < 0.7
    order = np.random.default_rng(1).permutation(len(rows))
    keep(bench, tmp_path, "a", rows, is_right)
    keep(bench, tmp_path, "b", rows.iloc[order], is_right[order])
    one, two = bench.summed(tmp_path, ["a"], rows, False), bench.summed(tmp_path, ["b"], rows.iloc[order], False)
    for figure in bench.FIGURES:
        assert bench.estimate(one, figure, params.evaluate) == bench.estimate(two, figure, params.evaluate)


def test_run_has_another_key_for_another_recipe_seed_or_choice_of_images(
    bench: ModuleType, made: MadeSplit, params: Params
) -> None:
    base = params.train.model_copy(update={"weights": "none", "head_epochs": 0})
    whole, part = bench.divide(made, 0), bench.divide(made, 80)
    keys = {
        bench.run_key(bench.recipe_params(bench.RECIPES[name], base, seed), made, parts)
        for name in ("base", "per-image")
        for seed in (20, 21)
        for parts in (whole, part)
    }
    assert len(keys) == 8
    # The mirrored recipe costs no training.
    mirrored, plain = (bench.recipe_params(bench.RECIPES[name], base, 20) for name in ("mirrored", "base"))
    assert bench.run_key(mirrored, made, whole) == bench.run_key(plain, made, whole)
