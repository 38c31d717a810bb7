"""A training whose process is killed goes on after its last epoch, and comes to the same model.

The network is a DenseNet of fewer layers, for the sake of time; all else is what a person runs.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from braintumor.artifacts import read_json, sha256_of_file, write_json
from braintumor.data.manifest import dataset_md5
from braintumor.data.split_artifact import SPLIT_FACTS
from braintumor.model import densenet, training
from braintumor.model.checkpoints import Checkpoints, clear_finished
from braintumor.params import load_params
from braintumor.progress import Advance, Progress, silent
from braintumor.steps.train import train

SHALLOW = """
import functools
import keras
from keras.src.applications.densenet import DenseNet
keras.applications.DenseNet201 = functools.partial(DenseNet, [1, 1, 1, 1], name="densenet201")
"""
TRAIN = "import sys\nfrom braintumor.cli import main\nsys.argv[0] = 'braintumor'\nmain()"
HEAD_EPOCHS, EPOCHS = 2, 3


@dataclass(frozen=True)
class Workplace:
    """A data set, its split and parameters, as the steps before the training leave them, and a model of them."""

    root: Path
    undisturbed: Path

    def train(self, output: Path, image: str = "", progress: Progress = silent, **recipe: Any) -> dict[str, Any]:
        """training.json of a training in this process."""
        params = load_params(self.root / "params.yaml")
        params = params.model_copy(update={"train": params.train.model_copy(update=recipe)})
        train(self.root / "data", self.root / "split", output, params, progress, image=image)
        return read_json(output / "training.json", "")

    def lose_node(self, output: Path, epoch: int) -> None:
        """A training in this process breaks off in an epoch of fine-tuning, after its first batch."""

        def progress(title: str, total: int) -> Advance:
            steps = iter(range(1, total + 1))

            def advance() -> None:
                if title == "train: fine-tuning" and next(steps) == (epoch - 1) * total // EPOCHS + 1:
                    raise RuntimeError("the node is lost")

            return advance

        with pytest.raises(RuntimeError, match="the node is lost"):
            self.train(output, progress=progress)
        assert not output.exists()

    def assert_as_undisturbed(self, output: Path) -> None:
        """The model and all figures of its history are the same, to the last bit."""
        found, expected = (read_json(model / "training.json", "") for model in (output, self.undisturbed))
        assert expected["resumed_after_epoch"] is None
        assert found["model_digest"] == expected["model_digest"]
        assert found["temperature"] == expected["temperature"]
        history = read_history(output)
        assert history["phase"].tolist() == ["head"] * HEAD_EPOCHS + ["fine-tuning"] * EPOCHS
        pd.testing.assert_frame_equal(
            history.drop(columns="seconds"), read_history(self.undisturbed).drop(columns="seconds")
        )


def read_history(model: Path) -> pd.DataFrame:
    return pd.read_csv(model / "history.csv", float_precision="round_trip")


def checkpoints_beside(output: Path) -> list[Path]:
    return sorted((output.parent / "checkpoints").rglob("*.npz"))


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory,
    migrated_database: Path,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
) -> Iterator[Workplace]:
    """All trainings of this file go there, with the network of fewer layers."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copyfile(migrated_database, root / "mlflow.db")
    data = dataset_maker(root / "data", n_train=10, n_test=1)
    paths = sorted(path.relative_to(data) for path in data.rglob("*.jpg"))
    sides = ["train"] * 6 + ["val"] * 2 + ["calibration"] * 2
    rows = [
        {
            "path": path.as_posix(),
            "label": path.parts[1],
            "group": path.stem + path.parts[0],
            "split": "test" if path.parts[0] == "test" else sides[int(path.stem[-2:])],
        }
        for path in paths
    ]
    (root / "split").mkdir()
    pd.DataFrame(rows).to_csv(root / "split/splits.csv", index=False)
    (root / "split/floors.csv").write_text("path,neighbour_label,statistics_label\n")
    digests = {f"{name}_sha256": sha256_of_file(root / f"split/{name}.csv") for name in ("splits", "floors")}
    facts = {"data_md5": dataset_md5(data), "protocol": "official", "statistics_importances": {}, **digests}
    write_json(root / "split/split.json", dict.fromkeys(SPLIT_FACTS, "") | facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        for name in ("BRAINTUMOR_CHECKPOINTS", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        applications = densenet.import_keras().applications
        patch.setattr(applications, "DenseNet201", applications.DenseNet201)
        exec(SHALLOW)
        training.make_reproducible(11)
        weights = root / "shallow.weights.h5"
        applications.DenseNet201(include_top=False, weights=None, input_shape=(32, 32, 3)).save_weights(weights)
        recipe = {"weights": str(weights), "head_epochs": HEAD_EPOCHS, "epochs": EPOCHS, "optimizer": "adamw"}
        params_writer(root / "params.yaml", train=recipe)
        made = Workplace(root, root / "undisturbed/model")
        made.train(made.undisturbed)
        assert [path.name for path in (root / "undisturbed").iterdir()] == ["model"]
        yield made


def test_killed_training_goes_on_and_comes_to_the_same_model(workplace: Workplace) -> None:
    output = workplace.root / "killed/model"
    command = [sys.executable, "-c", SHALLOW + TRAIN, "train", "--splits", "split", "--output", str(output)]
    with subprocess.Popen(command, cwd=workplace.root, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 240
        while len(names := checkpoints_beside(output)) < 2 or int(names[-1].name[:5]) < HEAD_EPOCHS + 1:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()

    finished = subprocess.run(command, cwd=workplace.root, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert HEAD_EPOCHS + 1 <= read_json(output / "training.json", "")["resumed_after_epoch"] < HEAD_EPOCHS + EPOCHS
    workplace.assert_as_undisturbed(output)
    # Nothing grows for ever.
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_training_goes_on_from_a_bucket_where_the_newest_checkpoint_is_damaged(
    workplace: Workplace, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def keys() -> list[str]:
        return [found["Key"] for found in client.list_objects_v2(Bucket="weights", Prefix="of/").get("Contents", [])]

    monkeypatch.setenv("BRAINTUMOR_CHECKPOINTS", "s3://weights/of/trainings")
    output = workplace.root / "bucket/model"
    workplace.lose_node(output, epoch=3)
    assert list(output.parent.glob("*")) == []
    _, newest = keys()
    client.put_object(Bucket="weights", Key=newest, Body=b"PK half of it")
    assert workplace.train(output)["resumed_after_epoch"] == HEAD_EPOCHS + 1
    assert Path(newest).name in capsys.readouterr().err
    workplace.assert_as_undisturbed(output)
    # The pod is lost before its results are uploaded: all epochs are there for the next one.
    shutil.rmtree(output)
    assert workplace.train(output)["resumed_after_epoch"] == HEAD_EPOCHS + EPOCHS
    workplace.assert_as_undisturbed(output)
    clear_finished(read_json(output / "training.json", "")["training_key"])
    assert keys() == []


def test_each_image_recipe_and_data_has_checkpoints_of_its_own(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(checkpoints: Checkpoints) -> None:
        asked.append(checkpoints._key)
        raise InterruptedError

    monkeypatch.setattr(Checkpoints, "load", load)
    splits = workplace.root / "split"
    summary, rows = (splits / name for name in ("split.json", "splits.csv"))
    before = summary.read_bytes(), rows.read_bytes()

    def ask(**changes: Any) -> None:
        with pytest.raises(InterruptedError):
            workplace.train(workplace.root / "asked/model", **changes)

    ask()
    ask()
    ask(image="braintumor@sha256:1")
    ask(dropout=0.1)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    write_json(summary, read_json(summary, "") | {"splits_sha256": sha256_of_file(rows)})
    ask()
    rows.write_bytes(before[1])
    image = next((workplace.root / "data").rglob("*.jpg"))
    pixels = image.read_bytes()
    image.write_bytes(pixels + b" ")
    write_json(summary, json.loads(before[0]) | {"data_md5": dataset_md5(workplace.root / "data")})
    ask()
    image.write_bytes(pixels)
    summary.write_bytes(before[0])
    assert asked[0] == asked[1]
    assert len(set(asked)) == 5
