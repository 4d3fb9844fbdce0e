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

import yaml
from pydantic import Field, ValidationError

from cluster.storage import Attempt, EventWriter, Fenced, Store, open_store
from trainer import job
from trainer.spec import (
    CacheSpec,
    DataSpec,
    DistillSpec,
    Section,
    StudentSpec,
    TeacherSpec,
    TokenizerSpec,
    temperature_fault,
)

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
    cache: CacheSpec = CacheSpec()
    distill: DistillSpec = DistillSpec()


def load(path: str, overrides: Sequence[str]) -> TrainerSpec:
    """The spec of a file. Raises ValueError with a line for each thing that is wrong with it."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: may be a mapping of keys, e.g. name: my-run")
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, last = key.split(".")
        at = data
        for parent in parents:
            if at.get(parent) is None:
                at[parent] = {}
            at = at[parent]
            if not isinstance(at, dict):
                raise ValueError(f"{override}: {parent} has no keys")
        if not equals or not last:
            raise ValueError(f"{override}: may be key=value, e.g. distill.steps=100")
        try:
            at[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{override}: the value is no YAML") from None
    for name in IGNORED:
        data.pop(name, None)
    try:
        spec = TrainerSpec(**data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise ValueError("\n".join(lines)) from None
    check(spec)
    return spec


def check(spec: TrainerSpec) -> None:
    """Rules across sections. Raises ValueError, one line."""
    distill, data = spec.distill, spec.data
    if distill.tokens_per_step % data.sequence_length:
        raise ValueError(
            f"distill.tokens_per_step: got {distill.tokens_per_step}; may be a multiple of "
            f"data.sequence_length ({data.sequence_length})"
        )
    if data.max_tokens != "auto" and data.max_tokens < data.sequence_length:
        raise ValueError(
            f"data.max_tokens: got {data.max_tokens}; may be auto or a whole number from "
            f"data.sequence_length ({data.sequence_length})"
        )
    fault = temperature_fault(distill, spec.cache)
    if fault is not None:
        raise ValueError(fault)
    if spec.teacher is None and (distill.control or distill.losses.get("forward_kl")):
        raise ValueError(
            "distill: forward_kl and control need a teacher; without one give losses: {ce: 1.0}"
        )
    own = spec.teacher is None and (spec.student.model is None or spec.student.init == "random")
    if spec.tokenizer is not None and not own:
        raise ValueError("tokenizer.train: the models given bring their own; remove tokenizer")
    if spec.tokenizer is None and spec.teacher is None and spec.student.model is None:
        raise ValueError("tokenizer: got null; needed here, e.g. tokenizer: {train: 2048}")


def prepare(spec: TrainerSpec, names: job.Identities, stop: Callable[[], bool]) -> str:
    """Makes the corpus, call after call, unless it is there; returns its name.

    Raises ValueError for wrong sources or models, and `Stopped`.
    """
    from trainer.corpus.corpus import is_complete
    from trainer.corpus.prepare import prepare as make
    from trainer.corpus.tokenizer import check_same_vocabulary, load_tokenizer
    from trainer.fingerprint import fingerprint
    from trainer.worker import Stopped

    def each(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        results = []
        for call in calls:
            if stop():
                raise Stopped("prepare stopped")
            results.append(function(*call))
        return results

    name = fingerprint(names.corpus)
    store = open_store(spec.storage).sub(job.CORPORA, name)
    if names.teacher_folder is not None and names.student_folder is not None:
        check_same_vocabulary(names.teacher_folder, names.student_folder)
    if not is_complete(store):
        folder = names.tokenizer_folder
        tokenizer = spec.tokenizer if folder is None else load_tokenizer(folder)
        make(spec.data, tokenizer, store, each, identity=names.corpus)
    return name


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
            self._say(f"{stage} {fields['part']}", done, fields["total"], fields["unit"], fields)
        elif event == "resume":
            print(f"{stage}: continues from the checkpoint of step {fields['step']}", flush=True)
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
        rate = fields["tokens_per_s"]
        print(f"{what}: {done}/{total}  {note}  {rate:,.0f} tokens/s", flush=True)

    def run(self) -> None:
        """Prepare, capture, distill, control."""
        from trainer.logits.store import open_cache
        from trainer.loop import train
        from trainer.teacher import capture

        spec = self.after(lambda: job.resolve(self.spec))
        self.emit("run_start", name=spec.name, spec=spec.model_dump(mode="json"))
        names = job.identities(spec)
        root = open_store(spec.storage)
        stop = partial(getattr, self, "stopping")
        corpus_name = self.after(lambda: prepare(spec, names, stop))
        corpus = root.sub(job.CORPORA, corpus_name)
        if self.worker.is_main:
            print(f"prepare: corpus {corpus.url}", flush=True)
        cache = None
        if spec.teacher is not None:
            cache = self.after(lambda: open_cache(root.sub(job.CACHES), names.cache))
            capture(
                job.make_capture(
                    spec, corpus, cache, batch_tokens=BATCH_TOKENS, shard_seconds=SHARD_SECONDS
                ),
                self.worker,
            )
        student = self.after(lambda: names.student)
        inputs = job.training_inputs(spec, student, corpus_name, cache.name if cache else None)
        for training in job.make_trainings(spec, inputs, self.store, corpus, cache):
            train(training, self.worker)

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
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
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
