"""The training loop: a DeepSpeed engine over a fixed order of sequences, resumable at any step."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.storage import Store
from trainer import checkpoint
from trainer.cached import CachedTeacher
from trainer.corpus.corpus import Corpus, open_corpus
from trainer.corpus.tokenizer import load_tokenizer
from trainer.loader import Prefetched, Step, StepLoader, evaluation_batches
from trainer.losses import make_losses
from trainer.models import build_model, count_parameters, find_model, hash_files, new_config
from trainer.optimizer import learning_rate, make_optimizer, training_config
from trainer.schedule import Schedule
from trainer.spec import CacheSpec, DataSpec, DistillSpec, StudentSpec
from trainer.student import StudentWithLoss, check_head, save_student, whole_state
from trainer.worker import Stopped, Worker, torch_dtype

# Steps are read ahead up to so many bytes, and so many steps.
AHEAD_BYTES, AHEAD_STEPS = 256 << 20, 16
# Steps that are read at once, where reading means waiting for another machine.
REMOTE_READS = 4


@dataclass(frozen=True)
class Training:
    """Everything a rank needs to know of one training; picklable.

    stage: "distill" or "control". cache: the teacher's records, None without a teacher; cache_spec:
    which they are. checkpoints: a folder of this training alone. output: where the student's folder
    goes. No `auto` is left in the specs.
    """

    stage: str
    student: StudentSpec
    distill: DistillSpec
    data: DataSpec
    cache_spec: CacheSpec
    seed: int
    corpus: Store
    cache: Store | None
    checkpoints: Store
    output: Store

    @property
    def sequences_per_step(self) -> int:
        return self.distill.tokens_per_step // self.data.sequence_length

    def schedule(self, corpus: Corpus) -> Schedule:
        """The order in which this training reads the train part."""
        return make_schedule(corpus, self.data, self.distill, self.seed)


def make_schedule(corpus: Corpus, data: DataSpec, distill: DistillSpec, seed: int) -> Schedule:
    """Which sequences each step reads: a function of corpus, spec and seed alone."""
    assert isinstance(data.max_tokens, int)
    return Schedule(
        sources=corpus.part("train").sources,
        weights=[source.weight for source in data.train],
        seed=seed,
        sequences_per_step=distill.tokens_per_step // data.sequence_length,
        steps=distill.steps,
        max_sequences=-(-data.max_tokens // data.sequence_length),
    )


def train(job: Training, worker: Worker) -> dict[str, Any]:
    """Trains, saves the student to `job.output`, returns its metrics; collective.

    Continues from the newest checkpoint. A training that is done already returns at once. Raises
    `Stopped` after a clean stop that the user asked for.
    """
    done = worker.share(_read_done(job) if worker.is_main else None)
    if done is not None:
        return {**done, "seconds": 0.0}  # what it cost was told when it was made
    began = time.time()
    corpus = open_corpus(job.corpus)
    found = worker.share(checkpoint.find_latest(job.checkpoints) if worker.is_main else None)
    loader = make_loader(job, worker, corpus)
    # The first steps are read, and what reads them warms up, while the model is built.
    with closing(read_ahead(job, loader, 0 if found is None else found.step)) as steps:
        run = _Run(job, worker, corpus, loader)
        run.resume(found)
        run.run(steps)
    if loader.teacher is not None:
        loader.teacher.close()
    metrics = run.evaluate()
    metrics["seconds"] = time.time() - began
    run.publish(metrics)
    worker.emit("training_done", stage=job.stage, metrics=metrics)
    return metrics


def _read_done(job: Training) -> dict[str, Any] | None:
    """The metrics of this training, if it is done and the output still holds its weights."""
    name = "done/metrics.json"
    if not job.checkpoints.exists(name) or not job.output.exists("config.json"):
        return None
    metrics = job.checkpoints.read_json(name)
    return metrics if metrics["weights"] == weights_hash(job.output.fetch_folder("")) else None


def weights_hash(folder: Path) -> str:
    """Hash of a model folder's weights."""
    return hash_files(sorted(folder.glob("*.safetensors")))


def make_loader(job: Training, worker: Worker, corpus: Corpus) -> StepLoader:
    """What makes this rank's steps."""
    spec = job.distill
    teacher = None
    needs_teacher = any(
        loss.needs_teacher for _, loss in make_losses(spec.losses, spec.temperature).values()
    )
    if job.cache is not None and needs_teacher:
        vocab, length = int(corpus.manifest["vocab_size"]), job.data.sequence_length
        teacher = CachedTeacher.for_training(
            job.cache, job.cache_spec, vocab, length, spec.temperature
        )
    micro_batch = min(int(spec.micro_batch), -(-job.sequences_per_step // worker.world))
    return StepLoader(
        corpus.part("train"),
        job.schedule(corpus),
        teacher,
        micro_batch,
        worker.rank,
        worker.world,
    )


def read_ahead(job: Training, loader: StepLoader, start: int) -> Prefetched:
    """The steps from `start` on, being read from now on."""
    cache = job.cache_spec
    width = cache.draws if cache.method == "sample" else cache.k
    per_token = 28 if loader.teacher is None else 32 + 12 * width
    sequences = loader.accumulation(job.sequences_per_step) * loader.micro_batch
    fits = AHEAD_BYTES // (sequences * job.data.sequence_length * per_token)
    remote = job.cache is not None and job.cache.local() is None
    return loader.steps(
        start,
        job.distill.steps,
        ahead=min(max(fits, 2), AHEAD_STEPS),
        threads=REMOTE_READS if remote else 1,
    )


class _Run:
    """One rank's engine, data and counters."""

    def __init__(self, job: Training, worker: Worker, corpus: Corpus, loader: StepLoader) -> None:
        import deepspeed

        self.job, self.worker = job, worker
        self.corpus, self.loader = corpus, loader
        spec = job.distill
        self.tokenizer = load_tokenizer(self.corpus.tokenizer_folder())
        vocab = int(self.corpus.manifest["vocab_size"])
        model = self._build()
        check_head(model, vocab)
        self.config, self.generation = model.config, getattr(model, "generation_config", None)
        self.parameters = count_parameters(model)
        if spec.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.losses = make_losses(spec.losses, spec.temperature)
        self.accumulation = loader.accumulation(job.sequences_per_step)
        module = StudentWithLoss(model, self.losses, vocab)
        config = training_config(spec, loader.micro_batch, self.accumulation, worker.world)
        self.engine, *_ = deepspeed.initialize(
            model=module.to(worker.device),
            optimizer=make_optimizer(module, spec),
            config=config,
        )
        self.start = 0
        self.tokens_read = 0
        self.waits_ms: list[float] = []
        self.saved_at = time.monotonic()

    def _build(self) -> Any:
        job = self.job
        student = job.student
        folder = None
        if student.model is not None:
            pretrained = student.init == "pretrained"
            folder = find_model(
                "student.model", student.model, student.revision, weights=pretrained
            )
        config = None
        if student.config is not None:
            length = job.data.sequence_length
            config = new_config("student.config", student.config, self.tokenizer, length)
        dtype = torch_dtype(job.distill.dtype)
        return build_model(
            folder=folder, config=config, init=student.init, dtype=dtype, seed=job.seed
        )

    def resume(self, found: checkpoint.Checkpoint | None) -> None:
        """Continues from the newest complete checkpoint, if there is one."""
        worker, job = self.worker, self.job
        pids = worker.gather(os.getpid())
        if found is None:
            worker.emit("training_start", stage=job.stage, pids=pids, parameters=self.parameters)
            return
        checkpoint.load(self.engine, job.checkpoints, found, worker)
        self.start = found.step
        self.tokens_read = int(found.state["tokens"])
        worker.emit("resume", stage=job.stage, step=found.step, pids=pids)

    def run(self, steps: Iterable[Step]) -> None:
        """The steps that are left, with checkpoints on the way."""
        job, worker = self.job, self.worker
        self.engine.train()
        began = time.perf_counter()
        for step in steps:
            if step.number == self.start:
                began = time.perf_counter()  # the first batch is no part of the first step's time
            stop, due = self._step(step, began)
            began = time.perf_counter()
            last = step.number + 1 == job.distill.steps
            if not last and (stop or due):
                self._save(step.number + 1)
                began = time.perf_counter()
            if stop and not last:
                raise Stopped(f"{job.stage} stopped after step {step.number + 1}")
        worker.barrier()

    def _step(self, step: Step, began: float) -> tuple[bool, bool]:
        """One optimizer step; returns whether all ranks are to stop, and to save."""
        job, worker, engine = self.job, self.worker, self.engine
        # A generator per step, so dropout is the same after a resume as without one.
        torch.manual_seed(hash_seed(job.seed, step.number, worker.rank))
        rate = learning_rate(job.distill, step.number)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(len(self.losses), dtype=torch.float64)
        for micro in step.micros:
            loss, parts = engine(**micro.to(worker.device))
            engine.backward(loss)
            engine.step()
            sums += parts.cpu()
        # Rank 0 decides for all; its word travels with the sums, at no further collective.
        wants_stop = worker.is_main and worker.hooks.stop_requested()
        wants_save = worker.is_main and self._checkpoint_due(step.number + 1)
        # Undo the scale of the token weights: means over the global batch's loss tokens.
        unscale = 1.0 / (self.accumulation * worker.world)
        *losses, stop, save, wait_s = worker.sum(
            [*(sums * unscale).tolist(), float(wants_stop), float(wants_save), step.wait_s]
        )
        means = dict(zip(self.losses, losses, strict=True))
        if not all(np.isfinite(value) for value in means.values()):
            raise FloatingPointError(
                f"{job.stage}: loss is {means} at step {step.number + 1}; lower "
                "distill.learning_rate or use distill.dtype=float32"
            )
        self.tokens_read += step.tokens
        self.waits_ms.append(1000 * wait_s / worker.world)
        seconds = time.perf_counter() - began
        norm = engine.get_global_grad_norm()
        worker.emit(
            "step",
            stage=job.stage,
            step=step.number + 1,
            steps=job.distill.steps,
            loss=sum(self.losses[name][0] * value for name, value in means.items()),
            **means,
            learning_rate=rate,
            grad_norm=None if norm is None else float(norm),
            tokens=self.tokens_read,
            tokens_per_s=step.tokens / seconds,
            loader_wait_ms=self.waits_ms[-1],
        )
        return stop > 0, save > 0

    def _checkpoint_due(self, step: int) -> bool:
        spec = self.job.distill
        by_time = time.monotonic() - self.saved_at >= spec.checkpoint_minutes * 60
        return by_time or bool(spec.checkpoint_steps and step % spec.checkpoint_steps == 0)

    def _save(self, step: int) -> None:
        began = time.perf_counter()
        job, worker = self.job, self.worker
        if worker.is_main:  # no checkpoint may be ahead of the steps that are recorded
            worker.hooks.flush()
        checkpoint.save(
            self.engine,
            job.checkpoints,
            worker,
            step,
            job.distill.zero_stage,
            {"tokens": self.tokens_read},
        )
        if worker.is_main:
            checkpoint.prune(job.checkpoints, job.distill.keep_checkpoints)
        self.saved_at = time.monotonic()
        worker.emit("checkpoint", stage=job.stage, step=step, seconds=time.perf_counter() - began)

    def evaluate(self) -> dict[str, Any]:
        """Means over the loss tokens of `select`: cross-entropy, perplexity, KL to the teacher."""
        job, worker = self.job, self.worker
        names = {"ce": 1.0}
        teacher = None
        if job.cache is not None:
            vocab, length = int(self.corpus.manifest["vocab_size"]), job.data.sequence_length
            teacher = CachedTeacher.for_evaluation(job.cache, job.cache_spec, vocab, length)
            names = {"ce": 1.0, "forward_kl": 1.0}
        losses = make_losses(names, 1.0)
        totals = torch.zeros(len(losses) + 1, dtype=torch.float64)
        self.engine.eval()
        with torch.no_grad():
            for micro, _ in evaluation_batches(
                self.corpus.part("select"),
                teacher,
                self.loader.micro_batch,
                worker.rank,
                worker.world,
            ):
                _, sums = self.engine(**micro.to(worker.device), losses=losses)
                totals[:-1] += sums.cpu()
                totals[-1] += float(micro.token_weights.sum())
        if teacher is not None:
            teacher.close()
        *sums_all, tokens = worker.sum(totals.tolist())
        means = {name: value / tokens for name, value in zip(losses, sums_all, strict=True)}
        metrics: dict[str, Any] = {f"select_{name}": value for name, value in means.items()}
        metrics["select_perplexity"] = float(np.exp(means["ce"]))
        return {
            **metrics,
            "first_wait_ms": _mean(self.waits_ms[:1]),
            "loader_wait_ms": _mean(self.waits_ms[1:]),
            "steps": job.distill.steps,
            "tokens": self.tokens_read,
            "parameters": self.parameters,
            "world": worker.world,
        }

    def publish(self, metrics: dict[str, Any]) -> None:
        """Saves the student as a Hugging Face folder, then says so; checkpoints go."""
        worker, job = self.worker, self.job
        state = whole_state(self.engine, worker.is_main)
        if worker.is_main:
            with tempfile.TemporaryDirectory(prefix="stillhouse-student-") as temporary:
                folder = Path(temporary)
                save_student(self.config, state, self.tokenizer, folder, self.generation)
                worker.hooks.fence()
                metrics["weights"] = weights_hash(folder)
                new = {path.name for path in folder.iterdir()}
                for stale in sorted(set(job.output.list()) - new):
                    job.output.delete(stale, recursive=True)
                job.output.upload_folder(str(folder), "")
            worker.hooks.flush()
            job.checkpoints.write_json("done/metrics.json", metrics)
            checkpoint.prune(job.checkpoints, 0)
        worker.barrier()
        self.engine.destroy()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def hash_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
