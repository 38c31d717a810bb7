import hashlib
import importlib.util
import json
import re
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import kfp
import pytest
import yaml

from braintumor.errors import UserError
from pipelines import cluster, connection
from pipelines.cluster import schedule, status, submit, unschedule
from pipelines.connection import connect

ROOT = Path(__file__).parents[2]
API = "/apis/v2beta1"
NAME, CRON, OTHER_CRON = "nightly", "0 0 2 * * *", "0 30 4 * * 1-5"
SETTINGS: dict[str, str] = {"experiment": "retraining", "service_account": "braintumor-pipeline"}
PARAMETERS = {"dataset": "latest", "force": False}
PIPELINE_SPEC = """\
# PIPELINE DEFINITION
components: {}
deploymentSpec: {}
pipelineInfo:
  name: brain-tumor-retraining
root:
  inputDefinitions:
    parameters:
      dataset: {parameterType: STRING}
      force: {parameterType: BOOLEAN}
schemaVersion: 2.1.0
sdkVersion: kfp-2.17.0
"""
PLATFORM_SPEC = "platforms:\n  kubernetes:\n    deploymentSpec:\n      executors: {exec-train: {}}\n"
PACKAGE = f"{PIPELINE_SPEC}---\n{PLATFORM_SPEC}"
ROOT_INPUTS = yaml.safe_load(PIPELINE_SPEC)["root"]
OTHER_PACKAGE = PACKAGE.replace("exec-train", "exec-training")


@pytest.fixture(scope="session")
def kfp_api() -> ModuleType:
    """The stand-in's module."""
    spec = importlib.util.spec_from_file_location("kfp_api", Path(__file__).with_name("kfp_api.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kfp_api"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TOKEN", "UI_ENDPOINT"):
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)


@pytest.fixture
def serve(kfp_api: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Start stand-ins with these settings; the last one is the cluster in use."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(**settings: Any) -> Any:
            api = stack.enter_context(kfp_api.KfpApi(**settings).serving())
            monkeypatch.setenv("KF_PIPELINES_ENDPOINT", api.address)
            return api

        yield start


@pytest.fixture
def api(serve: Callable[..., Any]) -> Any:
    return serve()


def make_schedule(client: kfp.Client, package: str = PACKAGE, **changes: Any) -> cluster.Scheduled:
    settings: dict[str, Any] = {"name": NAME, "cron": CRON, **SETTINGS} | changes
    return schedule(client, package, settings.pop("parameters", PARAMETERS), **settings)


def is_as_wanted(api: Any, cron: str = CRON) -> bool:
    """Exactly one recurring run of the name: enabled, with this cron, no catch-up, one at a time."""
    found = [run for run in api.recurring_runs.values() if run["display_name"] == NAME]
    return [
        (run["mode"], run["trigger"]["cron_schedule"]["cron"], run.get("no_catchup"), run["max_concurrency"])
        for run in found
    ] == [("ENABLE", cron, True, "1")]


# --- Connecting


def test_no_cluster_is_one_message(closed_port: int) -> None:
    with pytest.raises(UserError, match=rf"no cluster answers at http://127.0.0.1:{closed_port};"):
        connect(f"http://127.0.0.1:{closed_port}")


@pytest.mark.parametrize(
    ("front", "told"),
    [
        ("html", "answers with a web page"),
        ("redirect", "sends on to another page, to sign in"),
        ("gateway", "answers 503"),
    ],
)
def test_what_stands_before_the_api_is_told_from_it(serve: Callable[..., Any], front: str, told: str) -> None:
    serve(front=front)
    with pytest.raises(UserError, match=told):
        connect()


def test_a_server_that_never_answers_is_given_up(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert connection.CONNECT_SECONDS + connection.FIRST_ANSWER_SECONDS <= 15
    monkeypatch.setattr(connection, "FIRST_ANSWER_SECONDS", 0.3)
    serve(front="hang")
    started = time.monotonic()
    with pytest.raises(UserError, match="did not answer in time"):
        connect()
    assert time.monotonic() - started < 3


def test_an_expired_token_is_refused_and_not_shown(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    serve(token="fresh")
    with pytest.raises(UserError, match=r"refuses access \(401\); set a token in KF_PIPELINES_TOKEN"):
        connect()
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "stale-token")
    with pytest.raises(UserError, match=r"\(401\); the token in KF_PIPELINES_TOKEN has expired") as error:
        connect()
    assert "stale-token" not in str(error.value)
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "fresh\n")
    connect()


@pytest.mark.parametrize("token", ["Bearer abc", "ab\ncd", "tökén"])
def test_a_token_that_no_header_can_hold_is_refused(api: Any, token: str) -> None:
    with pytest.raises(UserError, match="KF_PIPELINES_TOKEN holds characters"):
        connect(token=token)
    assert not api.requests


def test_a_certificate_of_unknown_authority_is_refused_until_it_is_named(
    kfp_api: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with kfp_api.KfpApi().serving(context) as api:
        with pytest.raises(UserError, match="SSL_CERT_FILE"):
            connect(api.address)
        assert not api.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        connect(api.address)


def make_certificate(folder: Path) -> Path:
    """A key and a certificate of its own for 127.0.0.1, in one file."""
    from datetime import timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    plain = serialization.NoEncryption()
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file


def test_nothing_is_read_from_or_written_to_the_home_folder(
    serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = serve(multi_user=True)
    context = tmp_path / "context.json"
    content = json.dumps({"namespace": "theirs", "client_authentication_cookie": "session=secret"})
    context.write_text(content)
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(context))
    monkeypatch.setenv("KF_PIPELINES_IAP_OAUTH2_CLIENT_ID", "an-id")  # would start a sign-in with Google
    client = connect(namespace="team-a")
    submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    assert context.read_text() == content
    assert not [headers for headers in api.headers if "cookie" in headers]
    assert client.get_user_namespace() == "team-a"


def test_a_namespace_is_needed_with_several_users_and_refused_with_one(serve: Callable[..., Any]) -> None:
    serve(multi_user=True)
    with pytest.raises(UserError, match="say whose namespace with --namespace"):
        connect()
    client = connect(namespace="team-b")
    with pytest.raises(UserError, match="not authorized in namespace team-b; ask for rights"):
        submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    serve()
    with pytest.raises(UserError, match="leave out --namespace"):
        connect(namespace="team-a")


# --- Submitting


def test_submit_uploads_both_documents_and_starts_a_run_of_that_version(
    api: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted = submit(connect(), PACKAGE, PARAMETERS, name="by hand", **SETTINGS)
    assert api.uploads == [PACKAGE]
    [version] = api.versions.values()
    [run] = api.runs.values()
    [pipeline] = api.pipelines.values()
    [experiment] = api.experiments.values()
    assert (pipeline["display_name"], experiment["display_name"]) == ("brain-tumor-retraining", "retraining")
    assert re.fullmatch("[0-9a-f]{32}", version["display_name"])
    assert run["pipeline_version_reference"] == {
        "pipeline_id": pipeline["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }
    assert run["experiment_id"] == experiment["experiment_id"]
    assert run["runtime_config"] == {"parameters": PARAMETERS}
    assert (run["display_name"], run["service_account"]) == ("by hand", "braintumor-pipeline")
    assert submitted.address == f"{api.address}/#/runs/details/{run['run_id']}"
    assert capsys.readouterr().out == ""


def test_the_same_package_is_uploaded_once_and_another_one_becomes_another_version(api: Any) -> None:
    client = connect()
    names = [submit(client, package, PARAMETERS, **SETTINGS).version for package in (PACKAGE, PACKAGE, OTHER_PACKAGE)]
    assert names[0] == names[1] != names[2]
    assert len(api.uploads) == 2
    assert (len(api.pipelines), len(api.experiments), len(api.runs)) == (1, 1, 3)


def test_what_somebody_else_makes_at_the_same_moment_is_used(api: Any) -> None:
    def upload(api: Any) -> None:
        [pipeline] = api.pipelines
        spec = {"pipeline_spec": {"root": ROOT_INPUTS}, "platform_spec": {"platforms": {"kubernetes": {"a": 1}}}}
        version = {"pipeline_id": pipeline, "pipeline_version_id": "theirs", "created_at": "2026-06-12T00:00:00Z"}
        api.versions["theirs"] = version | {"display_name": digest, "pipeline_spec": spec}

    digest = hashlib.sha256(PACKAGE.encode()).hexdigest()[:32]
    api.before = {
        f"POST {API}/pipelines": lambda api: api.create_pipeline({"display_name": "brain-tumor-retraining"}),
        f"POST {API}/experiments": lambda api: api.create_experiment({"display_name": "retraining"}),
        f"POST {API}/pipelines/upload_version": upload,
    }
    submit(connect(), PACKAGE, PARAMETERS, **SETTINGS)
    assert not api.before
    [run] = api.runs.values()
    assert run["pipeline_version_reference"] == {
        "pipeline_id": next(iter(api.pipelines)),
        "pipeline_version_id": "theirs",
    }
    assert (len(api.pipelines), len(api.experiments), api.uploads) == (1, 1, [])


def test_the_address_of_the_ui_may_be_another_than_that_of_the_api(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example/pipeline/")
    submitted = submit(connect(), PACKAGE, PARAMETERS, **SETTINGS)
    assert submitted.address == f"https://kubeflow.example/pipeline/#/runs/details/{submitted.run_id}"


@pytest.mark.parametrize(
    "package", [PIPELINE_SPEC, PLATFORM_SPEC, f"{PIPELINE_SPEC}---\nplatforms: {{}}\n", "a: [", ""]
)
def test_half_a_package_is_refused_before_anything_is_sent(api: Any, package: str) -> None:
    client = connect()
    asked = len(api.requests)
    with pytest.raises(UserError):
        submit(client, package, PARAMETERS, **SETTINGS)
    assert len(api.requests) == asked


def test_a_version_on_the_cluster_that_lost_its_second_document_is_refused(api: Any) -> None:
    client = connect()
    submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    [version] = api.versions.values()
    version["pipeline_spec"] = version["pipeline_spec"]["pipeline_spec"]
    with pytest.raises(UserError, match=r"lacks platforms\.kubernetes"):
        submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    assert len(api.runs) == 1


def test_what_the_api_refuses_is_told_in_its_own_words(api: Any) -> None:
    with pytest.raises(UserError, match=r"refuses it \(400\): .*parameter epochs is not found"):
        submit(connect(), PACKAGE, {"epochs": "3"}, **SETTINGS)


def test_a_run_is_not_started_twice_when_the_answer_is_lost(api: Any) -> None:
    client = connect()
    submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    # The last request of a submit is the one that starts the run.
    asked = len(api.requests)
    submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    needed = len(api.requests) - asked
    api.faults = {len(api.requests) + needed: "lose"}
    with pytest.raises(UserError, match="look at 'braintumor pipeline status'"):
        submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    assert len(api.runs) == 3


# --- Scheduling


def test_schedule_makes_one_recurring_run_and_the_same_again_changes_nothing(api: Any) -> None:
    client = connect()
    first = make_schedule(client)
    assert is_as_wanted(api)
    [run] = api.recurring_runs.values()
    assert run["service_account"] == "braintumor-pipeline"
    assert first.address == f"{api.address}/#/recurringrun/details/{run['recurring_run_id']}"
    asked = len(api.requests)
    second = make_schedule(client)
    assert [request for request in api.requests[asked:] if not request.startswith("GET")] == []
    assert (first.is_new, second.is_new, second.removed) == (True, False, 0)
    assert second.recurring_run_id == first.recurring_run_id


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "DISABLE"},
        {"max_concurrency": "3"},
        {"no_catchup": False},
        {"service_account": "pipeline-runner"},
        {"runtime_config": {"parameters": {"dataset": "latest", "force": True}}},
        {"trigger": {"cron_schedule": {"cron": OTHER_CRON}}},
        {"trigger": {"cron_schedule": {"cron": CRON, "end_time": "2026-01-01T00:00:00Z"}}},
        {"trigger": {"periodic_schedule": {"interval_second": "60"}}},
        {"pipeline_version_reference": None},
        {"runtime_config": None},
        {"experiment_id": "another"},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_recurring_run_that_differs_in_anything_is_replaced(api: Any, change: dict[str, Any]) -> None:
    client = connect()
    old = make_schedule(client)
    api.recurring_runs[old.recurring_run_id] |= change
    new = make_schedule(client)
    assert is_as_wanted(api)
    assert (new.is_new, new.removed) == (True, 1)


def test_another_package_replaces_the_recurring_run(api: Any) -> None:
    client = connect()
    make_schedule(client)
    new = make_schedule(client, OTHER_PACKAGE)
    [run] = api.recurring_runs.values()
    assert run["recurring_run_id"] == new.recurring_run_id
    assert run["pipeline_version_reference"]["pipeline_version_id"] == list(api.versions)[1]


def test_what_interruptions_left_over_is_removed_on_every_page_and_other_names_stay(api: Any) -> None:
    client = connect()
    kept = make_schedule(client)
    for name in ("other", NAME.upper()):
        add_copy(api, kept.recurring_run_id, display_name=name)
    for number in range(2 * api.page_limit):
        add_copy(api, kept.recurring_run_id, mode="DISABLE" if number % 2 else "ENABLE")
    add_copy(api, kept.recurring_run_id, trigger={"cron_schedule": {"cron": OTHER_CRON}})
    scheduled = make_schedule(client)
    assert is_as_wanted(api)
    assert scheduled.removed == 2 * api.page_limit + 1
    assert sorted(run["display_name"] for run in api.recurring_runs.values()) == ["NIGHTLY", NAME, "other"]


def add_copy(api: Any, key: str, **changes: Any) -> None:
    new = f"copy-{len(api.recurring_runs)}"
    api.recurring_runs[new] = api.recurring_runs[key] | {"recurring_run_id": new} | changes


def requests_of_a_replacement(kfp_api: ModuleType) -> int:
    """How many requests it takes to put a schedule in place of another one, with a new package."""
    with kfp_api.KfpApi().serving() as api:
        client = connect(api.address)
        make_schedule(client)
        before = len(api.requests)
        make_schedule(client, OTHER_PACKAGE, cron=OTHER_CRON, experiment="new")
        return len(api.requests) - before


@pytest.mark.parametrize("fault", ["500", "drop", "lose"])
def test_a_schedule_that_is_interrupted_anywhere_is_never_gone_and_the_next_try_leaves_one(
    kfp_api: ModuleType, fault: str
) -> None:
    needed = requests_of_a_replacement(kfp_api)
    assert needed >= 10
    for number in range(1, needed + 1):
        with kfp_api.KfpApi().serving() as api:
            client = connect(api.address)
            make_schedule(client)
            before = len(api.requests)
            api.faults = {before + number: fault}
            with pytest.raises(UserError):
                make_schedule(client, OTHER_PACKAGE, cron=OTHER_CRON, experiment="new")
            assert len(api.requests) == before + number
            make_schedule(connect(api.address), OTHER_PACKAGE, cron=OTHER_CRON, experiment="new")
            assert is_as_wanted(api, OTHER_CRON)
            assert all(enabled[NAME] >= 1 for enabled in api.enabled_after[before:])
            assert (len(api.pipelines), len(api.versions), len(api.experiments)) == (1, 2, 2)


def test_a_first_schedule_that_is_interrupted_anywhere_is_finished_by_the_next_try(kfp_api: ModuleType) -> None:
    with kfp_api.KfpApi().serving() as api:
        make_schedule(connect(api.address))
        needed = len(api.requests)
    for number in range(2, needed + 1):  # the first one is the connection's
        with kfp_api.KfpApi(faults={number: "lose"}).serving() as api:
            with pytest.raises(UserError):
                make_schedule(connect(api.address))
            make_schedule(connect(api.address))
            assert is_as_wanted(api)
            assert (len(api.pipelines), len(api.versions), len(api.experiments)) == (1, 1, 1)


def test_replacing_and_removing_a_schedule_lets_a_run_under_way_go_on(api: Any) -> None:
    client = connect()
    old = make_schedule(client)
    run = submit(client, PACKAGE, PARAMETERS, **SETTINGS)
    api.runs[run.run_id] |= {"state": "RUNNING", "recurring_run_id": old.recurring_run_id}
    new = make_schedule(client, cron=OTHER_CRON)
    assert api.runs[run.run_id]["state"] == "RUNNING"
    api.runs[run.run_id]["recurring_run_id"] = new.recurring_run_id
    unschedule(client, NAME)
    assert api.runs[run.run_id]["state"] == "RUNNING"


def test_two_people_who_schedule_at_once_are_told_and_neither_loses_the_schedule(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    make_schedule(client)
    create = kfp.Client.create_recurring_run

    def create_beside_another(self: kfp.Client, *arguments: Any, **options: Any) -> Any:
        created = create(self, *arguments, **options)
        add_copy(api, created.recurring_run_id)
        return created

    monkeypatch.setattr(kfp.Client, "create_recurring_run", create_beside_another)
    with pytest.raises(UserError, match="2 recurring runs are called so"):
        make_schedule(client, cron=OTHER_CRON)
    assert len(api.enabled(NAME)) == 2
    make_schedule(client, cron=OTHER_CRON)
    assert is_as_wanted(api, OTHER_CRON)


@pytest.mark.parametrize("name", ["", "Nightly", "a b", "-a", "a" * 64, "nächtlich", "a\n"])
def test_a_name_that_kubernetes_would_change_is_refused(api: Any, name: str) -> None:
    with pytest.raises(UserError, match="the name of a schedule"):
        make_schedule(connect(), name=name)
    assert not api.recurring_runs


def test_unschedule_removes_all_of_the_name_and_says_how_many(api: Any) -> None:
    client = connect()
    kept = make_schedule(client)
    add_copy(api, kept.recurring_run_id, mode="DISABLE")
    add_copy(api, kept.recurring_run_id, display_name="other")
    assert unschedule(client, NAME) == 2
    assert unschedule(client, NAME) == 0
    assert [run["display_name"] for run in api.recurring_runs.values()] == ["other"]


def test_a_recurring_run_that_somebody_else_deletes_first_is_no_failure(api: Any) -> None:
    client = connect()
    old = make_schedule(client)
    key = old.recurring_run_id
    api.before[f"DELETE {API}/recurringruns/{key}"] = lambda api: api.recurring_runs.pop(key)
    make_schedule(client, cron=OTHER_CRON)
    assert is_as_wanted(api, OTHER_CRON)


def test_schedules_of_a_user_are_apart_from_those_of_another(serve: Callable[..., Any]) -> None:
    api = serve(multi_user=True, namespaces=("team-a", "team-b"))
    for namespace in ("team-a", "team-b"):
        make_schedule(connect(namespace=namespace))
    assert sorted(run["namespace"] for run in api.recurring_runs.values()) == ["team-a", "team-b"]
    assert len(api.pipelines) == 2
    assert unschedule(connect(namespace="team-a"), NAME) == 1
    assert [run["namespace"] for run in api.recurring_runs.values()] == ["team-b"]


# --- Looking


def finished(api: Any, run_id: str, minute: int, state: str = "SUCCEEDED", **more: Any) -> None:
    api.runs[run_id] |= {
        "created_at": f"2026-06-12T02:{minute:02}:00Z",
        "finished_at": f"2026-06-12T03:{minute:02}:05Z",
        "state": state,
        **more,
    }


def test_status_of_an_empty_cluster_makes_nothing(api: Any) -> None:
    found = status(connect(), "retraining")
    assert (found.schedules, found.runs) == ([], [])
    assert all(request.startswith("GET") for request in api.requests)


def test_status_lists_the_pipelines_schedules_with_their_next_time(api: Any) -> None:
    client = connect()
    kept = make_schedule(client)
    add_copy(api, kept.recurring_run_id, display_name="by hand", trigger={"cron_schedule": {"cron": "@daily"}})
    add_copy(api, kept.recurring_run_id, display_name="asleep", mode="DISABLE")
    add_copy(api, kept.recurring_run_id, display_name="theirs", pipeline_version_reference={"pipeline_id": "other"})
    found = {one.name: one for one in status(client, "retraining").schedules}
    assert list(found) == ["asleep", "by hand", NAME]
    assert (found["asleep"].is_enabled, found[NAME].is_enabled) == (False, True)
    assert found["by hand"].next_time is None
    following = found[NAME].next_time
    assert following is not None
    assert (following.hour, following.minute, following.tzinfo) == (2, 0, UTC)


def test_status_shows_the_last_runs_first_and_why_they_failed(api: Any) -> None:
    client = connect()
    ids = [submit(client, PACKAGE, PARAMETERS, name=f"run {n}", **SETTINGS).run_id for n in range(5)]
    failed = {"state": "FAILED", "display_name": "train", "error": {"code": 13, "message": "OOMKilled"}}
    root = {"state": "FAILED", "display_name": "root"}
    finished(api, ids[0], 0)
    finished(api, ids[1], 1, "FAILED", run_details={"task_details": [root, failed]})
    finished(api, ids[2], 2, "FAILED", error={"code": 3, "message": "no such service account"})
    finished(api, ids[3], 3, "FAILED", run_details={"task_details": [root, failed | {"error": None}]})
    finished(api, ids[4], 4, "RUNNING", finished_at="1970-01-01T00:00:00Z")
    runs = status(client, "retraining", limit=4).runs
    assert [run.name for run in runs] == ["run 4", "run 3", "run 2", "run 1"]
    assert [run.reason for run in runs] == [None, "failed: train", "no such service account", "train: OOMKilled"]
    assert runs[0].finished is None
    assert runs[1].created == datetime(2026, 6, 12, 2, 3, tzinfo=UTC)
    assert runs[1].finished == datetime(2026, 6, 12, 3, 3, 5, tzinfo=UTC)
    assert status(client, "another").runs == []


# --- The commands

Command = Callable[..., Any]


def test_the_commands_schedule_show_and_unschedule(
    braintumor: Command, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    image = ("--image", "braintumor:1.0")
    scheduled = braintumor("pipeline", "schedule", "--profile", "sample", *image, "--cron", CRON, "--name", NAME)
    assert scheduled.code == 0, scheduled.err
    assert is_as_wanted(api)
    lines = [line.split() for line in scheduled.out.splitlines() if re.match(r"\w{3} \d{4}-", line)]
    assert len(lines) == 5
    assert all((line[2], line[5], line[6]) == ("02:00:00", "11:00:00", "JST") for line in lines)
    assert f"{api.address}/#/recurringrun/details/" in scheduled.out
    submitted = braintumor("pipeline", "submit", *image, "--dataset", "0123456789abcdef" * 2, "--force")
    assert submitted.code == 0, submitted.err
    [run] = api.runs.values()
    assert run["runtime_config"]["parameters"] == {"dataset": "0123456789abcdef" * 2, "force": True}
    assert f"{api.address}/#/runs/details/{run['run_id']}" in submitted.out
    assert len(api.versions) == 1  # params.yaml is the sample's profile
    shown = braintumor("pipeline", "status")
    assert NAME in shown.out and CRON in shown.out and "PENDING" in shown.out
    told = json.loads(braintumor("pipeline", "status", "--json").out)
    assert [one["name"] for one in told["schedules"]] == [NAME]
    assert [one["run_id"] for one in told["runs"]] == [run["run_id"]]
    assert braintumor("pipeline", "unschedule", "--name", NAME).code == 0
    assert not api.recurring_runs
    again = braintumor("pipeline", "unschedule", "--name", NAME)
    assert (again.code, again.out) == (0, f"{NAME} was not scheduled; nothing to do\n")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--cron": "0 2 * * *"}, "write '0 0 2 * * *'"),
        ({"--cron": "0 0 0 30 2 *"}, "never comes"),
        ({"--profile": "nightly"}, "there is no profile nightly; choose one of"),
        ({"--params": "missing.yaml", "--profile": None}, "missing.yaml is missing"),
        ({"--params": "params/reference.yaml"}, "leave one of them out"),
        ({"--image": "braintumor"}, "neither a tag nor a digest"),
        ({"--dataset": "data"}, "no pod can open"),
        ({"--name": "Nightly Run"}, "the name of a schedule"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_on_the_command_line_is_one_message_and_nothing_is_made(
    braintumor: Command, api: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], told: str
) -> None:
    monkeypatch.chdir(ROOT)
    options = {"--profile": "sample", "--image": "braintumor:1.0", "--cron": CRON, "--name": NAME} | changes
    arguments = [part for option, value in options.items() if value is not None for part in (option, value)]
    ended = braintumor("pipeline", "schedule", *arguments)
    assert ended.code == 2
    assert told in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not api.pipelines


def test_no_cluster_is_one_message_of_every_command(
    braintumor: Command, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    image = ("--image", "braintumor:1.0")
    for arguments in (("submit", *image), ("schedule", *image, "--cron", CRON), ("status",), ("unschedule",)):
        ended = braintumor("pipeline", *arguments)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("Error: no cluster answers at")
        assert len(ended.err.splitlines()) == 1
