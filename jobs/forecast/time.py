"""Seconds of each stage: the work of its passes over a utilisation that is named, and its starts.

And from how many students on, a logit cache is cheaper than a teacher that runs with each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.capacity import Group
from jobs.forecast.parameters import Shape
from jobs.forecast.place import Place
from jobs.forecast.stage_memory import Models, Sharding, cell_gpus, is_online, swept
from jobs.forecast.training_memory import known_dtype, trained_parameters
from jobs.spec.job import JobSpec
from quant.grid import allocated_keys, grid, main_model
from trainer.processor import DtypeName
from trainer.resolve_auto import activation_bytes

# On CPUs, measured on one thread of a Zen 4 (float32: 103e9 operations per second), width 128 to
# 576, in float32, in bfloat16 and with AVX2 alone (docs/plan.md): the share of a core's peak that
# products of matrices reach, and nanoseconds of all else, which hardly depends on the dtype.
PRODUCTS = 0.86
REFERENCE_FLOPS = 103e9  # a core of another float32 peak takes other nanoseconds, by that ratio
TRAIN_NS = 1.5  # a forward and backward pass, per byte of `activation_bytes` and token
FORWARD_NS = 0.2  # a forward pass alone
LOSS_NS = 8.7  # head and loss of a training, per id of the vocabulary and token
RECORD_NS = 20.0  # a record of the cache, per id and token: softmax, top k, coding
EVALUATE_NS = 8.7  # a distribution compared with another, per id and token
OPTIMIZER_NS = 9.4  # AdamW with float32 masters, per parameter and step


@dataclass(frozen=True)
class Work:
    """What is done in one dtype. flops: operations of products. other_ns: what else a CPU does,
    in nanoseconds of the core that was measured."""

    flops: float
    dtype: DtypeName
    other_ns: float = 0.0

    def seconds(self, place: Place, cpus: int, gpus: float, utilisation: float) -> float | None:
        """Of one worker. utilisation: of a GPU's peak; a CPU's follows from `other_ns`. None where
        the peak is not known."""
        peak = place.flops(cpus, gpus, self.dtype)
        if peak is None:
            return None
        if gpus:
            return self.flops / (peak * utilisation)
        slower = REFERENCE_FLOPS / place.core.float32
        return self.flops / (peak * PRODUCTS) + 1e-9 * self.other_ns * slower / cpus


def seconds_of(
    works: Sequence[Work], place: Place, cpus: int, gpus: float, utilisation: float
) -> float | None:
    """Seconds of one worker for all of it; None where a peak is not known."""
    each = [work.seconds(place, cpus, gpus, utilisation) for work in works]
    known = [seconds for seconds in each if seconds is not None]
    return sum(known) if len(known) == len(each) else None


def forward(shape: Shape, length: int, tokens: float, dtype: DtypeName, per_id: float) -> Work:
    """Forward passes over so many tokens. per_id: nanoseconds of what is made of the logits."""
    layers = FORWARD_NS * activation_bytes(dict(shape.raw))
    return Work(
        shape.forward_flops(length) * tokens, dtype, tokens * (layers + per_id * shape.vocab)
    )


def train(
    shape: Shape, flops_per_token: float, tokens: float, steps: int, trained: int, dtype: DtypeName
) -> Work:
    """Steps of training that read so many tokens."""
    layers = TRAIN_NS * activation_bytes(dict(shape.raw))
    other = tokens * (layers + LOSS_NS * shape.vocab) + OPTIMIZER_NS * trained * steps
    return Work(flops_per_token * tokens, dtype, other)


# Model FLOPs utilisation of GPUs (Chowdhery et al., 2022, PaLM, section 4.1): operations that the
# model needs over the device's peak. Dense training reaches 40 to 50 % on one node of fast links;
# sharded weights travel before they are used. That of CPUs follows from what was measured on them
# (`jobs.forecast.time`).
UTILISATION = {
    "capture": 0.40,
    "capture, zero3": 0.30,
    "training": 0.38,
    "training, zero3": 0.33,
    "sweep": 0.30,
}
# A start of a worker group (processes, imports, process group, reading the models); of a sweep its
# tasks' start, the passes of the 16-bit models and the pass of speeds. All as in the demo's runs.
START_S, TASKS_S = 25.0, 18.0
# How much longer a step takes on a CPU whose group has several workers: they sum gradients, wait
# for each other and share the memory (the demo's trainings, two workers on two cores).
TOGETHER = 1.15
# hqq per billion weights: a GPU, and one CPU core in slices of rows (docs/quantization.md).
QUANTIZE_S, QUANTIZE_CPU_S = 4.0, 141.0
# A cell beside that: start, reading, writing (the demo's 17 cells).
CELL_S = 5.0


@dataclass(frozen=True)
class Tokens:
    """Tokens that are worked on. captured: of train, each once; read: by one training; held_out:
    of select and report; select: of select alone."""

    captured: int
    read: int
    held_out: int
    select: int


def capture_seconds(
    models: Models, spec: JobSpec, place: Place, group: Group, sharding: Sharding, tokens: Tokens
) -> dict[str, Any]:
    """The teacher once over train and the held-out parts."""
    assert models.teacher is not None and spec.teacher is not None and spec.data is not None
    dtype = known_dtype(spec.teacher.dtype)
    count = tokens.captured + tokens.held_out
    work = forward(models.teacher, spec.data.sequence_length, count, dtype, RECORD_NS)
    used = UTILISATION["capture, zero3" if sharding.over > 1 else "capture"]
    return _stage([work], used, place, group)


def distill_seconds(
    models: Models, spec: JobSpec, place: Place, group: Group, tokens: Tokens
) -> dict[str, Any]:
    """Student, and control where there is one; with the teacher's forward passes where it runs
    beside the student; evaluations on select."""
    distill = spec.distill
    assert distill is not None and spec.data is not None
    length, dtype = spec.data.sequence_length, known_dtype(distill.dtype)
    evaluations = (
        1 if distill.evaluate_steps is None else distill.steps / int(distill.evaluate_steps)
    )
    trainings = 1 + distill.control
    trained = trained_parameters(models.student, spec)
    works = [
        train(
            models.student,
            training_flops(models.student, spec),
            trainings * tokens.read,
            trainings * distill.steps,
            trained,
            dtype,
        ),
        forward(
            models.student, length, trainings * evaluations * tokens.select, dtype, EVALUATE_NS
        ),
    ]
    if is_online(spec):
        assert models.teacher is not None and spec.teacher is not None
        teacher = known_dtype(spec.teacher.dtype)
        works.append(forward(models.teacher, length, tokens.read, teacher, EVALUATE_NS))
    used = UTILISATION["training, zero3" if distill.zero_stage == 3 else "training"]
    return _stage(works, used, place, group, TOGETHER)


def training_flops(student: Shape, spec: JobSpec) -> float:
    """Operations of training per token.

    Backward passes take twice a forward pass: by the inputs and by the weights (Kaplan et al.,
    2020, section 2.1). Weights under adapters have no gradient. Recomputing adds a forward pass of
    the layers.
    """
    assert spec.distill is not None and spec.data is not None
    forward = student.forward_flops(spec.data.sequence_length)
    share = min(1.0, trained_parameters(student, spec) / student.parameters)
    flops = forward * (2 + share)
    if spec.distill.activation_checkpointing:
        flops += forward - 2.0 * student.head
    return flops


def sweep_seconds(models: Models, spec: JobSpec, place: Place, tokens: Tokens) -> dict[str, Any]:
    """All cells, as many at once as there is room for. Allocation is one evaluation on select for
    every choice and layer."""
    sweep = spec.sweep
    assert sweep is not None and spec.data is not None
    cpus, gpus = cell_gpus(models, spec, place)
    slots = max(1, place.cluster.capacity(cpus, gpus))
    shapes, length = swept(models, spec), spec.data.sequence_length
    dtype = known_dtype(sweep.dtype)
    quantize = QUANTIZE_S if gpus else QUANTIZE_CPU_S / cpus
    works: list[Work] = []
    busy, cells = 0.0, 0
    for cell in grid(sweep):
        shape = shapes[cell.model]
        works.append(forward(shape, length, tokens.held_out, dtype, EVALUATE_NS))
        if cell.recovered and sweep.recover is not None:
            steps = sweep.recover.steps
            read = steps * sweep.recover.batch_sequences * length
            works.append(train(shape, 3 * shape.forward_flops(length), read, steps, 0, dtype))
        busy += CELL_S + quantize * shape.parameters / 1e9
        cells += 1
    if allocated_keys(sweep):
        shape = shapes[main_model(sweep)]
        choices = len(sweep.bits) * len(sweep.group_sizes) * sum(m.count for m in shape.matrices)
        # The layers before the one that changes are computed once: half a pass on average.
        works.append(forward(shape, length, choices * tokens.select / 2, dtype, EVALUATE_NS))
        busy += CELL_S * len(allocated_keys(sweep))
        cells += len(allocated_keys(sweep))
    told = _utilised(works, UTILISATION["sweep"], place, cpus, gpus)
    worked = told.pop("worked_s")
    at_once = min(slots, max(1, cells))
    seconds = None if worked is None else TASKS_S + (busy + worked) / at_once
    hours = None if worked is None else (busy + worked) * (gpus or cpus) / 3600
    return {
        "seconds": None if seconds is None else round(seconds, 1),
        "device": "gpu" if gpus else "cpu",
        "device_hours": hours,
        **told,
        "slots": slots,
    }


def _stage(
    works: Sequence[Work], used: float, place: Place, group: Group, together: float = 1.0
) -> dict[str, Any]:
    """Work that is shared out among the workers of a group. together: how much longer it takes
    where there are several of them, on CPUs."""
    slower = together if group.workers > 1 and not group.gpus else 1.0
    told = _utilised(works, used, place, group.cpus, group.gpus, slower)
    worked = told.pop("worked_s")
    seconds = None if worked is None else START_S + worked / group.workers
    devices = group.workers * (group.gpus or group.cpus)
    flops = sum(work.flops for work in works)
    return {
        "seconds": seconds,
        "flops": flops,
        "flops_per_second": flops * group.workers / worked if worked else None,
        "device": "gpu" if group.gpus else "cpu",
        "device_hours": None if seconds is None else seconds * devices / 3600,
        **told,
    }


def _utilised(
    works: Sequence[Work],
    used: float,
    place: Place,
    cpus: int,
    gpus: float,
    slower: float = 1.0,
) -> dict[str, Any]:
    """Seconds of one worker for all of it; the peak that the first work is held against, its dtype,
    and the utilisation: assumed of a GPU, on a CPU what comes out."""
    dtype = works[0].dtype
    peak = place.flops(cpus, gpus, dtype)
    worked = seconds_of(works, place, cpus, gpus, used)
    worked = None if worked is None else worked * slower
    if not gpus and worked and peak:
        used = sum(work.flops for work in works) / (worked * peak)
    return {"worked_s": worked, "dtype": dtype, "peak_flops": peak, "utilisation": used}


def break_even(
    models: Models, spec: JobSpec, tokens: Tokens, flops_per_second: float | None
) -> dict[str, Any]:
    """Compares teacher forward passes: once over what is captured of train, against over all that
    every student reads.

    Everything else is equal on both sides: the students' own passes, and the records of the
    held-out parts. flops_per_second: what the teacher gets of all workers of a capture; None where
    that is not known. passes: how often a student reads a captured token on average. students: the
    smallest number from which the cache is cheaper, n read > captured.
    """
    assert models.teacher is not None and spec.data is not None
    flops = models.teacher.forward_flops(spec.data.sequence_length)

    def hours(count: int) -> float | None:
        return None if flops_per_second is None else flops * count / flops_per_second / 3600

    return {
        "teacher_flops_per_token": flops,
        "cached_tokens": tokens.captured,
        "online_tokens_per_student": tokens.read,
        "cached_teacher_hours": hours(tokens.captured),
        "online_teacher_hours_per_student": hours(tokens.read),
        "passes": tokens.read / tokens.captured,
        "students": tokens.captured // tokens.read + 1,
    }
