import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from braintumor import attempt_report
from braintumor.attempt_report import STEPS, Ending, conclude, post, report_attempt
from braintumor.errors import UserError
from braintumor.params import Params
from braintumor.registry.attempts import PIPELINE_RUN_VARIABLE, Record, open_attempt
from braintumor.registry.server import connected


class Webhook(HTTPServer):
    """A webhook that keeps what it gets, and answers with `answers` one after the other."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.answers = [200]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hooks/s3cret"


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answers = self.server.answers
        self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """A webhook on loopback that BRAINTUMOR_WEBHOOK names; nobody waits between the tries."""
    monkeypatch.setattr(attempt_report.time, "sleep", lambda seconds: None)
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("BRAINTUMOR_WEBHOOK", server.address)
        yield server
        server.shutdown()
        thread.join()


def record(tags: dict[str, str], *, is_nothing_new: bool = False) -> Record:
    return Record("run", "1", {"data_md5": "d" * 32, **tags}, is_nothing_new)


DONE = {f"step.{step}": "done" for step in ("resolve", "validate", "split")}
EVERY = {f"step.{step}": "done" for step in STEPS}


@pytest.mark.parametrize(
    ("found", "has_failed", "headline", "told"),
    [
        (
            record({"outcome": "registered", "outcome.register": "nets version 3"}),
            False,
            "registered",
            "nets version 3",
        ),
        (
            record({"outcome": "gate not passed", "outcome.gate": "not passed: accuracy 0.9 is below 0.92"}),
            False,
            "gate not passed",
            "accuracy 0.9 is below 0.92",
        ),
        (record({"outcome": "registered"}, is_nothing_new=True), False, "nothing new", "registered"),
        (record({**DONE, "step.train": "running"}), True, "failed in train", "killed"),
        (record({**DONE, "step.train": "failed: loss is NaN"}), True, "failed in train", "loss is NaN"),
        # Cached steps leave no mark, and no pod of train ever began.
        (record({"step.resolve": "done", "step.split": "done"}), True, "failed in train", "did not start"),
        (record(DONE | {"step.evaluate": "running"}), True, "failed in evaluate", "killed"),
        (record({**EVERY, "outcome": "registered"}), True, "failed in register", "handed"),
        (record(DONE), True, "failed in train", "split could not hand over"),
        (record(DONE, is_nothing_new=True), True, "failed in resolve", "did not start"),
        (None, True, "failed in resolve", "no step left a record"),
        # Green, and nobody knows why: never a success.
        (None, False, "failed", "no step left a record"),
        (record({"outcome": "gate passed", **DONE}), False, "failed in train", "did not start"),
        (record({}), False, "failed in resolve", "did not start"),
    ],
)
def test_what_the_steps_left_tells_how_it_ended(
    found: Record | None, has_failed: bool, headline: str, told: str
) -> None:
    ending = conclude(found, has_failed=has_failed, error="exit-handler-1 failed" if has_failed else "")
    assert ending.headline == headline
    assert told in ending.message
    assert ("exit-handler-1 failed" in ending.message) == has_failed


def test_webhook_gets_the_ending_and_a_line_for_chats(webhook: Webhook) -> None:
    post(Ending("failed", "the loss is NaN", "train", "d" * 32, "run", "http://mlflow/#/run"), webhook.address)
    assert webhook.bodies == [
        {
            "outcome": "failed",
            "headline": "failed in train",
            "step": "train",
            "message": "the loss is NaN",
            "data_md5": "d" * 32,
            "mlflow_run_id": "run",
            "address": "http://mlflow/#/run",
            "text": "brain-tumor-retraining: failed in train. the loss is NaN http://mlflow/#/run",
        }
    ]


def test_webhook_that_fails_twice_is_tried_a_third_time(webhook: Webhook) -> None:
    webhook.answers = [500, 503, 204]
    post(Ending("registered", "nets version 3"), webhook.address)
    assert len(webhook.bodies) == 3


def test_webhook_that_takes_nothing_is_an_error_that_keeps_its_address(webhook: Webhook) -> None:
    webhook.answers = [403]
    with pytest.raises(UserError, match="HTTP 403") as refused:
        post(Ending("registered", "nets version 3"), webhook.address)
    assert "s3cret" not in str(refused.value)
    assert "registered. nets version 3" in str(refused.value)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "hooks.test/s3cret"])
def test_webhook_that_is_no_http_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="no http") as refused:
        post(Ending("registered", ""), address)
    assert address not in str(refused.value)


def test_a_failed_attempt_ends_its_run_and_is_told(
    store: Path, params: Params, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "one")
    run_id = open_attempt(params, "d" * 32, "image:1", is_forced=False).run_id
    with connected() as client:
        client.set_tag(run_id, "step.train", "running")
    ending = report_attempt(state="FAILED", error="exit-handler-1 failed")
    assert ending.headline == "failed in train"
    assert [body["headline"] for body in webhook.bodies] == ["failed in train"]
    with connected() as client:
        run = client.get_run(run_id)
        assert (run.info.status, run.data.tags["outcome"]) == ("FAILED", "failed in train")


def test_a_green_run_without_a_record_is_told_and_turns_red(
    store: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "unheard of")
    with pytest.raises(UserError, match="not red"):
        report_attempt(state="COMPLETE")
    assert [body["headline"] for body in webhook.bodies] == ["failed"]


def test_webhook_is_told_though_mlflow_is_away(
    no_server: str, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "one")
    assert report_attempt(state="FAILED", error="exit-handler-1 failed").headline == "failed"
    [body] = webhook.bodies
    assert "exit-handler-1 failed" in body["message"] and "does not answer" in body["message"]


@pytest.mark.parametrize("state", ["SUCCEEDED", "COMPLETE", "RUNNING"])
def test_what_was_registered_is_told_whatever_kubeflow_calls_a_good_run(
    state: str, store: Path, params: Params, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "one")
    run_id = open_attempt(params, "d" * 32, "image:1", is_forced=False).run_id
    with connected() as client:
        client.set_tag(run_id, "outcome", "registered")
        client.set_terminated(run_id)
    assert report_attempt(state=state).headline == "registered"
    with connected() as client:
        assert client.get_run(run_id).info.status == "FINISHED"


def test_failures_afterwards_leave_the_record_of_a_completed_attempt(
    store: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BRAINTUMOR_WEBHOOK", raising=False)
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "one")
    run_id = open_attempt(params, "d" * 32, "image:1", is_forced=False).run_id
    with connected() as client:
        client.set_tag(run_id, "outcome", "registered")
        client.set_terminated(run_id)
    # The upload of register's results failed; then a run that found nothing new was cancelled.
    assert report_attempt(state="FAILED").outcome == "failed"
    monkeypatch.setenv(PIPELINE_RUN_VARIABLE, "two")
    assert not open_attempt(params, "d" * 32, "image:1", is_forced=False).is_new
    assert report_attempt(state="CANCELED").outcome == "failed"
    with connected() as client:
        run = client.get_run(run_id)
        assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "registered")


def test_webhook_that_redirects_has_taken_nothing(webhook: Webhook) -> None:
    webhook.answers = [302]
    with pytest.raises(UserError, match="HTTP 302"):
        post(Ending("registered", "nets version 3"), webhook.address)


def test_webhook_is_told_though_mlflow_refuses_to_answer(
    store: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise UserError("MLflow refuses (403); set MLFLOW_TRACKING_USERNAME")

    monkeypatch.setattr(attempt_report, "read_record", refuse)
    assert report_attempt(state="FAILED", error="exit-handler-1 failed").outcome == "failed"
    [body] = webhook.bodies
    assert "refuses (403)" in body["message"]
