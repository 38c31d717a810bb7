"""The part of the plugin that runs inside MLflow's server: a request that could promote is judged before it is served.

Imported by the server alone. See `rights` for what it holds to.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from flask import Flask, Response, g, jsonify, request
from mlflow.entities import LoggedModelStatus, ViewType
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag
from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES, MLFLOW_SERVER_ENABLE_JOB_EXECUTION
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.protos.mlflow_artifacts_pb2 import (
    AbortMultipartUpload,
    CompleteMultipartUpload,
    CreateMultipartUpload,
    DeleteArtifact,
    UploadArtifact,
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
    UpdateModelVersion,
)
from mlflow.protos.service_pb2 import (
    CreateExperiment,
    CreatePresignedUploadUrl,
    CreateRun,
    DeleteExperiment,
    DeleteExperimentTag,
    DeleteLoggedModel,
    DeleteLoggedModelTag,
    DeleteRun,
    DeleteTag,
    FinalizeLoggedModel,
    LogBatch,
    LogInputs,
    LogMetric,
    LogModel,
    LogOutputs,
    LogParam,
    RestoreExperiment,
    RestoreRun,
    SetExperimentTag,
    SetLoggedModelTags,
    SetTag,
    UpdateExperiment,
    UpdateRun,
)
from mlflow.server import auth, handlers, serve_upload_artifact
from mlflow.utils.uri import validate_path_is_safe
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME
from mlflow.version import VERSION
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from braintumor.registry.ledger import VERSION_ENTRY, experiment_name
from braintumor.registry.rights import (
    BY,
    KEPT_RUN_TAGS,
    KEPT_VERSION_TAGS,
    LEDGER_TAG,
    MLFLOW_MAJOR,
    PLUGIN_VERSION,
    PROMOTER,
    REVIEWER,
    RIGHTS,
    ROLES,
    alias_problem,
    is_judged_file,
    is_ledger_name,
    may_write_tag,
    signature,
)
from braintumor.registry.server import CHAMPION

MODEL_DIGEST = "model_digest"

PROMOTE_INSTEAD = "a reviewer promotes a version, by the alias 'champion' or 'braintumor promote'"
VERSIONS_PER_PAGE = 1000

# The identifiers that MLflow gives, as they stand in the paths of its artifacts.
RUN_ID, LOGGED_MODEL_ID = re.compile(r"[0-9a-f]{32}"), re.compile(r"m-[0-9a-f]{32}")

# What of MLflow's routes can write or delete artifacts: those of Flask by their endpoints, those of FastAPI.
ARTIFACT_ENDPOINTS = {
    "_upload_artifact", "_delete_artifact_mlflow_artifacts", "_create_multipart_upload_artifact",
    "_complete_multipart_upload_artifact", "_abort_multipart_upload_artifact", "_create_presigned_upload_url",
    "_create_presigned_download_url", "serve_upload_artifact",
}  # fmt: skip
ARTIFACT_ROUTES = {
    ("PUT", f"/{api}/2.0/mlflow-artifacts/artifacts/{{artifact_path:path}}") for api in ("api", "ajax-api")
}
READING = {"GET", "HEAD", "OPTIONS"}


@handlers.catch_mlflow_exception
def guard() -> Response | None:
    """An answer to a request that may not be carried out; None lets MLflow's own handler have it."""
    endpoint = str(request.endpoint)
    judged = _judges().get(endpoint)
    if judged is not None:
        message, judge = judged
        # Read as the handler will read it: it accepts more than what the header says is JSON.
        judge(handlers._get_request_message(message()))
    judge_file = _file_judges().get(endpoint)
    if judge_file is not None:
        judge_file()
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
    for message in (*JUDGES, *FILE_JUDGES):
        handler = handlers.HANDLERS.get(message)
        if handler is None or app.view_functions.get(handler.__name__) is not handler:
            raise MlflowException(
                f"this MLflow {VERSION} serves {message.__name__} otherwise than braintumor-auth knows; "
                "install the version that it was tested with"
            )
    found = {
        str(rule.endpoint) for rule in app.url_map.iter_rules() if "artifact" in rule.rule and _writes(rule.methods)
    }
    if found != ARTIFACT_ENDPOINTS or app.view_functions["serve_upload_artifact"] is not serve_upload_artifact:
        raise MlflowException(f"this MLflow {VERSION} writes artifacts by {sorted(found ^ ARTIFACT_ENDPOINTS)}, too")


def watch_uploads(served: Any) -> None:
    """What the server takes without Flask, uploads, is judged, after MLflow's own rules; `served` is what it runs.

    Raises MlflowException where this MLflow could take an upload that the guard does not see.
    """
    if isinstance(served, Flask):  # as under gunicorn: it takes them itself
        return
    routes = [route for route in _routes(served.routes) if "artifact" in route.path and _writes(route.methods)]
    found = {(method, route.path) for route in routes for method in route.methods}
    if found != ARTIFACT_ROUTES or served.middleware_stack is not None:
        raise MlflowException(
            f"this MLflow {VERSION} takes uploads otherwise than braintumor-auth knows, by {sorted(found)}; "
            "install the version that it was tested with"
        )
    # The innermost: MLflow has looked at the password before.
    served.user_middleware.append(Middleware(_UploadGuard, routes=routes))


def _writes(methods: Any) -> bool:
    return bool(set(methods or ()) - READING)


def _routes(routes: list[BaseRoute]) -> Iterator[Any]:
    """FastAPI's own routes, those of its routers among them."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from _routes(router.routes)
        elif not isinstance(route, Mount):
            yield route


class _UploadGuard:
    """An upload is judged when it begins, and when all of it has come: a version may have been promoted meanwhile."""

    def __init__(self, app: ASGIApp, routes: list[Any]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = self._path(scope) if scope["type"] == "http" else None
        if path is None:
            await self._app(scope, receive, send)
            return

        async def judged() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                # MLflow's handler answers with the error, and stores nothing.
                await run_in_threadpool(_judge_file, path)
            return message

        try:
            await run_in_threadpool(_judge_file, path)
        except MlflowException as error:
            answer = JSONResponse(json.loads(error.serialize_as_json()), error.get_http_status_code())
            await answer(scope, receive, send)
            return
        await self._app(scope, judged, send)

    def _path(self, scope: Scope) -> str | None:
        """The path of the artifact as MLflow's handler gets it; None for what is no upload."""
        for route in self._routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                return str(found["path_params"]["artifact_path"])
        return None


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


def _set_version_tag(message: Any) -> None:
    _set_tag(message)
    _keep_version_tag(message, message.value)


def _delete_version_tag(message: Any) -> None:
    _delete_tag(message)
    _keep_version_tag(message, None)


def _keep_version_tag(message: Any, value: str | None) -> None:
    """What a promotion rested on stays; what is there already may be written again."""
    if message.key not in KEPT_VERSION_TAGS:
        return
    version = _version(message)
    if version is not None and version.tags.get(message.key) != value and _is_kept(version):
        _refuse_all_but({PROMOTER}, f"change the tag {message.key!r} of {_was_promoted(version)}")


def _update_version(message: Any) -> None:
    version = _version(message)
    if version is not None and (version.description or "") != message.description and _is_kept(version):
        _refuse_all_but({PROMOTER, REVIEWER}, f"change the description of {_was_promoted(version)}")


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
    if message.artifact_location:
        # Another experiment's files, or those of a machine that reads these, could lie there.
        raise MlflowException(
            "an experiment's artifacts are where the server keeps all; leave artifact_location empty",
            INVALID_PARAMETER_VALUE,
        )
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


def _delete_experiment(message: Any) -> None:
    _write_experiment(message)
    versions = _versions("")
    held = next((one for one in versions if one.run_id and _lies_in(message.experiment_id, one.run_id)), None)
    if held is not None:
        raise MlflowException(
            f"version {held.version} of {held.name} comes from a run of this experiment, which can't be deleted; "
            "delete its versions first",
            PERMISSION_DENIED,
        )


def _lies_in(experiment_id: str, run_id: str) -> bool:
    run = _if_it_exists(handlers._get_tracking_store().get_run, run_id)
    return run is not None and str(run.info.experiment_id) == experiment_id


def _run_id(message: Any) -> str:
    return str(message.run_id or getattr(message, "run_uuid", ""))


def _write_run(message: Any) -> None:
    run_id = _run_id(message)
    experiment_id = _experiment_of(run_id) if run_id else None
    if experiment_id is not None and _is_ledger(experiment_id):
        _refuse_all_but_promoter()


def _delete_run(message: Any) -> None:
    _write_run(message)
    version = _kept_of_run(_run_id(message))
    if version is not None:
        raise _kept(f"its run can't be deleted, and this is the run of {_was_promoted(version)}")


def _tag_run(message: Any) -> None:
    _write_run(message)
    _keep_run_tags(message, {message.key: message.value})


def _log_batch(message: Any) -> None:
    _write_run(message)
    _keep_run_tags(message, {tag.key: tag.value for tag in message.tags})


def _delete_run_tag(message: Any) -> None:
    _write_run(message)
    _keep_run_tags(message, {message.key: None})


def _keep_run_tags(message: Any, tags: Mapping[str, str | None]) -> None:
    changed = {key: value for key, value in tags.items() if key in KEPT_RUN_TAGS}
    run = _if_it_exists(handlers._get_tracking_store().get_run, _run_id(message)) if changed else None
    if run is not None and any(run.data.tags.get(key) != value for key, value in changed.items()):
        version = _kept_of_run(_run_id(message))
        if version is not None:
            raise _kept(f"the tags {sorted(changed)} of its run can't be changed: {_was_promoted(version)}")


def _write_logged_model(message: Any) -> None:
    """The logged model of a version stays, and what is checked of it; FinalizeLoggedModel reads its id in the body."""
    if isinstance(message, FinalizeLoggedModel) and message.status == LoggedModelStatus.READY.to_proto():
        return
    if isinstance(message, SetLoggedModelTags) and MODEL_DIGEST not in {tag.key for tag in message.tags}:
        return
    if isinstance(message, DeleteLoggedModelTag) and MODEL_DIGEST not in (message.tag_key, _in_path("tag_key")):
        return
    for model_id in {message.model_id, _in_path("model_id")} - {""}:
        version = _version_of_logged_model(model_id)
        if version is not None:
            raise _kept(f"{model_id} is the model of version {version.version} of {version.name}, and stays as it is")


def _presign_upload(message: Any) -> None:
    if message.model_id:
        _judge_file(posixpath.join(message.model_id, message.path))
    if message.run_id:
        _judge_file(posixpath.join(message.run_id, "artifacts", message.path))


def _in_path(name: str) -> str:
    return str((request.view_args or {}).get(name) or "")


def _upload() -> None:
    _judge_file(_in_path("artifact_path"))


def _delete_files() -> None:
    _judge_file(_in_path("artifact_path"), is_deleted=True)


def _upload_parts(message: Any) -> None:
    # As the stores of MLflow: of the name in the body they take the last part.
    _judge_file(posixpath.join(_in_path("artifact_path"), posixpath.basename(message.path)))


def _upload_to_run() -> None:
    run_id, path = request.args.get("run_uuid"), request.args.get("path")
    # Without them the handler refuses it.
    if run_id and path:
        _judge_file(posixpath.join(run_id, "artifacts", validate_path_is_safe(path)))


def _judge_file(path: str, *, is_deleted: bool = False) -> None:
    """Raises MlflowException where files of a registered model, or those that a promotion rested on, would change.

    `path` is what MLflow's handler gets; a folder that is deleted may hold such files.
    """
    # S3 servers differ in what they make of '//' and '/./'.
    parts = [part for part in validate_path_is_safe(path).split("/") if part not in {"", "."}]
    is_known = False
    for position, part in enumerate(parts):
        if LOGGED_MODEL_ID.fullmatch(part):
            is_known = True
            version = _version_of_logged_model(part)
            if version is not None:
                raise _kept(f"these are the files of version {version.version} of {version.name}, and stay as they are")
        elif RUN_ID.fullmatch(part):
            is_known = True
            version = _kept_of_run(part) if is_judged_file(parts[position + 1 :]) else None
            if version is not None:
                raise _kept(
                    f"{'/'.join(parts[position + 1 :])} of the run of {_was_promoted(version)} can't be changed"
                )
    if is_deleted and not is_known:
        raise _kept(f"{path!r} names no run and no logged model, and may hold those of versions")


def _kept(why: str) -> MlflowException:
    return MlflowException(f"what was promoted is kept: {why}", PERMISSION_DENIED)


def _was_promoted(version: ModelVersion) -> str:
    return f"version {version.version} of {version.name}, which was promoted"


def _version(message: Any) -> ModelVersion | None:
    store = handlers._get_model_registry_store()
    found: ModelVersion | None = _if_it_exists(
        lambda name: store.get_model_version(name, message.version), message.name
    )
    return found


def _versions(condition: str) -> Iterator[ModelVersion]:
    store, token = handlers._get_model_registry_store(), None
    while True:
        page = store.search_model_versions(condition, max_results=VERSIONS_PER_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _version_of_logged_model(model_id: str) -> ModelVersion | None:
    # Whatever else is asked for is no model's id, and could say anything in a condition.
    is_id = LOGGED_MODEL_ID.fullmatch(model_id)
    return next(_versions(f"source_path LIKE '%{model_id}%'"), None) if is_id else None


def _kept_of_run(run_id: str) -> ModelVersion | None:
    is_id = RUN_ID.fullmatch(run_id)
    return next(filter(_is_kept, _versions(f"run_id = '{run_id}'")), None) if is_id else None


def _is_kept(version: ModelVersion) -> bool:
    """Whether the version is the champion, or was.

    One that was refused and never champion may be judged again: 'braintumor evaluate' and 'register' are the remedy.
    """
    if _champion(version.name) == str(version.version):
        return True
    if VERSION_ENTRY not in version.tags:
        return False
    store = handlers._get_tracking_store()
    ledger = store.get_experiment_by_name(experiment_name(version.name))
    if ledger is None:
        return True
    condition = f"tags.champion_after = '{int(version.version)}'"
    return bool(store.search_runs([ledger.experiment_id], condition, ViewType.ALL, max_results=1))


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


def _refuse_all_but(roles: set[str], what: str) -> None:
    user = _user()
    if not _roles(user) & roles:
        raise MlflowException(
            f"{user} may not {what}: it takes the role {' or '.join(sorted(roles))}", PERMISSION_DENIED
        )


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
    SetModelVersionTag: _set_version_tag,
    SetRegisteredModelTag: _set_tag,
    DeleteModelVersionTag: _delete_version_tag,
    DeleteRegisteredModelTag: _delete_tag,
    CreateModelVersion: _create_version,
    UpdateModelVersion: _update_version,
    CreateRegisteredModel: _create_with_tags,
    DeleteModelVersion: _keep_champion_version,
    DeleteRegisteredModel: _keep_champion_model,
    RenameRegisteredModel: _keep_champion_model,
    CreateExperiment: _create_experiment,
    UpdateExperiment: _rename_experiment,
    DeleteExperiment: _delete_experiment,
    RestoreExperiment: _write_experiment,
    SetExperimentTag: _tag_experiment,
    DeleteExperimentTag: _tag_experiment,
    CreateRun: _write_experiment,
    **dict.fromkeys((UpdateRun, RestoreRun, LogMetric, LogParam, LogInputs, LogOutputs, LogModel), _write_run),
    DeleteRun: _delete_run,
    SetTag: _tag_run,
    DeleteTag: _delete_run_tag,
    LogBatch: _log_batch,
    **dict.fromkeys(
        (DeleteLoggedModel, FinalizeLoggedModel, SetLoggedModelTags, DeleteLoggedModelTag), _write_logged_model
    ),
    CreatePresignedUploadUrl: _presign_upload,
    **dict.fromkeys((CreateMultipartUpload, CompleteMultipartUpload, AbortMultipartUpload), _upload_parts),
}  # fmt: skip
# The body of these is the file itself, or nothing.
FILE_JUDGES: Mapping[Any, Callable[[], None]] = {UploadArtifact: _upload, DeleteArtifact: _delete_files}


@lru_cache(maxsize=1)
def _file_judges() -> dict[str, Callable[[], None]]:
    by_name = {handlers.HANDLERS[message].__name__: judge for message, judge in FILE_JUDGES.items()}
    return by_name | {serve_upload_artifact.__name__: _upload_to_run}


@lru_cache(maxsize=1)
def _judges() -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """Who judges, by Flask's name of the endpoint."""
    return {handlers.HANDLERS[message].__name__: (message, judge) for message, judge in JUDGES.items()}
