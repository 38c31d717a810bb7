import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braintumor.attempt_report import STEPS, conclude
from braintumor.errors import CriticalFinding, UserError
from braintumor.params import Params
from braintumor.registry.attempts import (
    PIPELINE_RUN_VARIABLE,
    open_attempt,
    open_run_for_a_failure,
    read_record,
    record_failure,
    step_of_the_attempt,
)
from braintumor.registry.server import connected
from braintumor.registry.tracking import GATE_NOT_PASSED, OUTCOME, REGISTERED

DATA, IMAGE = "d" * 32, "braintumor@sha256:1"
Next = Callable[[str], None]


@pytest.fixture(autouse=True)
def _store(store: Path) -> None:
    """Every test has an empty MLflow database."""


@pytest.fixture(name="pipeline_run")
def be_in_a_pipeline_run(monkeypatch: pytest.MonkeyPatch) -> Next:
    """Be in the pipeline run of this name; at first in 'one'."""

    def be(name: str) -> None:
        monkeypatch.setenv(PIPELINE_RUN_VARIABLE, name)

    be("one")
    return be


def end(run_id: str, outcome: str) -> None:
    with connected() as client:
        client.set_tag(run_id, OUTCOME, outcome)


def tags(run_id: str) -> dict[str, str]:
    with connected() as client:
        return dict(client.get_run(run_id).data.tags)


def attempt(params: Params, data: str = DATA, image: str = IMAGE, *, is_forced: bool = False) -> Any:
    return open_attempt(params, data, image, is_forced=is_forced)


def test_the_first_attempt_is_new_and_a_second_try_of_resolve_finds_its_run(params: Params, pipeline_run: Next) -> None:
    first = attempt(params)
    assert first.is_new
    assert tags(first.run_id)["pipeline_run"] == "one"
    assert tags(first.run_id)["data_md5"] == DATA
    again = attempt(params)
    assert (again.run_id, again.is_new) == (first.run_id, True)


@pytest.mark.parametrize("outcome", [REGISTERED, GATE_NOT_PASSED])
def test_nothing_is_new_after_a_completed_attempt_unless_forced(
    outcome: str, params: Params, pipeline_run: Next
) -> None:
    first = attempt(params)
    end(first.run_id, outcome)
    pipeline_run("two")
    second = attempt(params)
    assert (second.run_id, second.is_new) == (first.run_id, False)
    assert outcome in second.reason
    record = read_record()
    assert record is not None and record.is_nothing_new
    assert conclude(record, has_failed=False).headline == "nothing new"
    pipeline_run("three")
    forced = attempt(params, is_forced=True)
    assert forced.is_new and forced.run_id != first.run_id
    assert forced.reason == "forced"


@pytest.mark.parametrize("outcome", ["failed in train", "trained", "gate passed", None])
def test_an_attempt_that_was_not_completed_is_made_again(
    outcome: str | None, params: Params, pipeline_run: Next
) -> None:
    first = attempt(params)
    if outcome:
        end(first.run_id, outcome)
    pipeline_run("two")
    assert attempt(params).is_new


def test_other_data_parameters_or_image_are_new_and_are_named(params: Params, pipeline_run: Next) -> None:
    end(attempt(params).run_id, REGISTERED)
    stricter = params.model_copy(update={"train": params.train.model_copy(update={"seed": 99})})
    for name, changed in {
        "data": (params, "e" * 32, IMAGE),
        "parameters": (stricter, DATA, IMAGE),
        "image": (params, DATA, "braintumor@sha256:2"),
    }.items():
        pipeline_run(name)
        found = attempt(*changed)
        assert found.is_new
        assert found.reason == f"{name} changed"


def test_the_last_completed_attempt_decides_not_an_older_one(params: Params, pipeline_run: Next) -> None:
    end(attempt(params).run_id, REGISTERED)
    pipeline_run("two")
    end(attempt(params, "e" * 32).run_id, GATE_NOT_PASSED)
    pipeline_run("three")
    # The data went back to the first version: its model is not the newest any more.
    assert attempt(params).is_new


def test_a_training_on_a_laptop_is_no_attempt(params: Params, pipeline_run: Next, make_folders: Any) -> None:
    from braintumor.registry import tracking

    end(tracking.publish(params, make_folders().model), REGISTERED)
    assert attempt(params).is_new


def test_a_given_run_is_joined(params: Params, pipeline_run: Next, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected() as client:
        given = client.create_run(client.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    assert attempt(params).run_id == given
    assert tags(given)["pipeline_run"] == "one"


def test_outside_a_pipeline_there_is_no_attempt(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PIPELINE_RUN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=PIPELINE_RUN_VARIABLE):
        attempt(params)


def test_a_step_leaves_that_it_is_done_and_joins_the_run(params: Params, pipeline_run: Next) -> None:
    run_id = attempt(params).run_id
    with step_of_the_attempt("split"):
        assert tags(run_id)["step.split"] == "running"
        assert os.environ["MLFLOW_RUN_ID"] == run_id
    assert tags(run_id)["step.split"] == "done"
    assert "MLFLOW_RUN_ID" not in os.environ


def test_a_step_that_is_given_the_run_does_not_look_for_it(params: Params, pipeline_run: Next) -> None:
    run_id = attempt(params).run_id
    pipeline_run("another")
    with step_of_the_attempt("train", run_id):
        assert os.environ["MLFLOW_RUN_ID"] == run_id
    assert tags(run_id)["step.train"] == "done"


def test_a_second_try_of_a_step_keeps_what_the_first_one_published(
    params: Params, pipeline_run: Next, make_folders: Any
) -> None:
    from braintumor.registry import tracking
    from braintumor.steps.gate import gate

    folders = make_folders(n_wrong=20)
    run_id = attempt(params).run_id

    def judge() -> None:
        gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)

    with step_of_the_attempt("evaluate", run_id):
        tracking.publish(params, folders.model, folders.evaluation)
    with pytest.raises(SystemExit), step_of_the_attempt("gate", run_id):
        judge()
        sys.exit(143)
    assert conclude(read_record(), has_failed=True).headline == "failed in gate"
    with step_of_the_attempt("gate", run_id):
        judge()
    ending = conclude(read_record(), has_failed=False)
    assert ending.headline == "gate not passed"
    assert "accuracy" in ending.message
    with connected() as client:
        assert client.get_run(run_id).info.status == "FINISHED"


def test_resolve_that_fails_before_there_is_a_run_leaves_its_reason_and_may_be_tried_again(
    params: Params, pipeline_run: Next
) -> None:
    end(attempt(params).run_id, REGISTERED)
    pipeline_run("two")
    with pytest.raises(SystemExit), step_of_the_attempt("resolve"):
        open_run_for_a_failure(params)
        raise UserError("there is no published data version; run 'braintumor data publish'")
    ending = conclude(read_record(), has_failed=True)
    assert ending.headline == "failed in resolve"
    assert "data publish" in ending.message
    with step_of_the_attempt("resolve"):
        assert not attempt(params).is_new
    assert conclude(read_record(), has_failed=False).headline == "nothing new"
    pipeline_run("three")
    with pytest.raises(SystemExit), step_of_the_attempt("resolve"):
        open_run_for_a_failure(params)
        raise UserError("no such data")
    with step_of_the_attempt("resolve"):
        assert attempt(params, "e" * 32).is_new
    record = read_record()
    assert record is not None and record.tags["data_md5"] == "e" * 32


def test_two_pipeline_runs_find_nothing_new_and_both_are_told_so(params: Params, pipeline_run: Next) -> None:
    end(attempt(params).run_id, REGISTERED)
    for name in ("two", "three"):
        pipeline_run(name)
        assert not attempt(params).is_new
    for name in ("two", "three"):
        pipeline_run(name)
        assert conclude(read_record(), has_failed=False).headline == "nothing new"


def test_code_that_moved_under_the_same_tag_is_new(
    params: Params, pipeline_run: Next, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(attempt(params).run_id, REGISTERED)
    pipeline_run("two")
    monkeypatch.setattr("braintumor.registry.attempts.source_digest", lambda: "0" * 64)
    assert attempt(params).reason == "code changed"


def test_a_mistake_ends_a_step_with_its_message_and_code_and_what_it_found_is_kept(
    params: Params, pipeline_run: Next, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = attempt(params).run_id
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.html").write_text("<h1>critical</h1>")
    with pytest.raises(SystemExit) as ended, step_of_the_attempt("validate", evidence=docs):
        raise CriticalFinding("40 % of the images are gone; restore them")
    assert ended.value.code == 3
    assert capsys.readouterr().err == "Error: 40 % of the images are gone; restore them\n"
    assert tags(run_id)["step.validate"] == "failed: 40 % of the images are gone; restore them"
    with connected() as client:
        assert [file.path for file in client.list_artifacts(run_id, "failed/validate")] == [
            "failed/validate/index.html"
        ]


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_crash_of_any_kind_leaves_its_step(step: str, params: Params, pipeline_run: Next) -> None:
    attempt(params)
    for earlier in STEPS[: STEPS.index(step)]:
        with step_of_the_attempt(earlier):
            pass
    with pytest.raises(ZeroDivisionError), step_of_the_attempt(step):
        raise ZeroDivisionError("division by zero")
    ending = conclude(read_record(), has_failed=True, error="exit-handler-1 failed")
    assert ending.headline == f"failed in {step}"
    assert "ZeroDivisionError: division by zero" in ending.message


@pytest.mark.parametrize(("number", "told"), [(signal.SIGKILL, "killed"), (signal.SIGTERM, "evicted")])
def test_a_killed_process_leaves_its_step(number: int, told: str, params: Params, pipeline_run: Next) -> None:
    run_id = attempt(params).run_id
    program = (
        "import os, time\n"
        "from braintumor.registry.attempts import step_of_the_attempt\n"
        f"with step_of_the_attempt('train'):\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(30)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert ended.returncode == (-9 if number == signal.SIGKILL else 143)
    ending = conclude(read_record(), has_failed=True)
    assert ending.headline == "failed in train"
    assert told in ending.message
    record_failure(run_id, ending.headline)
    with connected() as client:
        assert client.get_run(run_id).info.status == "FAILED"


def test_a_step_goes_on_while_mlflow_is_away(
    no_server: str, pipeline_run: Next, capsys: pytest.CaptureFixture[str]
) -> None:
    with step_of_the_attempt("split"):
        pass
    assert "MLflow is not told how it ends" in capsys.readouterr().err
