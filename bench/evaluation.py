"""What an evaluation costs beside the bare forward passes of its model over the same test images.

    python bench/evaluation.py --build build --params params.yaml --rounds 5

Explanations, robustness and the champion are left out, and publishing to MLflow; decoding, images unlike the
training's, figures, intervals, plots and the report are in. Both load the model, and run in one process, by turns,
after one round to warm up; the passes of a model that is loaded and traced already are given for comparison.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from braintumor import artifacts
from braintumor.artifacts import read_json, write_json
from braintumor.data.split_artifact import load_split
from braintumor.model.images import load_images
from braintumor.model.inference import image_size_px, load_classifier, predict
from braintumor.params import load_params
from braintumor.registry import tracking
from braintumor.steps.evaluate import evaluate


def main() -> None:
    """Time both by turns, and print the ratio with its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    params = load_params(options.params)
    bare = params.evaluate.model_copy(update={"robustness_images": 0, "gallery_images": 0})
    params = params.model_copy(update={"evaluate": bare})
    build: Path = options.build
    model = build / "model"
    size_px = image_size_px(load_classifier(model / artifacts.MODEL))
    paths = list(load_split(build / "split").part("test")["path"])
    images = load_images(options.dataset, paths, size_px, lambda: None)

    with tempfile.TemporaryDirectory() as scratch, patch.object(tracking, "publish_if_reachable"):
        context = Path(scratch) / "resolve"
        context.mkdir()
        write_json(
            context / artifacts.CONTEXT, read_json(build / "resolve" / artifacts.CONTEXT, "") | {"champion": None}
        )
        folders = (build / "validation", build / "split", model, context, Path(scratch) / "evaluation")

        def whole() -> None:
            evaluate(options.dataset, *folders, params)

        def forward() -> None:
            nonlocal classifier
            classifier = load_classifier(model / artifacts.MODEL)
            predict(classifier, images)

        def forward_again() -> None:
            predict(classifier, images)

        classifier = None
        times = [(timed(forward), timed(forward_again), timed(whole)) for _ in range(options.rounds + 1)][1:]
    ratios = [all_of_it / passes for passes, _, all_of_it in times]
    print(f"{len(images)} test images of {images.shape[1]} px, {options.rounds} rounds")
    for index, name in enumerate(("forward passes", "the same, again", "evaluation")):
        print(f"{name:15} {statistics.median(each[index] for each in times):7.1f} s")
    print(f"{'ratio':15} {statistics.median(ratios):7.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


def timed(work: Callable[[], None]) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
