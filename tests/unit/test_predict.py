import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from braintumor.labels import CLASS_NAMES
from braintumor.predict import Prediction, model_file, predict_files, show


@pytest.fixture
def slices(tmp_path: Path) -> Path:
    folder = tmp_path / "slices"
    (folder / "deep").mkdir(parents=True)
    for name, value in (("b.png", 10), ("a.jpg", 200), ("deep/c.PNG", 90)):
        Image.new("L", (40, 30), value).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


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
    }


def test_probabilities_do_not_depend_on_the_company(slices: Path, tiny_models: list[Path]) -> None:
    alone, _ = predict_files(tiny_models[0], [slices / "a.jpg"])
    together, _ = predict_files(tiny_models[0], [slices])
    values = [list(one.probabilities.values()) for one in (alone[0], together[0])]
    np.testing.assert_allclose(values[0], values[1], atol=1e-6)
