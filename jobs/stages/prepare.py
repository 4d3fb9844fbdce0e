"""prepare: sources become a corpus; one Ray task per source shard.

With distill.mode: responses the sources hold prompts; they are answered first, by the teacher on
the workers of capture, or from here by a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cluster.spec import CellResources, WorkerResources
from jobs.errors import Interrupted, SpecErrors
from jobs.run.context import Context
from jobs.run.inputs import Outputs, ResolvedJob, StageInputs
from jobs.spec.job import JobSpec
from trainer.checks import world_faults
from trainer.corpus.identity import TRAIN_SEQUENCES, of_held_out

if TYPE_CHECKING:
    from trainer.responses.store import AnswerStore


def is_asked(spec: JobSpec) -> bool:
    """Whatever trains or sweeps reads a corpus."""
    return spec.data is not None


def inputs(job: ResolvedJob, outputs: Outputs) -> StageInputs:
    """The corpus's identity; sequences of train may grow."""
    identity = job.names.corpus
    asked = identity.get(TRAIN_SEQUENCES)
    at_least = {} if asked is None else {TRAIN_SEQUENCES: asked}
    return StageInputs(of_held_out(identity), at_least=at_least)


def faults(job: ResolvedJob) -> list[str]:
    """Sources, answers and tokenizers that are not there, or do not do."""
    return world_faults(job.spec, job.names, ["prepare"])


def resources(spec: JobSpec) -> dict[str, WorkerResources | CellResources]:
    """Answers of the teacher are generated on the workers of capture; the rest takes tasks."""
    answers = spec.responses is not None and spec.responses.origin == "teacher"
    return {"capture": spec.resources.capture} if answers else {}


def run(context: Context) -> dict[str, Any]:
    """Makes the corpus unless it is there; returns its name and sizes.

    A corpus of answers is named by them as well, so that other answers to the same prompts change
    what the stages after this one are made from, and no corpus that another run has read.
    """
    from cluster.storage.keys import fingerprint
    from trainer.corpus.corpus import is_complete, open_corpus
    from trainer.corpus.prepare import prepare
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.responses.make import answered, on_answers
    from trainer.stage_inputs import corpus_of

    spec, identities = context.spec, context.job.names
    assert spec.data is not None
    identity, data, told = identities.corpus, spec.data, dict[str, Any]()
    each: Any = _Tasks(context)
    if spec.responses is not None:
        try:
            answers = _answers(context)
        except ValueError as error:
            raise SpecErrors([str(error)]) from error
        identity, data = corpus_of(identities, answers), answered(data, answers)
        each = on_answers(each, answers)
        told = {"answers": fingerprint(identities.responses)}
    name = fingerprint(identity)
    store = context.shared.sub("_corpora", name)
    if spec.data.corpus is not None and context.forced:
        raise SpecErrors(
            ["--redo prepare: the spec names its corpus (data.corpus), which is not made anew"]
        )
    if context.forced or not is_complete(store):
        folder = identities.tokenizer_folder
        tokenizer = spec.tokenizer if folder is None else load_tokenizer(folder)
        try:
            prepare(data, tokenizer, store, each, identity=identity)
        except ValueError as error:
            raise SpecErrors([str(error)]) from error
    before = context.run.record("prepare")
    if before is not None and before.outputs.get("corpus") != name:
        context.run.forget("distill")  # else a run that is stopped now would refuse to go on
    corpus = open_corpus(store)
    sizes = {part: len(corpus.part(part)) for part in ("train", "select", "report")}
    return {
        "corpus": name,
        "held_out": fingerprint(of_held_out(identity)),
        "sequences": sizes,
        "vocab_size": corpus.manifest["vocab_size"],
        **told,
    }


def _answers(context: Context) -> AnswerStore:
    """The complete answers of this spec; made, or added to, first if they are not there.

    When the stage is forced, those that failed before are asked for again.
    """
    from jobs.stages.worker_group import run_ranks
    from trainer.responses.make import collect, finish, make_job, open_answers
    from trainer.worker import Hooks, Stopped

    spec, identity = context.spec, context.job.names.responses
    assert spec.responses is not None
    answers = open_answers(context.shared, identity)
    there = answers.manifest()
    if there is not None and not (context.forced and there["counts"].get("failed")):
        return answers
    began = time.time()
    if spec.responses.origin == "teacher":
        asked = spec.resources.capture
        job = make_job(
            spec, answers, batch_tokens=asked.batch_tokens, publish_seconds=asked.shard_seconds
        )
        results, _ = run_ranks(context, "prepare", [job], asked)
        facts = results[0]
    else:
        hooks = Hooks(
            emit=context.emit,
            stop_requested=context.stop.is_set,
            fence=context.attempt.fence,
            attempt=context.attempt.number,
        )
        try:
            facts = collect(spec, answers, hooks)
        except Stopped as stopped:
            raise Interrupted(str(stopped)) from None
    manifest = finish(spec, answers, identity, facts, began)
    counts = manifest["counts"]
    context.emit("answers", stage="prepare", counts=counts, failed=manifest.get("failed", []))
    if counts.get("cut") or counts.get("failed"):
        context.reporter.say(
            f"prepare: {counts['answers']} answers, {counts.get('cut', 0)} cut at "
            f"responses.max_new_tokens, {counts.get('failed', 0)} failed, "
            f"{counts.get('left_out', 0)} left out ({answers.store.url})"
        )
    return answers


class _Tasks:
    """Maps a function over calls as Ray tasks; results in the order of the calls."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __call__(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        from cluster.fanout import Cancelled, Failure, fan_out
        from jobs.run.waiting import tasks_wait

        context = self.context
        results: dict[str, Any] = {}

        def notify(*_: Any) -> None:
            unit = f"shards ({function.__name__})"
            done, total = len(results), len(calls)
            context.emit("progress", stage="prepare", done=done, total=total, unit=unit)

        try:
            for key, result in fan_out(
                function,
                {str(index): call for index, call in enumerate(calls)},
                cpus=1,
                retries=context.spec.resources.max_failures,
                should_stop=context.stop.is_set,
                on_start=notify,
                on_wait=tasks_wait(context, "prepare"),
            ):
                if isinstance(result, Failure):
                    print(result.detail)  # to the log
                    if result.error.startswith("ValueError: "):
                        raise ValueError(result.error.removeprefix("ValueError: "))
                    raise RuntimeError(result.error)
                results[key] = result
                notify()
        except Cancelled:
            raise Interrupted("prepare stopped") from None
        return [results[str(index)] for index in range(len(calls))]


def reset(context: Context) -> None:
    """Nothing: a corpus is made anew beside the one that is there."""


def remark(outputs: dict[str, Any]) -> str:
    """Sequences by part."""
    counts = ", ".join(f"{count} {part}" for part, count in outputs["sequences"].items())
    return f"sequences: {counts}"
