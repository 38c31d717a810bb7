import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from braintumor.data.duplicates import measure_leakage
from braintumor.data.expectations import Finding, check_expectations
from braintumor.data.manifest import SCHEMA, Contents, Survey
from braintumor.labels import CLASS_NAMES
from braintumor.params import ValidateParams

PARAMS = ValidateParams(
    workers=1,
    min_images_per_class=3,
    require_test_images=True,
    min_side_px=32,
    max_side_px=512,
    max_class_imbalance=3.0,
    min_intensity_std=8.0,
    copy_correlation=0.9,
    max_leaked_share=0.05,
    min_intensity_mean=5.0,
    max_intensity_mean=200.0,
    max_shrinkage=0.01,
    max_statistic_drift=0.2,
    max_label_drift=0.05,
)


def make_survey(**changes: Any) -> Survey:
    """Five sound images a class, three to train and two to test; `changes` set columns of the first image."""
    rows = [
        {
            "path": f"{split}/{label}/{number}.png",
            "label": label,
            "declared_split": split,
            "patient": None,
            "is_phantom": False,
            "duplicate_group": f"g-{split}-{label}-{number}",
            "size_bytes": 100,
            "md5": f"{split}-{label}-{number}",
            "sha256": f"{split}-{label}-{number}",
            "is_readable": True,
            "error": None,
            "width": 64,
            "height": 64,
            "mode": "L",
            "pixels_sha256": "p",
            **dict.fromkeys(("mean", "std", "p01", "p50", "p99", "border_mean"), 50.0),
        }
        for split, count in (("train", 3), ("test", 2))
        for label in CLASS_NAMES
        for number in range(count)
    ]
    images = pd.DataFrame(rows, columns=SCHEMA.names).astype({"width": "Int64", "height": "Int64"})
    for column, value in changes.items():
        images.loc[0, column] = value
    paths = images["path"].tolist()
    return Survey(images, Contents(images=paths, misplaced=[], ignored=[], versioned=paths), "0" * 32)


def check(survey: Survey, folder: Path, **changes: Any) -> dict[str, Finding]:
    leakage = measure_leakage(survey.images)
    findings = check_expectations(survey, leakage, PARAMS.model_copy(update=changes), folder / "docs")
    return {finding.name: finding for finding in findings}


def test_a_sound_data_set_has_no_findings_and_its_data_docs(tmp_path: Path) -> None:
    assert check(make_survey(), tmp_path) == {}
    pages = {path.name for path in (tmp_path / "docs").rglob("*.html")}
    assert {"index.html", "dataset.html", "images.html"} <= pages
    shown = (tmp_path / "docs/expectations/images.html").read_text()
    assert "is_readable" in shown


WRONG = [
    ({"is_readable": False, "error": "train/glioma/0.png is damaged (x); remove"}, "unreadable", "critical"),
    ({"width": 1}, "width", "critical"),
    ({"height": 4000}, "height", "critical"),
    ({"label": "astrocytoma"}, "unknown_label", "critical"),
    ({"declared_split": "val"}, "unknown_split", "critical"),
    ({"mode": "CMYK"}, "mode", "warning"),
    ({"height": 60}, "not_square", "warning"),
    ({"std": 2.0}, "nearly_empty", "warning"),
    ({"mean": 240.0}, "brightness", "warning"),
]


@pytest.fixture(scope="module")
def found_in_wrong_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    """The findings where the n-th image is wrong as WRONG says."""
    survey = make_survey()
    for row, (changes, _, _) in enumerate(WRONG):
        for column, value in changes.items():
            survey.images.loc[row, column] = value
    return check(survey, tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("row", range(len(WRONG)), ids=[name for _, name, _ in WRONG])
def test_an_image_that_is_wrong_is_named_with_its_severity(found_in_wrong_images: dict[str, Finding], row: int) -> None:
    _, name, severity = WRONG[row]
    found = found_in_wrong_images[name]
    assert found.severity == severity
    assert any(culprit.startswith(make_survey().images.loc[row, "path"]) for culprit in found.culprits)
    assert "{" not in str(found)


def test_a_repeated_path_is_critical(tmp_path: Path) -> None:
    found = check(make_survey(path="train/glioma/1.png"), tmp_path)
    assert found["repeated_path"].severity == "critical"
    assert found["repeated_path"].culprits == ("train/glioma/1.png",)


def test_too_few_images_of_a_class_and_none_for_testing_are_critical(tmp_path: Path) -> None:
    survey = make_survey()
    kept = survey.images.query(
        "declared_split == 'train' and not (label == 'notumor' and path != 'train/notumor/0.png')"
    )
    found = check(replace(survey, images=kept.reset_index(drop=True)), tmp_path, max_class_imbalance=2.0)
    assert {name for name, finding in found.items() if finding.severity == "critical"} == {
        "too_few_notumor",
        "no_test_images",
    }
    assert "1 images of class notumor; at least 3" in found["too_few_notumor"].message
    assert found["class_imbalance"].severity == "warning"
    assert "3 times" in found["class_imbalance"].message


def test_images_without_a_test_folder_pass_where_the_split_chooses_the_test(tmp_path: Path) -> None:
    survey = make_survey()
    kept = survey.images.query("declared_split == 'train'").reset_index(drop=True)
    found = check(replace(survey, images=kept), tmp_path, min_images_per_class=1, require_test_images=False)
    assert not any(finding.severity == "critical" for finding in found.values())


def test_an_empty_data_set_is_critical_and_not_vacuously_sound(tmp_path: Path) -> None:
    survey = make_survey()
    found = check(replace(survey, images=survey.images.iloc[:0]), tmp_path)
    assert {"no_images", "no_test_images", "too_few_glioma"} <= set(found)
    assert found["no_images"].message.startswith("no images in {train,test}/{glioma,")
    assert "class_imbalance" not in found


def test_images_in_unexpected_places_are_critical_and_other_files_a_warning(tmp_path: Path) -> None:
    survey = make_survey()
    contents = replace(survey.contents, misplaced=["val/glioma/x.png"], ignored=["notes.txt", ".DS_Store"])
    found = check(replace(survey, contents=contents), tmp_path)
    assert found["unexpected_place"].severity == "critical"
    assert found["unexpected_place"].culprits == ("val/glioma/x.png",)
    assert found["ignored_files"].severity == "warning"
    assert found["ignored_files"].message.startswith("2 files")


def test_leaks_and_conflicting_labels_are_warnings(tmp_path: Path) -> None:
    survey = make_survey()
    survey.images.loc[survey.images["path"].isin(["train/glioma/0.png", "test/notumor/0.png"]), "duplicate_group"] = (
        "g1"
    )
    found = check(survey, tmp_path)
    assert {finding.severity for finding in found.values()} == {"warning"}
    assert found["leaked_share"].message.startswith("0.125 of the test images")
    assert found["label_conflicts"].culprits == ("test/notumor/0.png", "train/glioma/0.png")


def test_what_can_not_be_checked_is_critical(tmp_path: Path) -> None:
    survey = make_survey()
    found = check(replace(survey, images=survey.images.assign(mode=np.nan).drop(columns="mode")), tmp_path)
    assert found["mode"].severity == "critical"
    assert "could not be checked" in found["mode"].message


def test_nothing_is_said_on_the_terminal_and_nothing_is_sent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    check(make_survey(), tmp_path)
    assert capfd.readouterr() == ("", "")
