"""Errors that a person can act on; the command line prints them without a traceback."""

from collections.abc import Sequence


class UserError(Exception):
    """The input or the set-up is wrong: the message names the fact, the place and the remedy."""

    exit_code = 2


def name_some(culprits: Sequence[str], limit: int = 10) -> str:
    """The first `limit` culprits and how many more there are, for a message."""
    more = f" and {len(culprits) - limit} more" if len(culprits) > limit else ""
    return ", ".join(culprits[:limit]) + more


class CriticalFinding(UserError):
    """The data set may not be trained on: a critical expectation failed."""

    exit_code = 3


class GateNotPassed(UserError):
    """The model was judged and may not be registered."""

    exit_code = 4


class RegistryUnreachable(UserError):
    """The MLflow server did not answer; nothing was written there, and running again finishes the rest."""

    exit_code = 5
