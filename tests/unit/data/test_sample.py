import csv
import re
import socket
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2_contingency
from sklearn.neighbors import KNeighborsClassifier

from braintumor.artifacts import GROUPS_FILE
from braintumor.data import sample
from braintumor.data.contents import list_contents, mask_path
from braintumor.data.masks import load_masks
from braintumor.data.sample import Phantom, draw_patient, draw_sample
from braintumor.errors import UserError
from braintumor.labels import CLASS_NAMES

TUMOURS = [label for label in CLASS_NAMES if label != "notumor"]


@pytest.fixture(scope="module")
def cohort() -> list[list[Phantom]]:
    """Patients of all classes, the classes in turn, at 64 px."""
    return [draw_patient(number, CLASS_NAMES[number % 4], seed=3, size_px=64) for number in range(240)]


@pytest.fixture(scope="module")
def small_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three training and two test patients a class, with masks, at 48 px."""
    output = tmp_path_factory.mktemp("sample") / "nested" / "phantoms"
    draw_sample(output, {"train": 3, "test": 2}, seed=5, size_px=48, with_masks=True, processes=1)
    return output


def images_of(folder: Path, suffix: str = ".jpg") -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}"))


def groups_of(folder: Path) -> dict[str, str]:
    with (folder / GROUPS_FILE).open(newline="") as file:
        return {row["path"]: row["patient"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("label", CLASS_NAMES)
def test_same_seed_gives_the_same_pixels_whatever_was_drawn_before(label: str) -> None:
    first = draw_patient(7, label, seed=1, size_px=64)
    draw_patient(8, label, seed=1, size_px=64)
    second = draw_patient(7, label, seed=1, size_px=64)
    assert [phantom.slice_number for phantom in first] == [phantom.slice_number for phantom in second]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.lesion, other.lesion)


@pytest.mark.parametrize("changed", [dict(seed=2), dict(patient=8), dict(label="glioma")])
def test_another_seed_patient_or_class_gives_another_image(changed: dict[str, object]) -> None:
    call = dict(patient=7, label="notumor", seed=1, size_px=64)
    original = draw_patient(**call)[0].image.astype(float)  # type: ignore[arg-type]
    other = draw_patient(**(call | changed))[0].image.astype(float)  # type: ignore[arg-type]
    assert np.abs(original - other).mean() > 5


def test_size_changes_the_grid_and_not_the_patient() -> None:
    small, large = (draw_patient(7, "meningioma", seed=1, size_px=size)[0] for size in (48, 96))
    assert small.image.shape == small.lesion.shape == (48, 48)
    assert large.image.shape == large.lesion.shape == (96, 96)
    assert (small.plane, small.contrast) == (large.plane, large.contrast)
    assert small.lesion.mean() == pytest.approx(large.lesion.mean(), rel=0.15)


def test_every_slice_of_a_tumour_patient_shows_the_lesion_and_no_other_does(cohort: list[list[Phantom]]) -> None:
    for phantom in (phantom for patient in cohort for phantom in patient):
        assert phantom.image.dtype == np.uint8
        assert phantom.lesion.dtype == bool
        if phantom.label == "notumor":
            assert not phantom.lesion.any()
        else:
            width = np.sqrt(phantom.lesion.mean() * 4 / np.pi)
            assert width >= 0.07, f"{phantom.label} {phantom.patient}: {width:.3f} of the image's width"


def test_lesion_differs_from_its_surroundings(cohort: list[list[Phantom]]) -> None:
    from scipy.ndimage import binary_dilation

    for patient in cohort:
        for phantom in patient:
            if phantom.lesion.any():
                ring = binary_dilation(phantom.lesion, iterations=3) & ~phantom.lesion
                extremes = np.percentile(phantom.image[phantom.lesion], [10, 90])
                difference = np.abs(extremes - np.median(phantom.image[ring])).max()
                assert difference > 0.15 * np.percentile(phantom.image, 99), (
                    f"{phantom.label} {phantom.patient}, {phantom.contrast}"
                )


def test_some_patients_give_neighbouring_slices_that_look_alike(cohort: list[list[Phantom]]) -> None:
    several = [patient for patient in cohort if len(patient) > 1]
    assert 0.2 < len(several) / len(cohort) < 0.5
    assert max(map(len, cohort)) <= 4

    def correlation(one: Phantom, other: Phantom) -> float:
        return float(np.corrcoef(one.image.ravel(), other.image.ravel())[0, 1])

    neighbours = [correlation(patient[0], patient[1]) for patient in several]
    strangers = [correlation(one[0], other[0]) for one, other in pairwise(several)]
    assert np.median(neighbours) > 0.8 > np.median(strangers)
    assert not any(np.array_equal(patient[0].image, patient[1].image) for patient in several)


def lesion_in_template(label: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of one lesion in mm, their distance to the inside of the skull, and whether each is brain."""
    template = sample.load_template()
    rng = np.random.default_rng(number)
    anatomy = sample.draw_anatomy(rng, must_be_sellar=label == "pituitary")
    lesion = sample.place_lesion(label, anatomy, template, rng)
    assert lesion is not None
    _, mask = sample.render(anatomy, lesion, template, 0.0, 64, rng)
    points = sample.slice_points(anatomy, 0.0, 64)[mask]
    is_brain = sample.sample_volume(template.t1, points - template.t1_origin, outside=0) > 0
    return points, sample.cranium_distance(template, points), is_brain


def test_glioma_lies_inside_the_brain() -> None:
    for number in range(25):
        _, to_skull, is_brain = lesion_in_template("glioma", number)
        assert to_skull.max() < 0
        assert is_brain.mean() > 0.95


def test_meningioma_touches_the_dura_and_stays_within_the_skull() -> None:
    for number in range(25):
        _, to_skull, _ = lesion_in_template("meningioma", number)
        assert -3 < to_skull.max() < 0.5
        assert to_skull.min() < -8


def test_pituitary_mass_lies_at_the_sella() -> None:
    for number in range(25):
        points, _, _ = lesion_in_template("pituitary", number)
        assert np.linalg.norm(points.mean(axis=0) - sample.SELLA) < 18


@pytest.mark.parametrize("trait", ["plane", "contrast", "slices"])
def test_trait_of_the_scan_does_not_tell_the_class(cohort: list[list[Phantom]], trait: str) -> None:
    counts = Counter(
        (patient[0].label, len(patient) if trait == "slices" else getattr(patient[0], trait)) for patient in cohort
    )
    values = sorted({value for _, value in counts})
    table = [[counts[label, value] for value in values] for label in CLASS_NAMES]
    assert chi2_contingency(table).pvalue > 0.001, table


def test_slices_through_the_sella_are_as_frequent_without_a_tumour_as_with_another(
    cohort: list[list[Phantom]],
) -> None:
    through = Counter(patient[0].label for patient in cohort if patient[0].is_sellar)
    patients = Counter(patient[0].label for patient in cohort)
    assert through["pituitary"] == patients["pituitary"]
    others = ["glioma", "meningioma", "notumor"]
    table = [[through[label], patients[label] - through[label]] for label in others]
    assert chi2_contingency(table).pvalue > 0.001, table
    assert all(0.3 < through[label] / patients[label] < 0.7 for label in others)


def test_hardly_any_slice_is_drawn_anew_for_the_sake_of_its_lesion() -> None:
    template = sample.load_template()
    for label in TUMOURS:
        fits = 0
        for number in range(40):
            rng = np.random.default_rng([11, number])
            anatomy = sample.draw_anatomy(rng, must_be_sellar=label == "pituitary")
            fits += sample.place_lesion(label, anatomy, template, rng) is not None
        # Were it often, the slices of this class would differ from those of the others.
        assert fits >= 39, label


def test_pixels_alone_do_not_tell_the_class(cohort: list[list[Phantom]]) -> None:
    def thumbnails(patients: list[list[Phantom]]) -> tuple[np.ndarray, list[str]]:
        phantoms = [phantom for patient in patients for phantom in patient]
        pixels = [np.asarray(Image.fromarray(p.image).resize((32, 32)), dtype=float).ravel() for p in phantoms]
        return np.array(pixels), [phantom.label for phantom in phantoms]

    nearest = KNeighborsClassifier(n_neighbors=1).fit(*thumbnails(cohort[:160]))
    assert nearest.score(*thumbnails(cohort[160:])) < 0.7


def test_layout_names_and_groups_agree(small_sample: Path) -> None:
    paths = images_of(small_sample)
    groups = groups_of(small_sample)
    assert paths == sorted(groups)
    for path in paths:
        matched = re.fullmatch(r"(train|test)/(\w+)/(\w+)-(p\d{5})-s[1-4]\.jpg", path)
        assert matched, path
        _, folder, label, patient = matched.groups()
        assert folder == label
        assert label in CLASS_NAMES
        assert groups[path] == patient
    patients = {(path.split("/")[0], path.split("/")[1], groups[path]) for path in paths}
    assert Counter(patient[:2] for patient in patients) == {
        (split, label): count for split, count in (("train", 3), ("test", 2)) for label in CLASS_NAMES
    }
    with Image.open(small_sample / paths[0]) as image:
        assert (image.mode, image.size, image.format) == ("L", (48, 48), "JPEG")


def test_groups_name_the_plane_that_each_phantom_was_cut_in(small_sample: Path) -> None:
    with (small_sample / GROUPS_FILE).open(newline="") as file:
        for row in csv.DictReader(file):
            matched = re.search(r"/(\w+)-p0*(\d+)-s(\d)", row["path"])
            assert matched
            label, patient, number = matched.groups()
            drawn = draw_patient(int(patient), label, seed=5, size_px=48)[int(number) - 1]
            assert row["plane"] == drawn.plane


def test_no_patient_is_on_both_sides(small_sample: Path) -> None:
    sides: dict[str, set[str]] = {"train": set(), "test": set()}
    for path, patient in groups_of(small_sample).items():
        sides[path.split("/")[0]].add(patient)
    assert sides["train"]
    assert not sides["train"] & sides["test"]


def test_every_lesion_of_the_test_images_has_a_mask_and_nothing_else_has(small_sample: Path) -> None:
    contents = list_contents(small_sample)
    lesions = [path for path in contents.images if path.startswith("test/") and "/notumor/" not in path]
    assert contents.masks == sorted(mask_path(path) for path in lesions)
    assert contents.misplaced == contents.ignored == []
    for path in contents.masks:
        with Image.open(small_sample / path) as mask:
            assert mask.size == (48, 48)
            assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_masks_lie_where_the_lesion_is(small_sample: Path) -> None:
    paths = [path for path in images_of(small_sample) if path.startswith("test/meningioma/")]
    masks = load_masks(small_sample, paths, 48)
    patient = int(groups_of(small_sample)[paths[0]][1:])
    drawn = draw_patient(patient, "meningioma", seed=5, size_px=48)
    assert sorted(masks) == list(range(len(paths)))
    np.testing.assert_array_equal(masks[0], drawn[0].lesion)


def test_nothing_but_the_sample_is_left_beside_it(small_sample: Path) -> None:
    assert [path.name for path in small_sample.parent.iterdir()] == ["phantoms"]


def test_the_sample_is_the_same_twice_and_its_summary_counts_it(small_sample: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    heard: list[tuple[str, int]] = []

    def progress(title: str, total: int) -> Callable[[], None]:
        return lambda: heard.append((title, total))

    summary = draw_sample(
        tmp_path / "again",
        {"train": 3, "test": 2},
        seed=5,
        size_px=48,
        processes=1,
        progress=progress,
    )
    assert images_of(tmp_path / "again") == images_of(small_sample)
    for path in [*images_of(small_sample), GROUPS_FILE]:
        assert (tmp_path / "again" / path).read_bytes() == (small_sample / path).read_bytes()
    assert summary.masks == 0
    assert summary.patients == 20
    assert summary.images == sum(summary.images_per_class.values()) == len(images_of(small_sample))
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert heard == [("sample: drawing patients", 20)] * 20


def test_occupied_folder_is_refused_and_left_untouched(tmp_path: Path) -> None:
    (tmp_path / "phantoms").mkdir()
    (tmp_path / "phantoms" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="phantoms"):
        draw_sample(tmp_path / "phantoms", {"train": 1, "test": 1}, size_px=48, with_masks=True, processes=1)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["phantoms", "phantoms/notes.txt"]
    assert (tmp_path / "phantoms" / "notes.txt").read_text() == "mine"


def test_interrupted_drawing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(title: str, total: int) -> Callable[[], None]:
        patients = iter(range(3))

        def advance() -> None:
            if next(patients) == 2:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / "phantoms", {"train": 1, "test": 1}, size_px=48, processes=1, progress=interrupted)
    assert not list(tmp_path.iterdir())


def test_template_is_loaded_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    template = sample.load_template.__wrapped__()
    assert template.t1.shape == (197, 233, 189)
