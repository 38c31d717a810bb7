import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from braintumor import predict
from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.predict import OVERLAY_PX, Prediction, model_file, predict_files, show


@pytest.fixture
def slices(tmp_path: Path) -> Path:
    folder = tmp_path / "slices"
    (folder / "deep").mkdir(parents=True)
    for name, value in (("b.png", 10), ("a.jpg", 200), ("deep/c.PNG", 90)):
        Image.new("L", (40, 30), value).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def overlays(model: Path, paths: list[Path], folder: Path) -> list[Path]:
    return [Path(str(one.overlay)) for one in predict_files(model, paths, folder)[0]]


def test_folders_are_searched_and_files_keep_their_order(slices: Path, tiny_models: list[Path]) -> None:
    predictions, unreadable = predict_files(tiny_models[0], [slices / "b.png", slices])
    assert [Path(one.path).relative_to(slices).as_posix() for one in predictions] == [
        "b.png",
        "a.jpg",
        "b.png",
        "deep/c.PNG",
    ]
    assert unreadable == []
    assert predictions[0].probabilities == predictions[2].probabilities
    for one in predictions:
        assert tuple(one.probabilities) == CLASS_NAMES
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert one.label == max(one.probabilities, key=lambda name: one.probabilities[name])


def test_file_of_a_model_is_used_where_it_is(tmp_path: Path) -> None:
    with model_file(tmp_path / "model.keras", tmp_path / "no-params.yaml", "champion") as file:
        assert file == tmp_path / "model.keras"


@pytest.mark.parametrize("name", ["scan[old].jpg", "a[/b].jpg"])
def test_file_names_are_shown_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prediction = Prediction(name, "glioma", dict.fromkeys(CLASS_NAMES, 0.25))
    show([prediction], as_json=False)
    told = capsys.readouterr().out
    assert name in told
    assert "not a diagnostic device" in told
    show([prediction], as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "path": name,
        "label": "glioma",
        "probabilities": dict.fromkeys(CLASS_NAMES, 0.25),
        "ood_score": None,
        "is_unlike_training": None,
        "overlay": None,
    }


def test_score_tells_which_images_are_unlike_the_training(
    slices: Path, tiny_models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # The score of this model is the brightness of its image, of 1.
    predictions, _ = predict_files(tiny_models[0], [slices / "b.png"])
    assert predictions[0].ood_score == pytest.approx(10 / 255 * 3 / 4, abs=0.01)
    assert predictions[0].is_unlike_training is False
    unlike = Prediction("far.png", "glioma", dict.fromkeys(CLASS_NAMES, 0.25), 1.25, True)
    show([predictions[0], unlike], as_json=False)
    told = capsys.readouterr().out
    assert "yes (1.25)" in told
    assert "no (0.0" in told
    show([unlike], as_json=True)
    assert json.loads(capsys.readouterr().out)["is_unlike_training"] is True


def test_each_image_is_explained_beside_its_heat_map(slices: Path, tiny_models: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "explained"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (slices / "torn.png").write_bytes((slices / "b.png").read_bytes()[:40])
    (slices / "deep" / "b.png").write_bytes((slices / "a.jpg").read_bytes())
    written = overlays(tiny_models[0], [slices], output)
    assert [file.name.rsplit("-", 1)[0] for file in written] == ["a", "b", "b", "c"]
    assert sorted(output.iterdir()) == sorted({*written, output / "notes.txt"})
    assert len(set(written)) == 4
    for file, value in zip(written, (200, 10, 200, 90), strict=True):
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert picture.width == 2 * OVERLAY_PX
            assert np.asarray(picture)[OVERLAY_PX // 2, OVERLAY_PX // 2] == pytest.approx(value, abs=3)
    before = [file.read_bytes() for file in written]
    written[0].write_bytes(b"torn")
    assert overlays(tiny_models[0], [slices], output) == written
    assert [file.read_bytes() for file in written] == before
    # Another model says something else of the same image.
    assert not set(overlays(tiny_models[1], [slices], output)) & set(written)


def test_explanation_changes_no_prediction(slices: Path, tiny_models: list[Path], tmp_path: Path) -> None:
    explained, _ = predict_files(tiny_models[0], [slices], tmp_path / "explained")
    assert [replace(one, overlay=None) for one in explained] == predict_files(tiny_models[0], [slices])[0]


def test_explanation_loads_the_model_and_reads_each_image_once(
    slices: Path, tiny_models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def counted(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda path: opened.append(path) or read(path)

    for name in ("load_classifier", "decode_grey"):
        monkeypatch.setattr(predict, name, counted(getattr(predict, name)))
    predict_files(tiny_models[0], [slices], tmp_path / "explained")
    assert opened == [tiny_models[0], *(slices / name for name in ("a.jpg", "b.png", "deep/c.PNG"))]


def test_nothing_readable_is_nothing_explained(slices: Path, tiny_models: list[Path], tmp_path: Path) -> None:
    predictions, unreadable = predict_files(tiny_models[0], [slices / "notes.txt"], tmp_path / "explained")
    assert predictions == []
    assert len(unreadable) == 1
    assert not (tmp_path / "explained").exists()


def test_a_folder_that_can_not_be_written_to_is_refused(slices: Path, tiny_models: list[Path]) -> None:
    with pytest.raises(UserError, match="can't be written"):
        predict_files(tiny_models[0], [slices], slices / "notes.txt")


def test_probabilities_do_not_depend_on_the_company(slices: Path, tiny_models: list[Path]) -> None:
    alone, _ = predict_files(tiny_models[0], [slices / "a.jpg"])
    together, _ = predict_files(tiny_models[0], [slices])
    values = [list(one.probabilities.values()) for one in (alone[0], together[0])]
    np.testing.assert_allclose(values[0], values[1], atol=1e-6)
