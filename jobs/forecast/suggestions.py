"""Overrides that would make a stage fit, each tried before it is named, and notes on a forecast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jobs.errors import SpecErrors
from jobs.forecast.place import GPUS, Place
from jobs.forecast.stage_memory import (
    MemoryNeed,
    Models,
    capture_need,
    cell_need,
    distill_need,
    is_online,
)
from jobs.spec.job import JobSpec
from jobs.spec.load import spec_of

MOST_TIMES = 64  # as many devices are tried at most
NAMED = 3


@dataclass(frozen=True)
class Try:
    """A spec and a place that differ from those asked about, and the words for it."""

    words: tuple[str, ...]
    spec: JobSpec
    place: Place


Measure = Callable[[JobSpec, Place], MemoryNeed]


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


def notes(spec: JobSpec, models: Models, plan: dict[str, Any]) -> list[str]:
    """Lines of text, the weightiest first."""
    assert spec.data is not None
    found = []
    tokens, stages = plan["tokens"], plan["stages"]
    if tokens["corpus"] is None:
        found.append(f"Corpus: {tokens['known']}.")
    elif tokens["known"] != "prepared before":
        found.append(
            f"Corpus: about {tokens['corpus']:,} tokens, {tokens['known']}; once it is prepared, "
            "plan counts it."
        )
    if spec.teacher is not None:
        found.append(
            f"Another data.sequence_length than {spec.data.sequence_length} makes other sequences, "
            "hence another capture."
        )
    if spec.responses is not None:
        found.append("Making the answers (section responses) is in no figure here.")
    capture = stages.get("capture", {})
    if capture.get("across_nodes"):
        found.append(
            "No node holds the teacher: it is sharded over several, and every layer travels "
            "between them in each pass; much slower than these hours say."
        )
    if spec.cache.method == "sample" and "cache" in plan["storage"]:
        found.append(
            "Draws of a teacher that is less certain than large models are on text hit up to twice "
            "as many different ids; the cache then has up to twice the bytes."
        )
    if spec.cache.positions == "loss":
        found.append(
            "cache.positions: loss captures fewer positions than these bytes are of; how many only "
            "the corpus can tell."
        )
    mixture = models.teacher is not None and models.teacher.experts
    if mixture and spec.sweep is not None and "teacher" in spec.sweep.models:
        found.append("Experts stay in 16 bits in the teacher's cells.")
    on_cpus = any(stage.get("device") == "cpu" for stage in stages.values())
    if on_cpus and not plan["place"]["core"]["measured"]:
        found.append("Hours on CPUs differ threefold with the kind of core.")
    online = spec.distill is not None and spec.distill.mode == "online"
    if online and plan.get("break_even", {}).get("students") == 1:
        found.append(
            "distill.mode: cached would be cheaper here even for one student: see break-even."
        )
    return found
