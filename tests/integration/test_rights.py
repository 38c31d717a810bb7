"""Who may promote, on the stack that a team runs: as the client asks, and by requests that nobody means."""

import http.client
import json
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from registry_stack import ADMIN, BUCKET, NAMES, ROOT, Stack, postgres_programs, registry_stack, set_up

MODEL = "brain-tumor-phantoms"
EXPERIMENT = "brain-tumor"
ALIAS = "/api/2.0/mlflow/registered-models/alias"
VERSION_TAG = "/api/2.0/mlflow/model-versions/set-tag"
FILES = "/api/2.0/mlflow-artifacts/artifacts"
TIMEOUT_S = 60


class Registry:
    """Requests as one of the users, and what the database says afterwards."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._sessions: dict[str, requests.Session] = {}

    def call(self, user: str, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
        """The answer; `body` is sent as JSON, unless `options` say otherwise."""
        if body is not None:
            options["json"] = body
        request = requests.Request(method, "http://placeholder", auth=(user, self.stack.passwords[user]), **options)
        prepared = request.prepare()
        # As it stands: requests would tidy the path up.
        query = prepared.url.partition("?")[2] if prepared.url else ""
        prepared.url = self.stack.address + path + (f"?{query}" if query else "")
        session = self._sessions.setdefault(user, requests.Session())
        return session.send(prepared, timeout=TIMEOUT_S, allow_redirects=False)

    def done(self, user: str, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        answer = self.call(user, method, path, body, **options)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def aliases(self) -> dict[str, str]:
        return self.aliases_of(MODEL)

    def aliases_of(self, model: str) -> dict[str, str]:
        rows = self.stack.query(f"SELECT alias, version FROM registered_model_aliases WHERE name = '{model}'")
        return {row[0]: row[1] for row in rows}

    def tags(self, version: str) -> dict[str, str]:
        condition = f"name = '{MODEL}' AND version = {version} AND key LIKE '%romotion%'"
        return {
            row[0]: row[1] for row in self.stack.query(f"SELECT key, value FROM model_version_tags WHERE {condition}")
        }

    def state(self) -> list[str]:
        """All that a promotion is made of."""
        tables = (
            "registered_model_aliases", "registered_model_tags", "model_version_tags",
            "(SELECT name, version, current_stage, status, description FROM model_versions)",
            "(SELECT name, lifecycle_stage, experiment_id FROM experiments)", "experiment_tags",
            "(SELECT run_uuid, lifecycle_stage, status FROM runs)", "(SELECT run_uuid, key, value FROM tags)",
            "(SELECT model_id, lifecycle_stage, status FROM logged_models)",
            "(SELECT model_id, tag_key, tag_value FROM logged_model_tags)",
        )  # fmt: skip
        rows = (f"(SELECT json_agg(r ORDER BY 1, 2, 3) FROM {table} r)" for table in tables)
        return self.stack.query(f"SELECT {', '.join(rows)}")[0]

    def files(self, folder: str) -> dict[str, str]:
        """Key and ETag of all that the S3 server holds in a folder of the artifacts."""
        pages = self.stack.s3_client().get_paginator("list_objects_v2")
        prefix = f"artifacts/{folder}/"
        return {
            found["Key"].removeprefix(prefix): found["ETag"]
            for page in pages.paginate(Bucket=BUCKET, Prefix=prefix)
            for found in page.get("Contents", [])
        }

    def new_version(self, user: str = "pipeline") -> str:
        experiment = self.done(
            user, "GET", "/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": EXPERIMENT}
        )
        body = {"experiment_id": experiment["experiment"]["experiment_id"]}
        run = self.done(user, "POST", "/api/2.0/mlflow/runs/create", body)["run"]["info"]
        made = {"name": MODEL, "source": f"{run['artifact_uri']}/model", "run_id": run["run_id"]}
        return str(self.done(user, "POST", "/api/2.0/mlflow/model-versions/create", made)["model_version"]["version"])

    def promote(self, version: str, user: str = "reviewer") -> requests.Response:
        return self.call(user, "POST", ALIAS, {"name": MODEL, "alias": "champion", "version": version})


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with registry_stack(tmp_path_factory.mktemp("stack"), workers=1) as running:
        yield running


@pytest.fixture(scope="module")
def connected_registry(stack: Stack) -> Registry:
    return Registry(stack)


@pytest.fixture(scope="module")
def versions(connected_registry: Registry) -> tuple[str, str]:
    """A version that is made the champion, and the one after it."""
    return connected_registry.new_version(), connected_registry.new_version()


@pytest.fixture
def registry(connected_registry: Registry, versions: tuple[str, str]) -> Registry:
    if connected_registry.aliases().get("champion") != versions[0]:
        assert connected_registry.promote(versions[0]).status_code == 200
    return connected_registry


def test_the_pipeline_registers_and_sets_challenger_and_can_not_promote(
    registry: Registry, versions: tuple[str, str]
) -> None:
    new = registry.new_version("pipeline")
    body = {"name": MODEL, "alias": "challenger", "version": new}
    registry.done("pipeline", "POST", ALIAS, body)
    assert registry.aliases() == {"champion": versions[0], "challenger": new}
    refused = registry.promote(new, "pipeline")
    assert refused.status_code == 403
    assert refused.json()["error_code"] == "PERMISSION_DENIED"
    assert "role 'reviewer'" in refused.json()["message"]
    assert registry.aliases() == {"champion": versions[0], "challenger": new}


def test_who_promotes_is_recorded_by_the_server(registry: Registry, versions: tuple[str, str]) -> None:
    _, second = versions
    assert registry.promote(second).status_code == 200
    by = registry.tags(second)["promotion.by"]
    assert by.startswith("reviewer at 20") and " #" in by
    assert registry.promote(second).status_code == 200
    assert registry.tags(second)["promotion.by"] != by
    deletion = {"name": MODEL, "alias": "champion"}
    by = registry.tags(second)["promotion.by"]
    registry.done("reviewer", "DELETE", ALIAS, deletion)
    assert "champion" not in registry.aliases()
    assert registry.tags(second)["promotion.by"] != by
    # Nothing to remove any more.
    assert registry.call("reviewer", "DELETE", ALIAS, deletion).status_code in {200, 404}


@pytest.mark.parametrize("user", ["reader", ADMIN])
def test_neither_a_reader_nor_an_administrator_without_the_role_promotes(
    registry: Registry, versions: tuple[str, str], user: str
) -> None:
    before = registry.state()
    assert registry.promote(versions[1], user).status_code == 403
    assert registry.call(user, "DELETE", ALIAS, {"name": MODEL, "alias": "champion"}).status_code == 403
    assert registry.state() == before


def test_an_administrator_with_the_role_is_a_reviewer(registry: Registry, versions: tuple[str, str]) -> None:
    roles = registry.done(ADMIN, "GET", "/api/3.0/mlflow/roles/list")["roles"]
    reviewer = next(role["id"] for role in roles if role["name"] == "reviewer")
    membership = {"username": ADMIN, "role_id": reviewer}
    registry.done(ADMIN, "POST", "/api/3.0/mlflow/roles/assign", membership)
    try:
        assert registry.promote(versions[1], ADMIN).status_code == 200
        assert registry.tags(versions[1])["promotion.by"].startswith("admin at ")
    finally:
        registry.call(ADMIN, "DELETE", "/api/3.0/mlflow/roles/unassign", membership)
    assert registry.promote(versions[0], ADMIN).status_code == 403


def test_the_promoter_puts_back_unsigned_and_writes_all_tags_but_the_signature(
    registry: Registry, versions: tuple[str, str]
) -> None:
    first, second = versions
    registry.promote(second)
    signed = registry.tags(first)["promotion.by"], registry.tags(second)["promotion.by"]
    assert registry.promote(first, "promoter").status_code == 200
    assert (registry.tags(first)["promotion.by"], registry.tags(second)["promotion.by"]) == signed
    for key in ("promotion.outcome", "promotion.entry", "promotion.reason"):
        registry.done("promoter", "POST", VERSION_TAG, {"name": MODEL, "version": second, "key": key, "value": "x"})
        registry.done(
            "promoter", "DELETE", "/api/2.0/mlflow/model-versions/delete-tag",
            {"name": MODEL, "version": second, "key": key},
        )  # fmt: skip
    forged = {"name": MODEL, "version": second, "key": "promotion.by", "value": "alice"}
    assert registry.call("promoter", "POST", VERSION_TAG, forged).status_code == 403
    registry.done(
        "promoter", "DELETE", "/api/2.0/mlflow/model-versions/delete-tag",
        {"name": MODEL, "version": second, "key": "promotion.by"},
    )  # fmt: skip
    registry.done("promoter", "DELETE", ALIAS, {"name": MODEL, "alias": "champion"})
    assert "champion" not in registry.aliases()


def test_a_reviewer_gives_reasons_and_no_more(registry: Registry, versions: tuple[str, str]) -> None:
    for key, code in {
        "promotion.reason": 200, "promotion.override": 200, "seen": 200, "promotion.by": 403, "promotion.entry": 403,
        "promotion.outcome": 403, "Promotion.By": 403, "promotion.": 403,
    }.items():  # fmt: skip
        body = {"name": MODEL, "version": versions[1], "key": key, "value": "because"}
        assert registry.call("reviewer", "POST", VERSION_TAG, body).status_code == code, key
    for key in ("promotion.reason", "promotion.override"):
        body = {"name": MODEL, "version": versions[1], "key": key}
        registry.done("reviewer", "DELETE", "/api/2.0/mlflow/model-versions/delete-tag", body)
    body = {"name": MODEL, "version": versions[0], "key": "promotion.by"}
    assert registry.call("reviewer", "DELETE", "/api/2.0/mlflow/model-versions/delete-tag", body).status_code == 403


JSON = {"Content-Type": "application/json"}
SETTING = {"name": MODEL, "alias": "champion", "version": "VERSION"}
TEXT = '{"name": "brain-tumor-phantoms", "alias": "champion", "version": "VERSION"}'
MUTATION = (
    'mutation { mlflowSetRegisteredModelAlias(input: {name: "brain-tumor-phantoms", alias: "champion", '
    'version: "VERSION"}) { apiError { message } } }'
)
# How to set the alias, other than as the client does.
OTHER_WAYS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "ajax": ("POST", "/ajax-api/2.0/mlflow/registered-models/alias", {"json": SETTING}),
    "api 3.0": ("POST", "/api/3.0/mlflow/registered-models/alias", {"json": SETTING}),
    "ajax 3.0": ("POST", "/ajax-api/3.0/mlflow/registered-models/alias", {"json": SETTING}),
    "slash at the end": ("POST", ALIAS + "/", {"json": SETTING}),
    "two slashes": ("POST", "/" + ALIAS, {"json": SETTING}),
    "slashes inside": ("POST", ALIAS.replace("/mlflow/", "//mlflow//"), {"json": SETTING}),
    "encoded letter": ("POST", ALIAS.replace("alias", "%61lias"), {"json": SETTING}),
    "encoded slash": ("POST", ALIAS.replace("/alias", "%2Falias"), {"json": SETTING}),
    "dots": ("POST", ALIAS.replace("/registered", "/x/../registered"), {"json": SETTING}),
    "unprotected beginning": ("POST", "/static/.." + ALIAS, {"json": SETTING}),
    "health": ("POST", "/health/.." + ALIAS, {"json": SETTING}),
    "capitals": ("POST", ALIAS.upper(), {"json": SETTING}),
    "parameter": ("POST", ALIAS + ";x=1", {"json": SETTING}),
    "GET": ("GET", ALIAS, {"params": SETTING}),
    "PUT": ("PUT", ALIAS, {"json": SETTING}),
    "PATCH": ("PATCH", ALIAS, {"json": SETTING}),
    "OPTIONS": ("OPTIONS", ALIAS, {"json": SETTING}),
    "another method in a header": ("GET", ALIAS, {"json": SETTING, "headers": {"X-HTTP-Method-Override": "POST"}}),
    "another method in the query": ("GET", ALIAS, {"json": SETTING, "params": {"_method": "POST"}}),
    "another path in a header": ("GET", "/version", {"json": SETTING, "headers": {"X-Original-URL": ALIAS}}),
    "form": ("POST", ALIAS, {"data": SETTING}),
    "query": ("POST", ALIAS, {"params": SETTING}),
    "query and body": ("POST", ALIAS, {"params": {"alias": "challenger"}, "json": SETTING}),
    "text": ("POST", ALIAS, {"data": TEXT, "headers": {"Content-Type": "text/plain"}}),
    "form that is JSON": (
        "POST",
        ALIAS,
        {"data": TEXT, "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
    ),
    "no content type": ("POST", ALIAS, {"data": TEXT.encode()}),
    "JSON in JSON": ("POST", ALIAS, {"json": TEXT}),
    "twice, champion last": ("POST", ALIAS, {"data": '{"alias": "x", ' + TEXT[1:], "headers": JSON}),
    "twice, champion first": ("POST", ALIAS, {"data": TEXT[:-1] + ', "alias": "x"}', "headers": JSON}),
    "escaped letters": ("POST", ALIAS, {"data": TEXT.replace("champion", "\\u0063hampio\\u006e"), "headers": JSON}),
    "mark in front": ("POST", ALIAS, {"data": TEXT.encode("utf-8-sig"), "headers": JSON}),
    "UTF-16": (
        "POST",
        ALIAS,
        {"data": TEXT.encode("utf-16"), "headers": {"Content-Type": "application/json; charset=utf-16"}},
    ),
    "UTF-32": ("POST", ALIAS, {"data": TEXT.encode("utf-32"), "headers": JSON}),
    "UTF-7": (
        "POST",
        ALIAS,
        {"data": TEXT.encode("utf-7"), "headers": {"Content-Type": "application/json; charset=utf-7"}},
    ),
    "in parts": ("POST", ALIAS, {"files": {name: (None, value) for name, value in SETTING.items()}}),
    "chunked": ("POST", ALIAS, {"data": iter([TEXT.encode()]), "headers": JSON}),
    "a list": ("POST", ALIAS, {"json": [SETTING]}),
    "a number as version": ("POST", ALIAS, {"json": SETTING | {"version": 2}}),
    "other workspace": ("POST", ALIAS, {"json": SETTING, "headers": {"X-MLFLOW-WORKSPACE": "other"}}),
    "job's token": (
        "POST",
        ALIAS,
        {"json": SETTING, "headers": {"X-MLflow-Internal-Token": "x", "X-Forwarded-User": "reviewer"}},
    ),
    "graph": ("POST", "/graphql", {"json": {"query": MUTATION, "operationName": None}}),
}


@pytest.mark.parametrize("way", list(OTHER_WAYS))
def test_no_other_way_of_asking_lets_the_pipeline_promote(
    registry: Registry, versions: tuple[str, str], way: str
) -> None:
    method, path, options = OTHER_WAYS[way]
    before = registry.state()
    answer = registry.call("pipeline", method, path, **_with_version(options, versions[1]))
    # A body that names two aliases sets one of them, and MLflow and the guard agree on which.
    registry.call("reviewer", "DELETE", ALIAS, {"name": MODEL, "alias": "x"})
    assert registry.state() == before, answer.text
    # MLflow itself breaks off where somebody names a workspace and it has none.
    assert answer.status_code < 500 or way == "other workspace"


def _with_version(options: Mapping[str, Any], version: str) -> dict[str, Any]:
    def put(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("VERSION", version)
        if isinstance(value, bytes):
            return value.replace(b"VERSION", version.encode())
        if isinstance(value, dict):
            return {name: put(inner) for name, inner in value.items()}
        return [put(inner) for inner in value] if isinstance(value, list) else value

    return {name: put(value) for name, value in options.items()}


SPELLINGS = [
    "Champion", "CHAMPION", "champion ", " champion", "champion\n", "\tchampion", "champi0n", "champ1on",
    "champion_", "champ-ion", "champion\u200b", "\uff43\uff48ampion", "\u0441hampion", "champi\u03bfn",
    "\u0109hampion", "\U0001d41champion", "champ\u0131on", "champ\u0130on",
]  # fmt: skip


@pytest.mark.parametrize("user", ["pipeline", "reviewer", "promoter", ADMIN])
def test_an_alias_that_looks_like_champion_is_refused_to_everybody(
    registry: Registry, versions: tuple[str, str], user: str
) -> None:
    before = registry.state()
    answers = {
        spelling: registry.call(user, "POST", ALIAS, {"name": MODEL, "alias": spelling, "version": versions[1]})
        for spelling in SPELLINGS
    }
    assert {spelling: answer.status_code for spelling, answer in answers.items()} == dict.fromkeys(SPELLINGS, 400)
    assert registry.state() == before


def in_text(**fields: str) -> str:
    """A body that is JSON, and whose header does not say so: MLflow looks for the model's name elsewhere then."""
    return json.dumps({"name": MODEL, **fields})


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("DELETE", ALIAS, {"json": {"name": MODEL, "alias": "champion"}}),
        ("DELETE", ALIAS, {"params": {"name": MODEL, "alias": "champion"}}),
        ("DELETE", ALIAS, {"data": {"name": MODEL, "alias": "champion"}}),
        ("DELETE", ALIAS, {"params": {"name": "own", "alias": "x"}, "data": in_text(alias="champion")}),
        ("DELETE", "/api/2.0/mlflow/model-versions/delete", {"json": {"name": MODEL, "version": "1"}}),
        ("DELETE", "/api/2.0/mlflow/model-versions/delete", {"json": {"name": MODEL, "version": " 01 "}}),
        ("DELETE", "/api/2.0/mlflow/model-versions/delete", {"json": {"name": MODEL, "version": 1}}),
        (
            "DELETE",
            "/api/2.0/mlflow/model-versions/delete",
            {"params": {"name": "own", "version": "1"}, "data": in_text(version="1")},
        ),
        ("DELETE", "/api/2.0/mlflow/registered-models/delete", {"json": {"name": MODEL}}),
        ("DELETE", "/ajax-api/2.0/mlflow/registered-models/delete", {"json": {"name": MODEL}}),
        ("DELETE", "/api/2.0/mlflow/registered-models/delete", {"params": {"name": "own"}, "data": in_text()}),
        ("POST", "/api/2.0/mlflow/registered-models/rename", {"json": {"name": MODEL, "new_name": "other"}}),
        ("POST", "/api/2.0/mlflow/registered-models/rename", {"json": {"name": MODEL, "newName": "other"}}),
        ("POST", VERSION_TAG, {"json": {"name": MODEL, "version": "1", "key": "promotion.by", "value": "reviewer at"}}),
        ("POST", VERSION_TAG, {"json": {"name": MODEL, "version": "1", "key": "promotion.reason", "value": "fine"}}),
        ("POST", VERSION_TAG, {"json": {"name": MODEL, "version": "1", "key": " Promotion.reason", "value": "fine"}}),
        (
            "POST",
            "/api/2.0/mlflow/registered-models/set-tag",
            {"json": {"name": MODEL, "key": "promotion.by", "value": "x"}},
        ),
        (
            "DELETE",
            "/api/2.0/mlflow/model-versions/delete-tag",
            {"json": {"name": MODEL, "version": "1", "key": "promotion.by"}},
        ),
        (
            "DELETE",
            "/api/2.0/mlflow/model-versions/delete-tag",
            {"params": {"name": "own", "version": "1", "key": "x"}, "data": in_text(version="1", key="promotion.by")},
        ),
        (
            "POST",
            "/api/2.0/mlflow/model-versions/create",
            {
                "json": {
                    "name": "own",
                    "source": "models:/brain-tumor-phantoms/1",
                    "tags": [{"key": "promotion.by", "value": "x"}],
                }
            },
        ),
        (
            "POST",
            "/api/2.0/mlflow/model-versions/create",
            {
                "json": {
                    "name": MODEL,
                    "source": "models:/brain-tumor-phantoms/1",
                    "tags": [{"key": "a", "value": "b"}, {"key": "promotion.reason", "value": "x"}],
                }
            },
        ),
        (
            "POST",
            "/api/2.0/mlflow/registered-models/create",
            {"json": {"name": "own-2", "tags": [{"key": "promotion.by", "value": "x"}]}},
        ),
        ("POST", "/api/2.0/mlflow/experiments/create", {"json": {"name": f"{MODEL} promotions"}}),
        ("POST", "/api/2.0/mlflow/experiments/create", {"json": {"name": f"{MODEL} Promotions "}}),
        ("POST", "/api/2.0/mlflow/experiments/create", {"json": {"name": f"{MODEL} promotions (beginning 1)"}}),
        (
            "POST",
            "/api/2.0/mlflow/experiments/create",
            {"json": {"name": "harmless", "tags": [{"key": "ledger.of", "value": MODEL}]}},
        ),
        (
            "POST",
            "/api/2.0/mlflow/experiments/update",
            {"json": {"experiment_id": "1", "new_name": f"{MODEL} promotions"}},
        ),
        (
            "POST",
            "/api/2.0/mlflow/experiments/set-experiment-tag",
            {"json": {"experiment_id": "1", "key": "ledger.of", "value": MODEL}},
        ),
        ("POST", "/api/3.0/mlflow/roles/assign", {"json": {"username": "pipeline", "role_id": 1}}),
        ("POST", "/api/3.0/mlflow/roles/create", {"json": {"name": "reviewer", "workspace": "default"}}),
        ("POST", "/api/2.0/mlflow/users/create", {"json": {"username": "other", "password": "long-enough-for-it"}}),
        ("PATCH", "/api/2.0/mlflow/users/update-admin", {"json": {"username": "pipeline", "is_admin": True}}),
        (
            "PATCH",
            "/api/2.0/mlflow/users/update-password",
            {"json": {"username": "reviewer", "password": "long-enough-for-it"}},
        ),
        ("POST", "/api/2.0/mlflow/webhooks", {"json": {"name": "mine", "url": "http://127.0.0.1:9", "events": []}}),
    ],
)
def test_what_is_as_good_as_a_promotion_is_refused_to_the_pipeline(
    registry: Registry, method: str, path: str, options: Mapping[str, Any]
) -> None:
    # A model that is the pipeline's own, so that MLflow's rules say yes to the name in the query.
    registry.call("pipeline", "POST", "/api/2.0/mlflow/registered-models/create", {"name": "own"})
    before = registry.state()
    answer = registry.call("pipeline", method, path, **options)
    assert 400 <= answer.status_code < 500, answer.text
    assert registry.state() == before


@pytest.mark.parametrize("user", ["reviewer", "promoter", ADMIN])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/api/2.0/mlflow/model-versions/delete", {"name": MODEL, "version": "1"}),
        ("DELETE", "/api/2.0/mlflow/registered-models/delete", {"name": MODEL}),
        ("POST", "/api/2.0/mlflow/registered-models/rename", {"name": MODEL, "new_name": "other"}),
    ],
)
def test_the_champion_is_neither_deleted_nor_renamed_by_anybody(
    registry: Registry, user: str, method: str, path: str, body: dict[str, str]
) -> None:
    before = registry.state()
    assert registry.call(user, method, path, body).status_code == 403
    assert registry.state() == before


@dataclass(frozen=True)
class Made:
    """A version of the model `KEPT`, with files in its run and its logged model."""

    number: str
    experiment: str
    run: str
    logged: str

    def put(self, text: str) -> str:
        """The text, with this version's identifiers in it."""
        return text.format(number=self.number, experiment=self.experiment, run=self.run, logged=self.logged)


KEPT = "kept"
RUN_FILES = ("gate/decision.json", "evaluation/metrics.json", "card/model_card.json", "training/training.json")
MODEL_FILE = "data/model.keras"


def make_version(registry: Registry) -> Made:
    experiment = registry.done(
        "pipeline", "GET", "/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": EXPERIMENT}
    )["experiment"]["experiment_id"]
    digest = f"{len(registry.stack.query('SELECT 1 FROM model_versions')):064x}"
    tags = [{"key": key, "value": value} for key, value in {"model_digest": digest, "gate": "passed"}.items()]
    body = {"experiment_id": experiment, "tags": tags}
    run = registry.done("pipeline", "POST", "/api/2.0/mlflow/runs/create", body)["run"]["info"]["run_id"]
    body = {"experiment_id": experiment, "name": "classifier", "source_run_id": run, "tags": tags[:1]}
    logged = registry.done("pipeline", "POST", "/api/2.0/mlflow/logged-models", body)["model"]["info"]["model_id"]
    for path in (*(f"{run}/artifacts/{path}" for path in RUN_FILES), f"models/{logged}/artifacts/{MODEL_FILE}"):
        answer = registry.call("pipeline", "PUT", f"{FILES}/{experiment}/{path}", data=b"as it was judged")
        assert answer.status_code == 200, answer.text
    registry.done("pipeline", "PATCH", f"/api/2.0/mlflow/logged-models/{logged}", {"model_id": logged, "status": 2})
    body = {"name": KEPT, "source": f"models:/{logged}", "run_id": run, "model_id": logged, "tags": tags}
    made = registry.done("pipeline", "POST", "/api/2.0/mlflow/model-versions/create", {**body, "description": "card"})
    return Made(str(made["model_version"]["version"]), experiment, run, logged)


def record(registry: Registry, made: Made, champion_after: str) -> None:
    """The ledger and the version say what the promoter would say."""
    name = f"{KEPT} promotions"
    found = registry.call(
        "promoter", "GET", "/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": name}
    )
    ledger = (
        found.json()["experiment"]["experiment_id"]
        if found.status_code == 200
        else registry.done("promoter", "POST", "/api/2.0/mlflow/experiments/create", {"name": name})["experiment_id"]
    )
    tags = [{"key": "champion_after", "value": champion_after}]
    registry.done("promoter", "POST", "/api/2.0/mlflow/runs/create", {"experiment_id": ledger, "tags": tags})
    tag = {"name": KEPT, "version": made.number, "key": "promotion.entry", "value": f"1 {'0' * 64}"}
    registry.done("promoter", "POST", VERSION_TAG, tag)


@pytest.fixture(scope="module")
def kept(connected_registry: Registry) -> dict[str, Made]:
    """A version that was champion, one that is, one that was refused, and one that nobody has asked for."""
    names = ("former", "champion", "refused", "new")
    connected_registry.done(ADMIN, "POST", "/api/2.0/mlflow/registered-models/create", {"name": KEPT})
    for role in connected_registry.done(ADMIN, "GET", "/api/3.0/mlflow/roles/list")["roles"]:
        grant = {"resource_type": "registered_model", "resource_pattern": KEPT, "permission": "MANAGE"}
        if role["name"] in NAMES:
            body = {"role_id": role["id"], **grant}
            connected_registry.done(ADMIN, "POST", "/api/3.0/mlflow/roles/permissions/add", body)
    made = {name: make_version(connected_registry) for name in names}
    record(connected_registry, made["former"], made["former"].number)
    record(connected_registry, made["refused"], made["champion"].number)
    body = {"name": KEPT, "alias": "champion", "version": made["champion"].number}
    connected_registry.done("reviewer", "POST", ALIAS, body)
    return made


@pytest.mark.parametrize("user", ["pipeline", "reviewer", "promoter", ADMIN])
@pytest.mark.parametrize("which", ["champion", "former"])
def test_what_a_promotion_rests_on_is_changed_by_nobody(
    registry: Registry, kept: dict[str, Made], which: str, user: str
) -> None:
    made = kept[which]
    version = {"name": KEPT, "version": made.number}
    api, logged = "/api/2.0/mlflow", f"/api/2.0/mlflow/logged-models/{made.logged}"
    new = [{"key": "model_digest", "value": "f" * 64}]
    changes: list[tuple[str, str, Any]] = [
        *(("POST", VERSION_TAG, {**version, "key": key, "value": "x"}) for key in
          ("model_digest", "data_md5", "splits_sha256", "gate", "metrics_sha256", "evidence_sha256", "card_sha256")),
        ("POST", VERSION_TAG, {**version, "version": f" 0{made.number}", "key": "gate", "value": "x"}),
        ("DELETE", f"{api}/model-versions/delete-tag", {**version, "key": "model_digest"}),
        ("PATCH", f"{api}/model-versions/update", {**version, "description": "another card"}),
        ("PATCH", "/ajax-api/2.0/mlflow/model-versions/update", {**version, "description": ""}),
        ("POST", f"{api}/runs/delete", {"run_id": made.run}),
        ("POST", f"{api}/runs/set-tag", {"run_id": made.run, "key": "gate", "value": "x"}),
        ("POST", f"{api}/runs/set-tag", {"run_uuid": made.run, "key": "model_digest", "value": "x"}),
        ("POST", f"{api}/runs/delete-tag", {"run_id": made.run, "key": "gate"}),
        ("POST", f"{api}/runs/log-batch", {"run_id": made.run, "tags": new}),
        ("POST", f"{api}/experiments/delete", {"experiment_id": made.experiment}),
        ("DELETE", logged, None),
        ("PATCH", logged, {"model_id": made.logged, "status": 3}),
        ("PATCH", logged.replace(made.logged, kept["new"].logged), {"model_id": made.logged, "status": 3}),
        ("PATCH", f"{logged}/tags", {"tags": new}),
        ("DELETE", f"{logged}/tags/model_digest", None),
    ]  # fmt: skip
    may = {
        "promoter": {("POST", VERSION_TAG), ("PATCH", f"{api}/model-versions/update"),
                     ("DELETE", f"{api}/model-versions/delete-tag"),
                     ("PATCH", "/ajax-api/2.0/mlflow/model-versions/update")},
        "reviewer": {("PATCH", f"{api}/model-versions/update"),
                     ("PATCH", "/ajax-api/2.0/mlflow/model-versions/update")},
    }.get(user, set())  # fmt: skip
    before = registry.state()
    refused = [change for change in changes if change[:2] not in may]
    told = [(change, registry.call(user, *change).status_code) for change in refused]
    assert [one for one in told if one[1] != 403] == []
    assert registry.state() == before


@pytest.mark.parametrize("user", ["pipeline", "promoter", ADMIN])
@pytest.mark.parametrize("which", ["champion", "former"])
def test_the_files_that_a_promotion_rests_on_are_changed_by_nobody(
    registry: Registry, kept: dict[str, Made], which: str, user: str
) -> None:
    made = kept[which]
    before = registry.files(made.experiment)
    ways = [
        "{experiment}/models/{logged}/artifacts/data/model.keras",
        "{experiment}/models/{logged}/artifacts/data/another.keras",
        "{experiment}/models/{logged}/artifacts/MLmodel",
        "{experiment}//models//{logged}/artifacts/data/model.keras",
        "{experiment}/models/{logged}/./artifacts/data//model.keras",
        "{experiment}%2Fmodels%2F{logged}%2Fartifacts%2Fdata%2Fmodel.keras",
        "{experiment}%252Fmodels%252F{logged}%252Fartifacts/data/model.keras",
        "{experiment}/x/../models/{logged}/artifacts/data/model.keras",
        "{experiment}/x/%2e%2e/models/{logged}/artifacts/data/model.keras",
        "{experiment}/x/%252e%252e/models/{logged}/artifacts/data/model.keras",
        "/{experiment}/models/{logged}/artifacts/data/model.keras",
        "%2F{experiment}/models/{logged}/artifacts/data/model.keras",
        "{experiment}/models/{logged}/artifacts/data/model.keras?x=1",
        "{experiment}/models/{logged}/artifacts/data/model.keras%3Fx",
        "{experiment}/{run}/artifacts/gate/decision.json",
        "{experiment}/{run}/artifacts/evaluation/metrics.json",
        "{experiment}/{run}/artifacts/evaluation/new.html",
        "{experiment}/{run}/artifacts/card/model_card.json",
        "{experiment}/{run}/artifacts/training/training.json",
        "{experiment}/{run}/artifacts/%67ate/decision.json",
        "{experiment}/{run}/artifacts//gate/decision.json",
        "{experiment}/{run}/artifacts/./gate/decision.json",
        "{experiment}/{run}/artifacts/data/../gate/decision.json",
        "{experiment}/{run}/./artifacts/gate/decision.json",
    ]
    folders = [
        "{experiment}/models/{logged}/artifacts/data", "{experiment}/models/{logged}", "{experiment}/models",
        "{experiment}/models/", "{experiment}", "{experiment}/{run}", "{experiment}/{run}/artifacts",
        "{experiment}/{run}/artifacts/gate", "{experiment}/{run}/artifacts/gate/", "{experiment}/{run}/artifacts/",
        "{experiment}/.", "./{experiment}", "models", ".", "%20",
    ]  # fmt: skip
    told = [
        (method, address, way, _sent(registry, user, method, f"{address}/{made.put(way)}", b"forged"))
        for method, places in (("PUT", ways), ("DELETE", ways + folders))
        for address in (FILES, FILES.replace("/api", "/ajax-api"))
        for way in places
    ]
    assert [one for one in told if not 300 <= one[-1] < 500] == []
    assert registry.files(made.experiment) == before


def _sent(registry: Registry, user: str, method: str, path: str, body: bytes) -> int:
    """The answer to a request whose path stands on the wire as it is given here."""
    address = urlsplit(registry.stack.address)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
    login = b64encode(f"{user}:{registry.stack.passwords[user]}".encode()).decode()
    try:
        connection.request(method, path, body, {"Authorization": f"Basic {login}"})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("user", ["pipeline", ADMIN])
def test_no_other_way_of_uploading_reaches_what_a_promotion_rests_on(
    registry: Registry, kept: dict[str, Made], user: str
) -> None:
    made = kept["champion"]
    before = registry.files(made.experiment)
    model, run = (made.put(f"{{experiment}}/{place}/artifacts") for place in ("models/{logged}", "{run}"))
    parts = {"upload_id": "x", "parts": [{"part_number": 1, "etag": "x"}]}
    ways: list[tuple[str, str, dict[str, Any]]] = [
        *(("POST", f"{api}/2.0/mlflow-artifacts/mpu/{step}/{folder}", {"json": {"path": name, "num_parts": 1, **parts}})
          for api in ("/api", "/ajax-api") for step in ("create", "complete", "abort")
          for folder, name in ((f"{model}/data", "model.keras"), (f"{run}/gate", "decision.json"),
                               (f"{run}/gate", "x/decision.json"), (f"{model}//data", "../data/model.keras"))),
        *(("POST", "/ajax-api/2.0/mlflow/upload-artifact",
           {"params": {"run_uuid": made.run, "path": path}, "data": b"x"})
          for path in ("gate/decision.json", "%67ate/decision.json", "./gate/decision.json", "evaluation//metrics.json",
                       "gate%252Fdecision.json", "data/../gate/decision.json")),
        *(("POST", f"{api}/2.0/mlflow/artifacts/presigned-upload-url", {"json": body})
          for api in ("/api", "/ajax-api")
          for body in ({"run_id": made.run, "path": "gate/decision.json"},
                       {"model_id": made.logged, "path": MODEL_FILE})),
        *(("POST", "/api/2.0/mlflow/experiments/create",
           {"json": {"name": f"elsewhere {location}", "artifact_location": location}})
          for location in (f"mlflow-artifacts:/{model}", f"s3://{BUCKET}/artifacts/{model}", "file:///tmp/x")),
    ]  # fmt: skip
    told = [(way, registry.call(user, way[0], way[1], **way[2])) for way in ways]
    assert [(way, answer.text) for way, answer in told if not 400 <= answer.status_code < 500] == []
    assert registry.files(made.experiment) == before


def test_an_upload_that_was_begun_before_the_promotion_is_not_taken_after_it(
    registry: Registry, kept: dict[str, Made]
) -> None:
    made = make_version(registry)
    stack, address = registry.stack, urlsplit(registry.stack.address)
    login = b64encode(f"pipeline:{stack.passwords['pipeline']}".encode()).decode()
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
    connection.putrequest("PUT", f"{FILES}/{made.put('{experiment}/{run}/artifacts/gate/decision.json')}")
    connection.putheader("Authorization", f"Basic {login}")
    connection.putheader("Content-Length", "6")
    connection.endheaders(b"for")
    before = registry.files(made.experiment)
    others = registry.aliases_of(KEPT)
    registry.done("reviewer", "POST", ALIAS, {"name": KEPT, "alias": "champion", "version": made.number})
    try:
        connection.send(b"ged")
        assert connection.getresponse().status == 403
        assert registry.files(made.experiment) == before
    finally:
        connection.close()
        if "champion" in others:
            body = {"name": KEPT, "alias": "champion", "version": others["champion"]}
            registry.done("reviewer", "POST", ALIAS, body)


def test_what_no_promotion_rests_on_is_the_pipelines_to_write(registry: Registry, kept: dict[str, Made]) -> None:
    """Data Docs of the champion, the judgement on a version that was refused, tags that say the same again."""
    champion, new = kept["champion"], kept["new"]
    for made in kept.values():
        docs = f"{FILES}/{made.put('{experiment}/{run}/artifacts/data/data_docs/index.html')}"
        assert registry.call("pipeline", "PUT", docs, data=b"docs").status_code == 200
        assert registry.call("pipeline", "PUT", docs, data=b"other docs").status_code == 200
        folder = f"{FILES}/{made.put('{experiment}/{run}/artifacts/data')}"
        assert registry.call("pipeline", "DELETE", folder).status_code == 200
    same = {"name": KEPT, "version": champion.number}
    registry.done("pipeline", "POST", VERSION_TAG, {**same, "key": "gate", "value": "passed"})
    registry.done("pipeline", "POST", VERSION_TAG, {**same, "key": "note", "value": "seen"})
    registry.done("pipeline", "PATCH", "/api/2.0/mlflow/model-versions/update", {**same, "description": "card"})
    tag = {"run_id": champion.run, "key": "gate", "value": "passed"}
    registry.done("pipeline", "POST", "/api/2.0/mlflow/runs/set-tag", tag)
    for made in (kept["refused"], new):
        version = {"name": KEPT, "version": made.number}
        for path in RUN_FILES:
            address = f"{FILES}/{made.put('{experiment}/{run}/artifacts')}/{path}"
            assert registry.call("pipeline", "PUT", address, data=b"judged anew").status_code == 200
        folder = f"{FILES}/{made.put('{experiment}/{run}/artifacts/evaluation')}"
        assert registry.call("pipeline", "DELETE", folder).status_code == 200
        registry.done("pipeline", "POST", VERSION_TAG, {**version, "key": "evidence_sha256", "value": "0" * 64})
        registry.done("pipeline", "PATCH", "/api/2.0/mlflow/model-versions/update", {**version, "description": "new"})
        # The model itself is what the version is.
        model = f"{FILES}/{made.put('{experiment}/models/{logged}/artifacts/data/model.keras')}"
        assert registry.call("pipeline", "PUT", model, data=b"forged").status_code == 403
        assert registry.call("pipeline", "DELETE", model).status_code == 403
    run = registry.done("pipeline", "POST", "/api/2.0/mlflow/runs/create", {"experiment_id": champion.experiment})
    run_id = run["run"]["info"]["run_id"]
    registry.done("pipeline", "POST", "/api/2.0/mlflow/runs/delete", {"run_id": run_id})


def test_a_reviewer_may_amend_the_card_of_what_was_promoted(registry: Registry, kept: dict[str, Made]) -> None:
    body = {"name": KEPT, "version": kept["champion"].number}
    for description in ("card, and a remark", "card"):
        change = {**body, "description": description}
        registry.done("reviewer", "PATCH", "/api/2.0/mlflow/model-versions/update", change)


def test_who_has_no_account_uploads_nothing(registry: Registry, kept: dict[str, Made]) -> None:
    path = f"{FILES}/{kept['champion'].put('{experiment}/models/{logged}/artifacts/data/model.keras')}"
    before = registry.files(kept["champion"].experiment)
    for method in ("PUT", "DELETE"):
        answer = requests.request(method, registry.stack.address + path, data=b"x", timeout=TIMEOUT_S)
        assert answer.status_code == 401
    assert registry.files(kept["champion"].experiment) == before


def test_the_ledger_is_the_promoters_alone(registry: Registry) -> None:
    body = {"name": f"{MODEL} promotions", "tags": [{"key": "ledger.of", "value": MODEL}]}
    experiment = registry.done("promoter", "POST", "/api/2.0/mlflow/experiments/create", body)["experiment_id"]
    run = registry.done("promoter", "POST", "/api/2.0/mlflow/runs/create", {"experiment_id": experiment})
    run_id = run["run"]["info"]["run_id"]
    writes = [
        ("runs/log-parameter", {"run_id": run_id, "key": "next", "value": "x"}),
        ("runs/log-parameter", {"run_uuid": run_id, "key": "next", "value": "x"}),
        ("runs/log-batch", {"run_id": run_id, "params": [{"key": "next", "value": "x"}]}),
        ("runs/set-tag", {"run_id": run_id, "key": "hook", "value": "x"}),
        ("runs/update", {"run_id": run_id, "status": "FAILED"}),
        ("runs/delete", {"run_id": run_id}),
        ("runs/create", {"experiment_id": experiment}),
        ("experiments/delete", {"experiment_id": experiment}),
        ("experiments/update", {"experiment_id": experiment, "new_name": "gone"}),
        ("experiments/set-experiment-tag", {"experiment_id": experiment, "key": "ledger.root", "value": "x"}),
    ]
    try:
        for user in (ADMIN, "reviewer", "pipeline"):
            for path, change in writes:
                assert registry.call(user, "POST", f"/api/2.0/mlflow/{path}", change).status_code == 403, (user, path)
        read = registry.done("reader", "GET", "/api/2.0/mlflow/runs/get", params={"run_id": run_id})
        assert read["run"]["info"]["status"] == "RUNNING" and "params" not in read["run"]["data"]
        registry.done("promoter", "POST", f"/api/2.0/mlflow/{writes[0][0]}", writes[0][1])
        # Whoever may write is told again by the next set-up: another promoter has the same rights.
        assert f"MANAGE on experiment {experiment}" in set_up(registry.stack)
    finally:
        registry.done("promoter", "POST", "/api/2.0/mlflow/experiments/delete", {"experiment_id": experiment})


def test_who_has_not_logged_in_learns_and_changes_nothing(registry: Registry, versions: tuple[str, str]) -> None:
    before = registry.state()
    for path in (ALIAS, "/api/2.0/braintumor/rights", "/version", "/graphql"):
        for method in ("GET", "POST"):
            answer = requests.request(
                method,
                registry.stack.address + path,
                json=_with_version({"json": SETTING}, versions[1])["json"],
                timeout=TIMEOUT_S,
            )
            assert answer.status_code in {401, 405}, path
    wrong = requests.post(registry.stack.address + ALIAS, json=SETTING, auth=("reviewer", "guessed"), timeout=TIMEOUT_S)
    assert wrong.status_code == 401
    assert registry.state() == before


def test_the_server_tells_everybody_their_rights(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from braintumor.registry.rights import ServerRights, server_rights

    for user in NAMES:
        for name, value in registry.stack.environment_of(user).items():
            monkeypatch.setenv(name, value)
        roles = () if user == ADMIN else (user,)
        rights = server_rights()
        assert rights == ServerRights(user, roles)
        assert rights.may_promote == (user in {"reviewer", "promoter"})
        assert rights.may_record == (user == "promoter")


def run_setup(registry: Registry, user: str, *options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    import os

    command = [str(Path(sys.executable).with_name("braintumor")), "registry", "setup", *options]
    env = dict(os.environ) | registry.stack.environment_of(user) | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def accounts(registry: Registry) -> list[list[list[str]]]:
    return [
        registry.stack.query(f"SELECT * FROM {table} ORDER BY 1", "accounts")
        for table in ("users", "roles", "role_permissions", "user_role_assignments")
    ]


def test_set_up_again_changes_nothing_and_a_changed_file_changes_what_it_says(
    registry: Registry, tmp_path: Path
) -> None:
    before = accounts(registry)
    assert set_up(registry.stack).strip() == "registry: all is there"
    assert accounts(registry) == before
    (tmp_path / "users.yaml").write_text("dora: pipeline\nreader: reader\n")
    (tmp_path / "passwords").mkdir()
    (tmp_path / "passwords/dora").write_text("a-password-of-dora\n")
    options = ("--users", str(tmp_path / "users.yaml"), "--passwords", str(tmp_path / "passwords"))
    registry.stack.passwords["dora"] = "a-password-of-dora"
    made = run_setup(registry, ADMIN, *options)
    assert made.returncode == 0 and "user dora is pipeline" in made.stdout
    assert "a-password-of-dora" not in made.stdout + made.stderr
    assert registry.done("dora", "GET", "/api/2.0/braintumor/rights")["roles"] == ["pipeline"]
    (tmp_path / "users.yaml").write_text("dora: reader\n")
    (tmp_path / "passwords/dora").write_text("another-password-of-dora\n")
    registry.stack.passwords["dora"] = "another-password-of-dora"
    changed = run_setup(registry, ADMIN, *options)
    assert changed.returncode == 0 and "user dora is pipeline no more" in changed.stdout
    assert registry.done("dora", "GET", "/api/2.0/braintumor/rights")["roles"] == ["reader"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("- a\n", "not a list of users"),
        ("{", "no YAML"),
        ("eve: emperor\n", "there are reviewer, promoter, pipeline, reader"),
        ("eve: reader\n", "eve has no password yet; put one into BRAINTUMOR_PASSWORD_EVE"),
        (None, "is missing"),
    ],
)
def test_a_wrong_file_of_users_changes_nothing(
    registry: Registry, tmp_path: Path, content: str | None, told: str
) -> None:
    before = accounts(registry)
    if content is not None:
        (tmp_path / "users.yaml").write_text(content)
    refused = run_setup(registry, ADMIN, "--users", str(tmp_path / "users.yaml"))
    assert refused.returncode == 2 and told in refused.stderr and "Traceback" not in refused.stderr
    assert accounts(registry) == before


def test_set_up_needs_an_administrator_a_long_password_and_a_secret_for_the_webhook(
    registry: Registry, tmp_path: Path
) -> None:
    before = accounts(registry)
    for user in ("reviewer", "promoter"):
        refused = run_setup(registry, user)
        assert refused.returncode == 2 and f"{user} is no administrator" in refused.stderr
    (tmp_path / "users.yaml").write_text("eve: reader\n")
    short = run_setup(registry, ADMIN, "--users", str(tmp_path / "users.yaml"), BRAINTUMOR_PASSWORD_EVE="short")
    assert short.returncode == 2 and "shorter than 12" in short.stderr and "short." not in short.stdout
    unsigned = run_setup(
        registry, ADMIN, "--webhook-address", "http://127.0.0.1:1/webhook", BRAINTUMOR_WEBHOOK_SECRET=""
    )
    assert unsigned.returncode == 2 and "BRAINTUMOR_WEBHOOK_SECRET" in unsigned.stderr
    assert accounts(registry) == before


def test_the_webhook_is_made_once_and_follows_its_address(registry: Registry) -> None:
    for address in ("http://127.0.0.1:1/webhook", "http://127.0.0.1:1/webhook", "http://127.0.0.1:2/webhook"):
        set_up(registry.stack, address)
        webhooks = registry.done(ADMIN, "GET", "/api/2.0/mlflow/webhooks")["webhooks"]
        assert [webhook["url"] for webhook in webhooks] == [address]
        assert len(webhooks[0]["events"]) == 2
        assert registry.stack.webhook_secret not in json.dumps(webhooks)


def test_no_secret_stands_in_logs_databases_or_processes(registry: Registry, versions: tuple[str, str]) -> None:
    stack = registry.stack
    registry.promote(versions[1])
    texts = {f"{part}.log": stack.log(part) for part in ("postgres", "s3", "mlflow")}  # type: ignore[arg-type]
    for name in ("mlflow", "accounts"):
        program = str(postgres_programs() / "pg_dump")
        texts[name] = subprocess.run(
            [program, stack.database_address(name)], check=True, capture_output=True, text=True
        ).stdout
    assert versions[1] in texts["mlflow"]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            texts[str(process)] = process.read_text(errors="replace")
        except OSError:
            continue
    found = [name for name, text in texts.items() if any(secret in text for secret in stack.secrets)]
    assert found == []


@pytest.mark.timeout(600)
def test_a_server_that_is_not_guarded_does_not_come_up_or_is_known(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from braintumor.registry.rights import server_rights

    stack = registry.stack
    for name, value in stack.environment_of("reviewer").items():
        monkeypatch.setenv(name, value)
    stack.kill("mlflow")
    stack.app = "basic-auth"
    stack.start("mlflow")
    try:
        assert server_rights() is None
        refused = run_setup(registry, ADMIN)
        assert refused.returncode == 2 and "--app-name braintumor-auth" in refused.stderr
    finally:
        stack.app = "braintumor-auth"
        stack.restart("mlflow")
    assert server_rights() is not None
