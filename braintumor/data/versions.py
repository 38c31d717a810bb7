"""Which data version a run is about: that of a folder, of an md5, or the published one."""

from dataclasses import dataclass
from pathlib import Path

from braintumor.artifacts import GROUPS_FILE
from braintumor.data.contents import file_md5s, list_contents, version_md5
from braintumor.data.dvc_remote import LATEST, is_md5, list_version, open_remote
from braintumor.data.published import read_published


@dataclass(frozen=True)
class DataVersion:
    """A version of the images, by DVC's md5 of the directory."""

    md5: str
    n_images: int


def find_version(dataset: Path) -> DataVersion:
    """The version of a folder, of an md5 on the remote, or with 'latest' of the one that is published there.

    Of a version on the remote only its listing is read, not the images. Raises UserError where there is none.
    """
    name = str(dataset)
    if dataset.is_dir() or not (name == LATEST or is_md5(name)):
        contents = list_contents(dataset)
        return DataVersion(version_md5(file_md5s(dataset, contents.versioned)), len(contents.images))
    remote = open_remote()
    md5 = read_published(remote).md5 if name == LATEST else name
    return DataVersion(md5, len(list_version(md5, remote).keys() - {GROUPS_FILE}))
