import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from braintumor.data import duplicates
from braintumor.data.duplicates import SYMMETRIES, fingerprint, group_copies, measure_leakage
from braintumor.model.images import decode_grey

Grey = NDArray[np.uint8]
REAL_SET = Path(__file__).parents[4] / "shared" / "brain-tumor-mri"
BENCH = Path(__file__).parents[3] / "bench"
needs_real_set = pytest.mark.skipif(not REAL_SET.is_dir(), reason=f"{REAL_SET} is absent")


def draw_slice(seed: int, side_px: int = 160) -> Grey:
    """An oval of smooth structures on black, as a slice of a head is."""
    rng = np.random.default_rng(seed)
    structures = gaussian_filter(rng.normal(size=(side_px, side_px)), side_px / 40)
    y, x = np.mgrid[-1 : 1 : side_px * 1j, -1 : 1 : side_px * 1j]
    inside = (x / 0.75) ** 2 + (y / 0.9) ** 2 < 1
    grey = np.where(inside, 110 + 50 * structures / structures.std(), 4)
    return np.clip(grey, 0, 255).astype(np.uint8)


def recompressed(grey: Grey) -> Grey:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=40)
    return np.asarray(Image.open(buffer))


def resized(grey: Grey, size: tuple[int, int]) -> Grey:
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC))


COPY_CORRELATION = 0.88


def groups_of(images: list[Grey], copy_correlation: float = COPY_CORRELATION) -> list[str]:
    names = [f"{index:02d}" + "0" * 62 for index in range(len(images))]
    return group_copies(
        names, [None] * len(images), np.stack([fingerprint(image) for image in images]), copy_correlation
    )


@pytest.mark.parametrize("steps", SYMMETRIES)
def test_a_mirrored_or_turned_copy_is_in_the_group_of_its_original(steps: tuple[int, int]) -> None:
    original, other = draw_slice(1), draw_slice(2)
    first, copy, second = groups_of([original, recompressed(original[:: steps[0], :: steps[1]]), other])
    assert first == copy
    assert first != second


@pytest.mark.parametrize(
    "alter",
    [
        recompressed,
        lambda grey: resized(grey, (96, 96)),
        lambda grey: resized(grey, (400, 400)),
        lambda grey: resized(grey, (160, 120)),
        lambda grey: np.clip(grey * 1.15 + 6, 0, 255).astype(np.uint8),
        lambda grey: (grey * 0.6).astype(np.uint8),
        lambda grey: np.rint(255 * (grey / 255) ** 0.6).astype(np.uint8),
        lambda grey: np.clip(grey + 4.0 * (grey - gaussian_filter(grey.astype(float), 1)), 0, 255).astype(np.uint8),
    ],
    ids=["recompressed", "smaller", "larger", "squeezed", "brighter", "darker", "gamma", "sharpened"],
)
def test_an_altered_copy_is_in_the_group_of_its_original(alter: Callable[[Grey], Grey]) -> None:
    original = draw_slice(3)
    first, copy = groups_of([original, alter(original)])
    assert first == copy


def test_different_slices_of_the_same_outline_are_not_copies() -> None:
    assert len(set(groups_of([draw_slice(seed) for seed in range(40)]))) == 40


def test_slices_that_share_no_more_than_a_bright_skull_are_not_copies() -> None:
    y, x = np.mgrid[-1:1:160j, -1:1:160j]
    skull = np.exp(-((np.hypot(x / 0.75, y / 0.9) - 1) ** 2) / 0.001)
    heads = [np.clip(draw_slice(seed) * 0.3 + 220 * skull, 0, 255).astype(np.uint8) for seed in range(12)]
    assert len(set(groups_of(heads))) == 12


def test_nearly_constant_images_are_copies_only_where_they_are_equal() -> None:
    rng = np.random.default_rng(0)
    flat = [np.full((64, 64), 90, np.uint8) + rng.integers(0, 2, (64, 64), dtype=np.uint8) for _ in range(3)]
    prints = np.stack([fingerprint(image) for image in [*flat, flat[0]]])
    assert not prints.any()
    groups = group_copies(["a" * 64, "b" * 64, "c" * 64, "d" * 64], ["p", "q", "r", "p"], prints, 0.9)
    assert groups == ["g" + "a" * 12, "g" + "b" * 12, "g" + "c" * 12, "g" + "a" * 12]


def test_copies_of_copies_share_a_group_and_files_that_can_not_be_decoded_match_by_bytes_alone() -> None:
    nothing = np.zeros((4, 96, 96), np.float16)
    groups = group_copies(["b" * 64, "b" * 64, "c" * 64, "a" * 64], [None, "p", "p", None], nothing, 0.9)
    assert groups == ["g" + "b" * 12] * 3 + ["g" + "a" * 12]


def test_group_names_depend_neither_on_order_nor_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = [draw_slice(seed, 96) for seed in range(12)]
    images = [*slices, *(image[:, ::-1] for image in slices[:6]), *(image[::-1] for image in slices[4:8])]
    prints = np.stack([fingerprint(image) for image in images])
    names = [f"{index:02d}" + "0" * 62 for index in range(len(images))]
    expected = group_copies(names, [None] * len(names), prints, 0.9)
    assert len(set(expected)) == 12
    monkeypatch.setattr(duplicates, "SEARCH_BLOCK", 5)
    monkeypatch.setattr(duplicates, "DECISION_BLOCK", 2)
    order = np.random.default_rng(1).permutation(len(images))
    shuffled = group_copies([names[place] for place in order], [None] * len(names), prints[order], 0.9)
    assert shuffled == [expected[place] for place in order]


@pytest.mark.parametrize("steps", SYMMETRIES)
def test_the_search_finds_a_pair_in_its_own_symmetry_with_its_correlation(steps: tuple[int, int]) -> None:
    rows, columns = steps
    original = fingerprint(draw_slice(1))
    copy = fingerprint(recompressed(draw_slice(1)[::rows, ::columns]))
    prints = np.stack([fingerprint(draw_slice(2)), original, copy])
    found = [
        (
            pairs.first.tolist(),
            pairs.second.tolist(),
            SYMMETRIES[pairs.symmetry[0]],
            duplicates.correlations(prints, pairs),
        )
        for pairs in duplicates.similar_pairs(prints, 0.8)
        if len(pairs.first)
    ]
    ((first, second, symmetry, correlation),) = found
    assert (first, second, symmetry) == ([1], [2], steps)
    assert correlation[0] == pytest.approx(float((original * copy[::rows, ::columns].astype(float)).sum()), abs=1e-3)


def test_the_groups_of_synthetic_fingerprints_are_found_and_no_others() -> None:
    specification = importlib.util.spec_from_file_location("fingerprints", BENCH / "fingerprints.py")
    assert specification is not None and specification.loader is not None
    bench = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(bench)
    prints, truth = bench.draw(1500, np.random.default_rng(1))
    groups = group_copies([f"{index:012d}" for index in range(1500)], [None] * 1500, prints, COPY_CORRELATION)
    judgement = bench.judge(groups, truth)
    assert (judgement["torn_groups"], judgement["false_groups"]) == (0, 0)
    assert len(set(groups)) == len(set(truth)) < 1000


def test_no_images_have_no_groups() -> None:
    assert group_copies([], [], np.zeros((0, 96, 96), np.float16), 0.9) == []


@needs_real_set
def test_known_mirrored_copies_of_the_real_set_are_found() -> None:
    pairs = [("Tr-no_0404", "Tr-no_0963"), ("Tr-no_0767", "Tr-no_1310"), ("Tr-no_0895", "Tr-no_1300")]
    paths = [REAL_SET / "Training" / "notumor" / f"{name}.jpg" for pair in pairs for name in pair]
    groups = groups_of([decode_grey(path) for path in paths])
    assert groups[::2] == groups[1::2]
    assert len(set(groups)) == 3


@needs_real_set
def test_the_coarse_search_loses_no_copy_that_an_exhaustive_one_finds() -> None:
    paths = sorted((REAL_SET / "Training" / "notumor").glob("*.jpg"))[::4]
    images = [decode_grey(path) for path in paths]
    prints = np.stack([fingerprint(image) for image in images]).astype(np.float32)
    vectors = prints.reshape(len(prints), -1)
    correlation = np.max(
        [vectors @ prints[:, ::rows, ::columns].reshape(len(prints), -1).T for rows, columns in SYMMETRIES], axis=0
    )
    groups = np.array(groups_of(images))
    first, second = np.nonzero(np.triu(correlation > COPY_CORRELATION, 1))
    assert len(first) > 200
    assert (groups[first] == groups[second]).all()


def test_leakage_counts_test_images_with_a_copy_in_training() -> None:
    images = pd.DataFrame(
        [
            ("test/glioma/a.png", "glioma", "test", "1", "g1", "p1"),
            ("test/glioma/b.png", "glioma", "test", "2", "g1", "p2"),
            ("test/glioma/c.png", "glioma", "test", "3", "g3", None),
            ("train/glioma/d.png", "glioma", "train", "1", "g1", "p1"),
            ("train/notumor/e.png", "notumor", "train", "5", "g1", None),
        ],
        columns=["path", "label", "declared_split", "sha256", "duplicate_group", "patient"],
    )
    leakage = measure_leakage(images)
    assert (leakage["n_images"], leakage["n_groups"], leakage["n_copies"], leakage["exact_copies"]) == (5, 2, 3, 1)
    assert (leakage["leaked_test_images"], leakage["n_test"], leakage["groups_across_splits"]) == (2, 3, 1)
    assert leakage["leaked_share"] == pytest.approx(2 / 3)
    assert leakage["copies"] == {
        "train": {"groups": 0, "images": 0},
        "test": {"groups": 0, "images": 0},
        "across": {"groups": 1, "images": 4},
    }
    assert leakage["patients"] == {"known": 2, "unknown": 2, "across_splits": 1}
    assert leakage["largest_groups"] == [{"group": "g1", "size": 4}]
    (conflict,) = leakage["label_conflicts"]
    assert conflict["group"] == "g1"
    assert conflict["labels"] == ["glioma", "notumor"]
    assert "train/notumor/e.png" in conflict["paths"]


def test_copies_are_counted_within_and_across_the_splits() -> None:
    places = {"a": "train train train", "b": "train train", "c": "test test", "d": "test train train", "e": "train"}
    rows = [(group, split) for group, splits in places.items() for split in splits.split()]
    images = pd.DataFrame(rows, columns=["duplicate_group", "declared_split"])
    names = [f"{index}" for index in range(len(rows))]
    images = images.assign(path=names, label="glioma", sha256=names, patient=None)
    assert measure_leakage(images)["copies"] == {
        "train": {"groups": 2, "images": 5},
        "test": {"groups": 1, "images": 2},
        "across": {"groups": 1, "images": 3},
    }


def test_leaked_share_is_null_without_test_images() -> None:
    images = pd.DataFrame(
        [("train/glioma/d.png", "glioma", "train", "1", "g1", None)],
        columns=["path", "label", "declared_split", "sha256", "duplicate_group", "patient"],
    )
    assert measure_leakage(images)["leaked_share"] is None


def test_slices_of_a_volume_of_an_unknown_patient_are_of_nobody_known() -> None:
    rows = [(f"train/glioma/{n}.png", "glioma", "train", str(n), f"g{n}", "volume-12ab") for n in range(3)]
    columns = ["path", "label", "declared_split", "sha256", "duplicate_group", "patient"]
    assert measure_leakage(pd.DataFrame(rows, columns=columns))["patients"] == {
        "known": 0,
        "unknown": 3,
        "across_splits": 0,
    }
