"""A RayJob has only fields that KubeRay knows, and what a cluster that is shared asks of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from cluster.kuberay import GRACE_S, STOP_S, Job, Pods, Secret, Volume, config_map, ray_job
from tests.fixtures import rayjob_fields as fields

PLAIN = Job("a-run", "reg.example.com/s:1", "python -m jobs run x", "name: a-run\n", "2.60.0",
            Pods(1, 0, 4, "32Gi", 1 << 30))  # fmt: skip
FULL = dataclasses.replace(
    PLAIN,
    pods=Pods(2, 8, 64, "512Gi", 16 << 30, ("nvidia.com/gpu.product", "NVIDIA-H100-80GB-HBM3")),
    secrets=(Secret("HF_TOKEN", "hugging-face", "token"), Secret("KEY", "w", "k")),
    volumes=(Volume("shared", "/mnt/shared"), Volume("data", "/mnt/data")),
    suspend=True,
    queue="gpus",
    ttl_s=600,
    retries=3,
    service_account="trainer",
    namespace="research",
)


@pytest.fixture(scope="module", params=["written", "whole"])
def schema(request: pytest.FixtureRequest) -> Any:
    if request.param == "written":
        return jsonschema.Draft202012Validator(fields.FIELDS)
    if fields.CRD is None:
        pytest.skip("STILLHOUSE_RAYJOB_CRD names no file of KubeRay's CRD")
    return jsonschema.Draft202012Validator(fields.whole_crd())


@pytest.mark.parametrize("job", [PLAIN, FULL], ids=["plain", "full"])
def test_every_field_is_known_and_of_its_type(schema: Any, job: Job) -> None:
    assert [error.message for error in schema.iter_errors(ray_job(job))] == []


def _keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from _keys(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _keys(item, (*path, number))


def _free(path: tuple[Any, ...]) -> bool:
    """Keys below these are names that anyone may choose."""
    names = {"labels", "nodeSelector", "requests", "limits", "rayStartParams"}
    return bool(names & set(path[:-1]))


def test_every_misspelt_field_is_found(schema: Any) -> None:
    right = ray_job(FULL)
    paths = [path for path in _keys(right) if not _free(path)]
    assert len(paths) > 100
    for path in paths:
        wrong = copy.deepcopy(right)
        at: Any = wrong
        for step in path[:-1]:
            at = at[step]
        at[f"{path[-1]}x"] = at.pop(path[-1])
        assert not schema.is_valid(wrong), path


@pytest.mark.skipif(fields.CRD is None, reason="STILLHOUSE_RAYJOB_CRD names no file")
def test_the_fields_written_here_are_those_of_the_crd() -> None:
    crd = fields.whole_crd()
    assert fields.unknown_to(fields.FIELDS, crd) == []
    wrong = copy.deepcopy(fields.FIELDS)
    wrong["properties"]["spec"]["properties"]["backofLimit"] = {"type": "integer"}
    assert fields.unknown_to(wrong, crd) == [".spec.backofLimit"]


def _pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("job", [PLAIN, FULL], ids=["plain", "full"])
def test_no_pod_has_more_rights_than_it_needs(job: Job) -> None:
    made = ray_job(job)
    for pod in [*_pods(made), made["spec"]["submitterPodTemplate"]["spec"]]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_head_takes_no_work_and_no_gpu() -> None:
    head = ray_job(FULL)["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    limits = head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert set(limits) == {"cpu", "memory"}


def test_ray_asks_for_a_token() -> None:
    cluster = ray_job(PLAIN)["spec"]["rayClusterSpec"]
    # KubeRay refuses the mode without a version.
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == "2.60.0"


def test_worker_pods_are_alike_and_on_one_type_of_gpu() -> None:
    (group,) = ray_job(FULL)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    pod = group["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_shared_memory_holds_the_object_store_twice() -> None:
    cluster = ray_job(FULL)["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (memory,) = [each["emptyDir"] for each in pod["volumes"] if "emptyDir" in each]
        assert memory["medium"] == "Memory"
        assert int(memory["sizeLimit"]) == 2 * int(group["rayStartParams"]["object-store-memory"])
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/dev/shm"


def test_secrets_are_references_in_all_pods() -> None:
    for pod in _pods(ray_job(FULL)):
        assert pod["containers"][0]["env"][0] == {
            "name": "HF_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token"}},
        }


def test_every_mount_has_its_volume() -> None:
    for pod in _pods(ray_job(FULL)):
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_is_not_killed_while_it_waits_for_a_checkpoint() -> None:
    assert STOP_S < GRACE_S
    head, worker = _pods(ray_job(FULL))
    hooks = [
        pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] for pod in (head, worker)
    ]
    assert hooks[0][-5:] == ["python", "-m", "jobs", "run", "x"] and hooks[1][-1] == str(STOP_S)
    assert head["terminationGracePeriodSeconds"] == GRACE_S


def test_the_spec_is_where_the_entry_point_looks() -> None:
    made = config_map(FULL)
    assert made["data"] == {"spec.yaml": "name: a-run\n"}
    head = _pods(ray_job(FULL))[0]
    assert {"name": "spec", "configMap": {"name": made["metadata"]["name"]}} in head["volumes"]
    assert made["metadata"]["namespace"] == "research"


def test_queue_and_suspension_are_the_jobs() -> None:
    made = ray_job(FULL)
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["spec"]["suspend"] is True
    # KubeRay and Kueue take no job that can be suspended but outlives its end.
    assert made["spec"]["shutdownAfterJobFinishes"] is True
