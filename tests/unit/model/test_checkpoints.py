import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braintumor.errors import UserError
from braintumor.model import checkpoints
from braintumor.model.checkpoints import MAX_AGE, Checkpoints, State, checkpoint_address, clear_finished, training_key
from braintumor.params import Params

KEY, OTHER_KEY = "a" * 64, "b" * 64


def state(epochs: int, has_own_best: bool = False, step: int = 0) -> State:
    """A training after so many epochs: the number stands in every vector."""
    rows = [
        {"epoch": number, "phase": "head", "val_loss": 0.1 + 0.2 * number, "seconds": 1.5}
        for number in range(1, epochs + 1)
    ]
    values = {
        "decayed": np.full(6, epochs, np.float32),
        "mean.decayed": np.full(6, -epochs, np.float32),
        "step": np.array(epochs, np.int64),
        "sums": np.full(3, step / 7),
    }
    return State(rows, step, values, {"decayed": np.full(6, 0.5, np.float32)} if has_own_best else None, step / 3)


def assert_same(found: State | None, expected: State) -> None:
    assert found is not None
    assert (found.rows, found.step, found.seconds) == (expected.rows, expected.step, expected.seconds)
    assert (found.best is None) == (expected.best is None)
    for one, two in ((found.values, expected.values), (found.best or {}, expected.best or {})):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype
            assert one[name].shape == two[name].shape
            np.testing.assert_array_equal(one[name], two[name])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file may grow longer, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("has_own_best", [False, True])
@pytest.mark.parametrize("step", [0, 17])
def test_state_comes_back_as_it_was(tmp_path: Path, has_own_best: bool, step: int) -> None:
    Checkpoints(tmp_path, KEY).save(state(3, has_own_best, step))
    assert_same(Checkpoints(tmp_path, KEY).load(), state(3, has_own_best, step))


def test_state_before_the_first_epoch_has_no_best(tmp_path: Path) -> None:
    first = State([], 4, state(0).values, {})
    Checkpoints(tmp_path, KEY).save(first)
    assert_same(Checkpoints(tmp_path, KEY).load(), first)


def test_nothing_there_is_no_state_and_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Checkpoints(tmp_path / "none", KEY).load() is None
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "none").exists()


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, KEY)
    for epochs in (9, 10, 11):
        kept.save(state(epochs))
    assert [path.name[:5] for path in files(tmp_path)] == ["00010", "00011"]
    assert_same(Checkpoints(tmp_path, KEY).load(), state(11))


def test_steps_of_an_epoch_come_after_its_begin_and_before_its_end(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, KEY)
    for epochs, step in ((1, 0), (1, 9), (1, 10), (2, 0)):
        kept.save(state(epochs, step=step))
        assert_same(Checkpoints(tmp_path, KEY).load(), state(epochs, step=step))
    assert [path.name[:14] for path in files(tmp_path)] == ["00001-00000010", "00002-00000000"]


def test_resumed_training_keeps_the_last_two_as_well(tmp_path: Path) -> None:
    Checkpoints(tmp_path, KEY).save(state(1))
    resumed = Checkpoints(tmp_path, KEY)
    resumed.load()
    for epochs in (2, 3):
        resumed.save(state(epochs))
    assert [path.name[:5] for path in files(tmp_path)] == ["00002", "00003"]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a byte is flipped": flip_a_byte,
    "the end is missing": lambda file: os.truncate(file, file.stat().st_size - 100),
    "it is empty": lambda file: os.truncate(file, 0),
    "another file has its name": lambda file: file.write_bytes(files(file.parent)[0].read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_gives_way_to_the_one_before(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Checkpoints(tmp_path, KEY)
    for epochs in (1, 2):
        kept.save(state(epochs))
    DAMAGES[damage](files(tmp_path)[-1])
    resumed = Checkpoints(tmp_path, KEY)
    assert_same(resumed.load(), state(1))
    assert "Warning: " in capsys.readouterr().err
    resumed.save(state(2))
    assert_same(Checkpoints(tmp_path, KEY).load(), state(2))
    assert len(files(tmp_path)) == 2


def test_none_that_is_whole_means_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Checkpoints(tmp_path, KEY)
    for epochs in (1, 2):
        kept.save(state(epochs))
    for file in files(tmp_path):
        flip_a_byte(file)
    afresh = Checkpoints(tmp_path, KEY)
    assert afresh.load() is None
    assert "afresh" in capsys.readouterr().err
    afresh.save(state(1))
    assert_same(Checkpoints(tmp_path, KEY).load(), state(1))
    assert len(files(tmp_path)) == 1


def test_file_of_another_training_is_not_used_under_this_ones_key(tmp_path: Path) -> None:
    Checkpoints(tmp_path, OTHER_KEY).save(state(5))
    assert Checkpoints(tmp_path, KEY).load() is None
    (tmp_path / OTHER_KEY).rename(tmp_path / KEY)
    assert Checkpoints(tmp_path, KEY).load() is None


def test_format_of_another_version_is_told_and_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Checkpoints(tmp_path, KEY).save(state(1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 1)
        Checkpoints(tmp_path, KEY).save(state(2))
    assert_same(Checkpoints(tmp_path, KEY).load(), state(1))
    assert "its format is 1" in capsys.readouterr().err


def test_state_that_is_of_no_use_to_the_network_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(found: State) -> None:
        if len(found.rows) > 1:
            raise ValueError("it is of another network")

    kept = Checkpoints(tmp_path, KEY)
    for epochs in (1, 2):
        kept.save(state(epochs))
    assert_same(Checkpoints(tmp_path, KEY).load(check), state(1))
    assert "it is of another network" in capsys.readouterr().err


def test_pickled_objects_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Checkpoints(tmp_path, KEY).save(State([], 0, {"decayed": np.array([print], dtype=object)}, None))
    assert len(files(tmp_path)) == 1
    assert Checkpoints(tmp_path, KEY).load() is None


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A file system of so many bytes; skips the test where this user may not mount one."""
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_last_good_one_and_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Checkpoints(tmp_path, KEY)
    kept.save(state(1))
    with room_for(500):
        for epochs in (2, 3):
            kept.save(state(epochs))
    assert capsys.readouterr().err.count("Warning: ") == 1
    assert len(files(tmp_path)) == 1
    assert_same(Checkpoints(tmp_path, KEY).load(), state(1))
    kept.save(state(4))
    assert_same(Checkpoints(tmp_path, KEY).load(), state(4))


def large(epochs: int) -> State:
    """About 400 kB."""
    return State(state(epochs).rows, 0, {"decayed": np.full(100_000, epochs, np.float32)}, None)


@pytest.mark.parametrize(("room", "kept_places"), [(600_000, ["00001"]), (1_000_000, ["00003", "00004"])])
def test_small_file_system_keeps_as_many_as_it_holds(
    tmp_path: Path, room: int, kept_places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", room) as disk:
        kept = Checkpoints(disk, KEY)
        for epochs in (1, 2, 3, 4):
            kept.save(large(epochs))
        told = capsys.readouterr().err
        assert told.count("Warning: ") == 1
        assert "make room" in told
        # Nothing half-written takes the room.
        assert [path.name[:5] for path in files(disk)] == kept_places
        assert_same(Checkpoints(disk, KEY).load(), large(int(kept_places[-1])))


def test_older_one_of_an_earlier_attempt_makes_room_where_there_is_none(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        for epochs in (1, 2):
            Checkpoints(disk, KEY).save(large(epochs))
        resumed = Checkpoints(disk, KEY)
        resumed.load()
        resumed.save(large(3))
        assert [path.name[:5] for path in files(disk)] == ["00002", "00003"]


def test_server_that_is_away_costs_warnings_alone(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    kept = Checkpoints("s3://checkpoints/of/trainings", KEY)
    assert kept.load() is None
    kept.save(state(1))
    kept.save(state(2))
    kept.clear()
    # Reading, writing and deleting failed, and each is told once.
    assert capsys.readouterr().err.count("Warning: ") == 3


def test_states_that_could_not_be_listed_at_first_are_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoints(tmp_path, KEY).save(state(7))
    afresh = Checkpoints(tmp_path, KEY)
    with monkeypatch.context() as patch:
        patch.setattr(afresh._store, "list", lambda prefix="": 1 / 0)
        assert afresh.load() is None
    for epochs in (1, 2, 3):
        afresh.save(state(epochs))
    assert_same(Checkpoints(tmp_path, KEY).load(), state(7))
    assert [path.name[:5] for path in files(tmp_path)] == ["00002", "00003", "00007"]


def test_two_trainings_of_one_key_at_once_leave_each_others_alone(tmp_path: Path) -> None:
    one, two = Checkpoints(tmp_path, KEY), Checkpoints(tmp_path, KEY)
    for each in (one, two):
        assert each.load() is None
    for epochs in (1, 2, 3):
        one.save(state(epochs))
    two.save(state(1))
    for epochs in (4, 5):
        one.save(state(epochs))
    one.clear()
    assert_same(Checkpoints(tmp_path, KEY).load(), state(1))
    two.clear()
    assert list(tmp_path.rglob("*")) == []


def test_clearing_for_all_attempts_leaves_nothing_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoints(tmp_path, KEY).save(state(1))
    (tmp_path / KEY / ".00002-half.npz.partial-x").write_text("half")
    Checkpoints(tmp_path, OTHER_KEY).save(state(1))
    monkeypatch.setenv("BRAINTUMOR_CHECKPOINTS", str(tmp_path))
    clear_finished(KEY)
    assert [path.name for path in tmp_path.iterdir()] == [OTHER_KEY]


def test_clearing_removes_what_is_its_own_or_older_than_two_weeks(tmp_path: Path) -> None:
    other = Checkpoints(tmp_path, OTHER_KEY)
    for epochs in (1, 2):
        other.save(state(epochs))
    old, recent = files(tmp_path)
    two_weeks_ago = time.time() - MAX_AGE.total_seconds()
    os.utime(old, (two_weeks_ago - 60, two_weeks_ago - 60))
    os.utime(recent, (two_weeks_ago + 60, two_weeks_ago + 60))
    foreign = tmp_path / "thesis.npz"
    foreign.write_text("a person's")
    os.utime(foreign, (0, 0))
    kept = Checkpoints(tmp_path, KEY)
    kept.save(state(1))
    kept.clear()
    assert files(tmp_path) == [recent, foreign]
    assert Checkpoints(tmp_path, KEY).load() is None
    assert not (tmp_path / KEY).exists()


def test_what_a_killed_attempt_did_not_finish_goes_with_the_first_save_of_the_next(tmp_path: Path) -> None:
    Checkpoints(tmp_path, KEY).save(state(1))
    Checkpoints(tmp_path, OTHER_KEY).save(state(1))
    unfinished = {name: tmp_path / name / ".00002-half.npz.partial-x" for name in (KEY, OTHER_KEY)}
    for file in unfinished.values():
        file.write_text("half")
    resumed = Checkpoints(tmp_path, KEY)
    resumed.load()
    somebodys = tmp_path / KEY / ".00003-half.npz.partial-y"
    somebodys.write_text("half")
    resumed.save(state(2))
    assert not unfinished[KEY].exists()
    # Perhaps somebody is still at it.
    assert unfinished[OTHER_KEY].exists()
    resumed.clear()
    assert somebodys.exists()
    os.utime(unfinished[OTHER_KEY], (0, 0))
    resumed.clear()
    assert not unfinished[OTHER_KEY].exists()


def test_folder_of_its_own_is_gone_when_it_is_empty_and_a_persons_stays(tmp_path: Path) -> None:
    for address in (tmp_path / "default", str(tmp_path / "chosen")):
        kept = Checkpoints(address, KEY)
        kept.save(state(1))
        kept.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["chosen"]


def test_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="s3://BUCKET/PREFIX"):
        Checkpoints("http://server/checkpoints", KEY)


def test_address_is_the_environments_else_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAINTUMOR_CHECKPOINTS", raising=False)
    assert checkpoint_address(tmp_path / "build/model") == tmp_path / "build/checkpoints"
    monkeypatch.setenv("BRAINTUMOR_CHECKPOINTS", "s3://bucket/prefix")
    assert checkpoint_address(tmp_path / "build/model") == "s3://bucket/prefix"


def test_key_changes_with_everything_that_decides_what_comes_out(
    recipe: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: dict[str, Any] = {
        "data_md5": "d", "splits_sha256": "s", "params": recipe.train, "weights_sha256": "w", "image": "i",
    }  # fmt: skip
    changed = {
        "data_md5": "other", "splits_sha256": "other", "weights_sha256": None, "image": "other",
        "params": recipe.train.model_copy(update={"dropout": 0.3}),
    }  # fmt: skip
    key = training_key(**facts)
    assert training_key(**facts) == key
    keys = {training_key(**(facts | {name: value})) for name, value in changed.items()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "version", lambda name: "0.1")
        keys.add(training_key(**facts))
    monkeypatch.setattr(checkpoints, "source_digest", lambda: "other code")
    keys.add(training_key(**facts))
    assert len(keys | {key}) == len(changed) + 3
