"""Memory of one worker of each stage, part by part, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.capacity import Group
from jobs.forecast import training_memory
from jobs.forecast.parameters import Matrix, Shape
from jobs.forecast.place import USABLE, Place
from jobs.spec.job import JobSpec
from quant.evaluation.memory_forecast import LAYER_TENSORS, Sizes, estimate_memory
from quant.grid import Cell, grid
from quant.quant_spec import CHANNEL, QuantSpec
from trainer.logits.records import EVAL_IDS
from trainer.resolve_auto import auto_batch_tokens
from trainer.teacher.placement import groups_for, training_bytes


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one worker of a stage takes at its peak, beyond what its imports take.

    device: parts in the memory that the worker computes in: its GPU's, or the host's on a CPU.
    host: parts in the host's memory beside a GPU. load: of the host's memory while the models are
    loaded, all workers of a node together; start: of the device's at that time, where it may be
    more than later. memory: what a worker has, host_memory: what a node has, None where that is not
    known. workers: of a node.
    """

    device: Mapping[str, float]
    memory: float | None
    host: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    load: float = 0.0
    host_memory: float | None = None
    workers: int = 1

    @property
    def total(self) -> float:
        """Of the device, at its peak."""
        return max(sum(self.device.values()), self.start)

    @property
    def host_total(self) -> float:
        """Of a node's host memory beside its GPUs, at its peak."""
        return max(sum(self.host.values()) * self.workers, self.load)

    @property
    def fits(self) -> bool | None:
        """Whether device and host have room; None where the device's memory is not known."""
        if self.host_memory is not None and self.host_total > USABLE * self.host_memory:
            return False
        return None if self.memory is None else self.total <= USABLE * self.memory

    def to_dict(self) -> dict[str, Any]:
        """As JSON, in whole bytes."""
        return {
            "device": {name: round(size) for name, size in self.device.items()},
            "total": round(self.total),
            "memory": None if self.memory is None else round(self.memory),
            "host": {name: round(size) for name, size in self.host.items()},
            "start": round(self.start),
            "host_total": round(self.host_total),
            "host_load": round(self.load),
            "host_memory": None if self.host_memory is None else round(self.host_memory),
            "workers_per_node": self.workers,
            "fits": self.fits,
        }


# Float32 tensors of a tile of logits that a capture holds at once, and elements of a tile: as in
# `trainer.teacher.forward`. Elements that ZeRO-3 gathers ahead: as in `trainer.teacher.sharded`.
TILES = 3
CPU_TILE, GPU_TILE = 1 << 20, 1 << 26
CHUNK_TOKENS = 256
PREFETCH = 50_000_000
# Below so many weights a CPU core is as quick as a GPU, whose kernels take longer to start.
GPU_WEIGHTS = 100_000_000


@dataclass(frozen=True)
class Models:
    """Shapes of teacher and student; None where the spec has none."""

    teacher: Shape | None
    student: Shape


@dataclass(frozen=True)
class Sharding:
    """How the teacher lies on the workers: none | zero3, over how many of them one copy is spread,
    and whether over several nodes."""

    kind: str
    over: int
    across_nodes: bool


def teacher_sharding(
    models: Models, spec: JobSpec, place: Place, group: Group, stage: str
) -> Sharding:
    """What `trainer.teacher.teacher.load_teacher` will do. Raises ValueError, one line, where all
    workers together have too little memory."""
    teacher, asked = models.teacher, spec.teacher
    assert teacher is not None and asked is not None
    itemsize = training_memory.itemsize_of(asked.dtype)
    memory = place.memory(group)
    reserve = 0.0
    if stage == "distill":
        assert spec.distill is not None
        reserve = training_bytes(
            models.student.parameters,
            training_memory.trained_parameters(models.student, spec),
            models.student.largest,
            itemsize=training_memory.itemsize_of(spec.distill.dtype),
            zero_stage=spec.distill.zero_stage,
            world=group.workers,
            offloaded=spec.distill.offload == "cpu" and group.gpus > 0,
        )
    nodes = place.ranks(group)
    groups = groups_for(
        asked.sharding,
        teacher.parameters * itemsize,
        teacher.largest * itemsize,
        [float("inf") if memory is None else memory] * group.workers,
        nodes,
        stage=stage,
        reserve=reserve,
    )
    over = max(map(len, groups))
    return Sharding("zero3" if over > 1 else "none", over, over > max(map(len, nodes)))


def teacher_parts(teacher: Shape, itemsize: int, sharding: Sharding) -> dict[str, float]:
    """The teacher's weights on one worker."""
    whole = float(teacher.parameters * itemsize)
    if sharding.over == 1:
        return {"teacher weights": whole}
    ahead = min(PREFETCH, teacher.largest)
    return {
        "teacher weights, share": whole / sharding.over,
        "teacher layer, gathered": float((teacher.largest + ahead) * itemsize),
    }


def forward_bytes(shape: Shape, tokens: int, itemsize: int) -> float:
    """Bytes of a forward pass without gradients: one layer's, and the hidden states."""
    inner = shape.inner
    return tokens * (LAYER_TENSORS * shape.hidden + 3 * inner) * float(itemsize)


def capture_tokens(spec: JobSpec, teacher: Shape, cuda: bool) -> int:
    """Tokens of a teacher's forward pass on one worker."""
    assert spec.data is not None
    length = spec.data.sequence_length
    asked = spec.resources.capture.batch_tokens
    if asked == "auto":
        asked = auto_batch_tokens(teacher.parameters, "cuda" if cuda else "cpu")
    return max(1, asked // length) * length


def capture_need(models: Models, spec: JobSpec, place: Place, group: Group) -> MemoryNeed:
    """Of one worker of capture. Raises ValueError where no sharding of the teacher fits."""
    teacher, asked = models.teacher, spec.teacher
    assert teacher is not None and asked is not None
    itemsize, cuda = training_memory.itemsize_of(asked.dtype), group.gpus > 0
    tokens, cache = capture_tokens(spec, teacher, cuda), spec.cache
    tile = min(GPU_TILE if cuda else CPU_TILE, tokens * teacher.vocab)
    chunk = min(tokens, max(CHUNK_TOKENS, tile // teacher.vocab if cuda else CHUNK_TOKENS))
    kept = cache.draws * cache.redraws if cache.method == "sample" else cache.k
    sharding = teacher_sharding(models, spec, place, group, "capture")
    parts = teacher_parts(teacher, itemsize, sharding)
    parts["activations"] = forward_bytes(teacher, tokens, itemsize)
    parts["logits"] = float(chunk * teacher.vocab * itemsize + TILES * 4 * tile)
    parts["records"] = 12.0 * tokens * max(kept, EVAL_IDS)
    if not cuda:  # a sharded teacher makes the allocator give back what is freed
        pieces = 0.0 if sharding.over > 1 else training_memory.CPU_FRAGMENTS - 1
        parts["kept by the allocator"] = pieces * parts["activations"]
        parts["buffers"] = training_memory.CPU_EXTRAS
    return _need(parts, place, group)


def distill_need(models: Models, spec: JobSpec, place: Place, group: Group) -> MemoryNeed:
    """Of one worker of distill, with the teacher where it runs beside the student."""
    student, distill = models.student, spec.distill
    assert distill is not None
    world, cuda = group.workers, group.gpus > 0
    itemsize = training_memory.itemsize_of(distill.dtype)
    kept = training_memory.training_states(student, spec, world)
    tokens = training_memory.micro_tokens(spec, world)
    online = is_online(spec)
    parts = {"weights": kept.weights}
    states = {"gradients, float32": kept.gradients, "optimizer and master weights": kept.optimizer}
    offloaded = kept.offloaded and cuda
    parts |= {} if offloaded else states
    parts["layers, gathered"] = kept.gathered
    parts["gradient buckets"] = kept.buckets
    parts["activations"] = training_memory.activations(student, distill, tokens)
    parts["head and loss"] = training_memory.loss_bytes(student, distill, tokens, cuda, online)
    if not cuda:
        passing = parts["activations"] + parts["head and loss"]
        parts["kept by the allocator"] = training_memory.kept_by_allocator(
            student, passing, itemsize
        )
        parts["batches read ahead"] = training_memory.read_bytes(spec, world)
        parts["buffers"] = training_memory.CPU_EXTRAS
    if online:
        assert models.teacher is not None and spec.teacher is not None
        size = training_memory.itemsize_of(spec.teacher.dtype)
        sharding = teacher_sharding(models, spec, place, group, "distill")
        parts |= teacher_parts(models.teacher, size, sharding)
        parts["teacher activations"] = forward_bytes(models.teacher, tokens, size)
    # Every rank makes the whole student on the CPU, random weights in float32, then moves it.
    made = 4 if spec.student.init == "random" else itemsize
    whole = float(student.parameters)
    ahead = {"batches read ahead": training_memory.read_bytes(spec, world)} if cuda else {}
    return _need(
        parts,
        place,
        group,
        host={**(states if offloaded else {}), **ahead},
        start=whole * itemsize if cuda else whole * made,
        load=whole * made * place.workers_per_node(group) if cuda else 0.0,
    )


def is_online(spec: JobSpec) -> bool:
    """Whether the teacher runs beside the student in training."""
    distill = spec.distill
    return distill is not None and distill.mode == "online" and bool(distill.losses.of_teacher())


def cell_gpus(models: Models, spec: JobSpec, place: Place) -> tuple[int, float]:
    """CPUs and GPUs of a cell, `auto` resolved as `cluster.capacity.fit_task` does."""
    asked = spec.resources.sweep
    cpus = 1 if asked.cpus_per_cell == "auto" else asked.cpus_per_cell
    if asked.gpus_per_cell != "auto":
        return cpus, asked.gpus_per_cell
    largest = max(shape.parameters for shape in swept(models, spec).values())
    return cpus, 1 if place.gpus and largest >= GPU_WEIGHTS else 0


def swept(models: Models, spec: JobSpec) -> dict[str, Shape]:
    """The 16-bit models that cells are made of, by role."""
    assert spec.sweep is not None
    found = {"student": models.student}
    if models.teacher is not None:
        found["teacher"] = models.teacher
    return {role: found[role] for role in spec.sweep.models}


def cell_need(models: Models, spec: JobSpec, place: Place) -> tuple[str, MemoryNeed]:
    """The largest cell's key, and what it takes."""
    assert spec.sweep is not None
    cpus, gpus = cell_gpus(models, spec, place)
    slots = max(1, max(place.cluster.capacity(cpus, gpus), 1) // len(place.nodes))
    shapes = swept(models, spec)
    found = [
        (cell.key, _cell(cell, shapes[cell.model], spec, gpus > 0)) for cell in grid(spec.sweep)
    ]
    key, parts = max(found, key=lambda one: sum(one[1].values()))
    memory = place.host if not gpus else None if place.gpu is None else float(place.gpu.memory)
    if memory is not None and not gpus:
        memory /= slots
    return key, MemoryNeed(parts, memory, workers=slots)


def _cell(cell: Cell, shape: Shape, spec: JobSpec, cuda: bool) -> dict[str, float]:
    assert spec.sweep is not None and spec.data is not None
    parts = estimate_memory(
        Sizes(
            2 * shape.parameters, shape.hidden, shape.inner, shape.heads, shape.layers, shape.vocab
        ),
        code_bytes(shape, cell.spec),
        max((matrix.weights for matrix in shape.matrices), default=0),
        spec.sweep.batch_sequences,
        spec.data.sequence_length,
        cuda=cuda,
        training=cell.recovered,
        tasks=bool(spec.sweep.tasks),
    ).parts
    # What a process has imported is in no other stage's figures either.
    return {name: float(size) for name, size in parts.items() if name != "process"}


def code_bytes(shape: Shape, spec: QuantSpec) -> int:
    """Bytes of a model's codes, scales and zeros, as `quant.artifact.sizes.layer_slots`."""
    total = 0
    for matrix in _quantized(shape, spec):
        size = matrix.columns if spec.group_size == CHANNEL else int(spec.group_size)
        groups = matrix.columns // size
        total += matrix.count * matrix.rows * (matrix.columns * spec.bits // 8 + 2 * 2 * groups)
    return total


def cell_bytes(shape: Shape, spec: QuantSpec) -> int:
    """Bytes of a cell's model: codes, and 16 bits for what is not quantized."""
    quantized = sum(matrix.weights * matrix.count for matrix in _quantized(shape, spec))
    return code_bytes(shape, spec) + 2 * (shape.parameters - quantized)


def _quantized(shape: Shape, spec: QuantSpec) -> tuple[Matrix, ...]:
    """The linear layers, and embeddings and head where they are asked for; tied, they are one."""
    embeddings = 1 if shape.tied else spec.embeddings + spec.head
    if not (spec.embeddings or spec.head):
        return shape.matrices
    return (*shape.matrices, Matrix("embeddings and head", shape.vocab, shape.hidden, embeddings))


def _need(
    parts: Mapping[str, float],
    place: Place,
    group: Group,
    host: Mapping[str, float] | None = None,
    start: float = 0.0,
    load: float = 0.0,
) -> MemoryNeed:
    return MemoryNeed(
        device={name: size for name, size in parts.items() if size},
        memory=place.memory(group),
        host=dict(host or {}),
        start=start,
        load=load,
        host_memory=place.host if group.gpus else None,
        workers=place.workers_per_node(group),
    )
