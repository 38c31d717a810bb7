"""Which heat map can be believed: methods and layers on lesions whose outlines are known.

    python bench/explanations.py --dataset data --model build/model

A row a method and layer, on test images with masks: how often the hottest pixel lies in the lesion (beside that, of the
same network with random weights of its logits, and of all its layers), the overlap, and how alike the maps of the two
random networks are to those of the trained one. A map that points as well with random logits shows what is
conspicuous, not what speaks for a class.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from braintumor import artifacts
from braintumor.data.contents import list_contents
from braintumor.data.masks import load_masks
from braintumor.evidence.explanation import overlap_of, pointing_game, rank_correlation
from braintumor.labels import CLASS_NAMES
from braintumor.model.gradcam import Method, explained_layer, heat_maps, map_px, randomised_in_cascade
from braintumor.model.images import load_images
from braintumor.model.inference import image_size_px, load_classifier

METHODS: tuple[Method, ...] = ("grad-cam", "hirescam", "layercam")
SEED = 20
HEAD = """\
| layer | cells | method | pointing game | random logits | all random | overlap | likeness: random logits | all random |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--model", type=Path, default=Path("build/model"))
    parser.add_argument("--layers", nargs="+", help="default: that of the report, and the last")
    parser.add_argument("--images", type=int, default=96)
    options = parser.parse_args()
    model = load_classifier(options.model / artifacts.MODEL)
    size_px = image_size_px(model)
    paths = [path for path in list_contents(options.dataset).images if path.startswith("test/")]
    paths = list(np.random.default_rng(SEED).permutation(paths))
    masks = load_masks(options.dataset, paths, size_px)
    chosen = sorted(masks)[: options.images]
    lesions = np.stack([masks[index] for index in chosen])
    paths = [paths[index] for index in chosen]
    images = load_images(options.dataset, paths, size_px)
    truth = np.array([[CLASS_NAMES.index(Path(path).parts[1])] for path in paths])
    networks = list(randomised(model))
    print(f"{len(paths)} lesions, of {lesions.mean():.1%} of an image\n")
    print(HEAD)
    for layer in options.layers or [explained_layer(model), "relu"]:
        for method in METHODS:
            maps = [heat_maps(network, images, truth, layer, method)[:, 0] for network in [model, *networks]]
            figures = [
                *(pointing_game(heat, lesions).mean() for heat in maps),
                overlap_of(maps[0], lesions).mean(),
                *(rank_correlation(maps[0], heat) for heat in maps[1:]),
            ]
            cells = [layer, str(map_px(model, layer)), method, *(f"{figure:.2f}" for figure in figures)]
            print(f"| {' | '.join(cells)} |", flush=True)


def randomised(model: Any) -> Iterator[Any]:
    """The network with random weights of its logits, and with random weights of all its layers."""
    yield next(iter(randomised_in_cascade(model, SEED)))[1]
    for _, network in randomised_in_cascade(model, SEED):
        last = network
    yield last


if __name__ == "__main__":
    main()
