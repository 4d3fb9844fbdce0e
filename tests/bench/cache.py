"""What the logit cache costs and loses: bytes, errors, speeds. Minutes on two cores.

    make demo && make bench-cache

Prints tables, writes tests/bench/results/cache/KIND.json, the tables and the curves of
docs/cache.md, and ends with exit code 1 if an aim is missed. Parts of it, the other figures staying
as they are in the file, where `made_by` tells of each part when and on what it was measured:

    .venv/bin/python -m tests.bench.cache --only sizes,speed
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tests.bench import docs, opening, real
from tests.bench.curve import curve
from tests.bench.figures import machine, read_result, result_file, write_result
from tests.bench.measured import (
    FIT,
    LENGTH,
    Figures,
    byte_planes,
    lossless,
    records_of,
    split,
    through_cache,
)
from tests.bench.synthetic import Ids, Positions, positions
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import decode_many, encode
from trainer.logits.records import Coding, coding_of
from trainer.spec.sections import CacheSpec

HERE = Path(__file__).parent
COMMAND = "make demo && make bench-cache"
DRAWS = 50
LARGEST_K = 256

# The settings measured, as a spec's `cache` says them; "auto" is the step that the spec resolves.
SETTINGS: dict[str, CacheSpec] = {
    "topk_50": CacheSpec(method="topk", k=50),
    "topk_50_ragged": CacheSpec(method="topk", k=50, keep=0.5),
    "topk_128": CacheSpec(method="topk", k=128),
    "topk_128_ragged": CacheSpec(method="topk", k=128, keep=0.86, step=0.0225),
    "sample_50": CacheSpec(method="sample", draws=DRAWS),
}

# Bytes per token at this vocabulary that others publish or that follow from their formats.
PEERS = {
    "DistillKit, k=50 (budget)": 127,
    "DistillKit, k=128 (recommended)": 344,
    "Megatron, k=64": 320,
    "Megatron, k=128": 640,
    "random-sampling KD, 50 draws": 36,
}

# (key, at most or at least, bound)
AIMS: list[tuple[str, str, float]] = [
    ("bytes_per_token.topk_50", "<=", 109),
    ("bytes_per_token_ordered.topk_50", "<=", 83),
    ("gkl.topk_50", "<=", 0.002),
    ("bytes_per_token.topk_50_ragged", "<=", 97),
    ("bytes_per_token.topk_128", "<=", 250),
    ("gkl.topk_128", "<=", 0.0025),
    ("bytes_topk_128_ragged", "<=", 115),
    ("kl_full_saved_percent", ">=", 25),
    ("bytes_per_token.sample_50", "<=", 30.5),
    ("bytes_per_token_ordered.sample_50", "<=", 23.5),
    ("encode_tokens_per_s", ">=", 500_000),
    ("decode_tokens_per_s", ">=", 2_000_000),
    ("capture_over_forward", ">=", 0.85),
    ("loader_wait_ms", "<=", 1),
    ("open_million_s", "<=", 2),
    ("open_million_mb", "<=", 200),
]


class Bench:
    """Positions are made once, and shared by the parts."""

    def __init__(self, sequences: int, runs: Path, images: Path, grid: bool) -> None:
        self.count = (FIT + sequences) * LENGTH
        self.runs, self.images, self.grid = runs, images, grid
        self._made: dict[str, Positions] = {}

    def positions(self, ids: Ids = "uniform") -> Positions:
        if ids not in self._made:
            self._made[ids] = positions(self.count, ids, LARGEST_K, DRAWS)
        return self._made[ids]

    def sizes(self) -> dict[str, Any]:
        """Bytes and errors on the synthetic distributions, ids numbered in both ways."""
        print("peers, bytes per token: " + "; ".join(f"{n} {b}" for n, b in PEERS.items()))
        uniform = self.positions("uniform")
        tables = {ids: _table(f"{ids} ids", self.positions(ids)) for ids in get_args(Ids)}
        rest = uniform.rows(FIT * LENGTH, len(uniform.ids))
        exact = {f"lossless_{k}": round(lossless(rest, k), 4) for k in (12, 50, 128)}
        print("KL full of the exact top-k: " + ", ".join(f"{n} {v}" for n, v in exact.items()))
        figures = tables["uniform"]
        ragged = figures["topk_128_ragged"]
        assert ragged.kl_full is not None
        return {
            "kl_full_saved_percent": round(100 * (1 - ragged.kl_full / exact["lossless_50"]), 1),
            "bytes_topk_128_ragged": round(ragged.bytes, 2),
            "positions": len(rest.ids),
            "entropy_nats": round(float(rest.entropy.mean()), 4),
            "ids_per_token": {name: round(f.ids, 2) for name, f in figures.items()},
            "bytes_per_token": {name: round(f.bytes, 2) for name, f in figures.items()},
            "bytes_per_token_ordered": {
                name: round(f.bytes, 2) for name, f in tables["ordered"].items()
            },
            "codebook_bytes": {name: f.codebook for name, f in figures.items() if f.codebook},
            "gkl": {n: round(f.gkl, 5) for n, f in figures.items() if f.gkl is not None},
            "kl_full": exact
            | {n: round(f.kl_full, 4) for n, f in figures.items() if f.kl_full is not None},
            "peers_bytes_per_token": PEERS,
        }

    def curve(self) -> dict[str, Any]:
        """Bytes against full KL over a grid of settings, ours and the byte planes."""
        found = {ids: self.positions(ids) for ids in get_args(Ids)}
        return curve(found, self.images / "cache-bytes.svg", self.grid)

    def speed(self) -> dict[str, Any]:
        """Encoding given the top-k, and decoding to arrays ready for the loss, k = 50."""
        found: dict[str, Any] = {}
        for name in ("topk_50", "sample_50"):
            coding = coding_of(SETTINGS[name], self.positions().vocab, "train")
            speeds = _speeds(self.positions(), coding)
            found[name] = {key: round(value) for key, value in speeds.items()}
            print(f"{name:16}" + "".join(f"{k} {v:,.0f} tokens/s  " for k, v in speeds.items()))
        return {
            "encode_tokens_per_s": found["topk_50"]["encode_2_threads"],
            "decode_tokens_per_s": found["topk_50"]["decode_2_threads"],
            "speeds": found,
        }

    def opening(self) -> dict[str, Any]:
        """Seconds and memory to open a cache of 1,000,000 sequences in 500 shards."""
        with tempfile.TemporaryDirectory() as folder:
            runs = [opening.measure(Path(folder) / str(run)) for run in range(3)]
        seconds = statistics.median(run.seconds for run in runs)
        extra = max(run.extra_bytes for run in runs) / 1e6
        print(f"opening 1,000,000 sequences: {seconds:.2f} s, {extra:.0f} MB")
        return {"open_million_s": round(seconds, 3), "open_million_mb": round(extra, 1)}

    def demo(self) -> dict[str, Any]:
        """The same table on the demo teacher's distributions, and the demo's loader."""
        storage = real.open_runs(self.runs)
        corpus = real.corpus_of(storage)
        found = real.positions(storage, self.count, LARGEST_K, DRAWS)
        counts = np.zeros(found.vocab, np.int64)
        part = corpus.part("train")
        for start in range(0, len(part), 64):
            batch = part.batch(np.arange(start, min(start + 64, len(part))))
            counts += np.bincount(batch.input_ids.reshape(-1), minlength=found.vocab)
        length = int(corpus.manifest["sequence_length"])
        table = _table(f"the demo's teacher, vocabulary {found.vocab}", found, length, counts)
        own = real.own_cache(storage)
        wait = real.loader_wait(storage)
        print(f"the demo's own cache, bytes per token: {own}")
        print(f"loader wait per step, ms: {wait}")
        return {
            "demo": {
                "settings": {name: figures.plain for name, figures in table.items()},
                "lossless_50": round(lossless(found, 50), 4),
                "entropy_nats": round(float(found.entropy.mean()), 4),
                "cache_bytes_per_token": own,
                "loader_wait_ms": wait,
            },
            "loader_wait_ms": round(wait["mean"], 4),
        }

    def capture(self) -> dict[str, Any]:
        """Capture's tokens/s over those of the bare teacher's forward passes."""
        from tests.bench.capture_speed import measure

        found = measure()
        print("capture: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        both = (found["capture_over_forward_topk_50"], found["capture_over_forward_sample_50"])
        return {"capture_over_forward": round(min(both), 4), "capture": found}


PARTS = ("sizes", "curve", "speed", "opening", "demo", "capture")


def _table(
    title: str, found: Positions, length: int = LENGTH, counts: Any = None
) -> dict[str, Figures]:
    """Every setting through a cache on disk, and byte planes beside them; printed."""
    print(f"\n{title}: {len(found.ids):,} positions, mean entropy {found.entropy.mean():.2f} nats")
    print(f"{'':26}{'bytes/token':>12}{'ids/token':>11}{'gKL kept':>10}{'KL full':>9}")
    rows: dict[str, Figures] = {}
    fit = FIT * LENGTH // length
    for name, spec in SETTINGS.items():
        coding = coding_of(spec, found.vocab, "train")
        rows[name] = through_cache(found, coding, length, fit, counts)
        _print(name, rows[name])
        if coding.method == "topk":
            rest = found.rows(fit * length, len(found.ids))
            plain = byte_planes(rest, coding.k, coding.step, coding.keep, length)
            rows[f"{name}_byte_planes"] = plain
            _print("  byte planes + zstd-3", plain)
    return rows


def _print(name: str, figures: Figures) -> None:
    errors = "" if figures.gkl is None else f"{figures.gkl:>10.5f}{figures.kl_full or 0:>9.4f}"
    print(f"{name:26}{figures.bytes:>12.2f}{figures.ids:>11.2f}{errors}", flush=True)


def _speeds(
    found: Positions, coding: Coding, batch: int = 4, seconds: float = 4.0
) -> dict[str, float]:
    """Tokens/s of encoding sequence by sequence and of decoding `batch` sequences at a time, the
    median of repeats for about `seconds`, on one and on two threads."""
    parts = [records_of(part, coding) for part in split(found)]
    codebook = fit_codebook(coding, parts[:FIT])
    parts = parts[FIT:]
    blobs = [encode(part, codebook) for part in parts]
    while len(blobs) < 2 * batch * 2:
        parts, blobs = parts * 2, blobs * 2
    groups = [blobs[i : i + batch] for i in range(0, len(blobs), batch)]
    decode_many(groups[0], codebook)  # what is compiled at the first call is compiled now
    speeds = {}
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:

            def encode_all(pool: ThreadPoolExecutor = pool) -> None:
                list(pool.map(lambda part: encode(part, codebook), parts))

            def decode_all(pool: ThreadPoolExecutor = pool) -> None:
                # As in training, what was decoded is dropped before more is made.
                list(pool.map(lambda group: len(decode_many(group, codebook).ids), groups))

            count = len(blobs) * LENGTH
            for name, work in (("encode", encode_all), ("decode", decode_all)):
                took = _median_seconds(work, seconds)
                plural = "s" if threads > 1 else ""
                speeds[f"{name}_{threads}_thread{plural}"] = count / took
    return speeds


def _median_seconds(work: Callable[[], None], seconds: float) -> float:
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def look_up(result: dict[str, Any], key: str) -> float | None:
    """The figure at a dotted key, None where it was not measured."""
    value: Any = result
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check(result: dict[str, Any]) -> bool:
    """Prints every aim; whether those that were measured are reached."""
    aims = {}
    for key, relation, bound in AIMS:
        value = look_up(result, key)
        name = f"{key} {relation} {bound:,g}"
        if value is None:
            print(f"not yet  {name}")
            continue
        aims[name] = value <= bound if relation == "<=" else value >= bound
        print(f"{'reached' if aims[name] else 'MISSED '}  {name}: {value:,g}")
    result["aims"] = aims
    return all(aims.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--sequences", type=int, default=16, help="of 2,048 positions, measured")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="storage with the demo")
    parser.add_argument("--out", type=Path, default=result_file("cache"))
    parser.add_argument("--images", type=Path, default=HERE.parents[1] / "docs" / "img")
    parser.add_argument("--coarse", action="store_true", help="a curve of few points")
    given = parser.parse_args()
    asked = given.only.split(",")
    if wrong := sorted(set(asked) - set(PARTS)):
        parser.error(f"--only: no part {wrong[0]!r}; may be {', '.join(PARTS)}")
    bench = Bench(given.sequences, given.runs, given.images, not given.coarse)
    result = read_result(given.out)
    names = ("torch", "transformers", "numpy", "numba", "pyarrow")
    made_by = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
    }
    without_demo = False
    for part in asked:
        began = time.perf_counter()
        try:
            result |= getattr(bench, part)()
            result.setdefault("made_by", {})[part] = made_by
        except FileNotFoundError as error:
            if part != "demo":
                raise
            # The other parts do not need it, and their figures are kept.
            without_demo = True
            print(f"error: {error}; run: make demo", file=sys.stderr)
        print(f"({part}: {time.perf_counter() - began:.0f} s)\n", flush=True)
    result["command"] = COMMAND
    result |= made_by
    reached = check(result)
    write_result(given.out, result)
    if given.out == result_file("cache"):
        docs.write()
    if without_demo:
        return 2
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
