"""SIGKILL at any moment: the data set is the old or the new one, whole, and no image is lost."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

KILLED = -9
N_RANDOM_KILLS, MOST_RANDOM_TRIES = 15, 90
ACTIONS = ("import", "add", "relabel")

# Forks a process for each order: starting Python and importing anew would take most of the time.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
from braintumor import artifacts
from braintumor.data.growth import add_images
from braintumor.data.intake import import_dataset
from braintumor.data.relabel import relabel

WRITES = {"os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "ctypes.dlsym"}

def is_write(event, arguments):
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in WRITES

def die_before_write(number):
    left = number
    def hook(event, arguments):
        nonlocal left
        if is_write(event, arguments):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
    sys.addaudithook(hook)

def act(action, root):
    if action == "import":
        import_dataset(root / "source", root / "data", discard=True)
    elif action == "add":
        add_images(root / "source", root / "data", 0.9)
    else:
        relabel(root / "corrections.csv", root / "data")

# What is imported and prepared at first use, a fork need not do again.
for action in ("import", "add", "relabel"):
    act(action, Path(sys.argv[1], action))
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        if not order["can_exchange"]:
            artifacts._exchange = lambda first, second: False
        if order["kill_at"] is not None:
            die_before_write(order["kill_at"])
        act(order["action"], Path(order["root"]))
        os._exit(0)
    if order["seconds"] is not None:
        time.sleep(order["seconds"])
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What stands in a folder after an action that nobody disturbed."""

    data: dict[str, bytes]
    removed: dict[str, bytes]


Act = Callable[..., int]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    """A folder for each action, where the driver does it first."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for action in ACTIONS:
        shutil.copytree(template, folder / action)
    return folder


@pytest.fixture(scope="module")
def act(undisturbed: Path) -> Iterator[Act]:
    """Do an action in a folder; the exit code, KILLED if it was."""
    command = [sys.executable, "-c", DRIVER, str(undisturbed)]
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread) as driver:
        assert driver.stdin and driver.stdout
        assert driver.stdout.readline() == "ready\n"

        def order(action: str, root: Path, **options: Any) -> int:
            assert driver.stdin and driver.stdout
            wish = {"kill_at": None, "seconds": None, "can_exchange": True} | options
            driver.stdin.write(json.dumps({"action": action, "root": str(root), **wish}) + "\n")
            driver.stdin.flush()
            return int(driver.stdout.readline())

        yield order
        driver.stdin.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a source with two new images and a copy, and corrections."""
    root = tmp_path_factory.mktemp("template")
    for seed, name in enumerate(("train/glioma/a", "train/notumor/b", "test/pituitary/c", "test/glioma/d")):
        draw(root / "data" / f"{name}.png", seed)
    for seed, name in ((0, "glioma/copy"), (10, "glioma/a"), (11, "meningioma/e")):
        draw(root / "source" / f"{name}.png", seed)
    (root / "data/groups.csv").write_text("path,patient\ntest/glioma/d.png,p1\ntrain/glioma/a.png,p2\n")
    (root / "source/groups.csv").write_text("path,patient\nglioma/a.png,p3\n")
    (root / "corrections.csv").write_text("path,new_label\ntrain/glioma/a.png,pituitary\ntest/glioma/d.png,remove\n")
    return root


def draw(path: Path, seed: int) -> None:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(32, 32)), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(128 + 127 * noise / np.abs(noise).max())).save(path)


@pytest.fixture(scope="module")
def outcomes(act: Act, undisturbed: Path) -> dict[str, Outcome]:
    """What each action ends in."""
    return {
        action: Outcome(content(undisturbed / action / "data"), content(undisturbed / action / "data-removed"))
        for action in ACTIONS
    }


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def time_of(act: Act, action: str, template: Path, root: Path) -> float:
    shutil.copytree(template, root)
    started = time.monotonic()
    assert act(action, root) == 0
    return time.monotonic() - started


def refuse_half(root: Path, template: Path, outcome: Outcome, may_be_absent: bool) -> None:
    """The data set is one of the two; all images of the old one are somewhere, the source is untouched."""
    old, now = content(template / "data"), content(root / "data")
    if (root / "data").exists() or not may_be_absent:
        assert now in (old, outcome.data)
    if now != outcome.data:
        assert set(old.values()) <= set(content(root).values())
    else:
        assert outcome.removed.items() <= content(root / "data-removed").items()
    assert content(root / "source") == content(template / "source")


@pytest.mark.parametrize(
    ("action", "can_exchange"),
    # All actions end in the same exchange; where there is none, one of them tells for all.
    [*((action, True) for action in ACTIONS), ("import", False)],
)
def test_a_kill_before_any_write_leaves_the_old_or_the_new_data_set(
    tmp_path: Path, template: Path, act: Act, outcomes: dict[str, Outcome], action: str, can_exchange: bool
) -> None:
    outcome = outcomes[action]
    assert outcome.data != content(template / "data")
    seen = set()
    for kill_at in range(1000):
        root = tmp_path / str(kill_at)
        shutil.copytree(template, root)
        ended = act(action, root, kill_at=kill_at, can_exchange=can_exchange)
        refuse_half(root, template, outcome, may_be_absent=not can_exchange)
        seen.add((root / "data").exists() and content(root / "data") == outcome.data)
        # Whoever comes next finds it whole, and leaves nothing else.
        assert act(action, root, can_exchange=can_exchange) == 0
        assert content(root / "data") == outcome.data
        assert content(root / "data-removed") == outcome.removed
        assert not list(root.glob(".*"))
        if ended == 0:
            break
        assert ended == KILLED
    assert kill_at > 20
    assert seen == {True, False}


def test_a_kill_at_a_random_moment_leaves_the_old_or_the_new_data_set(
    tmp_path: Path, template: Path, act: Act, outcomes: dict[str, Outcome]
) -> None:
    random = Random(20)
    ends = []
    seconds = {action: time_of(act, action, template, tmp_path / action) for action in ACTIONS}
    # How many come too late depends on what else the machine does.
    while ends.count(KILLED) < N_RANDOM_KILLS and len(ends) < MOST_RANDOM_TRIES:
        number = len(ends)
        action = ACTIONS[number % len(ACTIONS)]
        root = tmp_path / str(number)
        shutil.copytree(template, root)
        ends.append(act(action, root, seconds=random.uniform(0, seconds[action])))
        refuse_half(root, template, outcomes[action], may_be_absent=False)
        assert act(action, root) == 0
        assert content(root / "data") == outcomes[action].data
        assert not list(root.glob(".*"))
    assert ends.count(KILLED) == N_RANDOM_KILLS
