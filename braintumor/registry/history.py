"""The ledger of promotions, shown to a person."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from braintumor.errors import UserError
from braintumor.registry import ledger
from braintumor.registry.ledger import LedgerBroken, Recorded, Verification
from braintumor.registry.server import connected, holds_nothing_yet, shown_address

DELIVERED = "delivered"


def history(model_name: str) -> list[Recorded]:
    """The entries, the oldest first; raises LedgerBroken and RegistryUnreachable."""
    if holds_nothing_yet():
        return []
    with connected() as client:
        return ledger.read(client, model_name)


def verify_history(model_name: str) -> Verification:
    """The ledger holds, and all that refers to it; raises LedgerBroken, naming each problem, where it does not."""
    if holds_nothing_yet():
        return Verification([], None, 0)
    with connected() as client:
        found = ledger.verify(client, model_name)
    if found.problems:
        problems = "".join(f"\n  - {problem}" for problem in found.problems)
        raise LedgerBroken(
            f"the ledger of promotions of {model_name} does not hold, or is not what MLflow shows:{problems}\n"
            "Find out who did it; a backup of MLflow's database has what was there"
        )
    return found


def find_hash(entries: Sequence[Recorded], sha256: str) -> Recorded:
    """The entry of this hash; raises UserError if the ledger does not hold it."""
    for recorded in entries:
        if recorded.sha256 == sha256.strip().lower():
            return recorded
    raise UserError(
        f"none of the {len(entries)} entries has the hash {sha256!r}; give all 64 digits, and if they are right, the "
        "ledger is not the one that they were noted from"
    )


def as_json(entries: Sequence[Recorded], model_name: str) -> str:
    """The entries as one JSON object."""
    rows = [
        {**asdict(one.entry), "sha256": one.sha256, "run_id": one.run_id, "is_open": one.is_open, "hook": one.hook}
        for one in entries
    ]
    return json.dumps({"model_name": model_name, "entries": rows}, indent=2, sort_keys=True)


def show_history(entries: Sequence[Recorded], model_name: str) -> None:
    """Print the entries as a table, the newest last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not entries:
        # Perhaps it is not the model, or not the server, that was meant.
        print(f"No promotions of {model_name} at {shown_address()} yet.")
        return
    console = Console(highlight=False)
    table = Table("Entry", "Time (UTC)", "What happened", "By", "Why", "Deployment", box=None, padding=(0, 2, 0, 0))
    for one in entries:
        entry = one.entry
        who = entry.who if entry.who_is_known else f"{entry.who} (not checked)"
        why = entry.reason + (f" [override: {entry.override}]" if entry.override else "")
        cells = (str(entry.index), _moment(entry.time), ledger.what_happened(entry), who, why, _deployment(one))
        # People's texts: brackets in them are no markup.
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _deployment(recorded: Recorded) -> str:
    if not recorded.hook:
        return "under way" if recorded.is_open else ""
    # When stands in the first column, but for seconds.
    return DELIVERED if recorded.hook.startswith(DELIVERED) else recorded.hook


def _moment(time: str) -> str:
    return time[:19].replace("T", " ")
