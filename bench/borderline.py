"""The pairs that decide: the weakest links that hold groups of copies together, and the closest pairs kept apart.

    python bench/borderline.py --dataset data --output build/bench

Look at both sheets before you trust a threshold on images of your own: each weak link should show one slice twice, and
each pair kept apart two slices. Pairs stand side by side, the second image as it matches the first, with their
correlation; pairs of one group are shown once.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from braintumor.data.contact_sheets import TILE_PX, compose
from braintumor.data.contents import list_contents
from braintumor.data.duplicates import SYMMETRIES, correlations, fingerprint, similar_pairs
from braintumor.model.images import decode_grey
from braintumor.params import load_params

# Below this nothing is near any sensible threshold.
LOWEST = 0.7


def main() -> None:
    """Draw the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    threshold = load_params(options.params).validation.copy_correlation
    paths = list_contents(options.dataset).images
    with ThreadPoolExecutor() as pool:
        prints = np.stack(list(pool.map(lambda path: fingerprint(decode_grey(options.dataset / path)), paths)))
    found = sorted(all_pairs(prints), reverse=True)
    links, apart = divide(found, threshold, len(paths))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("weakest_links", links[::-1]), ("closest_apart", apart)):
        shown = pairs[: options.pairs]
        if shown:
            sheet(options.dataset, paths, shown).save(options.output / f"{name}.png")
        values = ", ".join(f"{pair[0]:.3f}" for pair in shown)
        print(f"{name}: {len(pairs)} pairs, of which {len(shown)} are drawn: {values}")


Pair = tuple[float, int, int, int]


def all_pairs(prints: NDArray[np.float16]) -> Iterator[Pair]:
    """Correlation, first image, second image and symmetry of each pair that is worth a look."""
    for pairs in similar_pairs(prints, LOWEST - 0.1):
        values = correlations(prints, pairs)
        for place in np.flatnonzero(values > LOWEST):
            yield float(values[place]), int(pairs.first[place]), int(pairs.second[place]), int(pairs.symmetry[place])


def divide(pairs: list[Pair], threshold: float, n_images: int) -> tuple[list[Pair], list[Pair]]:
    """The links that hold groups together, and one pair of each two groups that are alike; the closest first."""
    groups = np.arange(n_images)
    links: list[Pair] = []
    apart: list[Pair] = []
    for pair in pairs:
        first, second = groups[pair[1]], groups[pair[2]]
        if first != second:
            groups[groups == second] = first
            (links if pair[0] > threshold else apart).append(pair)
    return links, apart


def sheet(dataset: Path, paths: list[str], pairs: list[Pair]) -> Image.Image:
    """The pairs, two images each."""
    tiles: list[Image.Image | None] = []
    captions = []
    for correlation, first, second, symmetry in pairs:
        rows, columns = SYMMETRIES[symmetry]
        for index, steps in ((first, (1, 1)), (second, (rows, columns))):
            grey = decode_grey(dataset / paths[index])[:: steps[0], :: steps[1]]
            tiles.append(Image.fromarray(np.ascontiguousarray(grey)).resize((TILE_PX, TILE_PX)).convert("RGB"))
            captions.append((Path(paths[index]).stem, f"{correlation:.3f} {paths[index].split('/')[1]}"))
    return compose(tiles, captions)


if __name__ == "__main__":
    main()
