"""Which ranks share one copy of the teacher: each alone, those of a node, or all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.storage.store import format_bytes

if TYPE_CHECKING:  # a plan asks for the arithmetic alone
    from trainer.worker import Worker

# Share of the memory of those who hold a teacher that its weights may take.
FITS = 0.6
# Where a container's limit stands; the machine's own memory may be larger.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(worker: Worker) -> float:
    """Bytes of memory that one worker can count on: its GPU's, or its share of the host's."""
    if worker.device.type == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(worker.device).total_memory)
    return host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", worker.world))


def host_memory() -> float:
    """Bytes of memory of this machine, or of the container that this process is in."""
    import psutil

    limits = [float(psutil.virtual_memory().total)]
    for path in map(Path, LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        if text != "max":
            limits.append(float(text))
    return min(limits)


def training_bytes(
    weights: float,
    trained: float,
    largest: float,
    *,
    itemsize: int,
    zero_stage: int,
    world: int,
    offloaded: bool,
) -> float:
    """Bytes that the training states of a model need on one of `world` ranks.

    weights: parameters of the model; trained: those that learn; largest: of its largest layer.
    itemsize: bytes of one weight. Per trained parameter a gradient of float32 beside that of the
    weights' own type, and 12 bytes of master weight and Adam's moments. ZeRO stage 1 shares out the
    12 bytes, stage 2 also the gradients, stage 3 also the weights, but for the largest layer, which
    is gathered (Rajbhandari et al., 2020, ZeRO, section 5). offloaded: the 12 bytes and the float32
    gradients are in the host's memory, not the GPU's. Activations are not in it.
    """
    gradient, states = 4.0, 12.0
    if offloaded:
        gradient = states = 0.0
    if zero_stage == 1:
        return itemsize * weights + (itemsize + gradient + states / world) * trained
    if zero_stage == 2:
        return itemsize * weights + (itemsize + gradient + states) / world * trained
    shared = itemsize * weights + (itemsize + gradient + states) * trained
    return shared / world + itemsize * largest


def groups_for(
    sharding: str,
    weights: float,
    largest: float,
    memory: Sequence[float],
    nodes: Sequence[Sequence[int]],
    *,
    stage: str = "capture",
    reserve: float = 0.0,
) -> list[list[int]]:
    """The groups of ranks that share a copy; groups of one where every rank has its own.

    weights, largest: bytes of the whole teacher and of its largest layer, which a rank needs beside
    its share. memory: bytes by rank; reserve: of each, for something else. nodes: ranks by node. A
    copy is spread over as few as possible: every layer travels between those who share it, once per
    forward pass. Raises ValueError, one line, where all ranks together have too little memory, and
    where one rank has nobody to share with.
    """
    ranks = range(len(memory))
    alone = [[rank] for rank in ranks]
    key = f"resources.{stage}"

    def fit(groups: Sequence[Sequence[int]], share: float) -> bool:
        return all(
            weights / len(group) + (largest if len(group) > 1 else 0)
            <= share * (min(memory[rank] for rank in group) - reserve)
            for group in groups
        )

    if sharding == "none":
        return alone
    if sharding == "zero3" and len(memory) == 1:
        raise ValueError(
            f"teacher.sharding: zero3 needs at least 2 workers; set {key}.workers, or "
            "sharding: none"
        )
    if sharding == "auto" and fit(alone, FITS):
        return alone
    within = [list(node) for node in nodes]
    if max(map(len, within)) > 1 and fit(within, FITS):
        return within
    everyone = [list(ranks)]
    if not fit(everyone, 1.0):
        many = len(memory) > 1
        layer = f" and {format_bytes(largest)} for the largest layer" if many else ""
        reserved = (
            f", of which the student's training takes {format_bytes(reserve)}" if reserve else ""
        )
        raise ValueError(
            f"teacher.model: {format_bytes(weights)} of weights{layer} do not fit {len(memory)} "
            f"worker{'s' if many else ''} of {format_bytes(min(memory))}{reserved}; give {key} "
            "more workers"
        )
    return everyone
