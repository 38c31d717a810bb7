import signal
import subprocess
import sys
from pathlib import Path

import pytest

from braintumor import artifacts
from braintumor.artifacts import read_json, recover_interrupted, replacing_directory, write_json
from braintumor.errors import UserError


def test_directory_appears_whole_and_replaces_the_earlier_one(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model"
    for content in ("history.csv", "model.keras"):
        with replacing_directory(output) as folder:
            (folder / content).write_text(content)
            assert not (output / content).exists()
    assert [path.name for path in output.iterdir()] == ["model.keras"]
    assert [path.name for path in output.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_earlier_directory_and_no_rest(tmp_path: Path, failure: type[BaseException]) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "model.keras").write_text("kept")
    with pytest.raises(failure), replacing_directory(output) as folder:
        (folder / "half").write_text("half")
        raise failure
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/model.keras",
    ]


def test_output_that_is_a_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError, match="is a file"), replacing_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_takes_no_number_that_is_not_finite(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", {"kept": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"lost": value})
    assert read_json(tmp_path / "a.json", "braintumor train") == {"kept": 1}


@pytest.mark.parametrize(("text", "told"), [(None, "is missing"), ("{", "not valid JSON"), ("[]", "no JSON object")])
def test_unreadable_json_names_the_command_that_makes_it(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "metrics.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        read_json(path, "braintumor evaluate")
    assert "'braintumor evaluate'" in str(error.value)


def test_folder_that_no_step_made_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt, which no step made"), replacing_directory(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine"


KILLED = """
import os, signal, sys
import signal
import subprocess
import sys
from pathlib import Path
from braintumor import artifacts
kill_at, output = int(sys.argv[1]), Path(sys.argv[2])
renames, replace = iter(range(10)), Path.replace
artifacts._exchange = lambda first, second: False

def replace_or_die(self, target):
    if next(renames) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = replace_or_die
with artifacts.replacing_directory(output) as folder:
    (folder / "model.keras").write_text("new")
"""


@pytest.mark.parametrize("kill_at", [0, 1])
def test_kill_at_either_rename_loses_nothing_where_folders_can_not_change_places(tmp_path: Path, kill_at: int) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "model.keras").write_text("old")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(kill_at), str(output)], check=False)
    assert ended.returncode == -signal.SIGKILL
    recover_interrupted(output)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (output / "model.keras").read_text() == "old"


def test_what_a_running_process_is_filling_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with replacing_directory(output) as folder:
        (folder / "model.keras").write_text("mine")
        with replacing_directory(output) as other:
            (other / "model.keras").write_text("theirs")
        assert (folder / "model.keras").read_text() == "mine"
    assert (output / "model.keras").read_text() == "mine"


def test_source_digest_sees_every_file_of_the_code_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("braintumor", "components", "pipelines", "tests"):
        (tmp_path / package).mkdir()
    monkeypatch.setattr(artifacts, "__file__", str(tmp_path / "braintumor/artifacts.py"))
    digests = [artifacts.source_digest()]
    for name in ("braintumor/a.py", "components/a.py", "pipelines/a.py"):
        for content in ("", "loss = 1"):
            (tmp_path / name).write_text(content)
            digests.append(artifacts.source_digest())
    assert len(set(digests)) == 7
    (tmp_path / "tests/test_a.py").write_text("assert True")
    (tmp_path / "braintumor/a.pyc").write_bytes(b"compiled")
    assert artifacts.source_digest() == digests[-1]
