"""`stillhouse cache`: finding, describing, mending and removing logit caches."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cluster.storage import Store, open_store
from jobs.caches import show
from jobs.cli.cache import app
from jobs.cli.main import main
from tests.fixtures.s3 import point_to, s3_server
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import VERSION, encode
from trainer.logits.reader import CacheReader
from trainer.logits.records import Coding, Draws, Records
from trainer.logits.store import open_cache, publish_codebook, write_shard

COMMANDS = ["ls", "info", "verify", "repair", "rm"]
VOCAB, LENGTH = 300, 8
TOPK = {
    "format": VERSION,
    "teacher.dtype": "float32",
    "teacher.weights": "3a9299b36325a22583c617f9c8e4e523",
    "attention": "documents",
    "cache.method": "topk",
    "cache.k": 4,
    "cache.keep": 0.0,
    "cache.step": "auto",
    "cache.temperatures.0": 1.0,
    "cache.remap": "frequency",
}
SAMPLE = {
    "format": VERSION,
    "teacher.name": "org/big",
    "teacher.dtype": "bfloat16",
    "attention": "documents",
    "cache.method": "sample",
    "cache.draws": 6,
    "cache.seed": 0,
    "cache.remap": "frequency",
}


def key(number: int) -> bytes:
    return bytes([37 * number % 256]) + number.to_bytes(15, "big")


def topk(number: int, kept: float = 0.9375) -> Records:
    """Four ids with half of the rest each; all of them together have `kept`."""
    ids = np.tile(np.arange(number, number + 4), (LENGTH, 1)).astype(np.int64)
    p = np.tile(0.5 ** np.arange(1, 5) * kept / 0.9375, (LENGTH, 1))
    return Records(ids, np.log(p).astype(np.float32), np.full((LENGTH, 1), np.log1p(-kept), "f4"))


def exact(number: int) -> Records:
    made = topk(number)
    return Records(*(made.ids, made.log_probs, made.log_tails), *np.ones((2, LENGTH), np.float32))


def draws(number: int) -> Draws:
    """Two different ids at every position."""
    return Draws(np.tile([1, 1, 1, 1, 9 + number, 9 + number], (LENGTH, 1)).astype(np.int32))


CODINGS = {
    "topk": Coding("topk", VOCAB, 4),
    "sample": Coding("sample", VOCAB, 6, ()),
    "exact": Coding("exact", VOCAB, 4),
}
BOOKS = {
    "topk": fit_codebook(CODINGS["topk"], [topk(n) for n in range(9)]),
    "sample": fit_codebook(CODINGS["sample"], [draws(n) for n in range(9)]),
    "exact": fit_codebook(CODINGS["exact"], [exact(n) for n in range(9)]),
}


def write(cache: Store, kind: str, method: str, items: dict[int, Any]) -> str:
    """One shard; returns its name."""
    book = publish_codebook(cache, kind, BOOKS[method])
    blobs = [encode(item, book) for item in items.values()]
    return write_shard(cache, kind, [key(n) for n in items], blobs)[0]


def write_run(storage: Store, name: str, spec: dict[str, Any], cache: Store | None = None) -> None:
    """A run's files: of one that has captured `cache`, or has been started only."""
    storage.write_text(f"{name}/spec.yaml", yaml.safe_dump({"name": name, **spec}))
    if cache is not None:
        fixed = json.loads(cache.read_text("identity.json"))
        record = {"inputs": {"fixed": fixed, "growing": {}}, "outputs": {"cache": cache.name}}
        storage.write_json(f"{name}/state/capture-0001.json", record)


class Made:
    """A storage with two caches: one of top-k that the run `job` uses, one of draws."""

    def __init__(self, url: str) -> None:
        self.url, self.storage = url, open_store(url)
        self.topk = open_cache(self.storage.sub("_logits"), TOPK)
        self.first = write(self.topk, "train", "topk", {n: topk(n) for n in range(5)})
        self.second = write(self.topk, "train", "topk", {n: topk(n) for n in range(4, 12)})
        write(self.topk, "eval", "exact", {n: exact(n) for n in range(3)})
        self.sample = open_cache(self.storage.sub("_logits"), SAMPLE)
        write(self.sample, "train", "sample", {n: draws(n) for n in range(4)})
        teacher = {"model": "/models/runs/demo-teacher/student", "dtype": "float32"}
        spec = {"teacher": teacher, "cache": {"method": "topk", "k": 4}}
        write_run(self.storage, "job", spec, self.topk)

    def held(self, cache: Store, kind: str = "train") -> int:
        with CacheReader(cache, kind) as reader:
            return len(reader)

    def damage(self, cache: Store, name: str) -> None:
        """Changes one byte in the middle of an object."""
        data = bytearray(cache.read_bytes(name))
        data[len(data) // 2] ^= 0x10
        cache.write_bytes(name, bytes(data))


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(s3_endpoint, monkeypatch)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def made(folder: Path) -> Made:
    return Made("./runs")


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints; with another code than 0, its errors on stderr."""
    assert main(["cache", *arguments]) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert bool(errors) == (code != 0) and "Traceback" not in err
    return "".join(f"{line}\n" for line in errors) if code else out


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


# -- help --------------------------------------------------------------------------------------


def test_the_commands_start_light() -> None:
    code = (
        "import sys, jobs.cli.main\n"
        "try: jobs.cli.main.main(['cache', 'verify', '--help'])\n"
        "finally: print([m for m in ('torch', 'transformers', 'ray', 'numpy', 'numba', "
        "'yaml', 'fsspec', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, command, "--help")
    assert f"Example:\n    stillhouse cache {command}" in text
    assert all(len(line.split()) > 1 for line in text.splitlines() if line.startswith("  --"))


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, *arguments)
    assert [info.name or info.callback.__name__ for info in app.registered_commands] == COMMANDS
    assert all(f"\n  {command} " in text for command in COMMANDS) and "..." not in text[60:]


# -- naming a cache ----------------------------------------------------------------------------


def test_a_cache_is_named_by_folder_url_or_start(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = made.topk
    for text in (cache.url, f"file://{cache.url}", cache.name, cache.name[:5]):
        assert f"logit cache {cache.url}\n" in told(capsys, "info", text)
    assert main(["cache", "info", cache.name[:5], "--storage", "elsewhere"]) == 2
    assert "elsewhere holds no caches" in capsys.readouterr().err


def test_a_name_that_is_none_names_those_there(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    known = ", ".join(sorted(cache.name[:12] for cache in (made.topk, made.sample)))
    for text in ("nothing", "0123456", made.topk.name[:3], "runs"):
        line = told(capsys, "info", text, code=2)
        assert line.startswith(f"error: {text}: no such logit cache; the caches in ./runs are")
        assert known in line and line.count("\n") == 1


def test_a_start_of_several_caches_is_refused(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    for end in ("00", "01"):
        made.storage.write_text(f"_logits/{'ab12' * 7}ab{end}/identity.json", "{}")
    line = told(capsys, "rm", "ab12", "--yes", code=2)
    assert "several caches start so" in line and made.storage.exists(f"_logits/{'ab12' * 7}ab00")
    assert main(["cache", "rm", f"{'ab12' * 7}ab00", "--yes"]) == 0
    assert not made.storage.exists(f"_logits/{'ab12' * 7}ab00")


def test_a_spec_without_a_teacher_has_no_cache(
    made: Made, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = told(capsys, "info", "demo-teacher", code=2)
    assert line.startswith("error: teacher: got null; needed here")
    assert told(capsys, "verify", "gone.yaml", code=2).startswith("error: gone.yaml: no such file")


# -- ls and info -------------------------------------------------------------------------------


def test_ls_counts_what_is_there(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(told(capsys, "ls", "--json"))}
    row = rows[made.topk.name]
    assert (row["teacher"], row["method"], row["used_by"]) == ("demo-teacher", "topk 4", ["job"])
    files = [p for p in Path(made.topk.url).rglob("*") if p.is_file()]
    assert row["bytes"] == sum(path.stat().st_size for path in files)
    kinds = {kind["kind"]: kind for kind in row["kinds"]}
    assert list(kinds) == ["train", "eval"]
    train = kinds["train"]
    # sequence 4 is in both shards, and counts once
    assert (train["sequences"], train["tokens"], train["shards"]) == (12, 12 * LENGTH, 2)
    stored = sum(p.stat().st_size for p in files if p.match("shards/train-*"))
    assert train["bytes"] == stored and train["bytes_per_token"] == stored / (12 * LENGTH)
    assert kinds["eval"]["sequences"] == 3 and row["fault"] == ""
    assert 0 <= row["age"] < 600
    other = rows[made.sample.name]
    assert (other["teacher"], other["method"], other["used_by"]) == ("org/big", "sample 6", [])


def test_ls_is_a_table(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "ls", "runs").splitlines()
    (line,) = [line for line in lines if made.topk.name[:12] in line]
    words = line.split()
    assert words[1:6] == ["demo-teacher", "topk", "4", "15", "120"] and words[-1] == "job"
    write(made.sample, "train1", "sample", {n: draws(n + 1) for n in range(4)})
    (line,) = [line for line in told(capsys, "ls").splitlines() if made.sample.name[:12] in line]
    assert line.split()[4:6] == ["4", "32"]  # the same sequences, drawn twice
    assert told(capsys, "ls", "empty") == f"{Path('empty').absolute()} holds no logit caches\n"


def test_ls_shows_a_damaged_cache_and_one_of_another_format(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.damage(made.topk, f"shards/{made.first}.idx")
    made.storage.write_json("_logits/" + "e" * 32 + "/identity.json", {"format": 1})
    text = told(capsys, "ls")
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines[made.topk.name[:12]].rstrip().endswith("damaged")
    assert lines["e" * 12].rstrip().endswith("another format")
    assert "damaged" not in lines[made.sample.name[:12]]
    assert told(capsys, "info", "eeee", code=2).count("is of format 1") == 1
    line = told(capsys, "repair", "eeee", code=2)
    place = made.storage.sub("_logits", "e" * 32).url
    assert line.endswith(
        f"is of format 1, and this version reads {VERSION}; remove it with: "
        f"stillhouse cache rm {place}\n"
    )
    line = told(capsys, "info", made.topk.name, code=3)
    assert f"stillhouse cache repair {made.topk.url}" in line and line.count("\n") == 1


def test_the_histogram_is_of_the_retained_mass(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(made.storage.sub("_logits"), {**TOPK, "cache.k": 5})
    write(cache, "train", "topk", {n: topk(n, (0.6, 0.93, 0.93, 0.97)[n]) for n in range(4)})
    kinds = json.loads(told(capsys, "info", cache.name, "--json"))["kinds"]
    histogram = kinds[0]["histogram"]
    assert histogram["what"] == "retained mass" and histogram["positions"] == 4 * LENGTH
    found = dict(zip(histogram["edges"], histogram["shares"], strict=True))
    assert found == {0.0: 0, 0.5: 0.25, 0.8: 0, 0.9: 0.5, 0.95: 0.25, 0.99: 0, 0.999: 0}
    assert histogram["mean"] == pytest.approx((0.6 + 2 * 0.93 + 0.97) / 4, abs=2e-3)
    text = told(capsys, "info", cache.name)
    (line,) = [line for line in text.splitlines() if line.strip().startswith("90 to 95 %")]
    assert line.split()[4:] == ["50.0", "%", "#" * 20]


def test_of_draws_the_histogram_is_of_unique_ids(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json.loads(told(capsys, "info", made.sample.name, "--json"))
    histogram = info["kinds"][0]["histogram"]
    assert histogram["what"] == "unique ids" and histogram["mean"] == 2.0
    assert (histogram["edges"], histogram["shares"]) == ([1, 2], [0.0, 1.0])
    text = told(capsys, "info", made.sample.name)
    assert "cache.draws" in text and "used by no run" in text and "mean 2.00" in text


def test_sequences_of_different_lengths_make_tokens_an_estimate(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    def longer(number: int) -> Records:
        item = topk(number)
        return Records(*(np.tile(a, (2, 1)) for a in (item.ids, item.log_probs, item.log_tails)))

    write(made.topk, "train", "topk", {n: longer(n) for n in range(12, 24)})
    kinds = json.loads(told(capsys, "info", made.topk.name, "--json"))["kinds"]
    assert not kinds[0]["tokens_exact"] and kinds[1]["tokens_exact"]
    assert kinds[0]["tokens"] == 12 * LENGTH + 12 * 2 * LENGTH  # all 24 were looked at
    assert "~288" in told(capsys, "info", made.topk.name)


# -- verify and repair -------------------------------------------------------------------------


def test_verify_reads_every_byte(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert "every file read: 0 damaged" in told(capsys, "verify", made.topk.name)
    made.damage(made.topk, f"shards/{made.second}.bin")
    assert main(["cache", "verify", made.topk.name[:8], "--json"]) == 3
    out, err = capsys.readouterr()
    (damage,) = json.loads(out)["damages"]
    assert damage["path"] == f"shards/{made.second}.bin" and damage["kind"] == "train"
    assert err.startswith("reading 1.") and err.count("error: ") == 1
    assert f"stillhouse cache repair {made.topk.url}" in err


def test_repair_says_what_it_costs_and_asks(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = made.topk.name
    assert "nothing to do" in told(capsys, "repair", name)
    made.damage(made.topk, f"shards/{made.second}.bin")
    before = made.topk.list("shards")
    answer(monkeypatch, "n\n")
    text = told(capsys, "repair", name)
    # 8 sequences, one of which the other shard holds too
    assert f"shards/{made.second}.bin is damaged" in text
    assert "captures 7 sequences of train again" in text
    assert text.endswith("nothing was changed\n") and made.topk.list("shards") == before
    answer(monkeypatch, "")
    assert "nobody answers here; give --yes" in told(capsys, "repair", name, code=2)
    assert made.topk.list("shards") == before
    answer(monkeypatch, "y\n")
    assert f"mended: shards/{made.second}.bin" in told(capsys, "repair", name)
    assert made.held(made.topk) == 5 and made.held(made.topk, "eval") == 3
    assert "every file read: 0 damaged" in told(capsys, "verify", name)


def test_repair_of_an_index_knows_the_number_of_sequences_within_bounds(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.damage(made.topk, f"shards/{made.second}.idx")
    text = told(capsys, "repair", made.topk.name, "--yes")
    assert "captures 0 to 8 sequences of train again" in text
    assert made.held(made.topk) == 5


def test_repair_of_an_index_of_any_size(
    made: Made, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(Path(made.topk.url, "shards", f"{made.second}.idx"), 1 << 43)
    text = told(capsys, "repair", made.topk.name, "--yes")
    assert "more than any index" in text and f"captures 0 to {1 << 21:,} sequences" in text
    assert made.held(made.topk) == 5


def test_repair_of_what_is_no_record(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checksum holds: reading it names the repair, which must find it too."""
    name, _ = write_shard(made.topk, "train", [key(50)], [b"\2\0\4\0" + b"\xff" * 40])
    assert main(["cache", "verify", made.topk.name]) == 3
    capsys.readouterr()
    text = told(capsys, "repair", made.topk.name, "--yes")
    assert f"mended: shards/{name}.bin" in text and "captures 1 sequences of train" in text
    assert made.held(made.topk) == 12


def test_repair_leaves_what_a_run_has_written_anew_meanwhile(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"shards/{made.second}.bin"
    sound = made.topk.read_bytes(path)
    made.damage(made.topk, path)

    def confirm(what: str) -> bool:
        made.topk.write_bytes(path, sound)
        return True

    monkeypatch.setattr("typer.confirm", confirm)
    text = told(capsys, "repair", made.topk.name)
    assert f"no longer damaged, left alone: {path}" in text
    assert made.held(made.topk) == 12


def test_repair_brings_a_codebook_back(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.damage(made.topk, "codebook-train.bin")
    assert "codebook-train.bin" in told(capsys, "info", made.topk.name, code=3)
    assert "no records are lost" in told(capsys, "repair", made.topk.name, "--yes")
    assert made.held(made.topk) == 12


def test_repair_brings_back_the_codebook_of_the_records_that_stay(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """The larger shard needs another codebook, but it is damaged itself."""
    cache = open_cache(made.storage.sub("_logits"), {**TOPK, "cache.k": 7})
    lost = write(cache, "train", "topk", {n: topk(n) for n in range(8)})
    cache.delete("codebook-train.bin")
    book = publish_codebook(cache, "train", fit_codebook(CODINGS["topk"], [topk(3)]))
    write_shard(cache, "train", [key(9)], [encode(topk(9), book)])
    for name in (f"shards/{lost}.bin", "codebook-train.bin"):
        made.damage(cache, name)
    assert "captures 8 sequences of train again" in told(capsys, "repair", cache.name, "--yes")
    assert made.held(cache) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 2}'])
def test_repair_takes_the_identity_from_a_run(
    made: Made, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(made.storage, "a-run", {"teacher": {"model": "org/big"}}, made.sample)
    made.topk.write_bytes("identity.json", content)
    assert "what is left is whole" in told(capsys, "repair", made.topk.name, "--yes")
    assert json.loads(made.topk.read_text("identity.json")) == TOPK
    assert "nothing to do" in told(capsys, "repair", made.topk.name)


def test_an_identity_that_no_run_knows_comes_back_with_the_next_run(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.sample.write_bytes("identity.json", b"{")
    assert "comes back with the next run" in told(capsys, "repair", made.sample.name, "--yes")
    open_cache(made.storage.sub("_logits"), SAMPLE)
    assert "nothing to do" in told(capsys, "repair", made.sample.name) and made.held(made.sample)


def test_leftovers_of_a_kill_are_harmless_and_repair_takes_them_away(
    made: Made, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    left = Path(made.topk.url, "shards", f"train-{'0' * 32}.bin")
    left.write_bytes(b"half")
    assert "nothing to do" in told(capsys, "repair", made.topk.name)  # may be being written
    os.utime(left, (time.time() - 7200,) * 2)
    assert "harmless: shards/train-000" in told(capsys, "verify", made.topk.name)
    assert "no records are lost" in told(capsys, "repair", made.topk.name, "--yes")
    assert not left.exists() and made.held(made.topk) == 12


# -- rm ----------------------------------------------------------------------------------------


def test_rm_names_the_runs_and_asks(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, "n\n")
    text = told(capsys, "rm", made.topk.name)
    assert "used by job" in text and text.endswith("nothing was changed\n")
    assert made.held(made.topk) == 12
    answer(monkeypatch, "y\n")
    assert f"deleted: {made.topk.url}\n" in told(capsys, "rm", made.topk.name[:6])
    assert made.storage.sub("_logits").list() == [made.sample.name]


def test_rm_unused_keeps_what_a_run_uses(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "rm", "--unused", "--yes")
    assert made.sample.url in text and made.topk.url not in text
    assert made.storage.sub("_logits").list() == [made.topk.name]
    assert "holds no logit cache that no run uses" in told(capsys, "rm", "--unused", "--yes")


def test_rm_unused_keeps_what_a_run_is_filling(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that captures has not written down yet which cache it is; deleting it loses hours."""
    spec = {"teacher": {"model": "org/big"}, "cache": {"method": "sample", "draws": 6}}
    write_run(made.storage, "filling", spec)
    assert "holds no logit cache that no run uses" in told(capsys, "rm", "--unused", "--yes")
    assert "used by filling" in told(capsys, "info", made.sample.name)
    write_run(made.storage, "filling", spec, made.topk)  # it has filled another one
    assert made.sample.url in told(capsys, "rm", "--unused", "--yes")


def test_rm_unused_takes_a_cache_that_a_run_cannot_be_filling(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"teacher": {"model": "org/big"}, "cache": {"method": "sample", "draws": 7}}
    write_run(made.storage, "filling", spec)
    assert made.sample.url in told(capsys, "rm", "--unused", "--yes")


def test_rm_reads_no_index(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(p.stat().st_size for p in Path(made.topk.url).rglob("*") if p.is_file())
    made.topk.write_bytes("identity.json", b"{")  # nor does it need a sound cache
    size -= len(json.dumps(TOPK, sort_keys=True, indent=1)) - 1
    monkeypatch.setattr("jobs.caches.describe.CacheReader", None)
    monkeypatch.setattr("trainer.logits.store.unpack", None)
    text = told(capsys, "rm", made.topk.name, "--yes")
    assert f"{made.topk.url}: {show.format_bytes(size)}, used by job" in text
    assert made.storage.sub("_logits").list() == [made.sample.name]


def test_rm_wants_caches_or_unused(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], [made.topk.name, "--unused"]):
        assert "name some, or give --unused" in told(capsys, "rm", *arguments, code=2)
    assert made.held(made.topk) and made.held(made.sample)


# -- a bucket ----------------------------------------------------------------------------------


def test_all_of_it_works_on_s3(s3: None, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made("s3://bucket/runs")
    rows = {row["name"]: row for row in json.loads(told(capsys, "ls", made.url, "--json"))}
    assert rows[made.topk.name]["kinds"][0]["sequences"] == 12 and rows[made.topk.name]["age"] >= 0
    url = f"s3://bucket/runs/_logits/{made.topk.name}"
    assert "retained mass" in told(capsys, "info", url)
    made.damage(made.topk, f"shards/{made.second}.bin")
    assert f"stillhouse cache repair {url}" in told(capsys, "verify", url, code=3)
    text = told(capsys, "repair", made.topk.name[:6], "--storage", made.url, "--yes")
    assert "captures 7 sequences of train again" in text and made.held(made.topk) == 5
    assert "used by job" in told(capsys, "rm", url, "--yes")
    told(capsys, "rm", "--unused", "--storage", made.url, "--yes")
    assert told(capsys, "ls", made.url) == "s3://bucket/runs holds no logit caches\n"
