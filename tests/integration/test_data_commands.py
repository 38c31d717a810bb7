"""`braintumor data`, as a person types it: what is printed, and what to do next."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def here(
    tmp_path: Path, dataset_maker: Callable[..., Path], no_store: Path, params_writer: Callable[..., Path]
) -> Path:
    """A current folder with params.yaml and, in first/ and second/, two sources that share their test images."""
    dataset_maker(tmp_path / "first", n_train=3, n_test=2)
    dataset_maker(tmp_path / "second", n_train=1, n_test=2)
    shutil.rmtree(tmp_path / "second/train/glioma")
    params_writer(tmp_path / "params.yaml")
    return tmp_path


def images(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob("*/*/*.jpg")}


def test_a_data_set_is_imported_grows_and_is_corrected(here: Path, braintumor: Any) -> None:
    for options in (["--dry-run"], []):
        ended = braintumor("data", "import", "first", *options)
        assert ended.code == 0, ended.err
        assert "data: 0 images before, 20 after" in ended.out
        assert ("next: dvc add data" in ended.out) == (not options)
    assert images(here / "data") == images(here / "first")
    # Of each class, the training image of the second source is the first one of the first source.
    ended = braintumor("data", "import", "second", "--add", "--report", "report.csv")
    assert "data: 20 images before, 20 after" in ended.out
    assert "skipped, copies of what is there: 11" in ended.out
    assert "next:" not in ended.out
    assert len((here / "report.csv").read_text().splitlines()) == 12
    assert "data: 20 images before, 31 after" in braintumor("data", "import", "second", "--add", "--copies", "add").out
    (here / "corrections.csv").write_text("path,new_label\ntrain/glioma/glioma-00.jpg,pituitary\n")
    ended = braintumor("data", "relabel", "corrections.csv")
    assert "train: glioma 3 -> 2" in ended.out
    assert "git commit -m 'Corrected labels' data.dvc" in ended.out
    assert "corrected earlier: 1" in braintumor("data", "relabel", "corrections.csv").out


@pytest.mark.parametrize(
    "options", [["--copies", "add"], ["--patient-prefix", "b-"], ["--report", "x.csv"], ["--add", "--discard"]]
)
def test_options_that_would_do_nothing_are_refused(here: Path, braintumor: Any, options: list[str]) -> None:
    ended = braintumor("data", "import", "first", *options)
    assert ended.code == 2
    assert "--add" in ended.err
    assert not (here / "data").exists()


def test_a_data_set_that_dvc_does_not_hold_is_kept(here: Path, braintumor: Any) -> None:
    assert braintumor("data", "import", "first").code == 0
    ended = braintumor("data", "import", "second")
    assert ended.code == 2
    assert "run 'dvc add data' first, or give --discard" in ended.err
    assert images(here / "data") == images(here / "first")
    assert braintumor("data", "import", "second", "--discard").code == 0
    assert images(here / "data") == images(here / "second")


def test_adding_takes_a_data_set_and_the_parameters(here: Path, braintumor: Any) -> None:
    ended = braintumor("data", "import", "first", "--add")
    assert ended.code == 2
    assert "data is missing; run 'dvc pull' or 'braintumor data import'" in ended.err
    ended = braintumor("data", "import", "first", "--add", "--params", "gone.yaml")
    assert (ended.code, "gone.yaml is missing" in ended.err) == (2, True)
