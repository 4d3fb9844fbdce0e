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
from typing import Any

from pydantic import Field, ValidationError

from cluster.storage import Attempt, EventWriter, Fenced, Store, open_store
from trainer import job
from trainer.news import line_of
from trainer.rules import RULES, faults_of
from trainer.section import Section
from trainer.spec import (
    CacheSpec,
    DataSpec,
    DistillSpec,
    ResponsesSpec,
    StudentSpec,
    TeacherSpec,
    TokenizerSpec,
)
from trainer.yamlfile import apply_override, parse

IGNORED = ("resources", "sweep", "tracking")
DONE, WRONG, FAILED, INTERRUPTED = 0, 2, 3, 130
# Of one teacher forward pass on one rank; and how often records are published at least.
BATCH_TOKENS, SHARD_SECONDS = 16384, 20.0
# Ranks wait for each other at most so long: while rank 0 prepares the corpus, and else.
PREPARE_MINUTES, COLLECTIVE_MINUTES = 24 * 60, 30
PRINT_SECONDS = 10.0


class TrainerSpec(Section):
    """The sections of a spec that are read here; see `jobs.spec.JobSpec` for all."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    seed: int = Field(17, ge=0, le=2**32 - 1)
    storage: str = Field("./runs", min_length=1)
    teacher: TeacherSpec | None = None
    student: StudentSpec
    tokenizer: TokenizerSpec | None = None
    data: DataSpec
    responses: ResponsesSpec | None = None
    cache: CacheSpec = CacheSpec()
    distill: DistillSpec = DistillSpec()


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
    try:
        spec = TrainerSpec.model_validate(data)
    except ValidationError as error:
        faults += [_line(fault) for fault in error.errors()]
    else:
        faults += faults_of(RULES, spec)
    if faults:
        raise ValueError("\n".join(faults))
    return spec


def _line(fault: Any) -> str:
    """The line for a fault that pydantic found; `stillhouse run` knows more of what may be."""
    why = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        why = "unknown key"
    return f"{'.'.join(map(str, fault['loc']))}: {why}"


def make_corpus(spec: Any, names: job.Identities, answers: Any, stop: Callable[[], bool]) -> None:
    """Makes the corpus, call after call; `answers`: of `_answers`, None where sources hold texts.

    Raises ValueError for wrong sources, and `Stopped`.
    """
    from trainer.corpus.prepare import prepare
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.fingerprint import fingerprint
    from trainer.responses.make import answered, on_answers
    from trainer.worker import Stopped

    def each(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        results = []
        for call in calls:
            if stop():
                raise Stopped("prepare stopped")
            results.append(function(*call))
        return results

    store = open_store(spec.storage).sub(job.CORPORA, fingerprint(names.corpus))
    folder = names.tokenizer_folder
    tokenizer = spec.tokenizer if folder is None else load_tokenizer(folder)
    if answers is None:
        prepare(spec.data, tokenizer, store, each, identity=names.corpus)
        return
    data, brought = answered(spec.data, answers), on_answers(each, answers)
    prepare(data, tokenizer, store, brought, identity=names.corpus)


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

    def after(self, work: Callable[[], Any]) -> Any:
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
            self._say(part, done, fields["total"], fields["unit"], fields)
        elif (line := line_of({"event": event, **fields})) is not None:
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

        spec = self.after(lambda: job.resolve(self.spec))
        self.emit("run_start", name=spec.name, spec=spec.model_dump(mode="json"))
        names = job.identities(spec)
        root = open_store(spec.storage)
        corpus = self._prepare(spec, names, root)
        cache = None
        if spec.teacher is not None:
            cache = self.after(lambda: open_cache(root.sub(job.CACHES), names.cache))
            job.make_capture(
                spec, corpus, cache, batch_tokens=BATCH_TOKENS, shard_seconds=SHARD_SECONDS
            ).run(self.worker)
        name = cache.name if cache else None
        inputs = self.after(lambda: job.training_inputs(spec, names, corpus.name, name))
        for training in job.make_trainings(spec, inputs, self.store, corpus, cache):
            training.run(self.worker)

    def _prepare(self, spec: Any, names: job.Identities, root: Store) -> Store:
        """The corpus, made unless it is there. Raises ValueError for what the spec names wrongly,
        one line for each fault."""
        from trainer.checks import world_faults
        from trainer.corpus.corpus import is_complete
        from trainer.fingerprint import fingerprint

        corpus = root.sub(job.CORPORA, self.after(lambda: fingerprint(names.corpus)))
        there = self.after(lambda: is_complete(corpus))
        stages = ["capture", "distill"] if there else ["prepare", "capture", "distill"]
        faults = self.after(lambda: world_faults(spec, names, stages))
        if faults:
            raise ValueError("\n".join(faults))
        if not there:
            answers = None if spec.responses is None else self._answers(spec, names, root)
            stop = partial(getattr, self, "stopping")
            self.after(lambda: make_corpus(spec, names, answers, stop))
        if self.worker.is_main:
            print(f"prepare: corpus {corpus.url}", flush=True)
        return corpus

    def _answers(self, spec: Any, names: job.Identities, root: Store) -> Any:
        """The answers that the corpus is made of; those that are missing are made first."""
        from trainer.responses.make import collect, finish, make_job, open_answers

        identity = self.after(lambda: names.responses)
        answers = open_answers(root, identity)
        if self.after(lambda: answers.manifest() is not None):
            return answers
        began = time.time()
        if spec.responses.origin == "teacher":
            facts = make_job(
                spec, answers, batch_tokens=BATCH_TOKENS, publish_seconds=SHARD_SECONDS
            ).run(self.worker)
        else:
            facts = self.after(lambda: collect(spec, answers, self.worker.hooks))
        self.after(lambda: finish(spec, answers, identity, facts, began))
        return answers

    def close(self, status: str) -> None:
        """Publishes the events that are left."""
        if self.events is not None:
            self.events.emit("run_end", status=status)
            self.events.close()


def _minutes(count: float) -> Any:
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
    except Fenced as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
    except ValueError as error:
        code = _wrong(error, is_main)
    except Exception:
        traceback.print_exc()
    finally:
        if rank is not None:
            rank.close(status)
    return code


def _wrong(error: ValueError, is_main: bool) -> int:
    """Says what is wrong, once: all ranks find the same, and rank 0 has the word."""
    if not is_main:
        # Rank 0 ends the group. If it has found nothing wrong, the fault is this rank's own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return WRONG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
