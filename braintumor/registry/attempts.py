"""Attempts of the pipeline on a cluster: one MLflow run each, in which every step leaves how it ended.

A pipeline's pods know of each other by its run's id alone, which Kubernetes puts into an environment variable: as an
input it would keep Kubeflow from ever using a cached result.
"""

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from braintumor.errors import UserError
from braintumor.params import Params
from braintumor.progress import warn
from braintumor.registry.server import connected, environment
from braintumor.registry.tracking import (
    GATE_NOT_PASSED,
    OUTCOME,
    REGISTERED,
    create_run,
    end_run,
    given_run,
    set_tags,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PIPELINE_RUN_VARIABLE = "BRAINTUMOR_PIPELINE_RUN"

# Tags of an attempt's run.
PIPELINE_RUN = "pipeline_run"
ATTEMPT = "attempt"
FACTS = ("data_md5", "params_sha256", "image")
NOTHING_NEW = "nothing_new.pipeline_run"
NOTHING_NEW_AT = "nothing_new.at"

COMPLETED = (REGISTERED, GATE_NOT_PASSED)
RUNNING: Final = "running"
DONE: Final = "done"
FAILED: Final = "failed"
MAX_TAG_CHARACTERS = 5000  # MLflow's limit


@dataclass(frozen=True)
class Attempt:
    """Whether there is anything to train, and the run that says so: the attempt's own, or the last completed one's."""

    run_id: str
    is_new: bool
    reason: str


def open_attempt(params: Params, data_md5: str, image: str, *, is_forced: bool) -> Attempt:
    """The attempt has an open run, unless data, parameters and image are those of the last completed one.

    Completed is what was registered or refused by the gate; what failed is tried again. Called again by the same
    pipeline run, it answers the same. Raises RegistryUnreachable, and UserError outside a pipeline.
    """
    pipeline_run = _pipeline_run()
    facts = _facts(params, data_md5, image)
    with connected() as client:
        opened = _find(client, PIPELINE_RUN, pipeline_run)
        if opened is not None:
            return Attempt(str(opened.info.run_id), True, "opened by an earlier try of resolve")
        last = _last_completed(client, params.registration.experiment)
        changes = _changes(facts, last)
        if last is not None and not changes and not is_forced:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            set_tags(client, last.info.run_id, {NOTHING_NEW: pipeline_run, NOTHING_NEW_AT: now})
            return Attempt(
                str(last.info.run_id),
                False,
                f"data, parameters and image are those of the last attempt ({last.data.tags[OUTCOME]})",
            )
        reason = "; ".join(changes) or "forced"
        tags = {PIPELINE_RUN: pipeline_run, ATTEMPT: _digest(facts), "attempt.reason": reason} | facts
        given = given_run(client)
        if given is not None:
            set_tags(client, given.info.run_id, tags)
            return Attempt(str(given.info.run_id), True, reason)
        return Attempt(create_run(client, params, f"retraining on {data_md5[:7]}", tags), True, reason)


@contextmanager
def step_of_the_attempt(step: str, evidence: Path | None = None) -> Iterator[None]:
    """The attempt's run says that `step` is under way, and afterwards how it ended; MLFLOW_RUN_ID names it meanwhile.

    Of a step that failed the folder `evidence` is kept there: Kubeflow keeps no results of a failed task. What MLflow
    can't be told is a warning: it must not cost the step. A UserError becomes its message and exit code, and SIGTERM
    (an eviction) an exit.
    """
    # Resolve opens the run, or finds it opened by an earlier try of its own.
    run_id = _run_of_this_pipeline()
    _mark(run_id, step, RUNNING)
    with without_traceback(), environment({"MLFLOW_RUN_ID": run_id} if run_id else {}), _sigterm_as_exit():
        try:
            yield
        except BaseException as error:
            failure = f"{FAILED}: {_in_words(error)}"
            _mark(run_id or _run_of_this_pipeline(), step, failure, evidence, is_failure=True)
            raise
    _mark(run_id or _run_of_this_pipeline(), step, DONE)


@contextmanager
def without_traceback() -> Iterator[None]:
    """A UserError in the block is its message on stderr and its exit code."""
    try:
        yield
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


@dataclass(frozen=True)
class Record:
    """What MLflow holds of a pipeline run: the tags of its run, and whether it found nothing new."""

    run_id: str
    experiment_id: str
    tags: Mapping[str, str]
    is_nothing_new: bool


def read_record() -> Record | None:
    """What the steps of this pipeline run left in MLflow; None if they left nothing."""
    pipeline_run = _pipeline_run()
    with connected() as client:
        run = _find(client, PIPELINE_RUN, pipeline_run)
        found = run or _find(client, NOTHING_NEW, pipeline_run)
        if found is None:
            return None
        return Record(
            str(found.info.run_id), str(found.info.experiment_id), dict(found.data.tags), is_nothing_new=run is None
        )


def record_failure(run_id: str, outcome: str) -> None:
    """The run has ended as failed, with this outcome."""
    with connected() as client:
        set_tags(client, run_id, {OUTCOME: outcome[:MAX_TAG_CHARACTERS]})
        end_run(client, client.get_run(run_id), "FAILED")


def _pipeline_run() -> str:
    found = os.environ.get(PIPELINE_RUN_VARIABLE, "").strip()
    if not found:
        raise UserError(
            f"{PIPELINE_RUN_VARIABLE} is not set: this is no pod of the pipeline; "
            "compile it with 'braintumor pipeline compile', or use 'braintumor pipeline run-local'"
        )
    return found


def _facts(params: Params, data_md5: str, image: str) -> dict[str, str]:
    sha256 = hashlib.sha256(params.as_json().encode()).hexdigest()
    return dict(zip(FACTS, (data_md5, sha256, image), strict=True))


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(facts[name] for name in FACTS).encode()).hexdigest()


def _changes(facts: Mapping[str, str], last: "Run | None") -> list[str]:
    if last is None:
        return ["no attempt is completed yet"]
    names = dict(zip(FACTS, ("data", "parameters", "image"), strict=True))
    return [f"{names[name]} changed" for name in FACTS if last.data.tags.get(name) != facts[name]]


def _last_completed(client: "MlflowClient", experiment_name: str) -> "Run | None":
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return None
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id],
            f"tags.{ATTEMPT} LIKE '%'",
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for run in page:
            if run.data.tags.get(OUTCOME) in COMPLETED:
                return run
        token = page.token
        if not token:
            return None


def _find(client: "MlflowClient", tag: str, value: str) -> "Run | None":
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quoted = value.replace("'", "")
    found = client.search_runs(
        experiments, f"tags.`{tag}` = '{quoted}'", max_results=1, order_by=["attributes.start_time DESC"]
    )
    return found[0] if found else None


def _run_of_this_pipeline() -> str | None:
    try:
        with connected(is_patient=False) as client:
            found = _find(client, PIPELINE_RUN, _pipeline_run())
    except UserError as error:
        warn(f"{error}. The step goes on; MLflow is not told how it ends")
        return None
    return str(found.info.run_id) if found else None


def _mark(run_id: str | None, step: str, value: str, evidence: Path | None = None, *, is_failure: bool = False) -> None:
    if run_id is None:
        return
    name = f"{OUTCOME}.{step}"
    try:
        with connected(is_patient=False) as client:
            if is_failure:
                if evidence is not None and evidence.is_dir():
                    client.log_artifacts(run_id, str(evidence), f"{FAILED}/{step}")
                set_tags(client, run_id, {name: value[:MAX_TAG_CHARACTERS], OUTCOME: f"{FAILED} in {step}"})
                end_run(client, client.get_run(run_id), "FAILED")
            # What a step says of itself is more than that it is done.
            elif value == RUNNING or client.get_run(run_id).data.tags.get(name, RUNNING) == RUNNING:
                set_tags(client, run_id, {name: value})
    except UserError as error:
        warn(f"{error}. MLflow is not told that {step} is {value}")


def _in_words(error: BaseException) -> str:
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        return "terminated (evicted, or the node was shut down)"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
