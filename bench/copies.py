"""How many generated copies the search finds, kind by kind, and how many of its groups join different slices.

    python bench/copies.py --dataset data --output build/bench

One image of each group of copies in the data set is an original. Copies of some of them are made by every change of
the table, with strengths drawn from a seed, and each is shown to the search together with its original alone: no other
copy helps as a link. Then all originals and the copies within the claim are grouped at once; a group that holds two
originals is false. Byte and pixel digests are left out, so that the fingerprints alone are judged.
"""

import argparse
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

from braintumor.artifacts import write_json, write_text
from braintumor.data.duplicates import Fingerprints, fingerprint, group_copies
from braintumor.data.manifest import survey
from braintumor.model.images import decode_grey
from braintumor.params import load_params

Grey = NDArray[np.uint8]
Change = Callable[[Grey, np.random.Generator], Grey]

FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def main() -> None:
    """Make the copies, search them, and leave table and figures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--originals", type=int, default=400, help="how many are copied; all are in the search")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    result = measure(options.dataset, options.params, options.originals, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "copies.json", result)
    write_text(options.output / "copies.md", table(result))
    print(table(result), end="")


def measure(dataset: Path, params: Path, n_originals: int, seed: int) -> dict[str, Any]:
    """The share of found copies by kind of change, and the share of false groups."""
    checks = load_params(params).validation
    images = survey(dataset, checks.workers, checks.copy_correlation).images
    readable = images[images["is_readable"]].sort_values("path")
    originals = readable.drop_duplicates("duplicate_group")["path"].tolist()
    chosen = np.random.default_rng(seed).permutation(len(originals))[:n_originals]
    with ThreadPoolExecutor() as pool:
        prints = list(pool.map(lambda path: fingerprint(decode_grey(dataset / path)), originals))
        copies = list(pool.map(lambda index: dict(make_copies(dataset / originals[index], [seed, index])), chosen))
    kinds = []
    for name in (*CLAIMED, *BEYOND):
        found = [
            len(set(group([prints[index], its[name]], checks.copy_correlation))) == 1
            for index, its in zip(chosen, copies, strict=True)
        ]
        kinds.append({"change": name, "claimed": name in CLAIMED, "copies": len(found), "found": sum(found)})
    claimed = [its[name] for its in copies for name in CLAIMED]
    groups = group([*prints, *claimed], checks.copy_correlation)
    members: dict[str, set[str]] = {}
    for name, original in zip(groups, [*range(len(prints)), *np.repeat(chosen, len(CLAIMED))], strict=True):
        members.setdefault(name, set()).add(originals[original])
    false = [sorted(paths) for paths in members.values() if len(paths) > 1]
    n_groups = sum(groups.count(name) > 1 for name in members)
    within = [kind for kind in kinds if kind["claimed"]]
    return {
        "images": len(images),
        "originals": len(originals),
        "copy_correlation": checks.copy_correlation,
        "seed": seed,
        "kinds": kinds,
        "found_share": sum(kind["found"] for kind in within) / sum(kind["copies"] for kind in within),
        "groups": n_groups,
        "false_groups": sorted(false),
        "false_share": len(false) / n_groups,
    }


def make_copies(file: Path, seed: list[int]) -> Iterator[tuple[str, Fingerprints]]:
    """The fingerprint of a copy by each change."""
    original = decode_grey(file)
    for number, (name, change) in enumerate((CLAIMED | BEYOND).items()):
        yield name, fingerprint(np.ascontiguousarray(change(original, np.random.default_rng([*seed, number]))))


def group(prints: list[Fingerprints], copy_correlation: float) -> list[str]:
    """The groups by fingerprints alone."""
    names = [f"{index:012d}" for index in range(len(prints))]
    return group_copies(names, [None] * len(names), np.stack(prints), copy_correlation)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| change | copies | found |", "|---|---|---|"]
    for kind in result["kinds"]:
        note = "" if kind["claimed"] else " (beyond the claim)"
        lines.append(f"| {kind['change']}{note} | {kind['copies']} | {100 * kind['found'] / kind['copies']:.1f} % |")
    false = len(result["false_groups"])
    return "\n".join(
        [
            *lines,
            "",
            f"{result['originals']} originals of {result['images']} images, correlation {result['copy_correlation']}: "
            f"{100 * result['found_share']:.2f} % of the copies within the claim are found; "
            f"{false} of {result['groups']} groups are false ({100 * result['false_share']:.2f} %).",
            "",
        ]
    )


def toned(grey: Grey, tone: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Grey:
    """Other grey values, cut at black and white."""
    return np.clip(np.rint(tone(grey.astype(np.float64))), 0, 255).astype(np.uint8)


def recompressed(grey: Grey, quality: int) -> Grey:
    """The image after a JPEG of this quality."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def scaled(grey: Grey, rng: np.random.Generator, across: float, down: float) -> Grey:
    """The image at another size, by a filter that chance picks."""
    height, width = grey.shape
    size = max(1, round(width * across)), max(1, round(height * down))
    image = Image.fromarray(np.ascontiguousarray(grey))
    return np.asarray(image.resize(size, FILTERS[int(rng.integers(len(FILTERS)))]))


def resized(grey: Grey, rng: np.random.Generator, low: float = 0.4, high: float = 2.0) -> Grey:
    """Both sides by one factor."""
    factor = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return scaled(grey, rng, factor, factor)


def brighter(grey: Grey, rng: np.random.Generator) -> Grey:
    """Up to 30 of 255 levels up or down."""
    shift = rng.uniform(-30, 30)
    return toned(grey, lambda values: values + shift)


def contrasted(grey: Grey, rng: np.random.Generator) -> Grey:
    """The distance to the mean grey times 0.6 to 1.5."""
    factor = rng.uniform(0.6, 1.5)
    return toned(grey, lambda values: values.mean() + factor * (values - values.mean()))


def gamma(grey: Grey, rng: np.random.Generator) -> Grey:
    """Gamma 0.6 to 1.6."""
    exponent = rng.uniform(0.6, 1.6)
    return toned(grey, lambda values: 255 * (values / 255) ** exponent)


def sharpened(grey: Grey, rng: np.random.Generator) -> Grey:
    """Edges 3 to 7 times as strong, as in edge-filtered copies of public sets."""
    amount = rng.uniform(2, 6)
    return toned(grey, lambda values: values + amount * (values - gaussian_filter(values, 1.0)))


def equalised(grey: Grey, rng: np.random.Generator) -> Grey:
    """The histogram of the head equalised; the background stays black."""
    mask = Image.fromarray(np.where(grey > 10, 255, 0).astype(np.uint8))
    return np.where(grey > 10, np.asarray(ImageOps.equalize(Image.fromarray(grey), mask=mask)), grey)


def saturated(grey: Grey, rng: np.random.Generator) -> Grey:
    """Twice to three times as bright, cut at white: whole tissues lose their structure."""
    factor = rng.uniform(2, 3)
    return toned(grey, lambda values: factor * values)


def combined(grey: Grey, rng: np.random.Generator) -> Grey:
    """Mirrored or not, another tone, another size, recompressed."""
    rows, columns = rng.choice([1, -1], 2)
    tone = (brighter, contrasted, gamma)[int(rng.integers(3))]
    return recompressed(resized(tone(grey[::rows, ::columns], rng), rng), int(rng.integers(30, 96)))


def cropped(grey: Grey, rng: np.random.Generator, share: float) -> Grey:
    """Each border moved in by up to `share` of the side."""
    height, width = grey.shape
    top, bottom = (int(cut) for cut in rng.uniform(0, share, 2) * height)
    left, right = (int(cut) for cut in rng.uniform(0, share, 2) * width)
    return grey[top : height - bottom, left : width - right]


def turned(grey: Grey, rng: np.random.Generator, degrees: float) -> Grey:
    """Turned by so many degrees, to one side or the other."""
    return np.asarray(Image.fromarray(grey).rotate(degrees * float(rng.choice([1, -1])), Image.Resampling.BICUBIC))


CLAIMED: dict[str, Change] = {
    "identical": lambda grey, rng: grey,
    "left-right": lambda grey, rng: grey[:, ::-1],
    "up-down": lambda grey, rng: grey[::-1],
    "180 degrees": lambda grey, rng: grey[::-1, ::-1],
    "JPEG quality 30 to 95": lambda grey, rng: recompressed(grey, int(rng.integers(30, 96))),
    "resized 0.4 to 2 times": resized,
    "squeezed, one side 0.7 to 1": lambda grey, rng: scaled(grey, rng, rng.uniform(0.7, 1), 1.0),
    "brightness, up to 30 levels": brighter,
    "contrast 0.6 to 1.5": contrasted,
    "gamma 0.6 to 1.6": gamma,
    "mirrored, toned, resized, recompressed": combined,
}
BEYOND: dict[str, Change] = {
    "sharpened": sharpened,
    "histogram equalised": equalised,
    "saturated, 2 to 3 times as bright": saturated,
    "cropped by up to 1 % a side": partial(cropped, share=0.01),
    "cropped by up to 3 % a side": partial(cropped, share=0.03),
    "turned by 1 degree": partial(turned, degrees=1.0),
    "turned by 2 degrees": partial(turned, degrees=2.0),
    "turned by 90 degrees": lambda grey, rng: np.rot90(grey),
}


if __name__ == "__main__":
    main()
