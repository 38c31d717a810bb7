"""Weights at an s3:// address, and objects by their keys, on a real S3 server process."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from braintumor.errors import UserError
from braintumor.object_store import ObjectChanged, ObjectMissing, fetch_object, open_store

ADDRESS = "s3://weights/nets/backbone.weights.h5"


def test_object_is_fetched_once_for_each_of_its_versions(client: Any, tmp_path: Path) -> None:
    client.put_object(Bucket="weights", Key="nets/backbone.weights.h5", Body=b"first")
    first = fetch_object(ADDRESS, tmp_path)
    assert first.read_bytes() == b"first"
    assert first.name == "backbone.weights.h5"
    first_inode = first.stat().st_ino
    assert fetch_object(ADDRESS, tmp_path).stat().st_ino == first_inode
    client.put_object(Bucket="weights", Key="nets/backbone.weights.h5", Body=b"second")
    assert fetch_object(ADDRESS, tmp_path).read_bytes() == b"second"
    assert first.read_bytes() == b"first"
    assert not list(tmp_path.rglob("tmp*"))


@pytest.mark.parametrize("address", ["s3://weights/nets/gone.h5", "s3://nobucket/backbone.h5"])
def test_missing_object_is_named_and_leaves_nothing(client: Any, tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=address):
        fetch_object(address, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.h5"))


@pytest.mark.parametrize("address", ["s3://", "s3://bucket", "http://bucket/key"])
def test_address_without_bucket_or_key_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match="s3://BUCKET/KEY"):
        fetch_object(address, tmp_path)


def test_server_that_is_away_is_told(
    client: Any, closed_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        fetch_object(ADDRESS, tmp_path)


def test_training_reads_its_backbone_from_s3(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: Any
) -> None:
    from braintumor.model.densenet import build_classifier

    root = Path(__file__).parents[2]
    weights = root / "weights/densenet201-phantoms.weights.h5"
    client.upload_file(str(weights), "weights", "phantoms.weights.h5")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train = params.train.model_copy(update={"image_size_px": 32, "weights": "s3://weights/phantoms.weights.h5"})
    from_s3 = build_classifier(train).backbone.get_weights()
    from_file = build_classifier(train.model_copy(update={"weights": str(weights)})).backbone.get_weights()
    assert all((one == two).all() for one, two in zip(from_s3, from_file, strict=True))
    shutil.rmtree(tmp_path / "braintumor")


def test_objects_are_written_read_listed_and_deleted(client: Any, tmp_path: Path) -> None:
    store = open_store("s3://data/objects/")
    assert store.read("a/one") is None
    assert list(store.list()) == []
    store.write("a/one", b"first")
    store.write("a/two", b"of a file")
    assert [(listed.key, listed.size) for listed in store.list("a/")] == [("a/one", 5), ("a/two", 9)]
    assert all(listed.modified.tzinfo is not None for listed in store.list())
    store.download("a/two", tmp_path / "deep/two")
    assert (tmp_path / "deep/two").read_bytes() == b"of a file"
    with pytest.raises(ObjectMissing, match="s3://data/objects/a/gone"):
        store.download("a/gone", tmp_path / "deep/gone")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["two"]
    for _ in range(2):
        store.delete("a/two")
    assert store.read("a/two") is None


def test_listing_goes_on_after_a_thousand_objects(client: Any) -> None:
    store = open_store("s3://data/many")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.write(f"{number:04d}", b""), range(1100)))
    assert [listed.key for listed in store.list()] == [f"{number:04d}" for number in range(1100)]


def test_conditional_write_needs_the_tag_that_was_read(client: Any, tmp_path: Path) -> None:
    store = open_store(f"s3://data/{tmp_path.name}")
    store.write_if("a", b"first", None)
    first = store.read("a")
    assert first is not None
    for _ in range(2):
        with pytest.raises(ObjectChanged):
            store.write_if("a", b"first", None)
    store.write_if("a", b"second", first.tag)
    with pytest.raises(ObjectChanged):
        store.write_if("a", b"third", first.tag)
    with pytest.raises(ObjectChanged):
        store.write_if("never", b"third", first.tag)
    second = store.read("a")
    assert second is not None and second.content == b"second"


def test_conditional_write_whose_answer_was_lost_is_no_lost_race(
    client: Any, proxy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    store = open_store(f"s3://data/{tmp_path.name}")
    proxy.rule = lambda method, path: "lost" if len(proxy.requests) == 1 else None
    store.write_if("a", b"first", None)
    assert [method for method, _ in proxy.requests] == ["PUT", "PUT", "GET"]
    stored = store.read("a")
    assert stored is not None and stored.content == b"first"


def test_wrong_keys_and_missing_bucket_are_told_apart(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no bucket nobucket"):
        open_store("s3://nobucket").read("a")
    with pytest.raises(UserError, match="no bucket nobucket"):
        list(open_store("s3://nobucket").list())
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        with monkeypatch.context() as wrong:
            wrong.setenv(name, "another-one")
            with pytest.raises(UserError, match="does not know these keys") as refused:
                open_store("s3://data").read("a")
            assert "another-one" not in str(refused.value)
