"""Objects in S3: the only door to boto3. The endpoint and the keys come from boto3's own environment variables."""

import os
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from braintumor.errors import UserError


def fetch_object(address: str, cache: Path | None = None) -> Path:
    """A local copy of `s3://bucket/key`, fetched once for each of its versions; it appears whole or not at all.

    `cache` defaults to ~/.cache/braintumor/objects. Raises UserError where the object can't be had.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(address)
    bucket, key = parts.netloc, parts.path.lstrip("/")
    if parts.scheme != "s3" or not bucket or not key:
        raise UserError(f"{address} is not an object's address; write s3://BUCKET/KEY")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braintumor" / "objects"
    try:
        client = boto3.client("s3", config=Config(connect_timeout=5, retries={"max_attempts": 2}))
        etag = client.head_object(Bucket=bucket, Key=key)["ETag"].strip('"')
        target = cache / etag / Path(key).name
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            # An object that was replaced since must not be kept under the old version's tag.
            body = client.get_object(Bucket=bucket, Key=key, IfMatch=etag)["Body"]
            with partial.open("wb") as file:
                shutil.copyfileobj(body, file)
            partial.replace(target)
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            f"{address} can't be fetched ({error}); check the address, AWS_ENDPOINT_URL and the access keys"
        ) from error
    return target
