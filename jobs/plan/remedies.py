"""What would make a stage fit: overrides of the spec, each tried before it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jobs.errors import SpecErrors
from jobs.plan.gpus import GPUS
from jobs.plan.need import Need
from jobs.plan.needs import Models, capture_need, cell_need, distill_need, is_online
from jobs.plan.place import Place
from jobs.schema import spec_of
from jobs.spec import JobSpec

MOST_TIMES = 64  # as many devices are tried at most
NAMED = 3


@dataclass(frozen=True)
class Try:
    """A spec and a place that differ from those asked about, and the words for it."""

    words: tuple[str, ...]
    spec: JobSpec
    place: Place


Measure = Callable[[JobSpec, Place], Need]


def remedies(stage: str, models: Models, spec: JobSpec, place: Place) -> list[str]:
    """Ways to make a stage fit, the mildest first; each was tried and fits. [] where none was
    found."""
    measure = _measure(stage, models)
    found: list[Try] = []
    for tried in _tries(stage, spec, place):
        if any(_is_more(tried, one, place) for one in found):
            continue
        try:
            fits = measure(tried.spec, tried.place).fits
        except (ValueError, SpecErrors):  # it cannot run so either
            continue
        if fits:
            found.append(tried)
        if len(found) == NAMED:
            break
    return [" ".join(one.words) for one in found]


def _is_more(tried: Try, known: Try, asked: Place) -> bool:
    """Whether a known way does with less: fewer changes, or fewer devices for the same ones."""
    if known.place is asked:
        return set(known.words) <= set(tried.words)
    return tried.place is not asked and set(known.words[:-1]) <= set(tried.words[:-1])


def _measure(stage: str, models: Models) -> Measure:
    if stage == "sweep":
        return lambda spec, place: cell_need(models, spec, place)[1]
    need = capture_need if stage == "capture" else distill_need
    return lambda spec, place: need(models, spec, place, place.group(stage, spec))


def _tries(stage: str, spec: JobSpec, place: Place) -> Iterator[Try]:
    """Single changes, then the same one upon another, then more devices, then larger ones."""
    changes = [change for change in _changes(stage, spec) if change]
    base = Try((), spec, place)
    for change in changes:
        yield _changed(base, change)
    stacked = base
    for change in changes:
        stacked = _changed(stacked, change)
        if len(stacked.words) > 1:
            yield stacked
    times = 2
    while times <= MOST_TIMES:
        yield _wider(base, stage, times)
        if stacked.words:
            yield _wider(stacked, stage, times)
        times *= 2
    if place.gpu is not None:
        larger = [gpu for gpu in GPUS.values() if gpu.memory > place.gpu.memory]
        for gpu in sorted(larger, key=lambda gpu: gpu.memory):
            yield Try((f"--gpu={gpu.key}",), spec, replace(place, gpu=gpu))


def _changes(stage: str, spec: JobSpec) -> Iterator[dict[str, Any]]:
    """Overrides that save memory, from those that cost least time on."""
    teacher, distill = spec.teacher, spec.distill
    if stage == "sweep":
        assert spec.sweep is not None
        size = spec.sweep.batch_sequences
        yield {"sweep.batch_sequences": 1} if size > 1 else {}
        return
    if stage == "capture":
        tokens = spec.resources.capture.batch_tokens
        if teacher is not None and teacher.sharding == "none":
            yield {"teacher.sharding": "zero3"}
        # auto: on a GPU, where memory is short, it is more.
        smaller = tokens == "auto" or tokens > 2048
        yield {"resources.capture.batch_tokens": 2048} if smaller else {}
        return
    assert distill is not None
    if is_online(spec) and teacher is not None and teacher.sharding == "none":
        yield {"teacher.sharding": "zero3"}
    yield {} if distill.activation_checkpointing else {"distill.activation_checkpointing": True}
    yield {"distill.micro_batch": 1} if int(distill.micro_batch) > 1 else {}
    yield {"distill.zero_stage": 2} if distill.zero_stage < 2 else {}
    yield {"distill.zero_stage": 3} if distill.zero_stage < 3 else {}
    yield {"distill.offload": "cpu"} if distill.offload == "none" else {}


def _changed(tried: Try, change: dict[str, Any]) -> Try:
    data = tried.spec.model_dump()
    for key, value in change.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section[part]
        section[last] = value
    words = [f"{key}={str(value).lower()}" for key, value in change.items()]
    # A value that replaces another is not said twice.
    names = {word.partition("=")[0] for word in words}
    kept = [word for word in tried.words if word.partition("=")[0] not in names]
    return Try((*kept, *words), spec_of(data), tried.place)


def _wider(tried: Try, stage: str, times: int) -> Try:
    """The same on more devices, with as many workers as there are then."""
    place = tried.place.larger(times)
    data = tried.spec.model_dump()
    words = list(tried.words)
    if stage != "sweep" and data["resources"][stage]["workers"] != "auto":
        data["resources"][stage]["workers"] = "auto"
        words.append(f"resources.{stage}.workers=auto")
    what = f"--gpus={place.gpus}" if place.gpus else f"{len(place.nodes)} such machines"
    return Try((*words, what), spec_of(data), place)
