import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file
from braintumor.errors import UserError
from braintumor.params import Params, Rule
from braintumor.steps.gate import gate

MakeFolders = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_store(no_store: Path) -> None:
    """Nothing to publish to."""


def run(folders: Any, params: Params) -> dict[str, Any]:
    """Run the gate, and return what it wrote, whatever the verdict."""
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    content: dict[str, Any] = json.loads((folders.decision / artifacts.DECISION).read_text())
    return content


def failed(decision: dict[str, Any]) -> set[str]:
    return {check["name"] for check in decision["checks"] if not check["passed"]}


def test_a_good_model_passes_and_the_decision_binds_what_was_judged(make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    assert gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate).passed
    decision = run(folders, params)
    metrics = json.loads((folders.evaluation / artifacts.METRICS).read_text())
    assert decision["passed"] is True and failed(decision) == set()
    assert decision["policy"] == params.gate.model_dump()
    assert decision["digests"] == {
        **{name: metrics[name] for name in ("data_md5", "splits_sha256", "model_digest")},
        **{key: metrics[key] for key in map(artifacts.sha256_key, artifacts.JUDGED_FILES)},
        "metrics_sha256": sha256_of_file(folders.evaluation / artifacts.METRICS),
    }
    assert all(
        check.keys() == {"name", "value", "threshold", "required", "passed", "reason"} for check in decision["checks"]
    )


def test_a_weak_model_does_not_pass_and_the_decision_says_why(make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders(n_wrong=20)
    told = gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    assert not told.passed
    assert any("accuracy" in reason for reason in told.failures)
    decision = json.loads((folders.decision / artifacts.DECISION).read_text())
    assert decision["passed"] is False
    assert "min_accuracy" in failed(decision)


def test_figures_with_leaks_never_pass(make_folders: MakeFolders, params: Params) -> None:
    assert failed(run(make_folders(n_wrong=0, protocol="declared"), params)) == {"protocol_allowed"}


def test_figures_of_another_data_version_do_not_pass(make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    folders.edit(folders.context / artifacts.CONTEXT, data_md5="f" * 32)
    decision = run(folders, params)
    assert decision["passed"] is False and failed(decision) == {"current_data"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "null", "true", '"0.99"'])
def test_a_figure_that_is_no_finite_number_does_not_pass(
    number: str, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    file = folders.evaluation / artifacts.METRICS
    accuracy = json.loads(file.read_text())["accuracy"]
    file.write_text(file.read_text().replace(f'"accuracy": {accuracy}', f'"accuracy": {number}'))
    decision = run(folders, params)
    assert decision["passed"] is False and {"complete_and_finite", "min_accuracy"} <= failed(decision)


def test_a_missing_class_does_not_pass(make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    per_class = json.loads((folders.evaluation / artifacts.METRICS).read_text())["per_class"]
    del per_class["meningioma"]
    folders.edit(folders.evaluation / artifacts.METRICS, per_class=per_class)
    assert run(folders, params)["passed"] is False


@pytest.mark.parametrize("name", artifacts.JUDGED_FILES)
@pytest.mark.parametrize("harm", ["changed", "removed"])
def test_files_other_than_those_of_the_metrics_do_not_pass(
    harm: str, name: str, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    file = folders.evaluation / name
    if harm == "changed":
        file.write_bytes(file.read_bytes() + b"\n")
    else:
        file.unlink()
    decision = run(folders, params)
    # An evidence that is gone proves nothing about the champion either.
    gone = {"not_worse_than_champion"} if (harm, name) == ("removed", artifacts.EVIDENCE) else set()
    assert decision["passed"] is False and failed(decision) == {"files_untouched"} | gone


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "\x00"])
def test_metrics_that_can_not_be_read_are_a_user_error_and_leave_no_decision(
    content: str | None, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    file = folders.evaluation / artifacts.METRICS
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(UserError, match="braintumor evaluate"):
        gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    assert not folders.decision.exists()


@pytest.mark.parametrize("value", [None, "", 7])
def test_a_context_without_a_data_version_is_a_user_error(
    value: Any, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    folders.edit(folders.context / artifacts.CONTEXT, data_md5=value)
    with pytest.raises(UserError, match="braintumor resolve"):
        gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    assert not folders.decision.exists()


CHAMPION = {"version": "3", "model_digest": "c" * 64, "data_md5": "d" * 32}


def compare(folders: Any, comparison: Any) -> None:
    """The evaluation holds this comparison, and its metrics name it."""
    folders.edit(folders.evaluation / artifacts.EVIDENCE, comparison=comparison)
    digest = sha256_of_file(folders.evaluation / artifacts.EVIDENCE)
    folders.edit(folders.evaluation / artifacts.METRICS, evidence_sha256=digest)


def test_a_model_that_is_worse_than_the_champion_passes_only_where_that_is_not_required(
    make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    folders.edit(folders.context / artifacts.CONTEXT, champion=CHAMPION)
    compare(folders, {"verdict": "worse", "reason": "it knows less", "champion": "3"})
    decision = run(folders, params)
    assert decision["passed"] is True and failed(decision) == {"not_worse_than_champion"}
    required = params.gate.model_copy(update={"not_worse_than_champion": Rule(required=True)})
    decision = run(folders, params.model_copy(update={"gate": required}))
    assert decision["passed"] is False and failed(decision) == {"not_worse_than_champion"}
    figures = {"accuracy": {"interval": [0.01, 0.03]}}
    compare(folders, {"verdict": "better", "reason": "it knows more", "champion": "3", "figures": figures})
    assert failed(run(folders, params)) == set()


def test_a_comparison_made_before_the_champion_changed_does_not_pass(make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    folders.edit(folders.context / artifacts.CONTEXT, champion=CHAMPION)
    assert failed(run(folders, params)) == {"not_worse_than_champion"}


def test_an_evaluation_without_a_comparison_does_not_pass(make_folders: MakeFolders, params: Params) -> None:
    folders = make_folders()
    compare(folders, None)
    assert failed(run(folders, params)) == {"not_worse_than_champion"}


@pytest.mark.parametrize("champion", ["3", 3, [], {}, {"version": None}, {"version": 3}, {"version": ""}, False])
def test_a_context_that_does_not_name_the_champion_is_a_user_error(
    champion: Any, make_folders: MakeFolders, params: Params
) -> None:
    folders = make_folders()
    folders.edit(folders.context / artifacts.CONTEXT, champion=champion)
    with pytest.raises(UserError, match="braintumor resolve"):
        gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    assert not folders.decision.exists()


def test_mlflow_that_is_away_does_not_keep_the_gate_from_deciding(
    make_folders: MakeFolders, params: Params, no_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_folders()
    assert gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate).passed
    assert (folders.decision / artifacts.DECISION).is_file()
    assert no_server in capsys.readouterr().err
