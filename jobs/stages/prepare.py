"""prepare: sources become a corpus; one Ray task per source shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.fanout import Cancelled, Failure, fan_out
from jobs.errors import Interrupted, SpecErrors
from jobs.stages.base import Context


def run(context: Context) -> dict[str, Any]:
    """Makes the corpus unless it is there; returns its name and sizes."""
    from trainer.corpus.corpus import is_complete, open_corpus
    from trainer.corpus.prepare import prepare
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.fingerprint import fingerprint

    spec, identities = context.spec, context.inputs.identities
    assert spec.data is not None
    name = fingerprint(identities.corpus)
    store = context.shared.sub("_corpora", name)
    if context.forced or not is_complete(store):
        folder = identities.tokenizer_folder
        tokenizer = spec.tokenizer if folder is None else load_tokenizer(folder)
        try:
            prepare(spec.data, tokenizer, store, _Tasks(context), identity=identities.corpus)
        except ValueError as error:
            raise SpecErrors([str(error)]) from error
    corpus = open_corpus(store)
    sizes = {part: len(corpus.part(part)) for part in ("train", "select", "report")}
    return {"corpus": name, "sequences": sizes, "vocab_size": corpus.manifest["vocab_size"]}


class _Tasks:
    """Maps a function over calls as Ray tasks; results in the order of the calls."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __call__(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        context = self.context
        results: dict[str, Any] = {}
        try:
            for key, result in fan_out(
                function,
                {str(index): call for index, call in enumerate(calls)},
                cpus=1,
                retries=context.spec.resources.max_failures,
                should_stop=context.stop.is_set,
            ):
                if isinstance(result, Failure):
                    if result.error.startswith("ValueError: "):
                        raise ValueError(result.error.removeprefix("ValueError: "))
                    raise RuntimeError(result.error)
                results[key] = result
                context.emit(
                    "progress",
                    stage="prepare",
                    done=len(results),
                    total=len(calls),
                    unit=f"shards ({function.__name__})",
                )
        except Cancelled:
            raise Interrupted("prepare stopped") from None
        return [results[str(index)] for index in range(len(calls))]
