"""The pipeline on a cluster: uploaded, started, scheduled and looked at through the API of Kubeflow Pipelines 2.

Every command may be interrupted anywhere and run again.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api

from braintumor.errors import UserError
from pipelines.compiled import refuse_incomplete
from pipelines.connection import Refused
from pipelines.cron import check_cron, next_times
from pipelines.retraining import DESCRIPTION
from pipelines.retraining import NAME as PIPELINE

MAX_CONCURRENCY = 1
PAGE = 100

Parameters = Mapping[str, str | bool]


@dataclass(frozen=True)
class Submitted:
    """A run that was started, and its page in the UI."""

    run_id: str
    address: str
    version: str


@dataclass(frozen=True)
class Scheduled:
    """The one recurring run of a name, and its page in the UI."""

    recurring_run_id: str
    address: str
    version: str
    cron: str
    is_new: bool  # False: the one that stood there was the same already
    removed: int  # recurring runs of the same name that are gone now


@dataclass(frozen=True)
class Schedule:
    """A recurring run of the pipeline, as `status` shows it."""

    name: str
    cron: str
    is_enabled: bool
    next_time: datetime | None
    recurring_run_id: str
    address: str


@dataclass(frozen=True)
class Run:
    """A run of the experiment, as `status` shows it; times are UTC."""

    name: str
    created: datetime | None
    finished: datetime | None
    state: str
    reason: str | None
    run_id: str
    address: str


@dataclass(frozen=True)
class Status:
    """All schedules of the pipeline, and the last runs of an experiment, the newest first."""

    schedules: list[Schedule]
    runs: list[Run]

    def as_json(self) -> str:
        """The same as JSON; times in ISO 8601."""
        return json.dumps(asdict(self), indent=2, default=datetime.isoformat)


@dataclass(frozen=True)
class _Version:
    pipeline_id: str
    version_id: str
    name: str


def run_parameters(dataset: str, force: bool) -> dict[str, str | bool]:
    """Arguments of the pipeline; its parameters file is compiled into it. Raises UserError on a folder from here."""
    if dataset != "latest" and not re.fullmatch(r"[0-9a-f]{32}|/.+", dataset):
        raise UserError(
            f"--dataset is '{dataset}', which no pod can open; give 'latest', the md5 of a published data version "
            "(32 hexadecimal digits), or an absolute path that is mounted there"
        )
    return {"dataset": dataset, "force": force}


def submit(
    client: kfp.Client, package: str, parameters: Parameters, *, experiment: str, service_account: str, name: str = ""
) -> Submitted:
    """A run of `package` (both YAML documents) with these parameters has been started."""
    if len(name) > 128:
        raise UserError(f"the name of the run has {len(name)} characters; give at most 128")
    version = _upload(client, package)
    experiment_id = _experiment(client, experiment)
    with _unprinted():
        run = client.run_pipeline(
            experiment_id,
            name or f"{PIPELINE} {datetime.now(UTC):%Y-%m-%d %H:%M}",
            params=dict(parameters),
            pipeline_id=version.pipeline_id,
            version_id=version.version_id,
            service_account=service_account,
        )
    return Submitted(run.run_id, _address(client, f"runs/details/{run.run_id}"), version.name)


def schedule(
    client: kfp.Client,
    package: str,
    parameters: Parameters,
    *,
    name: str,
    cron: str,
    experiment: str,
    service_account: str,
) -> Scheduled:
    """There is exactly one recurring run called `name`: enabled, of this package, with these settings.

    It is created before the others are deleted, so that an interruption leaves too many at worst, which the next call
    removes; one that is the same already stays. Runs that are under way go on.
    """
    cron = check_cron(cron)
    _check_name(name)
    version = _upload(client, package)
    experiment_id = _experiment(client, experiment)
    wanted = {
        "experiment": experiment_id,
        "pipeline": version.pipeline_id,
        "version": version.version_id,
        "parameters": dict(parameters),
        "cron": cron,
        "window": (None, None),
        "mode": kfp_server_api.RecurringRunMode.ENABLE,
        "no_catchup": True,
        "max_concurrency": MAX_CONCURRENCY,
        "service_account": service_account,
    }
    earlier = _recurring_runs(client, name)
    same = [run for run in earlier if _settings(run) == wanted]
    if same:
        kept = same[0].recurring_run_id
    else:
        kept = client.create_recurring_run(
            experiment_id,
            name,
            cron_expression=cron,
            max_concurrency=MAX_CONCURRENCY,
            no_catchup=True,
            params=dict(parameters),
            pipeline_id=version.pipeline_id,
            version_id=version.version_id,
            enabled=True,
            service_account=service_account,
        ).recurring_run_id
    removed = [run for run in earlier if run.recurring_run_id != kept]
    for run in removed:
        _delete(client, run.recurring_run_id)
    left = [run.recurring_run_id for run in _recurring_runs(client, name)]
    if left != [kept]:
        raise UserError(
            f"somebody else schedules {name} now: {len(left)} recurring runs are called so, this one or others; "
            "run it again"
        )
    return Scheduled(kept, _schedule_address(client, kept), version.name, cron, not same, len(removed))


def unschedule(client: kfp.Client, name: str) -> int:
    """No recurring run is called `name`; returns how many there were. Runs that are under way go on."""
    found = _recurring_runs(client, name)
    for run in found:
        _delete(client, run.recurring_run_id)
    return len(found)


def status(client: kfp.Client, experiment: str, limit: int = 10) -> Status:
    """The schedules of the pipeline, and the last `limit` runs of the experiment; nothing is made or changed."""
    pipeline_id = _pipeline_id(client)
    schedules = [
        _schedule(client, run)
        for run in _recurring_runs(client)
        if pipeline_id and _reference(run).pipeline_id == pipeline_id
    ]
    return Status(sorted(schedules, key=lambda one: one.name), list(_last_runs(client, experiment, limit)))


def show_schedule(scheduled: Scheduled, name: str, now: datetime | None = None) -> None:
    """Print what was done, where to see it, and when it comes next, in UTC and in the local time."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    what = "scheduled" if scheduled.is_new else "was scheduled like this already"
    replaced = f", in place of {scheduled.removed} of the same name" if scheduled.removed else ""
    console.print(f"{name} {what}{replaced}: version {scheduled.version}", soft_wrap=True)
    console.print(scheduled.address, soft_wrap=True)
    table = Table("UTC", "Here", box=None, padding=(0, 2), pad_edge=False)
    for moment in next_times(scheduled.cron, now=now):
        table.add_row(f"{moment:%a %Y-%m-%d %H:%M:%S}", f"{moment.astimezone():%a %Y-%m-%d %H:%M:%S %Z}")
    console.print(table)


def show_status(found: Status, now: datetime | None = None) -> None:
    """Print the schedules, the runs, and why runs failed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if found.schedules:
        schedules = Table("Schedule", "Cron (UTC)", "Enabled", "Next (UTC)", box=None, padding=(0, 2), pad_edge=False)
        for one in found.schedules:
            following = _shown(one.next_time) if one.is_enabled else "-"
            schedules.add_row(Text(one.name), one.cron, "yes" if one.is_enabled else "no", following)
        console.print(schedules)
        for one in found.schedules:
            console.print(Text(f"{one.name}  {one.address}"), soft_wrap=True)
    else:
        console.print("No schedule; 'braintumor pipeline schedule' makes one.")
    console.print()
    if not found.runs:
        console.print("No runs yet; 'braintumor pipeline submit' starts one.")
        return
    runs = Table("Run", "Created (UTC)", "State", "Duration", box=None, padding=(0, 2), pad_edge=False)
    for run in found.runs:
        runs.add_row(Text(run.name), _shown(run.created), run.state, _duration(run, now or datetime.now(UTC)))
    console.print(runs)
    for run in found.runs:
        console.print(Text(f"{run.name}  {run.address}"), soft_wrap=True)
        if run.reason:
            console.print(Text(f"    {run.reason.splitlines()[0]}"), soft_wrap=True)


def _shown(moment: datetime | None) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if moment else "-"


def _duration(run: Run, now: datetime) -> str:
    if run.created is None:
        return "-"
    minutes, seconds = divmod(int(((run.finished or now) - run.created).total_seconds()), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise UserError(
            f"the name of a schedule is 1 to 63 small letters, digits and '-', not '{name}'; give another --name"
        )


def _upload(client: kfp.Client, package: str) -> _Version:
    """The package is on the cluster, as a version that is named by its digest; one that is there is used again."""
    refuse_incomplete(package)
    name = hashlib.sha256(package.encode()).hexdigest()[:32]
    pipeline_id = _pipeline_id(client) or _create_pipeline(client)
    version = _find_version(client, pipeline_id, name)
    if version is None:
        with tempfile.TemporaryDirectory() as folder, _unprinted():
            file = Path(folder, f"{PIPELINE}.yaml")
            file.write_text(package, encoding="utf-8")
            with _unless_there_already():
                client.upload_pipeline_version(str(file), name, pipeline_id=pipeline_id)
        version = _find_version(client, pipeline_id, name)
    if version is None:
        raise UserError(f"version {name} of {PIPELINE} is not there after its upload; run it again")
    spec = client.get_pipeline_version(pipeline_id, version.pipeline_version_id).pipeline_spec or {}
    if not (spec.get("platform_spec") or {}).get("platforms", {}).get("kubernetes"):
        raise UserError(
            f"version {name} of {PIPELINE} on the cluster lacks platforms.kubernetes: somebody uploaded half of it; "
            "delete this version in the UI and run it again"
        )
    return _Version(pipeline_id, version.pipeline_version_id, name)


def _pipeline_id(client: kfp.Client) -> str | None:
    namespace = client.get_user_namespace() or None
    found = _pages(client.list_pipelines, "pipelines", namespace=namespace, filter=_called(PIPELINE))
    return next((one.pipeline_id for one in found if one.display_name == PIPELINE), None)


def _create_pipeline(client: kfp.Client) -> str:
    pipeline = kfp_server_api.V2beta1Pipeline(
        name=PIPELINE,
        display_name=PIPELINE,
        description=DESCRIPTION,
        namespace=client.get_user_namespace() or None,
    )
    # The client's upload_pipeline would make a version called as the pipeline as well.
    with _unless_there_already():
        client.pipelines.pipeline_service_create_pipeline(pipeline=pipeline)
    created = _pipeline_id(client)
    if created is None:
        raise UserError(f"the pipeline {PIPELINE} is not there after it was made; run it again")
    return created


def _find_version(client: kfp.Client, pipeline_id: str, name: str) -> Any:
    found = _pages(client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline_id, filter=_called(name))
    return next((one for one in found if one.display_name == name), None)


def _experiment(client: kfp.Client, name: str) -> str:
    """The id of the experiment, which is made if it is absent."""
    found = _experiment_id(client, name)
    if found is None:
        experiment = kfp_server_api.V2beta1Experiment(display_name=name, namespace=client.get_user_namespace() or None)
        with _unless_there_already():
            client.experiments.experiment_service_create_experiment(experiment=experiment)
        found = _experiment_id(client, name)
    if found is None:
        raise UserError(f"the experiment {name} is not there after it was made; run it again")
    return found


def _experiment_id(client: kfp.Client, name: str) -> str | None:
    namespace = client.get_user_namespace() or None
    found = _pages(client.list_experiments, "experiments", namespace=namespace, filter=_called(name))
    # The API compares names without regard to case, and keeps them apart in the same way.
    return next((one.experiment_id for one in found if one.display_name.lower() == name.lower()), None)


def _recurring_runs(client: kfp.Client, name: str | None = None) -> list[Any]:
    """Those called `name` (None: all), in all experiments, the newest first."""
    found = _pages(
        client.list_recurring_runs,
        "recurring_runs",
        sort_by="created_at desc",
        namespace=client.get_user_namespace() or None,
        filter=_called(name) if name else None,
    )
    # The API compares names without regard to case.
    return [run for run in found if name is None or run.display_name == name]


def _settings(run: Any) -> dict[str, object]:
    cron = (run.trigger.cron_schedule if run.trigger else None) or kfp_server_api.V2beta1CronSchedule()
    return {
        "experiment": run.experiment_id,
        "pipeline": _reference(run).pipeline_id,
        "version": _reference(run).pipeline_version_id,
        "parameters": (run.runtime_config.parameters if run.runtime_config else None) or {},
        "cron": cron.cron,
        "window": (cron.start_time, cron.end_time),
        "mode": run.mode,
        "no_catchup": run.no_catchup,
        "max_concurrency": int(run.max_concurrency or 0),
        "service_account": run.service_account,
    }


def _reference(run: Any) -> Any:
    return run.pipeline_version_reference or kfp_server_api.V2beta1PipelineVersionReference()


def _delete(client: kfp.Client, recurring_run_id: str) -> None:
    # Without ORPHAN, Kubernetes deletes the runs that it started as well, a training under way among them; the
    # client's own delete_recurring_run can't say so.
    try:
        client.recurring_runs.recurring_run_service_delete_recurring_run(
            recurring_run_id=recurring_run_id,
            propagation_policy=kfp_server_api.V2beta1DeletePropagationPolicy.ORPHAN,
        )
    except Refused as error:
        if error.status != 404:  # somebody else deleted it
            raise


def _schedule(client: kfp.Client, run: Any) -> Schedule:
    settings = _settings(run)
    cron = str(settings["cron"] or "-")
    try:
        following = next_times(cron, 1)
    except UserError:  # made by hand in the UI
        following = []
    return Schedule(
        run.display_name,
        cron,
        run.mode == kfp_server_api.RecurringRunMode.ENABLE,
        following[0] if following else None,
        run.recurring_run_id,
        _schedule_address(client, run.recurring_run_id),
    )


def _last_runs(client: kfp.Client, experiment: str, limit: int) -> Iterator[Run]:
    experiment_id = _experiment_id(client, experiment)
    if experiment_id is None:
        return
    runs = _pages(client.list_runs, "runs", sort_by="created_at desc", experiment_id=experiment_id)
    for _, run in zip(range(limit), runs, strict=False):
        # The API gives the start of 1970 for a run that has not finished.
        finished = run.finished_at if run.finished_at and run.finished_at > run.created_at else None
        yield Run(
            run.display_name,
            run.created_at,
            finished,
            run.state or "UNKNOWN",
            _reason(client, run) if run.state == kfp_server_api.V2beta1RuntimeState.FAILED else None,
            run.run_id,
            _address(client, f"runs/details/{run.run_id}"),
        )


def _reason(client: kfp.Client, run: Any) -> str | None:
    """Why a run failed, as far as the API says: its own error, or the tasks that failed."""
    if run.error and run.error.message:
        return str(run.error.message)
    details = run.run_details or client.get_run(run.run_id).run_details
    tasks = (details.task_details if details else None) or []
    failed = [task for task in tasks if task.state == kfp_server_api.V2beta1RuntimeState.FAILED]
    told = [f"{task.display_name}: {task.error.message}" for task in failed if task.error and task.error.message]
    # The root fails with any of its tasks.
    names = sorted({task.display_name for task in failed if task.display_name and task.display_name != "root"})
    return "; ".join(told) or (f"failed: {', '.join(names)}" if names else None)


def _called(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _pages(ask: Callable[..., Any], field: str, **options: Any) -> Iterator[Any]:
    """Every item of a list, page after page; `sort_by` and `filter` stay as they are, as the API demands."""
    token = ""
    while True:
        answer = ask(page_token=token, page_size=PAGE, **options)
        yield from getattr(answer, field) or []
        token = answer.next_page_token or ""
        if not token:
            return


def _address(client: kfp.Client, page: str) -> str:
    """Where the UI shows it; the UI's own address can be told apart by KF_PIPELINES_UI_ENDPOINT, as in the client."""
    ui = os.environ.get("KF_PIPELINES_UI_ENDPOINT") or client._healthz_api.api_client.configuration.host
    return f"{ui.rstrip('/')}/#/{page}"


def _schedule_address(client: kfp.Client, recurring_run_id: str) -> str:
    return _address(client, f"recurringrun/details/{recurring_run_id}")


@contextlib.contextmanager
def _unless_there_already() -> Iterator[None]:
    """Somebody who made the same thing in between is no failure."""
    try:
        yield
    except Refused as error:
        if error.status != 409:
            raise


def _unprinted() -> contextlib.AbstractContextManager[io.StringIO]:
    """The client prints an address after what it makes; ours are printed once, at the end."""
    return contextlib.redirect_stdout(io.StringIO())
