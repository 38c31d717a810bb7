"""The first part of the step `validate`, where several tasks share it: a share of the images is read."""

from pathlib import Path

from braintumor.artifacts import replacing_directory
from braintumor.data.dvc_remote import open_files
from braintumor.data.shards import SHARD_FILES, Share, list_images, write_scan
from braintumor.params import ValidateParams
from braintumor.progress import Progress, silent


def scan(dataset: Path, share: Share, output: Path, params: ValidateParams, progress: Progress = silent) -> int:
    """Rows and fingerprints of a share of the images of `dataset` stand in `output`; returns how many they are."""
    data_md5, images = list_images(dataset)
    paths = [images[place] for place in share.of(len(images))]
    with open_files(dataset, paths, progress) as folder, replacing_directory(output, SHARD_FILES) as partial:
        advance = progress(f"scan: reading images, {share}", len(paths))
        write_scan(folder, images, data_md5, share, params.workers, partial, advance)
    return len(paths)
