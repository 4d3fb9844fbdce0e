"""Whether a cache's records are what its teacher says: it runs again over some sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.storage.store import format_bytes
from trainer.corpus.corpus import Corpus, Part, next_tokens
from trainer.logits.reader import CacheReader
from trainer.logits.records import Coding, train_kinds
from trainer.logits.store import command, read_codebook
from trainer.losses.fused_linear import Head, chunk_tokens, head_of
from trainer.models.head import check_head, last_hidden
from trainer.models.load import count_parameters, find_model, load_model, meta_model, read_config
from trainer.teacher.job import Capture, batch_size, wanted
from trainer.teacher.sampling import BLOCK, draw, stream, uniforms
from trainer.verify.errors import (
    Faithfulness,
    Tally,
    drawn_errors,
    drawn_figures,
    kept_errors,
    kept_figures,
    scalar_errors,
)
from trainer.worker import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Share of the free memory that the weights may take.
FITS = 0.7
# Longer sequences make plain attention's matrix of all pairs too large.
PLAIN_ATTENTION = 4096


@dataclass(frozen=True)
class Forward:
    """One way of running the teacher: final hidden states on the CPU, [seq, hidden], by sequence
    key, and the head that makes logits of them."""

    head: Head
    hidden: dict[bytes, Tensor] = field(default_factory=dict)

    def logits(self, key: bytes) -> Iterator[tuple[int, Tensor]]:
        """(first position, float32 logits [positions, vocab]) of a sequence, chunk by chunk."""
        states, head = self.hidden[key], self.head
        step = chunk_tokens(head.weight.shape[0])
        for start in range(0, len(states), step):
            rows = states[start : start + step].to(head.weight.device)
            yield start, head.logits(rows)[:, : head.vocab]


@dataclass(frozen=True)
class Reruns:
    """The teacher as it was captured; in another batch shape and order and with plain attention,
    which is as much as other hardware would change; and in float32, where it was captured in
    bfloat16 and float32 fits into memory."""

    captured: Forward
    reshaped: Forward
    float32: Forward | None


def rerun(
    folder: Path,
    dtype: str,
    vocab: int,
    parts: Sequence[tuple[Part, Sequence[int]]],
    batch: Callable[[int, str], int],
    say: Callable[[str], None],
) -> Reruns:
    """Runs the teacher of a model folder over sequences (part, their numbers).

    batch: sequences per forward pass of a capture, of the teacher's parameters and the device.
    Raises ValueError, one line, if the model
    cannot be loaded, or does not fit the memory of this machine.
    """
    parameters = count_parameters(meta_model(read_config(folder)))
    size = parameters * torch_dtype(dtype).itemsize
    device, free = _device(size)
    if size > FITS * free:
        raise ValueError(
            f"teacher.model: {format_bytes(size)} of weights do not fit this machine "
            f"({format_bytes(free)} free); verify where they fit, or give the cache instead of the "
            "spec to verify its files alone"
        )
    say(f"running the teacher over {sum(len(numbers) for _, numbers in parts)} sequences")
    model = _load(folder, dtype, vocab, device)
    sequences = batch(parameters, device.type)
    captured = _forward(model, vocab, parts, sequences)
    if max(part.batch([]).input_ids.shape[1] for part, _ in parts) <= PLAIN_ATTENTION:
        with suppress(ValueError):  # not every model has it
            model.set_attn_implementation("eager")
    turned = [(part, numbers[::-1]) for part, numbers in parts]
    reshaped = _forward(model, vocab, turned, 1 if sequences > 1 else 2)
    del model
    if dtype == "float32" or parameters * 4 > FITS * _free(device):
        return Reruns(captured, reshaped, None)
    say("running the teacher in float32")
    exact = _forward(_load(folder, "float32", vocab, device), vocab, parts, sequences)
    return Reruns(captured, reshaped, exact)


def _load(folder: Path, dtype: str, vocab: int, device: torch.device) -> PreTrainedModel:
    model = load_model(folder, torch_dtype(dtype), device).eval()
    check_head(model, vocab)
    return model


def _forward(
    model: PreTrainedModel, vocab: int, parts: Sequence[tuple[Part, Sequence[int]]], batch: int
) -> Forward:
    head = head_of(model, vocab)
    # A copy: the rest of the model is let go.
    copied = replace(
        head,
        weight=head.weight.detach().clone(),
        bias=None if head.bias is None else head.bias.detach().clone(),
    )
    made = Forward(copied)
    device = head.weight.device
    for part, chosen in parts:
        for asked in _batches(part, chosen, batch):
            # As in a capture, where every forward pass has a full batch; rounding depends on it.
            rows = part.batch(np.resize(asked, batch))
            with torch.inference_mode():
                states = last_hidden(
                    model,
                    torch.from_numpy(rows.input_ids).to(device),
                    torch.from_numpy(rows.position_ids).to(device),
                ).reshape(*rows.input_ids.shape, -1)
            for i in range(len(asked)):
                made.hidden[rows.keys[i].tobytes()] = states[i].cpu()
    return made


def _batches(part: Part, chosen: Sequence[int], batch: int) -> Iterator[NDArray[np.int64]]:
    """Sequences for each forward pass: with and without several documents apart, as in a capture,
    since these have other attention masks."""
    numbers = np.asarray(chosen, dtype=np.int64)
    mixed = part.mixed(numbers)
    for alike in (numbers[mixed], numbers[~mixed]):
        for start in range(0, len(alike), batch):
            yield alike[start : start + batch]


def _device(size: int) -> tuple[torch.device, float]:
    """Where the teacher runs, and the bytes that are free there."""
    if torch.cuda.is_available() and size <= FITS * _free(torch.device("cuda")):
        device = torch.device("cuda")
    else:
        device = torch.device("cpu")
    return device, _free(device)


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available)


Chosen = list[tuple[Part, int]]


def faithfulness(
    job: Capture, corpus: Corpus, sequences: int, say: Callable[[str], None]
) -> list[Faithfulness]:
    """Compares at most `sequences` records of each kind with the teacher, run here and now.

    Kinds of which the cache has no sequence of this corpus are left out. Raises ValueError, one
    line, where the teacher cannot be run here, and CacheDamaged.
    """
    chosen = _choose(job, corpus, sequences)
    parts: dict[int, tuple[Part, set[int]]] = {}
    for pairs in chosen.values():
        for part, number in pairs:
            parts.setdefault(id(part), (part, set()))[1].add(number)
    if not parts:
        return []
    runs = rerun(
        find_model("teacher.model", job.teacher.model, job.teacher.revision),
        job.teacher.dtype,
        int(corpus.manifest["vocab_size"]),
        [(part, sorted(numbers)) for part, numbers in parts.values()],
        partial(batch_size, job),
        say,
    )
    return [_compare(job, kind, pairs, runs) for kind, pairs in chosen.items() if pairs]


def _choose(job: Capture, corpus: Corpus, count: int) -> dict[str, Chosen]:
    """By kind sequences of the corpus that the cache holds, evenly spaced in order of their keys
    (which are hashes); the same ones for all sets of draws, as far as they are there."""
    chosen: dict[str, Chosen] = {}
    for kind, keyed in _keyed(job, corpus).items():
        with CacheReader(job.cache, kind) as reader:
            absent = set(reader.missing(keyed))
        present = sorted(key for key in keyed if key not in absent)
        places = np.unique(np.linspace(0, len(present) - 1, min(count, len(present))).astype(int))
        chosen[kind] = [keyed[present[place]] for place in places]
    return chosen


def _keyed(job: Capture, corpus: Corpus) -> dict[str, dict[bytes, tuple[Part, int]]]:
    keyed: dict[str, dict[bytes, tuple[Part, int]]] = {}
    for kind, part, numbers in wanted(job, corpus):
        of_kind = keyed.setdefault(kind, {})
        of_kind.update({part.keys[i].tobytes(): (part, i) for i in numbers})
    return keyed


def _compare(job: Capture, kind: str, chosen: Chosen, runs: Reruns) -> Faithfulness:
    book = read_codebook(job.cache, kind)
    assert book is not None  # there are records
    coding, tally = book.coding, Tally()
    with CacheReader(job.cache, kind) as reader:
        for part, number in chosen:
            _compare_one(job, kind, coding, tally, reader, part, number, runs)
    figures = drawn_figures(tally) if coding.method == "sample" else kept_figures(tally, coding)
    return Faithfulness(kind, len(chosen), tally.positions, figures)


def _compare_one(
    job: Capture,
    kind: str,
    coding: Coding,
    tally: Tally,
    reader: CacheReader,
    part: Part,
    number: int,
    runs: Reruns,
) -> None:
    batch = part.batch([number])
    key = batch.keys[0].tobytes()
    record = reader.read(key)
    captured = np.ones(batch.input_ids.shape[1], bool)
    if job.cache_spec.positions == "loss":
        captured = batch.loss_mask[0] != 0
    if len(record.ids) != captured.sum():
        raise ValueError(
            f"{job.cache.url}: the record of sequence {key.hex()} has {len(record.ids)} positions, "
            f"and the sequence {captured.sum()}; remove the cache with: {command('rm', job.cache)}"
        )
    labels = torch.from_numpy(next_tokens(batch.input_ids)[0])
    others = {"batch": runs.reshaped, "dtype": runs.float32}
    others_logits = {name: run.logits(key) for name, run in others.items() if run is not None}
    done = 0
    for start, logits in runs.captured.logits(key):
        inside = torch.from_numpy(np.flatnonzero(captured[start : start + len(logits)]))
        # Compared on the CPU: float64 is slow or missing on some devices.
        noisy = {name: next(more)[1].cpu()[inside] for name, more in others_logits.items()}
        logits = logits.cpu()[inside]
        rows = slice(done, done + len(inside))
        done = rows.stop
        if not len(inside):
            continue
        positions = start + inside
        ids = torch.from_numpy(record.ids[rows])
        log_q = torch.from_numpy(record.log_probs[rows])
        if coding.method == "sample":
            redraw = partial(_redraw, job, kind, key, positions, coding.k)
            tally.add(**drawn_errors(ids, log_q, coding.k, logits, noisy, redraw))
            continue
        log_p = torch.log_softmax(logits.double(), dim=1)
        noisy = {name: torch.log_softmax(more.double(), dim=1) for name, more in noisy.items()}
        tails = torch.from_numpy(record.log_tails[rows])
        values = kept_errors(ids, log_q, tails, coding.temperatures, log_p, noisy)
        if coding.method == "exact":
            assert record.entropy is not None and record.true_log_prob is not None
            entropy, true = (
                torch.from_numpy(v[rows]) for v in (record.entropy, record.true_log_prob)
            )
            values |= scalar_errors(entropy, true, labels[positions], log_p, noisy)
        tally.add(**values)


def _redraw(
    job: Capture, kind: str, key: bytes, positions: Tensor, draws: int, logits: Tensor
) -> Tensor:
    """The draws that a capture makes of logits [positions, vocab]: int64 [positions, draws]."""
    number = train_kinds(job.cache_spec).index(kind)
    words = torch.tensor([stream(job.cache_spec.seed, key, number)]).expand(len(logits), 4)
    space = -logits.shape[1] % BLOCK
    padded = torch.nn.functional.pad(logits, (0, space), value=-torch.inf)
    probabilities = torch.softmax(padded, dim=1)
    return draw(probabilities, uniforms(words, positions, draws)).long()
