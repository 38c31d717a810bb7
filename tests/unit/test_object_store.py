from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from braintumor.errors import UserError
from braintumor.object_store import ObjectChanged, ObjectMissing, Store, cache_folder, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def test_what_is_written_is_read_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"of a file")
    assert store.read("a/one") is None
    assert list(store.list()) == []
    store.write("a/one", b"first")
    store.write("a/two", tmp_path / "file")
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


def test_failed_write_leaves_the_earlier_object(store: Store, tmp_path: Path) -> None:
    store.write("a", b"first")
    with pytest.raises(UserError):
        store.write("a", tmp_path / "no such file")
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


def test_cache_stands_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BRAINTUMOR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/braintumor"
    monkeypatch.setenv("BRAINTUMOR_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
