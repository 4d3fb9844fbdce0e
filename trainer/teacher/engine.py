"""The teacher, loaded and ready for forward passes: whole on every worker, or sharded by ZeRO-3."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.models import count_parameters, find_model, load_model, meta_model, read_config
from trainer.student import check_head
from trainer.teacher.compress import TeacherWithRecords
from trainer.teacher.experts import check_shardable
from trainer.teacher.job import Capture
from trainer.teacher.placement import groups_for, memory_of
from trainer.teacher.zero import ShardedEngine, largest_layer, load_sharded
from trainer.worker import Worker, torch_dtype


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher.

    engine: called like `TeacherWithRecords.forward`. group: this rank within the ranks that share
    one copy of the weights (alone, where every worker has its own): they make equally many forward
    passes, in step, and wait for no other group.
    """

    engine: Any
    parameters: int
    sharded: bool
    group: Worker

    def held(self) -> int:
        """Bytes of weights on this rank now."""
        if isinstance(self.engine, ShardedEngine):
            return self.engine.held()
        return sum(p.numel() * p.element_size() for p in self.engine.parameters())

    def close(self) -> None:
        """Frees what the process would otherwise keep; the teacher cannot be called any more."""
        if isinstance(self.engine, ShardedEngine):
            self.engine.close()


def load_teacher(job: Capture, vocab: int, worker: Worker) -> Teacher:
    """The teacher of a capture on this rank's device; collective.

    Where every worker holds all of it DeepSpeed has nothing to do, and the module itself is called.
    Raises ValueError for a model that cannot be captured as the spec asks, or by so few workers.
    """
    teacher = job.teacher
    folder = find_model("teacher.model", teacher.model, teacher.revision)
    config = read_config(folder)
    dtype = torch_dtype(teacher.dtype)
    shape = meta_model(config)
    parameters = count_parameters(shape)
    nodes = worker.nodes()
    groups = groups_for(
        teacher.sharding,
        parameters * dtype.itemsize,
        largest_layer(shape) * dtype.itemsize,
        worker.gather(memory_of(worker)),
        nodes,
    )
    sharded = len(groups) < worker.world
    across = sharded and len(groups) == 1 < len(nodes)
    worker.emit(
        "teacher",
        stage="capture",
        sharding="zero3" if sharded else "none",
        groups=groups,
        across_nodes=across,
    )
    if across and worker.is_main:
        print(
            f"capture: no node holds the teacher alone; it is sharded over all {worker.world} "
            f"workers on {len(nodes)} nodes, and every layer travels between nodes",
            flush=True,
        )
    group = worker.split(groups)
    if sharded:
        check_shardable(config)
        wrap = partial(TeacherWithRecords, vocab=vocab)
        engine: Any = load_sharded(folder, config, dtype, group, wrap, vocab)
    else:
        model = load_model(folder, dtype, worker.device).requires_grad_(False)
        check_head(model, vocab)
        engine = TeacherWithRecords(model, vocab).eval()
    return Teacher(engine, parameters, sharded, group)
