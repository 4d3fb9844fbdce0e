"""Whole objects, exclusive creates and fresh listings, the same on every kind of storage."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cluster
from cluster.storage import Store, open_store
from cluster.storage.keys import matches
from cluster.storage.remote import RemoteObjects

ROOT = Path(cluster.__file__).parents[2]


def run_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE
    )


def test_objects_come_back_as_written(store: Store, reopen: Callable[[], Store]) -> None:
    store.write_bytes("a/b.bin", b"\x00\xff")
    store.write_text("a/é.txt", "säge\u2028\n")
    store.write_json("a/c.json", {"loss": 1.5, "list": (1, 2)})
    store.write_bytes("a/empty", b"")
    other = reopen()
    assert other.read_bytes("a/b.bin") == b"\x00\xff"
    assert other.read_text("a/é.txt") == "säge\u2028\n"
    assert other.read_json("a/c.json") == {"loss": 1.5, "list": [1, 2]}
    assert other.size("a/b.bin") == 2 and other.size("a/empty") == 0
    assert other.exists("a/b.bin") and other.exists("a") and not other.exists("a/zzz")
    assert other.list("a") == ["b.bin", "c.json", "empty", "é.txt"]
    assert other.list() == ["a"] and other.list("nowhere") == [] and other.list("a/b.bin") == []
    store.write_bytes("a/b.bin", b"new")
    assert other.read_bytes("a/b.bin") == b"new" and other.size("a/b.bin") == 3


def test_listing_is_never_stale(store: Store, reopen: Callable[[], Store]) -> None:
    """s3fs remembers listings by default, and another machine's new objects stay unseen."""
    reader, writer = store, reopen()
    writer.write_bytes("cells/a/result.json", b"{}")
    assert reader.list("cells") == ["a"] and reader.glob("cells/*/result.json")
    assert not reader.exists("cells/b/result.json")
    writer.write_bytes("cells/b/result.json", b"{}")
    assert reader.list("cells") == ["a", "b"]
    assert reader.glob("cells/*/result.json") == ["cells/a/result.json", "cells/b/result.json"]
    assert reader.exists("cells/b/result.json")
    writer.delete("cells/a", recursive=True)
    assert reader.list("cells") == ["b"] and not reader.exists("cells/a/result.json")


def test_missing_objects_name_the_full_url(store: Store) -> None:
    store.write_bytes("folder/x", b"1")
    calls = [store.read_bytes, store.read_json, store.size, store.delete, store.fetch]
    for call in calls:
        for name in ("gone/result.json", "folder/x/below"):
            with pytest.raises(FileNotFoundError) as caught:
                call(name)
            assert store.path(name) in str(caught.value)
    for call in (store.read_bytes, store.size, store.fetch):
        with pytest.raises(FileNotFoundError):
            call("folder")  # a folder is no object
    for folder_call in (store.fetch_folder, lambda p: store.download_folder(p, "unused")):
        with pytest.raises(FileNotFoundError, match="gone"):
            folder_call("gone")


def test_create_is_exclusive_and_the_first_content_stays(
    store: Store, reopen: Callable[[], Store]
) -> None:
    assert store.create("lock", b"first") is True
    assert store.create("lock", b"second") is False
    assert reopen().create("lock", b"first") is False  # even with the same content
    assert store.read_bytes("lock") == b"first"
    store.delete("lock")
    assert store.create("lock", b"third") and store.read_bytes("lock") == b"third"


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads change places after every few bytecodes, so that a race shows."""
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(old)


@pytest.mark.parametrize("kind", ["local", "memory"])  # moto itself looks, then writes
def test_create_among_threads_has_one_winner(kind: str, tmp_path: Path, quick_switches) -> None:
    store = open_store(str(tmp_path) if kind == "local" else f"memory://{tmp_path.name}-race")
    for round_ in range(60):
        start, winners = threading.Barrier(6), []

        def race(number: int, start=start, winners=winners, round_=round_) -> None:
            start.wait()
            if store.create(f"claim/{round_}", str(number).encode()):
                winners.append(number)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        assert store.read_bytes(f"claim/{round_}") == str(winners[0]).encode()


def test_create_survives_an_answer_that_was_lost(s3_env: str, monkeypatch) -> None:
    """The driver repeats a put whose answer was lost, and S3 then refuses it: still ours."""
    store = open_store(f"s3://bucket/lost-{time.time_ns()}")
    remote = store._backend
    assert isinstance(remote, RemoteObjects)
    assert store.create("warm", b"")  # the server's behaviour is proved by now
    real = remote.fs.pipe_file

    def twice(*arguments, **options):
        real(*arguments, **options)
        return real(*arguments, **options)

    monkeypatch.setattr(remote.fs, "pipe_file", twice)
    assert store.create("mine", b"x") is True
    monkeypatch.undo()
    assert store.create("mine", b"x") is False


def answering(monkeypatch, method: str, codes: list[str]) -> None:
    """Let the server answer a method with these error codes first."""
    import s3fs
    from botocore.exceptions import ClientError

    real = s3fs.S3FileSystem._call_s3

    async def call(self, called, *arguments, **options):
        if called == method and codes:
            error = ClientError({"Error": {"Code": codes.pop(0), "Message": "m"}}, method)
            raise s3fs.core.translate_boto_error(error)
        return await real(self, called, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)


def test_create_tries_again_when_s3_asks_for_it(s3_env: str, monkeypatch) -> None:
    """Two conditional puts at once: S3 answers 409, and the winner is known only afterwards."""
    store = open_store(f"s3://bucket/conflict-{time.time_ns()}")
    answering(monkeypatch, "put_object", ["ConditionalRequestConflict"] * 2)
    assert store.create("x", b"1") is True
    answering(monkeypatch, "put_object", ["ConditionalRequestConflict"])
    assert store.create("x", b"2") is False
    # look-alikes leave out which condition failed, and s3fs then raises a plain OSError
    answering(monkeypatch, "put_object", ["PreconditionFailed"])
    assert store.create("y", b"1") is False
    answering(monkeypatch, "put_object", ["NotImplemented"])
    with pytest.raises(ValueError, match="no conditional writes"):
        store.create("y", b"1")
    answering(monkeypatch, "put_object", ["AccessDenied"])
    with pytest.raises(PermissionError):
        store.create("y", b"1")


def test_a_server_that_ignores_conditions_is_refused(s3_env: str, monkeypatch) -> None:
    """Some S3 look-alikes accept If-None-Match and overwrite: two attempts would both win."""
    import s3fs

    real = s3fs.S3FileSystem._call_s3

    async def deaf(self, method, *arguments, **options):
        options.pop("IfNoneMatch", None)
        return await real(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", deaf)
    store = open_store(f"s3://bucket/deaf-{time.time_ns()}", skip_instance_cache=True)
    for call in (store.check_writable, lambda: store.create("x", b"1")):
        with pytest.raises(ValueError, match=r"s3://bucket/deaf.*If-None-Match") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_create_where_it_cannot_be_exclusive_names_the_filesystem() -> None:
    store = open_store("dummyfs://host/x")
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    fsspec.register_implementation("dummyfs", MemoryFileSystem, clobber=True)
    with pytest.raises(ValueError, match=r"dummyfs:// cannot create .* use a local folder, or"):
        store.create("a", b"")


def test_a_local_filesystem_without_hard_links_is_refused(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match="no hard links"):
        store.create("a/b", b"1")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_repeated_link_on_nfs_is_still_ours(tmp_path: Path, monkeypatch) -> None:
    """NFS repeats a link whose answer was lost, and reports that the name exists."""
    real = os.link

    def repeated(source, target) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", repeated)
    store = open_store(tmp_path)
    assert store.create("x", b"1") is True and store.read_bytes("x") == b"1"
    assert store.create("x", b"2") is False and os.listdir(tmp_path) == ["x"]


def test_glob_matches_components(store: Store) -> None:
    for name in ("a.json", "b/c.json", "b/d/e.json", "b/d/f.txt", "b/x[1]/g.json", ".hidden/h"):
        store.write_bytes(name, b"1")
    assert store.glob("*.json") == ["a.json"]
    assert store.glob("b/*.json") == ["b/c.json"]
    assert store.glob("b/*/*.json") == ["b/d/e.json", "b/x[1]/g.json"]
    assert store.glob("**/*.json") == ["a.json", "b/c.json", "b/d/e.json", "b/x[1]/g.json"]
    assert store.glob("b/d/[ef].*") == ["b/d/e.json", "b/d/f.txt"]
    assert store.glob("b/c.json") == ["b/c.json"] and store.glob("b/zzz") == []
    assert store.glob("b/*") == ["b/c.json"]  # objects, not folders
    assert store.glob("nowhere/*") == [] and store.glob("b/c.json/**") == []
    assert store.sub("b/x[1]").glob("*") == ["g.json"]  # a wildcard in the URL is plain text
    assert store.sub("b").glob("**") == ["c.json", "d/e.json", "d/f.txt", "x[1]/g.json"]


def test_matches() -> None:
    assert matches(["a", "b"], ["**", "b"]) and matches(["b"], ["**", "b"])
    assert not matches(["a", "b"], ["*"]) and not matches([], ["**"])
    assert matches(["a", "x", "y", "b"], ["a", "**", "b"])


def test_delete(store: Store) -> None:
    for name in ("run/a", "run/b/c", "run/b[1]/d", "runs"):
        store.write_bytes(name, b"1")
    store.delete("run/a")
    assert not store.exists("run/a")
    with pytest.raises(ValueError, match="recursive=True"):
        store.delete("run")
    store.delete("run", recursive=True)
    assert store.list() == ["runs"]  # a name that begins alike stays
    store.write_bytes("plain/x/y", b"1")
    store.delete("plain", recursive=True)
    assert not store.exists("plain")


def test_deleting_a_whole_bucket_store_keeps_the_bucket(s3_env: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3_env)
    client.create_bucket(Bucket="disposable")
    store = open_store("s3://disposable")
    store.write_bytes("a/b", b"1")
    assert (store.name, store.list()) == ("disposable", ["a"])
    store.delete("", recursive=True)
    assert store.list() == []
    assert "disposable" in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]


def test_folders_travel_whole(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(os.urandom(300_000))
    (source / "sub" / "config.json").write_text("{}")
    (source / "sub" / "linked").symlink_to(source / "model.safetensors")
    (source / ".gitattributes").write_text("x")
    store.write_bytes("student/old", b"stays")
    store.upload_folder(source, "student")
    assert store.list("student") == [".gitattributes", "model.safetensors", "old", "sub"]
    target = tmp_path / "target"
    store.download_folder("student", target)
    weights = (source / "model.safetensors").read_bytes()
    assert (target / "model.safetensors").read_bytes() == weights
    assert (target / "sub" / "linked").read_bytes() == weights
    assert (target / "sub" / "config.json").read_text() == "{}"
    assert not [p for p in target.rglob("*") if p.name.startswith(".stillhouse-")]
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        store.upload_folder(tmp_path / "nothing-here", "x")


def test_fetch_gives_a_file_to_map_and_follows_replacement(store: Store) -> None:
    store.write_bytes("shard.npy", np.arange(5, dtype=np.int64).tobytes())
    path = store.fetch("shard.npy")
    assert path.name == "shard.npy" and path.is_absolute()
    assert np.memmap(path, dtype=np.int64, mode="r").tolist() == [0, 1, 2, 3, 4]
    assert store.fetch("shard.npy") == path  # cached, or local
    assert (store.local("shard.npy") == path) == (store.local() is not None)
    store.write_bytes("shard.npy", np.arange(5, 10, dtype=np.int64).tobytes())  # of equal size
    assert np.fromfile(store.fetch("shard.npy"), dtype=np.int64).tolist() == [5, 6, 7, 8, 9]


def test_fetch_folder_follows_its_content(store: Store) -> None:
    store.write_bytes("model/config.json", b"{}")
    first = store.fetch_folder("model")
    assert first.name == "model" and [p.name for p in first.iterdir()] == ["config.json"]
    assert store.fetch_folder("model") == first
    store.write_bytes("model/weights/w", b"123")
    second = store.fetch_folder("model")
    assert (second / "weights" / "w").read_bytes() == b"123"


def test_fetch_downloads_once_for_many_threads(s3_env: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    store = open_store(f"s3://bucket/fetch-{time.time_ns()}")
    store.write_bytes("x", b"data")
    remote, calls = store._backend, []
    real = remote.get

    def counted(key: str, target: Path) -> None:
        calls.append(key)
        time.sleep(0.1)
        real(key, target)

    monkeypatch.setattr(remote, "get", counted)
    threads = [threading.Thread(target=store.fetch, args=("x",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and store.fetch("x").read_bytes() == b"data"


def test_pickled_stores_open_the_same_place(store: Store) -> None:
    store.write_bytes("sub/x", b"1")
    copy = pickle.loads(pickle.dumps(store.sub("sub")))
    assert copy == store.sub("sub") and copy.url == store.path("sub") and copy.name == "sub"
    if not store.url.startswith("memory"):
        assert copy.read_bytes("x") == b"1"


def test_options_travel_with_the_pickle_but_not_into_the_repr(s3_endpoint: str) -> None:
    url = f"s3://bucket/options-{time.time_ns()}"
    store = open_store(url, endpoint_url=s3_endpoint, key="test", secret="hush-hush")
    copy = pickle.loads(pickle.dumps(store))
    copy.write_bytes("x", b"1")
    assert store.read_bytes("x") == b"1" and "hush" not in repr(store)


def test_works_in_a_forked_process(store: Store) -> None:
    """An async filesystem that was opened before a fork raises in the child."""
    store.write_bytes("x", b"1")
    if store.url.startswith("memory"):
        return  # memory of another process, by definition
    child = os.fork()
    if child == 0:
        try:
            ok = store.read_bytes("x") == b"1"
        except BaseException:
            ok = False
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_relative_paths_are_absolute_from_the_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("./runs")
    monkeypatch.chdir("/")  # as Ray does with its workers
    store.write_bytes("x", b"1")
    assert store.url == str(tmp_path / "runs") and (tmp_path / "runs" / "x").exists()
    assert open_store(f"file://{tmp_path}/runs/") == store
    assert open_store(tmp_path / "runs").name == "runs"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/runs").url == store.url


def test_urls(s3_env: str) -> None:
    store = open_store("s3://bucket//prefix/")
    assert (store.url, store.name) == ("s3://bucket/prefix", "prefix")
    assert store.sub("a", "b/c").url == "s3://bucket/prefix/a/b/c"
    assert store.path() == store.url and store.path("x", "y") == "s3://bucket/prefix/x/y"
    assert store.local("x") is None
    assert open_store("memory://").sub("x").url == "memory://x"
    assert open_store("/").url == "/" and open_store("/").path("tmp") == "/tmp"
    for wrong, said in {
        "": "empty",
        "s3://": "bucket",
        "s3:/bucket/x": "s3://bucket/x",
        "gs:bucket": "gs://bucket",
    }.items():
        with pytest.raises(ValueError, match=said):
            open_store(wrong)


@pytest.mark.parametrize("bad", ["../x", "a/../../x", "/etc/passwd", ".stillhouse-x"])
def test_paths_stay_inside(store: Store, bad: str) -> None:
    for call in (store.read_bytes, store.sub, store.path, store.list, store.glob):
        with pytest.raises(ValueError, match="storage path"):
            call(bad)


def test_json_is_strict(store: Store) -> None:
    value = {
        "nan": float("nan"),
        "inf": np.float32("-inf"),
        "numpy": np.int64(3),
        "array": np.array([[1.5, np.nan]]),
        "path": Path("/x"),
        "set": {2, 1},
        4: True,
        "surrogate": "bad\udc80",
    }
    store.write_json("x.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    back = json.loads(store.read_bytes("x.json"), parse_constant=refuse)
    assert back == {
        "nan": None,
        "inf": "-Infinity",
        "numpy": 3,
        "array": [[1.5, None]],
        "path": "/x",
        "set": [1, 2],
        "4": True,
        "surrogate": "bad\udc80",
    }
    with pytest.raises(TypeError, match="object"):
        store.write_json("y.json", {"x": object()})
    assert not store.exists("y.json")
    store.write_bytes("broken.json", b"{")
    with pytest.raises(ValueError, match=r"broken\.json is not valid JSON"):
        store.read_json("broken.json")


def test_check_writable_passes_and_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert store.list() == []
    if store.local() is not None:
        assert not store.local().exists()
    store.write_bytes("x", b"1")
    store.sub("deeper").check_writable()
    assert store.list() == ["x"]


def message(store: Store) -> str:
    with pytest.raises(ValueError) as caught:
        store.check_writable()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_check_writable_says_what_is_wrong(tmp_path: Path, s3_env: str) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in message(open_store(tmp_path / "file"))
    assert f"{tmp_path}/file is a file" in message(open_store(tmp_path / "file" / "runs"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "link to nothing" in message(open_store(tmp_path / "dangling" / "runs"))
    assert "nosuch:// is not a known" in message(open_store("nosuch://x/y"))
    assert "bucket does not exist" in message(open_store("s3://no-such-bucket/x"))
    open_store("s3://bucket").write_bytes("taken", b"1")
    assert "is an object" in message(open_store("s3://bucket/taken"))


def test_check_writable_names_the_missing_driver(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # import fails, installed or not
    assert "pip install gcsfs" in message(open_store("gs://bucket/x"))


def test_check_writable_of_an_endpoint_that_is_not_there() -> None:
    store = open_store(
        "s3://bucket/x",
        endpoint_url="http://127.0.0.1:9",
        key="k",
        secret="s",
        config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 1},
    )
    assert "not writable (" in message(store)


def test_check_writable_of_an_unwritable_folder() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        me = os.geteuid()
        try:
            if me == 0:
                os.seteuid(65534)  # root may write anywhere
            for below in ("", "runs", "runs/deeper"):
                said = message(open_store(Path(folder) / below))
                assert "is not writable" in said and folder in said
        finally:
            if me == 0:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_local_files_follow_the_umask(tmp_path: Path) -> None:
    """A temporary of mkstemp is private, and the next user of a shared folder reads nothing."""
    old = os.umask(0o022)
    try:
        store = open_store(tmp_path)
        store.write_bytes("w", b"1")
        store.create("c", b"1")
        store.upload_folder(tmp_path, "copy")
    finally:
        os.umask(old)
    for name in ("w", "c", "copy/w"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644


def test_hidden_names_are_in_no_listing(store: Store, tmp_path: Path) -> None:
    store.write_bytes("a/x", b"1")
    backend = store._backend
    backend.write("a/.stillhouse-left-by-a-kill", b"half")
    assert store.list("a") == ["x"] and store.glob("**") == ["a/x"]
    store.download_folder("a", tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["x"]


WRITE_FOREVER = """
import sys
from cluster.storage import open_store
store, n = open_store(sys.argv[1]), 0
print("go", flush=True)
while True:
    n += 1
    store.write_bytes("replaced", bytes([n % 256]) * 4_000_000)
    store.create(f"created/{n:06d}", bytes([n % 256]) * 1_000_000)
"""


@pytest.mark.parametrize("wait_s", [0.05, 0.12, 0.2])
def test_a_killed_writer_leaves_only_whole_objects(tmp_path: Path, wait_s: float) -> None:
    store = open_store(tmp_path)
    process = run_python(WRITE_FOREVER, str(tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    while not store.list("created"):
        time.sleep(0.005)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    data = store.read_bytes("replaced")
    assert len(data) == 4_000_000 and len(set(data)) == 1
    for name in store.list("created"):
        data = store.read_bytes(f"created/{name}")
        assert len(data) == 1_000_000 and set(data) == {int(name) % 256}


@pytest.mark.parametrize("by", ["write", "upload"])
def test_a_reader_never_sees_a_half_written_object(
    store: Store, by: str, tmp_path: Path, quick_switches
) -> None:
    store.write_bytes("x", b"0" * 300_000)
    (tmp_path / "from").mkdir()
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            data = store.read_bytes("x")
            seen.add((len(data), len(set(data))))

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(15):
        data = str(n % 10).encode() * 300_000
        if by == "write":
            store.write_bytes("x", data)
        else:
            (tmp_path / "from" / "x").write_bytes(data)
            store.upload_folder(tmp_path / "from", "")
    stop.set()
    reader.join()
    assert seen == {(300_000, 1)}


def test_importing_storage_is_light() -> None:
    code = (
        "import sys; import cluster.storage;"
        "heavy = {'ray', 'torch', 'pandas', 'numpy', 'fsspec', 's3fs'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    assert run_python(code).wait() == 0
