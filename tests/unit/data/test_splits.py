import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braintumor.data.splits import find_units, make_splits, position
from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES
from braintumor.params import SplitParams

PARAMS = SplitParams(
    protocol="official",
    seed=20,
    test_fraction=0.2,
    val_fraction=0.15,
    calibration_fraction=0.15,
    max_share_deviation=0.1,
)
COLUMNS = ["path", "label", "declared_split", "duplicate_group", "patient"]


def use(**changes: object) -> SplitParams:
    return PARAMS.model_copy(update=changes)


def base_images(per_class: int = 60) -> pd.DataFrame:
    """Enough images without copies for every class to stand on every side."""
    rows = [
        (f"{split}/{label}/{number}.png", label, split, f"g-{split}-{label}-{number}", None)
        for split, count in (("train", per_class), ("test", per_class // 3))
        for label in CLASS_NAMES
        for number in range(count)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def with_rows(images: pd.DataFrame, *rows: tuple[str, str, str, str | None]) -> pd.DataFrame:
    """More images: name, declared split, duplicate group, patient; all glioma."""
    added = [(f"{split}/glioma/{name}.png", "glioma", split, group, patient) for name, split, group, patient in rows]
    return pd.concat([images, pd.DataFrame(added, columns=COLUMNS)], ignore_index=True)


@st.composite
def linked_images(draw: st.DrawFn) -> pd.DataFrame:
    """The base, and images that copies and patients link in any way, within and across the declared folders."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["train", "test"]),
                st.sampled_from([f"h{number}" for number in range(12)]),
                st.one_of(st.none(), st.sampled_from([f"p{number}" for number in range(8)])),
            ),
            max_size=40,
        )
    )
    return with_rows(base_images(), *((f"extra{index}", *row) for index, row in enumerate(rows)))


@settings(max_examples=40, deadline=None)
@given(images=linked_images(), protocol=st.sampled_from(["official", "grouped"]))
def test_no_copy_and_no_patient_stands_on_two_sides(images: pd.DataFrame, protocol: str) -> None:
    splits = make_splits(images, use(protocol=protocol))
    rows = splits.rows.merge(images[["path", "duplicate_group", "patient"]], on="path")
    for unit in ("group", "duplicate_group", "patient"):
        assert (rows.groupby(unit)["split"].nunique() == 1).all()
    assert splits.leaked_test_images == 0
    assert sorted([*splits.rows["path"], *splits.dropped["path"]]) == sorted(images["path"])


@settings(max_examples=40, deadline=None)
@given(images=linked_images(), data=st.data(), protocol=st.sampled_from(["official", "grouped", "declared", "control"]))
def test_the_order_of_the_rows_changes_nothing(images: pd.DataFrame, data: st.DataObject, protocol: str) -> None:
    order = data.draw(st.permutations(range(len(images))))
    splits, shuffled = (
        make_splits(images, use(protocol=protocol)),
        make_splits(images.iloc[order], use(protocol=protocol)),
    )
    pd.testing.assert_frame_equal(splits.rows, shuffled.rows)
    pd.testing.assert_frame_equal(splits.dropped, shuffled.dropped)


@settings(max_examples=40, deadline=None)
@given(images=linked_images(), added=st.integers(1, 30), protocol=st.sampled_from(["official", "grouped", "declared"]))
def test_new_images_move_no_group_that_they_do_not_touch(images: pd.DataFrame, added: int, protocol: str) -> None:
    grown = with_rows(images, *((f"new{index}", "train", f"new{index}", None) for index in range(added)))
    before = make_splits(images, use(protocol=protocol)).rows.set_index("path")
    after = make_splits(grown, use(protocol=protocol)).rows.set_index("path")
    pd.testing.assert_frame_equal(after.loc[before.index], before)


@settings(max_examples=40, deadline=None)
@given(images=linked_images())
def test_official_keeps_every_declared_test_image_and_drops_its_twins(images: pd.DataFrame) -> None:
    splits = make_splits(images, PARAMS)
    tested = set(splits.rows.loc[splits.rows["split"] == "test", "path"])
    assert tested == set(images.loc[images["declared_split"] == "test", "path"])
    assert splits.dropped["path"].str.startswith("train/").all()


def test_the_reason_tells_copies_from_other_slices_of_a_patient() -> None:
    images = with_rows(
        base_images(),
        ("tested", "test", "h1", "p1"),
        ("copy", "train", "h1", None),
        ("slice", "train", "h2", "p1"),
        ("copy-of-slice", "train", "h2", None),
        ("free", "train", "h3", "p2"),
    )
    splits = make_splits(images, PARAMS)
    reasons = splits.dropped.set_index("path")["reason"].to_dict()
    assert reasons == {
        "train/glioma/copy.png": "copy of a test image",
        "train/glioma/slice.png": "patient of a test image",
        "train/glioma/copy-of-slice.png": "patient of a test image",
    }
    assert "train/glioma/free.png" in set(splits.rows["path"])


def test_declared_keeps_the_leaks_counts_them_and_says_so() -> None:
    images = with_rows(base_images(), ("tested", "test", "h1", None), ("copy", "train", "h1", None))
    splits = make_splits(images, use(protocol="declared"))
    assert splits.claim == "leaks kept"
    assert splits.leaked_test_images == 1
    assert splits.leaked_share == pytest.approx(1 / 81)
    assert splits.dropped.empty
    assert list(splits.dropped.columns) == ["path", "label", "group", "reason"]
    assert (splits.rows.loc[splits.rows["path"].str.startswith("test/"), "split"] == "test").all()


def test_the_control_is_as_large_as_official_on_each_side_and_in_each_class_and_keeps_copies() -> None:
    copies = [(f"copy{number}", "train", f"g-test-glioma-{number}", None) for number in range(20)]
    images = with_rows(base_images(), *copies)
    official, control = (make_splits(images, use(protocol=protocol)) for protocol in ("official", "control"))
    counts = ["split", "label"]
    pd.testing.assert_series_equal(official.rows.groupby(counts).size(), control.rows.groupby(counts).size())
    assert set(control.rows.loc[control.rows["split"] == "test", "path"]) == set(
        official.rows.loc[official.rows["split"] == "test", "path"]
    )
    assert (official.leaked_test_images, control.claim) == (0, "leaks kept")
    assert control.leaked_test_images > 0
    assert set(control.dropped["reason"]) == {"not drawn for the control"}
    assert len(control.dropped) == len(official.dropped) == 20


def test_slices_of_a_volume_of_an_unknown_patient_stay_together_and_prove_nothing() -> None:
    images = base_images()
    images["patient"] = [f"p{index}" for index in range(len(images))]
    images.loc[images["path"].isin(["train/glioma/1.png", "train/glioma/2.png"]), "patient"] = "volume-12ab"
    splits = make_splits(images, PARAMS)
    sides = splits.rows.set_index("path")["split"]
    assert sides["train/glioma/1.png"] == sides["train/glioma/2.png"]
    assert splits.claim == "copy-free, patients unknown"


@pytest.mark.parametrize(
    ("other", "claim"),
    [("patient-aaaaaa-0123456789abcdef", "patient-disjoint"), ("patient-bbbbbb-0123456789abcdef", None), ("p1", None)],
)
def test_patients_named_in_two_ways_may_be_one_person(other: str, claim: str | None) -> None:
    images = base_images()
    images["patient"] = [f"patient-aaaaaa-{index:016x}" for index in range(len(images))]
    images.loc[0, "patient"] = other
    assert make_splits(images, PARAMS).claim == (claim or "copy-free, patients unknown")


def test_a_side_that_a_large_group_bloats_is_warned_of() -> None:
    place = next(name for name in (f"h{n}" for n in range(99)) if 0 < position(name, 20, "development") < 0.15)
    images = with_rows(base_images(), *((f"copy{number}", "train", place, None) for number in range(200)))
    warnings = make_splits(images, use(max_share_deviation=0.3)).warnings
    assert any(warning.startswith("val holds 5") and "expected 15%" in warning for warning in warnings)


def test_units_chain_over_copies_and_patients_and_take_the_smallest_group_name() -> None:
    images = with_rows(
        pd.DataFrame(columns=COLUMNS),
        ("a", "train", "h5", "p1"),
        ("b", "train", "h3", "p1"),
        ("c", "train", "h3", None),
        ("d", "train", "h9", None),
    )
    assert find_units(images).tolist() == ["h3", "h3", "h3", "h9"]


@pytest.mark.parametrize(("all_known", "claim"), [(True, "patient-disjoint"), (False, "copy-free, patients unknown")])
def test_the_claim_is_never_more_than_what_is_known(all_known: bool, claim: str) -> None:
    images = base_images()
    images["patient"] = [f"p{index}" for index in range(len(images))]
    if not all_known:
        images.loc[0, "patient"] = None
    assert make_splits(images, PARAMS).claim == claim


def test_shares_follow_the_fractions() -> None:
    rows = make_splits(base_images(1500), use(protocol="grouped")).rows
    shares = rows["split"].value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.02)
    assert shares["val"] == pytest.approx(0.8 * 0.15, abs=0.02)
    assert shares["train"] == pytest.approx(0.8 * 0.7, abs=0.02)


def test_another_seed_gives_another_split() -> None:
    first, second = (make_splits(base_images(), use(seed=seed)).rows["split"] for seed in (1, 2))
    assert (first != second).any()
    assert position("g", 1, "test") != position("g", 1, "development")


def test_a_share_that_is_off_is_measured_and_warned_of() -> None:
    splits = make_splits(base_images(), use(max_share_deviation=0.001))
    assert splits.max_share_deviation > 0.001
    assert any("makes up" in warning for warning in splits.warnings)
    assert not make_splits(base_images(), use(max_share_deviation=1.0)).warnings


@pytest.mark.parametrize("protocol", ["official", "grouped", "declared", "control"])
def test_a_class_missing_from_a_side_is_refused(protocol: str) -> None:
    images = base_images()
    few = images[(images["label"] != "notumor") | (images["path"].isin(["train/notumor/0.png", "test/notumor/0.png"]))]
    with pytest.raises(UserError, match="holds no notumor"):
        make_splits(few, use(protocol=protocol))


def test_one_group_of_all_images_is_told_as_such() -> None:
    with pytest.raises(UserError, match="all images are in one group"):
        make_splits(base_images().assign(duplicate_group="g"), use(protocol="grouped"))


def test_no_declared_test_images_are_refused_where_they_are_needed() -> None:
    images = base_images().query("declared_split == 'train'")
    with pytest.raises(UserError, match=r"test holds no glioma.*under test/"):
        make_splits(images, PARAMS)
    assert make_splits(images, use(protocol="grouped")).rows["split"].nunique() == 4


def test_fractions_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(UserError, match=r"split\.val_fraction"):
        make_splits(base_images(), use(val_fraction=0.5, calibration_fraction=0.5))
