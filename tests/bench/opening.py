"""Opening a cache of very many sequences, in a process of its own: seconds, and memory for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cluster.storage import open_store
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.index import Index, pack, shard_name
from trainer.logits.records import Coding, Draws
from trainer.logits.store import load_codebook, open_cache, publish_codebook

OPENS = """
import sys, time
import psutil
from cluster.storage import open_store
from trainer.logits.reader import CacheReader
cache = open_store(sys.argv[1])
CacheReader(open_store(sys.argv[2]), "train")  # imports and threads
own = psutil.Process()
before, began = own.memory_info().rss, time.perf_counter()
reader = CacheReader(cache, "train")
seconds = time.perf_counter() - began
lines = open("/proc/self/status").read().splitlines()  # getrusage would tell the parent's peak
(peak,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(len(reader), seconds, peak - before)
"""


class Opened(NamedTuple):
    """sequences: that the reader found. extra_bytes: peak memory beyond that of its imports."""

    sequences: int
    seconds: float
    extra_bytes: int


def measure(folder: Path, shards: int = 500, each: int = 2000) -> Opened:
    """Opens a cache of so many shards of `each` sequences, made below `folder`: real indexes, and
    records of one byte that nobody reads."""
    root = open_store(folder)
    cache, empty = (open_cache(root, {"cache": name}) for name in ("large", "empty"))
    coding = Coding("sample", vocab=16, k=2, temperatures=())
    codebook = fit_codebook(coding, [Draws(np.zeros((4, 2), np.int32))])
    publish_codebook(cache, "train", codebook)
    found = load_codebook(cache, "train")
    assert found is not None
    draw = np.random.default_rng(0)
    place = Path(cache.url) / "shards"
    place.mkdir(exist_ok=True)
    for _ in range(shards):
        keys = draw.integers(0, 256, (each, 16), np.uint8)
        sums = draw.integers(0, 1 << 63, each).astype(np.uint64)
        ones = np.ones(each, np.uint32)
        packed = pack(Index("train", cache.name, found[0], each, b"\0" * 16, keys, ones, sums))
        path = place / shard_name("train", packed)
        path.with_suffix(".idx").write_bytes(packed)
        path.with_suffix(".bin").write_bytes(b"\0" * each)
    result = subprocess.run(
        [sys.executable, "-c", OPENS, cache.url, empty.url],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    sequences, seconds, extra = result.stdout.split()
    return Opened(int(sequences), float(seconds), int(extra))
