"""The second part of the step `validate`, where several tasks share it: the shares are put together."""

from collections.abc import Sequence
from pathlib import Path

from braintumor.artifacts import replacing_directory
from braintumor.data.shards import SHARD_FILES, Digests, gather_scans


def gather(scans: Sequence[Path], survey: Path, search: Path, scan_digests: Digests = None) -> None:
    """The rows of all `scans` stand in `survey`, their fingerprints and the index of the copies' search in `search`.

    Raises UserError unless the scans are all the shares of one data version, as their tasks made them.
    """
    with replacing_directory(survey, SHARD_FILES) as rows, replacing_directory(search, SHARD_FILES) as fingerprints:
        gather_scans(scans, scan_digests, rows, fingerprints)
