"""Bad input through the command line: one clear message, non-zero exit, no traceback, nothing half-written."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from braintumor.artifacts import read_json


@pytest.fixture(scope="module")
def dataset_template(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    make_dataset = request.getfixturevalue("dataset_maker")
    return make_dataset(tmp_path_factory.mktemp("template") / "data")


@pytest.fixture
def here(tmp_path: Path, dataset_template: Path, no_store: Path, params_writer: Callable[..., Path]) -> Path:
    """A current folder with data/ and params.yaml."""
    shutil.copytree(dataset_template, tmp_path / "data")
    params_writer(tmp_path / "params.yaml")
    return tmp_path


def zero_byte(data: Path) -> str:
    (data / "train/glioma/empty.jpg").touch()
    return "train/glioma/empty.jpg"


def truncated(data: Path) -> str:
    path = data / "train/glioma/glioma-00.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return "train/glioma/glioma-00.jpg"


def no_image(data: Path) -> str:
    (data / "test/notumor/letter.jpg").write_text("Dear colleague")
    return "test/notumor/letter.jpg"


def one_pixel(data: Path) -> str:
    Image.new("L", (1, 1)).save(data / "train/pituitary/dot.png")
    return "train/pituitary/dot.png"


def class_missing(data: Path) -> str:
    shutil.rmtree(data / "train/meningioma")
    shutil.rmtree(data / "test/meningioma")
    return "meningioma"


def no_test_images(data: Path) -> str:
    shutil.rmtree(data / "test")
    return "no images under test/"


@pytest.mark.parametrize(
    "spoil",
    [zero_byte, truncated, no_image, one_pixel, class_missing, no_test_images],
    ids=lambda spoil: spoil.__name__,
)
def test_spoiled_data_set_is_refused_and_its_culprit_named(
    here: Path, braintumor: Any, spoil: Callable[[Path], str]
) -> None:
    culprit = spoil(here / "data")
    ended = braintumor("validate")
    assert ended.code == 3
    assert culprit in ended.err
    assert ended.err.count("Error:") == 1
    left = {path.name for path in (here / "build/validation").iterdir()}
    assert left == {"findings.json", "data_docs"}
    assert {path.name for path in (here / "build").iterdir()} == {"validation"}
    # What a person does next is refused as well, with the step to repeat.
    ended = braintumor("split")
    assert ended.code == 2
    assert "braintumor validate" in ended.err
    assert not (here / "build/split").exists()


@pytest.mark.parametrize("step", ["resolve", "validate", "split", "train", "evaluate", "gate", "register"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("train", "epoch", 5), "train.epoch is unknown"),
        (("gate", "min_accuracy", None), "gate.min_accuracy is missing"),
    ],
)
def test_unknown_or_missing_key_stops_every_step(
    here: Path, braintumor: Any, step: str, change: tuple[str, str, Any], told: str
) -> None:
    section, key, value = change
    content = yaml.safe_load((here / "params.yaml").read_text())
    content[section][key] = value
    if value is None:
        del content[section][key]
    (here / "params.yaml").write_text(yaml.safe_dump(content))
    ended = braintumor(step)
    assert ended.code == 2
    assert told in ended.err
    assert not (here / "build").exists()


@pytest.mark.parametrize("step", ["validate", "resolve"])
def test_missing_data_set_is_named_with_the_command_that_brings_it(here: Path, braintumor: Any, step: str) -> None:
    ended = braintumor(step, "--dataset", here / "gone")
    assert ended.code == 2
    assert str(here / "gone") in ended.err
    assert not (here / "build").exists()


@pytest.mark.parametrize("step", ["split", "train", "evaluate", "gate", "register"])
def test_step_without_the_one_before_names_it(here: Path, braintumor: Any, step: str) -> None:
    ended = braintumor(step)
    assert ended.code == 2
    assert "missing" in ended.err
    assert "run 'braintumor" in ended.err
    assert not (here / "build").exists()


def spoil_figure(folders: Any, **changes: Any) -> None:
    folders.edit(folders.evaluation / "metrics.json", **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"accuracy": math.nan}, "accuracy"),
        ({"accuracy": None}, "accuracy is missing"),
        ({"accuracy": True}, "accuracy is True"),
        ({"per_class": {}}, "class glioma is missing"),
        ({"data_md5": "f" * 32}, "current data"),
        ({"protocol": "declared"}, "can never pass"),
    ],
)
def test_gate_closes_on_figures_that_can_not_be_judged(
    make_folders: Any, store: Path, braintumor: Any, changes: dict[str, Any], told: str
) -> None:
    folders = make_folders()
    spoil_figure(folders, **changes)
    options = ("--evaluation", folders.evaluation, "--context", folders.context)
    ended = braintumor("gate", *options, "--output", folders.decision, "--params", params_file())
    assert ended.code == 4
    assert told in ended.err
    assert read_json(folders.decision / "decision.json", "gate")["passed"] is False
    ended = braintumor(
        "register", "--model", folders.model, "--splits", folders.splits, "--evaluation", folders.evaluation,
        "--decision", folders.decision, "--context", folders.context, "--output", folders.registration,
        "--params", params_file(),
    )  # fmt: skip
    assert ended.code == 4
    assert not folders.registration.joinpath("registration.json").exists()


def test_figures_of_another_model_are_not_registered(make_folders: Any, store: Path, braintumor: Any) -> None:
    folders, other = make_folders("one", seed=1), make_folders("two", seed=2)
    options = ("--evaluation", folders.evaluation, "--context", folders.context)
    assert braintumor("gate", *options, "--output", folders.decision, "--params", params_file()).code == 0
    ended = braintumor(
        "register", "--model", other.model, "--splits", folders.splits, "--evaluation", folders.evaluation,
        "--decision", folders.decision, "--context", folders.context, "--output", folders.registration,
        "--params", params_file(),
    )  # fmt: skip
    assert ended.code == 2
    assert "model_digest" in ended.err
    assert "Nothing is registered" in ended.err


def params_file() -> Path:
    return Path(__file__).parents[2] / "params.yaml"


@pytest.mark.parametrize("step", ["resolve", "register"])
def test_unreachable_mlflow_is_told_with_its_address(
    make_folders: Any,
    no_server: str,
    braintumor: Any,
    here: Path,
    params_writer: Callable[..., Path],
    step: str,
) -> None:
    folders = make_folders()
    arguments: tuple[object, ...] = ("resolve", "--output", here / "out", "--params", params_file())
    if step == "register":
        options = ("--evaluation", folders.evaluation, "--context", folders.context)
        assert braintumor("gate", *options, "--output", folders.decision).code == 0
        arguments = (
            "register", "--model", folders.model, "--splits", folders.splits, "--evaluation", folders.evaluation,
            "--decision", folders.decision, "--context", folders.context, "--output", here / "out",
            "--params", params_writer(here / "params.yaml", evaluate={"bootstrap_samples": 100}),
        )  # fmt: skip
    ended = braintumor(*arguments)
    assert ended.code == 5
    assert no_server in ended.err
    assert not (here / "out").exists()


def test_predict_names_every_unreadable_image_and_judges_the_rest(
    tmp_path: Path, tiny_models: list[Path], braintumor: Any
) -> None:
    Image.new("L", (20, 30), 90).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    ended = braintumor("predict", tmp_path, "--model", tiny_models[0], "--json", "--params", params_file())
    assert ended.code == 2
    assert len(ended.out.splitlines()) == 1
    assert f"{tmp_path}/bad.png is empty" in ended.err


@pytest.mark.parametrize("name", ["gone.png", "folder"])
def test_predict_without_an_image_says_so(tmp_path: Path, tiny_models: list[Path], braintumor: Any, name: str) -> None:
    (tmp_path / "folder").mkdir()
    ended = braintumor("predict", tmp_path / name, "--model", tiny_models[0], "--params", params_file())
    assert ended.code == 2
    assert str(tmp_path / name) in ended.err


def test_predict_without_a_champion_names_the_alias(store: Path, braintumor: Any) -> None:
    ended = braintumor("predict", "slice.png", "--params", params_file())
    assert ended.code == 2
    assert "'champion'" in ended.err
