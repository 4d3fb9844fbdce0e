"""`stillhouse cache` with a spec: coverage, and records against the teacher.

The caches are written here from plain forward passes in float64, not by a capture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cluster.storage import open_store
from jobs.caches.find import Asked, find
from jobs.cli.main import main
from jobs.run.directory import RunDir
from jobs.run.inputs import ResolvedJob
from jobs.stages import prepare as prepare_stage
from tests.fixtures.corpora import (
    LENGTH,
    config_values,
    data_spec,
    load_plain,
    log_softmax,
    make_corpus,
    plain_logits,
    plain_records,
    save_model,
    write_texts,
)
from trainer.corpus.corpus import open_corpus
from trainer.corpus.prepare import prepare
from trainer.corpus.tokenizer import load_tokenizer
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import encode
from trainer.logits.reader import CacheReader
from trainer.logits.records import Draws, Records, coding_of
from trainer.logits.store import open_cache, publish_codebook, write_shard
from trainer.teacher.job import wanted
from trainer.teacher.sampling import BLOCK, draw, stream, uniforms

METHODS = {
    "topk": {"method": "topk", "k": 12, "temperatures": [2.0, 1.0]},
    "ragged": {"method": "topk", "k": 12, "keep": 1.0, "step": 0.02},
    "sample": {"method": "sample", "draws": 50, "redraws": 2, "seed": 3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A folder, a teacher in it, and a glob of texts."""
    folder = tmp_path_factory.mktemp("world")
    glob = write_texts(folder / "texts", documents=90)
    corpus = make_corpus(open_store(folder / "first"), data_spec(glob))
    return folder, save_model(folder / "teacher", corpus.tokenizer_folder()), glob


def write_spec(world: tuple[Path, Path, str], folder: Path, **changes: Any) -> str:
    home, teacher, glob = world
    spec = {
        "name": "job",
        "storage": str(folder / "runs"),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"init": "random", "config": config_values()},
        "data": {
            "train": [{"source": glob}],
            "select_sequences": 3,
            "report_sequences": 4,
            "sequence_length": LENGTH,
            "max_tokens": 20 * LENGTH,
        },
        "distill": {"steps": 10, "tokens_per_step": 4 * LENGTH, "micro_batch": 4},
        "resources": {"capture": {"batch_tokens": 4 * LENGTH}},
        "sweep": None,
    }
    for section, values in changes.items():
        spec[section] = {**spec.get(section, {}), **values}  # type: ignore[dict-item]
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def fill(
    asked: Asked,
    tamper: Callable[[str, np.ndarray], np.ndarray] = lambda kind, log_p: log_p,
    skip: int = 0,
) -> None:
    """Prepares the corpus and writes the whole cache from plain forward passes.

    tamper: changes the log-probabilities [seq, vocab] that the records of a kind are made of.
    """
    assert asked.spec is not None and asked.spec.data is not None and asked.made_of is not None
    folder = asked.made_of.tokenizer_folder
    assert folder is not None and asked.made_of.teacher_folder is not None
    identity = asked.made_of.corpus
    prepare(asked.spec.data, load_tokenizer(folder), asked.corpus, identity=identity)
    run = RunDir(open_store(asked.spec.storage).sub(asked.spec.name))
    run.claim()
    made_from = prepare_stage.inputs(ResolvedJob.of(asked.spec), {}).values()
    run.finish("prepare", made_from, {"corpus": asked.corpus.name}, 0.0)
    corpus, job = open_corpus(asked.corpus), asked.capture
    vocab = int(corpus.manifest["vocab_size"])
    cache = open_cache(open_store(asked.spec.storage).sub("_logits"), asked.made_of.cache)
    model = load_plain(asked.made_of.teacher_folder)
    for kind, part, numbers in wanted(job, corpus):
        coding = coding_of(job.cache_spec, vocab, kind)
        batch = part.batch(numbers[skip:])
        log_p = log_softmax(plain_logits(model, batch, by_document=True)[..., :vocab])
        rows = [tamper(kind, row) for row in log_p]
        keys = [key.tobytes() for key in batch.keys]
        made: list[Records | Draws]
        if coding.method == "sample":
            made = [
                _draws(job, kind, key, row, coding.k) for key, row in zip(keys, rows, strict=True)
            ]
        else:
            made = [
                _records(row, coding.k, list(coding.temperatures), ids if kind == "eval" else None)
                for row, ids in zip(rows, batch.input_ids, strict=True)
            ]
        book = publish_codebook(cache, kind, fit_codebook(coding, made))
        write_shard(cache, kind, keys, [encode(item, book) for item in made])


def _records(row: np.ndarray, k: int, temperatures: list[float], ids: Any) -> Records:
    kept = plain_records(row, k, temperatures)
    item = Records(kept[0], *(array.astype(np.float32) for array in kept[1:]))
    if ids is None:
        return item
    entropy = -(np.exp(row) * row).sum(axis=-1)
    true = row[np.arange(len(row)), np.append(ids[1:], 0)]
    return replace(item, entropy=entropy.astype("f4"), true_log_prob=true.astype("f4"))


def _draws(job: Any, kind: str, key: bytes, row: np.ndarray, draws: int) -> Draws:
    words = torch.tensor([stream(job.cache_spec.seed, key, int(kind[5:] or 0))])
    numbers = uniforms(words.expand(len(row), 4), torch.arange(len(row)), draws)
    space = np.zeros((len(row), -row.shape[1] % BLOCK))
    p = torch.from_numpy(np.concatenate([np.exp(row), space], axis=1).astype(np.float32))
    return Draws(draw(p, numbers).numpy())


def verified(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """Exit code, the JSON, and stderr of `cache verify`."""
    capsys.readouterr()
    code = main(["cache", "verify", *arguments, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


@pytest.mark.parametrize("method", list(METHODS))
def test_a_faithful_cache_is_found_faithful(
    world: tuple[Path, Path, str],
    tmp_path: Path,
    method: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = write_spec(world, tmp_path, cache=METHODS[method])
    fill(find(spec, [], "./runs"))
    code, told, err = verified(capsys, spec, "--sequences", "5")
    assert code == 0 and told["ok"] and not told["damages"]
    kinds = {kind["kind"]: kind for kind in told["kinds"]}
    assert list(kinds) == (["train", "train1", "eval"] if method == "sample" else ["train", "eval"])
    for kind in kinds.values():
        assert kind["ok"] and kind["sequences"] == 5 and kind["positions"] == 5 * LENGTH
    if method == "sample":
        for name in ("train", "train1"):
            assert kinds[name]["figures"]["moved"]["value"] < 0.002
            assert abs(kinds[name]["figures"]["z"]["value"]) < 4
    else:
        figures = kinds["train"]["figures"]
        # Of real size: the coding's, not the noise's.
        assert 1e-6 < figures["record"]["value"] < 5e-3 and figures["truncation"]["value"] > 0.05
        assert figures["record"]["batch_noise"] < 1e-8 and figures["record"]["dtype_noise"] is None
    assert kinds["eval"]["figures"]["record"]["value"] < 1e-5
    assert "running the teacher over" in err


def _shifted(kind: str, log_p: np.ndarray) -> np.ndarray:
    return np.roll(log_p, 1, axis=0)


def _hot(kind: str, log_p: np.ndarray) -> np.ndarray:
    return log_softmax(log_p / 1.1)


def _truncated(kind: str, log_p: np.ndarray) -> np.ndarray:
    low = np.sort(log_p, axis=1)[:, -40:-39]
    return log_softmax(np.where(log_p >= low, log_p, -1e4)) if kind != "eval" else log_p


@pytest.mark.parametrize(
    ("method", "tamper"),
    [
        ("topk", _shifted),
        ("topk", _hot),
        ("topk", _truncated),
        ("sample", _shifted),
        ("sample", _hot),
        ("sample", _truncated),
    ],
)
def test_records_of_something_else_are_unfaithful(
    world: tuple[Path, Path, str],
    tmp_path: Path,
    method: str,
    tamper: Callable[[str, np.ndarray], np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All checksums hold; only the teacher can tell."""
    spec = write_spec(world, tmp_path, cache=METHODS[method])
    asked = find(spec, [], "./runs")
    fill(asked, tamper)
    code, told, err = verified(capsys, spec)
    assert code == 3 and not told["ok"] and not told["damages"]
    assert {kind["kind"]: kind["ok"] for kind in told["kinds"]}["train"] is False
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(f"stillhouse cache rm {asked.cache.url}" in line for line in last) and last
    assert main(["cache", "verify", asked.cache.url]) == 0  # the files are what was written


def test_a_bfloat16_cache_is_held_to_its_own_noise(
    world: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of float32 passes differ from bfloat16's, by no more than bfloat16 does itself."""
    teacher = {"dtype": "bfloat16"}
    spec = write_spec(world, tmp_path, cache=METHODS["topk"], teacher=teacher)
    fill(find(spec, [], "./runs"))
    code, told, _ = verified(capsys, spec)
    assert code == 0
    figure = {kind["kind"]: kind for kind in told["kinds"]}["eval"]["figures"]["record"]
    assert figure["dtype_noise"] > 1e-5 and figure["value"] < 2 * figure["dtype_noise"]


def test_coverage_counts_what_the_spec_will_read(
    world: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(world, tmp_path, cache=METHODS["sample"])
    assert main(["cache", "info", spec]) == 0
    out = capsys.readouterr().out
    assert "is not there yet" in out and f"stillhouse run {spec} --until capture" in out
    assert main(["cache", "verify", spec]) == 2
    fill(find(spec, [], "./runs"), skip=1)
    capsys.readouterr()
    fewer = ["distill.steps=8", f"data.max_tokens={16 * LENGTH}"]  # two epochs
    assert main(["cache", "info", spec, *fewer, "--json"]) == 0
    coverage = json.loads(capsys.readouterr().out)["coverage"]
    assert [(c["kind"], c["wanted"]) for c in coverage] == [
        ("train", 16), ("train1", 16), ("eval", 7)
    ]  # fmt: skip
    asked = find(spec, fewer, "./runs")
    with CacheReader(asked.cache, "train") as reader:
        assert len(reader) == 19  # of the 20 that were wanted
    assert coverage[0]["missing"] in (0, 1) and coverage[0] == {**coverage[1], "kind": "train"}
    assert coverage[2]["present"] == 5 and coverage[2]["missing"] == 2
    assert main(["cache", "info", spec]) == 0
    assert "Missing" in capsys.readouterr().out
    code, told, _ = verified(capsys, spec)  # of what is there
    assert code == 0 and told["kinds"][0]["sequences"] == 16


def test_damage_is_told_before_the_teacher_runs(
    world: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(world, tmp_path, cache=METHODS["topk"])
    asked = find(spec, [], "./runs")
    fill(asked)
    name = next(n for n in asked.cache.list("shards") if n.endswith(".bin"))
    asked.cache.write_bytes(f"shards/{name}", b"")
    code, told, err = verified(capsys, spec)
    assert code == 3 and told["kinds"] is None and "running" not in err
    assert f"stillhouse cache repair {asked.cache.url}" in err


def test_a_teacher_too_large_for_this_machine_is_refused_in_a_line(
    world: tuple[Path, Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = write_spec(world, tmp_path, cache=METHODS["topk"], teacher={"dtype": "bfloat16"})
    fill(find(spec, [], "./runs"))
    size = 2 * load_plain(world[1]).num_parameters()
    for free, code in ((size, 2), (2 * size, 0)):
        monkeypatch.setattr(
            "trainer.verify.faithfulness._free", lambda device, free=free: float(free)
        )
        capsys.readouterr()
        assert main(["cache", "verify", spec, "--json"]) == code
        out, err = capsys.readouterr()
        if code:
            assert "of weights do not fit this machine" in err
        else:  # float32 takes twice as much, and is left out
            figures = json.loads(out)["kinds"][0]["figures"]
            assert figures["record"]["dtype_noise"] is None


def test_a_cache_without_a_sequence_of_the_corpus_is_no_proof(
    world: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(world, tmp_path, cache=METHODS["topk"])
    asked = find(spec, [], "./runs")
    fill(asked)
    longer = "data.sequence_length=16"  # other sequences, the same cache
    assert find(spec, [longer], "./runs").cache == asked.cache
    capsys.readouterr()
    assert main(["cache", "verify", spec, longer]) == 2
    assert "no such corpus; prepare it with: stillhouse run" in capsys.readouterr().err
    other = find(spec, [longer], "./runs")
    assert other.spec is not None and other.spec.data is not None and other.made_of is not None
    tokenizer = load_tokenizer(other.made_of.tokenizer_folder)  # type: ignore[arg-type]
    prepare(other.spec.data, tokenizer, other.corpus, identity=other.made_of.corpus)
    assert main(["cache", "verify", spec, longer]) == 2
    assert "no sequence of this spec's corpus is in it" in capsys.readouterr().err
