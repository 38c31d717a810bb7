"""The third part of the step `validate`, where several tasks share it: the copies of a share of the images."""

from pathlib import Path

from braintumor.artifacts import replacing_directory
from braintumor.data.shards import SHARD_FILES, Share, write_match
from braintumor.params import ValidateParams
from braintumor.progress import Progress, silent


def match(
    search: Path,
    share: Share,
    output: Path,
    params: ValidateParams,
    progress: Progress = silent,
) -> None:
    """The links between the images of a share and all images stand in `output`.

    They name the `search` that they were found in: `validate` takes none of another.
    """
    with replacing_directory(output, SHARD_FILES) as folder:
        write_match(
            search,
            share,
            params.copy_correlation,
            folder,
            lambda blocks: progress(f"match: comparing images, {share}", blocks),
        )
