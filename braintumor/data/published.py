"""The published data version: a pointer beside DVC's objects that says which version a scheduled run takes."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from braintumor.data.dvc_remote import OBJECTS, damaged, is_md5, lacking, list_version, object_key
from braintumor.errors import UserError
from braintumor.object_store import ObjectChanged, Store, Stored
from braintumor.progress import Progress, note, silent

POINTER = "datasets/latest.json"
NO_TAG = f'"{"0" * 32}"'  # of no object
REVISION_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Published:
    """A data version, where its data.dvc stands in git, and when it was published."""

    md5: str
    git_revision: str
    files: int
    bytes: int
    time: str  # ISO 8601, UTC

    def __str__(self) -> str:
        return (
            f"{self.md5} ({self.files} files, {self.bytes / 1e6:.1f} MB, git {self.git_revision[:12]}, "
            f"published {self.time})"
        )


@dataclass(frozen=True)
class _Version:
    """What data.dvc says."""

    md5: str
    files: int
    bytes: int


def read_published(remote: Store) -> Published:
    """The data version that is published at `remote`. Raises UserError where there is none, or no whole pointer."""
    published, _ = _read_pointer(remote)
    if published is None:
        raise UserError(
            f"{remote.address} has no published data version ({POINTER} is missing); run 'braintumor data publish' "
            "after 'dvc push', or check the address"
        )
    return published


def publish(remote: Store, data_dvc: Path, progress: Progress = silent) -> Published:
    """The version in `data_dvc` is the published one; all its objects are there.

    Where it was before, with the same revision, nothing is written and the earlier pointer comes back. Raises UserError
    where `data_dvc` is not as git's HEAD has it, where the remote lacks objects, where the version that is published
    now is not an ancestor of this one, where the server would let two publishers overwrite each other, and
    ObjectChanged where somebody else published meanwhile.
    """
    version = _read_data_dvc(data_dvc)
    revision = _committed_revision(data_dvc)
    current, pointer = _read_pointer(remote)
    is_published = current is not None and (current.md5, current.git_revision) == (version.md5, revision)
    if current is not None and not is_published:
        _refuse_newer(current, data_dvc.parent, remote)
    _check_objects(version, data_dvc, remote, progress)
    if current is not None and is_published:
        note(f"{current.md5} of git {revision[:12]} stands published at {remote.address} already")
        return current
    time = datetime.now(UTC).isoformat(timespec="seconds")
    published = Published(version.md5, revision, version.files, version.bytes, time)
    content = json.dumps(asdict(published), indent=2, sort_keys=True) + "\n"
    if pointer is not None:
        _refuse_unconditional(remote, pointer)
    try:
        remote.write_if(POINTER, content.encode(), pointer.tag if pointer else None)
    except ObjectChanged as error:
        winner, _ = _read_pointer(remote)
        raise ObjectChanged(
            f"somebody else published meanwhile: at {remote.address} stands {winner or 'no version'} now; "
            "run 'git pull' and publish again"
        ) from error
    return published


def _refuse_unconditional(remote: Store, pointer: Stored) -> None:
    """Raise UserError unless the server heeds both conditions of a write; a pointer that it writes says the same."""
    # One blank line more: the same bytes would pass for a repeated request that finds its own work.
    content = pointer.content + b"\n"
    for tag in (None, NO_TAG):
        try:
            remote.write_if(POINTER, content, tag)
        except ObjectChanged:
            continue
        raise UserError(
            f"{remote.address}: this server ignores conditional writes, two publishers could lose each other's "
            "version; use one that knows If-Match and If-None-Match"
        )


def _read_pointer(remote: Store) -> tuple[Published | None, Stored | None]:
    """The published version and its pointer; both None where there is none."""
    found = remote.read(POINTER)
    if found is None:
        return None, None
    try:
        content = json.loads(found.content)
        published = Published(**content)
        if not _is_sound(published):
            raise ValueError("a value is not what it should be")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{remote.name(POINTER)} is no pointer to a data version ({error}): half written, or not by 'braintumor "
            "data publish'; look at it, remove it, and publish again"
        ) from error
    return published, found


def _is_sound(published: Published) -> bool:
    texts = (published.md5, published.git_revision, published.time)
    counts = (published.files, published.bytes)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(count) is int and count >= 0 for count in counts)
        and is_md5(published.md5)
        and len(published.git_revision) >= 40
        and set(published.git_revision) <= REVISION_DIGITS
        and datetime.fromisoformat(published.time).tzinfo is not None
    )


def _read_data_dvc(data_dvc: Path) -> _Version:
    if not data_dvc.is_file():
        raise UserError(f"{data_dvc} is missing; run 'dvc add {data_dvc.stem}' first, or run this where it stands")
    try:
        outs = yaml.safe_load(data_dvc.read_text(encoding="utf-8"))["outs"]
        out: Mapping[str, Any] = outs[0]
        md5 = out["md5"].removesuffix(".dir")
        if len(outs) != 1 or md5 == out["md5"] or not is_md5(md5) or out.get("hash") != "md5":
            raise ValueError("not one folder by its md5")
        return _Version(md5, int(out["nfiles"]), int(out["size"]))
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{data_dvc} is no version of a folder by DVC 3 ({error}); run 'dvc add {data_dvc.stem}' again"
        ) from error


def _committed_revision(data_dvc: Path) -> str:
    """Git's HEAD, which has `data_dvc` as it stands here."""
    folder = data_dvc.parent
    head = _git(folder, "rev-parse", "--verify", "HEAD^{commit}")
    if head.returncode != 0:
        reason = head.stderr.strip().partition("\n")[0]
        raise UserError(f"git knows no commit in {folder.absolute()} ({reason}); publish from a commit with {data_dvc}")
    if _git(folder, "cat-file", "-e", f"HEAD:./{data_dvc.name}").returncode != 0:
        raise UserError(f"{data_dvc} is not in git; run 'git add {data_dvc}' and 'git commit', then publish")
    if _git(folder, "diff", "--quiet", "HEAD", "--", data_dvc.name).returncode != 0:
        raise UserError(f"{data_dvc} differs from the last commit; run 'git commit {data_dvc}', then publish")
    return head.stdout.strip()


def _refuse_newer(current: Published, folder: Path, remote: Store) -> None:
    """Raise UserError unless the published version is in this one's history."""
    if _git(folder, "merge-base", "--is-ancestor", current.git_revision, "HEAD").returncode != 0:
        raise UserError(
            f"at {remote.address} stands {current}, which is not in this repository's history: somebody else's data "
            "would be lost; run 'git pull' (in a shallow clone 'git fetch --unshallow') and publish again. To go back "
            f"to older data use 'git revert'; after a rewritten history remove {POINTER} from the remote"
        )


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("git is missing; install it, or publish where it is") from error


def _check_objects(version: _Version, data_dvc: Path, remote: Store, progress: Progress) -> None:
    """Every object of the version is at the remote; together they have the size that data.dvc tells."""
    listing = list_version(version.md5, remote)
    if len(listing) != version.files:
        raise UserError(
            f"{data_dvc} counts {version.files} files, and its list at {remote.address} {len(listing)}; run 'dvc add' "
            "and 'dvc push' again"
        )
    advance = progress(f"looking through {remote.address}", len(listing))
    wanted = {object_key(md5) for md5 in listing.values()}
    sizes: dict[str, int] = {}
    for found in remote.list(OBJECTS):
        if found.key in wanted:
            sizes[found.key] = found.size
            advance()
    if missing := [f"{path} ({object_key(md5)})" for path, md5 in listing.items() if object_key(md5) not in sizes]:
        raise UserError(lacking(remote, version.md5, missing))
    if (total := sum(sizes[object_key(md5)] for md5 in listing.values())) != version.bytes:
        dataset = data_dvc.with_suffix("")
        differing = [
            f"{path} ({object_key(md5)}: {sizes[object_key(md5)]} bytes)"
            for path, md5 in listing.items()
            if (dataset / path).is_file() and (dataset / path).stat().st_size != sizes[object_key(md5)]
        ]
        unknown = [f"some of {len(listing)} files, which have {total} bytes instead of {version.bytes}"]
        raise UserError(damaged(remote, version.md5, differing or unknown))
