"""Bytes of a logit cache: against the codec's measured rates, and against a captured cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jobs.forecast.storage import cache_bytes, place_bits
from tests.bench.figures import results_by_kind
from trainer.spec.sections import CacheSpec

MEASURED = results_by_kind("cache")["avx512_bf16"]  # bytes do not depend on the processor
WAYS: dict[str, dict[str, Any]] = {
    "topk_50": {"method": "topk", "k": 50},
    "topk_50_ragged": {"method": "topk", "k": 50, "keep": 0.5},
    "topk_128": {"method": "topk", "k": 128},
    "topk_128_ragged": {"method": "topk", "k": 128, "keep": 0.86, "step": 0.0225},
    "sample_50": {"method": "sample", "draws": 50},
}


@pytest.mark.parametrize("remap, key", [("none", ""), ("frequency", "_ordered")])
@pytest.mark.parametrize("way", WAYS)
def test_rates_are_those_that_the_bench_measured(way, remap, key) -> None:
    found = cache_bytes(CacheSpec(**WAYS[way], remap=remap), 151936, 2048)
    assert found.train == pytest.approx(MEASURED[f"bytes_per_token{key}"][way], rel=0.10)
    assert found.ids == pytest.approx(MEASURED["ids_per_token"][way], rel=0.05)


def test_a_small_vocabulary_costs_fewer_bits() -> None:
    # Of the demo's teacher, as docs/cache.md has them.
    for k, measured in ((50, 50.8), (128, 117.3)):
        assert cache_bytes(CacheSpec(method="topk", k=k), 2048, 256).train == pytest.approx(
            measured, rel=0.10
        )


@pytest.mark.parametrize(
    "way", [{"method": "topk", "k": 24}, {"method": "topk", "k": 96}, {"draws": 16}]
)
def test_a_captured_cache_takes_what_was_foretold(way, tmp_path) -> None:
    """Records of sizes that no rate was taken from, in files as a capture writes them."""
    from cluster.storage import open_store
    from trainer.logits.codebook_fit import fit_codebook
    from trainer.logits.codec import encode
    from trainer.logits.records import coding_of
    from trainer.logits.store import open_cache, publish_codebook, write_shard

    vocab, length, sequences = 32000, 256, 6
    spec = CacheSpec(**way, remap="none")
    coding = coding_of(spec, vocab, "train")
    draw = np.random.default_rng(3)
    items = [records(coding, length, draw) for _ in range(sequences)]
    cache = open_cache(open_store(tmp_path), {"of": "a test"})
    codebook = publish_codebook(cache, "train", fit_codebook(coding, items))
    keys = [bytes([number] * 16) for number in range(sequences)]
    write_shard(cache, "train", keys, [encode(item, codebook) for item in items])
    stored = sum(path.stat().st_size for path in tmp_path.rglob("shards/*"))
    foretold = cache_bytes(spec, vocab, length).train
    assert foretold == pytest.approx(stored / (sequences * length), rel=0.10)


def records(coding: Any, length: int, draw: np.random.Generator) -> Any:
    """What a capture keeps of a sequence of positions like a language model's, ids in any order
    (the formula of tests/bench/synthetic.py)."""
    from trainer.logits.records import Draws, Records

    u, v = draw.random((2, length, 1))
    ranks = np.arange(1, coding.vocab + 1)
    logits = -(1.15 + 2.6 * u**1.3) * np.log(ranks + np.exp(4 * v - 3))
    logits += 0.6 * draw.standard_normal(logits.shape)
    logits = -np.sort(-logits, axis=1)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    some = np.stack(
        [draw.choice(coding.vocab, 1024, replace=False) for _ in range(length)]
    )  # which ids have the first ranks
    if coding.method == "sample":
        p = np.exp(log_p)
        drawn = [draw.choice(coding.vocab, coding.k, p=row / row.sum()) for row in p]
        found = np.take_along_axis(some, np.minimum(np.stack(drawn), 1023), axis=1)
        return Draws(np.sort(found, axis=1).astype(np.int32))
    tail = np.log(np.exp(log_p[:, coding.k :]).sum(axis=1, keepdims=True))
    kept = log_p[:, : coding.k].astype(np.float32)
    return Records(some[:, : coding.k].astype(np.int64), kept, tail.astype(np.float32))


def test_the_place_of_ids_is_counted_by_combinations() -> None:
    assert place_bits(8, 8) == 0.0
    assert 2 * place_bits(10, 2) == pytest.approx(np.log2(45))


def test_what_makes_a_cache_larger() -> None:
    def rate(**spec: Any) -> float:
        return cache_bytes(CacheSpec(**spec), 32000, 1024).train

    assert rate(draws=20) < rate(draws=50) < rate(draws=200)
    topk: dict[str, Any] = {"method": "topk", "k": 32}
    assert rate(**topk, temperatures=[1.0, 2.0]) == pytest.approx(rate(**topk) + 2)
    assert rate(**topk, keep=1.0) < rate(**topk)
