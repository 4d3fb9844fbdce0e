"""A spec as another machine can use it: nothing in it is a file of this one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.storage import open_store
from jobs.errors import SpecErrors
from jobs.pipeline.pipeline import Job
from jobs.spec.job import JobSpec, is_folder, named_files, named_models, named_sources
from trainer.resolve_auto import undecided_dtypes, with_auto


def portable(job: Job, shared: Sequence[str]) -> JobSpec:
    """The job's spec for a cluster; `shared`: folders that all its machines have in one place.

    A student's config file is written into the spec. Local sources may stay where the corpus is
    made already: the spec then names it. Raises SpecErrors, a line for every local path.
    """
    spec = _inline(_as_asked(job))
    folders = [Path(folder).expanduser().resolve() for folder in shared]
    faults = [
        f"--shared: {folder} is no folder here; may be one that this machine and all nodes mount "
        "at the same path"
        for folder in folders
        if not folder.is_dir()
    ]
    if not _lies_in(open_store(spec.storage).local(), folders):
        faults.append(
            f"storage: {spec.storage} is a folder of this machine; may be a URL such as "
            f"storage=s3://bucket/prefix, or below a folder that all nodes mount: "
            f"--shared {open_store(spec.storage).local()}"
        )
    named = [(key, model) for key, model in named_models(spec) if is_folder(model)]
    named += [(key, path) for key, path, _ in named_files(spec)]
    for key, name in named:
        if not _lies_in(Path(name).expanduser(), folders):
            faults.append(
                f"{key}: {name} is of this machine; may be a hub id, or the URL of a copy in the "
                "storage (s3://bucket/prefix/model), or below a folder given by --shared"
            )
    local = [
        (key, path)
        for key, path in named_sources(spec)
        if not _lies_in(Path(path).expanduser(), folders)
    ]
    if local and "prepare" in job.selection.to_run:
        faults += [
            f"{key}: {path} is of this machine; prepare the corpus here first, into a storage that "
            "the cluster sees: stillhouse run SPEC --until prepare storage=s3://bucket/prefix, "
            "then submit with the same storage"
            for key, path in local
        ]
    elif local:
        assert spec.data is not None
        corpus = job.selection.outputs["prepare"]["corpus"]
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"corpus": corpus})})
    if faults:
        raise SpecErrors(faults)
    return _absolute(spec)


def _absolute(spec: JobSpec) -> JobSpec:
    """The spec with storage and sources named absolutely: a job runs in a folder of its own.

    Models and other files have been made so by `trainer.resolve_auto.resolve`.
    """
    update: dict[str, Any] = {}
    if open_store(spec.storage).local() is not None:
        update["storage"] = open_store(spec.storage).url
    if spec.data is not None:
        local = dict(named_sources(spec))
        train = [
            source.model_copy(update={"source": os.path.abspath(os.path.expanduser(source.source))})
            if f"data.train.{number}.source" in local
            else source
            for number, source in enumerate(spec.data.train)
        ]
        update["data"] = spec.data.model_copy(update={"train": train})
    return spec.model_copy(update=update)


def _as_asked(job: Job) -> JobSpec:
    """The resolved spec, but for each `auto` that follows the machines."""
    spec = with_auto(job.spec, undecided_dtypes(job.asked))
    if (asked := job.asked.distill) is None or spec.distill is None:
        return spec
    names = ("micro_batch", "activation_checkpointing")
    distill = spec.distill.model_copy(update={name: getattr(asked, name) for name in names})
    return spec.model_copy(update={"distill": distill})


def _lies_in(path: Path | None, folders: Sequence[Path]) -> bool:
    """Whether a path is no local one, or below one of `folders`."""
    if path is None:
        return True
    real = path.resolve()
    return any(real == folder or folder in real.parents for folder in folders)


def _inline(spec: JobSpec) -> JobSpec:
    """The spec with the student's config in it, where it is a file."""
    if not isinstance(spec.student.config, str):
        return spec
    try:
        config: dict[str, Any] = json.loads(Path(spec.student.config).read_text())
    except (OSError, ValueError) as error:
        raise SpecErrors(
            [f"student.config: {spec.student.config} cannot be read: {error}"]
        ) from None
    student = spec.student.model_copy(update={"config": config})
    return spec.model_copy(update={"student": student})
