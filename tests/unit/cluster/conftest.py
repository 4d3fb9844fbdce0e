"""One S3 server on the loopback for the tests of this folder, and a store of each kind."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.storage import Store, open_store
from tests.fixtures.s3 import point_to, s3_server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_env(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    point_to(s3_endpoint, monkeypatch)
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
