"""The teacher, loaded and ready for forward passes: whole on every worker, or sharded by ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.losses.fused_linear import Head, head_of
from trainer.models.head import check_head
from trainer.models.load import count_parameters, find_model, load_model, meta_model, read_config
from trainer.spec.sections import TeacherSpec
from trainer.teacher.placement import groups_for, memory_of
from trainer.teacher.sharded import ShardedEngine, check_shardable, largest_layer, load_sharded
from trainer.worker import Worker, torch_dtype


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher.

    engine: called like the wrapping module. group: this rank within the ranks that share
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

    @contextmanager
    def head(self, vocab: int) -> Iterator[Head]:
        """The teacher's output head, whole on this rank as long as the context lasts.

        Collective within the group; after it a sharded teacher's head is gone from memory.
        """
        if isinstance(self.engine, ShardedEngine):
            with self.engine.gathered_head(vocab) as head:
                yield head
        else:
            yield head_of(self.engine.model, vocab)

    def close(self) -> None:
        """Frees what the process would otherwise keep; the teacher cannot be called any more."""
        if isinstance(self.engine, ShardedEngine):
            self.engine.close()


def load_teacher(
    teacher: TeacherSpec,
    vocab: int,
    worker: Worker,
    wrap: Callable[[Any], nn.Module],
    stage: str = "capture",
    reserve: float = 0.0,
) -> Teacher:
    """The teacher inside of `wrap(model)`, on this rank's device; collective.

    The wrapping module has the model as its `model`. Where every worker holds all of it
    DeepSpeed has nothing to do, and that module itself is called. reserve: bytes of each worker's
    memory that something else will need, such as a student in training.
    Raises ValueError for a model that cannot be run as the spec asks, or by so few workers.
    """
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
        stage=stage,
        reserve=reserve,
    )
    sharded = len(groups) < worker.world
    across = sharded and len(groups) == 1 < len(nodes)
    worker.emit(
        "teacher",
        stage=stage,
        sharding="zero3" if sharded else "none",
        groups=groups,
        across_nodes=across,
    )
    if across and worker.is_main:
        print(
            f"{stage}: no node holds the teacher alone; it is sharded over all {worker.world} "
            f"workers on {len(nodes)} nodes, and every layer travels between nodes",
            flush=True,
        )
    group = worker.split(groups)
    if sharded:
        check_shardable(config)
        engine: Any = load_sharded(folder, config, dtype, group, wrap, vocab)
    else:
        model = load_model(folder, dtype, worker.device).requires_grad_(False)
        check_head(model, vocab)
        engine = wrap(model).eval()
    return Teacher(engine, parameters, sharded, group)
