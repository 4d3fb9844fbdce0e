"""The demo teacher's exact distributions, and what the demo's own cache and training had."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml

from cluster.storage import Store, open_store, read_events
from tests.bench.synthetic import Positions
from trainer.corpus.corpus import Corpus, open_corpus
from trainer.logits.reader import CacheReader
from trainer.losses.fused_linear import head_of
from trainer.models.head import last_hidden
from trainer.models.load import load_model
from trainer.stage_inputs import CACHES, CORPORA
from trainer.worker import torch_dtype

CHUNK = 1024  # tokens whose float64 softmax is held at once


def finished(storage: Store, stage: str) -> dict[str, Any]:
    """The demo's record of a finished stage. Raises FileNotFoundError if there is none."""
    state = storage.sub("demo", "state")
    names = [name for name in state.list() if name.startswith(f"{stage}-")]
    if not names:
        raise FileNotFoundError(f"{state.url} has no finished {stage}")
    return dict(state.read_json(names[-1]))


def corpus_of(storage: Store) -> Corpus:
    """The corpus that the demo distils on."""
    return open_corpus(storage.sub(CORPORA, finished(storage, "prepare")["outputs"]["corpus"]))


def teacher_of(storage: Store) -> tuple[Any, dict[str, Any]]:
    """The demo's teacher, ready for forward passes in its dtype, and the demo's spec."""
    spec = yaml.safe_load(storage.read_text("demo/spec.yaml"))
    folder = storage.local("demo-teacher/student")
    if folder is None:
        raise ValueError(f"{storage.url} is not a local folder; the bench needs a local demo")
    return load_model(folder, torch_dtype(spec["teacher"]["dtype"])).eval(), spec


def positions(storage: Store, count: int, k: int, draws: int, seed: int = 0) -> Positions:
    """At least `count` positions of the demo's training sequences, evenly over the corpus."""
    corpus = corpus_of(storage)
    model, _ = teacher_of(storage)
    part, vocab = corpus.part("train"), int(corpus.manifest["vocab_size"])
    sequences = -(-count // int(corpus.manifest["sequence_length"]))
    numbers = np.linspace(0, len(part) - 1, min(sequences, len(part))).astype(np.int64)
    rng = np.random.default_rng(seed)
    columns: list[tuple[Any, ...]] = []
    for start in range(0, len(numbers), 8):
        batch = part.batch(numbers[start : start + 8])
        with torch.inference_mode():
            hidden = last_hidden(
                model, torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
            )
            head = head_of(model, vocab)
            for at in range(0, len(hidden), CHUNK):
                logits = head.logits(hidden[at : at + CHUNK])[:, :vocab].double()
                columns.append(_exact(torch.log_softmax(logits, dim=-1), k, draws, rng))
    return Positions(*(np.concatenate(column) for column in zip(*columns, strict=True)), vocab)


def _exact(log_p: torch.Tensor, k: int, draws: int, rng: np.random.Generator) -> tuple[Any, ...]:
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=-1)
    kept, ids = log_p.topk(k, dim=-1)
    tail = torch.logsumexp(log_p.scatter(1, ids, float("-inf")), dim=-1)
    upto = p.cumsum(dim=-1)
    uniforms = torch.from_numpy(rng.random((len(p), draws))) * upto[:, -1:]
    drawn = torch.searchsorted(upto, uniforms, right=True).clamp_max(p.shape[1] - 1)
    return (
        ids.int().numpy(),
        kept.numpy(),
        tail.numpy(),
        entropy.numpy(),
        drawn.int().sort(dim=-1).values.numpy(),
    )


def own_cache(storage: Store) -> dict[str, float]:
    """Stored bytes per token of the demo's cache, by kind."""
    corpus = corpus_of(storage)
    cache = storage.sub(CACHES, finished(storage, "capture")["outputs"]["cache"])
    length = int(corpus.manifest["sequence_length"])
    found = {}
    for kind in ("train", "eval"):
        reader = CacheReader(cache, kind)
        if len(reader):
            found[kind] = reader.bytes / (len(reader) * length)
        reader.close()
    return found


def loader_wait(storage: Store) -> dict[str, float]:
    """Milliseconds that the demo's training waited for its loader per step: mean of all steps, the
    first step's own, and the mean of the others."""
    waits = {
        event["step"]: event["loader_wait_ms"]
        for event in read_events(storage.sub("demo"))
        if event["event"] == "step" and event["stage"] == "distill"
    }
    if len(waits) < 2:
        raise FileNotFoundError(f"{storage.url}/demo has no training steps")
    first = min(waits)
    rest = [wait for step, wait in waits.items() if step != first]
    return {"mean": fmean(waits.values()), "first": waits[first], "mean_of_others": fmean(rest)}


def open_runs(folder: Path) -> Store:
    """The storage of the demo's runs."""
    return open_store(str(folder))
