"""Memory of one rank in training: what DeepSpeed keeps, what a backward pass needs, the loss."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.forecast.parameters import Shape
from jobs.spec.job import JobSpec
from trainer.logits.records import EVAL_IDS
from trainer.processor import DtypeName
from trainer.resolve_auto import activation_bytes
from trainer.spec.sections import DistillSpec, Dtype
from trainer.stage_inputs import reads_cache

ITEMSIZE: dict[DtypeName, int] = {"bfloat16": 2, "float32": 4}
# DeepSpeed's defaults (deepspeed/runtime/zero/config.py): elements of a bucket of gradients, and
# elements that ZeRO-3 holds gathered at most.
BUCKET, LIVE = 500_000_000, 1_000_000_000
# As in `trainer.losses.fused_linear`, which must not be imported for torch's sake: bytes of a chunk
# of logits, and elements of a tile of it in float32, of which about six are held at once.
CPU_CHUNK, GPU_CHUNK = 16 << 20, 512 << 20
CPU_TILE, GPU_TILE = 1 << 19, 1 << 25
TILES = 6
# glibc keeps what was freed of blocks below 32 MiB, in pieces that the next pass does not quite
# fit: measured 1.3 to 1.5 times the activations, at four shapes.
CPU_FRAGMENTS = 1.4
CPU_BLOCK = 32 << 20
# Buffers that come with the first steps: kernels' workspaces, DeepSpeed's own.
CPU_EXTRAS = 100e6
# As in `trainer.training.loader` and `trainer.training.evaluation`: steps read ahead, and what is
# kept of select.
AHEAD_BYTES, AHEAD_STEPS, KEPT_BYTES = 256 << 20, 16, 256 << 20


@dataclass(frozen=True)
class States:
    """What a training keeps from step to step on one rank, in bytes.

    weights: in their own dtype. gradients: sums in float32. optimizer: master weights and Adam's
    two moments, float32. gathered: weights that ZeRO-3 holds whole for a time. buckets: gradients
    on their way between the ranks. offloaded: whether gradients and optimizer are on the host.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    buckets: float
    offloaded: bool

    @property
    def device(self) -> float:
        """Model states on the device, buckets aside: what DeepSpeed's estimators count."""
        kept = self.weights + self.gathered
        return kept if self.offloaded else kept + self.gradients + self.optimizer

    @property
    def host(self) -> float:
        """Model states in the host's memory."""
        return self.gradients + self.optimizer if self.offloaded else 0.0


def states(
    parameters: float,
    trained: float,
    largest: float,
    *,
    zero_stage: int,
    world: int,
    itemsize: int = 2,
    offload: bool = False,
    bucket: int = BUCKET,
    live: int = LIVE,
) -> States:
    """What DeepSpeed keeps of a model with so many parameters, of which `trained` learn.

    Rajbhandari et al., 2020, ZeRO, section 5, as `trainer.training.engine` sets the engine up: the
    optimizer's 12 bytes per parameter are shared out from stage 1 on; gradients are summed in
    float32 whatever the dtype of the weights (`grad_accum_dtype`), whole on every rank in stage 1
    (so 6 P + 12 P / N instead of the paper's 4 P + 12 P / N) and shared out from stage 2 on. A
    bucket holds as many gradients as fit, in the dtype of the weights, and a copy of it is reduced;
    beside it stage 3 has its rank's part of the result, and stage 1 the sums of that part. largest:
    elements of the largest layer, which ZeRO-3 gathers with its gradients at the least. offload:
    optimizer and float32 gradients are in host memory (ZeRO-Offload).
    """
    optimizer = 12.0 * trained / world
    held = min(bucket, trained)
    buckets = 2.0 * itemsize * held
    gathered = 0.0
    if zero_stage == 3:
        weights, gradients = itemsize * parameters / world, 4.0 * trained / world
        gathered = itemsize * max(2 * min(largest, parameters), min(live, parameters))
        buckets += itemsize * held / world
        if world == 1:  # all of it is there already
            gathered = 0.0
    else:
        weights = itemsize * parameters
        gradients = 4.0 * trained / (world if zero_stage == 2 else 1)
        buckets += 4.0 * trained / world if zero_stage == 1 else 0.0
    return States(weights, gradients, optimizer, gathered, buckets, offload)


def known_dtype(dtype: Dtype) -> DtypeName:
    """A dtype of a resolved spec. Raises ValueError for `auto`."""
    if dtype == "auto":
        raise ValueError("dtype: auto is not resolved")
    return dtype


def itemsize_of(dtype: Dtype) -> int:
    """Bytes of a value in a dtype of a resolved spec."""
    return ITEMSIZE[known_dtype(dtype)]


def trained_parameters(student: Shape, spec: JobSpec) -> int:
    """Parameters that learn: all, or the adapters'."""
    lora = spec.student.lora
    return student.parameters if lora is None else student.adapters(lora.r, lora.targets)


def training_states(student: Shape, spec: JobSpec, world: int) -> States:
    """The states of a spec's training on so many ranks."""
    distill = spec.distill
    assert distill is not None
    own = distill.deepspeed.get("zero_optimization") or {}
    trained = trained_parameters(student, spec)
    more = 0 if spec.student.lora is None else trained
    return states(
        student.parameters + more,
        trained,
        student.largest,
        zero_stage=distill.zero_stage,
        world=world,
        itemsize=itemsize_of(distill.dtype),
        offload=distill.offload == "cpu",
        bucket=_count(own.get("reduce_bucket_size"), BUCKET),
        live=_count(own.get("stage3_max_live_parameters"), LIVE),
    )


def micro_tokens(spec: JobSpec, world: int) -> int:
    """Tokens of a forward pass of one rank, as `make_loader` cuts a step."""
    assert spec.distill is not None and spec.data is not None
    length = spec.data.sequence_length
    sequences = -(-(spec.distill.tokens_per_step // length) // world)
    return min(int(spec.distill.micro_batch), sequences) * length


def read_bytes(spec: JobSpec, world: int) -> float:
    """Bytes of steps that a rank has read ahead, and of its share of select, which it keeps."""
    assert spec.distill is not None and spec.data is not None
    length, micro = spec.data.sequence_length, micro_tokens(spec, world)
    rank_tokens = -(-spec.distill.tokens_per_step // (world * micro)) * micro
    cached = reads_cache(spec)
    width = spec.cache.draws if spec.cache.method == "sample" else spec.cache.k
    step = rank_tokens * (32 + 12 * width if cached else 28)
    select = -(-spec.data.select_sequences // world) * length
    select *= 28 if spec.teacher is None else 32 + 12 * EVAL_IDS
    ahead = min(max(AHEAD_BYTES // step, 2), AHEAD_STEPS, spec.distill.steps)
    return float(ahead * step + (select if select <= KEPT_BYTES else 0))


def activations(student: Shape, distill: DistillSpec, tokens: int) -> float:
    """Bytes kept for the backward pass of so many tokens.

    Recomputed: the input of every layer, and one layer's own, with its gradients while it is
    recomputed (Chen et al., 2016, Training Deep Nets with Sublinear Memory Cost).
    """
    per_token = float(activation_bytes(dict(student.raw)))
    if distill.activation_checkpointing:
        layer = per_token / student.layers
        per_token = student.layers * student.hidden * 2 + 1.5 * layer
    return tokens * per_token * itemsize_of(distill.dtype) / 2


def loss_bytes(student: Shape, distill: DistillSpec, tokens: int, cuda: bool, dense: bool) -> float:
    """Bytes of the fused head and loss: a chunk of logits, tiles of it, gradients of head and
    hidden states. dense: the teacher's logits of the chunk are there too."""
    itemsize = itemsize_of(distill.dtype)
    models = 2 if dense else 1
    wide = GPU_CHUNK if cuda else CPU_CHUNK
    size = max(64, wide // (student.vocab * itemsize * models))
    if itemsize < 4:
        size = max(size, min(-(-tokens // 8), student.hidden))
    size = min(size, tokens)
    tile = min(size * student.vocab, GPU_TILE if cuda else CPU_TILE)
    gradients = student.head * itemsize + 2 * tokens * student.hidden * itemsize
    return size * student.vocab * itemsize * models + 4.0 * TILES * models * tile + gradients


def kept_by_allocator(student: Shape, passing: float, itemsize: int) -> float:
    """Bytes that a CPU's allocator keeps beyond `passing`, those of activations and loss.

    The first copies of the weights are freed when DeepSpeed makes its own; activations take their
    place, or the room stays empty.
    """
    small = sum(
        matrix.weights * matrix.count
        for matrix in student.matrices
        if matrix.weights * itemsize < CPU_BLOCK
    )
    return max(CPU_FRAGMENTS * passing, itemsize * small) - passing


def _count(value: object, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default
