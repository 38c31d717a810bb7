import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from braintumor.data.dvc_remote import object_key
from braintumor.data.published import POINTER, publish, read_published
from braintumor.errors import UserError
from braintumor.object_store import Store, open_store


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Tester")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "tester@example.org")


@pytest.fixture
def remote(tmp_path: Path) -> Store:
    return open_store(tmp_path / "remote")


@pytest.fixture
def data_dvc(tmp_path: Path, remote: Store) -> Path:
    """A committed data.dvc whose version is at the remote."""
    file = tmp_path / "repository/data.dvc"
    file.parent.mkdir()
    git(file.parent, "init", "-q")
    add_version(file, remote, [b"one", b"two", b"two"])
    commit(file)
    return file


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(file: Path) -> str:
    git(file.parent, "add", "data.dvc")
    git(file.parent, "commit", "-q", "-m", "data")
    return git(file.parent, "rev-parse", "HEAD")


def add_version(data_dvc: Path, remote: Store, files: list[bytes]) -> str:
    """What `dvc add` and `dvc push` leave."""
    listing = []
    for number, content in enumerate(files):
        md5 = hashlib.md5(content).hexdigest()
        remote.write(object_key(md5), content)
        listing.append({"md5": md5, "relpath": f"train/glioma/{number}.jpg"})
    text = json.dumps(listing).encode()
    md5 = hashlib.md5(text).hexdigest()
    remote.write(object_key(f"{md5}.dir"), text)
    size = sum(map(len, files))
    data_dvc.write_text(f"outs:\n- md5: {md5}.dir\n  size: {size}\n  nfiles: {len(files)}\n  hash: md5\n  path: data\n")
    return md5


def test_published_version_is_read_back(data_dvc: Path, remote: Store) -> None:
    published = publish(remote, data_dvc)
    assert read_published(remote) == published
    assert published.git_revision == git(data_dvc.parent, "rev-parse", "HEAD")
    assert (published.files, published.bytes) == (3, 9)


def test_publishing_again_writes_nothing(data_dvc: Path, remote: Store) -> None:
    first = publish(remote, data_dvc)
    written = remote.read(POINTER)
    assert publish(remote, data_dvc) == first
    assert remote.read(POINTER) == written


def test_next_version_replaces_the_published_one(data_dvc: Path, remote: Store) -> None:
    publish(remote, data_dvc)
    md5 = add_version(data_dvc, remote, [b"three"])
    revision = commit(data_dvc)
    publish(remote, data_dvc)
    assert (read_published(remote).md5, read_published(remote).git_revision) == (md5, revision)


class Careless:
    """A store on a server that ignores one of the conditions of a write."""

    def __init__(self, remote: Store, heeds_tags: bool) -> None:
        self._remote = remote
        self._heeds_tags = heeds_tags

    def __getattr__(self, name: str) -> object:
        return getattr(self._remote, name)

    def write_if(self, key: str, content: bytes, tag: str | None) -> None:
        if (tag is not None) == self._heeds_tags:
            self._remote.write_if(key, content, tag)
        else:
            self._remote.write(key, content)


@pytest.mark.parametrize("heeds_tags", [False, True])
def test_server_that_ignores_conditions_is_refused_and_the_pointer_says_the_same(
    data_dvc: Path, remote: Store, heeds_tags: bool
) -> None:
    first = publish(remote, data_dvc)
    add_version(data_dvc, remote, [b"three"])
    commit(data_dvc)
    with pytest.raises(UserError, match="ignores conditional writes"):
        publish(Careless(remote, heeds_tags), data_dvc)  # type: ignore[arg-type]
    assert read_published(remote) == first


def test_version_of_a_history_that_is_not_ours_is_not_replaced(data_dvc: Path, remote: Store) -> None:
    add_version(data_dvc, remote, [b"three"])
    commit(data_dvc)
    published = publish(remote, data_dvc)
    git(data_dvc.parent, "reset", "-q", "--hard", "HEAD~1")
    with pytest.raises(UserError, match="git pull") as refused:
        publish(remote, data_dvc)
    assert published.md5 in str(refused.value)
    assert read_published(remote) == published


def test_nothing_is_published_without_a_pointer(remote: Store) -> None:
    with pytest.raises(UserError, match="braintumor data publish"):
        read_published(remote)


SOUND = {"md5": "0" * 32, "git_revision": "a" * 40, "files": 3, "bytes": 9, "time": "2026-01-02T03:04:05+00:00"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"md5": "00',
        b"\xff\xfe",
        b"[]",
        b"{}",
        json.dumps(SOUND | {"md5": "latest"}).encode(),
        json.dumps(SOUND | {"git_revision": "--output=/tmp/x"}).encode(),
        json.dumps(SOUND | {"files": "3"}).encode(),
        json.dumps(SOUND | {"bytes": -1}).encode(),
        json.dumps(SOUND | {"time": "yesterday"}).encode(),
        json.dumps(SOUND | {"more": 1}).encode(),
    ],
)
def test_pointer_half_written_or_foreign_is_refused(data_dvc: Path, remote: Store, content: bytes) -> None:
    remote.write(POINTER, content)
    for read in (lambda: read_published(remote), lambda: publish(remote, data_dvc)):
        with pytest.raises(UserError, match="no pointer to a data version"):
            read()
    stored = remote.read(POINTER)
    assert stored is not None and stored.content == content


def test_sound_pointer_is_read(remote: Store) -> None:
    remote.write(POINTER, json.dumps(SOUND).encode())
    assert read_published(remote).md5 == SOUND["md5"]


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


def stage(file: Path) -> None:
    edit(file)
    git(file.parent, "add", "data.dvc")


def untrack(file: Path) -> None:
    git(file.parent, "rm", "-q", "--cached", "data.dvc")
    git(file.parent, "commit", "-q", "-m", "gone")


def leave_git(file: Path) -> None:
    (file.parent / ".git").rename(file.parent / "git")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit, "differs from the last commit"),
        (stage, "differs from the last commit"),
        (untrack, "is not in git"),
        (leave_git, "git knows no commit"),
        (lambda file: file.unlink(), "dvc add data"),
        (lambda file: file.write_text("outs: [{md5: 00, path: data}]"), "no version of a folder"),
        (lambda file: file.write_text(file.read_text().replace(".dir", "")), "no version of a folder"),
        (lambda file: file.write_text(file.read_text().replace("hash: md5", "hash: sha256")), "no version of a folder"),
        (lambda file: file.write_text("{"), "no version of a folder"),
    ],
)
def test_data_dvc_that_no_commit_vouches_for_is_refused(
    data_dvc: Path, remote: Store, change: Callable[[Path], object], said: str
) -> None:
    change(data_dvc)
    with pytest.raises(UserError, match=said):
        publish(remote, data_dvc)
    assert remote.read(POINTER) is None


def test_version_that_was_not_pushed_is_refused(data_dvc: Path, remote: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc push"):
        publish(open_store(tmp_path / "other"), data_dvc)
    lost = object_key(hashlib.md5(b"one").hexdigest())
    remote.delete(lost)
    with pytest.raises(UserError, match="dvc push") as refused:
        publish(remote, data_dvc)
    assert lost in str(refused.value) and "train/glioma/0.jpg" in str(refused.value)
    assert remote.read(POINTER) is None


def test_object_that_was_cut_short_is_named(data_dvc: Path, remote: Store) -> None:
    short = object_key(hashlib.md5(b"one").hexdigest())
    remote.write(short, b"o")
    with pytest.raises(UserError, match="7 bytes instead of 9"):
        publish(remote, data_dvc)
    (data_dvc.parent / "data/train/glioma").mkdir(parents=True)
    (data_dvc.parent / "data/train/glioma/0.jpg").write_bytes(b"one")
    with pytest.raises(UserError, match=short):
        publish(remote, data_dvc)
    assert remote.read(POINTER) is None
