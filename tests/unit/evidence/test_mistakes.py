import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.data.relabel import relabel
from braintumor.evidence.mistakes import find_label_errors, measure_mistakes
from braintumor.evidence.predictions import PROBABILITY_COLUMNS
from braintumor.labels import CLASS_NAMES

CLASSES = np.array(CLASS_NAMES)


def held_out(seed: int, n: int = 400, flipped: float = 0.05, accuracy: float = 0.95) -> tuple[pd.DataFrame, set[str]]:
    """Predictions of a good model on images some of whose labels were changed, and the paths of these."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 4, n)
    predicted = np.where(random.random(n) < accuracy, truth, (truth + 1) % 4)
    # Sure where it is right, less so where it is wrong.
    top = np.where(predicted == truth, random.uniform(0.7, 0.99, n), random.uniform(0.4, 0.7, n))
    probabilities = np.repeat((1 - top)[:, None] / 3, 4, axis=1)
    probabilities[np.arange(n), predicted] = top
    labels = truth.copy()
    changed = random.choice(n, round(flipped * n), replace=False)
    labels[changed] = (truth[changed] + random.integers(1, 4, len(changed))) % 4
    paths = [f"test/{CLASSES[label]}/{index:04d}.png" for index, label in enumerate(labels)]
    rows = pd.DataFrame(
        {
            "path": paths,
            "label": CLASSES[labels],
            "group": [f"g{index:04d}" for index in range(n)],
            "predicted": CLASSES[predicted],
            **{name: probabilities[:, index] for index, name in enumerate(PROBABILITY_COLUMNS)},
        }
    )
    return rows, {paths[index] for index in changed}


def test_flipped_labels_are_found_and_little_else() -> None:
    found = flipped = right = 0
    for seed in range(5):
        rows, changed = held_out(seed)
        errors = find_label_errors(rows)
        found, flipped, right = found + len(errors), flipped + len(changed), right + len(set(errors["path"]) & changed)
    assert right / flipped > 0.6
    assert right / found > 0.9


def test_a_label_that_the_model_gives_itself_is_no_error_however_unsure_it_is() -> None:
    # cleanlab counts the errors, 20, and names as many images whose labels have the least probability.
    number = np.arange(400)
    label, is_changed, is_unsure = number % 4, number < 20, number >= 380
    probabilities = np.full((400, 4), 0.4 / 3)
    probabilities[number, label] = 0.6
    probabilities[is_changed] = 0.02
    probabilities[number[is_changed], (label[is_changed] + 1) % 4] = 0.66
    probabilities[number[is_changed], label[is_changed]] = 0.3
    # Less than 0.3, and yet more than any other class has.
    probabilities[is_unsure] = 0.24
    probabilities[number[is_unsure], label[is_unsure]] = 0.28
    rows = held_out(0)[0].assign(label=CLASSES[label], **dict(zip(PROBABILITY_COLUMNS, probabilities.T, strict=True)))
    assert not set(find_label_errors(rows)["path"]) & set(rows["path"][is_unsure])


def test_labels_that_are_right_leave_an_empty_table_with_its_columns(tmp_path: Path) -> None:
    rows, _ = held_out(0, flipped=0, accuracy=1)
    errors = find_label_errors(rows)
    errors.to_csv(tmp_path / "errors.csv", index=False)
    assert (tmp_path / "errors.csv").read_text() == "path,label,new_label,suggested,quality,confidence,group\n"


def test_nothing_is_printed_or_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_label_errors(held_out(0)[0])
    assert capfd.readouterr() == ("", "")


def test_the_worst_comes_first_and_copies_stand_with_it() -> None:
    rows, _ = held_out(1)
    wrong = find_label_errors(rows)
    assert wrong["quality"].is_monotonic_increasing
    assert (wrong["new_label"] == "").all()
    assert (wrong["suggested"] != wrong["label"]).all()
    best, worst = wrong["path"].iloc[-1], wrong["path"].iloc[0]
    together = rows.assign(
        group=np.where(rows["path"] == best, rows.set_index("path").loc[worst, "group"], rows["group"])
    )
    assert find_label_errors(together)["path"].iloc[:2].tolist() == [worst, best]


def test_order_of_the_rows_changes_nothing() -> None:
    rows, _ = held_out(2)
    errors = find_label_errors(rows)
    names = {path: path for path in rows["path"]}
    figures = measure_mistakes(rows, errors, len(rows), names)
    for seed in range(3):
        mixed = rows.sample(frac=1, random_state=seed)
        pd.testing.assert_frame_equal(find_label_errors(mixed), errors)
        assert measure_mistakes(mixed, errors, len(rows), names) == figures


def test_the_list_says_what_an_annotator_has_to_look_at_under_names_that_may_be_shown() -> None:
    rows, changed = held_out(3)
    errors = find_label_errors(rows)
    found = measure_mistakes(rows, errors, len(rows), {path: f"shown/{path}" for path in rows["path"]})
    wrong = rows[rows["label"] != rows["predicted"]]
    assert (found["n_wrong"], found["n_checked"], found["n_label_errors"]) == (len(wrong), 400, len(errors))
    confidences = [one["confidence"] for one in found["confident"]]
    assert confidences == sorted(wrong[list(PROBABILITY_COLUMNS)].max(axis=1), reverse=True)[:20]
    assert [one["path"] for one in found["label_errors"]] == [f"shown/{path}" for path in errors["path"][:20]]
    assert set(found["label_errors"][0]) == {"path", "label", "suggested", "quality"}
    # The model is sure of itself where it is the label that is wrong.
    assert found["confident"][0]["path"].removeprefix("shown/") in changed
    json.dumps(found, allow_nan=False)


def test_what_an_annotator_fills_in_is_applied_by_data_relabel(tmp_path: Path) -> None:
    rows, _ = held_out(4, 120, flipped=0.1)
    for index, path in enumerate(rows["path"]):
        file = tmp_path / "data" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(file)
    table = tmp_path / "label_errors.csv"
    find_label_errors(rows).to_csv(table, index=False)
    assert not relabel(table, tmp_path / "data").is_changed
    filled = pd.read_csv(table, dtype=str, keep_default_na=False)
    filled.loc[0, "new_label"] = filled.loc[0, "suggested"]
    filled.to_csv(table, index=False)
    path, suggested = filled.loc[0, ["path", "suggested"]]
    summary = relabel(table, tmp_path / "data")
    assert summary.moved == {path: f"test/{suggested}/{Path(path).name}"}
    assert (tmp_path / "data/test" / suggested / Path(path).name).is_file()
    assert not (tmp_path / "data" / path).exists()
