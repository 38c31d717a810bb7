"""The part of the plugin that runs inside MLflow's server: a request that could promote is judged before it is served.

Imported by the server alone. See `rights` for what it holds to.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from flask import Flask, Response, g, jsonify, request
from mlflow.entities.model_registry import ModelVersionTag
from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES, MLFLOW_SERVER_ENABLE_JOB_EXECUTION
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.protos.model_registry_pb2 import (
    CreateModelVersion,
    CreateRegisteredModel,
    DeleteModelVersion,
    DeleteModelVersionTag,
    DeleteRegisteredModel,
    DeleteRegisteredModelAlias,
    DeleteRegisteredModelTag,
    RenameRegisteredModel,
    SetModelVersionTag,
    SetRegisteredModelAlias,
    SetRegisteredModelTag,
)
from mlflow.protos.service_pb2 import (
    CreateExperiment,
    CreateRun,
    DeleteExperiment,
    DeleteExperimentTag,
    DeleteRun,
    DeleteTag,
    LogBatch,
    LogInputs,
    LogMetric,
    LogModel,
    LogOutputs,
    LogParam,
    RestoreExperiment,
    RestoreRun,
    SetExperimentTag,
    SetTag,
    UpdateExperiment,
    UpdateRun,
)
from mlflow.server import auth, handlers
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME
from mlflow.version import VERSION
from sqlalchemy import text

from braintumor.registry.rights import (
    BY,
    LEDGER_TAG,
    MLFLOW_MAJOR,
    PLUGIN_VERSION,
    PROMOTER,
    REVIEWER,
    RIGHTS,
    ROLES,
    alias_problem,
    is_ledger_name,
    may_write_tag,
    signature,
)
from braintumor.registry.server import CHAMPION

MODEL_DIGEST = "model_digest"

PROMOTE_INSTEAD = "a reviewer promotes a version, by the alias 'champion' or 'braintumor promote'"


@handlers.catch_mlflow_exception
def guard() -> Response | None:
    """An answer to a request that may not be carried out; None lets MLflow's own handler have it."""
    judged = _judges().get(str(request.endpoint))
    if judged is not None:
        message, judge = judged
        # Read as the handler will read it: it accepts more than what the header says is JSON.
        judge(handlers._get_request_message(message()))
    return None


def refuse_unknown_mlflow(app: Flask) -> None:
    """Raises MlflowException where this MLflow could let a promotion through that the guard does not see."""
    if VERSION.partition(".")[0] != str(MLFLOW_MAJOR):
        raise MlflowException(f"braintumor-auth is made for MLflow {MLFLOW_MAJOR}, and this is {VERSION}")
    if MLFLOW_ENABLE_WORKSPACES.get():
        # A role belongs to one workspace: a reviewer of another one would be a reviewer here.
        raise MlflowException("braintumor-auth knows no workspaces; leave MLFLOW_ENABLE_WORKSPACES unset")
    if MLFLOW_SERVER_ENABLE_JOB_EXECUTION.get():
        # Jobs go to the database themselves.
        raise MlflowException("braintumor-auth can't watch jobs; set MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false")
    for message in JUDGES:
        handler = handlers.HANDLERS.get(message)
        if handler is None or app.view_functions.get(handler.__name__) is not handler:
            raise MlflowException(
                f"this MLflow {VERSION} serves {message.__name__} otherwise than braintumor-auth knows; "
                "install the version that it was tested with"
            )


def watch(app: Flask) -> None:
    """Every request from now on is judged, after MLflow's own rules have let it through."""
    app.before_request(guard)
    app.teardown_request(_forget_registering)


def tell_rights(app: Flask) -> None:
    """The server answers every user who it takes him for, and which of our roles he holds."""
    for path in (handlers._get_rest_path(RIGHTS), handlers._get_ajax_path(RIGHTS)):
        app.add_url_rule(path, "braintumor_rights", _rights, methods=["GET"])
        # MLflow denies what it has no rule for.
        auth.BEFORE_REQUEST_VALIDATORS[path, "GET"] = lambda: True


@handlers.catch_mlflow_exception
def _rights() -> Response:
    user = _user()
    return jsonify({"user": user, "roles": sorted(_roles(user)), "champion_needs": REVIEWER, "plugin": PLUGIN_VERSION})


def _set_alias(message: Any) -> None:
    problem = alias_problem(message.alias)
    if problem is not None:
        raise MlflowException(problem, INVALID_PARAMETER_VALUE)
    if message.alias == CHAMPION:
        user = _one_who_may_promote(f"set the alias '{CHAMPION}'")
        _sign(user, message.name, message.version)


def _delete_alias(message: Any) -> None:
    # An alias in another spelling may be older than this guard, and databases differ in what they take for equal.
    if message.alias == CHAMPION or alias_problem(message.alias) is not None:
        user = _one_who_may_promote(f"delete the alias {message.alias!r}")
        champion = _champion(message.name)
        if champion is not None and message.alias == CHAMPION:
            _sign(user, message.name, champion)


def _sign(user: str, name: str, version: str) -> None:
    """The version tells who did it, before it is done; what can't be signed is not done."""
    if REVIEWER in _roles(user):
        tag = ModelVersionTag(BY, signature(user))
        handlers._get_model_registry_store().set_model_version_tag(name, version, tag)


def _set_tag(message: Any) -> None:
    _refuse_tags([message.key])


def _delete_tag(message: Any) -> None:
    _refuse_tags([message.key], is_deleted=True)


def _create_with_tags(message: Any) -> None:
    _refuse_tags([tag.key for tag in message.tags])


def _refuse_tags(keys: list[str], *, is_deleted: bool = False) -> None:
    roles: set[str] | None = None
    for key in keys:
        # Most tags are free, and need no look at the accounts.
        if not may_write_tag(key, (), is_deleted=is_deleted):
            roles = _roles(_user()) if roles is None else roles
            if not may_write_tag(key, roles, is_deleted=is_deleted):
                raise MlflowException(f"you may not write the tag {key!r}; {PROMOTE_INSTEAD}", PERMISSION_DENIED)


def _create_version(message: Any) -> None:
    """A model, known by its digest, has one version: of two who register it at the same moment, one does."""
    _create_with_tags(message)
    digest = next((tag.value for tag in message.tags if tag.key == MODEL_DIGEST), "")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        return
    store = handlers._get_model_registry_store()
    if store.engine.dialect.name == "postgresql":
        g.registering = connection = store.engine.connect()
        key = int.from_bytes(hashlib.sha256(f"{message.name} {digest}".encode()).digest()[:8], signed=True)
        # Not waited for: those who wait would keep the connections that the one before them needs.
        if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar():
            raise MlflowException(
                f"this model is being registered as a version of {message.name}", RESOURCE_ALREADY_EXISTS
            )
    found = store.search_model_versions(f"tags.{MODEL_DIGEST} = '{digest}'")
    twin = next((version.version for version in found if version.name == message.name), None)
    if twin is not None:
        raise MlflowException(f"this model is version {twin} of {message.name} already", RESOURCE_ALREADY_EXISTS)


def _forget_registering(error: BaseException | None) -> None:
    connection = g.pop("registering", None)
    if connection is not None:
        # A lock is its connection's, which goes back into the pool otherwise.
        connection.invalidate()
        connection.close()


def _keep_champion_version(message: Any) -> None:
    champion = _champion(message.name)
    if champion is None:
        return
    try:
        # As MLflow's store reads it: ' 5' and '05' are 5.
        is_champion = int(message.version) == int(champion)
    except ValueError:
        is_champion = False
    if is_champion:
        raise MlflowException(
            f"version {champion} is the champion and can't be deleted; let a reviewer delete the alias first",
            PERMISSION_DENIED,
        )


def _keep_champion_model(message: Any) -> None:
    champion = _champion(message.name)
    if champion is not None:
        raise MlflowException(
            f"{message.name} has a champion, version {champion}, and can be neither deleted nor renamed; "
            "let a reviewer delete the alias first",
            PERMISSION_DENIED,
        )


def _create_experiment(message: Any) -> None:
    if is_ledger_name(message.name) or any(tag.key.startswith(LEDGER_TAG) for tag in message.tags):
        _refuse_all_but_promoter()


def _rename_experiment(message: Any) -> None:
    if is_ledger_name(message.new_name):
        _refuse_all_but_promoter()
    _write_experiment(message)


def _tag_experiment(message: Any) -> None:
    if message.key.startswith(LEDGER_TAG):
        _refuse_all_but_promoter()
    _write_experiment(message)


def _write_experiment(message: Any) -> None:
    if _is_ledger(message.experiment_id):
        _refuse_all_but_promoter()


def _write_run(message: Any) -> None:
    run_id = message.run_id or getattr(message, "run_uuid", "")
    experiment_id = _experiment_of(run_id) if run_id else None
    if experiment_id is not None and _is_ledger(experiment_id):
        _refuse_all_but_promoter()


# A run never moves.
@lru_cache(maxsize=10_000)
def _experiment_of(run_id: str) -> str | None:
    run = _if_it_exists(handlers._get_tracking_store().get_run, run_id)
    if run is None:
        raise MlflowException(f"there is no run {run_id!r}", RESOURCE_DOES_NOT_EXIST)
    return str(run.info.experiment_id)


def _is_ledger(experiment_id: str) -> bool:
    experiment = _if_it_exists(handlers._get_tracking_store().get_experiment, experiment_id)
    return experiment is not None and is_ledger_name(experiment.name)


def _if_it_exists(find: Callable[[str], Any], name: str) -> Any:
    try:
        return find(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None


def _refuse_all_but_promoter() -> None:
    if PROMOTER not in _roles(_user()):
        raise MlflowException("the promoter alone writes the ledger of promotions", PERMISSION_DENIED)


def _one_who_may_promote(what: str) -> str:
    user = _user()
    if not _roles(user) & {REVIEWER, PROMOTER}:
        raise MlflowException(
            f"{user} may not {what}: it takes the role '{REVIEWER}', which an administrator gives", PERMISSION_DENIED
        )
    return user


def _champion(name: str) -> str | None:
    model = _if_it_exists(handlers._get_model_registry_store().get_registered_model, name)
    found = None if model is None else model.aliases.get(CHAMPION)
    return None if found is None else str(found)


def _user() -> str:
    user = getattr(g, "mlflow_authenticated_user", None)
    if not user:
        raise MlflowException("nobody has logged in", PERMISSION_DENIED)
    return str(user)


def _roles(user: str) -> set[str]:
    found = auth.store.list_user_roles(auth.store.get_user(user).id)
    return {role.name for role in found if role.workspace == DEFAULT_WORKSPACE_NAME} & set(ROLES)


# MLflow's messages, by whose handlers a request is known, and who judges them. What is not here can't change aliases,
# their versions, the tags of a promotion or the ledger; a test holds the list of what MLflow's registry can do.
JUDGES: Mapping[Any, Callable[[Any], None]] = {
    SetRegisteredModelAlias: _set_alias,
    DeleteRegisteredModelAlias: _delete_alias,
    SetModelVersionTag: _set_tag,
    SetRegisteredModelTag: _set_tag,
    DeleteModelVersionTag: _delete_tag,
    DeleteRegisteredModelTag: _delete_tag,
    CreateModelVersion: _create_version,
    CreateRegisteredModel: _create_with_tags,
    DeleteModelVersion: _keep_champion_version,
    DeleteRegisteredModel: _keep_champion_model,
    RenameRegisteredModel: _keep_champion_model,
    CreateExperiment: _create_experiment,
    UpdateExperiment: _rename_experiment,
    DeleteExperiment: _write_experiment,
    RestoreExperiment: _write_experiment,
    SetExperimentTag: _tag_experiment,
    DeleteExperimentTag: _tag_experiment,
    CreateRun: _write_experiment,
    **dict.fromkeys(
        (
            UpdateRun, DeleteRun, RestoreRun, LogMetric, LogParam, LogBatch, LogInputs, LogOutputs, LogModel, SetTag,
            DeleteTag,
        ),
        _write_run,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def _judges() -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """Who judges, by Flask's name of the endpoint."""
    return {handlers.HANDLERS[message].__name__: (message, judge) for message, judge in JUDGES.items()}
