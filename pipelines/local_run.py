"""The compiled pipeline on this machine: each task in a process of its own, as on a cluster in its pod."""

import contextlib
import io
import json
import re
import sys
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from braintumor import artifacts
from braintumor.attempt_report import STEPS, Ending, conclude
from braintumor.params import Profile
from braintumor.registry.attempts import PIPELINE_RUN_VARIABLE, read_record
from braintumor.registry.server import environment
from pipelines.compiled import compile_pipeline

IMAGE = "braintumor:here"  # nothing runs in it: the processes use this installation
LOG = "log.txt"
# What the steps say themselves; all else that kfp and its processes print is for the log.
BEGAN = re.compile(r"Executing task \S*'(\S+?)'")
TOLD = re.compile(rf"^\s*(?:{'|'.join((*STEPS, 'report'))}|Warning|Error): (?!\w+\( name=)")


@dataclass(frozen=True)
class LocalRun:
    """How a run on this machine ended, and where its tasks left their results, a folder a task."""

    ending: Ending
    results: Path

    @property
    def log(self) -> Path:
        """All that the tasks printed."""
        return self.results / LOG

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The evaluation's metrics.json; None where no evaluation was reached."""
        file = self.results / "evaluate" / "evaluation" / artifacts.METRICS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run_local(profile: Profile, dataset: str, output: Path, *, is_forced: bool = False) -> LocalRun:
    """The pipeline has run to its end here, in subprocesses; its results and its log stand in a new folder of `output`.

    `dataset` is a folder, an md5 or 'latest'. A task that fails ends the run at once: what a cluster tries again for
    its nodes' sake would only keep a person waiting. Raises RegistryUnreachable where MLflow is away at the end.
    """
    graph = next(yaml.safe_load_all(compile_pipeline(profile, IMAGE)))
    from kfp import local
    from kfp.components import load_component_from_text

    _remove_retries(graph)
    _run_loops_in_order(graph)
    pipeline = load_component_from_text(yaml.safe_dump(graph, sort_keys=False))
    output.mkdir(parents=True, exist_ok=True)
    earlier = set(output.iterdir())
    log = output / LOG
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(output))
    error = ""
    with environment({PIPELINE_RUN_VARIABLE: str(uuid.uuid4())}):
        try:
            with _told_in_brief(log):
                pipeline(dataset=dataset, force=is_forced)
        # So kfp tells that a task failed.
        except RuntimeError as failure:
            error = str(failure)
        # The steps' own marks decide: a webhook that did not answer fails the task `report`, not the run.
        ending = conclude(read_record(), has_failed=False, error=error)
    results = next((folder for folder in set(output.iterdir()) - earlier if folder.is_dir()), output)
    log.replace(results / LOG)
    return LocalRun(ending, results)


def show_local_run(run: LocalRun) -> None:
    """One table: how it ended, the figures, and where to look next."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Pipeline on this machine: {run.ending.headline}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    rows = {"Ended": run.ending.message, "Data": run.ending.data_md5}
    if run.metrics is not None:
        low, high = run.metrics["accuracy_interval"]
        rows["Accuracy"] = f"{run.metrics['accuracy']:.2%} ({low:.1%} to {high:.1%})"
    rows |= {
        "MLflow run": run.ending.address or run.ending.mlflow_run_id,
        "Results": str(run.results),
        "Log": str(run.log),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    Console().print(table)


def _remove_retries(content: object) -> None:
    if isinstance(content, dict):
        content.pop("retryPolicy", None)
        for value in content.values():
            _remove_retries(value)


def _run_loops_in_order(graph: dict[str, Any]) -> None:
    # kfp's threads exchange the process's log and `print` for their own, and put back what they found there.
    for component in graph["components"].values():
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "parameterIterator" in task:
                task["iteratorPolicy"] = {"parallelismLimit": 1}


class _Brief(io.TextIOBase):
    """A stream whose lines all go to the log, and of which a person sees the steps' own, and which task begins."""

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self._log, self._terminal = log, terminal
        self._line = ""

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if began := BEGAN.search(line):
                print(f"{began[1]} ...", file=self._terminal, flush=True)
            elif TOLD.match(line):
                print(f"  {line.strip()}", file=self._terminal, flush=True)
        return len(text)


@contextlib.contextmanager
def _told_in_brief(log: Path) -> Iterator[None]:
    with (
        log.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(_Brief(file, sys.stdout)),
        warnings.catch_warnings(),
    ):
        # kfp's word on images that are not named 'python', and on limits that a process has not.
        warnings.simplefilter("ignore")
        yield
