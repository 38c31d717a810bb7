"""The class of new images, by a saved model or a version of the registry."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES, IMAGE_SUFFIXES
from braintumor.model.images import UnreadableImage, decode_grey, resize_square
from braintumor.model.inference import Outputs, image_size_px, load_classifier, predict
from braintumor.model.saved import model_digest
from braintumor.params import load_params
from braintumor.registry import versions

if TYPE_CHECKING:
    import keras
    from PIL import Image

CAVEAT = "A research tool, not a diagnostic device."
OVERLAY_PX = 384
# So that name and digest fit any file system, in any script.
MAX_STEM = 50
LINE_PX, FONT_PX, MARGIN_PX = 24, 16, 8
OVERLAY_GROUND, OVERLAY_INK, OVERLAY_SOFT = (24, 24, 24), (235, 235, 235), (170, 170, 170)


@dataclass(frozen=True)
class Prediction:
    """`probabilities` by class name; `label` is the most probable.

    `ood_score` is above 1 for an image unlike those of the training; None of a model without such a score. `overlay` is
    the PNG that explains the prediction, if one was asked for.
    """

    path: str
    label: str
    probabilities: dict[str, float]
    ood_score: float | None = None
    is_unlike_training: bool | None = None
    overlay: str | None = None


@contextmanager
def model_file(model: Path | None, params_file: Path, alias: str) -> Iterator[Path]:
    """The file `model`, or for the block's time a copy of the registry's version with that alias or number."""
    if model is not None:
        yield model
        return
    name = load_params(params_file).registration.model_name
    with tempfile.TemporaryDirectory(prefix="braintumor-") as folder:
        yield versions.download_model(name, alias, Path(folder))


def predict_files(
    model: Path, paths: Sequence[Path], explain: Path | None = None
) -> tuple[list[Prediction], list[str]]:
    """Predictions of all readable images below `paths`, in order, and what is wrong with each of the others.

    A PNG of each image beside the heat map of its most probable class stands in the folder `explain` afterwards, if one
    is given. Its name is the image's, and a digest of what it shows: the same again replaces it, and nothing else does.
    What else the folder holds stays. Raises UserError for a folder that can't be written to.
    """
    classifier = load_classifier(model)
    size_px = image_size_px(classifier)
    images, large, readable, unreadable = [], [], [], []
    for file in (file for path in paths for file in _images_below(path)):
        try:
            grey = decode_grey(file)
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        readable.append(file)
        images.append(resize_square(grey, size_px)[..., None])
        if explain is not None:
            large.append(resize_square(grey, OVERLAY_PX))
    if not images:
        return [], unreadable
    stacked = np.stack(images)
    predictions = _predictions(readable, predict(classifier, stacked))
    if explain is not None:
        predictions = _explained(predictions, classifier, model_digest(model), stacked, large, explain)
    return predictions, unreadable


def _explained(
    predictions: Sequence[Prediction],
    classifier: "keras.Model",
    digest: str,
    images: NDArray[np.uint8],
    large: Sequence[NDArray[np.uint8]],
    folder: Path,
) -> list[Prediction]:
    """The predictions with their overlays; `large` are the images as they are shown."""
    from braintumor.model.gradcam import heat_maps, overlay

    classes = np.array([[CLASS_NAMES.index(one.label)] for one in predictions])
    maps = heat_maps(classifier, images, classes)[:, 0]
    explained = []
    for prediction, image, grey, heat in zip(predictions, images, large, maps, strict=True):
        name = hashlib.sha256(digest.encode() + image.tobytes() + grey.tobytes()).hexdigest()[:12]
        place = folder / f"{Path(prediction.path).stem[:MAX_STEM]}-{name}.png"
        _save_png(_explanation(grey, overlay(grey, heat), prediction), place)
        explained.append(replace(prediction, overlay=str(place)))
    return explained


def _predictions(files: Sequence[Path], outputs: Outputs) -> list[Prediction]:
    scores = [None] * len(files) if outputs.ood_scores is None else [float(score) for score in outputs.ood_scores]
    return [
        Prediction(
            str(file),
            CLASS_NAMES[int(row.argmax())],
            {name: round(float(value), 6) for name, value in zip(CLASS_NAMES, row, strict=True)},
            None if score is None else round(score, 6),
            None if score is None else score > 1,
        )
        for file, row, score in zip(files, outputs.probabilities, scores, strict=True)
    ]


def _explanation(grey: NDArray[np.uint8], overlaid: "Image.Image", prediction: Prediction) -> "Image.Image":
    """Image and heat map side by side, over what the model says and what it is not."""
    from PIL import Image, ImageDraw, ImageFont

    said = f"{prediction.label} {prediction.probabilities[prediction.label]:.1%}"
    lines = [(f"{said}; in colour: what speaks for {prediction.label}", OVERLAY_INK)]
    if prediction.is_unlike_training:
        lines.append(("Unlike the images of the training: don't rely on this.", OVERLAY_INK))
    lines.append((CAVEAT, OVERLAY_SOFT))
    side = OVERLAY_PX
    sheet = Image.new("RGB", (2 * side, side + len(lines) * LINE_PX + 2 * MARGIN_PX), OVERLAY_GROUND)
    sheet.paste(Image.fromarray(grey).convert("RGB"), (0, 0))
    sheet.paste(overlaid, (side, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for number, (line, ink) in enumerate(lines):
        pen.text((MARGIN_PX, side + MARGIN_PX + number * LINE_PX), line, ink, font)
    return sheet


def _save_png(picture: "Image.Image", place: Path) -> None:
    """The picture is at `place`, whole or not at all."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".", suffix=".png", delete=False) as file:
            partial = Path(file.name)
            picture.save(file, "PNG", optimize=True)
        partial.chmod(0o644)
        partial.replace(place)
    except OSError as error:
        raise UserError(f"{place} can't be written ({error.strerror}); give another folder as --explain") from error


def _images_below(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name a file or another folder")
    return found


def show(predictions: Sequence[Prediction], as_json: bool) -> None:
    """Print the predictions: one JSON object a line, or a table that ends with what the tool is not."""
    if as_json:
        for prediction in predictions:
            print(json.dumps(asdict(prediction)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=CAVEAT, box=None, header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("class")
    for name in CLASS_NAMES:
        table.add_column(name, justify="right")
    is_scored = any(prediction.ood_score is not None for prediction in predictions)
    if is_scored:
        table.add_column("unlike the training", justify="right")
    for prediction in predictions:
        values = [f"{value:.1%}" for value in prediction.probabilities.values()]
        score = [_told_score(prediction)] if is_scored else []
        table.add_row(Text(prediction.path), prediction.label, *values, *score)
    Console(soft_wrap=False).print(table)


def _told_score(prediction: Prediction) -> str:
    if prediction.ood_score is None:
        return ""
    return f"{'yes' if prediction.is_unlike_training else 'no'} ({prediction.ood_score:.2f})"
