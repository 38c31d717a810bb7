"""Weights at an s3:// address, on a real S3 server process."""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from braintumor.data.dvc_remote import fetch_object
from braintumor.errors import UserError

KEY, SECRET = "tester", "tester-secret"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, free_ports: Any) -> Iterator[str]:
    """The address of a SeaweedFS server with one bucket, `weights`, on loopback."""
    folder = tmp_path_factory.mktemp("seaweed")
    identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
    command = [
        str(Path(sys.executable).with_name("weed")), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}",
        "-s3", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0",
        "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *(f"-{name}.port.grpc={port}" for name, port in zip(ports, free_ports(4), strict=True)),
    ]  # fmt: skip
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        address = f"http://127.0.0.1:{ports['s3']}"
        try:
            _wait_until_ready(address, server, folder / "log")
            yield address
        finally:
            server.terminate()


def _wait_until_ready(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    client = boto3.client("s3", endpoint_url=address, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
                          region_name="us-east-1")  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                pass
        except urllib.error.HTTPError:
            pass
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
            continue
        try:
            client.create_bucket(Bucket="weights")
            client.put_object(Bucket="weights", Key="nets/backbone.weights.h5", Body=b"first")
            return
        except Exception:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


@pytest.fixture
def client(s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """boto3's own environment variables, and a client that uses them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return boto3.client("s3")


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
