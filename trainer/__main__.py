"""Capture and training without Ray, under torchrun.

    torchrun --nproc-per-node 2 -m trainer SPEC [key=value ...]

Prepares the corpus (on rank 0), captures the teacher, trains the student and, if wanted, the
control. SPEC is the same YAML file as of `stillhouse run`, and everything is found and left in the
same places, so `stillhouse run SPEC` afterwards goes on from there. The sections `resources`,
`sweep` and `tracking` are for that command alone and are ignored here: the ranks are torchrun's,
and each uses a GPU where torch sees one.

Ctrl-C or SIGTERM stop cleanly, with a checkpoint. Exit codes of a rank: 0 done; 2 the spec is
wrong; 3 failed; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from pydantic import Field, field_validator, model_validator

from cluster.storage import Attempt, EventWriter, Fenced, Store, open_store
from cluster.storage.section import Section
from trainer import stage_inputs
from trainer.messages import failure_reason, format_event, is_out_of_memory
from trainer.processor import DtypeName, fast_dtype
from trainer.resolve_auto import DTYPE_SECTIONS, recorded_dtypes, resolve
from trainer.responses.store import AnswerStore
from trainer.spec.errors import SpecReader
from trainer.spec.responses import ResponsesSpec
from trainer.spec.rules import NAME, RULES, faults_of, plain_name, raise_faults
from trainer.spec.sections import (
    CacheSpec,
    DataSpec,
    DistillSpec,
    StudentSpec,
    TeacherSpec,
    TokenizerSpec,
)
from trainer.spec.yaml import apply_override, parse

T = TypeVar("T")
IGNORED = ("resources", "sweep", "tracking")
DONE, WRONG, FAILED, INTERRUPTED = 0, 2, 3, 130
# Of one teacher forward pass on one rank; and how often records are published at least.
SHARD_SECONDS = 20.0
# Ranks wait for each other at most so long: while rank 0 prepares the corpus, and else.
PREPARE_MINUTES, COLLECTIVE_MINUTES = 24 * 60, 30
PRINT_SECONDS = 10.0
# So long a rank lets rank 0 say what is wrong, and end the group.
RANK_0_SECONDS = 5.0


class TrainerSpec(Section):
    """The sections of a spec that are read here; see `jobs.spec.job.JobSpec` for all."""

    name: str = Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})
    seed: int = Field(17, ge=0, le=2**32 - 1)
    storage: str = Field("./runs", min_length=1)
    teacher: TeacherSpec | None = None
    student: StudentSpec
    tokenizer: TokenizerSpec | None = None
    data: DataSpec
    responses: ResponsesSpec | None = None
    cache: CacheSpec = CacheSpec()
    distill: DistillSpec = DistillSpec()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        return plain_name(value)

    @model_validator(mode="after")
    def _rules_across_sections(self) -> TrainerSpec:
        raise_faults(faults_of(RULES, self))
        return self

    @property
    def recovery_sequences(self) -> int:
        """Sequences of train that recovery reads, which is no part of this launcher."""
        return 0


_READER = SpecReader(TrainerSpec, partial(faults_of, RULES))


def load(path: str, overrides: Sequence[str]) -> TrainerSpec:
    """The spec of a file. Raises ValueError with a line for each thing that is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    data, faults = parse(text, path)
    if not isinstance(data, dict):
        raise ValueError("\n".join(faults) or f"{path}: may be a mapping of keys, e.g. name: a-run")
    for override in overrides:
        fault = apply_override(data, override)
        faults += [fault] if fault else []
    for name in IGNORED:
        data.pop(name, None)
    spec, lines = _READER.read(data)
    if spec is None or faults:
        raise ValueError("\n".join([*faults, *lines]))
    return spec


def make_corpus(
    spec: TrainerSpec,
    names: stage_inputs.Identities,
    answers: AnswerStore | None,
    stop: Callable[[], bool],
) -> Store:
    """Makes the corpus, call after call, unless it is there; `answers`: of `_answers`, None where
    sources hold texts.

    Raises ValueError for wrong sources, and `Stopped`.
    """
    from cluster.storage.keys import fingerprint
    from trainer.corpus.corpus import is_complete
    from trainer.corpus.prepare import prepare
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.responses.make import answered, on_answers
    from trainer.stage_inputs import corpus_of
    from trainer.worker import Stopped

    def each(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        results = []
        for call in calls:
            if stop():
                raise Stopped("prepare stopped")
            results.append(function(*call))
        return results

    identity, data, brought = names.corpus, spec.data, None
    if answers is not None:
        identity, data = corpus_of(names, answers), answered(spec.data, answers)
        brought = on_answers(each, answers)
    store = open_store(spec.storage).sub(stage_inputs.CORPORA, fingerprint(identity))
    if is_complete(store):
        return store
    folder = names.tokenizer_folder
    tokenizer = spec.tokenizer if folder is None else load_tokenizer(folder)
    prepare(data, tokenizer, store, brought or each, identity=identity)
    return store


class Rank:
    """This process under torchrun: its worker, its attempt, and whether it is to stop."""

    def __init__(self, spec: TrainerSpec) -> None:
        import torch
        import torch.distributed as dist

        from trainer.worker import Hooks, start_worker

        self.spec = spec
        self.store: Store = open_store(spec.storage).sub(spec.name)
        self.stopping = False
        self.printed: dict[str, float] = {}
        self.events: EventWriter | None = None
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.worker = start_worker(
            Hooks(),
            threads=max(1, (os.cpu_count() or 1) // local),
            uses_gpu=torch.cuda.is_available(),
            timeout_minutes=COLLECTIVE_MINUTES,
        )
        # Rank 0's long work is waited for on the CPU, with a time-out of its own.
        self.waiting = dist.new_group(backend="gloo", timeout=_minutes(PREPARE_MINUTES))
        number = self.after(lambda: Attempt.claim(self.store, launcher="torchrun").number)
        self.attempt = Attempt(self.store, number)
        if self.worker.is_main:
            self.events = EventWriter(self.store, number)
        self.worker.hooks = Hooks(
            emit=self.emit,
            flush=self.events.flush if self.events else Hooks.flush,
            stop_requested=lambda: self.stopping,
            fence=self.attempt.fence,
            attempt=number,
        )
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on what the terminal has sent already: a second signal means no more.
        self.stopping = True

    def after(self, work: Callable[[], T]) -> T:
        """Rank 0's result of `work`, on every rank; raises on all what it raises there."""
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self.worker.is_main:
            try:
                box[0] = work()
            except Exception as error:  # told to all ranks, so that none waits for ever
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.waiting)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def emit(self, event: str, **fields: Any) -> None:
        """Records an event and now and then prints a line; on rank 0 alone."""
        if self.events is None:
            return
        self.events.emit(event, **fields)
        stage = fields.get("stage", "")
        if event == "step":
            self._say(stage, fields["step"], fields["steps"], f"loss {fields['loss']:.4f}", fields)
        elif event == "progress":
            done = min(fields["done"], fields["total"])
            part = f"{stage} {fields.get('part', '')}".rstrip()
            note = fields.get("within", fields["unit"])
            self._say(part, int(done), fields["total"], note, fields)
        elif (line := format_event({"event": event, **fields})) is not None:
            print(line, flush=True)
        elif event == "training_done":
            perplexity = fields["metrics"]["select_perplexity"]
            print(f"{stage}: done, perplexity on select {perplexity:.2f}", flush=True)
        elif event == "capture_done":
            print(f"{stage}: {fields['metrics']['sequences']} sequences added", flush=True)

    def _say(self, what: str, done: int, total: int, note: str, fields: dict[str, Any]) -> None:
        now = time.monotonic()
        if done < total and now - self.printed.get(what, -PRINT_SECONDS) < PRINT_SECONDS:
            return
        self.printed[what] = now
        rate = fields.get("tokens_per_s")
        speed = f"  {rate:,.0f} tokens/s" if rate else ""
        print(f"{what}: {done}/{total}  {note}{speed}", flush=True)

    def run(self) -> None:
        """Prepare, capture, distill, control."""
        from trainer.logits.store import open_cache
        from trainer.run_task import run_task
        from trainer.tasks import make_capture, make_trainings

        spec = self._resolved()
        self.emit("run_start", name=spec.name, spec=spec.model_dump(mode="json"))
        names = stage_inputs.identities(spec)
        root = open_store(spec.storage)
        corpus = self._prepare(spec, names, root)
        inputs = self._inputs(spec, names, corpus)
        cache = None
        if spec.teacher is not None:
            cache = self.after(lambda: open_cache(root.sub(stage_inputs.CACHES), names.cache))
            capture = make_capture(
                spec, corpus, cache, batch_tokens="auto", shard_seconds=SHARD_SECONDS
            )
            run_task(capture, self.worker)
        for training in make_trainings(spec, inputs, self.store, corpus, cache):
            run_task(training, self.worker)

    def _resolved(self) -> TrainerSpec:
        """The spec with `auto` resolved; `dtype: auto` as before, else as all ranks are fast at."""
        fast = self.worker.gather(fast_dtype(self.worker.device.type))
        dtype: DtypeName = "bfloat16" if set(fast) == {"bfloat16"} else "float32"
        dtypes = dict.fromkeys(DTYPE_SECTIONS, dtype)
        known = {**dtypes, **recorded_dtypes(self.store)}
        return self.after(lambda: resolve(self.spec, known, self.worker.device.type))

    def _inputs(
        self, spec: TrainerSpec, names: stage_inputs.Identities, corpus: Store
    ) -> dict[str, Any]:
        """Of the trainings. Raises ValueError if an unfinished one would be passed over."""
        from cluster.storage.keys import fingerprint
        from trainer.training.unfinished import unfinished_faults

        def find() -> tuple[dict[str, Any], list[str]]:
            cache = None if spec.teacher is None else fingerprint(names.cache)
            found = stage_inputs.training_inputs(spec, names, corpus.name, cache)
            return found, unfinished_faults(spec, found, self.store, "delete {path} to drop it")

        inputs, faults = self.after(find)
        if faults:
            raise ValueError("\n".join(faults))
        return dict(inputs)

    def _prepare(self, spec: TrainerSpec, names: stage_inputs.Identities, root: Store) -> Store:
        """The corpus, made unless it is there. Raises ValueError for what the spec names wrongly,
        one line for each fault."""
        from cluster.storage.keys import fingerprint
        from trainer.checks import world_faults
        from trainer.corpus.corpus import is_complete
        from trainer.stage_inputs import find_corpus

        def find() -> Store | None:
            identity = find_corpus(names, root)
            store = (
                None if identity is None else root.sub(stage_inputs.CORPORA, fingerprint(identity))
            )
            return store if store is not None and is_complete(store) else None

        corpus: Store | None = self.after(find)
        stages = ["capture", "distill"] if corpus else ["prepare", "capture", "distill"]
        faults = self.after(lambda: world_faults(spec, names, stages))
        if faults:
            raise ValueError("\n".join(faults))
        if corpus is None:
            answers = None if spec.responses is None else self._answers(spec, names, root)
            stop = partial(getattr, self, "stopping")
            corpus = self.after(lambda: make_corpus(spec, names, answers, stop))
        assert corpus is not None
        if self.worker.is_main:
            print(f"prepare: corpus {corpus.url}", flush=True)
        return corpus

    def _answers(
        self, spec: TrainerSpec, names: stage_inputs.Identities, root: Store
    ) -> AnswerStore:
        """The answers that the corpus is made of; those that are missing are made first."""
        from trainer.responses.make import collect, finish, make_job, open_answers
        from trainer.run_task import run_task

        identity = self.after(lambda: names.responses)
        answers = open_answers(root, identity)
        if self.after(lambda: answers.manifest() is not None):
            return answers
        began = time.time()
        assert spec.responses is not None
        if spec.responses.origin == "teacher":
            task = make_job(spec, answers, batch_tokens="auto", publish_seconds=SHARD_SECONDS)
            facts = run_task(task, self.worker)
        else:
            facts = self.after(lambda: collect(spec, answers, self.worker.hooks))
        self.after(lambda: finish(spec, answers, identity, facts, began))
        return answers

    def close(self, status: str) -> None:
        """Publishes the events that are left."""
        if self.events is not None:
            self.events.emit("run_end", status=status)
            self.events.close()


def _minutes(count: float) -> Any:  # noqa: ANN401
    import datetime

    return datetime.timedelta(minutes=count)


def main(arguments: Sequence[str]) -> int:
    """Runs this rank; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return DONE if arguments else WRONG
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)  # one process without torchrun is a group of its own
    os.environ.setdefault("MASTER_PORT", "29500" if os.environ["WORLD_SIZE"] != "1" else "0")
    is_main = os.environ["RANK"] == "0"
    try:
        spec = load(arguments[0], arguments[1:])
    except ValueError as error:
        return _wrong(error, is_main)

    from trainer.worker import Stopped

    rank, status, code = None, "failed", FAILED
    try:
        rank = Rank(spec)
        rank.run()
        status, code = "done", DONE
    except Stopped as stopped:
        status, code = "interrupted", INTERRUPTED
        if is_main:
            print(f"interrupted: {stopped}", file=sys.stderr)
    except Exception as error:
        code = _failed(error, is_main)
    finally:
        if rank is not None:
            rank.close(status)
    return code


def _wrong(error: ValueError, is_main: bool) -> int:
    _notify(str(error).splitlines(), is_main)
    return WRONG


def _failed(error: Exception, is_main: bool) -> int:
    """Says why a rank ends; returns its exit code.

    What the user can mend is a line. Of anything else every rank leaves its traceback: only all of
    them together show which rank was first.
    """
    from trainer.training.checkpoint import CheckpointMisfit

    if isinstance(error, ValueError) and not isinstance(error, CheckpointMisfit):
        return _wrong(error, is_main)
    expected = (CheckpointMisfit, FloatingPointError, OSError, Fenced)
    if isinstance(error, expected) or is_out_of_memory(error):
        _notify([failure_reason(error)], is_main)
    else:
        traceback.print_exception(error)
    return FAILED


def _notify(lines: Sequence[str], is_main: bool) -> None:
    """Says what is wrong, once: all ranks find the same, and rank 0 has the word."""
    if not is_main:
        # Rank 0 ends the group. If it has found nothing wrong, the fault is this rank's own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_SECONDS)
    for line in lines:
        print(f"error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
