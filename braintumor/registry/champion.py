"""The model that reviewers use now, brought back to be scored on the same images as its challenger."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from braintumor.data.splits import find_units
from braintumor.errors import RegistryUnreachable, UserError
from braintumor.model.images import load_images
from braintumor.model.inference import image_size_px, load_classifier, predict_probabilities
from braintumor.progress import Progress, warn
from braintumor.registry.server import connected
from braintumor.registry.tracking import seen_images
from braintumor.registry.versions import MODEL_DIGEST, download_model, run_of_version

# A few images may be taken out of a data set without making a comparison worthless.
MAX_LOST_SHARE = 0.01


class ChampionUnusable(UserError):
    """The champion can't be compared with; the message says why."""


@dataclass(frozen=True)
class Champion:
    """A version's model file, and the SHA-256 of every image file that it was trained on."""

    version: str
    model: Path
    seen_sha256: frozenset[str]


def fetch_champion(facts: Mapping[str, Any], model_name: str, target: Path) -> Champion:
    """The champion that context.json names, its model in the folder `target`.

    Raises ChampionUnusable if the registry has no such version any more, or does not hold what was registered, and
    RegistryUnreachable if MLflow does not answer: then nobody knows.
    """
    version = str(facts["version"])
    try:
        with connected() as client:
            found = run_of_version(client, model_name, version)
            if found is None:
                raise ChampionUnusable(f"version {version} of {model_name} is not in the registry any more")
            run_id, tags = found
            if tags.get(MODEL_DIGEST) != facts.get(MODEL_DIGEST):
                raise ChampionUnusable(f"version {version} of {model_name} is another model than 'resolve' found")
            with tempfile.TemporaryDirectory() as scratch:
                seen = seen_images(client, run_id, Path(scratch))
        if not seen:
            raise ChampionUnusable(f"the run of version {version} has no list of the images that it was trained on")
        return Champion(version, download_model(model_name, version, target), seen)
    except (RegistryUnreachable, ChampionUnusable):
        raise
    except UserError as error:
        raise _unusable(version, "is not what was registered, or is gone", error) from error


def _unusable(version: str, fact: str, error: UserError) -> ChampionUnusable:
    # The reason becomes a part of the evidence: no folder and no server's address may stand there.
    warn(str(error))
    return ChampionUnusable(f"the model of version {version} {fact}")


def groups_seen(champion: Champion, manifest: pd.DataFrame) -> set[str]:
    """The duplicate groups of `manifest` that copies or patients link to an image that the champion was trained on.

    Raises ChampionUnusable where too many of these images are gone from the data set, or have other bytes by now:
    which test images are copies of them, nobody can tell.
    """
    lost = len(champion.seen_sha256 - set(manifest["sha256"]))
    if lost > MAX_LOST_SHARE * len(champion.seen_sha256):
        raise ChampionUnusable(
            f"{lost} of the {len(champion.seen_sha256)} images that version {champion.version} was trained on are no "
            "longer in the data set, so its copies among the test images can't be told"
        )
    units = find_units(manifest)
    seen = set(units[manifest["sha256"].isin(champion.seen_sha256)])
    return set(manifest.loc[units.isin(seen), "duplicate_group"])


def score_champion(
    champion: Champion, dataset: Path, paths: Sequence[str], images: NDArray[np.uint8], progress: Progress
) -> NDArray[np.float64]:
    """Probabilities (n, 4) of the champion for `paths`; `images` are these as the challenger takes them.

    Raises ChampionUnusable for a model that can't be loaded, or gives numbers that are not finite.
    """
    try:
        classifier = load_classifier(champion.model)
    except UserError as error:
        raise _unusable(champion.version, "can't be loaded", error) from error
    size_px = image_size_px(classifier)
    if size_px != images.shape[1]:
        advance = progress("evaluate: decoding for the champion", len(paths))
        images = load_images(dataset, list(paths), size_px, advance)
    try:
        return predict_probabilities(classifier, images).astype(float)
    except UserError as error:
        raise _unusable(champion.version, "gives no finite probabilities", error) from error
