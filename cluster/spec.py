"""The spec sections that say where work runs: storage and resources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cluster.storage.section import Section

Auto = Literal["auto"]
# The bound stands on the number alone: one on the whole field would be compared with "auto" too.
Count = Annotated[int, Field(ge=1)]


class WorkerResources(Section):
    """Ray Train workers of one stage; how many may change while they work."""

    workers: Auto | Count | tuple[Count, Count] = Field(
        "auto",
        description="Number of workers, or [fewest, most]: as many as there is room for, fewer "
        "after a lost node and more when there is room again, each time from the newest "
        "checkpoint. auto: one per GPU of the cluster, or two on a cluster without GPUs (one "
        "where it has a single CPU).",
    )
    gpus_per_worker: Auto | Literal[0, 1] = Field(
        "auto", description="GPUs per worker, 0 or 1. auto: 1 where the cluster has GPUs, else 0."
    )
    cpus_per_worker: Auto | Count = Field(
        "auto",
        description="CPUs, and torch threads, per worker. auto: 1 beside a GPU, else the CPUs of "
        "the smallest node shared by its workers.",
    )

    @field_validator("workers")
    @classmethod
    def _fewest_first(cls, value: str | int | tuple[int, int]) -> str | int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"may be [fewest, most] workers, e.g. {sorted(value)}")
        return value


class CaptureResources(WorkerResources):
    """Ray Train workers that run the teacher."""

    workers: Auto | Count = Field(
        "auto",
        description="Number of workers. auto: one per GPU of the cluster, or two on a cluster "
        "without GPUs (one where it has a single CPU).",
    )
    batch_tokens: Auto | Count = Field(
        "auto",
        description="Tokens of one teacher forward pass on one worker. auto: 16,384; on CPUs as "
        "many as the teacher takes a few seconds for, so that progress shows and a stop is heard.",
    )
    shard_seconds: float = Field(
        20.0,
        gt=0,
        description="Records are published at least so often, in seconds: what a kill can cost.",
    )


class CellResources(Section):
    """One Ray task per cell of the sweep."""

    gpus_per_cell: Auto | Annotated[float, Field(ge=0)] = Field(
        "auto",
        description="GPUs per cell. auto: 1 where the cluster has GPUs and the model has at least "
        "100 million weights, else 0.",
    )
    cpus_per_cell: Auto | Count = Field(
        "auto",
        description="CPUs, and torch threads, per cell. auto: 1, but all of a machine for the pass "
        "of a 16-bit model of 10 million weights or more for which its cells wait.",
    )
    memory_gb_per_cell: Auto | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="Host memory per cell in GB (10^9 bytes): a cell waits until a node has it "
        "free, and is refused where none has so much. auto: foretold from the model's config.",
    )
    minutes_per_cell: float = Field(
        120.0,
        gt=0,
        description="A cell that takes longer is ended and recorded as failed, in minutes.",
    )


class ResourcesSpec(Section):
    """What each stage may take of the cluster. In no fingerprint: may change between runs."""

    capture: CaptureResources = Field(
        default_factory=CaptureResources, description="Workers of the capture stage."
    )
    distill: WorkerResources = Field(
        default_factory=WorkerResources, description="Workers of the distill stage."
    )
    sweep: CellResources = Field(
        default_factory=CellResources, description="Resources of one sweep cell."
    )
    max_failures: int = Field(
        3, ge=0, description="How often a lost worker or task is replaced before the run fails."
    )
    growth_minutes: float = Field(
        0.0,
        ge=0,
        description="How long a cluster that is too small for the job may take to grow, in "
        "minutes. 0: the job is refused at once.",
    )
    placement_minutes: float = Field(
        60.0,
        gt=0,
        description="How long workers may take to be placed and to start, in minutes; e.g. while "
        "other jobs hold the GPUs.",
    )
    collective_minutes: float = Field(
        30.0,
        gt=0,
        description="Ranks that wait for each other longer end with an error, in minutes.",
    )
