"""Whether heat maps can be believed: do they depend on what was learnt, and do they point at lesions that are known."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from braintumor.labels import CLASS_NAMES, NO_TUMOUR
from braintumor.model.gradcam import METHOD, Method, explained_layer, heat_maps, map_px, randomised_in_cascade

if TYPE_CHECKING:
    import keras

# So many images show whether maps change, and each of the stages goes through all of them.
RANDOMISATION_IMAGES = 16
# Maps of a network that has learnt nothing may be so alike to those of the trained one, and no more.
LIMIT = 0.5

Maps = NDArray[np.float32]
_NO_TUMOUR = CLASS_NAMES.index(NO_TUMOUR)


def measure_explanation(
    model: "keras.Model",
    images: NDArray[np.uint8],
    truth: NDArray[np.int64],
    masks: Mapping[int, NDArray[np.bool_]] | None,
    seed: int,
    *,
    layer: str | None = None,
    method: Method = METHOD,
) -> dict[str, Any]:
    """The section `explanation` of evidence.json for images (n, s, s, 1) with true classes (n,).

    `masks` holds the lesion, (s, s), of some images by their index: see `braintumor.data.masks.load_masks`.

    {"method", "layer", "map_px", "n",
     "randomisation": {"n", "stages": [{"randomised", "similarity"}, ...], "limit", "passed"},
     "localisation": {"n", "pointing_game", "chance", "overlap", "overlap_chance", "pointing_game_randomised",
                      "per_class": {name: {"n", "pointing_game", "overlap"}}} | None}

    Parameter randomisation (Adebayo et al., NeurIPS 2018, arXiv:1810.03292): weights are drawn anew from the logits
    down, stage by stage; `similarity` is the mean rank correlation of the true class's maps with those of the trained
    network. Passed, where it is at most `limit` at both ends: with new weights of the logits alone, since a map shall
    show what speaks for its class, and with new weights of all layers.

    Pointing game (Zhang et al., ECCV 2016, arXiv:1608.00507): the share of the lesions that hold the hottest pixel of
    their class's map; by chance it is their mean area, and `pointing_game_randomised` is that of the network without
    anything learnt. Overlap: the intersection over union of a lesion with as many of the hottest pixels.
    """
    layer = layer or explained_layer(model)
    of_truth = truth[:, None]
    chosen = _fixed_choice(images, RANDOMISATION_IMAGES)
    lesions = {index: mask for index, mask in sorted((masks or {}).items()) if truth[index] != _NO_TUMOUR}
    shown = sorted({*chosen, *lesions})
    place = {index: number for number, index in enumerate(shown)}
    maps = heat_maps(model, images[shown], of_truth[shown], layer, method)[:, 0]
    at = [place[index] for index in chosen]
    similarity: dict[str, float] = {}
    network = model
    for stage, network in randomised_in_cascade(model, seed):
        other = heat_maps(network, images[chosen], of_truth[chosen], layer, method)[:, 0]
        similarity[stage] = rank_correlation(maps[at], other)
    return {
        "method": method,
        "layer": layer,
        "map_px": map_px(model, layer),
        "n": len(images),
        "randomisation": {
            "n": len(chosen),
            "stages": [{"randomised": stage, "similarity": value} for stage, value in similarity.items()],
            "limit": LIMIT,
            "passed": all(list(similarity.values())[end] <= LIMIT for end in (0, -1)),
        },
        "localisation": _localisation(
            maps[[place[index] for index in lesions]],
            heat_maps(network, images[list(lesions)], of_truth[list(lesions)], layer, method)[:, 0],
            np.stack(list(lesions.values())),
            truth[list(lesions)],
        )
        if lesions
        else None,
    }


def _fixed_choice(images: NDArray[np.uint8], n: int) -> list[int]:
    """The indices of at most n images, by a digest of their pixels: the same images in whatever order they come."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return sorted(range(len(images)), key=lambda index: digests[index])[:n]


def rank_correlation(maps: Maps, others: Maps) -> float:
    """Spearman's, as a mean over pairs of maps; where both point nowhere it is 1, and where one does 0."""
    from scipy.stats import rankdata

    similarities = []
    for one, other in zip(maps, others, strict=True):
        if one.any() and other.any():
            similarities.append(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
        else:
            similarities.append(float(one.any() == other.any()))
    return float(np.mean(similarities))


def _localisation(maps: Maps, randomised: Maps, lesions: NDArray[np.bool_], truth: NDArray[np.int64]) -> dict[str, Any]:
    is_hit = pointing_game(maps, lesions)
    overlap = overlap_of(maps, lesions)
    area = lesions.mean(axis=(1, 2))
    of_class = {name: truth == index for index, name in enumerate(CLASS_NAMES) if (truth == index).any()}
    return {
        "n": len(lesions),
        "pointing_game": float(is_hit.mean()),
        "chance": float(area.mean()),
        "pointing_game_randomised": float(pointing_game(randomised, lesions).mean()),
        "overlap": float(overlap.mean()),
        # Two areas a that know nothing of one another share a * a of an image.
        "overlap_chance": float((area / (2 - area)).mean()),
        "per_class": {
            name: {
                "n": int(is_of.sum()),
                "pointing_game": float(is_hit[is_of].mean()),
                "overlap": float(overlap[is_of].mean()),
            }
            for name, is_of in of_class.items()
        },
    }


def pointing_game(maps: Maps, lesions: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each map's hottest pixel lies in its lesion; a map that points nowhere misses."""
    hottest = maps.reshape(len(maps), -1).argmax(axis=1)
    is_within = lesions.reshape(len(lesions), -1)[np.arange(len(lesions)), hottest]
    return np.asarray(is_within & maps.any(axis=(1, 2)))


def overlap_of(maps: Maps, lesions: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Intersection over union of each lesion with the hottest pixels of its map: as many, or all that are not 0."""
    overlaps = []
    for heat, lesion in zip(maps, lesions, strict=True):
        hottest = np.zeros(heat.size, bool)
        # Stable, so that equally hot pixels are taken in one order everywhere.
        hottest[np.argsort(-heat, axis=None, kind="stable")[: lesion.sum()]] = True
        hottest = hottest.reshape(heat.shape) & (heat > 0)
        overlaps.append((hottest & lesion).sum() / (hottest | lesion).sum())
    return np.array(overlaps)
