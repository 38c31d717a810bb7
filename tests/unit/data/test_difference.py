import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp, kstwobign

from braintumor.data.difference import CHANCE, Difference, as_json, compare, ks_distance
from braintumor.data.profile import STATISTICS, Accepted
from braintumor.labels import CLASS_NAMES


def image(path: str, content: str, **changes: Any) -> dict[str, Any]:
    """A row of a manifest or profile; `content` stands for bytes and pixels, its place is in the path."""
    split, label, _ = path.split("/")
    row = {
        "path": path,
        "label": label,
        "declared_split": split,
        "duplicate_group": f"g-{content}",
        "sha256": f"sha-of-{content}",
        "pixels_sha256": f"pixels-of-{content}",
        **dict.fromkeys(STATISTICS, 50.0),
    }
    return row | changes


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def counts(difference: Difference) -> dict[str, int | None]:
    """What is not zero."""
    found = as_json(difference, Accepted("1", "a", None), "b")["counts"]
    return {name: count for name, count in found.items() if count != 0 and name not in ("before", "now")}


BEFORE = frame(
    image("train/glioma/a.png", "A"),
    image("train/glioma/b.png", "B"),
    image("train/notumor/c.png", "C"),
    image("test/notumor/d.png", "D"),
)


def test_an_unchanged_data_set_differs_in_nothing() -> None:
    difference = compare(BEFORE.sample(frac=1, random_state=1), BEFORE)
    assert counts(difference) == {}
    assert (difference.n_before, difference.n_now) == (4, 4)
    assert set(difference.gone.values()) == {0.0}


def test_every_kind_of_change_is_told_by_its_own_name() -> None:
    now = frame(
        image("test/glioma/a.png", "A"),
        image("train/pituitary/b.png", "B"),
        image("train/notumor/other.png", "C"),
        image("train/notumor/new.png", "N"),
    )
    difference = compare(now, BEFORE)
    assert counts(difference) == {"added": 1, "removed": 1, "moved": 1, "relabelled": 1, "renamed": 1}
    assert difference.added.to_dict("records") == [{"path": "train/notumor/new.png"}]
    assert difference.removed["path"].tolist() == ["test/notumor/d.png"]
    assert difference.moved.to_dict("records") == [{"path": "test/glioma/a.png", "before": "train", "now": "test"}]
    assert difference.relabelled.to_dict("records") == [
        {"path": "train/pituitary/b.png", "before": "glioma", "now": "pituitary"}
    ]
    assert difference.gone == {"all": 0.25, "glioma": 0.0, "notumor": 0.5}


def test_equal_files_are_counted_one_by_one() -> None:
    three = frame(*(image(f"train/glioma/{name}.png", "A") for name in "xyz"))
    one = frame(image("train/glioma/y.png", "A"))
    assert counts(compare(three, one)) == {"added": 2}
    assert compare(three, one).added["path"].tolist() == ["train/glioma/x.png", "train/glioma/z.png"]
    assert counts(compare(one, three)) == {"removed": 2}
    assert compare(one, three).removed["path"].tolist() == ["train/glioma/x.png", "train/glioma/z.png"]
    two = frame(*(image(f"train/glioma/{name}.png", "A") for name in "pq"))
    assert counts(compare(two, three)) == {"removed": 1, "renamed": 2}


def test_of_equal_files_the_one_that_stayed_is_not_the_one_that_moved() -> None:
    before = frame(image("test/glioma/a.png", "A"), image("train/notumor/a.png", "A"))
    now = frame(image("test/glioma/a.png", "A"), image("train/glioma/a.png", "A"))
    difference = compare(now, before)
    assert counts(difference) == {"relabelled": 1}
    assert difference.relabelled["path"].tolist() == ["train/glioma/a.png"]


def test_a_file_written_again_without_loss_is_the_same_image() -> None:
    rewritten = frame(*({**row, "sha256": f"new-{row['sha256']}"} for row in BEFORE.to_dict("records")))
    assert counts(compare(rewritten, BEFORE)) == {"rewritten": 4}
    with_loss = rewritten.assign(pixels_sha256="other-" + rewritten["pixels_sha256"])
    assert counts(compare(with_loss, BEFORE)) == {"removed": 4, "added": 4}


def test_images_that_can_not_be_decoded_are_not_taken_for_each_other() -> None:
    damaged = [image(f"train/glioma/{name}.png", name, pixels_sha256=None) for name in "xy"]
    difference = compare(frame(*BEFORE.to_dict("records"), *damaged), BEFORE)
    assert counts(difference) == {"added": 2}
    assert counts(compare(frame(damaged[0]), frame(damaged[1]))) == {"added": 1, "removed": 1}


def test_hashed_names_are_not_compared() -> None:
    sha256 = "0123456789abcdef" * 4
    hashed = frame(image("train/glioma/0123456789ab.png", "A", sha256=sha256))
    now = frame(image("train/glioma/scan.png", "A", sha256=sha256))
    assert compare(now, hashed).renamed is None
    mixed = frame(*hashed.to_dict("records"), image("train/glioma/b.png", "B"))
    now = frame(*now.to_dict("records"), image("train/glioma/other.png", "B"))
    assert compare(now, mixed).renamed == 1


def test_a_group_that_new_images_have_joined_is_named_with_what_it_was_and_its_bridges() -> None:
    joined = [
        image("train/glioma/a.png", "A", duplicate_group="g-A"),
        image("train/glioma/b.png", "B", duplicate_group="g-A"),
        image("train/glioma/between.png", "N", duplicate_group="g-A"),
        image("train/glioma/alone.png", "M"),
    ]
    difference = compare(frame(*joined, *BEFORE.to_dict("records")[2:]), BEFORE)
    assert difference.joined_groups == [
        {"group": "g-A", "earlier": ["g-A", "g-B"], "bridges": ["train/glioma/between.png"]}
    ]
    assert difference.regrouped == 1


def many(shift: dict[str, float], sizes: dict[str, int], seed: int = 0) -> pd.DataFrame:
    """Images whose mean is normal, 10 grey levels wide, about 40 for glioma, 60 for meningioma and so on."""
    random = np.random.default_rng(seed)
    return frame(
        *(
            image(f"train/{label}/{seed}-{n}.png", f"{seed}-{label}-{n}", mean=random.normal(center, 10))
            for index, label in enumerate(CLASS_NAMES)
            for center in [40 + 20 * index + shift.get(label, 0)]
            for n in range(sizes.get(label, 300))
        )
    )


def test_another_mix_of_classes_is_label_drift_and_not_drift_of_the_images() -> None:
    before, now = many({}, {}, seed=1), many({}, {"glioma": 1000}, seed=2)
    difference = compare(now, before)
    assert difference.drift["mean"].distance == 0
    assert ks_distance(now["mean"].to_numpy(), before["mean"].to_numpy()) > 0.2
    assert difference.label_mix["glioma"] == pytest.approx((0.25, 1000 / 1900))


def test_one_class_from_another_scanner_is_found_and_named() -> None:
    drift = compare(many({"pituitary": 15}, {}, seed=1), many({}, {}, seed=2)).drift
    assert drift["mean"].label == "pituitary"
    assert 0.4 < drift["mean"].distance < 0.7
    assert drift["std"].label is None and drift["std"].distance == 0


def test_what_chance_does_to_few_images_is_no_drift() -> None:
    few = dict.fromkeys(CLASS_NAMES, 12)
    for seed in range(20):
        drift = compare(many({}, few, seed), many({}, few, seed + 100)).drift["mean"]
        assert drift.distance == 0, seed
        assert max(drift.distances.values()) > 0.1


def test_a_class_that_only_one_version_holds_has_no_distance() -> None:
    drift = compare(many({}, {"notumor": 0}), many({}, {})).drift["mean"]
    assert set(drift.distances) == set(CLASS_NAMES) - {"notumor"}


@pytest.mark.parametrize("seed", range(5))
def test_distance_and_chance_are_kolmogorovs_and_smirnovs(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 9, 37).astype(float), random.normal(4, 3, 81)
    assert ks_distance(first, second) == pytest.approx(ks_2samp(first, second).statistic)
    drift = compare(many({}, {"glioma": 30}, seed), many({}, {"glioma": 70}, seed + 9)).drift["mean"]
    assert drift.chance["glioma"] == pytest.approx(kstwobign.isf(CHANCE) * np.sqrt(1 / 30 + 1 / 70), rel=1e-6)


def test_the_record_names_the_first_images_and_counts_all() -> None:
    added = [image(f"train/glioma/new-{number:03d}.png", f"N{number}") for number in range(250)]
    difference = compare(frame(*added, *BEFORE.to_dict("records")), BEFORE)
    record = json.loads(json.dumps(as_json(difference, Accepted("3", "a" * 32, BEFORE), "b" * 32), allow_nan=False))
    assert record["accepted"] == {"version": "3", "data_md5": "a" * 32}
    assert record["data_md5"] == "b" * 32
    assert record["counts"]["added"] == 250
    assert len(record["images"]["added"]) == 200
    assert record["drift"]["mean"]["classes"]["glioma"]["distance"] == 0
    assert record["label_mix"]["glioma"] == {"before": 0.5, "now": 252 / 254}


def test_without_a_difference_the_record_says_why_and_claims_nothing() -> None:
    first = as_json(None, None, "b")
    assert first["accepted"] is None and first["statement"].startswith("first version")
    unknown = as_json(None, Accepted("3", "a", None), "b")
    assert unknown["accepted"] == {"version": "3", "data_md5": "a"}
    assert unknown["statement"].startswith("not compared")
    for record in (first, unknown):
        assert record["counts"] is record["drift"] is record["joined_groups"] is None


def test_a_group_that_a_new_copy_has_renamed_is_listed_since_its_side_may_change() -> None:
    rows = BEFORE.to_dict("records")
    earlier = rows[0]["duplicate_group"]
    renamed = [{**row, "duplicate_group": "g-new"} if row["duplicate_group"] == earlier else row for row in rows]
    copy = image("train/glioma/copy.png", "N", duplicate_group="g-new")
    assert compare(frame(*renamed, copy), BEFORE).joined_groups == [
        {"group": "g-new", "earlier": [earlier], "bridges": ["train/glioma/copy.png"]}
    ]
