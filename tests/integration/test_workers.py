"""Worker processes on loopback that train together: like one process, and together also when one of them is lost.

The network is a DenseNet of fewer layers, for the sake of time; all else is what the pods of a training job run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from braintumor.artifacts import read_json, sha256_of_file, write_json
from braintumor.data.contents import dataset_md5
from braintumor.data.split_artifact import SPLIT_FACTS
from braintumor.errors import UserError
from braintumor.model import densenet, training
from braintumor.model.distribution import WorkerLost
from braintumor.params import load_params
from braintumor.steps.train import train

SHALLOW = """
import functools
from braintumor.model.densenet import import_keras
keras = import_keras()
from keras.src.applications.densenet import DenseNet
keras.applications.DenseNet201 = functools.partial(DenseNet, [1, 1, 1, 1], name="densenet201")
"""
OFTEN = "from braintumor.model import training\ntraining.CHECKPOINT_EVERY_S = 0\n"
TRAIN = "import sys\nfrom braintumor.cli import main\nsys.argv[0] = 'braintumor'\nmain()"
# The first worker has yet to save the model when the others have nothing left to do.
SLOW_END = """
import time
from braintumor.steps import train as step
save = step._save
step._save = lambda *arguments: (time.sleep(6), save(*arguments))[1]
"""
HEAD_EPOCHS, EPOCHS = 2, 3
# Of 29 images the last batch has 5, which neither two nor four workers can share evenly; four can't share 6 either.
N_TRAIN, BATCH_SIZE = {"glioma": 10, "meningioma": 8, "notumor": 7, "pituitary": 4}, 6
SOAK = pytest.mark.skipif(not os.environ.get("BRAINTUMOR_SOAK"), reason="minutes, as part of make soak")
# Far more than anything here takes; a worker that hangs must not hang the suite.
PATIENCE_S = 300


@dataclass(frozen=True)
class Finished:
    """How a worker ended, and what it said."""

    code: int
    err: str


@dataclass(frozen=True)
class Workers:
    """The workers of one training; each has a folder of its own, as on a node of its own."""

    root: Path
    processes: list[subprocess.Popen[bytes]]

    def folder(self, rank: int) -> Path:
        return self.root / f"worker{rank}"

    @property
    def model(self) -> Path:
        return self.folder(0) / "model"

    def checkpoints(self) -> list[str]:
        """The names of all, oldest first."""
        return sorted(path.name for path in self.root.rglob("*.npz"))

    def wait_until_within_an_epoch(self, epochs: int) -> None:
        """There is a checkpoint within the epoch after so many."""
        end = time.monotonic() + PATIENCE_S
        while not any(name >= f"{epochs:05d}-00000001" and name[6:14] != "00000000" for name in self.checkpoints()):
            assert time.monotonic() < end
            assert all(process.poll() is None for process in self.processes), self.ended()
            time.sleep(0.01)

    def ended(self) -> list[Finished]:
        """Wait for all, and tell how they ended."""
        found = []
        for rank, process in enumerate(self.processes):
            process.wait(PATIENCE_S)
            found.append(Finished(process.returncode, (self.folder(rank) / "stderr").read_text(errors="replace")))
        return found

    def succeed(self) -> None:
        """All end well, and without a word about each other."""
        for worker in self.ended():
            assert worker.code == 0, worker.err
            assert not [line for line in worker.err.splitlines() if not line.startswith("train: ")], worker.err


@dataclass(frozen=True)
class Workplace:
    """A data set, its split and weights; trainings of it begin here."""

    root: Path
    params_writer: Callable[..., Path]
    free_ports: Callable[[int], list[int]]
    database: Path

    def start(self, n_workers: int, name: str, prologue: str = "", recipes: Sequence[dict[str, Any]] = ()) -> Workers:
        """The workers of the training `name` begin, or go on; `recipes` changes parameters of each."""
        # Between the question for a port and its use another process may have got it: then the training ends.
        addresses = [f"127.0.0.1:{port}" for port in self.free_ports(n_workers)]
        processes = []
        for rank in range(n_workers):
            folder = self.root / name / f"worker{rank}"
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0 and not (folder / "mlflow.db").exists():
                shutil.copyfile(self.database, folder / "mlflow.db")
            environ = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
            task = {"type": "worker", "index": rank}
            environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
            recipe = {**self.recipe, "distribution": "multi_worker", **(recipes[rank] if recipes else {})}
            self.params_writer(folder / "params.yaml", train=recipe)
            command = [
                sys.executable, "-c", SHALLOW + prologue + TRAIN, "train", "--dataset", str(self.root / "data"),
                "--splits", str(self.root / "split"), "--output", "model",
            ]  # fmt: skip
            with (folder / "stderr").open("wb") as stderr:
                processes.append(
                    subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=stderr)
                )
        return Workers(self.root / name, processes)

    @property
    def recipe(self) -> dict[str, Any]:
        return {
            "weights": str(self.root / "shallow.weights.h5"), "head_epochs": HEAD_EPOCHS, "epochs": EPOCHS,
            "optimizer": "adamw", "dropout": 0.0, "batch_size": BATCH_SIZE, "class_weights": True, "head_views": 2,
        }  # fmt: skip


def digest_of(model: Path) -> str:
    return str(read_json(model / "training.json", "")["model_digest"])


def history_of(model: Path) -> pd.DataFrame:
    history = pd.read_csv(model / "history.csv", float_precision="round_trip")
    assert history["phase"].tolist() == ["head"] * HEAD_EPOCHS + ["fine-tuning"] * EPOCHS
    return history.drop(columns=["phase", "seconds"])


def probabilities_of(model: Path) -> np.ndarray[Any, Any]:
    return pd.read_csv(model / "calibration.csv").filter(like="probability_").to_numpy(float)


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory,
    migrated_database: Path,
    dataset_maker: Callable[..., Path],
    params_writer: Callable[..., Path],
    free_ports: Callable[[int], list[int]],
) -> Iterator[Workplace]:
    """Where the trainings of this file run."""
    root = tmp_path_factory.mktemp("workers")
    data = dataset_maker(root / "data", n_train=15, n_test=1)
    rows = []
    for path in sorted(path.relative_to(data) for path in data.rglob("*.jpg")):
        declared, label = path.parts[:2]
        number = int(path.stem[-2:]) - N_TRAIN[label]
        split = "test" if declared == "test" else "train" if number < 0 else "val" if number < 3 else "calibration"
        rows.append({"path": path.as_posix(), "label": label, "group": declared + path.stem, "split": split})
    (root / "split").mkdir()
    pd.DataFrame(rows).to_csv(root / "split/splits.csv", index=False)
    (root / "split/floors.csv").write_text("path,neighbour_label,statistics_label\n")
    digests = {f"{name}_sha256": sha256_of_file(root / f"split/{name}.csv") for name in ("splits", "floors")}
    facts = {"data_md5": dataset_md5(data), "protocol": "official", "statistics_importances": {}, **digests}
    write_json(root / "split/split.json", dict.fromkeys(SPLIT_FACTS, "") | facts)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BRAINTUMOR_CHECKPOINTS", "MLFLOW_RUN_ID", "TF_CONFIG"):
            patch.delenv(name, raising=False)
        applications = densenet.import_keras().applications
        patch.setattr(applications, "DenseNet201", applications.DenseNet201)
        exec(SHALLOW)
        training.make_reproducible(11)
        backbone = applications.DenseNet201(include_top=False, weights=None, input_shape=(32, 32, 3))
        backbone.save_weights(root / "shallow.weights.h5")
        yield Workplace(root, params_writer, free_ports, migrated_database)


@pytest.fixture(scope="module")
def alone(workplace: Workplace) -> Path:
    """The model of one process."""
    folder = workplace.root / "alone"
    folder.mkdir()
    shutil.copyfile(workplace.database, folder / "mlflow.db")
    params = load_params(workplace.params_writer(folder / "params.yaml", train=workplace.recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        train(workplace.root / "data", workplace.root / "split", folder / "model", params)
    return folder / "model"


@pytest.fixture(scope="module")
def pair(workplace: Workplace) -> Workers:
    """Two workers that were not disturbed."""
    workers = workplace.start(2, "pair", SLOW_END)
    end = time.monotonic() + PATIENCE_S
    while not workers.model.exists():
        assert time.monotonic() < end
        # One that has ended well would not be started again with the first, if that were lost now.
        assert workers.processes[1].poll() is None, workers.ended()
        time.sleep(0.01)
    workers.succeed()
    return workers


def assert_same_to_rounding(model: Path, expected: Path) -> None:
    # The same numbers are added in another order: about 1e-7 in float32, and a little more after each step.
    pd.testing.assert_frame_equal(history_of(model), history_of(expected), rtol=1e-5, check_exact=False)
    np.testing.assert_allclose(probabilities_of(model), probabilities_of(expected), atol=1e-5)


def test_two_workers_come_to_the_model_of_one_process(alone: Path, pair: Workers) -> None:
    assert_same_to_rounding(pair.model, alone)
    assert sorted(path.name for path in pair.folder(1).iterdir()) == ["params.yaml", "stderr"]
    assert pair.checkpoints() == []


def test_workers_stop_together_where_one_is_asked_to_and_one_that_is_lost_ends_them(
    workplace: Workplace, pair: Workers
) -> None:
    # An eviction tells one pod alone.
    workers = workplace.start(2, "disturbed", OFTEN)
    workers.wait_until_within_an_epoch(HEAD_EPOCHS)
    workers.processes[1].send_signal(signal.SIGTERM)
    assert [worker.code for worker in workers.ended()] == [128 + signal.SIGTERM] * 2
    [*_, newest] = workers.checkpoints()
    assert not workers.model.exists()

    workers = workplace.start(2, "disturbed", OFTEN)
    workers.wait_until_within_an_epoch(HEAD_EPOCHS + 1)
    assert workers.checkpoints()[-1] > newest
    workers.processes[1].kill()
    first, _ = workers.ended()
    assert first.code == WorkerLost.exit_code
    assert "Traceback" not in first.err
    assert first.err.splitlines()[-1].startswith("Error: "), first.err
    assert not workers.model.exists()

    workers = workplace.start(2, "disturbed")
    workers.succeed()
    assert read_json(workers.model / "training.json", "")["resumed_after_epoch"] > HEAD_EPOCHS
    assert digest_of(workers.model) == digest_of(pair.model)
    pd.testing.assert_frame_equal(history_of(workers.model), history_of(pair.model))
    assert workers.checkpoints() == []


@SOAK
def test_four_workers_come_to_the_model_of_one_process_and_again_to_their_own(
    workplace: Workplace, alone: Path
) -> None:
    models = []
    for name in ("four", "four again"):
        workers = workplace.start(4, name)
        workers.succeed()
        models.append(workers.model)
    assert_same_to_rounding(models[0], alone)
    assert digest_of(models[0]) == digest_of(models[1])


@SOAK
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_whichever_of_four_workers_is_lost_the_others_end_by_themselves(workplace: Workplace, lost: int) -> None:
    workers = workplace.start(4, f"without {lost}", OFTEN)
    workers.wait_until_within_an_epoch(HEAD_EPOCHS)
    workers.processes[lost].kill()
    for rank, worker in enumerate(workers.ended()):
        assert worker.code == (-signal.SIGKILL if rank == lost else WorkerLost.exit_code), worker.err
        assert rank == lost or worker.err.splitlines()[-1].startswith("Error: worker"), worker.err
        assert "Traceback" not in worker.err


@SOAK
def test_a_worker_that_does_not_answer_any_more_ends_the_others(workplace: Workplace) -> None:
    workers = workplace.start(2, "stopped", OFTEN)
    workers.wait_until_within_an_epoch(HEAD_EPOCHS)
    workers.processes[1].send_signal(signal.SIGSTOP)
    workers.processes[0].wait(PATIENCE_S)
    workers.processes[1].kill()
    first, _ = workers.ended()
    assert first.code == WorkerLost.exit_code, first.err
    assert "worker 1" in first.err


@SOAK
def test_workers_of_different_recipes_refuse_each_other(workplace: Workplace) -> None:
    recipes = [{"distribution": "multi_worker", "learning_rate": rate} for rate in (0.001, 0.002)]
    for worker in workplace.start(2, "different", recipes=recipes).ended():
        assert worker.code == UserError.exit_code, worker.err
        assert "worker 1 differs from that of worker 0" in worker.err


MIRRORED = """
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf
from braintumor.model import training
from braintumor.model.batches import batches
from braintumor.model.distribution import Placement, make_strategy
from braintumor.params import load_params

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3
)
params = load_params(Path(sys.argv[1])).train
random = np.random.default_rng(5)
images = random.integers(0, 256, (17, 32, 32, 1), np.uint8)
labels = np.arange(17) % 3
weights = training.sample_weights(labels, params)
found = {}
for distribution in ("one_device", "mirrored"):
    training.make_reproducible(7)
    from braintumor.model.densenet import build_classifier
    strategy = make_strategy(Placement(), distribution)
    engine = training.make_engine(build_classifier(params), params, 17, strategy)
    assert engine.replicas == (1 if distribution == "one_device" else 3)
    for batch, size in zip(batches(images, labels, weights, params, 1), (8, 8, 1), strict=True):
        engine.train(batch, size)
    outputs = training.outputs_of(engine, images, averaged=True)
    found |= {f"{distribution}.{name}": value for name, value in engine.state().items()}
    found |= {f"{distribution}.output{number}": value for number, value in enumerate(outputs)}
    replicas = [each.numpy() for each in strategy.experimental_local_results(engine._variables["decayed"])]
    assert all((each == replicas[0]).all() for each in replicas)
np.savez(sys.argv[2], **found)
"""


@pytest.mark.parametrize("weights", ["shallow.weights.h5", pytest.param("none", marks=SOAK)])
def test_several_devices_of_a_process_share_its_batches(workplace: Workplace, weights: str) -> None:
    folder = workplace.root / f"mirrored {weights}"
    folder.mkdir()
    is_scratch = weights == "none"
    recipe = workplace.recipe | {
        "batch_size": 8, "ema_momentum": 0.9, "weights": weights if is_scratch else str(workplace.root / weights),
    }  # fmt: skip
    workplace.params_writer(folder / "params.yaml", train=recipe)
    command = [sys.executable, "-c", SHALLOW + MIRRORED, str(folder / "params.yaml"), str(folder / "found.npz")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    with np.load(folder / "found.npz") as found:
        names = [name.partition(".")[2] for name in found if name.startswith("mirrored.")]
        assert len(names) > 10
        for name in names:
            one, mirrored = found[f"one_device.{name}"], found[f"mirrored.{name}"]
            # Each device has statistics of its own share where BatchNorm does not rest, and the means are kept.
            if is_scratch:
                assert np.isfinite(mirrored).all(), name
            else:
                # Adam's first steps have the size of the rate whatever that of the gradient, so that what differs by
                # rounding around zero may differ by as much; few numbers are so near to it.
                assert np.mean(~np.isclose(one, mirrored, rtol=1e-3, atol=1e-5)) < 1e-3, name
