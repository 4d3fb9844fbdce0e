"""Worker pods: how many and how large, and whether they can reach what the spec names.

Reachable is what has a URL, lies on the hub, or below a --pvc mount.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.kuberay import Pods, Secret, Volume
from cluster.spec import WorkerResources
from jobs.kubernetes.options import GPU_PRODUCT, Fault, below, kept, read_bytes, read_gpu_type
from jobs.spec import job
from jobs.spec.job import JobSpec
from trainer.spec.responses import AnswersEndpoint

MACHINE_GPUS = 8  # of the usual machine
CPUS_PER_GPU = 8
MEMORY_PER_GPU_GI = 64
CPU_POD = (4, "32Gi")


@dataclass(frozen=True)
class Asked:
    """The options about pods as they were given; None where they were not."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    cpus: int | None = None
    memory: str | None = None
    shm: str = "16Gi"


def size(spec: JobSpec, asked: Asked, faults: list[str]) -> Pods:
    """The worker pods; what cannot be is added to `faults`, one line each."""
    label = kept(faults, lambda: read_gpu_type(asked.gpu_type), None)
    gpus = kept(faults, lambda: _gpus_per_node(spec, asked), 0)
    nodes = asked.nodes or max(1, -(-_gpu_workers(spec) // gpus) if gpus else 1)
    if gpus and nodes > 1 and asked.gpu_type is None:
        faults.append(
            f"--gpu-type: needed with {nodes} nodes of GPUs, so that all have the same; may be a "
            f"value of the node label {GPU_PRODUCT} (kubectl get nodes -L {GPU_PRODUCT})"
        )
    if asked.gpu_type is not None and not gpus:
        faults.append("--gpu-type: has no meaning without GPUs; give --gpus-per-node, or leave it")
    cpus = asked.cpus or (CPUS_PER_GPU * gpus if gpus else max(CPU_POD[0], _most_cpus(spec, nodes)))
    memory = asked.memory or (f"{MEMORY_PER_GPU_GI * gpus}Gi" if gpus else CPU_POD[1])
    shm_bytes = kept(faults, lambda: read_bytes("--shm", asked.shm), 0)
    memory_bytes = kept(faults, lambda: read_bytes("--memory", memory), 0)
    if shm_bytes >= memory_bytes > 0:
        faults.append(
            f"--shm: got {asked.shm}, which counts as memory of a pod of {memory}; may be less, or "
            "give more --memory"
        )
    pods = Pods(nodes, gpus, cpus, memory, shm_bytes, label)
    if not faults:
        faults.extend(_misfits(spec, pods))
    return pods


def _stages(spec: JobSpec) -> Iterator[tuple[str, WorkerResources]]:
    """The stages of Ray Train workers that this job has."""
    if spec.teacher is not None:
        yield "capture", spec.resources.capture
    if spec.distill is not None:
        yield "distill", spec.resources.distill


def _gpus_per_node(spec: JobSpec, asked: Asked) -> int:
    if asked.gpus_per_node is not None:
        return asked.gpus_per_node
    wishes = [workers.gpus_per_worker for _, workers in _stages(spec)]
    cell = spec.resources.sweep.gpus_per_cell if spec.sweep is not None else 0
    if 1 in wishes or (cell != "auto" and cell > 0):
        most = max(_gpu_workers(spec), 1 if cell == "auto" else int(cell + 0.999))
        return min(MACHINE_GPUS, -(-most // (asked.nodes or 1)))
    if wishes and all(wish == 0 for wish in wishes):
        return 0
    raise Fault(
        "--gpus-per-node: needed, as resources leaves GPUs to the cluster (auto); may be the GPUs "
        "of one machine, e.g. 8, or 0"
    )


def _gpu_workers(spec: JobSpec) -> int:
    """The most workers with a GPU each that a stage is to have; 1 where the cluster decides."""
    return max((_most(w) for _, w in _stages(spec) if w.gpus_per_worker != 0), default=1)


def _most_cpus(spec: JobSpec, nodes: int) -> int:
    """CPUs that a node needs for its share of the workers of a stage."""
    return max(
        (
            -(-_most(workers) // nodes) * workers.cpus_per_worker
            for _, workers in _stages(spec)
            if workers.cpus_per_worker != "auto"
        ),
        default=1,
    )


def _most(workers: WorkerResources) -> int:
    if workers.workers == "auto":
        return 1
    return workers.workers[1] if isinstance(workers.workers, tuple) else workers.workers


def _fewest(workers: WorkerResources) -> int:
    return workers.workers[0] if isinstance(workers.workers, tuple) else _most(workers)


def _misfits(spec: JobSpec, pods: Pods) -> Iterator[str]:
    """Stages that would wait for ever on these pods."""
    there = f"{pods.count} nodes of {pods.gpus} GPUs and {pods.cpus} CPUs"
    for stage, workers in _stages(spec):
        on_gpus = pods.gpus > 0 if workers.gpus_per_worker == "auto" else workers.gpus_per_worker
        each = 1 if workers.cpus_per_worker == "auto" else workers.cpus_per_worker
        space = pods.cpus // each
        if on_gpus:
            space = min(space, pods.gpus)
        if space * pods.count < _fewest(workers):
            yield (
                f"resources.{stage}: {_fewest(workers)} workers of {each} CPUs and "
                f"{int(on_gpus)} GPUs do not fit on {there}; give more --nodes, --gpus-per-node or "
                f"--cpus, or set resources.{stage}.workers lower"
            )
    cell = spec.resources.sweep
    if spec.sweep is not None and cell.gpus_per_cell != "auto" and cell.gpus_per_cell > pods.gpus:
        yield (
            f"resources.sweep.gpus_per_cell: got {cell.gpus_per_cell:g}, and a node has "
            f"{pods.gpus} GPUs; give more --gpus-per-node, or set it lower"
        )
    if spec.sweep is not None and cell.cpus_per_cell != "auto" and cell.cpus_per_cell > pods.cpus:
        yield (
            f"resources.sweep.cpus_per_cell: got {cell.cpus_per_cell}, and a node has {pods.cpus} "
            "CPUs; give more --cpus, or set it lower"
        )


_LOCAL = ("file", "local", "memory")


def reach_faults(spec: JobSpec, volumes: Sequence[Volume], secrets: Sequence[Secret]) -> list[str]:
    """One line for everything that the pods could not read, or must not be told."""
    faults = [_storage_fault(spec.storage, volumes)]
    for key, model in job.named_models(spec):
        if "://" in model:
            faults.append(_credentials_fault(key, model))
        elif job.is_folder(model):
            faults.append(_local_fault(key, model, volumes, "a hub id or a URL"))
    for key, path in job.named_sources(spec):
        faults.append(_local_fault(key, path, volumes, "a hub data set"))
    for key, path, instead in job.named_files(spec):
        faults.append(_local_fault(key, path, volumes, instead))
    faults.append(_api_key_fault(spec, secrets))
    return [fault for fault in faults if fault is not None]


def _storage_fault(storage: str, volumes: Sequence[Volume]) -> str | None:
    protocol, mark, rest = storage.partition("://")
    if mark and protocol not in _LOCAL:
        return _credentials_fault("storage", storage)
    if protocol != "memory" and _mounted(rest if mark else storage, volumes):
        return None
    return (
        f"storage: got {storage}, which the pods do not share; may be a URL (storage=s3://BUCKET/"
        "PREFIX) or a folder below a shared volume (--pvc CLAIM:/mnt/shared storage=/mnt/shared/"
        "runs)"
    )


def _local_fault(key: str, path: str, volumes: Sequence[Volume], instead: str) -> str | None:
    if _mounted(path, volumes):
        return None
    ways = f"{instead}, or " if instead else ""
    return (
        f"{key}: got {path}, which the pods do not have; may be {ways}a path below a shared volume "
        "(--pvc CLAIM:/mnt/shared)"
    )


def _credentials_fault(key: str, url: str) -> str | None:
    parts = urlsplit(url)
    if "@" not in parts.netloc and not parts.query:
        return None
    host = parts.netloc.rpartition("@")[2]
    return (
        f"{key}: has credentials or a query in the URL, which all who see the manifest could read; "
        f"may be {parts.scheme}://{host}{parts.path}, with --secret or --service-account"
    )


def _api_key_fault(spec: JobSpec, secrets: Sequence[Secret]) -> str | None:
    origin = spec.responses.origin if spec.responses else None
    variable = origin.api_key_env if isinstance(origin, AnswersEndpoint) else None
    if variable is None or any(secret.variable == variable for secret in secrets):
        return None
    return (
        f"responses.from.api_key_env: {variable} is not set in the pods; give "
        f"--secret {variable}=SECRET/KEY"
    )


def _mounted(path: str, volumes: Sequence[Volume]) -> bool:
    normal = posixpath.normpath(path)
    return normal.startswith("/") and any(below(normal, volume.path) for volume in volumes)
