"""A registry's server made ready for a team: roles with their rights, users, the model, and the promoter's webhook."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from braintumor.errors import UserError
from braintumor.params import RegisterParams
from braintumor.registry.ledger import experiment_name
from braintumor.registry.rights import PIPELINE, PROMOTER, READER, REVIEWER, ROLES, server_rights
from braintumor.registry.server import SERVER, connected, error_code, tracking_uri
from braintumor.registry.tracking import ensure_experiment
from braintumor.registry.versions import MODEL_DESCRIPTION

if TYPE_CHECKING:
    from mlflow import MlflowClient

PASSWORD_VARIABLE = "BRAINTUMOR_PASSWORD_"
WEBHOOK_SECRET_VARIABLE = "BRAINTUMOR_WEBHOOK_SECRET"
WEBHOOK = "braintumor-promoter"
WEBHOOK_EVENTS = ["model_version_alias.created", "model_version_alias.deleted"]
# MLflow keeps the roles of a server without workspaces in this one.
WORKSPACE = "default"
MIN_PASSWORD_LENGTH = 12  # MLflow's

DESCRIPTIONS = {
    REVIEWER: "Promotes versions: may set and delete the alias 'champion'.",
    PROMOTER: "The promoter service: puts back what may not be promoted, and alone writes the ledger.",
    PIPELINE: "Trains and registers versions, and sets the alias 'challenger'.",
    READER: "Sees everything and changes nothing.",
}


@dataclass(frozen=True)
class Grant:
    """A right of a role: MLflow's kind of resource, which one ('*': all), and MLflow's level of permission."""

    resource_type: str
    pattern: str
    permission: str


def set_up(
    params: RegisterParams,
    users: Path | None,
    passwords: Path | None,
    webhook_address: str | None,
) -> list[str]:
    """Roles, users, model and webhook are there as asked for; what was done, a line each, empty if all was there.

    `users` is a YAML file of names and their role. A password is read from the file of the user's name in `passwords`
    or from BRAINTUMOR_PASSWORD_<NAME>; a user who exists keeps his where none is given. Whoever is not named stays as
    he is. May be killed and run again.

    Raises UserError, and has changed nothing, for a server without the plugin, and where we are no administrator, a
    password is missing, or a role is unknown.
    """
    wanted = {} if users is None else read_users(users)
    secret = _webhook_secret(webhook_address)
    if not tracking_uri().startswith(SERVER):
        raise UserError(f"{tracking_uri()} is no server; set MLFLOW_TRACKING_URI to one with accounts")
    if server_rights() is None:
        raise UserError(
            "the server does not guard the alias 'champion'; start it with 'mlflow server --app-name braintumor-auth'"
        )
    with connected() as client:
        accounts = _Accounts(client.tracking_uri)
        accounts.refuse_all_but_administrators()
        known = accounts.users()
        given = read_passwords(wanted, known, passwords)
        done = [
            *_set_up_model(client, params),
            *_set_up_roles(client, accounts, params),
            *_set_up_users(accounts, wanted, known, given),
        ]
        if webhook_address is not None:
            done += _set_up_webhook(client, webhook_address, secret)
    return done


def read_users(path: Path) -> dict[str, str]:
    """Each user's role. Raises UserError for a file that is not names and roles."""
    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; write a line 'name: role' for each user, or leave out --users") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is no YAML; write a line 'name: role' for each user") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) and name.strip() for name in found):
        raise UserError(f"{path} is not a list of users; write a line 'name: role' for each")
    for name, role in found.items():
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{path} gives {name} the role {role!r}; there are {', '.join(ROLES)}")
    return found


def read_passwords(users: Mapping[str, str], known: Iterable[str], folder: Path | None) -> dict[str, str]:
    """The passwords that are given. Raises UserError for a new user without one, and for one that is too short."""
    found: dict[str, str] = {}
    of_variable: dict[str, str] = {}
    for name in users:
        variable = PASSWORD_VARIABLE + "".join(sign if sign.isalnum() else "_" for sign in name).upper()
        other = of_variable.setdefault(variable, name)
        if other != name and folder is None:
            raise UserError(f"{other} and {name} share the variable {variable}; give --passwords with a file for each")
        # A user's name is no path.
        file = folder / name if folder is not None and Path(name).name == name else None
        if file is not None and file.is_file():
            password = file.read_text().rstrip("\r\n")
        else:
            password = os.environ.get(variable, "")
        if not password and name not in known:
            place = f"the file {folder / name}" if folder is not None else variable
            raise UserError(f"{name} has no password yet; put one into {place}, of {MIN_PASSWORD_LENGTH} characters")
        if password and len(password) < MIN_PASSWORD_LENGTH:
            raise UserError(f"the password of {name} is shorter than {MIN_PASSWORD_LENGTH} characters; take a longer")
        if password:
            found[name] = password
    return found


def grants_of(role: str, model_name: str, own_experiments: Sequence[str], ledgers: Sequence[str]) -> list[Grant]:
    """What MLflow lets a role do; `own_experiments` and `ledgers` are ids of experiments.

    MLflow asks EDIT for setting an alias or a tag of a version, and MANAGE for deleting one, as for deleting artifacts.
    """
    everybody = [Grant("experiment", "*", "READ"), Grant("registered_model", "*", "READ")]
    return {
        READER: everybody,
        # To take an alias or a reason back; the guard keeps the champion's version from being deleted by it.
        REVIEWER: [*everybody, Grant("registered_model", model_name, "MANAGE")],
        PROMOTER: [
            *everybody,
            Grant("registered_model", model_name, "MANAGE"),
            *(Grant("experiment", ledger, "MANAGE") for ledger in ledgers),
        ],
        # An evaluation that is published again replaces its artifacts.
        PIPELINE: [
            *everybody,
            Grant("registered_model", model_name, "EDIT"),
            *(Grant("experiment", experiment, "MANAGE") for experiment in own_experiments),
        ],
    }[role]


def _webhook_secret(address: str | None) -> str:
    if address is None:
        return ""
    if urlsplit(address).scheme not in {"http", "https"} or not urlsplit(address).hostname:
        raise UserError("--webhook-address is no address; give the promoter's, as https://promoter.example/webhook")
    secret = os.environ.get(WEBHOOK_SECRET_VARIABLE, "").strip()
    if not secret:
        raise UserError(f"the webhook needs a secret; set {WEBHOOK_SECRET_VARIABLE}, here and for the promoter")
    return secret


def _set_up_model(client: "MlflowClient", params: RegisterParams) -> list[str]:
    """The model and the pipeline's experiment are made by the administrator: whoever makes them may delete them."""
    done = []
    try:
        client.get_registered_model(params.model_name)
    except Exception as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(params.model_name, description=MODEL_DESCRIPTION)
        done.append(f"model {params.model_name} made")
    if client.get_experiment_by_name(params.experiment) is None:
        done.append(f"experiment {params.experiment} made")
    ensure_experiment(client, params.experiment)
    return done


def _set_up_roles(client: "MlflowClient", accounts: "_Accounts", params: RegisterParams) -> list[str]:
    done = []
    own = [ensure_experiment(client, params.experiment)]
    ledger = client.get_experiment_by_name(experiment_name(params.model_name))
    for role in ROLES:
        if role not in accounts.roles():
            accounts.call("POST", 3, "roles/create", name=role, workspace=WORKSPACE, description=DESCRIPTIONS[role])
            done.append(f"role {role} made")
        held = accounts.grants(role)
        for grant in grants_of(role, params.model_name, own, [] if ledger is None else [ledger.experiment_id]):
            permission, number = held.get((grant.resource_type, grant.pattern), (None, None))
            if permission == grant.permission:
                continue
            if number is None:
                accounts.call(
                    "POST", 3, "roles/permissions/add", role_id=accounts.roles()[role],
                    resource_type=grant.resource_type, resource_pattern=grant.pattern, permission=grant.permission,
                )  # fmt: skip
            else:
                accounts.call(
                    "PATCH", 3, "roles/permissions/update", role_permission_id=number, permission=grant.permission
                )
            done.append(f"role {role}: {grant.permission} on {grant.resource_type} {grant.pattern}")
    return done


def _set_up_users(
    accounts: "_Accounts", wanted: Mapping[str, str], known: Mapping[str, set[str]], passwords: Mapping[str, str]
) -> list[str]:
    done = []
    for name, role in wanted.items():
        if name not in known:
            accounts.call("POST", 2, "users/create", username=name, password=passwords[name])
            done.append(f"user {name} made")
        elif name in passwords and not accounts.knows(name, passwords[name]):
            accounts.call("PATCH", 2, "users/update-password", username=name, password=passwords[name])
            done.append(f"user {name} has another password")
        held = known.get(name, set())
        # The new role first: a user must not be without one where this is killed.
        if role not in held:
            accounts.call("POST", 3, "roles/assign", username=name, role_id=accounts.roles()[role])
            done.append(f"user {name} is {role}")
        for other in sorted(held - {role}):
            accounts.call("DELETE", 3, "roles/unassign", username=name, role_id=accounts.roles()[other])
            done.append(f"user {name} is {other} no more")
    return done


def _set_up_webhook(client: "MlflowClient", address: str, secret: str) -> list[str]:
    """The secret can't be read back, so it is written each time."""
    found, token = None, None
    while found is None:
        page = client.list_webhooks(page_token=token)
        found = next((webhook for webhook in page if webhook.name == WEBHOOK), None)
        token = page.token
        if not token:
            break
    if found is None:
        client.create_webhook(
            WEBHOOK, address, WEBHOOK_EVENTS, description="Wakes the promoter.", secret=secret, status="ACTIVE"
        )
        return [f"webhook {WEBHOOK} made"]
    client.update_webhook(found.webhook_id, url=address, events=WEBHOOK_EVENTS, secret=secret, status="ACTIVE")
    is_same = found.url == address and found.status.value == "ACTIVE"
    return (
        []
        if is_same and sorted(str(event) for event in found.events) == WEBHOOK_EVENTS
        else [f"webhook {WEBHOOK} changed"]
    )


class _Accounts:
    """MLflow's accounts, by its REST API: the client that it ships loads the whole server."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._roles: dict[str, int] = {}

    def call(self, method: str, version: int, path: str, **values: Any) -> dict[str, Any]:
        """The server's answer; raises MlflowException if it refuses."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        endpoint = f"/api/{version}.0/mlflow/{path}"
        content = {"params": values} if method == "GET" else {"json": values}
        response = http_request(get_default_host_creds(self._address), endpoint, method, **content)
        if path.startswith("roles/"):
            self._roles = {}
        found = verify_rest_response(response, endpoint)
        answer: dict[str, Any] = found.json() if found.content else {}
        return answer

    def refuse_all_but_administrators(self) -> None:
        """Raises UserError if we are none."""
        user = self.call("GET", 2, "users/current")["user"]
        if not user["is_admin"]:
            raise UserError(
                f"{user['username']} is no administrator of MLflow; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to those of one"
            )

    def users(self) -> dict[str, set[str]]:
        """Each user, and which of our roles he holds."""
        return {
            user["username"]: {role["name"] for role in user["roles"] if _is_ours(role)}
            for user in self.call("GET", 2, "users/list")["users"]
        }

    def roles(self) -> dict[str, int]:
        """The number of each of our roles."""
        if not self._roles:
            found = self.call("GET", 3, "roles/list")["roles"]
            self._roles = {role["name"]: int(role["id"]) for role in found if _is_ours(role)}
        return self._roles

    def grants(self, role: str) -> dict[tuple[str, str], tuple[str, int]]:
        """Permission and number of what the role holds, by kind and pattern."""
        answer = self.call("GET", 3, "roles/permissions/list", role_id=self.roles()[role])
        return {
            (one["resource_type"], one["resource_pattern"]): (one["permission"], int(one["id"]))
            for one in answer["role_permissions"]
        }

    def knows(self, name: str, password: str) -> bool:
        """Whether this is the user's password."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        credentials = get_default_host_creds(self._address)
        credentials.username, credentials.password = name, password
        answer = http_request(credentials, "/api/2.0/mlflow/users/current", "GET", raise_on_status=False)
        return bool(answer.status_code == 200)


def _is_ours(role: Mapping[str, Any]) -> bool:
    return role["workspace"] == WORKSPACE and role["name"] in ROLES
