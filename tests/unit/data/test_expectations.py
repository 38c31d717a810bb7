import hashlib
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from braintumor.data.contents import Contents
from braintumor.data.difference import compare
from braintumor.data.duplicates import measure_leakage
from braintumor.data.expectations import Finding, check_expectations
from braintumor.data.manifest import SCHEMA, Survey
from braintumor.data.oddities import KINDS, odd_kinds
from braintumor.data.privacy import shown_names
from braintumor.data.profile import Accepted, make_profile
from braintumor.labels import CLASS_NAMES
from braintumor.params import Params, PrivacyParams, load_params

OPEN = PrivacyParams(copy_images="all", hash_names=False)
HASHED = PrivacyParams(copy_images="none", hash_names=True)
NUMBERS = [field.name for field in SCHEMA if field.type == pa.float64()]
LIMITS = {
    "min_images_per_class": 3,
    "max_side_px": 512,
    "max_class_imbalance": 3.0,
    "max_leaked_share": 0.05,
    "max_shrinkage": 0.01,
    "max_statistic_drift": 0.2,
    "max_label_drift": 0.05,
}


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
            "sha256": hashlib.sha256(f"{split}-{label}-{number}".encode()).hexdigest(),
            "is_readable": True,
            "error": None,
            "width": 64,
            "height": 64,
            "mode": "L",
            "pixels_sha256": f"pixels-{split}-{label}-{number}",
            **dict.fromkeys(NUMBERS, 0.0),
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
    return Survey(images, Contents(images=paths, masks=[], misplaced=[], ignored=[], versioned=paths), "0" * 32)


Check = Callable[..., dict[str, Finding]]


@pytest.fixture(scope="module")
def committed() -> Params:
    return load_params(Path(__file__).parents[3] / "params.yaml")


@pytest.fixture(scope="module")
def check(committed: Params) -> Check:
    """The findings by name; `accepted` is an earlier version, changes are of section validate."""

    def check(
        survey: Survey, folder: Path, accepted: Accepted | None = None, privacy: PrivacyParams = OPEN, **changes: Any
    ) -> dict[str, Finding]:
        params = committed.model_copy(
            update={"privacy": privacy, "validation": committed.validation.model_copy(update=LIMITS | changes)}
        )
        known = None if accepted is None else accepted.images
        difference = None if known is None else compare(survey.images, known)
        leakage = measure_leakage(survey.images)
        findings = check_expectations(survey, leakage, accepted, difference, params, folder / "docs")
        return {finding.name: finding for finding in findings}

    return check


def test_a_sound_data_set_has_no_findings_and_its_data_docs(check: Check, tmp_path: Path) -> None:
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
    ({"coloured_share": 9.0}, "coloured", "warning"),
    ({"coloured_line": 9.0}, "banner", "warning"),
    ({"white_line": 9.0}, "white_frame", "warning"),
    ({"mark_length": 9.0}, "arrows", "warning"),
    ({"sharpness": 9.0}, "edge_filtered", "warning"),
]


@pytest.fixture(scope="module")
def found_in_wrong_images(check: Check, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
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


def test_the_odd_images_of_the_findings_are_those_of_the_list_for_annotators(
    check: Check, committed: Params, tmp_path: Path
) -> None:
    survey = make_survey()
    for row, (changes, name, _) in enumerate(WRONG):
        if name in KINDS:
            for column, value in changes.items():
                survey.images.loc[row, column] = value
    found = check(survey, tmp_path)
    kinds = odd_kinds(survey.images, committed.validation)
    for kind in KINDS:
        expected = survey.images.loc[kinds.map(lambda of_image, kind=kind: kind in of_image), "path"]
        assert len(expected) == 1
        assert found[kind].culprits == tuple(expected)


def test_a_repeated_path_is_critical(check: Check, tmp_path: Path) -> None:
    found = check(make_survey(path="train/glioma/1.png"), tmp_path)
    assert found["repeated_path"].severity == "critical"
    assert found["repeated_path"].culprits == ("train/glioma/1.png",)


def test_too_few_images_of_a_class_and_none_for_testing_are_critical(check: Check, tmp_path: Path) -> None:
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


def test_images_without_a_test_folder_pass_where_the_split_chooses_the_test(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    kept = survey.images.query("declared_split == 'train'").reset_index(drop=True)
    found = check(replace(survey, images=kept), tmp_path, min_images_per_class=1, require_test_images=False)
    assert not any(finding.severity == "critical" for finding in found.values())


def test_an_empty_data_set_is_critical_and_not_vacuously_sound(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    found = check(replace(survey, images=survey.images.iloc[:0]), tmp_path)
    assert {"no_images", "no_test_images", "too_few_glioma"} <= set(found)
    assert found["no_images"].message.startswith("no images in {train,test}/{glioma,")
    assert "class_imbalance" not in found


def test_images_in_unexpected_places_are_critical_and_other_files_a_warning(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    contents = replace(survey.contents, misplaced=["val/glioma/x.png"], ignored=["notes.txt", ".DS_Store"])
    found = check(replace(survey, contents=contents), tmp_path)
    assert found["unexpected_place"].severity == "critical"
    assert found["unexpected_place"].culprits == ("val/glioma/x.png",)
    assert found["ignored_files"].severity == "warning"
    assert found["ignored_files"].message.startswith("2 files")


def test_leaks_and_conflicting_labels_are_warnings(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    survey.images.loc[survey.images["path"].isin(["train/glioma/0.png", "test/notumor/0.png"]), "duplicate_group"] = (
        "g1"
    )
    found = check(survey, tmp_path)
    assert {finding.severity for finding in found.values()} == {"warning"}
    assert found["leaked_share"].message.startswith("0.125 of the test images")
    assert found["label_conflicts"].culprits == ("test/notumor/0.png", "train/glioma/0.png")


def test_what_can_not_be_checked_is_critical(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    found = check(replace(survey, images=survey.images.assign(mode=np.nan).drop(columns="mode")), tmp_path)
    assert found["mode"].severity == "critical"
    assert "could not be checked" in found["mode"].message


def test_nothing_is_said_on_the_terminal_and_nothing_is_sent(
    check: Check, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    survey = make_survey()
    check(survey, tmp_path, accepted=accepted_from(survey))
    assert capfd.readouterr() == ("", "")


def test_a_column_of_another_type_is_critical(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    survey.images["std"] = "high"
    found = check(survey, tmp_path)
    assert found["columns"].severity == "critical"
    assert found["columns"].culprits == ("std",)


def test_files_with_the_same_bytes_are_all_named(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    survey.images.loc[7, "sha256"] = survey.images.loc[3, "sha256"]
    found = check(survey, tmp_path)
    assert set(found) == {"identical_files"}
    assert found["identical_files"].severity == "warning"
    assert found["identical_files"].culprits == tuple(sorted(survey.images.loc[[3, 7], "path"]))


def accepted_from(survey: Survey, privacy: PrivacyParams = OPEN) -> Accepted:
    return Accepted("4", "a" * 32, make_profile(survey.images, privacy))


def without(survey: Survey, *rows: int) -> Survey:
    return replace(survey, images=survey.images.drop(list(rows)).reset_index(drop=True))


def test_the_accepted_data_itself_differs_in_nothing(check: Check, tmp_path: Path) -> None:
    assert check(make_survey(), tmp_path, accepted=accepted_from(make_survey())) == {}
    assert (tmp_path / "docs/expectations/difference.html").is_file()


def test_without_an_accepted_version_no_rule_about_a_difference_is_claimed_to_hold(
    check: Check, tmp_path: Path
) -> None:
    check(make_survey(), tmp_path)
    assert not (tmp_path / "docs/expectations/difference.html").exists()


def test_an_accepted_version_without_a_profile_is_a_warning_and_never_no_drift(check: Check, tmp_path: Path) -> None:
    found = check(make_survey(), tmp_path, accepted=Accepted("4", "a" * 32, None))
    assert set(found) == {"not_compared"}
    assert "aaaaaaa" in found["not_compared"].message and "version 4" in found["not_compared"].message


def test_a_class_that_shrank_is_critical_and_its_lost_images_are_named(check: Check, tmp_path: Path) -> None:
    whole = make_survey()
    lost = whole.images.index[whole.images["label"] == "notumor"][:1]
    found = check(without(whole, *lost), tmp_path, accepted=accepted_from(whole), max_shrinkage=0.1)
    assert {name for name, finding in found.items() if finding.severity == "critical"} == {"shrinkage"}
    assert found["shrinkage"].culprits == ("train/notumor/0.png",)
    assert "20.0% of class notumor are gone" in found["shrinkage"].message
    assert "all images" not in found["shrinkage"].message
    assert "validate.max_shrinkage" in found["shrinkage"].message
    # What may go is still told.
    found = check(without(whole, *lost), tmp_path / "allowed", accepted=accepted_from(whole), max_shrinkage=0.2)
    assert {finding.severity for finding in found.values()} == {"warning"}
    assert found["removed"].culprits == ("train/notumor/0.png",)


def test_shrinkage_of_the_whole_names_every_lost_image(check: Check, tmp_path: Path) -> None:
    whole = make_survey()
    lost = [whole.images.index[whole.images["label"] == label][0] for label in CLASS_NAMES]
    found = check(without(whole, *lost), tmp_path, accepted=accepted_from(whole), max_shrinkage=0.15)
    assert len(found["shrinkage"].culprits) == 4


def test_images_that_are_new_moved_or_relabelled_are_warnings_with_their_names(check: Check, tmp_path: Path) -> None:
    before, now = make_survey(), make_survey()
    now.images.loc[0, ["label", "path"]] = ["pituitary", "train/pituitary/was-glioma.png"]
    now.images.loc[3, ["declared_split", "path"]] = ["test", "test/meningioma/was-train.png"]
    found = check(now, tmp_path, accepted=accepted_from(without(before, 5)), max_label_drift=0.9)
    assert {name: finding.culprits for name, finding in found.items()} == {
        "added": (before.images.loc[5, "path"],),
        "moved": ("test/meningioma/was-train.png (train before)",),
        "relabelled": ("train/pituitary/was-glioma.png (glioma before)",),
    }
    assert {finding.severity for finding in found.values()} == {"warning"}


def test_groups_that_a_new_image_joined_are_a_warning_that_names_it(check: Check, tmp_path: Path) -> None:
    before, now = make_survey(), make_survey()
    now.images.loc[[0, 1, 2], "duplicate_group"] = "g"
    found = check(now, tmp_path, accepted=accepted_from(without(before, 2)), max_label_drift=0.9)
    earlier = sorted(before.images.loc[[0, 1], "duplicate_group"])
    path = now.images.loc[2, "path"]
    assert found["joined_groups"].culprits == (f"g (was {', '.join(earlier)}; joined by {path})",)


def enlarged(survey: Survey, times: int) -> Survey:
    """So many of each image, told apart by path and content."""
    parts = [
        survey.images.assign(
            path=survey.images["path"].str.replace(".png", f"-{number}.png"),
            **{name: survey.images[name] + f"-{number}" for name in ("sha256", "pixels_sha256", "duplicate_group")},
        )
        for number in range(times)
    ]
    return replace(survey, images=pd.concat(parts, ignore_index=True))


def test_a_drifted_statistic_and_another_mix_of_labels_are_warnings_that_name_the_class(
    check: Check, tmp_path: Path
) -> None:
    before, now = enlarged(make_survey(), 20), enlarged(make_survey(), 20)
    is_glioma = now.images["label"] == "glioma"
    now.images.loc[is_glioma, "border_mean"] += 5
    is_lost = (now.images["label"] == "pituitary") & (now.images["declared_split"] == "train")
    now = without(now, *now.images.index[is_lost])
    found = check(now, tmp_path, accepted=accepted_from(before), max_shrinkage=1.0)
    assert set(found) == {"removed", "label_drift", "drift_border_mean"}
    assert "by 1 in class glioma" in found["drift_border_mean"].message
    assert "validate.max_statistic_drift" in found["drift_border_mean"].message
    assert "pituitary makes up 11.8% of the images instead of 25.0%" in found["label_drift"].message
    assert "validate.max_label_drift" in found["label_drift"].message
    assert "glioma" not in found["label_drift"].message.replace("meningioma", "")


def test_data_docs_name_nobody_where_names_are_hashed(check: Check, tmp_path: Path) -> None:
    survey = make_survey()
    # The same file twice is shown under one name.
    for row, name in ((0, "Jane Doe 1"), (1, "Jane Doe 2"), (2, "Jane Doe 3")):
        survey.images.loc[row, "path"] = f"train/glioma/{name}.png"
    survey.images.loc[[0, 1], "sha256"] = "ab" * 32
    survey.images.loc[2, ["is_readable", "error"]] = [False, "train/glioma/Jane Doe 3.png is damaged (x); remove it"]
    survey.images.loc[[0, 1], "patient"] = "Jane Doe"
    contents = replace(survey.contents, ignored=["Jane Doe.pdf"])
    # Names of an earlier version that was published before names were hashed.
    earlier = make_survey()
    earlier.images.loc[4, ["path", "sha256", "pixels_sha256"]] = ["train/glioma/Jane Doe 4.png", "cd" * 32, "other"]
    found = check(replace(survey, contents=contents), tmp_path, accepted=accepted_from(earlier), privacy=HASHED)
    assert "repeated_path" not in found
    assert found["identical_files"].culprits == ("train/glioma/Jane Doe 1.png", "train/glioma/Jane Doe 2.png")
    assert found["identical_files"].shown_culprits == ("train/glioma/abababababab.png",) * 2
    shown = shown_names(survey.images, HASHED)[2]
    assert found["unreadable"].culprits == ("train/glioma/Jane Doe 3.png is damaged (x)",)
    assert found["unreadable"].shown_culprits == (f"{shown} is damaged (x)",)
    assert found["removed"].culprits == ("train/glioma/Jane Doe 4.png",)
    assert found["removed"].shown_culprits == ("train/glioma/cdcdcdcdcdcd.png",)
    assert found["ignored_files"].culprits == ("Jane Doe.pdf",)
    for finding in found.values():
        assert "Doe" not in finding.message + "".join(finding.shown_culprits)
    pages = [page.read_text() for page in (tmp_path / "docs").rglob("*.html")]
    assert any("abababababab" in page for page in pages)
    assert not [page for page in pages if "Doe" in page]


def test_a_file_name_is_no_markup_on_the_pages_of_great_expectations(check: Check, tmp_path: Path) -> None:
    name = "train/glioma/<img src=x onerror=alert(1)>.png"
    findings = check(make_survey(path=name, mean=1.0), tmp_path)
    assert findings["brightness"].culprits == (name,)
    pages = [path.read_text() for path in (tmp_path / "docs").rglob("*.html")]
    assert not any("<img src=x" in page for page in pages)
    assert any("&lt;img src=x" in page for page in pages)
