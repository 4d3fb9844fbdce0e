"""Is the corpus large enough? Asked before a cluster starts; reads only as much as answers it.

What is compared with the need is more than the tokens there will be, so that no corpus is refused
that suffices. The exact answer comes with the prepare stage.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from trainer.corpus.chat_template import chat_faults
from trainer.corpus.sources import WHOLE, Shard, read_documents, resolve_all
from trainer.corpus.splits import TOKEN_BYTES, measure
from trainer.corpus.tokenizer import encode
from trainer.spec.sections import DataSpec, TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_DOCUMENTS = 100  # of each source, to measure tokens per byte
MARGIN = 1.5  # the other documents may be denser than the sample
PADDED = 2.0  # conversations stay whole: two sequences that follow each other hold more than one
UNTRAINED = 0.75  # tokens per byte of a byte-level BPE of 1,024 entries or more, at most


def check_size(data: DataSpec, tokenizer: Any) -> None:  # noqa: ANN401
    """Refuse a corpus that cannot fill select, report and one sequence of train.

    Checks every source on the way, as `sources.resolve`. `tokenizer`: one that is loaded, or the
    TokenizerSpec of one to be trained.

    Raises:
        ValueError: one line; the corpus is too small, or a source is wrong.
    """
    need = (data.select_sequences + data.report_sequences + 1) * data.sequence_length
    shards = resolve_all(data)
    for fault in chat_faults(data, tokenizer):
        raise ValueError(fault)
    seen: set[bytes] = set()
    ratios: dict[int, float] = {}
    # What is kept whole may leave most of the last sequence empty too.
    tokens = float(data.sequence_length * any(shard.format in WHOLE for shard in shards))
    for shard in shards:
        if shard.source not in ratios:
            ratios[shard.source] = tokens_per_byte(shard, tokenizer)
        for document in read_documents(shard):
            digest, size, kept = measure(document, data.min_chars, data.max_chars)
            if not kept or digest in seen:
                continue
            seen.add(digest)
            tokens += size * ratios[shard.source] + 2  # its end, and perhaps a beginning
            if tokens >= need:
                return
    raise too_small(data, f"the corpus has at most about {int(tokens):,}")


def tokens_per_byte(shard: Shard, tokenizer: PreTrainedTokenizerBase) -> float:
    """At most how many tokens a byte of the shard's source becomes, from its first documents."""
    if shard.format == "input_ids":
        return 1 / TOKEN_BYTES
    padded = PADDED if shard.format in WHOLE else 1.0
    if isinstance(tokenizer, TokenizerSpec):
        return padded * (UNTRAINED if tokenizer.train >= 1024 else 1.0)
    first = [
        (row, *measure(row, 1, None)) for row in islice(read_documents(shard), SAMPLE_DOCUMENTS)
    ]
    sample = [row for row, _, _, kept in first if kept]
    size = sum(size for _, _, size, kept in first if kept)
    tokens = sum(map(len, encode(tokenizer, sample, shard.label)))
    return padded * MARGIN * tokens / size if size else padded


def too_small(data: DataSpec, found: str) -> ValueError:
    """The error for a corpus that cannot fill its parts."""
    need = (data.select_sequences + data.report_sequences) * data.sequence_length
    return ValueError(
        f"corpus too small: data.select_sequences ({data.select_sequences}) and "
        f"data.report_sequences ({data.report_sequences}) of data.sequence_length "
        f"({data.sequence_length}) need {need:,} tokens and train needs some too, but {found}; "
        "lower them, or add sources to data.train"
    )
