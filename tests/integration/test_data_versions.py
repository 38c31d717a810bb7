"""A data version from `dvc push` to the folder that a step opens, on a real S3 server and with failures in between."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from braintumor import object_store
from braintumor.data import published
from braintumor.data.contents import dataset_md5
from braintumor.data.dataset_cache import DatasetCache, Limits
from braintumor.data.dvc_remote import materialise, object_key, open_dataset
from braintumor.data.published import POINTER, publish, read_published
from braintumor.errors import UserError
from braintumor.object_store import CONNECTIONS, ObjectChanged, Store, fetch_object, open_store

IDENTITY = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org"]


def run(folder: Path, *command: str) -> str:
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, str(Path(sys.executable).with_name("dvc")), *arguments)


def git(folder: Path, *arguments: str) -> str:
    return run(folder, "git", *IDENTITY, *arguments).strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Repository:
    """A git repository with data/, of which each version is pushed to `remote`."""

    root: Path
    address: str

    @property
    def remote(self) -> Store:
        return open_store(self.address)


@pytest.fixture(scope="module")
def repository(
    s3_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory, dataset_maker: Callable[..., Path]
) -> Iterator[Repository]:
    """A data set of 22 files after `dvc push`, committed."""
    root, address = tmp_path_factory.mktemp("repository"), "s3://data/pushed"
    dataset_maker(root / "data", n_train=3, n_test=2)
    # Two paths with the same bytes are one object.
    shutil.copyfile(root / "data/train/glioma/glioma-00.jpg", root / "data/train/glioma/twin.jpg")
    (root / "data/groups.csv").write_text("path,patient\n")
    with pytest.MonkeyPatch.context() as patch:
        site = str(tmp_path_factory.mktemp("site"))
        for name, value in (s3_environment | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": site}).items():
            patch.setenv(name, value)
        git(root, "init", "-q")
        dvc(root, "init", "-q")
        dvc(root, "remote", "add", "-q", "-d", "s3", address)
        dvc(root, "add", "-q", "data")
        dvc(root, "push", "-q")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", "data")
        yield Repository(root, address)


@pytest.fixture
def pushed(repository: Repository) -> str:
    """The md5 of the repository's version."""
    return (repository.root / "data.dvc").read_text().partition("md5: ")[2][:32]


@pytest.fixture(scope="module")
def big_version(s3_environment: dict[str, str]) -> tuple[str, Store]:
    """A data version of 100 files in DVC's layout, by its md5, and where it stands."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        store = open_store("s3://data/big")
        return put_version(store, 100), store


@pytest.fixture
def version(client: Any, tmp_path: Path) -> tuple[str, Store]:
    """A data version of 12 files that a test may damage."""
    store = open_store(f"s3://data/{tmp_path.name}")
    return put_version(store, 12), store


def put_version(store: Store, n: int, seed: int = 0) -> str:
    numbers = random.Random(seed)
    listing = []
    for index in range(n):
        content = numbers.randbytes(3000)
        md5 = hashlib.md5(content).hexdigest()
        store.write(object_key(md5), content)
        listing.append({"md5": md5, "relpath": f"train/glioma/{index:03d}.jpg"})
    text = json.dumps(listing).encode()
    md5 = hashlib.md5(text).hexdigest()
    store.write(object_key(f"{md5}.dir"), text)
    return md5


def files_of(md5: str, store: Store) -> dict[str, str]:
    found = store.read(object_key(f"{md5}.dir"))
    assert found is not None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(found.content)}


def assert_whole(tree: Path, md5: str, store: Store) -> None:
    found = {path: hashlib.md5(content).hexdigest() for path, content in contents(tree).items()}
    assert found == files_of(md5, store)


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if ".partial-" in str(path)]


def test_pushed_version_is_published_and_opened_as_it_was(
    repository: Repository,
    pushed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    braintumor: Callable[..., Any],
) -> None:
    md5 = pushed
    monkeypatch.setenv("BRAINTUMOR_DATA_REMOTE", repository.address)
    monkeypatch.setenv("BRAINTUMOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(repository.root)
    said = braintumor("data", "publish")
    assert said.code == 0 and md5 in said.out and len(said.out.splitlines()) == 1
    pointer = read_published(repository.remote)
    data = contents(repository.root / "data")
    assert (pointer.md5, pointer.files, pointer.bytes) == (md5, len(data), sum(map(len, data.values())))
    assert pointer.git_revision == git(repository.root, "rev-parse", "HEAD")
    opened = open_dataset(Path(md5))
    assert contents(opened) == data
    assert dataset_md5(opened) == md5
    # The same again changes nothing.
    tag = repository.remote.read(POINTER).tag  # type: ignore[union-attr]
    assert braintumor("data", "publish").out == said.out
    assert repository.remote.read(POINTER).tag == tag  # type: ignore[union-attr]


def test_remedy_for_lost_and_damaged_objects_works(repository: Repository, pushed: str, tmp_path: Path) -> None:
    md5, remote, cache = pushed, repository.remote, tmp_path / "cache"
    files = list(files_of(md5, remote).values())
    remote.delete(object_key(files[0]))
    remote.write(object_key(files[1]), b"short")
    with pytest.raises(UserError, match=f"files/md5/{md5[:2]}/{md5[2:]}.dir"):
        materialise(md5, remote, cache)
    with pytest.raises(UserError, match="lacks 1 files"):
        publish(remote, repository.root / "data.dvc")
    for key in (object_key(files[1]), object_key(f"{md5}.dir")):
        remote.delete(key)
    dvc(repository.root, "push", "-q")
    assert contents(materialise(md5, remote, cache)) == contents(repository.root / "data")
    assert publish(remote, repository.root / "data.dvc").md5 == md5


def test_version_that_is_not_on_the_remote_is_named(version: tuple[str, Store], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no data version {'0' * 32}"):
        materialise("0" * 32, version[1], tmp_path / "cache")
    assert not list((tmp_path / "cache/datasets").iterdir())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (None, "lacks 1 files"),
        (lambda content: content[:1000], "1000 bytes"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "cut short or changed"),
        (lambda content: b"", "it is empty"),
    ],
    ids=["missing", "truncated", "tampered", "empty"],
)
def test_bad_object_is_named_and_nothing_is_opened(
    version: tuple[str, Store], tmp_path: Path, damage: Callable[[bytes], bytes] | None, said: str
) -> None:
    md5, store = version
    cache = tmp_path / "cache"
    path, bad = list(files_of(md5, store).items())[7]
    original = store.read(object_key(bad))
    assert original is not None
    store.delete(object_key(bad)) if damage is None else store.write(object_key(bad), damage(original.content))
    with pytest.raises(UserError, match=said) as refused:
        materialise(md5, store, cache)
    assert path in str(refused.value) and object_key(bad) in str(refused.value)
    assert not list((cache / "datasets").iterdir())
    store.write(object_key(bad), original.content)
    assert_whole(materialise(md5, store, cache), md5, store)


def test_tampered_list_of_files_is_refused(version: tuple[str, Store], tmp_path: Path) -> None:
    md5, store = version
    listing = store.read(object_key(f"{md5}.dir"))
    assert listing is not None
    store.write(object_key(f"{md5}.dir"), listing.content.replace(b"000.jpg", b"001.jpg"))
    with pytest.raises(UserError, match="damaged"):
        materialise(md5, store, tmp_path / "cache")


@pytest.fixture
def behind(
    proxy: Any, client: Any, big_version: tuple[str, Store], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Store]:
    """The big version as it is seen through the proxy, with short waits."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setattr(object_store, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(object_store, "BACK_OFF_S", 0.05)
    return big_version[0], open_store(big_version[1].address)


@pytest.mark.parametrize("failure", ["cut", "stall", 503])
def test_failure_that_passes_is_not_noticed(
    proxy: Any, behind: tuple[str, Store], big_version: tuple[str, Store], tmp_path: Path, failure: object
) -> None:
    failed: set[str] = set()

    def every_fifteenth_once(method: str, path: str) -> object:
        if len(proxy.requests) % 15 or path in failed:
            return None
        failed.add(path)
        return failure

    proxy.rule = every_fifteenth_once
    md5, store = behind
    assert_whole(materialise(md5, store, tmp_path / "cache"), *big_version)
    assert len(failed) >= 5
    assert Counter(proxy.fetched()).most_common(1)[0][1] <= 3


@pytest.mark.parametrize("failure", ["cut", "stall", "drop", 500])
def test_failure_that_stays_is_told_and_the_next_attempt_goes_on(
    proxy: Any,
    behind: tuple[str, Store],
    big_version: tuple[str, Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: object,
) -> None:
    md5, store = behind
    n = len(files_of(*big_version))
    proxy.rule = lambda method, path: failure if len(proxy.requests) > n // 2 else None
    with pytest.raises(UserError, match=r"run again|check AWS_ENDPOINT_URL"):
        materialise(md5, store, tmp_path / "cache")
    assert not list((tmp_path / "cache/datasets").iterdir())
    arrived = {path.parent.name + path.name for path in (tmp_path / "cache/objects").glob("??/*")}
    assert n // 4 < len(arrived) < n
    proxy.rule = lambda method, path: None
    proxy.requests.clear()
    monkeypatch.setattr(object_store, "READ_TIMEOUT_S", 20.0)
    assert_whole(materialise(md5, open_store(store.address), tmp_path / "cache"), *big_version)
    assert Counter(proxy.fetched()) == Counter(set(files_of(*big_version).values()) - arrived)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (400, "ExpiredToken", "token has expired"),
        (403, "InvalidAccessKeyId", "does not know these keys"),
        (403, "AccessDenied", "may not do that"),
        (404, "NoSuchBucket", "no bucket data"),
    ],
)
def test_refusals_are_told_apart(
    proxy: Any, behind: tuple[str, Store], tmp_path: Path, status: int, code: str, said: str
) -> None:
    proxy.rule, proxy.error = lambda method, path: status, code
    with pytest.raises(UserError, match=said) as refused:
        materialise(behind[0], behind[1], tmp_path / "cache")
    assert behind[1].address in str(refused.value)
    assert len(proxy.requests) == 1


OPEN = "import sys; from pathlib import Path; from braintumor.data.dvc_remote import open_dataset; "
OPEN += "print(open_dataset(Path(sys.argv[1])), flush=True)"


def opening(md5: str, address: str, cache: Path) -> subprocess.Popen[str]:
    """A process that opens the version as a step does."""
    environment = os.environ | {"BRAINTUMOR_DATA_REMOTE": address, "BRAINTUMOR_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-c", OPEN, md5], env=environment, text=True, stdout=subprocess.PIPE)


def test_two_processes_fetch_each_object_once(
    proxy: Any, behind: tuple[str, Store], big_version: tuple[str, Store], tmp_path: Path
) -> None:
    proxy.rule = lambda method, path: time.sleep(0.005)  # long enough to meet
    processes = [opening(behind[0], behind[1].address, tmp_path / "cache") for _ in range(2)]
    opened = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert_whole(Path(opened.pop()), *big_version)
    assert not opened
    assert Counter(proxy.fetched()) == Counter(set(files_of(*big_version).values()))


def test_killed_download_leaves_nothing_half_made_and_is_gone_on_with(
    proxy: Any, behind: tuple[str, Store], big_version: tuple[str, Store], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    proxy.rule = lambda method, path: time.sleep(0.01)
    process = opening(behind[0], behind[1].address, cache)
    deadline = time.monotonic() + 30
    while len(proxy.requests) < 50:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "datasets" / behind[0]).exists()
    assert leftovers(cache)
    for file in (cache / "objects").glob("??/*"):
        assert hashlib.md5(file.read_bytes()).hexdigest() == file.parent.name + file.name
    proxy.rule = lambda method, path: None
    assert_whole(materialise(*behind, cache), *big_version)
    # What was under way at the kill is all that was fetched in vain.
    assert len(proxy.fetched()) <= len(files_of(*big_version)) + CONNECTIONS
    assert not leftovers(cache)


def commit_version(folder: Path, md5: str, store: Store) -> None:
    """What `dvc add` and `git commit` leave."""
    files = files_of(md5, store)
    size = sum(len(store.read(object_key(file)).content) for file in files.values())  # type: ignore[union-attr]
    out = f"- md5: {md5}.dir\n  size: {size}\n  nfiles: {len(files)}\n  hash: md5\n  path: data\n"
    (folder / "data.dvc").write_text(f"outs:\n{out}")
    git(folder, "add", "data.dvc")
    git(folder, "commit", "-q", "-m", "data")


def test_use_of_weights_keeps_them_from_being_evicted(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINTUMOR_CACHE", str(tmp_path))
    client.put_object(Bucket="weights", Key="used.weights.h5", Body=b"weights")
    file = fetch_object("s3://weights/used.weights.h5")
    for is_used in (True, False):
        os.utime(file, (0, 0))
        if is_used:
            fetch_object("s3://weights/used.weights.h5")
        DatasetCache(tmp_path).evict(Limits(max_age_days=14, max_bytes=1))
        assert file.exists() == is_used


def test_of_two_publishers_one_wins_and_the_other_is_told(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"s3://data/{tmp_path.name}")
    places = [tmp_path / "one", tmp_path / "other"]
    git(tmp_path, "init", "-q", str(places[0]))
    md5s = [put_version(store, 5, seed) for seed in range(3)]
    commit_version(places[0], md5s[2], store)
    publish(store, places[0] / "data.dvc")
    git(tmp_path, "clone", "-q", str(places[0]), str(places[1]))
    for place, md5 in zip(places, md5s[:2], strict=True):
        commit_version(place, md5, store)
    both_have_read = threading.Barrier(2)
    check = published._check_objects

    def check_and_wait(*arguments: Any) -> None:
        check(*arguments)
        both_have_read.wait(30)

    monkeypatch.setattr(published, "_check_objects", check_and_wait)
    outcomes: list[object] = [None, None]

    def run_publish(index: int) -> None:
        try:
            outcomes[index] = publish(open_store(store.address), places[index] / "data.dvc").md5
        except UserError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run_publish, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winner = read_published(store).md5
    assert winner in md5s[:2]
    assert outcomes[md5s.index(winner)] == winner
    loser = 1 - md5s.index(winner)
    assert isinstance(outcomes[loser], ObjectChanged)
    assert winner in str(outcomes[loser])
    # Trying again, the loser learns that it lacks the winner's commit.
    monkeypatch.setattr(published, "_check_objects", check)
    with pytest.raises(UserError, match="git pull"):
        publish(store, places[loser] / "data.dvc")
