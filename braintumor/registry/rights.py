"""Who may promote: a plugin of MLflow's server, and the question to a server whether it has it.

MLflow knows rights on a whole model: who may register a version may set every alias. `mlflow server --app-name
braintumor-auth` is MLflow with accounts, and lets holders of two roles alone set or delete the alias 'champion'.
It reads a request with MLflow's own parser and knows it by MLflow's own name for its handler, so that no other spelling
of an address or a body is a way around it. Administrators give the roles, and hold none by being administrators.
"""

import re
import secrets
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from braintumor.errors import UserError
from braintumor.registry.server import CHAMPION, SERVER, connected, tracking_uri

if TYPE_CHECKING:
    from flask import Flask

REVIEWER, PROMOTER, PIPELINE, READER = ROLES = ("reviewer", "promoter", "pipeline", "reader")
PLUGIN_VERSION = 1
MLFLOW_MAJOR = 3

# Tags of versions. What a reviewer asks for, who asked (the server writes it), and what the promoter made of it.
PROMOTION = "promotion."
BY = "promotion.by"
REVIEWERS_TAGS = ("promotion.reason", "promotion.override")

# The ledger of promotions, an MLflow experiment: its name, and the beginning of its own tags.
LEDGER_NAME = re.compile(r" promotions( \(beginning [^)]*\))?$")
LEDGER_TAG = "ledger."

# What a promotion rested on, of a version and of its run; of whatever was promoted it stays.
KEPT_VERSION_TAGS = (
    "model_digest", "data_md5", "splits_sha256", "gate", "metrics_sha256", "evidence_sha256", "card_sha256",
)  # fmt: skip
KEPT_RUN_TAGS = ("gate", "model_digest")
# Folders of a run's artifacts. Data Docs, in the folder `data`, may be published again.
KEPT_FOLDERS = ("training", "evaluation", "gate", "card")

RIGHTS = "/braintumor/rights"

# What is drawn like a letter of 'champion'.
LOOKALIKES = str.maketrans({"0": "o", "1": "i", "l": "i", "-": "", "_": ""})
NOT_SET = "must be plain letters, digits, '-' and '_', and not resemble"


@dataclass(frozen=True)
class ServerRights:
    """Who the server takes us for, and the roles that it knows of us."""

    user: str
    roles: tuple[str, ...]

    @property
    def may_promote(self) -> bool:
        """Whether the server lets us set the alias 'champion'."""
        return REVIEWER in self.roles or PROMOTER in self.roles

    @property
    def may_record(self) -> bool:
        """Whether the server lets us write the ledger."""
        return PROMOTER in self.roles


def server_rights() -> ServerRights | None:
    """Our rights on the server in MLFLOW_TRACKING_URI; None for a database, and for a server without this plugin.

    Raises RegistryUnreachable if it does not answer, UserError if it does not know us.
    """
    if not tracking_uri().startswith(SERVER):
        return None
    with connected():
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        endpoint = f"/api/2.0{RIGHTS}"
        response = http_request(get_default_host_creds(tracking_uri()), endpoint, "GET", raise_on_status=False)
        # MLflow with accounts but without the plugin denies what it does not know.
        if response.status_code in {403, 404}:
            return None
        answer = verify_rest_response(response, endpoint).json()
    if answer.get("plugin") != PLUGIN_VERSION:
        raise UserError(
            f"the server's plugin braintumor-auth is version {answer.get('plugin')}, this is made for version "
            f"{PLUGIN_VERSION}; install the same braintumor on both"
        )
    return ServerRights(str(answer["user"]), tuple(answer["roles"]))


def alias_problem(alias: str) -> str | None:
    """Why nobody may set this alias; None for 'champion' itself, and for one that nobody takes for it."""
    is_plain = re.fullmatch(r"[A-Za-z0-9_-]+", alias) is not None
    if alias == CHAMPION or (is_plain and _drawn(alias) != _drawn(CHAMPION)):
        return None
    return f"the alias {alias!r} may not be set: an alias {NOT_SET} '{CHAMPION}'"


def may_write_tag(key: str, roles: Iterable[str], *, is_deleted: bool = False) -> bool:
    """Whether a holder of these roles may write, or delete, this tag of a version or a registered model."""
    plain = _plain(key)
    if not plain.startswith(PROMOTION):
        return True
    if PROMOTER in roles:
        return is_deleted or plain != BY
    return REVIEWER in roles and key in REVIEWERS_TAGS


def is_ledger_name(name: str) -> bool:
    """Whether an experiment of this name is, or looks like, a ledger."""
    return LEDGER_NAME.search(_plain(name)) is not None


def is_judged_file(parts: Sequence[str]) -> bool:
    """Whether a promotion rests on this file or folder, given by its path within the run's folder."""
    return len(parts) < 2 or parts[0] != "artifacts" or parts[1] in KEPT_FOLDERS


def create_app(app: "Flask | None" = None) -> Any:
    """MLflow's server with accounts, where reviewers and the promoter alone set 'champion'.

    Raises MlflowException, so that the server does not come up, for an MLflow that this was not made for.
    """
    from mlflow.server import app as mlflow_app
    from mlflow.server import auth

    from braintumor.registry.rights_guard import refuse_unknown_mlflow, tell_rights, watch, watch_uploads

    flask_app = app or mlflow_app
    refuse_unknown_mlflow(flask_app)
    served = auth.create_app(flask_app)
    # After MLflow's own: what reaches the guard comes from a user who may do it by MLflow's rights.
    watch(flask_app)
    watch_uploads(served)
    tell_rights(flask_app)
    return served


def signature(user: str) -> str:
    """What the tag `promotion.by` says; no two are equal."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{user} at {now} #{secrets.token_hex(8)}"


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _drawn(alias: str) -> str:
    """The alias as a reader sees it who does not look closely."""
    return _plain(alias).translate(LOOKALIKES)
