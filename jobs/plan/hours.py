"""Seconds of each stage, from counts of operations and a utilisation that is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.workers import Group
from jobs.plan.needs import Models, Sharding, cell_gpus, is_online, swept
from jobs.plan.place import CORE_FLOPS, Place
from jobs.plan.shape import Shape
from jobs.plan.training import trained_parameters
from jobs.spec import JobSpec
from quant.grid import allocated_keys, grid, main_model

# Model FLOPs utilisation (Chowdhery et al., 2022, PaLM, section 4.1): operations that the model
# needs over the device's peak. Dense training reaches 40 to 50 % on one node of fast links; sharded
# weights travel before they are used.
UTILISATION = {
    "capture": 0.40,
    "capture, zero3": 0.30,
    "training": 0.38,
    "training, zero3": 0.33,
    "sweep": 0.30,
    "cpu": 0.35,
}
# A start of a worker group (processes, imports, process group, reading the models), and of tasks.
START_S, TASKS_S = 25.0, 10.0
# hqq per billion weights: a GPU, and one CPU core in slices of rows (docs/quantization.md).
QUANTIZE_S, QUANTIZE_CPU_S = 4.0, 141.0
# A cell beside that: start, writing, the exclusive pass of speeds (3 s in the demo).
CELL_S = 4.0


@dataclass(frozen=True)
class Tokens:
    """Tokens that are worked on. captured: of train, each once; read: by one training; held_out:
    of select and report; select: of select alone."""

    captured: int
    read: int
    held_out: int
    select: int


def utilisation(key: str, cuda: bool, sharded: bool = False) -> float:
    """Of a stage on GPUs, or on CPUs."""
    return UTILISATION["cpu"] if not cuda else UTILISATION[f"{key}, zero3" if sharded else key]


def capture_seconds(
    models: Models, spec: JobSpec, place: Place, group: Group, sharding: Sharding, tokens: Tokens
) -> dict[str, Any]:
    """The teacher once over train and the held-out parts."""
    assert models.teacher is not None and spec.data is not None
    flops = models.teacher.forward_flops(spec.data.sequence_length)
    flops *= tokens.captured + tokens.held_out
    used = utilisation("capture", group.gpus > 0, sharding.over > 1)
    return _told(flops, used, place, group)


def distill_seconds(
    models: Models, spec: JobSpec, place: Place, group: Group, tokens: Tokens
) -> dict[str, Any]:
    """Student, and control where there is one; with the teacher's forward passes where it runs
    beside the student; evaluations on select."""
    distill = spec.distill
    assert distill is not None and spec.data is not None
    length = spec.data.sequence_length
    per_token = training_flops(models.student, spec)
    forward = models.student.forward_flops(length)
    evaluations = (
        1 if distill.evaluate_steps is None else distill.steps / int(distill.evaluate_steps)
    )
    flops = per_token * tokens.read + forward * tokens.select * evaluations
    flops *= 1 + distill.control
    if is_online(spec):
        assert models.teacher is not None
        flops += models.teacher.forward_flops(length) * tokens.read
    used = utilisation("training", group.gpus > 0, distill.zero_stage == 3)
    return _told(flops, used, place, group)


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
    slots = max(1, place.cluster.room(cpus, gpus))
    rate = _rate(place, cpus, gpus)
    shapes, length = swept(models, spec), spec.data.sequence_length
    quantize = QUANTIZE_S if gpus else QUANTIZE_CPU_S / cpus
    busy = cells = 0.0
    for cell in grid(sweep):
        shape = shapes[cell.model]
        flops = shape.forward_flops(length) * tokens.held_out
        if cell.recovered and sweep.recover is not None:
            read = sweep.recover.steps * sweep.recover.batch_sequences * length
            flops += 3 * shape.forward_flops(length) * read
        busy += CELL_S + quantize * shape.parameters / 1e9 + (flops / rate if rate else 0.0)
        cells += 1
    if allocated_keys(sweep):
        shape = shapes[main_model(sweep)]
        choices = len(sweep.bits) * len(sweep.group_sizes) * sum(m.count for m in shape.matrices)
        # The layers before the one that changes are computed once: half a pass on average.
        flops = choices * shape.forward_flops(length) * tokens.select / 2
        busy += (flops / rate if rate else 0.0) + CELL_S * len(allocated_keys(sweep))
        cells += len(allocated_keys(sweep))
    at_once = min(slots, max(1, int(cells)))
    seconds = None if rate is None else TASKS_S + busy / at_once
    return {
        "seconds": None if seconds is None else round(seconds, 1),
        "device": "gpu" if gpus else "cpu",
        "device_hours": None if rate is None else busy * (gpus or cpus) / 3600,
        "utilisation": utilisation("sweep", bool(gpus)),
        "slots": slots,
    }


def _rate(place: Place, cpus: int, gpus: float) -> float | None:
    """Operations per second of one cell."""
    if not gpus:
        return CORE_FLOPS * cpus * utilisation("sweep", False)
    return None if place.gpu is None else place.gpu.flops * gpus * utilisation("sweep", True)


def _told(flops: float, used: float, place: Place, group: Group) -> dict[str, Any]:
    peak = place.flops(group)
    seconds = None
    if peak is not None:
        seconds = START_S + flops / (peak * used * group.workers)
    devices = group.workers * (group.gpus or group.cpus)
    return {
        "seconds": seconds,
        "flops": flops,
        "device": "gpu" if group.gpus else "cpu",
        "device_hours": None if seconds is None else seconds * devices / 3600,
        "utilisation": used,
    }
