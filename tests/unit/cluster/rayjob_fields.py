"""The fields of a RayJob that Stillhouse writes, and the whole CRD made strict.

An API server drops fields that it does not know without a word, so that a misspelt one would only
show in a cluster. `FIELDS` is closed: what is not in it is a fault. `STILLHOUSE_RAYJOB_CRD`, a file
`ray-operator/config/crd/bases/ray.io_rayjobs.yaml` of KubeRay, has all of them checked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

CRD = os.environ.get("STILLHOUSE_RAYJOB_CRD")

TEXT, WHOLE, FLAG = "string", "integer", "boolean"


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others; types stand for themselves."""
    return {
        "type": "object",
        "properties": {key: _typed(value) for key, value in properties.items()},
        "required": required.split(),
        "additionalProperties": False,
    }


def many(item: Any) -> dict[str, Any]:
    """A list that is not empty."""
    return {"type": "array", "items": _typed(item), "minItems": 1}


def texts() -> dict[str, Any]:
    """Names with texts."""
    return {"type": "object", "additionalProperties": {"type": "string"}}


def _typed(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


AMOUNTS = texts()
POD_SECURITY = closed(
    runAsNonRoot=FLAG,
    runAsUser=WHOLE,
    runAsGroup=WHOLE,
    fsGroup=WHOLE,
    fsGroupChangePolicy=TEXT,
    seccompProfile=closed("type", type=TEXT),
)
CONTAINER = closed(
    "name image resources securityContext",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=TEXT,
    resources=closed(requests=AMOUNTS, limits=AMOUNTS),
    securityContext=closed(
        allowPrivilegeEscalation=FLAG, runAsNonRoot=FLAG, capabilities=closed(drop=many(TEXT))
    ),
    env=many(
        closed(
            "name valueFrom",  # never a value
            name=TEXT,
            valueFrom=closed(secretKeyRef=closed("name key", name=TEXT, key=TEXT)),
        )
    ),
    lifecycle=closed(preStop=closed(exec=closed("command", command=many(TEXT)))),
    volumeMounts=many(closed("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
POD = closed(
    "containers securityContext",
    automountServiceAccountToken=FLAG,
    serviceAccountName=TEXT,
    securityContext=POD_SECURITY,
    containers=many(CONTAINER),
    terminationGracePeriodSeconds=WHOLE,
    restartPolicy=TEXT,
    volumes=many(
        closed(
            "name",
            name=TEXT,
            emptyDir=closed(medium=TEXT, sizeLimit=TEXT),
            persistentVolumeClaim=closed("claimName", claimName=TEXT),
            configMap=closed("name", name=TEXT),
        )
    ),
    nodeSelector=texts(),
    tolerations=many(closed(key=TEXT, operator=TEXT, effect=TEXT)),
)
TEMPLATE = closed("spec", spec=POD)
METADATA = closed("name labels", name=TEXT, namespace=TEXT, labels=texts())
FIELDS = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=METADATA,
    spec=closed(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        suspend=FLAG,
        backoffLimit=WHOLE,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=WHOLE,
        submitterPodTemplate=TEMPLATE,
        rayClusterSpec=closed(
            "rayVersion headGroupSpec workerGroupSpecs",
            rayVersion=TEXT,
            authOptions=closed("mode", mode={"enum": ["disabled", "token"]}),
            headGroupSpec=closed(
                "rayStartParams template", rayStartParams=texts(), template=TEMPLATE
            ),
            workerGroupSpecs=many(
                closed(
                    "groupName minReplicas maxReplicas template",
                    groupName=TEXT,
                    replicas=WHOLE,
                    minReplicas=WHOLE,
                    maxReplicas=WHOLE,
                    rayStartParams=texts(),
                    template=TEMPLATE,
                )
            ),
        ),
    ),
)


def whole_crd() -> dict[str, Any]:
    """The schema of ray.io/v1 in the file STILLHOUSE_RAYJOB_CRD, made strict."""
    assert CRD is not None
    definition = yaml.load(Path(CRD).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    versions = definition["spec"]["versions"]
    (schema,) = [each["schema"] for each in versions if each["name"] == "v1"]
    made: dict[str, Any] = strict(schema["openAPIV3Schema"])
    made["properties"]["metadata"] = METADATA  # the API server's own, which no CRD spells out
    return made


def strict(schema: Any) -> Any:
    """A structural schema in which fields that are not in it are faults."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: strict(each) for name, each in value.items()}
        elif key not in ("description", "default"):
            made[key] = strict(value)
    is_open = made.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in made and not is_open:
        made.setdefault("additionalProperties", False)
    return made


def unknown_to(fields: dict[str, Any], crd: dict[str, Any], at: str = "") -> list[str]:
    """Paths of `fields` that the CRD lacks or gives another type; quantities may be texts."""
    if "items" in fields:
        return unknown_to(fields["items"], crd.get("items", {}), f"{at}[]")
    wrong = []
    for name, field in fields.get("properties", {}).items():
        there = crd.get("properties", {}).get(name)
        path = f"{at}.{name}"
        if there is None:
            wrong.append(path)
            continue
        mine, theirs = field.get("type"), there.get("type")
        if mine and theirs and mine != theirs:
            wrong.append(f"{path}: {mine}, not {theirs}")
        wrong += unknown_to(field, there, path)
    return wrong
