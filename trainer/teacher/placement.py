"""Which ranks share one copy of the teacher: each alone, those of a node, or all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.worker import Worker

# Share of the memory of those who hold a teacher that its weights may take.
FITS = 0.6
# Where a container's limit stands; the machine's own memory may be larger.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(worker: Worker) -> float:
    """Bytes of memory that one worker can count on: its GPU's, or its share of the host's."""
    if worker.device.type == "cuda":
        return float(torch.cuda.get_device_properties(worker.device).total_memory)
    import psutil

    limits = [float(psutil.virtual_memory().total)]
    for path in map(Path, LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        if text != "max":
            limits.append(float(text))
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", worker.world))


def groups_for(
    sharding: str,
    weights: float,
    largest: float,
    memory: Sequence[float],
    nodes: Sequence[Sequence[int]],
) -> list[list[int]]:
    """The groups of ranks that share a copy; groups of one where every rank has its own.

    weights, largest: bytes of the whole teacher and of its largest layer, which a rank needs beside
    its share. memory: bytes by rank. nodes: ranks by node. A copy is spread over as few as
    possible: every layer travels between those who share it, once per forward pass. Raises
    ValueError, one line, where all ranks together have too little memory, and where one rank has
    nobody to share with.
    """
    ranks = range(len(memory))
    alone = [[rank] for rank in ranks]

    def fit(groups: Sequence[Sequence[int]], share: float) -> bool:
        return all(
            weights / len(group) + (largest if len(group) > 1 else 0)
            <= share * min(memory[rank] for rank in group)
            for group in groups
        )

    if sharding == "none":
        return alone
    if sharding == "zero3" and len(memory) == 1:
        raise ValueError(
            "teacher.sharding: zero3 needs at least 2 workers; set resources.capture.workers, or "
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
        layer = f" and {largest / 1e9:.1f} GB for the largest layer" if many else ""
        raise ValueError(
            f"teacher.model: {weights / 1e9:.1f} GB of weights{layer} do not fit {len(memory)} "
            f"worker{'s' if many else ''} of {min(memory) / 1e9:.1f} GB; give resources.capture "
            "more workers"
        )
    return everyone
