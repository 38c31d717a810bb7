import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from braintumor.data import dataset_cache
from braintumor.data.contents import dataset_md5
from braintumor.data.dataset_cache import SECONDS_A_DAY, DatasetCache, Limits
from braintumor.data.dvc_remote import list_version, materialise, object_key, open_dataset, read_listing
from braintumor.errors import UserError
from braintumor.object_store import Store, open_store

ROOT = Path(__file__).parents[3]
SAMPLE = "6d2ff1fc7b817369f76f868e82199345"


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRAINTUMOR_CACHE_DAYS", "BRAINTUMOR_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def remote(tmp_path: Path) -> Store:
    return open_store(tmp_path / "remote")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def let_go() -> Iterator[Callable[[], None]]:
    """A call after which this process uses no version any more, as if it had ended."""

    def release() -> None:
        while dataset_cache._held:
            os.close(dataset_cache._held.popitem()[1])

    yield release
    release()


def put(remote: Store, files: dict[str, bytes]) -> str:
    listing = []
    for path, content in sorted(files.items()):
        md5 = hashlib.md5(content).hexdigest()
        remote.write(object_key(md5), content)
        listing.append({"md5": md5, "relpath": path})
    text = json.dumps(listing).encode()
    md5 = hashlib.md5(text).hexdigest()
    remote.write(object_key(f"{md5}.dir"), text)
    return md5


def files(letter: str, n: int = 3) -> dict[str, bytes]:
    return {f"train/glioma/{letter}{number}.jpg": f"{letter}{number}".encode() * 50 for number in range(n)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def versions(cache: Path) -> set[str]:
    return {path.name for path in (cache / "datasets").iterdir()}


def objects(cache: Path) -> set[bytes]:
    return {path.read_bytes() for path in (cache / "objects").glob("??/*")}


def last_used(cache: Path, md5: str, days_ago: float) -> None:
    moment = time.time() - days_ago * SECONDS_A_DAY
    os.utime(cache / "locks" / md5, (moment, moment))
    for path in (cache / "datasets" / md5).rglob("*.jpg"):
        os.utime(path, (moment, moment))


class Counted:
    """A remote that counts what is downloaded."""

    def __init__(self, remote: Store) -> None:
        self._remote = remote
        self.downloads: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._remote, name)

    def download(self, key: str, file: Path) -> str:
        self.downloads.append(key)
        return self._remote.download(key, file)


def test_sample_is_opened_from_the_folder_in_the_repository(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINTUMOR_DATA_REMOTE", str(ROOT / "dvc-sample"))
    monkeypatch.setenv("BRAINTUMOR_CACHE", str(cache))
    opened = open_dataset(Path(SAMPLE))
    assert opened == cache / "datasets" / SAMPLE
    assert dataset_md5(opened) == SAMPLE


def test_folder_is_opened_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAINTUMOR_DATA_REMOTE", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("data", SAMPLE, "latest"):
        Path(name).mkdir()
        assert open_dataset(Path(name)) == Path(name)
    assert open_dataset(Path("gone")) == Path("gone")


@pytest.mark.parametrize(("name", "said"), [("latest", "braintumor resolve"), (SAMPLE, "BRAINTUMOR_DATA_REMOTE")])
def test_what_can_not_be_opened_here_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.delenv("BRAINTUMOR_DATA_REMOTE", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        open_dataset(Path(name))


def test_second_opening_asks_the_remote_for_nothing(remote: Store, cache: Path, tmp_path: Path) -> None:
    md5 = put(remote, files("a"))
    assert contents(materialise(md5, remote, cache)) == files("a")
    assert contents(materialise(md5, open_store(tmp_path / "nowhere"), cache)) == files("a")


def test_versions_share_their_files(remote: Store, cache: Path) -> None:
    first = materialise(put(remote, files("a", 5)), remote, cache)
    counted = Counted(remote)
    second = materialise(put(remote, files("a", 5) | files("b", 1)), counted, cache)  # type: ignore[arg-type]
    assert len(counted.downloads) == 1
    shared = "train/glioma/a0.jpg"
    assert (first / shared).stat().st_ino == (second / shared).stat().st_ino
    assert (first / shared).stat().st_mode & 0o777 == 0o444


def change(path: Path) -> None:
    """Other bytes of the same size, in the file that other versions have, too."""
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])


def cut(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, 10)


def swap(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("damage", "n_fetched"),
    [
        (change, 1),
        (cut, 1),
        (swap, 0),
        (lambda path: path.unlink(), 0),
        (lambda path: path.with_name("foreign.jpg").write_bytes(b"foreign"), 0),
        (lambda path: [file.unlink() for file in path.parents[4].glob("objects/??/*")] and path.unlink(), 3),
        (lambda path: [file.write_text("{") for file in path.parents[4].glob("indexes/*")], 0),
    ],
    ids=["changed", "cut", "link", "removed", "foreign", "objects lost", "index damaged"],
)
def test_damage_in_the_cache_is_noticed_and_mended(
    remote: Store, cache: Path, damage: Callable[[Path], object], n_fetched: int
) -> None:
    md5 = put(remote, files("a"))
    tree = materialise(md5, remote, cache)
    damage(tree / "train/glioma/a1.jpg")
    counted = Counted(remote)
    assert contents(materialise(md5, counted, cache)) == files("a")  # type: ignore[arg-type]
    assert len(counted.downloads) == n_fetched
    assert objects(cache) == set(files("a").values())
    # Once mended, nothing is looked for again.
    counted.downloads.clear()
    materialise(md5, open_store(cache / "nowhere"), cache)


def test_version_without_links_is_a_copy_and_counts_twice(
    remote: Store, cache: Path, let_go: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    md5 = put(remote, files("a"))
    assert contents(materialise(md5, remote, cache)) == files("a")
    materialise(md5, open_store(cache / "nowhere"), cache)
    let_go()
    # Of 300 bytes, twice.
    for max_bytes, kept in ((650, {md5}), (550, set())):
        DatasetCache(cache).evict(Limits(max_age_days=14, max_bytes=max_bytes))
        assert versions(cache) == kept


def test_version_unused_for_long_is_evicted_with_its_own_files(
    remote: Store, cache: Path, let_go: Callable[[], None]
) -> None:
    old = put(remote, files("a") | files("b"))
    middle = put(remote, files("b"))
    for md5, days_ago in ((old, 14.1), (middle, 13.9)):
        materialise(md5, remote, cache)
        last_used(cache, md5, days_ago)
    let_go()
    new = put(remote, files("c"))
    materialise(new, remote, cache)
    assert versions(cache) == {middle, new}
    assert objects(cache) == {*files("b").values(), *files("c").values()}


def test_least_recently_used_versions_are_evicted_for_room(
    remote: Store, cache: Path, let_go: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    md5s = [put(remote, files(letter, 10)) for letter in "abc"]  # of 1000 bytes each
    for md5, days_ago in zip(md5s[:2], (1, 2), strict=True):
        materialise(md5, remote, cache)
        last_used(cache, md5, days_ago)
    let_go()
    monkeypatch.setenv("BRAINTUMOR_CACHE_GB", "2.5e-6")
    materialise(md5s[2], remote, cache)
    assert versions(cache) == {md5s[0], md5s[2]}
    assert sum(map(len, objects(cache))) == 2000


@pytest.mark.parametrize(("days", "gigabytes"), [("1", "50"), ("14", "1e-9")])
def test_version_that_a_process_uses_is_never_evicted(
    remote: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, days: str, gigabytes: str, tmp_path: Path
) -> None:
    used, other = put(remote, files("a")), put(remote, files("b"))
    hold = (
        "import sys; from pathlib import Path; from braintumor.data.dvc_remote import open_dataset\n"
        "print(open_dataset(Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"BRAINTUMOR_DATA_REMOTE": remote.address, "BRAINTUMOR_CACHE": str(cache)}
    command = [sys.executable, "-c", hold, used]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout and user.stdin and user.stdout.readline()
        last_used(cache, used, 2)
        monkeypatch.setenv("BRAINTUMOR_CACHE_DAYS", days)
        monkeypatch.setenv("BRAINTUMOR_CACHE_GB", gigabytes)
        assert contents(materialise(other, remote, cache)) == files("b")
        assert contents(cache / "datasets" / used) == files("a")
        user.kill()
    materialise(other, remote, cache)
    assert versions(cache) == {other}
    assert objects(cache) == set(files("b").values())


def test_what_a_broken_off_attempt_has_fetched_is_kept_for_a_day(
    remote: Store, cache: Path, let_go: Callable[[], None]
) -> None:
    md5, other = put(remote, files("a")), put(remote, files("b"))
    lost = object_key(hashlib.md5(files("a")["train/glioma/a1.jpg"]).hexdigest())
    content = remote.read(lost)
    assert content is not None
    remote.delete(lost)
    with pytest.raises(UserError):
        materialise(md5, remote, cache)
    let_go()
    materialise(other, remote, cache)
    assert len(objects(cache)) == 5
    for path in (cache / "objects").glob("??/*"):
        moment = time.time() - 1.1 * SECONDS_A_DAY
        os.utime(path, (moment, moment))
    materialise(other, remote, cache)
    assert objects(cache) == set(files("b").values())


def test_nothing_is_evicted_while_a_version_is_made(cache: Path) -> None:
    place, md5, content = DatasetCache(cache), "0" * 32, b"verified"
    evict = (
        "import sys; from pathlib import Path; from braintumor.data.dataset_cache import DatasetCache, Limits\n"
        "DatasetCache(Path(sys.argv[1])).evict(Limits(max_age_days=1e-9, max_bytes=1))"
    )
    command = [sys.executable, "-c", evict, str(cache)]
    with place.making(md5) as scratch:
        (scratch / "taken").write_bytes(content)
        place.take(hashlib.md5(content).hexdigest(), scratch / "taken")
        (scratch / "arriving").write_bytes(b"half")
        subprocess.run(command, check=True)
        assert contents(scratch) == {"arriving": b"half"}
        assert objects(cache) == {content}
    subprocess.run(command, check=True)
    assert not objects(cache)


def test_weights_unused_for_long_are_evicted(remote: Store, cache: Path) -> None:
    for name, days_ago in (("old", 14.1), ("used", 13.9)):
        file = cache / f"weights/{name}/backbone.weights.h5"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
        moment = time.time() - days_ago * SECONDS_A_DAY
        os.utime(file, (moment, moment))
    materialise(put(remote, files("a")), remote, cache)
    assert [file.parent.name for file in cache.glob("weights/*/*")] == ["used"]


def test_leftovers_of_a_killed_process_are_removed(remote: Store, cache: Path) -> None:
    leftover = cache / "datasets" / f".{'0' * 32}.partial-x"
    foreign = cache / "datasets" / ".somebody's"
    for folder in (leftover, foreign):
        folder.mkdir(parents=True)
    materialise(put(remote, files("a")), remote, cache)
    assert not leftover.exists() and foreign.exists()


def test_full_disk_is_told_and_nothing_half_made_stays(
    remote: Store, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md5 = put(remote, files("a"))

    def no_room(file: Path, mode: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "chmod", no_room)
        with pytest.raises(UserError, match="make room"):
            materialise(md5, remote, cache)
    assert not versions(cache) and not objects(cache)
    assert contents(materialise(md5, remote, cache)) == files("a")


@pytest.fixture
def small_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for 400 bytes of objects."""
    take, lock = DatasetCache.take, threading.Lock()

    def take_or_refuse(place: DatasetCache, md5: str, file: Path) -> None:
        with lock:
            if sum(map(len, objects(cache))) + file.stat().st_size > 400:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            take(place, md5, file)

    monkeypatch.setattr(DatasetCache, "take", take_or_refuse)


def test_full_disk_takes_a_version_in_the_place_of_one_that_nobody_uses(
    remote: Store, cache: Path, small_disk: None, let_go: Callable[[], None]
) -> None:
    materialise(put(remote, files("a")), remote, cache)
    let_go()
    md5 = put(remote, files("b"))
    assert contents(materialise(md5, remote, cache)) == files("b")
    assert versions(cache) == {md5}
    assert objects(cache) == set(files("b").values())


def test_full_disk_keeps_the_version_that_is_used(remote: Store, cache: Path, small_disk: None) -> None:
    used = put(remote, files("a"))
    tree = materialise(used, remote, cache)
    with pytest.raises(UserError, match="make room"):
        materialise(put(remote, files("b")), remote, cache)
    assert versions(cache) == {used}
    assert contents(tree) == files("a")


def test_room_that_lacks_for_the_folder_alone_is_made(
    remote: Store, cache: Path, let_go: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unused, md5 = put(remote, files("a")), put(remote, files("b"))
    materialise(unused, remote, cache)
    let_go()
    link = Path.hardlink_to

    def link_or_refuse(copy: Path, original: Path) -> None:
        if unused in versions(cache):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(copy, original)

    monkeypatch.setattr(Path, "hardlink_to", link_or_refuse)
    assert contents(materialise(md5, remote, cache)) == files("b")
    assert versions(cache) == {md5}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_told(
    remote: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="volume with locks"):
        materialise(put(remote, files("a")), remote, cache)


def test_cache_that_is_no_folder_is_told(remote: Store, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(UserError, match="BRAINTUMOR_CACHE"):
        materialise(put(remote, files("a")), remote, cache)


@pytest.mark.parametrize("name", ["BRAINTUMOR_CACHE_DAYS", "BRAINTUMOR_CACHE_GB"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf"])
def test_limit_that_is_no_number_above_zero_is_refused(
    remote: Store, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        materialise(put(remote, files("a")), remote, cache)
    assert not cache.exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside.jpg", "a/../../b", "a//b", "", ".", "a\0b"])
def test_list_that_climbs_out_of_the_data_set_is_refused(remote: Store, cache: Path, path: str) -> None:
    md5 = put(remote, files("a") | {path: b"evil"})
    with pytest.raises(UserError, match="outside the data set"):
        materialise(md5, remote, cache)
    assert not versions(cache)


def test_list_with_a_file_where_others_need_a_folder_is_refused(remote: Store, cache: Path) -> None:
    md5 = put(remote, files("a") | {"train": b"a file"})
    with pytest.raises(UserError, match="others: train;"):
        materialise(md5, remote, cache)
    assert not versions(cache)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}x",
        b'{"a": 1}',
        b"[1]",
        b'[{"relpath": "a"}]',
        b'[{"relpath": "a", "md5": "short"}]',
        b'[{"relpath": 1, "md5": "' + b"0" * 32 + b'"}]',
        b'[{"relpath": "a", "md5": "' + b"0" * 32 + b'"}, {"relpath": "a", "md5": "' + b"1" * 32 + b'"}]',
    ],
)
def test_list_that_dvc_did_not_write_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="no directory of DVC 3"):
        read_listing(content, "remote/x.dir")


def test_empty_version_is_an_empty_folder(remote: Store, cache: Path) -> None:
    md5 = put(remote, {})
    tree = materialise(md5, remote, cache)
    tree.rmdir()
    assert list(materialise(md5, remote, cache).iterdir()) == []
    assert list_version(md5, remote) == {}
