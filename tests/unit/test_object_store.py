import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from braintumor import object_store
from braintumor.errors import UserError
from braintumor.object_store import ObjectChanged, ObjectMissing, Store, cache_folder, fetch_object, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def test_what_is_written_is_read_listed_and_deleted(store: Store) -> None:
    assert store.read("a/one") is None
    assert list(store.list()) == []
    store.write("a/one", b"first")
    store.write("a/two", b"of a file")
    store.write("ab", b"")
    found = {listed.key: listed for listed in store.list()}
    assert list(found) == ["a/one", "a/two", "ab"]
    assert [listed.size for listed in found.values()] == [5, 9, 0]
    assert all(abs(datetime.now(UTC) - listed.modified) < timedelta(minutes=1) for listed in found.values())
    assert [listed.key for listed in store.list("a/")] == ["a/one", "a/two"]
    assert [listed.key for listed in store.list("a/t")] == ["a/two"]
    assert [listed.key for listed in store.list("a")] == ["a/one", "a/two", "ab"]
    stored = store.read("a/two")
    assert stored is not None and stored.content == b"of a file"
    for _ in range(2):
        store.delete("a/two")
    assert store.read("a/two") is None


def test_download_appears_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    store.write("a/one", b"first")
    store.download("a/one", tmp_path / "deep/one")
    assert (tmp_path / "deep/one").read_bytes() == b"first"
    with pytest.raises(ObjectMissing, match="a/gone"):
        store.download("a/gone", tmp_path / "deep/gone")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one"]


@pytest.mark.parametrize("source", ["looped", "/proc/self/mem"], ids=["opening fails", "reading fails"])
def test_object_that_can_not_be_read_is_told_by_its_own_name(store: Store, tmp_path: Path, source: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/looped").symlink_to(source)
    with pytest.raises(UserError, match="store/looped can't be reached"):
        store.download("looped", tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_target_that_can_not_be_written_is_no_failure_of_the_store(store: Store, tmp_path: Path) -> None:
    store.write("a", b"first")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        store.download("a", tmp_path / "file/one")


def test_failed_write_leaves_the_earlier_object(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("a", b"first")

    def no_room(descriptor: int, mode: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fchmod", no_room)
    with pytest.raises(UserError, match="make room"):
        store.write("a", b"second")
    stored = store.read("a")
    assert stored is not None and stored.content == b"first"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["a"]


def test_conditional_write_needs_the_tag_that_was_read(store: Store) -> None:
    store.write_if("a", b"first", None)
    with pytest.raises(ObjectChanged):
        store.write_if("a", b"second", None)
    first = store.read("a")
    assert first is not None
    store.write_if("a", b"second", first.tag)
    with pytest.raises(ObjectChanged):
        store.write_if("a", b"third", first.tag)
    with pytest.raises(ObjectChanged):
        store.write_if("never", b"third", first.tag)
    second = store.read("a")
    assert second is not None and second.content == b"second"
    assert store.read("never") is None
    assert [listed.key for listed in store.list()] == ["a"]


def test_conditional_write_waits_for_the_lock_on_a_file_in_the_folder(store: Store, tmp_path: Path) -> None:
    store.write_if("deep/a", b"first", None)
    with (tmp_path / "store/deep/.lock").open("r+") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writing = pool.submit(store.write_if, "deep/b", b"second", None)
        with pytest.raises(TimeoutError):
            writing.result(0.2)
        assert store.read("deep/b") is None
        fcntl.flock(lock, fcntl.LOCK_UN)
        writing.result(10)
    assert [listed.key for listed in store.list()] == ["deep/a", "deep/b"]


@pytest.mark.parametrize("exists", [False, True])
def test_of_writers_at_once_exactly_one_wins(store: Store, exists: bool) -> None:
    with ThreadPoolExecutor(8) as pool:
        for key in map(str, range(30)):
            if exists:
                store.write(key, b"before")
            before = store.read(key)

            def write(number: int, key: str = key, tag: str | None = before.tag if before else None) -> bool:
                try:
                    store.write_if(key, b"%d" % number, tag)
                except ObjectChanged:
                    return False
                return True

            won = [number for number, has_won in enumerate(pool.map(write, range(8))) if has_won]
            stored = store.read(key)
            assert len(won) == 1 and stored is not None and stored.content == b"%d" % won[0]


@pytest.mark.parametrize(
    "address", ["", "  ", "http://bucket/key", "gs://bucket", "file:///x", "s3://", "s3:///x", Path("s3://bucket/key")]
)
def test_address_that_is_no_store_is_refused(address: str | Path) -> None:
    with pytest.raises(UserError, match="s3://BUCKET/PREFIX"):
        open_store(address)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../outside", "a/../../outside"])
@pytest.mark.parametrize(
    "use", [lambda store, key: store.read(key), lambda store, key: store.write(key, b""), Store.delete]
)
def test_key_stays_inside_the_folder(store: Store, key: str, use: Callable[[Store, str], object]) -> None:
    with pytest.raises(UserError, match="no key"):
        use(store, key) if use is not Store.delete else store.delete(key)


def test_opening_a_store_connects_to_nothing(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    assert open_store("s3://bucket/a/b/").address == "s3://bucket/a/b"
    assert open_store("s3://bucket").name("key") == "s3://bucket/key"


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAKEY:hunter2@bucket/x",
        "s3://AKIAKEY:hunt/hunter2@bucket/x",
        "s3:/AKIAKEY:hunter2@bucket/x",
        "gs://admin:hunter2@bucket",
        "http://admin:p@hunter2@host:9000/bucket",
    ],
)
@pytest.mark.parametrize("use", [open_store, fetch_object])
def test_address_with_a_password_is_refused_without_it(address: str, use: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"/\*\*\*@") as refused:
        use(address)
    assert "hunt" not in str(refused.value) and "AKIAKEY" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "no host"], ids=["away", "no address"])
def test_password_in_the_endpoint_is_not_told(monkeypatch: pytest.MonkeyPatch, closed_port: int, host: str) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://admin:hunter2@{host.format(port=closed_port)}")
    with pytest.raises(UserError, match=r"http://\*\*\*@") as refused:
        open_store("s3://bucket").read("a@b")
    assert "hunter2" not in str(refused.value) and "s3://bucket/a@b:" in str(refused.value)


def test_home_of_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINTUMOR_CACHE", "~no-such-user/x")
    for use in (lambda: open_store("~no-such-user/x"), cache_folder):
        with pytest.raises(UserError, match="~no-such-user/x"):
            use()


def test_cache_stands_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BRAINTUMOR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/braintumor"
    monkeypatch.setenv("BRAINTUMOR_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
