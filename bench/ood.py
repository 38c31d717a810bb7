"""How well out-of-distribution scores tell probes from test images, score by score and kind by kind.

    python bench/ood.py --dataset data --splits build/split --model build/model --output build/bench

Every score is fitted on the training images of the split. The table holds the AUROC of each kind of probes against the
test images, and how many of these are above the threshold that the calibration images give.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from braintumor import artifacts
from braintumor.artifacts import write_json, write_text
from braintumor.data.split_artifact import load_split
from braintumor.evidence.shift import measure_ood
from braintumor.labels import CLASS_NAMES
from braintumor.model.densenet import import_keras
from braintumor.model.images import load_images
from braintumor.model.inference import BATCH_SIZE, image_size_px, load_classifier
from braintumor.model.ood import feature_tensor, fit_ood_head, score_features
from braintumor.model.probes import PROBE_KINDS, draw_probes

ALARM_SHARE = 0.05
NEIGHBOURS = 5
# Of the variance of the features: what is left beyond these directions is the residual.
RESIDUAL_SHARE = 0.9
EARLIER_BLOCKS = ("pool2_relu", "pool3_relu")

Array = NDArray[np.float64]
Features = dict[str, Array]
Score = Callable[[Features], Array]


def main() -> None:
    """Score test images and probes, and leave table and figures in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("data"))
    parser.add_argument("--splits", type=Path, default=Path("build/split"))
    parser.add_argument("--model", type=Path, default=Path("build/model"))
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--probes", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    result = measure(options.dataset, options.splits, options.model, options.probes, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "ood.json", result)
    write_text(options.output / "ood.md", table(result))
    print(table(result), end="")


def measure(dataset: Path, splits: Path, model: Path, n_probes: int, seed: int) -> dict[str, Any]:
    """The section 'ood' of every score, and the seconds that its fit took."""
    classifier = load_classifier(model / artifacts.MODEL)
    extract = _extractor(classifier)
    rows = {name: load_split(splits).part(name) for name in ("train", "calibration", "test")}
    size_px = image_size_px(classifier)
    images = {name: load_images(dataset, list(part["path"]), size_px) for name, part in rows.items()}
    labels = rows["train"]["label"].map(CLASS_NAMES.index).to_numpy(np.int64)
    features = {name: extract(part) for name, part in images.items()}
    turned = np.concatenate([extract(np.rot90(images["train"], turns, axes=(1, 2)))["stem"] for turns in (1, 2, 3)])
    probes = draw_probes(images["test"], n_probes, seed)
    probe_features = {kind: extract(probe) for kind, probe in probes.items()}
    scores = {}
    for name, fit in _scores(labels, turned, features["calibration"], seed).items():
        started = time.monotonic()
        score = fit(features["train"])
        seconds = time.monotonic() - started
        calibration = np.sort(score(features["calibration"]))
        place = min(len(calibration), int(np.ceil((len(calibration) + 1) * (1 - ALARM_SHARE))))
        # From the threshold on, every score counts as an alarm: 1 is the threshold of the section.
        over = {kind: 1 + score(its) - calibration[place - 1] for kind, its in probe_features.items()}
        section = measure_ood(1 + score(features["test"]) - calibration[place - 1], over, PROBE_KINDS)
        scores[name] = section | {"seconds": round(seconds, 2)}
    return {"model": str(model), "train": len(labels), "calibration": len(images["calibration"]), "scores": scores}


def _extractor(classifier: Any) -> Callable[[NDArray[np.uint8]], Features]:
    """Features of images by name: 'stem', 'last', each earlier block's, all pooled, and 'logits'."""
    keras = import_keras()
    backbone = classifier.get_layer("densenet201")
    pool = keras.layers.GlobalAveragePooling2D
    inner = keras.Model(
        backbone.input, {name: pool()(backbone.get_layer(name).output) for name in (*EARLIER_BLOCKS, "relu")}
    )
    taps = inner(classifier.get_layer("scaling").output)
    model = keras.Model(
        classifier.input,
        {"stem": feature_tensor(classifier), "logits": classifier.get_layer("logits")(taps["relu"]), **taps},
    )

    def extract(images: NDArray[np.uint8]) -> Features:
        found = model.predict(images, batch_size=BATCH_SIZE, verbose=0)
        return {name: np.asarray(values, np.float64) for name, values in found.items()}

    return extract


def _scores(
    labels: NDArray[np.int64], turned: Array, calibration: Features, seed: int
) -> dict[str, Callable[[Features], Score]]:
    def mahalanobis(name: str, classes: NDArray[np.int64] = labels, turned: Array | None = None) -> Any:
        def fit(train: Features) -> Score:
            head = fit_ood_head(train[name], classes, calibration[name], ALARM_SHARE, turned, seed)
            return lambda features: score_features(head, features[name])

        return fit

    def relative(train: Features) -> Score:
        heads = [
            fit_ood_head(train["relu"], classes, calibration["relu"], ALARM_SHARE) for classes in (labels, labels * 0)
        ]

        def distance(head: Any, features: Features) -> Array:
            return score_features(head, features["relu"]) * head.distance_scale

        return lambda features: distance(heads[0], features) - distance(heads[1], features)

    return {
        "largest probability (Hendrycks & Gimpel 2017)": lambda train: lambda its: -softmax(its["logits"], 1).max(1),
        "energy (Liu et al. 2020)": lambda train: lambda its: -logsumexp(its["logits"], axis=1),
        "last features: nearest neighbours (Sun et al. 2022)": _neighbours,
        "last features: Mahalanobis (Lee et al. 2018)": mahalanobis("relu"),
        "last features: relative Mahalanobis (Ren et al. 2021)": relative,
        "last features: residual and energy, ViM (Wang et al. 2022)": _vim,
        **{f"{name}: Mahalanobis": mahalanobis(name) for name in EARLIER_BLOCKS},
        "stem's grid: Mahalanobis": mahalanobis("stem"),
        "stem's grid: Mahalanobis and turned images (in use)": mahalanobis("stem", turned=turned),
    }


def _neighbours(train: Features) -> Score:
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    search = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(normalize(train["relu"]))
    return lambda features: np.asarray(search.kneighbors(normalize(features["relu"]))[0][:, -1])


def _vim(train: Features) -> Score:
    """The length of the features' residual, in units of the logits, less their energy."""
    mean, deviation = train["relu"].mean(axis=0), np.maximum(train["relu"].std(axis=0), 1e-6)
    standard = (train["relu"] - mean) / deviation
    variances, directions = np.linalg.eigh(standard.T @ standard)
    kept = np.cumsum(variances[::-1]) <= RESIDUAL_SHARE * variances.sum()
    others = directions[:, ::-1][:, ~kept]

    def residual(features: Features) -> Array:
        return np.asarray(np.linalg.norm((features["relu"] - mean) / deviation @ others, axis=1))

    unit = train["logits"].max(axis=1).mean() / residual(train).mean()
    return lambda features: unit * residual(features) - logsumexp(features["logits"], axis=1)


def table(result: dict[str, Any]) -> str:
    """The AUROCs as a Markdown table, a row for each score."""
    scores = result["scores"]
    kinds = list(next(iter(scores.values()))["kinds"])
    lines = [
        f"AUROC against the test images; scores fitted on {result['train']} training images,"
        f" thresholds on {result['calibration']} calibration images",
        "",
        f"| score | {' | '.join(kinds)} | mean | lowest | test images flagged | probes flagged | fit (s) |",
        f"|---|{'---|' * (len(kinds) + 5)}",
    ]
    for name, section in scores.items():
        its = section["kinds"].values()
        cells = [f"{kind['auroc']:.3f}" for kind in its]
        cells += [f"{section['auroc']:.3f}", f"{min(kind['auroc'] for kind in its):.3f}"]
        cells += [f"{section['in_distribution']['flagged_share']:.1%}"]
        cells += [f"{np.mean([kind['flagged_share'] for kind in its]):.1%}", f"{section['seconds']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
