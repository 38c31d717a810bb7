import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.artifacts import sha256_of_file
from braintumor.data.contact_sheets import HIDDEN
from braintumor.evidence.gallery import MAX_BYTES, PANEL_PX, Gallery, draw_galleries
from braintumor.labels import CLASS_NAMES
from braintumor.model.inference import load_classifier
from braintumor.params import PrivacyParams

OPEN = PrivacyParams(copy_images="all", hash_names=False)


@pytest.fixture(scope="module")
def model(tiny_models: list[Path]) -> Any:
    return load_classifier(tiny_models[0])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for label in CLASS_NAMES:
        (folder / "test" / label).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (40, 30), np.uint8)
            Image.fromarray(pixels).save(folder / "test" / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def rows(dataset: Path) -> pd.DataFrame:
    """Sixteen images, of which the last of each class is judged wrongly; phantoms are those of even number."""
    paths = sorted(path.relative_to(dataset).as_posix() for path in dataset.rglob("*.png"))
    labels = [path.split("/")[1] for path in paths]
    numbers = [int(Path(path).stem) for path in paths]
    turned = [CLASS_NAMES[(CLASS_NAMES.index(label) + 1) % 4] for label in labels]
    return pd.DataFrame(
        {
            "path": paths,
            "group": paths,
            "label": labels,
            "predicted": [
                other if number == 3 else own for own, other, number in zip(labels, turned, numbers, strict=True)
            ],
            "confidence": 0.9 - 0.01 * np.arange(16),
            "sha256": [sha256_of_file(dataset / path) for path in paths],
            "is_phantom": [number % 2 == 0 for number in numbers],
        }
    )


def by_title(galleries: list[Gallery]) -> dict[str, Gallery]:
    return {gallery.title: gallery for gallery in galleries}


def test_right_wrong_and_uncertain_images_are_shown_and_told(dataset: Path, model: Any, rows: pd.DataFrame) -> None:
    galleries = by_title(draw_galleries(dataset, model, rows, OPEN, 6))
    assert list(galleries) == ["Right", "Wrong", "Most uncertain"]
    assert [len(gallery.lines) for gallery in galleries.values()] == [6, 4, 6]
    # The mistake that the model is surest of comes first.
    assert galleries["Wrong"].lines[0] == "1 test/glioma/3.png: meningioma 87.0%, is glioma"
    assert galleries["Most uncertain"].lines[0] == "1 test/pituitary/3.png: glioma 75.0%, is pituitary"
    told = {line.split("/")[1] for line in galleries["Right"].lines}
    assert told == set(CLASS_NAMES)
    assert not any("is " in line for line in galleries["Right"].lines)
    for gallery in galleries.values():
        assert gallery.picture is not None
        assert len(gallery.picture) <= MAX_BYTES
        with Image.open(io.BytesIO(gallery.picture)) as picture:
            assert picture.format == "JPEG"
            assert picture.size == gallery.size
    # Image and heat map; of mistakes also that of the true class.
    assert galleries["Right"].size[0] // PANEL_PX == 4
    assert galleries["Wrong"].size[0] // PANEL_PX == 3


def test_no_gallery_shows_two_images_of_a_group(dataset: Path, model: Any, rows: pd.DataFrame) -> None:
    # Two groups a class: the first two images, and the others, of which one is a mistake.
    grouped = rows.assign(group=[f"{label}-{place % 4 // 2}" for place, label in enumerate(rows["label"])])
    group_of = dict(zip(grouped["path"], grouped["group"], strict=True))
    galleries = by_title(draw_galleries(dataset, model, grouped, OPEN, 16))
    for title, n in {"Right": 8, "Wrong": 4, "Most uncertain": 8}.items():
        shown = [group_of[line.split()[1].rstrip(":")] for line in galleries[title].lines]
        assert len(shown) == len(set(shown)) == n
    one = by_title(draw_galleries(dataset, model, rows.assign(group="one"), OPEN, 16))
    # Of a group, the mistake that the model is surest of, and the image that it is least sure of.
    assert one["Wrong"].lines == ("1 test/glioma/3.png: meningioma 87.0%, is glioma",)
    assert one["Most uncertain"].lines == ("1 test/pituitary/3.png: glioma 75.0%, is pituitary",)


def test_order_of_the_rows_changes_nothing(dataset: Path, model: Any, rows: pd.DataFrame) -> None:
    shuffled = rows.sample(frac=1, random_state=1)
    assert draw_galleries(dataset, model, rows, OPEN, 3) == draw_galleries(dataset, model, shuffled, OPEN, 3)


def test_images_of_patients_are_grey_tiles_without_their_names(dataset: Path, model: Any, rows: pd.DataFrame) -> None:
    privacy = PrivacyParams(copy_images="phantoms", hash_names=True)
    galleries = by_title(draw_galleries(dataset, model, rows, privacy, 12))
    # All mistakes are patients here: there is nothing to draw, and all the same something to tell.
    assert galleries["Wrong"].picture is None
    assert galleries["Wrong"].size == (0, 0)
    digest = rows.set_index("path")["sha256"]["test/glioma/3.png"]
    assert galleries["Wrong"].lines[0] == f"1 test/glioma/{digest[:12]}.png: meningioma 87.0%, is glioma"
    right = galleries["Right"]
    assert right.picture is not None
    with Image.open(io.BytesIO(right.picture)) as picture:
        pixels = np.asarray(picture).astype(int)
    is_phantom = rows.set_index("sha256")["is_phantom"]
    shown = [
        bool(is_phantom[is_phantom.index.str.startswith(Path(line.split(":")[0]).stem)].iloc[0]) for line in right.lines
    ]
    assert sum(shown) == 8
    step = right.size[1] // 6
    for place, may_be_shown in enumerate(shown):
        left, top = 6 + place % 2 * (2 * PANEL_PX + 6), 6 + place // 2 * step
        tile = pixels[top + 20 : top + 50, left + 20 : left + 2 * PANEL_PX - 20]
        assert (np.abs(tile - HIDDEN).max() < 12) != may_be_shown


def test_nothing_is_drawn_where_nothing_is_asked_for(dataset: Path, model: Any, rows: pd.DataFrame) -> None:
    assert draw_galleries(dataset, model, rows, OPEN, 0) == []
    all_right = rows[rows["label"] == rows["predicted"]]
    assert [gallery.title for gallery in draw_galleries(dataset, model, all_right, OPEN, 2)] == [
        "Right",
        "Most uncertain",
    ]


def test_many_tiles_stay_a_small_file(dataset: Path, model: Any, rows: pd.DataFrame) -> None:
    many = pd.concat([rows] * 4, ignore_index=True).assign(group=range(64))
    gallery = by_title(draw_galleries(dataset, model, many, OPEN, 40))["Most uncertain"]
    assert gallery.picture is not None
    assert len(gallery.lines) == 40
    # Noise is the worst that JPEG can be given.
    assert len(gallery.picture) < 4 * MAX_BYTES
