from pathlib import Path

import pytest
from flask import Flask

from braintumor.errors import UserError
from braintumor.registry.ledger import LEDGER_OF, ROOT, experiment_name
from braintumor.registry.provisioning import read_passwords, read_users
from braintumor.registry.rights import (
    LEDGER_TAG,
    ROLES,
    ServerRights,
    alias_problem,
    is_judged_file,
    is_ledger_name,
    may_write_tag,
    server_rights,
    signature,
)

# What MLflow's registry can be asked for, and what of it can neither promote nor touch what a promotion is made of.
HARMLESS = {
    "getRegisteredModel", "searchRegisteredModels", "getLatestVersions", "getModelVersion", "searchModelVersions",
    "getModelVersionDownloadUri", "getModelVersionByAlias", "updateRegisteredModel", "transitionModelVersionStage",
}  # fmt: skip
JUDGED = {
    "createRegisteredModel", "renameRegisteredModel", "deleteRegisteredModel", "createModelVersion",
    "updateModelVersion", "deleteModelVersion", "setRegisteredModelTag", "setModelVersionTag",
    "deleteRegisteredModelTag", "deleteModelVersionTag", "setRegisteredModelAlias", "deleteRegisteredModelAlias",
}  # fmt: skip


@pytest.mark.parametrize(
    "alias", ["champion", "challenger", "champion-2", "champions", "previous-champion", "x", "v_1"]
)
def test_an_alias_that_nobody_takes_for_champion_is_free(alias: str) -> None:
    assert alias_problem(alias) is None


@pytest.mark.parametrize(
    "alias",
    ["", " ", "Champion", "champion ", "champion\n", "champ1on", "CHAMP10N", "champlon", "c-h_ampion",
     "\u0441hampion", "\uff43hampion", "caf\u00e9", "a/b"],
)  # fmt: skip
def test_an_alias_that_somebody_could_take_for_champion_is_not(alias: str) -> None:
    assert "may not be set" in (alias_problem(alias) or "")


@pytest.mark.parametrize(
    ("key", "writers"),
    [
        ("data_md5", set(ROLES) | {"nobody"}),
        ("demotion.by", set(ROLES) | {"nobody"}),
        ("promotion.reason", {"reviewer", "promoter"}),
        ("promotion.override", {"reviewer", "promoter"}),
        ("promotion.outcome", {"promoter"}),
        ("Promotion.Reason", {"promoter"}),
        ("\uff50romotion.reason", {"promoter"}),
        ("promotion.by", set()),
        ("promotion.BY ", set()),
    ],
)
def test_each_tag_has_its_writers(key: str, writers: set[str]) -> None:
    assert {role for role in (*ROLES, "nobody") if may_write_tag(key, [role])} == writers


def test_the_promoter_alone_deletes_a_signature() -> None:
    assert [role for role in ROLES if may_write_tag("promotion.by", [role], is_deleted=True)] == ["promoter"]


def test_the_ledger_is_known_by_the_names_that_it_has() -> None:
    assert is_ledger_name(experiment_name("brain-tumor"))
    assert is_ledger_name(f"{experiment_name('brain-tumor')} (beginning 0123)")
    assert is_ledger_name("Brain-Tumor PROMOTIONS ")
    assert not is_ledger_name("brain-tumor")
    assert not is_ledger_name("promotions of last year")
    assert LEDGER_OF.startswith(LEDGER_TAG) and ROOT.startswith(LEDGER_TAG)


@pytest.mark.parametrize(
    ("path", "is_judged"),
    [
        ("artifacts/gate/decision.json", True),
        ("artifacts/evaluation", True),
        ("artifacts/evaluation/report.html", True),
        ("artifacts/card/model_card.json", True),
        ("artifacts/training/training.json", True),
        ("artifacts/data/data_docs/index.html", False),
        ("artifacts/notes.txt", False),
        ("artifacts", True),
        ("", True),
        ("other/data/x", True),
    ],
)
def test_a_promotion_rests_on_what_the_steps_have_judged(path: str, is_judged: bool) -> None:
    assert is_judged_file(path.split("/") if path else []) is is_judged


def test_a_signature_names_its_user_and_is_never_the_same() -> None:
    assert signature("alice").startswith("alice at 20")
    assert signature("alice") != signature("alice")


def test_a_database_tells_no_rights(no_store: Path) -> None:
    assert server_rights() is None
    assert not no_store.exists()


def test_rights_follow_from_the_roles() -> None:
    reviewer, promoter, pipeline = (ServerRights("x", (role,)) for role in ("reviewer", "promoter", "pipeline"))
    assert (reviewer.may_promote, promoter.may_promote, pipeline.may_promote) == (True, True, False)
    assert (reviewer.may_record, promoter.may_record, pipeline.may_record) == (False, True, False)


def test_mlflows_registry_can_do_nothing_that_was_not_judged() -> None:
    from mlflow.protos.model_registry_pb2 import DESCRIPTOR

    calls = {method.name for method in DESCRIPTOR.services_by_name["ModelRegistryService"].methods}
    assert calls == HARMLESS | JUDGED


def test_mlflows_graph_changes_nothing() -> None:
    from mlflow.server.graphql.graphql_schema_extensions import schema

    mutation = schema.graphql_schema.mutation_type
    assert mutation is not None and set(mutation.fields) == {"mlflowSearchRuns", "mlflowSearchDatasets", "testMutation"}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MLFLOW_ENABLE_WORKSPACES", "true", "knows no workspaces"),
        ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "true", "can't watch jobs"),
        ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false", "serves SetRegisteredModelAlias otherwise"),
    ],
)
def test_a_server_that_can_not_be_guarded_does_not_come_up(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    from mlflow.exceptions import MlflowException

    from braintumor.registry.rights_guard import refuse_unknown_mlflow

    monkeypatch.setenv(name, value)
    with pytest.raises(MlflowException, match=told):
        refuse_unknown_mlflow(Flask("empty"))


def test_another_major_version_of_mlflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.server import app

    from braintumor.registry import rights_guard

    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    rights_guard.refuse_unknown_mlflow(app)
    monkeypatch.setattr(rights_guard, "VERSION", "4.0.0")
    with pytest.raises(MlflowException, match=r"made for MLflow 3, and this is 4\.0\.0"):
        rights_guard.refuse_unknown_mlflow(app)


def test_mlflow_takes_uploads_by_the_routes_that_are_known_and_no_others() -> None:
    from fastapi import FastAPI
    from mlflow.exceptions import MlflowException
    from mlflow.server.fastapi_app import create_fastapi_app

    from braintumor.registry.rights_guard import watch_uploads

    async def store(artifact: str) -> None:
        raise AssertionError(artifact)

    known = create_fastapi_app(Flask("empty"))
    n_before = len(known.user_middleware)
    watch_uploads(known)
    assert len(known.user_middleware) == n_before + 1
    # A middleware that comes too late would never be asked.
    known.middleware_stack = known.build_middleware_stack()
    more = create_fastapi_app(Flask("empty"))
    more.post("/api/4.0/artifacts/{artifact:path}")(store)
    for app in (known, more, FastAPI()):
        with pytest.raises(MlflowException, match="takes uploads otherwise"):
            watch_uploads(app)


def test_mlflow_writes_artifacts_by_the_endpoints_that_are_known_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.exceptions import MlflowException

    from braintumor.registry import rights_guard

    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    app = Flask("another")
    from mlflow.server import app as mlflow_app

    app.view_functions = dict(mlflow_app.view_functions)
    for rule in mlflow_app.url_map.iter_rules():
        app.url_map.add(rule.empty())
    rights_guard.refuse_unknown_mlflow(app)
    app.add_url_rule("/api/4.0/artifacts", "store", lambda: "", methods=["PUT"])
    with pytest.raises(MlflowException, match="writes artifacts by"):
        rights_guard.refuse_unknown_mlflow(app)


def test_a_password_comes_from_its_file_or_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINTUMOR_PASSWORD_DR_EVE", "eves-password")
    (tmp_path / "bob").write_text("bobs-password\n")
    users = {"dr.eve": "reviewer", "bob": "pipeline", "old": "reader"}
    assert read_passwords(users, ["old"], tmp_path) == {"dr.eve": "eves-password", "bob": "bobs-password"}
    with pytest.raises(UserError, match="old has no password yet"):
        read_passwords(users, [], tmp_path)


def test_a_users_name_is_no_way_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("somebody-elses-secret")
    (tmp_path / "passwords").mkdir()
    with pytest.raises(UserError, match="has no password yet"):
        read_passwords({"../outside": "reader"}, [], tmp_path / "passwords")


def test_two_names_of_one_variable_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINTUMOR_PASSWORD_DR_EVE", "eves-password")
    with pytest.raises(UserError, match=r"dr\.eve and dr-eve"):
        read_passwords({"dr.eve": "reviewer", "dr-eve": "reader"}, [], None)


def test_a_file_of_users_is_names_and_roles(tmp_path: Path) -> None:
    file = tmp_path / "users.yaml"
    file.write_text("alice: reviewer\nci: pipeline\n")
    assert read_users(file) == {"alice": "reviewer", "ci": "pipeline"}
    for content in ("", "- alice\n", "1: reader\n", "alice: admin\n", "alice: [reader]\n"):
        file.write_text(content)
        with pytest.raises(UserError, match=r"users\.yaml"):
            read_users(file)
