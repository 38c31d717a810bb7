"""The class of new images, by a saved model or a version of the registry."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.model.images import IMAGE_SUFFIXES, UnreadableImage, decode_grey, resize_square
from braintumor.model.inference import image_size_px, load_classifier, predict_probabilities
from braintumor.params import load_params
from braintumor.registry import versions


@dataclass(frozen=True)
class Prediction:
    """`probabilities` by class name; `label` is the most probable."""

    path: str
    label: str
    probabilities: dict[str, float]


@contextmanager
def model_file(model: Path | None, params_file: Path, alias: str) -> Iterator[Path]:
    """The file `model`, or for the block's time a copy of the registry's version with that alias or number."""
    if model is not None:
        yield model
        return
    name = load_params(params_file).registration.model_name
    with tempfile.TemporaryDirectory(prefix="braintumor-") as folder:
        yield versions.download_model(name, alias, Path(folder))


def predict_files(model: Path, paths: Sequence[Path]) -> tuple[list[Prediction], list[str]]:
    """Predictions of all readable images below `paths`, in order, and what is wrong with each of the others."""
    files = [file for path in paths for file in _images_below(path)]
    classifier = load_classifier(model)
    size_px = image_size_px(classifier)
    images, readable, unreadable = [], [], []
    for file in files:
        try:
            images.append(resize_square(decode_grey(file), size_px)[..., None])
            readable.append(file)
        except UnreadableImage as error:
            unreadable.append(str(error))
    stacked = np.stack(images) if images else np.empty((0, size_px, size_px, 1), np.uint8)
    probabilities = predict_probabilities(classifier, stacked)
    predictions = [
        Prediction(
            str(file),
            CLASS_NAMES[int(row.argmax())],
            {name: round(float(value), 6) for name, value in zip(CLASS_NAMES, row, strict=True)},
        )
        for file, row in zip(readable, probabilities, strict=True)
    ]
    return predictions, unreadable


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

    table = Table(caption="A research tool, not a diagnostic device.", box=None, header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("class")
    for name in CLASS_NAMES:
        table.add_column(name, justify="right")
    for prediction in predictions:
        values = [f"{value:.1%}" for value in prediction.probabilities.values()]
        table.add_row(Text(prediction.path), prediction.label, *values)
    Console(soft_wrap=False).print(table)
