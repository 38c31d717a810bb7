"""Recipes that differ from a base recipe in one thing, trained on one split with the same seeds, and compared.

    python bench/ablation.py --dataset data --splits build/split --params params.yaml --output build/ablation

No test image is opened. The best epoch is chosen on the validation images, the temperature on the calibration images.
Recipes are compared on the validation images and, with `--images`, on the training images that are left out by it: no
copy of them was trained on, and no epoch was chosen by them. Each run is a row of runs.csv as soon as it is done, so a
bench that was killed goes on where it was; table.md is written anew after each.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.artifacts import write_text
from braintumor.data.split_artifact import MadeSplit, load_split, refuse_other_data
from braintumor.evidence.bootstrap import group_sums, percentile_interval, resample_groups, widen_share
from braintumor.labels import CLASS_NAMES
from braintumor.params import EvaluateParams, Params, TrainParams, load_params

BASE = "base"
TURNED_OFF = {
    "rotation_degrees": 0, "shift_fraction": 0, "zoom_fraction": 0, "contrast_fraction": 0, "flip_horizontal": False,
}  # fmt: skip
STRONG = {
    "rotation_degrees": 20, "shift_fraction": 0.1, "zoom_fraction": 0.15, "contrast_fraction": 0.25,
    "flip_horizontal": True,
}  # fmt: skip
PHANTOMS = {
    "weights": "weights/densenet201-phantoms.weights.h5", "head_epochs": 20, "head_learning_rate": 0.003,
    "learning_rate": 0.0003,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What differs from the base; `is_mirrored`: probabilities are averaged with those of the mirrored image."""

    told: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    is_mirrored: bool = False


RECIPES = {
    BASE: Recipe("the parameters as they are"),
    "mirrored": Recipe("averaged with the mirrored image at prediction", is_mirrored=True),
    "per-image": Recipe("each image scaled to mean 0, deviation 1", {"input_scaling": "per_image"}),
    "no-augmentation": Recipe("images as they are", {"augmentation": TURNED_OFF}),
    "strong-augmentation": Recipe("20 degrees, shift 0.1, zoom 0.15, contrast 0.25", {"augmentation": STRONG}),
    "no-smoothing": Recipe("label smoothing 0", {"label_smoothing": 0.0}),
    "smoothing": Recipe("label smoothing 0.1", {"label_smoothing": 0.1}),
    "averaged": Recipe("moving average of the weights, momentum 0.95", {"ema_momentum": 0.95}),
    "no-head-phase": Recipe("all kernels from the start", {"head_epochs": 0}),
    "head-alone": Recipe("no fine-tuning", {"epochs": 0}),
    "batch-norm-trains": Recipe("BatchNorm in training mode", {"batch_norm": "train"}),
    "small": Recipe("48 px", {"image_size_px": 48}),
    "large": Recipe("96 px", {"image_size_px": 96}),
    "no-weights": Recipe("from scratch", {"weights": "none", "head_epochs": 0, "learning_rate": 0.001}),
    "phantoms": Recipe("weights of phantoms, head first, rate 0.0003, BatchNorm at rest", PHANTOMS),
    "phantoms-train": Recipe("the same, BatchNorm trains", PHANTOMS | {"batch_norm": "train"}),
}


@dataclass(frozen=True)
class Parts:
    """Rows of splits.csv (path, label, group); `held_out` begins with those of `val`."""

    train: pd.DataFrame
    val: pd.DataFrame
    calibration: pd.DataFrame
    held_out: pd.DataFrame


def main() -> None:
    """Train what is not trained yet, and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--splits", type=Path, default=Path("build/split"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--output", type=Path, default=Path("build/ablation"))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="most promising first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[20, 21])
    parser.add_argument("--images", type=int, default=0, help="about so many training images, whole groups; 0: all")
    parser.add_argument("--epochs", type=int, help="of fine-tuning, in every recipe; default: the parameters'")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    params = load_params(options.params)
    made = load_split(options.splits)
    if options.epochs is not None:
        params = params.model_copy(update={"train": changed(params.train, {"epochs": options.epochs})})
    parts = divide(made, options.images)
    recipes = {BASE: RECIPES[BASE]} | {name: RECIPES[name] for name in options.recipes}
    recipes = {name: recipe for name, recipe in recipes.items() if is_one(recipe, params.train)}
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.table_only:
        refuse_other_data(options.dataset, made.data_md5, options.splits)
    for seed in [] if options.table_only else options.seeds:
        for name, recipe in recipes.items():
            train = recipe_params(recipe, params.train, seed)
            key = run_key(train, made, parts)
            if key in done_runs(options.output)["key"].to_list():
                continue
            print(f"{name}, seed {seed} ...", flush=True)
            # A process of its own: TensorFlow gives no memory back.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                figures, predicted = pool.submit(run, options.dataset, parts, train).result()
            keep_run(options.output, {"key": key, "recipe": name, "seed": seed} | figures, predicted)
            table = table_of(options, recipes, params, made, parts)
            write_text(options.output / "table.md", table)
    table = table_of(options, recipes, params, made, parts)
    write_text(options.output / "table.md", table)
    print(table)


def changed(train: TrainParams, changes: Mapping[str, Any]) -> TrainParams:
    """Checked parameters; raises ValueError where the changes contradict them."""
    return TrainParams.model_validate(train.model_dump() | dict(changes))


def recipe_params(recipe: Recipe, base: TrainParams, seed: int) -> TrainParams:
    """What is trained for a recipe with a seed."""
    return changed(base, dict(recipe.changes) | {"seed": seed})


def is_one(recipe: Recipe, base: TrainParams) -> bool:
    """Whether the recipe differs from the base, and can be trained; the base and the mirrored one always are."""
    if not recipe.changes:
        return True
    try:
        train = changed(base, recipe.changes)
    except ValueError:
        return False

    def trained(params: TrainParams) -> dict[str, Any]:
        """What matters of the parameters."""
        no_weights = params.weights == "none"
        facts = params.model_dump() | {"batch_norm": params.batch_norm == "train" or no_weights}
        return facts | ({"head_epochs": 0} if no_weights else {})

    return trained(train) != trained(base)


def divide(made: MadeSplit, n_images: int) -> Parts:
    """The split's parts, with about `n_images` for training: whole groups, in the classes' shares; 0: all of them."""
    train, val = made.part("train"), made.part("val")
    groups = train.groupby("group")["label"].agg(["first", "size"])
    groups = groups.iloc[np.random.default_rng(0).permutation(len(groups))]
    # A group is in where the images of its class before it are fewer than the class's share.
    before = groups.groupby("first")["size"].cumsum() - groups["size"]
    share = min(1.0, n_images / len(train)) if n_images else 1.0
    kept = groups.index[before < share * groups.groupby("first")["size"].transform("sum")]
    is_kept = train["group"].isin(kept)
    return Parts(train[is_kept], val, made.part("calibration"), pd.concat([val, train[~is_kept]]))


def run_key(train: TrainParams, made: MadeSplit, parts: Parts) -> str:
    """Names all that a run is made of, but the code."""
    from braintumor.model.densenet import weights_digest

    paths = {name: sorted(getattr(parts, name)["path"]) for name in ("train", "held_out")}
    facts = {"split": made.sha256, "train": train.model_dump(), "weights": weights_digest(train), "paths": paths}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def done_runs(output: Path) -> pd.DataFrame:
    """The rows of runs.csv, none before the first run."""
    path = output / "runs.csv"
    return pd.read_csv(path, dtype={"key": str}) if path.is_file() else pd.DataFrame({"key": []})


def keep_run(output: Path, row: dict[str, Any], predicted: dict[str, NDArray[np.float32]]) -> None:
    """The predictions are written first, so that a row tells of them."""
    (output / "predictions").mkdir(exist_ok=True)
    np.savez_compressed(output / "predictions" / f"{row['key']}.npz", **predicted)  # type: ignore[arg-type]
    runs = [pd.DataFrame([row])] if (done := done_runs(output)).empty else [done, pd.DataFrame([row])]
    write_text(output / "runs.csv", pd.concat(runs).to_csv(index=False))


def run(dataset: Path, parts: Parts, train: TrainParams) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Train one recipe as `braintumor train` does: its figures, and probabilities (n, 4) of the held-out images."""
    from scipy.special import softmax

    from braintumor.model import training
    from braintumor.model.densenet import build_classifier
    from braintumor.model.images import load_images
    from braintumor.model.inference import BATCH_SIZE

    def load(rows: pd.DataFrame) -> training.LabelledImages:
        pixels = load_images(dataset, list(rows["path"]), train.image_size_px, lambda: None)
        return training.LabelledImages(pixels, labels_of(rows))

    training.make_reproducible(train.seed)
    classifier = build_classifier(train)
    images, val, calibration, held_out = (
        load(rows) for rows in (parts.train, parts.val, parts.calibration, parts.held_out)
    )
    started, cpu_started = time.monotonic(), time.process_time()
    history = training.History(on_epoch=lambda epoch: None)
    engine = training.make_engine(classifier, train, len(images.labels))
    if classifier.is_pretrained and train.head_epochs:
        training.fit_head(engine, classifier, images, val, train, history, lambda: None)
    if train.epochs:
        training.fine_tune(engine, images, val, train, history, lambda: None)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    assert history.best is not None

    def logits(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = classifier.network.predict(
            pixels.astype(np.float32), batch_size=BATCH_SIZE, verbose=0
        )
        return found

    temperature = training.fit_temperature(logits(calibration.images), calibration.labels)
    plain = softmax(logits(held_out.images) / temperature, axis=1)
    mirrored = softmax(logits(held_out.images[:, :, ::-1]) / temperature, axis=1)
    figures = {
        "train_images": len(images.labels),
        "held_out_images": len(held_out.labels),
        "epochs_run": len(history.epochs),
        "best_epoch": history.best.epoch,
        "val_loss": history.best.val_loss,
        "val_accuracy": history.best.val_accuracy,
        "temperature": temperature,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
    }
    return figures, {"plain": plain, "both": (plain + mirrored) / 2}


def labels_of(rows: pd.DataFrame) -> NDArray[np.int64]:
    """Indices into CLASS_NAMES (n,)."""
    return rows["label"].map(CLASS_NAMES.index).to_numpy(np.int64)


def table_of(
    options: argparse.Namespace, recipes: Mapping[str, Recipe], params: Params, made: MadeSplit, parts: Parts
) -> str:
    """Markdown: a line for each recipe that has a run, its figures and their paired differences to the base."""
    runs = done_runs(options.output).drop_duplicates("key").set_index("key")
    found: dict[str, dict[int, str]] = {}
    for name, recipe in recipes.items():
        keys = {seed: run_key(recipe_params(recipe, params.train, seed), made, parts) for seed in options.seeds}
        found[name] = {seed: key for seed, key in keys.items() if key in runs.index}
    head = ["recipe", "what differs", "seeds", "accuracy", "of each seed", "macro recall", "NLL"]
    head += ["accuracy - base", "macro recall - base", "NLL - base", "CPU s a run"]
    lines = [head, ["---"] * len(head)]
    for name in sorted((name for name in recipes if found[name]), key=lambda name: name != BASE):
        sums = summed(options.output, list(found[name].values()), parts.held_out, recipes[name].is_mirrored)
        by_seed = [
            summed(options.output, [key], parts.held_out, recipes[name].is_mirrored) for key in found[name].values()
        ]
        paired = [seed for seed in found[name] if seed in found[BASE]]
        differences = ["", "", ""]
        if name != BASE and paired:
            ours, base = (
                summed(options.output, [found[which][seed] for seed in paired], parts.held_out, is_mirrored)
                for which, is_mirrored in ((name, recipes[name].is_mirrored), (BASE, False))
            )
            differences = [difference(ours, base, figure, params.evaluate) for figure in FIGURES]
        accuracy, recall, loss = (estimate(sums, figure, params.evaluate) for figure in FIGURES)
        seeds = ", ".join(f"{100 * FIGURES['accuracy'](each.sum(axis=0)):.1f}" for each in by_seed)
        seconds = runs.loc[list(found[name].values()), "cpu_seconds"].mean()
        cpu = "" if recipes[name].is_mirrored else f"{seconds:.0f}"
        row = [f"`{name}`", recipes[name].told, str(len(found[name])), accuracy, seeds, recall, loss, *differences, cpu]
        lines.append(row)
    held_out, train = parts.held_out, parts.train
    missing = [name for name in RECIPES if not found.get(name)]
    n_left_out = len(held_out) - len(parts.val)
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"Trained on {len(train)} images ({train['group'].nunique()} groups), compared on {len(held_out)} "
            f"({held_out['group'].nunique()} groups): {len(parts.val)} of validation and {n_left_out} left out of the "
            "training. No test image was opened. Probabilities have the temperature of the calibration images.",
            f"In brackets: {100 * params.evaluate.confidence_level:g} % intervals by bootstrap over groups, seeds "
            "pooled: they tell of other images, not of other seeds. Differences are of the same images and seeds; "
            "bold: the interval is without 0. Of many recipes one may stand out by chance.",
            f"Not run, or the same as the base: {', '.join(missing) or 'none'}.",
            "",
        ]
    )


def summed(output: Path, keys: list[str], rows: pd.DataFrame, is_mirrored: bool) -> NDArray[np.float64]:
    """Sums by group (n_groups, 9): images judged right of each class, images of each class, negative log-likelihood.

    Means over the runs `keys`, whose images are the same.
    """
    labels = labels_of(rows)
    runs = []
    for key in keys:
        with np.load(output / "predictions" / f"{key}.npz") as archive:
            runs.append(archive["both" if is_mirrored else "plain"].astype(float))
    is_right = np.mean([each.argmax(axis=1) == labels for each in runs], axis=0)
    tiny = np.finfo(np.float32).tiny
    loss = np.mean([-np.log(np.maximum(each[np.arange(len(labels)), labels], tiny)) for each in runs], axis=0)
    of_class = np.eye(len(CLASS_NAMES))[labels]
    columns = np.column_stack([of_class * is_right[:, None], of_class, loss])
    return group_sums(columns, pd.factorize(rows["group"], sort=True)[0])


def share_right(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy of sums (..., 9)."""
    return np.asarray(sums[..., :4].sum(axis=-1) / sums[..., 4:8].sum(axis=-1))


def macro_recall(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the classes of the share that is judged right; a class that was not drawn is left out."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nanmean(sums[..., :4] / sums[..., 4:8], axis=-1))


def mean_loss(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Negative log-likelihood an image."""
    return np.asarray(sums[..., 8] / sums[..., 4:8].sum(axis=-1))


FIGURES = {"accuracy": share_right, "macro_recall": macro_recall, "nll": mean_loss}


def estimate(sums: NDArray[np.float64], figure: str, params: EvaluateParams) -> str:
    """A figure and its interval over groups, as people read it."""
    value = float(FIGURES[figure](sums.sum(axis=0)))
    low, high = percentile_interval(FIGURES[figure](resample_groups(len(sums), params) @ sums), params)
    if figure == "nll":
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    low, high = widen_share(value, [low, high], len(sums), params)
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def difference(ours: NDArray[np.float64], base: NDArray[np.float64], figure: str, params: EvaluateParams) -> str:
    """Ours less the base's over the same resamples of the groups; bold where the interval is without 0."""
    draws = resample_groups(len(ours), params)
    of = FIGURES[figure]
    value = float(of(ours.sum(axis=0)) - of(base.sum(axis=0)))
    low, high = percentile_interval(of(draws @ ours) - of(draws @ base), params)
    told = (
        f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
        if figure == "nll"
        else f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    )
    return f"**{told}**" if low > 0 or high < 0 else told


if __name__ == "__main__":
    main()
