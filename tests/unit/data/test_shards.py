import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from braintumor.artifacts import ACCEPTED
from braintumor.data.contents import dataset_md5
from braintumor.data.dvc_remote import object_key, open_dataset
from braintumor.data.profile import write_accepted
from braintumor.data.shards import Shards, Share, seal_digest
from braintumor.errors import CriticalFinding, UserError
from braintumor.labels import CLASS_NAMES
from braintumor.object_store import open_store
from braintumor.params import Params, load_params
from braintumor.steps.gather import gather
from braintumor.steps.match import match
from braintumor.steps.scan import scan
from braintumor.steps.validate import validate

SAME = ("manifest.parquet", "profile.parquet", "leakage.json", "difference.json", "findings.json", "odd_images.csv")
PER_FOLDER = 80


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 190, (9, 9), dtype=np.uint8)
    Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(path)


def draw_images(dataset: Path, per_folder: int, seed: int = 0) -> None:
    """Images of all classes, one of them unreadable, and mirrored copies far apart in the order of the paths."""
    for index, label in enumerate(CLASS_NAMES):
        for number in range(per_folder):
            draw(dataset / f"train/{label}/{number:03}.png", seed + 1000 * index + number)
            draw(dataset / f"test/{label}/{number:03}.png", seed + 5000 + 1000 * index + number)
    (dataset / "train/glioma/bad.jpg").write_bytes(b"no image")
    for number in range(3):
        original = Image.open(dataset / f"test/glioma/{number:03}.png")
        original.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(dataset / f"train/pituitary/copy{number}.png")
    (dataset / "groups.csv").write_text("path,patient\ntrain/glioma/001.png,p1\n")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than one block of the search."""
    dataset = tmp_path_factory.mktemp("many") / "data"
    draw_images(dataset, PER_FOLDER)
    return dataset


@pytest.fixture
def few(tmp_path: Path) -> Path:
    draw_images(tmp_path / "data", 4)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def few_shared_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and what three tasks each left of it, to be copied: data, work, foreign."""
    root = tmp_path_factory.mktemp("few")
    draw_images(root / "data", 4)
    (root / "data/train/glioma/bad.jpg").unlink()
    committed = load_params(Path(__file__).parents[3] / "params.yaml")
    share_out(root / "data", root / "work", 3, with_limits(committed))
    shutil.copytree(root / "data", root / "other-data")
    draw(root / "other-data/train/glioma/000.png", 77)
    share_out(root / "other-data", root / "foreign", 3, with_limits(committed))
    return root


@pytest.fixture
def left(few_shared_out: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(few_shared_out, tmp_path, dirs_exist_ok=True)
    return tmp_path


def found_in(root: Path) -> Shards:
    matches = [root / f"match{number}" for number in range(3)]
    return Shards(root / "survey", matches, seal_digest(root / "survey"), [seal_digest(folder) for folder in matches])


@pytest.fixture
def lenient(params: Params) -> Params:
    return with_limits(params)


def with_limits(params: Params) -> Params:
    limits = {"workers": 1, "min_images_per_class": 3, "max_side_px": 512, "min_intensity_std": 8.0}
    return params.model_copy(update={"validation": params.validation.model_copy(update=limits)})


def resolve(dataset: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_accepted(None, dataset_md5(dataset), folder / ACCEPTED)
    return folder


def share_out(dataset: Path, root: Path, count: int, params: Params, copy_correlation: float | None = None) -> Shards:
    """What the tasks before `validate` leave, in an order of their own."""
    checks = params.validation
    if copy_correlation is not None:
        checks = checks.model_copy(update={"copy_correlation": copy_correlation})
    scans = [root / f"scan{number}" for number in reversed(range(count))]
    for number in range(count):
        scan(dataset, Share(number, count), root / f"scan{number}", checks)
    gather(scans, root / "survey", root / "search", [seal_digest(folder) for folder in scans])
    matches = [root / f"match{number}" for number in reversed(range(count))]
    for number in range(count):
        match(root / "search", Share(number, count), root / f"match{number}", checks)
    digests = [seal_digest(folder) for folder in matches]
    return Shards(root / "survey", matches, seal_digest(root / "survey"), digests)


@pytest.mark.parametrize("count", [1, 3])
def test_shards_give_the_bytes_of_the_validation_without_them(
    many: Path, tmp_path: Path, lenient: Params, count: int
) -> None:
    (many / "train/glioma/bad.jpg").unlink(missing_ok=True)
    context = resolve(many, tmp_path / "resolve")
    validate(many, context, tmp_path / "whole", lenient)
    shards = share_out(many, tmp_path / "work", count, lenient)
    summary = validate(many, context, tmp_path / "shared", lenient, shards=shards)
    assert summary.n_groups == 8 * PER_FOLDER
    for name in SAME:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes(), name


def test_more_shards_than_images_and_an_unreadable_image_change_nothing(
    few: Path, tmp_path: Path, lenient: Params
) -> None:
    context = resolve(few, tmp_path / "resolve")
    shards = share_out(few, tmp_path / "work", 40, lenient)
    for output, found in (("whole", None), ("shared", shards)):
        with pytest.raises(CriticalFinding, match=r"bad\.jpg"):
            validate(few, context, tmp_path / output, lenient, shards=found)
    assert (tmp_path / "whole/findings.json").read_bytes() == (tmp_path / "shared/findings.json").read_bytes()


def drop_a_scan(root: Path, scans: list[Path]) -> list[Path]:
    return scans[1:]


def double_a_scan(root: Path, scans: list[Path]) -> list[Path]:
    return [scans[0], *scans]


def double_one_for_another(root: Path, scans: list[Path]) -> list[Path]:
    return [scans[0], scans[0], scans[2]]


def change_a_row(root: Path, scans: list[Path]) -> list[Path]:
    file = scans[1] / "rows.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return scans


def cut_fingerprints(root: Path, scans: list[Path]) -> list[Path]:
    file = scans[1] / "fingerprints.npy"
    file.write_bytes(file.read_bytes()[:-2])
    return scans


def remove_fingerprints(root: Path, scans: list[Path]) -> list[Path]:
    (scans[1] / "fingerprints.npy").unlink()
    return scans


def add_a_file(root: Path, scans: list[Path]) -> list[Path]:
    (scans[1] / "more.npy").write_bytes(b"x")
    return scans


def take_one_of_other_data(root: Path, scans: list[Path]) -> list[Path]:
    return [scans[0], root / "foreign/scan1", scans[2]]


def take_a_match(root: Path, scans: list[Path]) -> list[Path]:
    return [scans[0], root / "work/match1", scans[2]]


def remove_a_seal(root: Path, scans: list[Path]) -> list[Path]:
    (scans[1] / "seal.json").unlink()
    return scans


def empty_a_seal(root: Path, scans: list[Path]) -> list[Path]:
    (scans[1] / "seal.json").write_text('{"kind": "scan"}')
    return scans


def give_none(root: Path, scans: list[Path]) -> list[Path]:
    return []


WRONGS: list[tuple[Callable[[Path, list[Path]], list[Path]], str]] = [
    (drop_a_scan, "lacks 0"),
    (double_a_scan, "more than once"),
    (double_one_for_another, "lacks 1"),
    (change_a_row, "changed after it was made"),
    (cut_fingerprints, "changed after it was made"),
    (remove_fingerprints, "fingerprints.npy"),
    (add_a_file, "more.npy"),
    (take_one_of_other_data, "differs from .* in data_md5"),
    (take_a_match, "is no scan"),
    (remove_a_seal, "seal.json is missing"),
    (empty_a_seal, "lacks"),
    (give_none, "nothing of the task 'scan'"),
]


@pytest.mark.parametrize(("spoil", "told"), WRONGS, ids=[wrong.__name__ for wrong, _ in WRONGS])
def test_scans_that_are_not_all_of_one_data_version_are_refused(
    left: Path, spoil: Callable[[Path, list[Path]], list[Path]], told: str
) -> None:
    tmp_path = left
    scans = spoil(tmp_path, [tmp_path / f"work/scan{number}" for number in range(3)])
    with pytest.raises(UserError, match=told):
        gather(scans, tmp_path / "out/survey", tmp_path / "out/search")
    assert not (tmp_path / "out/survey").exists() and not (tmp_path / "out/search").exists()


def reseal(folder: Path, **changes: Any) -> None:
    """As somebody would who changes a folder and knows how it is sealed."""
    seal = folder / "seal.json"
    seal.write_text(json.dumps(json.loads(seal.read_text()) | changes))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("missing", "lacks 0"), ("doubled", "more than once"), ("other correlation", "copy_correlation"),
        ("other data", "is of data"), ("matches of other data", "data_md5"), ("resealed", "is not what the task"),
        ("search resealed", "of another search"), ("survey resealed", "is not what the task"),
        ("stale", "are of another|is of data"), ("none", "nothing of"),
    ],
)  # fmt: skip
def test_matches_and_surveys_that_are_not_of_this_validation_are_refused(
    left: Path, lenient: Params, wrong: str, told: str
) -> None:
    few, context, shards = left / "data", resolve(left / "data", left / "resolve"), found_in(left / "work")
    match wrong:
        case "missing":
            shards = replace(shards, matches=shards.matches[1:], match_digests=None)
        case "doubled":
            shards = replace(shards, matches=[shards.matches[0], *shards.matches], match_digests=None)
        case "other correlation":
            shards = share_out(few, left / "again", 3, lenient, copy_correlation=0.5)
        case "other data":
            shards = found_in(left / "foreign")
        case "matches of other data":
            other = found_in(left / "foreign")
            shards = replace(other, survey=shards.survey, survey_digest=shards.survey_digest)
        case "resealed":
            reseal(shards.matches[0], note="x")
        case "search resealed":
            reseal(left / "work/search", note="x")
            checks = lenient.validation
            for number in range(3):
                match(left / "work/search", Share(number, 3), left / f"work/match{number}", checks)
            shards = found_in(left / "work")
        case "survey resealed":
            reseal(shards.survey, note="x")
        case "stale":
            draw(few / "train/glioma/000.png", 78)
            resolve(few, left / "resolve")
        case "none":
            shards = replace(shards, matches=[], match_digests=None)
    with pytest.raises(UserError, match=told):
        validate(few, context, left / "out", lenient, shards=shards)
    assert not (left / "out").exists()


def test_a_dataset_that_changed_after_the_scans_is_refused_though_its_names_did_not(
    left: Path, lenient: Params
) -> None:
    context, shards = resolve(left / "data", left / "resolve"), found_in(left / "work")
    (left / "data/groups.csv").write_text("path,patient\ntrain/glioma/001.png,p2\n")
    with pytest.raises(UserError, match="together are data"):
        validate(left / "data", context, left / "out", lenient, shards=shards)


def test_a_scan_of_a_data_version_fetches_its_share_alone_and_the_rest_is_fetched_once(
    few: Path, tmp_path: Path, lenient: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.relative_to(few).as_posix(): path.read_bytes() for path in few.rglob("*") if path.is_file()}
    remote = open_store(tmp_path / "remote")
    listing = [{"md5": hashlib.md5(files[path]).hexdigest(), "relpath": path} for path in sorted(files)]
    for entry in listing:
        remote.write(object_key(entry["md5"]), files[entry["relpath"]])
    text = json.dumps(listing).encode()
    version = hashlib.md5(text).hexdigest()
    remote.write(object_key(f"{version}.dir"), text)
    monkeypatch.setenv("BRAINTUMOR_DATA_REMOTE", str(tmp_path / "remote"))
    monkeypatch.setenv("BRAINTUMOR_CACHE", str(tmp_path / "cache"))

    def objects() -> set[str]:
        return {path.parent.name + path.name for path in (tmp_path / "cache/objects").glob("??/*")}

    n_images = scan(Path(version), Share(0, 4), tmp_path / "first", lenient.validation)
    assert len(objects()) == n_images == (len(files) - 1) // 4
    # What the first share has fetched is not fetched again: its objects are gone from the remote.
    for md5 in objects():
        (tmp_path / "remote" / object_key(md5)).unlink()
    assert scan(Path(version), Share(0, 4), tmp_path / "again", lenient.validation) == n_images
    assert open_dataset(Path(version)).is_dir()
    assert len(objects()) == len(set(files.values()))
    here = tmp_path / "here"
    scan(few, Share(0, 4), here, lenient.validation)
    assert seal_digest(here) == seal_digest(tmp_path / "first") == seal_digest(tmp_path / "again")
    assert not [path for path in (tmp_path / "cache/datasets").iterdir() if path.name != version]


@pytest.mark.parametrize(("number", "count"), [(3, 3), (-1, 3), (0, 0)])
def test_a_share_that_does_not_exist_is_refused(number: int, count: int) -> None:
    with pytest.raises(UserError, match="no share"):
        Share(number, count)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_shares_have_every_place_once_and_in_order(count: int) -> None:
    assert [place for number in range(count) for place in Share(number, count).of(23)] == list(range(23))
