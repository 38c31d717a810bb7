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
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from braintumor.artifacts import source_digest
from braintumor.errors import UserError
from braintumor.interruption import deferred_interruptions
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
FACTS = {"data_md5": "data", "params_sha256": "parameters", "image": "image", "source_sha256": "code"}
IS_ATTEMPT = "params_sha256"
# The pipeline runs that came to this one and found nothing new, the last ones.
NOTHING_NEW = "nothing_new"
MAX_REMEMBERED = 20
STEP = "step"

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


@dataclass(frozen=True)
class Record:
    """What MLflow holds of a pipeline run: the tags of its run, or of the one that it found nothing newer than."""

    run_id: str
    experiment_id: str
    tags: Mapping[str, str]
    is_nothing_new: bool

    @property
    def is_completed(self) -> bool:
        """Whether a model was registered, or refused by the gate."""
        return self.tags.get(OUTCOME) in COMPLETED


def open_attempt(params: Params, data_md5: str, image: str, *, is_forced: bool) -> Attempt:
    """The attempt has an open run, unless data, parameters, image and code are those of the last completed one.

    Completed is what was registered or refused by the gate; what failed is tried again. Called again by the same
    pipeline run, it answers the same. Raises RegistryUnreachable, and UserError outside a pipeline.
    """
    pipeline_run = _pipeline_run()
    # A tag of an image can move to other code.
    values = (data_md5, hashlib.sha256(params.as_json().encode()).hexdigest(), image, source_digest())
    facts = dict(zip(FACTS, values, strict=True))
    with connected() as client:
        opened = _find(client, PIPELINE_RUN, pipeline_run)
        if opened is not None and IS_ATTEMPT in opened.data.tags:
            return Attempt(str(opened.info.run_id), True, "opened by an earlier try of resolve")
        last = _last_completed(client, params.registration.experiment)
        changes = _changes(facts, last)
        if last is not None and not changes and not is_forced:
            earlier = last.data.tags.get(NOTHING_NEW, "").split()
            remembered = [*earlier, pipeline_run][-MAX_REMEMBERED:]
            set_tags(client, last.info.run_id, {NOTHING_NEW: " ".join(remembered)})
            reason = f"data, parameters, image and code are those of the last attempt ({last.data.tags[OUTCOME]})"
            return Attempt(str(last.info.run_id), False, reason)
        reason = "; ".join(changes) or "forced"
        tags = {PIPELINE_RUN: pipeline_run, "attempt.reason": reason} | facts
        joined = opened or given_run(client)
        if joined is not None:
            set_tags(client, joined.info.run_id, tags)
            return Attempt(str(joined.info.run_id), True, reason)
        return Attempt(create_run(client, params, f"retraining on {data_md5[:7]}", tags), True, reason)


def open_run_for_a_failure(params: Params) -> None:
    """The pipeline run has a run in MLflow, so that a step which failed before there was one can leave its reason.

    Where MLflow does not answer, a warning is given.
    """
    try:
        pipeline_run = _pipeline_run()
        with connected(is_patient=False) as client:
            if _find(client, PIPELINE_RUN, pipeline_run) is None:
                create_run(client, params, "retraining", {PIPELINE_RUN: pipeline_run})
    except UserError as error:
        warn(f"{error}. MLflow is not told of the failure")


@contextmanager
def step_of_the_attempt(step: str, run_id: str | None = None, evidence: Path | None = None) -> Iterator[None]:
    """The attempt's run says that `step` is under way, and afterwards how it ended; MLFLOW_RUN_ID names it meanwhile.

    Steps that Kubeflow caches can't be given the `run_id`, and look for it. Of a step that failed the folder `evidence`
    is kept in the run: Kubeflow keeps no results of a failed task. What MLflow can't be told is a warning: it must not
    cost the step. A UserError becomes its message and exit code, and SIGTERM (an eviction) an exit.
    """
    with without_traceback(), sigterm_as_exit():
        try:
            run_id = run_id or run_of_this_pipeline()
            mark(run_id, step, RUNNING)
            with environment({"MLFLOW_RUN_ID": run_id} if run_id else {}):
                yield
            # Resolve has opened one, perhaps.
            run_id = run_id or run_of_this_pipeline()
            mark(run_id, step, DONE)
        except BaseException as error:
            # A signal that comes now waits until this is told.
            with deferred_interruptions():
                run_id = run_id or run_of_this_pipeline()
                mark(run_id, step, f"{FAILED}: {in_words(error)}")
                _keep(run_id, step, evidence)
            raise


@contextmanager
def without_traceback() -> Iterator[None]:
    """A person's mistake in the block is its message on stderr and its exit code, as on the command line."""
    try:
        yield
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        print(f"Error: {error}; check the path, its permissions and the free space", file=sys.stderr, flush=True)
        raise SystemExit(UserError.exit_code) from None


def read_record() -> Record | None:
    """What the steps of this pipeline run left in MLflow; None if they left nothing."""
    pipeline_run = _pipeline_run()
    with connected() as client:
        own = _find(client, PIPELINE_RUN, pipeline_run)
        if own is not None and IS_ATTEMPT in own.data.tags:
            return _record(own, is_nothing_new=False)
        last = _find(client, NOTHING_NEW, pipeline_run, is_listed=True)
        if last is not None:
            return _record(last, is_nothing_new=True)
        return None if own is None else _record(own, is_nothing_new=False)


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


def _changes(facts: Mapping[str, str], last: "Run | None") -> list[str]:
    if last is None:
        return ["no attempt is completed yet"]
    return [f"{told} changed" for name, told in FACTS.items() if last.data.tags.get(name) != facts[name]]


def _record(run: "Run", *, is_nothing_new: bool) -> Record:
    return Record(str(run.info.run_id), str(run.info.experiment_id), dict(run.data.tags), is_nothing_new)


def _last_completed(client: "MlflowClient", experiment_name: str) -> "Run | None":
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return None
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id],
            f"tags.{IS_ATTEMPT} LIKE '%'",
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        for run in page:
            if run.data.tags.get(OUTCOME) in COMPLETED:
                return run
        token = page.token
        if not token:
            return None


def _find(client: "MlflowClient", tag: str, pipeline_run: str, *, is_listed: bool = False) -> "Run | None":
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quoted = pipeline_run.replace("'", "").replace("%", "")
    condition = f"tags.{tag} LIKE '%{quoted}%'" if is_listed else f"tags.{tag} = '{quoted}'"
    found = client.search_runs(experiments, condition, max_results=1, order_by=["attributes.start_time DESC"])
    return found[0] if found else None


def run_of_this_pipeline() -> str | None:
    """The id of the attempt's run; None where there is none, or MLflow can't be asked, which is a warning."""
    try:
        with connected(is_patient=False) as client:
            found = _find(client, PIPELINE_RUN, _pipeline_run())
    except UserError as error:
        warn(f"{error}. The step goes on; MLflow is not told how it ends")
        return None
    return str(found.info.run_id) if found else None


def mark(run_id: str | None, step: str, value: str) -> None:
    """The run, if there is one, says of the step what `value` says; where MLflow can't be told, this is a warning."""
    if run_id is None:
        return
    try:
        with connected(is_patient=False) as client:
            set_tags(client, run_id, {f"{STEP}.{step}": value[:MAX_TAG_CHARACTERS]})
    except UserError as error:
        warn(f"{error}. MLflow is not told that {step} is {value}")


def _keep(run_id: str | None, step: str, evidence: Path | None) -> None:
    if run_id is None or evidence is None or not evidence.is_dir():
        return
    try:
        with connected(is_patient=False) as client:
            client.log_artifacts(run_id, str(evidence), f"{FAILED}/{step}")
    except UserError as error:
        warn(f"{error}. What {step} found is not kept")


def in_words(error: BaseException) -> str:
    """What ended a step, for the tag of its run."""
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        return "terminated: evicted, its node was shut down, or over its time limit"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, in the main thread, so that what is open is closed and told."""

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
