"""What a spec names must be in reach of every pod: by URL, on the hub, or below a --pvc mount."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from cluster.manifest import Secret, Volume
from jobs.manifests.options import below
from jobs.spec import JobSpec
from trainer.corpus.files import is_local
from trainer.spec import AnswersEndpoint, AnswersFile

_LOCAL = ("file", "local", "memory")


def reach_faults(spec: JobSpec, volumes: Sequence[Volume], secrets: Sequence[Secret]) -> list[str]:
    """One line for everything that the pods could not read, or must not be told."""
    faults = [_storage_fault(spec.storage, volumes)]
    for key, model in _models(spec):
        if "://" in model:
            faults.append(_credentials_fault(key, model))
        elif _is_folder(model):
            faults.append(_local_fault(key, model, volumes, "a hub id or a URL"))
    for key, path, instead in _files(spec):
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


def _models(spec: JobSpec) -> Iterable[tuple[str, str]]:
    if spec.teacher is not None:
        yield "teacher.model", spec.teacher.model
    if spec.student.model is not None:
        yield "student.model", spec.student.model
    for number, extra in enumerate(spec.sweep.extra if spec.sweep else ()):
        yield f"sweep.extra.{number}.path", extra.path


def _files(spec: JobSpec) -> Iterable[tuple[str, str, str]]:
    """Key, path, and what may stand there instead."""
    if isinstance(spec.student.config, str):
        yield "student.config", spec.student.config, "the values themselves"
    for number, source in enumerate(spec.data.train if spec.data else ()):
        if not source.source.startswith("builtin:") and is_local(source.source):
            yield f"data.train.{number}.source", source.source, "a hub data set"
    if spec.responses and isinstance(spec.responses.origin, AnswersFile):
        yield "responses.from.file", spec.responses.origin.file, ""
    for number, task in enumerate(spec.sweep.tasks if spec.sweep else ()):
        if task.folder is not None:
            yield f"sweep.tasks.{number}.folder", task.folder, "a task of lm-eval"


def _is_folder(model: str) -> bool:
    """As `trainer.models.find_model` tells a folder from a hub id."""
    return (
        model.startswith((".", "/", "~"))
        or model.count("/") != 1
        or Path(model).expanduser().is_dir()
    )


def _mounted(path: str, volumes: Sequence[Volume]) -> bool:
    normal = posixpath.normpath(path)
    return normal.startswith("/") and any(below(normal, volume.path) for volume in volumes)
