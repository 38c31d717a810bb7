from pathlib import Path

import pytest

from braintumor.attempt_report import conclude
from braintumor.errors import UserError
from braintumor.params import Params
from braintumor.registry.attempt_parts import part_of_the_step
from braintumor.registry.attempts import PIPELINE_RUN_VARIABLE, open_attempt, read_record, step_of_the_attempt
from braintumor.registry.server import connected


@pytest.fixture
def run_id(store: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "one")
    opened = open_attempt(params, "d" * 32, "braintumor@sha256:1", is_forced=False).run_id
    with step_of_the_attempt("resolve", opened):
        pass
    return opened


def mark(run_id: str) -> str | None:
    with connected() as client:
        return client.get_run(run_id).data.tags.get("step.validate")


def fail(part: str, message: str) -> None:
    with pytest.raises(SystemExit), part_of_the_step("validate", part):
        raise UserError(message)


def test_a_part_that_is_done_does_not_say_that_the_step_is(run_id: str) -> None:
    with part_of_the_step("validate", "scan, share 0 of 2"):
        assert mark(run_id) == "running"
    assert mark(run_id) == "running"
    # A part that is killed leaves no more than this.
    ending = conclude(read_record(), has_failed=True)
    assert ending.headline == "failed in validate" and ending.message.startswith("it was killed")


def test_what_a_part_says_of_its_failure_stays_while_others_begin_and_end(run_id: str) -> None:
    fail("scan, share 1 of 2", "no room")
    with part_of_the_step("validate", "scan, share 0 of 2"):
        pass
    assert mark(run_id) == "failed: scan, share 1 of 2: no room"
    assert conclude(read_record(), has_failed=True).message == "scan, share 1 of 2: no room"


def test_a_part_that_is_tried_again_takes_its_word_back_and_the_step_ends_as_done(run_id: str) -> None:
    fail("scan, share 1 of 2", "no room")
    with part_of_the_step("validate", "scan, share 1 of 2"):
        pass
    assert mark(run_id) == "running"
    with step_of_the_attempt("validate", run_id):
        pass
    assert mark(run_id) == "done"


def test_a_part_goes_on_without_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = []
    with part_of_the_step("validate", "gather"):
        done.append("gather")
    assert done
