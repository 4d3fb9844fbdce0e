"""Answers made and found: what a launcher calls before it makes the corpus.

answers = open_answers(root, identity)                # identity: `Identities.responses`
if answers.manifest() is None:
    task = make_job(spec, answers, ...)                # from: teacher
    facts = run_task(task, worker)                     # ... on a group of ranks
    facts = collect(spec, answers, hooks)             # from a file or a server, in one process
    finish(spec, answers, identity, facts, began)
data = answered(spec.data, answers)
identity = corpus_of(names, answers)                  # other answers are another corpus
prepare(data, tokenizer, store, on_answers(each, answers), identity=identity)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.storage import Store
from cluster.storage.keys import fingerprint
from trainer.resolve_auto import BATCH_TOKENS
from trainer.responses.store import FILES, AnswerStore
from trainer.spec.responses import AnswersFile
from trainer.spec.sections import DataSpec, SourceSpec

if TYPE_CHECKING:
    from trainer.responses.job import Answers
    from trainer.spec.rules import Sections
    from trainer.worker import Hooks


RESPONSES = "_responses"
Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]


def open_answers(root: Store, identity: Mapping[str, Any]) -> AnswerStore:
    """The folder of the answers of an identity, below the storage's root."""
    return AnswerStore(root.sub(RESPONSES, fingerprint(dict(identity))))


def make_job(
    spec: Sections,
    answers: AnswerStore,
    *,
    batch_tokens: int | Literal["auto"],
    publish_seconds: float,
) -> Answers:
    """The `Answers` of a spec with responses.from: teacher, to be run on a group of ranks.

    batch_tokens: as in `resources.capture`. Decoding needs many rows at once on a CPU too.
    """
    from trainer.responses.job import Answers

    assert spec.teacher is not None and spec.responses is not None and spec.data is not None
    return Answers(
        teacher=spec.teacher,
        responses=spec.responses,
        data=spec.data,
        batch_tokens=BATCH_TOKENS if batch_tokens == "auto" else batch_tokens,
        publish_seconds=publish_seconds,
        store=answers.store,
    )


def collect(spec: Sections, answers: AnswerStore, hooks: Hooks) -> dict[str, Any]:
    """Answers from a file or a server, on the driver; facts for `finish`.

    Raises ValueError, one line, and `trainer.worker.Stopped`.
    """
    responses = spec.responses
    assert responses is not None and spec.data is not None
    if isinstance(responses.origin, AnswersFile):
        from trainer.responses.answers_file import copy_file

        return copy_file(responses.origin, answers)
    from trainer.responses.ask import ask_all

    return ask_all(responses, spec.data, answers, hooks)


def finish(
    spec: Sections,
    answers: AnswerStore,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    began: float,
) -> dict[str, Any]:
    """Completes the answers; returns their manifest. began: Unix seconds of the start.

    Raises ValueError, one line, where a source has no answer to learn from.
    """
    import torch
    import transformers

    assert spec.data is not None
    about = {
        "identity": dict(identity),
        "seconds": time.time() - began,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": "prompt_completion",
        **facts,
    }
    if "files" in about:
        return answers.seal(about)
    return answers.finish(about, len(spec.data.train))


def answered(data: DataSpec, answers: AnswerStore) -> DataSpec:
    """`data` whose sources are the answers, one source for each of `data.train`, with its weight.

    A file of answers is one source of weight 1.
    """
    manifest = answers.manifest()
    assert manifest is not None
    weights = [source.weight for source in data.train] or [1.0]
    pattern = str(answers.store.fetch_folder(FILES) / "answers-{:03d}-*.jsonl")
    train = [
        SourceSpec(source=pattern.format(index), format=manifest["rows"], weight=weight)
        for index, weight in enumerate(weights)
    ]
    return data.model_copy(update={"train": train})


def on_answers(each: Each, answers: AnswerStore) -> Each:
    """`each` for tasks on shards of answers, which bring them to the machine they run on."""
    if answers.store.local() is not None:
        return each  # all machines see the folder

    def brought(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return each(_bring, [(answers.store, function, *call) for call in calls])

    return brought


def _bring(store: Store, function: Callable[..., Any], shard: Any, *rest: Any) -> Any:  # noqa: ANN401
    """`function(shard, ...)` with the shard's file on this machine; a task."""
    path = store.fetch_folder(FILES) / Path(shard.path).name
    return function(replace(shard, path=str(path)), *rest)
