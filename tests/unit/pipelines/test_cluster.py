import json
from datetime import UTC, datetime

import pytest

from braintumor.errors import UserError
from pipelines.cluster import Run, Schedule, Status, run_parameters, show_status
from pipelines.connection import connect

NOW = datetime(2026, 6, 12, 12, tzinfo=UTC)
SCHEDULE = Schedule("nightly", "0 0 2 * * *", True, datetime(2026, 6, 13, 2, tzinfo=UTC), "r1", "http://ui/#/r1")
FAILED = Run(
    "last night",
    datetime(2026, 6, 12, 2, tzinfo=UTC),
    datetime(2026, 6, 12, 5, 4, 3, tzinfo=UTC),
    "FAILED",
    "train: OOMKilled\nand more",
    "1",
    "http://ui/#/1",
)
UNDER_WAY = Run("by [hand]", datetime(2026, 6, 12, 11, tzinfo=UTC), None, "RUNNING", None, "2", "http://ui/#/2")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TOKEN"):
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)


def test_without_an_endpoint_the_message_says_how_to_get_one() -> None:
    with pytest.raises(UserError, match=r"KF_PIPELINES_ENDPOINT is not set.*kubectl port-forward"):
        connect()


@pytest.mark.parametrize(
    "endpoint",
    [
        "kubeflow.example",
        "ftp://kubeflow",
        "http://",
        "http://[::1",
        "http://a b",
        "http://host:0",
        "http://hôst",
        "http://h:99999",
    ],
)
def test_an_endpoint_that_is_no_address_is_refused_at_once(endpoint: str) -> None:
    with pytest.raises(UserError, match="needs http:// or https://"):
        connect(endpoint)


@pytest.mark.parametrize("endpoint", ["https://ann:hunter2@host", "http://host/#/runs", "http://host/?token=hunter2"])
def test_an_endpoint_with_a_secret_or_a_page_is_refused_without_showing_it(endpoint: str) -> None:
    with pytest.raises(UserError) as error:
        connect(endpoint)
    assert "KF_PIPELINES_ENDPOINT" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("dataset", ["data", "../data", "LATEST", "0" * 31, "s3://bucket/data", "", "/"])
def test_a_dataset_that_no_pod_can_open_is_refused(dataset: str) -> None:
    with pytest.raises(UserError, match="--dataset"):
        run_parameters(dataset, force=False)


@pytest.mark.parametrize("dataset", ["latest", "0123456789abcdef" * 2, "/data"])
def test_the_arguments_are_the_dataset_and_whether_to_train_anyway(dataset: str) -> None:
    assert run_parameters(dataset, force=True) == {"dataset": dataset, "force": True}


def test_the_table_shows_durations_until_now_and_the_first_line_of_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    show_status(Status([SCHEDULE], [UNDER_WAY, FAILED]), NOW)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "nightly 0 0 2 * * * yes 2026-06-13 02:00:00" in lines
    assert "by [hand] 2026-06-12 11:00:00 RUNNING 1:00:00" in lines
    assert "last night 2026-06-12 02:00:00 FAILED 3:04:03" in lines
    assert lines[lines.index("last night http://ui/#/1") + 1] == "train: OOMKilled"
    assert "and more" not in " ".join(lines)


def test_an_empty_status_names_the_commands_that_fill_it(capsys: pytest.CaptureFixture[str]) -> None:
    show_status(Status([], []))
    told = capsys.readouterr().out
    assert "braintumor pipeline schedule" in told
    assert "braintumor pipeline submit" in told


def test_the_json_holds_the_same_with_times_in_iso_8601() -> None:
    told = json.loads(Status([SCHEDULE], [UNDER_WAY, FAILED]).as_json())
    assert told["schedules"][0]["next_time"] == "2026-06-13T02:00:00+00:00"
    assert told["runs"][0]["finished"] is None
    assert told["runs"][1]["reason"] == "train: OOMKilled\nand more"
