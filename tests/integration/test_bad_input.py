"""Bad input through the command line: one clear message, non-zero exit, no traceback, nothing lost or half-written."""

import ctypes
import math
import os
import resource
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from braintumor.artifacts import FINDINGS, read_json
from braintumor.labels import CLASS_NAMES
from braintumor.params import load_params


@pytest.fixture(scope="module")
def dataset_template(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    make_dataset = request.getfixturevalue("dataset_maker")
    return make_dataset(tmp_path_factory.mktemp("template") / "data")


@pytest.fixture
def here(tmp_path: Path, dataset_template: Path, store: Path, params_writer: Callable[..., Path]) -> Path:
    """A current folder with data/ and params.yaml."""
    shutil.copytree(dataset_template, tmp_path / "data")
    params_writer(tmp_path / "params.yaml")
    return tmp_path


@pytest.fixture(scope="module")
def split_template(
    tmp_path_factory: pytest.TempPathFactory,
    dataset_template: Path,
    migrated_database: Path,
    params_writer: Callable[..., Path],
) -> Path:
    """A folder whose data are resolved, validated and split."""
    from braintumor.steps.resolve import resolve
    from braintumor.steps.split import split
    from braintumor.steps.validate import validate

    folder = tmp_path_factory.mktemp("split")
    data, build = folder / "data", folder / "build"
    shutil.copytree(dataset_template, data)
    params = load_params(params_writer(folder / "params.yaml"))
    shutil.copyfile(migrated_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        resolve(data, build / "resolve", params.registration)
    validate(data, build / "resolve", build / "validation", params)
    split(data, build / "validation", build / "split", params.split)
    return folder


@pytest.fixture
def split_here(tmp_path: Path, split_template: Path, no_store: Path) -> Path:
    """A current folder as after resolve, validate and split."""
    shutil.copytree(split_template, tmp_path, dirs_exist_ok=True)
    return tmp_path


def validated(braintumor: Any) -> Any:
    """How `validate` ends on the data as they are now."""
    assert braintumor("resolve").code == 0
    return braintumor("validate")


def findings(here: Path) -> dict[str, list[str]]:
    """The culprits by the finding's name."""
    found = read_json(here / "build/validation" / FINDINGS, "")["findings"]
    return {finding["name"]: finding["culprits"] for finding in found}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, hidden and half-written ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def unknown_class(data: Path) -> str:
    (data / "train/astrocytoma").mkdir()
    shutil.copy(data / "train/glioma/glioma-00.jpg", data / "train/astrocytoma/slice.jpg")
    return "train/astrocytoma/slice.jpg"


def class_with_one_image(data: Path) -> str:
    shutil.rmtree(data / "test/pituitary")
    for path in list((data / "train/pituitary").iterdir())[1:]:
        path.unlink()
    return "1 images of class pituitary"


def folder_named_like_an_image(data: Path) -> str:
    (data / "test/notumor/series.jpg").mkdir()
    shutil.copy(data / "test/notumor/notumor-00.jpg", data / "test/notumor/series.jpg/1.jpg")
    return "test/notumor/series.jpg/1.jpg"


@pytest.mark.parametrize(
    "spoil",
    [
        zero_byte, truncated, no_image, one_pixel, class_missing, no_test_images, unknown_class, class_with_one_image,
        folder_named_like_an_image,
    ],
    ids=lambda spoil: spoil.__name__,
)  # fmt: skip
def test_spoiled_data_set_is_refused_and_its_culprit_named(
    here: Path, braintumor: Any, spoil: Callable[[Path], str]
) -> None:
    culprit = spoil(here / "data")
    assert braintumor("resolve").code == 0
    ended = braintumor("validate")
    assert ended.code == 3
    assert culprit in ended.err
    assert ended.err.count("Error:") == 1
    left = {path.name for path in (here / "build/validation").iterdir()}
    assert left == {"findings.json", "data_docs"}
    # Hidden is what `resolve` keeps, to spare itself the same question.
    assert {path.name for path in (here / "build").glob("[!.]*")} == {"resolve", "validation"}
    # What a person does next is refused as well, with the step to repeat.
    ended = braintumor("split")
    assert ended.code == 2
    assert "braintumor validate" in ended.err
    assert not (here / "build/split").exists()


def frames() -> tuple[Image.Image, dict[str, Any]]:
    slices = [Image.fromarray(np.full((48, 48), 60 * number, np.uint8)) for number in (1, 2, 3)]
    return slices[0], {"save_all": True, "append_images": slices[1:]}


def make_film(path: Path) -> None:
    first, options = frames()
    first.save(path, **options)


def make_gif(path: Path) -> None:
    first, options = frames()
    first.save(path, "GIF", **options)


def make_bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000


def make_not_a_number(path: Path) -> None:
    Image.fromarray(np.array([[0, 1], [2, np.nan]], np.float32).repeat(24, 0).repeat(24, 1)).save(path)


def cut_off(path: Path) -> None:
    path.write_bytes((path.parent / "glioma-00.jpg").read_bytes()[:500])


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "[bold]Ärztin's; 20 %.jpg": (cut_off, "is damaged"),
    "bomb.png": (make_bomb, "pixels"),
    "cut off.jpg": (cut_off, "is damaged"),
    "empty.jpg": (Path.touch, "is empty"),
    "film.gif.png": (make_gif, "is not an image in JPEG"),
    "film.png": (make_film, "holds 3 frames"),
    "not a number.tif": (make_not_a_number, "NaN"),
    "page.jpg": (lambda path: path.write_text("<html>404</html>"), "is not an image"),
    "stack.tif": (make_film, "holds 3 frames"),
    "x" * 251 + ".jpg": (cut_off, "is damaged"),
}


def test_every_unreadable_image_is_named_and_the_rest_passes_without_them(here: Path, braintumor: Any) -> None:
    folder = here / "data/train/glioma"
    for name, (make, _) in UNREADABLE.items():
        make(folder / name)
    ended = validated(braintumor)
    assert ended.code == 3
    assert f"{len(UNREADABLE)} images can't be decoded; replace or remove them" in ended.err
    named = findings(here)["unreadable"]
    paths = [f"train/glioma/{name}" for name in UNREADABLE]
    assert [culprit[: len(path) + 1] for culprit, path in zip(named, paths, strict=True)] == [f"{p} " for p in paths]
    reasons = [reason for _, reason in UNREADABLE.values()]
    assert [reason for reason, culprit in zip(reasons, named, strict=True) if reason not in culprit] == []

    for path in paths:
        (here / "data" / path).unlink()
    ended = validated(braintumor)
    assert ended.code == 0, ended.err
    assert braintumor("split").code == 0


def save_as(mode: str, **options: Any) -> Callable[[Image.Image, Path], None]:
    return lambda image, path: image.convert(mode).save(path, **options)


def save_16_bits(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image, np.uint16) * 16).save(path)


# Mode, as validation gives it, of an image that is odd and can be read.
READABLE: dict[str, tuple[str, Callable[[Image.Image, Path], None]]] = {
    "16 bits.png": ("I;16", save_16_bits),
    "16 bits.tif": ("I;16", save_16_bits),
    "black and white.png": ("1", save_as("1")),
    "colour.jpg": ("RGB", save_as("RGB")),
    "float.tif": ("F", save_as("F")),
    "opacity.png": ("LA", save_as("LA")),
    "palette.png": ("P", save_as("P", transparency=255)),
    "print.jpg": ("CMYK", save_as("CMYK")),
    "progressive.jpg": ("L", save_as("L", progressive=True)),
    "really a jpeg.png": ("L", save_as("L", format="JPEG")),
    "y" * 251 + ".jpg": ("L", save_as("L")),
}


def test_odd_images_that_can_be_read_are_named_and_go_on(here: Path, braintumor: Any) -> None:
    folder = here / "data/train/glioma"
    for number, (name, (_, save)) in enumerate(READABLE.items()):
        save(Image.open(folder / f"glioma-{number:02d}.jpg"), folder / name)
        (folder / f"glioma-{number:02d}.jpg").unlink()
    ended = validated(braintumor)
    assert ended.code == 0, ended.err
    unusual = [f"train/glioma/{name}" for name, (mode, _) in READABLE.items() if mode not in {"L", "RGB"}]
    assert findings(here)["mode"] == unusual
    manifest = pd.read_parquet(here / "build/validation/manifest.parquet").set_index("path")
    modes = {name: manifest.loc[f"train/glioma/{name}", "mode"] for name in READABLE}
    assert modes == {name: mode for name, (mode, _) in READABLE.items()}
    ended = braintumor("split")
    assert ended.code == 0, ended.err
    assert {f"train/glioma/{name}" for name in READABLE} <= set(pd.read_csv(here / "build/split/splits.csv")["path"])


def name_of_another_encoding(data: Path) -> str:
    with Path(os.fsdecode(os.fsencode(data) + b"/train/glioma/M\xe4rz.jpg")).open("wb") as file:
        file.write(b"x")
    return "M\\udce4rz.jpg"


def link_without_end(data: Path) -> str:
    (data / "train/glioma/link.jpg").symlink_to(data / "gone.jpg")
    return "train/glioma/link.jpg"


def link_to_itself(data: Path) -> str:
    (data / "train/glioma/loop.jpg").symlink_to("loop.jpg")
    return "train/glioma/loop.jpg"


def pipe(data: Path) -> str:
    os.mkfifo(data / "train/glioma/pipe.jpg")
    return "train/glioma/pipe.jpg"


def dvcignore(data: Path) -> str:
    (data / "train/.dvcignore").write_text("*.tif\n")
    return "train/.dvcignore"


def damaged_later(data: Path) -> str:
    truncated(data)
    return "braintumor resolve"


@pytest.mark.parametrize(
    "spoil",
    [name_of_another_encoding, link_without_end, link_to_itself, pipe, dvcignore, damaged_later],
    ids=lambda spoil: spoil.__name__,
)
def test_spoiled_folder_is_refused_by_every_step_and_costs_no_earlier_output(
    split_here: Path, braintumor: Any, spoil: Callable[[Path], str]
) -> None:
    before = contents(split_here / "build")
    culprit = spoil(split_here / "data")
    remedies = {"damaged_later": {"split": "train/glioma/glioma-00.jpg", "train": "braintumor validate"}}
    for step in ("validate", "split", "train"):
        ended = braintumor(step)
        assert ended.code == 2
        assert remedies.get(spoil.__name__, {}).get(step, culprit) in ended.err
        assert ended.err.count("Error:") == 1
    assert contents(split_here / "build") == before


def without_privileges() -> None:
    """What root may always do, read and write files without rights, is taken from the process that is to start."""
    drop_from_bounding_set, may_override, may_search = 24, 1, 2
    for capability in (may_override, may_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="root loses its privileges by a call of Linux")
@pytest.mark.parametrize("culprit", ["data/train/glioma/glioma-00.jpg", "data/test/notumor", "build"])
def test_file_or_folder_without_rights_is_named(split_here: Path, culprit: str) -> None:
    before = contents(split_here)
    path = split_here / culprit
    path.chmod(0o500 if culprit == "build" else 0)
    command = [sys.executable, "-c", "from braintumor.cli import main; main()", "split"]
    ended = subprocess.run(
        command, cwd=split_here, preexec_fn=without_privileges, capture_output=True, text=True, timeout=120
    )
    path.chmod(0o755)
    assert ended.returncode == 2
    assert culprit in ended.stderr
    assert "ermission" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents(split_here) == before


def test_names_that_differ_by_case_alone_are_two_images(here: Path, braintumor: Any) -> None:
    folder = here / "data/train/glioma"
    (folder / "glioma-00.jpg").rename(folder / "SLICE.jpg")
    (folder / "glioma-01.jpg").rename(folder / "slice.JPG")
    if len(list(folder.iterdir())) < 20:
        pytest.skip("this file system knows no case")
    assert validated(braintumor).code == 0
    assert braintumor("split").code == 0
    split = pd.read_csv(here / "build/split/splits.csv")["path"]
    assert set(split[split.str.lower() == "train/glioma/slice.jpg"]) == {
        "train/glioma/SLICE.jpg",
        "train/glioma/slice.JPG",
    }


def one_patient(data: Path) -> None:
    paths = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.jpg"))
    pd.DataFrame({"path": paths, "patient": "p1"}).to_csv(data / "groups.csv", index=False)


def one_image_to_train_on(data: Path) -> None:
    for path in sorted((data / "train/meningioma").iterdir())[1:]:
        path.unlink()


def class_only_in_training(data: Path) -> None:
    shutil.rmtree(data / "test/pituitary")


@pytest.mark.parametrize(
    ("spoil", "protocol", "missing"),
    [
        (one_patient, "official", [f"train holds no {label}" for label in CLASS_NAMES]),
        (one_patient, "grouped", [f"holds no {label}" for label in CLASS_NAMES]),
        (one_image_to_train_on, "official", ["holds no meningioma"]),
        (one_image_to_train_on, "declared", ["holds no meningioma"]),
        (class_only_in_training, "official", ["test holds no pituitary"]),
    ],
)
def test_split_without_a_class_names_class_side_and_remedy(
    here: Path,
    braintumor: Any,
    params_writer: Callable[..., Path],
    spoil: Callable[[Path], None],
    protocol: str,
    missing: list[str],
) -> None:
    params_writer(here / "params.yaml", split={"protocol": protocol})
    spoil(here / "data")
    ended = validated(braintumor)
    assert ended.code == 0, ended.err
    before = contents(here / "build")
    ended = braintumor("split")
    assert ended.code == 2
    assert [one for one in missing if one not in ended.err] == []
    assert "add images" in ended.err
    assert contents(here / "build") == before


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `room` bytes, as if no more were free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("step", "output", "room"),
    [
        ("validate", "build/validation", 20_000),
        ("validate", "build/validation", 2_000_000),
        ("split", "build/split", 5000),
    ],
)
def test_full_disk_is_told_and_earlier_outputs_stay(
    split_here: Path, braintumor: Any, step: str, output: str, room: int
) -> None:
    before = contents(split_here)
    with full_disk(room):
        ended = braintumor(step)
    assert ended.code == 2
    assert f"{split_here / output} could not be written" in ended.err
    assert contents(split_here) == before
    assert braintumor(step).code == 0


def test_full_disk_after_the_training_leaves_the_earlier_model(
    split_here: Path, store: Path, braintumor: Any, params_writer: Callable[..., Path]
) -> None:
    params_writer(split_here / "params.yaml", train={"image_size_px": 32, "head_epochs": 1, "epochs": 0})
    model = split_here / "build/model"
    model.mkdir()
    (model / "model.keras").write_text("earlier")
    before = contents(split_here / "build")
    # Room for the database of the runs, not for the model.
    with full_disk(20_000_000):
        ended = braintumor("train")
    assert ended.code == 2
    assert f"{model} could not be written" in ended.err
    assert contents(split_here / "build") == before


def test_full_disk_leaves_no_part_of_a_sample(no_store: Path, braintumor: Any) -> None:
    command = ("data", "sample", "sample", "--train-patients", 1, "--test-patients", 1, "--size-px", 256)
    with full_disk(3000):
        ended = braintumor(*command)
    assert ended.code == 2
    assert f"{Path.cwd() / 'sample'} could not be written" in ended.err
    assert contents(Path.cwd()) == {}


def zipped(dataset: Path, path: Path) -> zipfile.ZipFile:
    """A zip that could be imported, still open."""
    archive = zipfile.ZipFile(path, "w")
    for image in sorted(dataset.rglob("*-0[0-4].jpg")):
        archive.write(image, image.relative_to(dataset))
    return archive


def zip_that_escapes(dataset: Path, source: Path) -> tuple[Path, str]:
    with zipped(dataset, source / "slices.zip") as archive:
        archive.writestr("train/glioma/../../../escaped.jpg", b"x")
    return source / "slices.zip", "escaped.jpg"


def zip_of_a_link(dataset: Path, source: Path) -> tuple[Path, str]:
    link = zipfile.ZipInfo("train/glioma/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipped(dataset, source / "slices.zip") as archive:
        archive.writestr(link, "/etc/passwd")
    return source / "slices.zip", "link.jpg"


def zip_in_a_zip(dataset: Path, source: Path) -> tuple[Path, str]:
    zipped(dataset, source / "inner.zip").close()
    with zipfile.ZipFile(source / "outer.zip", "w") as archive:
        archive.write(source / "inner.zip", "inner.zip")
    return source / "outer.zip", "outer.zip"


def zip_cut_off(dataset: Path, source: Path) -> tuple[Path, str]:
    zipped(dataset, source / "slices.zip").close()
    content = (source / "slices.zip").read_bytes()
    (source / "slices.zip").write_bytes(content[: len(content) // 2])
    return source / "slices.zip", "slices.zip"


def zip_with_a_flipped_bit(dataset: Path, source: Path) -> tuple[Path, str]:
    zipped(dataset, source / "slices.zip").close()
    content = bytearray((source / "slices.zip").read_bytes())
    content[2000] ^= 1
    (source / "slices.zip").write_bytes(content)
    return source / "slices.zip", "slices.zip"


def folder_with_a_link_out_of_it(dataset: Path, source: Path) -> tuple[Path, str]:
    shutil.copytree(dataset, source / "slices")
    (source / "secret.jpg").write_bytes(b"x")
    (source / "slices/train/glioma/link.jpg").symlink_to(source / "secret.jpg")
    return source / "slices", "link.jpg"


def folder_with_a_fifth_class(dataset: Path, source: Path) -> tuple[Path, str]:
    shutil.copytree(dataset, source / "slices")
    shutil.copytree(dataset / "train/glioma", source / "slices/train/astrocytoma")
    return source / "slices", "astrocytoma"


@pytest.mark.parametrize(
    "make_source",
    [
        zip_that_escapes, zip_of_a_link, zip_in_a_zip, zip_cut_off, zip_with_a_flipped_bit,
        folder_with_a_link_out_of_it, folder_with_a_fifth_class,
    ],
    ids=lambda make_source: make_source.__name__,
)  # fmt: skip
@pytest.mark.parametrize("options", [("--discard",), ("--add",)], ids=["replace", "add"])
def test_source_that_can_not_be_trusted_is_refused_and_the_data_set_stays(
    here: Path, braintumor: Any, make_source: Callable[[Path, Path], tuple[Path, str]], options: tuple[str, ...]
) -> None:
    (here / "source").mkdir()
    source, culprit = make_source(here / "data", here / "source")
    before = contents(here)
    ended = braintumor("data", "import", source, *options)
    assert ended.code == 2
    assert culprit in ended.err
    assert contents(here) == before


def test_names_that_no_data_set_may_hold_are_changed_and_told(here: Path, braintumor: Any) -> None:
    folder = here / "source/train/glioma"
    shutil.copytree(here / "data", here / "source")
    for number, name in enumerate((b"M\xe4rz.jpg", b"SLICE.jpg", b"slice.jpg", b"z" * 251 + b".jpg")):
        (folder / f"glioma-{number:02d}.jpg").rename(folder / os.fsdecode(name))
    ended = braintumor("data", "import", here / "source", "--discard")
    assert ended.code == 0, ended.err
    assert "rz.jpg" in ended.out
    names = [path.name for path in (here / "data/train/glioma").iterdir()]
    assert len({name.casefold() for name in names}) == 20
    assert "z" * 251 + ".jpg" in names
    assert braintumor("resolve").code == 0


@pytest.mark.parametrize("options", [("--discard",), ("--add", "--copies", "add")], ids=["replace", "add"])
def test_full_disk_during_an_import_leaves_the_data_set(here: Path, braintumor: Any, options: tuple[str, ...]) -> None:
    shutil.copytree(here / "data", here / "source")
    Image.effect_noise((300, 300), 90).save(here / "source/train/glioma/large.png")
    before = contents(here)
    with full_disk(20_000):
        ended = braintumor("data", "import", here / "source", *options)
    assert ended.code == 2
    assert "could not be written" in ended.err or "large.png" in ended.err
    assert contents(here) == before


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


@pytest.mark.parametrize("step", ["validate", "split", "train", "evaluate", "gate", "register"])
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
        evaluate = load_params(params_file()).evaluate.model_dump() | {"bootstrap_samples": 100}
        options = ("--evaluation", folders.evaluation, "--context", folders.context)
        assert braintumor("gate", *options, "--output", folders.decision).code == 0
        arguments = (
            "register", "--model", folders.model, "--splits", folders.splits, "--evaluation", folders.evaluation,
            "--decision", folders.decision, "--context", folders.context, "--output", here / "out",
            "--params", params_writer(here / "params.yaml", evaluate=evaluate),
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
