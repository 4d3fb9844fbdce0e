"""A job as KubeRay runs it: a ConfigMap with the spec, and a RayJob, as plain dictionaries.

Fields are those of `ray.io/v1` in KubeRay 1.5.1 and later. Knows nothing of models: it is told
what to start, on how many pods of which size.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

SPEC_FOLDER = "/etc/stillhouse"
SPEC_FILE = "spec.yaml"
# For a checkpoint to be written; preStop ends before, so that the pod is never killed in it.
GRACE_S = 600
STOP_S = 560
USER = 1000  # of the image
HEAD_CPUS, HEAD_MEMORY, HEAD_SHM_BYTES = 4, "16Gi", 4 << 30
GPU = "nvidia.com/gpu"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

Object = dict[str, Any]


@dataclass(frozen=True)
class Secret:
    """An environment variable whose value is the key of a Kubernetes secret."""

    variable: str
    secret: str
    key: str


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim, and where all pods have it."""

    claim: str
    path: str


@dataclass(frozen=True)
class Pods:
    """Worker pods, all alike. shm_bytes: of /dev/shm, which counts as memory of the pod."""

    count: int
    gpus: int
    cpus: int
    memory: str
    shm_bytes: int
    gpu_label: tuple[str, str] | None = None  # node label and value, where the pods may go


@dataclass(frozen=True)
class Job:
    """What is to run, and how KubeRay is to treat it.

    name: of at most 47 characters, a DNS-1035 label, as KubeRay derives longer ones from it.
    """

    name: str
    image: str
    entrypoint: str
    spec: str
    ray_version: str
    pods: Pods
    secrets: tuple[Secret, ...] = ()
    volumes: tuple[Volume, ...] = ()
    suspend: bool = False
    queue: str | None = None
    ttl_s: int = 60
    retries: int = 0
    service_account: str | None = None
    namespace: str | None = None


def config_map(job: Job) -> Object:
    """The ConfigMap that holds the spec."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, f"{job.name}-spec"),
        "data": {SPEC_FILE: job.spec},
    }


def ray_job(job: Job) -> Object:
    """The RayJob: one cluster for this job alone, without autoscaling."""
    metadata = _metadata(job, job.name)
    if job.queue is not None:
        metadata["labels"][QUEUE_LABEL] = job.queue
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": job.entrypoint,
            "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{STOP_S}"\n',
            "suspend": job.suspend,
            "backoffLimit": job.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": job.ttl_s,
            "submitterPodTemplate": {"spec": _submitter(job)},
            "rayClusterSpec": {
                "rayVersion": job.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": _head(job),
                "workerGroupSpecs": [_workers(job)],
            },
        },
    }


def _metadata(job: Job, name: str) -> Object:
    metadata: Object = {"name": name}
    if job.namespace is not None:
        metadata["namespace"] = job.namespace
    metadata["labels"] = {
        "app.kubernetes.io/name": "stillhouse",
        "app.kubernetes.io/instance": job.name,
    }
    return metadata


def _head(job: Job) -> Object:
    stop = ("--", *shlex.split(job.entrypoint))
    container = _container(job, "ray-head", HEAD_CPUS, HEAD_MEMORY, 0, stop)
    container["volumeMounts"].append({"name": "spec", "mountPath": SPEC_FOLDER, "readOnly": True})
    pod = _pod(job, container, HEAD_SHM_BYTES)
    pod["volumes"].append({"name": "spec", "configMap": {"name": f"{job.name}-spec"}})
    return {
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",
            "num-cpus": "0",
            "object-store-memory": str(HEAD_SHM_BYTES // 2),
        },
        "template": {"spec": pod},
    }


def _workers(job: Job) -> Object:
    pods = job.pods
    container = _container(job, "ray-worker", pods.cpus, pods.memory, pods.gpus)
    pod = _pod(job, container, pods.shm_bytes)
    if pods.gpu_label is not None:
        pod["nodeSelector"] = dict([pods.gpu_label])
    if pods.gpus:
        pod["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": "workers",
        "replicas": pods.count,
        "minReplicas": pods.count,
        "maxReplicas": pods.count,
        "rayStartParams": {"object-store-memory": str(pods.shm_bytes // 2)},
        "template": {"spec": pod},
    }


def _pod(job: Job, container: Object, shm_bytes: int) -> Object:
    pod = _bare_pod(job, container)
    pod["terminationGracePeriodSeconds"] = GRACE_S
    memory = {"medium": "Memory", "sizeLimit": str(shm_bytes)}
    pod["volumes"] = [{"name": "shared-mem", "emptyDir": memory}]
    pod["volumes"] += [
        {"name": _volume_name(number), "persistentVolumeClaim": {"claimName": volume.claim}}
        for number, volume in enumerate(job.volumes)
    ]
    return pod


def _bare_pod(job: Job, container: Object) -> Object:
    pod: Object = {"automountServiceAccountToken": False}
    if job.service_account is not None:
        pod["serviceAccountName"] = job.service_account
    pod["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod["containers"] = [container]
    return pod


def _container(
    job: Job, name: str, cpus: int, memory: str, gpus: int, stop: tuple[str, ...] = ()
) -> Object:
    command = ["python", "-m", "cluster.prestop", "--seconds", str(STOP_S), *stop]
    container = _bare_container(job, name, cpus, memory, gpus)
    if job.secrets:
        container["env"] = [
            {
                "name": secret.variable,
                "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}},
            }
            for secret in job.secrets
        ]
    container["lifecycle"] = {"preStop": {"exec": {"command": command}}}
    container["volumeMounts"] = [{"name": "shared-mem", "mountPath": "/dev/shm"}]
    container["volumeMounts"] += [
        {"name": _volume_name(number), "mountPath": volume.path}
        for number, volume in enumerate(job.volumes)
    ]
    return container


def _bare_container(job: Job, name: str, cpus: int, memory: str, gpus: int) -> Object:
    amounts: Object = {"cpu": str(cpus), "memory": memory}
    if gpus:
        amounts[GPU] = str(gpus)
    return {
        "name": name,
        "image": job.image,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _submitter(job: Job) -> Object:
    # KubeRay's own has no security context, and is refused where namespaces ask for one.
    pod = _bare_pod(job, _bare_container(job, "ray-job-submitter", 1, "1Gi", 0))
    pod["restartPolicy"] = "Never"
    return pod


def _volume_name(number: int) -> str:
    return f"shared-{number}"
