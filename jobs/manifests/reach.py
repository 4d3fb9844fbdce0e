"""What a spec names must be in reach of every pod: by URL, on the hub, or below a --pvc mount."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from urllib.parse import urlsplit

from cluster.manifest import Secret, Volume
from jobs import places
from jobs.manifests.options import below
from jobs.spec import JobSpec
from trainer.spec.sections import AnswersEndpoint

_LOCAL = ("file", "local", "memory")


def reach_faults(spec: JobSpec, volumes: Sequence[Volume], secrets: Sequence[Secret]) -> list[str]:
    """One line for everything that the pods could not read, or must not be told."""
    faults = [_storage_fault(spec.storage, volumes)]
    for key, model in places.models(spec):
        if "://" in model:
            faults.append(_credentials_fault(key, model))
        elif places.is_folder(model):
            faults.append(_local_fault(key, model, volumes, "a hub id or a URL"))
    for key, path in places.sources(spec):
        faults.append(_local_fault(key, path, volumes, "a hub data set"))
    for key, path, instead in places.others(spec):
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
