"""An emulated S3 server on the loopback, for tests of everything that is published."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
REGION = "us-east-1"


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a server with an empty bucket called "bucket"."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, region_name=REGION, **KEYS)
    client.create_bucket(Bucket="bucket")
    try:
        yield endpoint
    finally:
        server.stop()


def point_to(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """Have this process, and those that it starts, find the server in the environment."""
    from s3fs import S3FileSystem

    # One that found another server in the environment would be given again for the same URL.
    S3FileSystem.clear_instance_cache()
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_DEFAULT_REGION", REGION)
    for name, value in KEYS.items():
        patch.setenv(name.upper(), value)
