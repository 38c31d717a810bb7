"""The way to the API of Kubeflow Pipelines 2: its address, how long we wait for it, and its failures in words.

What is asked of the API passes through `_Door`, which turns whatever goes wrong there into one UserError; nothing is
sent twice, so that a run is never started twice.
"""

import json
import os
import re
import warnings
from typing import Any
from urllib.parse import urlsplit

import kfp
import kfp_server_api
import urllib3
from kfp_server_api.rest import RESTClientObject

from braintumor.errors import UserError

CONNECT_SECONDS, FIRST_ANSWER_SECONDS, ANSWER_SECONDS = 5, 8, 60


class Refused(UserError):
    """The API answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def connect(endpoint: str | None = None, token: str | None = None, namespace: str | None = None) -> kfp.Client:
    """A client of the cluster that answers at `endpoint` (default: KF_PIPELINES_ENDPOINT, KF_PIPELINES_TOKEN).

    Raises UserError within 15 seconds if there is no endpoint, nobody answers there, the token is refused, something
    else than the API answers, or `namespace` does not go with the cluster: with several users it is needed, with one
    there is none.
    """
    address = _checked_endpoint(endpoint or os.environ.get("KF_PIPELINES_ENDPOINT"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it is for version 2 alone
        client = _Client(host=address, existing_token=_checked_token(token or os.environ.get("KF_PIPELINES_TOKEN")))
    has_users = bool(client.get_kfp_healthz().multi_user)
    namespace = namespace or client.get_user_namespace() or None
    if has_users and not namespace:
        raise UserError(f"{address} has several users; say whose namespace with --namespace")
    if namespace and not has_users:
        raise UserError(f"{address} has one user and no namespaces of users; leave out --namespace")
    client.set_user_namespace(namespace or "")
    return client


class _Client(kfp.Client):
    """The client without what it looks up and leaves behind by itself: settings and cookies in the home folder, sign-in
    with Google, kubeconfig."""

    def _load_config(
        self,
        host: str,
        client_id: str | None,
        namespace: str,
        other_client_id: str | None,
        other_client_secret: str | None,
        existing_token: str | None,
        *others: object,
    ) -> kfp_server_api.Configuration:
        config = kfp_server_api.Configuration(host=host)
        if existing_token:
            config.api_key["authorization"], config.api_key_prefix["authorization"] = existing_token, "Bearer"
        # The authority of an own certificate, as other programs are told of it; the certificate is always checked.
        config.ssl_ca_cert = os.environ.get("SSL_CERT_FILE")
        # A redirect leads to a page to sign in, and what was sent may not be sent again.
        config.retries = urllib3.Retry(total=0, redirect=False)
        return config

    def _load_context_setting_or_default(self) -> None:
        self._context_setting = {"namespace": ""}

    def set_user_namespace(self, namespace: str) -> None:
        """Set the namespace of this client alone."""
        self._context_setting["namespace"] = namespace

    def get_kfp_healthz(self, sleep_duration: int = 0) -> kfp_server_api.V2beta1GetHealthzResponse:
        """What the cluster says of itself, asked once; the constructor calls it first of all."""
        api = self._healthz_api.api_client
        if not isinstance(api.rest_client, _Door):
            api.rest_client = _Door(api.configuration)
        return self._healthz_api.healthz_service_get_healthz()


class _Door(RESTClientObject):
    """Every request has a time limit, and every failure is a UserError that names the place and the remedy."""

    def __init__(self, configuration: kfp_server_api.Configuration) -> None:
        super().__init__(configuration)
        self.host = configuration.host
        self.has_token = bool(configuration.api_key)

    def request(self, method: str, url: str, **options: Any) -> Any:
        """The answer, which is JSON."""
        seconds = FIRST_ANSWER_SECONDS if url.endswith("/healthz") else ANSWER_SECONDS
        options["_request_timeout"] = (CONNECT_SECONDS, seconds)
        try:
            answer = super().request(method, url, **options)
        except kfp_server_api.ApiException as error:
            raise self._refused(error) from error
        except urllib3.exceptions.HTTPError as error:
            raise UserError(self._broken(method, error)) from error
        if _json_object(answer.data) is None:
            raise UserError(
                f"{self.host} answers with a web page, not as the API of Kubeflow Pipelines; check "
                f"KF_PIPELINES_ENDPOINT{self._token_remedy()}"
            )
        return answer

    def _refused(self, error: kfp_server_api.ApiException) -> UserError:
        told = _json_object(error.body)
        message = str(told.get("message") or told.get("error_message") or told.get("error") or "") if told else ""
        if error.status in (301, 302, 303, 307, 308):
            reason = f"{self.host} sends on to another page, to sign in most likely{self._token_remedy()}"
        elif error.status == 401 or (error.status == 403 and not message):
            reason = f"{self.host} refuses access ({error.status}){self._token_remedy()}"
        elif error.status == 403:
            reason = f"{self.host} does not allow this: {message}; ask for rights in the namespace"
        elif told is None and error.status == 404:
            reason = f"{self.host} has no API of Kubeflow Pipelines 2 there (404); check KF_PIPELINES_ENDPOINT"
        elif told is None or error.status >= 500:
            reason = f"{self.host} answers {error.status} {message or error.reason}; is Kubeflow Pipelines well?"
        else:
            reason = f"Kubeflow Pipelines refuses it ({error.status}): {message}"
        return Refused(reason, error.status)

    def _token_remedy(self) -> str:
        if self.has_token:
            return "; the token in KF_PIPELINES_TOKEN has expired or is not valid there: set a fresh one"
        return "; set a token in KF_PIPELINES_TOKEN"

    def _broken(self, method: str, error: Exception) -> str:
        cause = getattr(error, "reason", None) or error
        if isinstance(cause, urllib3.exceptions.SSLError):
            return (
                f"the certificate of {self.host} is not trusted ({cause}); name the file of its authority in "
                "SSL_CERT_FILE"
            )
        if isinstance(cause, urllib3.exceptions.ReadTimeoutError):
            reason = f"{self.host} did not answer in time"
        elif isinstance(cause, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError):
            return (
                f"no cluster answers at {self.host}; check KF_PIPELINES_ENDPOINT, and that 'kubectl port-forward' "
                "still runs if it goes through one"
            )
        else:
            reason = f"the connection to {self.host} broke"
        if method == "GET":
            return f"{reason}; run it again"
        return f"{reason} while something was changed there; look at 'braintumor pipeline status' and run it again"


def _json_object(body: bytes | str | None) -> dict[str, Any] | None:
    try:
        content = json.loads(body or "")
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _checked_endpoint(endpoint: str | None) -> str:
    if not endpoint:
        raise UserError(
            "KF_PIPELINES_ENDPOINT is not set; set it to the address of Kubeflow Pipelines, as http://localhost:8080 "
            "after 'kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80'"
        )
    try:
        parts = urlsplit(endpoint.strip())
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or not endpoint.strip().isascii() or re.search(r"\s", endpoint.strip()):
        raise UserError("KF_PIPELINES_ENDPOINT is no address; it needs http:// or https:// and a host")
    if parts.username or parts.password:
        raise UserError("KF_PIPELINES_ENDPOINT holds a password; take it out, and set a token in KF_PIPELINES_TOKEN")
    if parts.query or parts.fragment:
        raise UserError("KF_PIPELINES_ENDPOINT holds '?' or '#'; give the address without the page, as https://host")
    return endpoint.strip().rstrip("/")


def _checked_token(token: str | None) -> str | None:
    token = token.strip() if token else None
    if token and not re.fullmatch(r"[!-~]+", token):
        raise UserError("KF_PIPELINES_TOKEN holds characters that no token has; copy it again, without 'Bearer'")
    return token
