"""A training that is killed or evicted goes on where it was, and comes to the same model.

The network is a DenseNet of fewer layers and its steps are made slower, for the sake of time and of aim; all else is
what a person runs. With BRAINTUMOR_SOAK=1 there are twenty kills instead of three, half of processes that begin cold.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from braintumor.artifacts import read_json, sha256_of_file, write_json
from braintumor.data.contents import dataset_md5
from braintumor.data.split_artifact import SPLIT_FACTS
from braintumor.model.checkpoints import clear_finished
from braintumor.params import load_params
from braintumor.registry.server import connected
from braintumor.registry.tracking import create_run
from braintumor.steps import train as train_step

SHALLOW = """
import functools
import keras
from keras.src.applications.densenet import DenseNet
keras.applications.DenseNet201 = functools.partial(DenseNet, [1, 1, 1, 1], name="densenet201")
"""
# Steps that are long enough to be hit, each followed by a checkpoint.
SLOW = """
import time
from braintumor.model import engine, training
training.CHECKPOINT_EVERY_S = -1
def slowly(self, *arguments, train=engine.Engine.train, **options):
    train(self, *arguments, **options)
    time.sleep(0.1)
engine.Engine.train = slowly
"""
COMMAND = "import sys\nfrom braintumor.cli import main\nsys.argv[0] = 'braintumor'\nmain()"
# TensorFlow is loaded once, and not used before a command is forked from here.
SERVER = """
import importlib, json, os, sys, traceback
for name in ("mlflow", "tensorflow", "braintumor.cli", "braintumor.steps.train", "braintumor.registry.attempts"):
    importlib.import_module(name)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(asked["environ"])
    sys.argv = ["braintumor", *asked["arguments"]]
    code = 0
    try:
        exec(asked["before"], {})
        sys.modules["braintumor.cli"].main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)
"""
HEAD_EPOCHS, EPOCHS, STEPS = 2, 3, 6
IS_SOAK = os.environ.get("BRAINTUMOR_SOAK") == "1"
TIMEOUT_S = 300


class Attempt:
    """A `braintumor train` under way in a process of its own."""

    def __init__(self, pid: int, log: Path, wait: Callable[[], int]) -> None:
        self.pid, self._log, self._wait = pid, log, wait
        self._ended = threading.Event()
        self._code = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        self._code = self._wait()
        self._ended.set()

    @property
    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def has_ended(self, within_s: float) -> bool:
        return self._ended.wait(within_s)

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def code(self) -> int:
        """How it ended."""
        assert self.has_ended(TIMEOUT_S), self.said
        return self._code

    def succeed(self) -> "Attempt":
        assert self.code() == 0, self.said
        return self

    def kill_when(self, has_come: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not has_come():
            assert not self.has_ended(0.002) and time.monotonic() < deadline, self.said
        self.send(signal.SIGKILL)
        self.code()


@dataclass(frozen=True)
class Workplace:
    """A data set, its split and parameters, as the steps before the training leave them, and a model of them."""

    root: Path
    server: "subprocess.Popen[str]"
    numbers: Iterator[int]
    longest_s: float  # that a training takes

    @property
    def undisturbed(self) -> Path:
        return self.root / "undisturbed/model"

    def start(self, output: Path, before: str = SLOW, *, is_cold: bool = False) -> Attempt:
        """A training in a new process, with the environment of this one; `before` is run there first."""
        log = self.root / f"log-{next(self.numbers)}"
        arguments = ["train", "--splits", "split", "--output", str(output)]
        if is_cold:
            command = [sys.executable, "-c", SHALLOW + before + COMMAND, *arguments]
            with log.open("w") as file:
                process = subprocess.Popen(command, cwd=self.root, stdout=file, stderr=file)
            return Attempt(process.pid, log, process.wait)
        asked = {"log": str(log), "environ": dict(os.environ), "arguments": arguments, "before": before}
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        lines = self.server.stdout
        return Attempt(int(lines.readline()), log, lambda: int(lines.readline()))

    def run(self, output: Path, before: str = SLOW) -> dict[str, Any]:
        """training.json of a training that runs to its end."""
        self.start(output, before).succeed()
        return read_json(output / "training.json", "")

    def assert_as_undisturbed(self, output: Path) -> None:
        """The model and all figures of its history are the same, to the last bit."""
        found, expected = (read_json(model / "training.json", "") for model in (output, self.undisturbed))
        assert expected["resumed_after_epoch"] is expected["resumed_after_step"] is None
        assert found["model_digest"] == expected["model_digest"]
        assert found["temperature"] == expected["temperature"]
        history = read_history(output)
        assert history["phase"].tolist() == ["head"] * HEAD_EPOCHS + ["fine-tuning"] * EPOCHS
        pd.testing.assert_frame_equal(
            history.drop(columns="seconds"), read_history(self.undisturbed).drop(columns="seconds")
        )
        assert (history["seconds"] > 0).all()


def read_history(model: Path) -> pd.DataFrame:
    return pd.read_csv(model / "history.csv", float_precision="round_trip")


def checkpoints_beside(output: Path) -> list[Path]:
    return sorted((output.parent / "checkpoints").rglob("*.npz"))


def is_in_mid_epoch(checkpoint: str) -> bool:
    return int(checkpoint.rpartition("/")[2].split("-")[1]) > 0


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
    weights = root / "shallow.weights.h5"
    recipe = {
        "weights": str(weights), "head_epochs": HEAD_EPOCHS, "epochs": EPOCHS, "optimizer": "adamw", "batch_size": 4,
    }  # fmt: skip
    params_writer(root / "params.yaml", train=recipe)
    make_weights = f"""
keras.utils.set_random_seed(11)
keras.applications.DenseNet201(include_top=False, weights=None, input_shape=(32, 32, 3)).save_weights({str(weights)!r})
"""
    subprocess.run([sys.executable, "-c", SHALLOW + make_weights], check=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        for name in ("BRAINTUMOR_CHECKPOINTS", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        command = [sys.executable, "-c", SHALLOW + SERVER]
        with subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            began = time.monotonic()
            made = Workplace(root, server, count(), 0.0)
            # Without checkpoints within epochs, which must not change anything either.
            made.run(made.undisturbed, before="")
            made = replace(made, longest_s=time.monotonic() - began)
            assert [path.name for path in (root / "undisturbed").iterdir()] == ["model"]
            yield made
            server.kill()


@dataclass
class Kills:
    """Trainings of which one after the other is killed again and again, and run until it ends as if it had not been."""

    workplace: Workplace
    folder: Path
    checkpoints: Callable[[Path], set[str]]  # those of an output
    trainings: int = 0
    attempts: int = 0
    resumed: list[str] = field(default_factory=list)  # where attempts went on

    def strike(self, moment: str, share: float) -> None:
        """One more attempt is killed: 'anywhere', some time after a 'step', or while it is 'writing' a checkpoint."""
        is_killed = False
        while not is_killed:
            attempt = self._start(is_cold=IS_SOAK and self.attempts % 2 == 1)
            known = self.checkpoints(self._output)
            if moment == "anywhere":
                attempt.has_ended(share * self.workplace.longest_s)
            else:
                while not attempt.has_ended(0.002) and not self._has_come(moment, known):
                    pass
                if moment == "step":
                    attempt.has_ended(share * 0.1 * STEPS * EPOCHS)
            attempt.send(signal.SIGKILL)
            is_killed = attempt.code() == -signal.SIGKILL
            if is_killed:
                self._note(attempt)
                print(f"killed {moment} ({share:.2f}) after:", attempt.said.splitlines()[-1:])
            else:
                self._check(attempt)

    def finish(self) -> None:
        """The last training ends, too."""
        self._check(self._start())

    @property
    def _output(self) -> Path:
        return self.folder / f"{self.trainings}/model"

    def _start(self, *, is_cold: bool = False) -> Attempt:
        self.attempts += 1
        return self.workplace.start(self._output, is_cold=is_cold)

    def _has_come(self, moment: str, known: set[str]) -> bool:
        if moment == "writing":
            return any(self._output.parent.glob("checkpoints/*/.*.partial-*"))
        return any(is_in_mid_epoch(name) for name in self.checkpoints(self._output) - known)

    def _note(self, attempt: Attempt) -> None:
        self.resumed += re.findall("goes on after (.*) of an earlier attempt", attempt.said)

    def _check(self, attempt: Attempt) -> None:
        attempt.succeed()
        self._note(attempt)
        self.workplace.assert_as_undisturbed(self._output)
        # Nothing is left behind, and nothing grows for ever.
        clear_finished(read_json(self._output / "training.json", "")["training_key"])
        assert [path.name for path in self._output.parent.iterdir()] == ["model"]
        assert self.checkpoints(self._output) == set()
        self.trainings += 1


def moments(n_soak: int, seed: int, kinds: list[str]) -> list[tuple[str, float]]:
    """Kinds of moments with how late they are (0..1); in the soak so many, in turn."""
    chance = random.Random(seed)
    return [(kinds[number % len(kinds)], chance.random()) for number in range(n_soak if IS_SOAK else len(kinds))]


def beside(output: Path) -> set[str]:
    return {path.name for path in checkpoints_beside(output)}


def test_training_that_is_killed_at_random_moments_comes_to_the_same_model(workplace: Workplace) -> None:
    seed = int(os.environ.get("BRAINTUMOR_SEED", "0" if not IS_SOAK else random.randrange(10**6)))
    print(f"BRAINTUMOR_SEED={seed}")
    kills = Kills(workplace, workplace.root / "killed", beside)
    for moment, share in moments(20, seed, ["step", "writing", "anywhere"]):
        kills.strike(moment, share)
    kills.finish()
    print(f"{kills.attempts} attempts at {kills.trainings} trainings went on after: {kills.resumed}")
    # Of few kills none may leave a state within an epoch as its last; that of SIGTERM, below, does so for sure.
    assert any("step" in told or not IS_SOAK for told in kills.resumed)


def test_training_goes_on_from_a_bucket_where_the_newest_checkpoint_is_damaged(
    workplace: Workplace, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(output: Path | None = None) -> set[str]:
        found = client.list_objects_v2(Bucket="weights", Prefix="of/").get("Contents", [])
        return {each["Key"] for each in found}

    monkeypatch.setenv("BRAINTUMOR_CHECKPOINTS", "s3://weights/of/trainings")
    kills = Kills(workplace, workplace.root / "bucket", keys)
    for moment, share in moments(5, 1, ["step"]):
        kills.strike(moment, share)
    newest = max(keys())
    client.put_object(Bucket="weights", Key=newest, Body=b"PK half of it")
    output = workplace.root / f"bucket/{kills.trainings}/model"
    assert not output.exists()
    attempt = workplace.start(output).succeed()
    assert Path(newest).name in attempt.said
    assert "goes on after" in attempt.said
    workplace.assert_as_undisturbed(output)
    # The pod is lost before its results are uploaded: all epochs are there for the next one.
    shutil.rmtree(output)
    again = workplace.run(output)
    assert (again["resumed_after_epoch"], again["resumed_after_step"]) == (HEAD_EPOCHS + EPOCHS, 0)
    workplace.assert_as_undisturbed(output)
    clear_finished(again["training_key"])
    assert keys() == set()


# The process sends the signals to itself, so that they come at moments that are known.
SIGNALS = """
import os, signal
from braintumor.model import engine, training
from braintumor.steps import train as train_step
def interrupt(names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
"""
IN_STEP = """
def train(self, *arguments, train=engine.Engine.train, **options):
    train(self, *arguments, **options)
    if self._recipe.augmentation and int(self.state()["step"]) == {step}:
        interrupt({names})
engine.Engine.train = train
"""
IN_VALIDATION = """
def outputs_of(*arguments, outputs_of=training.outputs_of, **options):
    if "between" in options:
        interrupt({names})
    return outputs_of(*arguments, **options)
training.outputs_of = outputs_of
"""
WHILE_DECODING = """
def open_images(*arguments, open_images=train_step.open_images):
    interrupt({names})
    return open_images(*arguments)
train_step.open_images = open_images
"""
AS_A_COMPONENT = """
import sys
from pathlib import Path
from braintumor import cli
from braintumor.params import load_params
from braintumor.registry.attempts import step_of_the_attempt
def main():
    with step_of_the_attempt("train", {run_id!r}):
        train_step.train(Path("data"), Path("split"), Path({output!r}), load_params(Path("params.yaml")))
cli.main = main
"""


def test_training_that_is_told_to_end_leaves_its_state_first(workplace: Workplace) -> None:
    output = workplace.root / "told/model"

    def attempt(code: int, before: str, **values: Any) -> str:
        attempt = workplace.start(output, SIGNALS + before.format(**values))
        assert attempt.code() == code, attempt.said
        assert "Traceback" not in attempt.said
        assert not list(output.parent.glob(".*"))
        return attempt.said

    def places() -> list[str]:
        return [path.name[:14] for path in checkpoints_beside(output)]

    attempt(143, WHILE_DECODING, names=["SIGTERM"])
    assert places() == []
    # The second signal doesn't wait for anything.
    attempt(143, IN_STEP, step=2, names=["SIGTERM", "SIGTERM"])
    assert places() == ["00002-00000000"]
    attempt(130, IN_STEP, step=4, names=["SIGINT"])
    assert places() == ["00002-00000000", "00002-00000004"]

    params = load_params(workplace.root / "params.yaml")
    with connected() as client:
        run_id = create_run(client, params, "an attempt", {})
    as_component = AS_A_COMPONENT.format(run_id=run_id, output=str(output))
    said = attempt(143, IN_STEP + as_component, step=STEPS + 1, names=["SIGTERM"])
    assert "goes on after epoch 2 (head) and step 4 of the next" in said
    assert places() == ["00003-00000000", "00003-00000001"]
    with connected() as client:
        run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert "terminated" in run.data.tags["step.train"]

    attempt(143, IN_VALIDATION, names=["SIGTERM"])
    assert places() == ["00003-00000001", "00003-00000006"]
    last = workplace.run(output, before="")
    assert (last["resumed_after_epoch"], last["resumed_after_step"]) == (HEAD_EPOCHS + 1, STEPS)
    workplace.assert_as_undisturbed(output)
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_none_of_the_checkpoints_is_of_use_so_the_training_starts_afresh_and_says_so(workplace: Workplace) -> None:
    output = workplace.root / "afresh/model"
    stop = SIGNALS + IN_STEP.format(step=3, names=["SIGTERM"])
    assert workplace.start(output, stop).code() == 143
    one, two = checkpoints_beside(output)
    one.write_bytes(one.read_bytes()[:-1])
    two.write_bytes(b"")
    attempt = workplace.start(output, "").succeed()
    assert "it starts afresh" in attempt.said
    assert read_json(output / "training.json", "")["resumed_after_epoch"] is None
    workplace.assert_as_undisturbed(output)


def test_model_that_has_no_room_is_saved_by_the_next_run_without_training(
    workplace: Workplace, small_disk: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINTUMOR_CHECKPOINTS", str(workplace.root / "roomy"))
    output = (small_disk or workplace.root / "full") / "model"
    attempt = workplace.start(output, "" if small_disk else NO_ROOM_FOR_A_MODEL)
    assert attempt.code() not in (0, -signal.SIGKILL)
    assert "Traceback" not in attempt.said
    assert str(output) in attempt.said
    assert "make room" in attempt.said
    assert list(output.parent.iterdir()) == []

    elsewhere = workplace.root / "elsewhere/model"
    saved = workplace.run(elsewhere, before="")
    assert (saved["resumed_after_epoch"], saved["resumed_after_step"]) == (HEAD_EPOCHS + EPOCHS, 0)
    workplace.assert_as_undisturbed(elsewhere)
    clear_finished(saved["training_key"])


# Where no file system can be mounted.
NO_ROOM_FOR_A_MODEL = """
import keras, resource
def save(self, file, save=keras.Model.save):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        save(self, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
keras.Model.save = save
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 500 kB; None where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mounting, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Asked(Exception):
    """What was to be known is known."""


def test_each_image_recipe_and_data_has_checkpoints_of_its_own(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def agree(strategy: Any, place: Any, facts: dict[str, str]) -> None:
        asked.extend(facts.values())
        raise Asked

    monkeypatch.setattr(train_step, "agree", agree)
    splits = workplace.root / "split"
    summary, rows = (splits / name for name in ("split.json", "splits.csv"))
    before = summary.read_bytes(), rows.read_bytes()

    def ask(image: str = "", **recipe: Any) -> None:
        params = load_params(workplace.root / "params.yaml")
        params = params.model_copy(update={"train": params.train.model_copy(update=recipe)})
        with pytest.raises(Asked):
            train_step.train(workplace.root / "data", splits, workplace.root / "asked/model", params, image=image)

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
