"""The deployment hook: who serves the model is told, signed, what to serve; of the newest change at least once.

The contract. A receiver serves what stands in `after`: a version, or null for none. It ignores a call whose
Idempotency-Key it has seen, and an entry whose `index` is lower than one that it has applied: promoters that run at the
same time, or a call that the network held up, may tell it of an older change after a newer one. A change that it did
not take may be left out once there is a newer one.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from braintumor.errors import UserError

if TYPE_CHECKING:
    from braintumor.registry.ledger import Recorded

HOOK_VARIABLE = "BRAINTUMOR_DEPLOY_HOOK"
SECRET_VARIABLE = "BRAINTUMOR_DEPLOY_SECRET"
ALLOW_HTTP_VARIABLE = "BRAINTUMOR_DEPLOY_ALLOW_HTTP"
KEY_HEADER, TIMESTAMP_HEADER = "Idempotency-Key", "X-Braintumor-Timestamp"
SIGNATURE_HEADER, SIGNATURE_VERSION = "X-Braintumor-Signature", "v1"
TIMEOUT_S = 10.0  # to connect, and again until the answer begins

REFUSED = "refused"  # the action of an entry that changed nothing


class HookFailed(UserError):
    """The hook did not take the call; it is called again. The message holds no address: that counts as a secret."""


def configured_hook(model_name: str) -> "Callable[[Recorded], None] | None":
    """What calls the hook that BRAINTUMOR_DEPLOY_HOOK names, signed with BRAINTUMOR_DEPLOY_SECRET; None if none is.

    Raises UserError for an address that may not be called, and for one without a secret.
    """
    address = os.environ.get(HOOK_VARIABLE, "").strip()
    if not address:
        return None
    secret = os.environ.get(SECRET_VARIABLE, "").strip()
    if not secret:
        raise UserError(
            f"{HOOK_VARIABLE} is set and {SECRET_VARIABLE} is not: nobody could tell our calls from forged ones; set it"
        )
    check_address(address, is_http_allowed=os.environ.get(ALLOW_HTTP_VARIABLE, "").strip().lower() == "true")
    return lambda recorded: call_hook(recorded, model_name, address, secret)


def check_address(address: str, *, is_http_allowed: bool = False) -> None:
    """The address is https, or http to this machine or a service of the cluster; else UserError."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme not in {"https", "http"} or not host:
        raise UserError(f"{HOOK_VARIABLE} is no https address; mend it")
    if parts.scheme == "http" and not (is_http_allowed or _is_near(host)):
        raise UserError(
            f"{HOOK_VARIABLE} is plain http to another host: who listens could change what is served; use https, "
            f"or set {ALLOW_HTTP_VARIABLE}=true where the network is trusted"
        )


def call_hook(recorded: "Recorded", model_name: str, address: str, secret: str) -> None:
    """The hook has answered 2xx to a POST of the entry as JSON; nothing is sent of an entry that changed nothing.

    The headers: Idempotency-Key, the entry's SHA-256; X-Braintumor-Timestamp, seconds since 1970; and
    X-Braintumor-Signature, 'v1,' and the base64 of HMAC-SHA256 over 'key.timestamp.body'. Raises HookFailed.
    """
    if recorded.entry.action == REFUSED:
        return
    import requests

    key, timestamp = recorded.sha256, str(int(time.time()))
    body = json.dumps({"model": model_name, **asdict(recorded.entry), "entry_sha256": key}, sort_keys=True).encode()
    headers = {
        "Content-Type": "application/json",
        KEY_HEADER: key,
        TIMESTAMP_HEADER: timestamp,
        SIGNATURE_HEADER: sign(secret, key, timestamp, body),
    }
    try:
        # The answer's body is not read: however long it is, it tells nothing.
        with requests.post(
            address, data=body, headers=headers, timeout=TIMEOUT_S, allow_redirects=False, stream=True
        ) as answer:
            status = answer.status_code
    except requests.RequestException as error:
        raise HookFailed(f"the deployment hook does not answer ({type(error).__name__})") from None
    if not 200 <= status < 300:
        told = "redirects, which is not followed" if 300 <= status < 400 else "does not take the call"
        raise HookFailed(f"the deployment hook {told} (HTTP {status})")


def sign(secret: str, key: str, timestamp: str, body: bytes) -> str:
    """'v1,' and the base64 of HMAC-SHA256 over 'key.timestamp.body', as MLflow signs its webhooks, too."""
    signed = f"{key}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return f"{SIGNATURE_VERSION},{base64.b64encode(digest).decode()}"


def _is_near(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith((".svc", ".svc.cluster.local"))
