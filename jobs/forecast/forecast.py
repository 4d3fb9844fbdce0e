"""The forecast of a job as plain JSON data: for a place that is named, or the cluster of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.capacity import Group
from cluster.storage.keys import flatten
from jobs.errors import SpecErrors
from jobs.forecast import suggestions, time
from jobs.forecast.dtypes import decide_dtypes, training_device
from jobs.forecast.models import read_models, with_group_sizes
from jobs.forecast.parameters import Shape
from jobs.forecast.place import ASSUMED, Core, Place, cluster_place
from jobs.forecast.stage_memory import (
    MemoryNeed,
    Models,
    capture_need,
    cell_gpus,
    cell_need,
    distill_need,
    is_online,
    teacher_sharding,
)
from jobs.forecast.storage import Corpus, corpus_tokens, storage
from jobs.forecast.suggestions import remedies
from jobs.forecast.time import Tokens, break_even
from jobs.forecast.training_memory import micro_tokens, trained_parameters
from jobs.run.inputs import ResolvedJob
from jobs.spec.job import JobSpec
from quant.grid import allocated_keys, grid
from trainer.resolve_auto import resolve
from trainer.stage_inputs import reads_cache, train_sequences

FORMAT = 1


def forecast(
    asked: JobSpec, place: Place, price: float | None = None, job: ResolvedJob | None = None
) -> dict[str, Any]:
    """What a job takes on a place: see `docs/plan.md` for the keys.

    price: of an hour of a GPU, in any currency. job: where its models have been found already.
    Raises SpecErrors, with one line per fault, for
    what a run would refuse: models, lengths, group sizes, files, workers that do not fit.
    """
    dtypes = decide_dtypes(asked, place.gpus > 0, [place.core.dtype])
    try:
        spec = resolve(asked, dtypes, training_device(asked, place.gpus > 0))
    except ValueError as error:
        raise SpecErrors([str(error)]) from error
    models = read_models(spec, None if job is None else job.names)
    spec = with_group_sizes(spec, models)
    try:
        corpus = corpus_tokens(spec, models.student.vocab, None if job is None else job.storage)
    except ValueError as error:
        raise SpecErrors([str(error)]) from error
    tokens, redraws = _tokens(spec, corpus)
    stages: dict[str, Any] = {}
    if spec.teacher is not None:
        stages["capture"] = _capture(models, spec, place, tokens)
    if spec.distill is not None:
        stages["distill"] = _distill(models, spec, place, tokens)
    if spec.sweep is not None:
        stages["sweep"] = _sweep(models, spec, place, tokens)
    sizes = {
        "corpus": _prepared(spec, corpus, tokens),
        "captured": tokens.captured,
        "held_out": tokens.held_out,
    }
    result: dict[str, Any] = {
        "format": FORMAT,
        "name": spec.name,
        "place": place.to_dict(),
        "resolved": {**_resolved(asked, spec), **_placed(asked, stages)},
        "models": {
            role: _model(shape)
            for role, shape in (("teacher", models.teacher), ("student", models.student))
            if shape is not None
        },
        "tokens": {
            "corpus": corpus.train,
            "known": corpus.told,
            "train": tokens.captured,
            "held_out": tokens.held_out,
            "read": tokens.read,
            "epochs": tokens.read / tokens.captured if tokens.captured else 0.0,
        },
        "stages": stages,
        "storage": storage(models, spec, sizes, redraws, reads_cache(spec)),
        "cells": _cells(spec),
    }
    if models.teacher is not None and spec.distill is not None and _compares(spec):
        rate = stages["capture"].get("flops_per_second")
        result["break_even"] = break_even(models, spec, tokens, rate)
    result["cost"] = _cost(stages, price)
    result["fits"] = _all_fit(stages)
    result["notes"] = suggestions.notes(spec, models, result)
    return result


def _compares(spec: JobSpec) -> bool:
    assert spec.distill is not None
    return bool(spec.distill.losses.of_distributions())


def _tokens(spec: JobSpec, corpus: Corpus) -> tuple[Tokens, int]:
    """What is worked on, and how many sets of draws are made."""
    assert spec.data is not None
    length = spec.data.sequence_length
    select = spec.data.select_sequences * length
    if spec.distill is None:
        return Tokens(0, 0, corpus.held_out, select), 0
    read = spec.distill.steps * spec.distill.tokens_per_step
    # Whole sequences, as `trainer.corpus.schedule.make_schedule` takes them.
    wanted = -(-int(spec.data.max_tokens) // length) * length
    captured = min(read, wanted, corpus.train if corpus.train is not None else wanted)
    sets = spec.cache.redraws if spec.cache.method == "sample" else 1
    return Tokens(captured, read, corpus.held_out, select), min(sets, -(-read // captured))


def _prepared(spec: JobSpec, corpus: Corpus, tokens: Tokens) -> int:
    """Tokens of train that are prepared: not many more than are read."""
    assert spec.data is not None
    wanted = (train_sequences(spec) or 0) * spec.data.sequence_length or tokens.captured
    return wanted if corpus.train is None else min(wanted, corpus.train)


def _capture(models: Models, spec: JobSpec, place: Place, tokens: Tokens) -> dict[str, Any]:
    group = place.group("capture", spec)
    used = tokens if reads_cache(spec) else Tokens(0, tokens.read, tokens.held_out, tokens.select)
    try:
        sharding = teacher_sharding(models, spec, place, group, "capture")
        need = capture_need(models, spec, place, group)
    except ValueError as error:
        return _impossible("capture", error, models, spec, place, group)
    return {
        "group": _group(group),
        "sharding": sharding.kind,
        "workers_per_copy": sharding.over,
        "across_nodes": sharding.across_nodes,
        "tokens": used.captured + used.held_out,
        "memory": need.to_dict(),
        **time.capture_seconds(models, spec, place, group, sharding, used),
        "remedies": _remedies("capture", need, models, spec, place),
    }


def _distill(models: Models, spec: JobSpec, place: Place, tokens: Tokens) -> dict[str, Any]:
    group = place.group("distill", spec)
    try:
        need = distill_need(models, spec, place, group)
    except ValueError as error:
        return _impossible("distill", error, models, spec, place, group)
    return {
        "group": _group(group),
        "online": is_online(spec),
        "trained_parameters": trained_parameters(models.student, spec),
        "micro_batch_tokens": micro_tokens(spec, group.workers),
        "tokens": tokens.read,
        "memory": need.to_dict(),
        **time.distill_seconds(models, spec, place, group, tokens),
        "remedies": _remedies("distill", need, models, spec, place),
    }


def _sweep(models: Models, spec: JobSpec, place: Place, tokens: Tokens) -> dict[str, Any]:
    cpus, gpus = cell_gpus(models, spec, place)
    if not place.cluster.capacity(cpus, gpus):
        raise SpecErrors(
            [
                f"resources.sweep: a cell of {cpus} CPUs and {gpus:g} GPUs fits no node; set "
                "cpus_per_cell or gpus_per_cell lower"
            ]
        )
    key, need = cell_need(models, spec, place)
    return {
        "cell": {"key": key, "cpus": cpus, "gpus": gpus},
        "memory": need.to_dict(),
        **time.sweep_seconds(models, spec, place, tokens),
        "remedies": _remedies("sweep", need, models, spec, place),
    }


def _impossible(
    stage: str, error: ValueError, models: Models, spec: JobSpec, place: Place, group: Group
) -> dict[str, Any]:
    """A stage that no sharding of the teacher makes possible."""
    return {
        "group": _group(group),
        "why_not": str(error),
        "memory": None,
        "remedies": remedies(stage, models, spec, place),
    }


def _remedies(
    stage: str, need: MemoryNeed, models: Models, spec: JobSpec, place: Place
) -> list[str]:
    return remedies(stage, models, spec, place) if need.fits is False else []


def _group(group: Group) -> dict[str, Any]:
    return {"workers": group.workers, "cpus": group.cpus, "gpus": group.gpus}


def _model(shape: Shape) -> dict[str, Any]:
    return {
        "type": shape.kind,
        "parameters": shape.parameters,
        "active_parameters": shape.active,
        "layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocabulary": shape.vocab,
        "experts": shape.experts,
    }


def _cells(spec: JobSpec) -> int:
    return 0 if spec.sweep is None else len(grid(spec.sweep)) + len(allocated_keys(spec.sweep))


def _resolved(asked: JobSpec, spec: JobSpec) -> dict[str, Any]:
    """The keys that were `auto`, and what they are now."""
    before, after = asked.model_dump(), spec.model_dump()
    found = {key: _at(after, key) for key, value in flatten(before).items() if value == "auto"}
    return {key: value for key, value in found.items() if value != "auto"}


def _at(values: Any, key: str) -> Any:  # noqa: ANN401
    """The value of a dotted key in nested mappings and lists."""
    for part in key.split("."):
        values = values[int(part) if isinstance(values, (list, tuple)) else part]
    return values


def _placed(asked: JobSpec, stages: dict[str, Any]) -> dict[str, Any]:
    """The keys of teacher and resources that were `auto`, and what they are on this place."""
    found: dict[str, Any] = {}
    if asked.teacher is not None and asked.teacher.sharding == "auto":
        kind = stages["capture"].get("sharding")
        found |= {} if kind is None else {"teacher.sharding": kind}
    sections = asked.resources.model_dump()
    for name, stage in stages.items():
        keys = {f"{key}_per_worker" if key != "workers" else key: value
                for key, value in stage.get("group", {}).items()}  # fmt: skip
        cell = stage.get("cell", {})
        keys |= {f"{key}_per_cell": cell[key] for key in ("cpus", "gpus") if key in cell}
        for key, value in keys.items():
            if sections[name][key] == "auto":
                found[f"resources.{name}.{key}"] = value
    return found


def _cost(stages: dict[str, Any], price: float | None) -> dict[str, Any]:
    hours_of = {"gpu": 0.0, "cpu": 0.0}
    known = True
    seconds = 0.0
    for stage in stages.values():
        if stage.get("device_hours") is None:
            known = False
            continue
        hours_of[stage["device"]] += stage["device_hours"]
        seconds += stage["seconds"]
    return {
        "seconds": seconds if known else None,
        "gpu_hours": hours_of["gpu"] if known else None,
        "cpu_hours": hours_of["cpu"] if known else None,
        "price_per_gpu_hour": price,
        "money": None if price is None or not known else price * hours_of["gpu"],
    }


def _all_fit(stages: dict[str, Any]) -> bool | None:
    found = [
        False if stage["memory"] is None else stage["memory"]["fits"] for stage in stages.values()
    ]
    if False in found:
        return False
    return None if None in found else True


def record(
    spec: JobSpec,
    nodes: Sequence[tuple[int, int]],
    gpu: str | None = None,
    host_memory: float | None = None,
    core: Core | None = None,
    job: ResolvedJob | None = None,
) -> dict[str, Any]:
    """What `stillhouse plan` says of a run, as JSON for its `plan.json`.

    nodes: CPUs and GPUs of each. gpu: what the driver or Ray calls them, e.g. "NVIDIA H200" or
    "A100-80G"; hours and fit are left open for a name that is not known. host_memory: bytes of
    one node. core: the slowest CPU core, where the nodes were asked. Never raises for what cannot
    be planned: the plan then holds `faults` alone.
    """
    try:
        place = cluster_place(nodes, gpu, host_memory, core or ASSUMED)
        return forecast(spec, place, job=job)
    except (SpecErrors, ValueError) as error:
        return {"format": 1, "name": spec.name, "faults": str(error).splitlines()}
