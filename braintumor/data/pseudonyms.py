"""Names for patients that lead nobody back to a person, and are the same for the same patient.

A patient's number becomes an HMAC under the site's own key: a plain digest of a hospital number can be undone by trying
all numbers. Whoever holds the key can find a patient again; it belongs with the site's other secrets.
"""

import hmac
import os
from collections.abc import Iterable

from braintumor.errors import UserError
from braintumor.labels import HASHED_PATIENT

PATIENT_KEY_VARIABLE = "BRAINTUMOR_PATIENT_KEY"
SHORTEST_KEY = 16
KEY_DIGITS, PATIENT_DIGITS = 6, 16


def patient_key() -> bytes | None:
    """The site's key, None where none is set; UserError for one that can be guessed."""
    key = os.environ.get(PATIENT_KEY_VARIABLE, "").strip().encode()
    if 0 < len(key) < SHORTEST_KEY:
        raise UserError(
            f"{PATIENT_KEY_VARIABLE} is shorter than {SHORTEST_KEY} characters; take what 'openssl rand -hex 32' prints"
        )
    return key or None


def pseudonym(patient: str, key: bytes) -> str:
    """The patient's name under this key; HASHED_PATIENT matches it, and tells one key from another."""
    # Letter case and spaces are typed one way here and another there.
    digest = hmac.new(key, f"patient {patient.strip().casefold()}".encode(), "sha256").hexdigest()
    return f"patient-{_key_id(key)}-{digest[:PATIENT_DIGITS]}"


def refuse_other_key(patients: Iterable[str]) -> None:
    """Raise UserError if one of `patients`, as in an existing groups.csv, was named under another key than today's.

    To call before hashed patients are added to a data set: the same person would stand there under two names.
    """
    today = _key_id(patient_key())
    matches = (HASHED_PATIENT.fullmatch(patient) for patient in patients)
    if any(match["key"] != today for match in matches if match):
        raise UserError(
            f"the data set's patients were hashed with another key than {PATIENT_KEY_VARIABLE} holds now; "
            "set it to that key, or import all sources anew with one key"
        )


def _key_id(key: bytes | None) -> str:
    return hmac.new(key, b"which key", "sha256").hexdigest()[:KEY_DIGITS] if key else ""
