"""One S3 server on the loopback for the tests of this folder, and a store of each kind."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.storage import Store, open_store


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    ).create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()


@pytest.fixture
def s3_env(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3_endpoint


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder's URL, on each kind of storage."""
    name = uuid.uuid4().hex
    if request.param == "local":
        return str(tmp_path / "runs" / name)
    if request.param == "memory":
        return f"memory://{name}/runs"
    request.getfixturevalue("s3_env")
    return f"s3://bucket/{name}/runs"


@pytest.fixture
def store(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    return open_store(url)


@pytest.fixture
def reopen(url: str) -> Callable[[], Store]:
    """Another machine's view of the same store: a fresh filesystem, nothing cached."""

    def fresh() -> Store:
        if url.startswith("memory://"):  # one process is all there is
            return open_store(url)
        return open_store(url, skip_instance_cache=True) if "://" in url else open_store(url)

    return fresh
