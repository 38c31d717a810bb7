"""How an attempt of the pipeline ended, in one word and one sentence, for people and for a webhook."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from braintumor.errors import UserError
from braintumor.progress import warn
from braintumor.registry.attempts import FAILED, RUNNING, STEP, Record, read_record, record_failure
from braintumor.registry.server import run_address
from braintumor.registry.tracking import GATE_NOT_PASSED, OUTCOME, REGISTERED

STEPS = ("resolve", "validate", "split", "train", "evaluate", "gate", "register")
# All others say nothing: depending on its version, Kubeflow has COMPLETE, SUCCEEDED or still RUNNING for a good run.
FAILED_STATES = frozenset({"FAILED", "ERROR", "SYSTEM_ERROR", "CANCELED", "CANCELLED"})
WEBHOOK_VARIABLE = "BRAINTUMOR_WEBHOOK"
TRIES, TIMEOUT_S = 3, 10


@dataclass(frozen=True)
class Ending:
    """How an attempt ended; `step` is the one that failed."""

    outcome: Literal["registered", "gate not passed", "nothing new", "failed"]
    message: str
    step: str | None = None
    data_md5: str | None = None
    mlflow_run_id: str | None = None
    address: str | None = None

    @property
    def headline(self) -> str:
        """'registered', 'gate not passed', 'nothing new' or 'failed in STEP'."""
        return f"failed in {self.step}" if self.outcome == FAILED and self.step else self.outcome


def report_attempt(*, state: str, error: str = "") -> Ending:
    """MLflow and, where BRAINTUMOR_WEBHOOK names an address, a webhook are told how this pipeline run ended.

    `state` and `error` are what Kubeflow says of the run. Raises UserError, after all is told that can be, for a
    webhook that does not take it and for a run that Kubeflow does not count as failed though nobody recorded its end.
    """
    has_failed = state.upper() in FAILED_STATES
    try:
        record = read_record()
        ending = conclude(record, has_failed=has_failed, error=error)
    except UserError as unknown:
        record, ending = None, Ending(FAILED, f"{error or 'how it ended is not known'}; {unknown}")
    # What was registered or refused is that, whatever went wrong afterwards; and other runs' records are theirs.
    if record is not None and ending.outcome == FAILED and not (record.is_nothing_new or record.is_completed):
        try:
            record_failure(record.run_id, ending.headline)
        except UserError as away:
            warn(f"{away}. MLflow is not told that the run failed")
    address = os.environ.get(WEBHOOK_VARIABLE, "").strip()
    if address:
        post(ending, address)
    if ending.outcome == FAILED and not has_failed:
        raise UserError(f"the run is not red, but {ending.headline}: {ending.message}")
    return ending


def conclude(record: Record | None, *, has_failed: bool, error: str = "") -> Ending:
    """The ending that the steps' marks tell. What is not recorded is a failure, whatever Kubeflow says."""
    told = f"; Kubeflow says: {error}" if error else ""
    if record is None:
        return Ending(FAILED, f"no step left a record{told}", "resolve" if has_failed else None)
    tags = record.tags
    facts = (tags.get("data_md5"), record.run_id, run_address(record.experiment_id, record.run_id))
    if record.is_nothing_new and not has_failed:
        return Ending("nothing new", f"as in the last attempt, which ended as '{tags.get(OUTCOME)}'", None, *facts)
    if not record.is_nothing_new and not has_failed and tags.get(OUTCOME) == REGISTERED:
        return Ending("registered", tags.get(f"{OUTCOME}.register", ""), None, *facts)
    if not record.is_nothing_new and not has_failed and tags.get(OUTCOME) == GATE_NOT_PASSED:
        return Ending("gate not passed", tags.get(f"{OUTCOME}.gate", "").removeprefix("not passed: "), None, *facts)
    step, message = _failure({} if record.is_nothing_new else tags)
    return Ending(FAILED, f"{message}{told}", step, *facts)


def _failure(tags: Mapping[str, str]) -> tuple[str, str]:
    marks = {step: tags[f"{STEP}.{step}"] for step in STEPS if f"{STEP}.{step}" in tags}
    for step, mark in marks.items():
        if mark == RUNNING:
            return step, "it was killed: out of memory, over its time limit, or its node was lost"
        if mark.startswith(FAILED):
            return step, mark.removeprefix(FAILED).removeprefix(": ") or "see the log of its pod"
    last = max((STEPS.index(step) for step in marks), default=-1)
    if last + 1 == len(STEPS) or (STEPS[last : last + 1] == ("gate",) and tags.get(OUTCOME) == GATE_NOT_PASSED):
        return STEPS[last], "its results could not be handed over"
    before = f", or {STEPS[last]} could not hand over its results" if last >= 0 else ""
    return STEPS[last + 1], f"it did not start, or left no record{before}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET without its body, and a page that answers it has taken nothing."""

    def redirect_request(self, *request: object) -> None:
        """Follow nothing: the answer is an error."""


def post(ending: Ending, address: str) -> None:
    """The webhook has answered 2xx to a JSON object with the ending's fields, `headline` and `text`.

    `text` is a line that chat services show. Three tries; raises UserError. The address counts as a secret.
    """
    link = f" {ending.address}" if ending.address else ""
    text = f"brain-tumor-retraining: {ending.headline}. {ending.message}{link}"
    content = json.dumps({**asdict(ending), "headline": ending.headline, "text": text}, sort_keys=True)
    if not address.startswith(("https://", "http://")):
        raise UserError(f"{WEBHOOK_VARIABLE} is no http(s) address; mend it in the Secret")
    request = urllib.request.Request(
        address, data=content.encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirect)
    for attempt in range(1, TRIES + 1):
        try:
            with opener.open(request, timeout=TIMEOUT_S):
                return
        except (OSError, ValueError) as error:
            reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            warn(f"the webhook did not take the message ({reason}), try {attempt} of {TRIES}")
            if attempt < TRIES:
                time.sleep(2.0**attempt)
    raise UserError(f"the webhook did not take the message ({reason}); mend {WEBHOOK_VARIABLE} in the Secret. {text}")
