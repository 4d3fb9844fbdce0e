"""What a run directory says, read once: the source of the report and of the W&B projection."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import yaml

from cluster.storage import Store, read_events
from quant.grid import allocated_keys, grid
from quant.spec import SweepSpec

ROLES = ("teacher", "student", "control")
TRAININGS = ("distill", "control")
PLAN = "plan.json"  # of a run directory: what `jobs.forecast.forecast` gave before the work began


@dataclass(frozen=True)
class RunData:
    """One run as read from its directory; everything in it is plain JSON data.

    `evaluations` maps a role (teacher, student, control) to its evaluation; `cells` maps a
    cell's key to its result; `extra` maps the name of a model that was quantized elsewhere to its
    result; `events` is in order, without steps that a resume replayed; `plan` is what was foretold.
    """

    name: str
    url: str
    spec: dict[str, Any]
    events: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds, in order."""
        return [event for event in self.events if event.get("event") in kinds]


def load_run(store: Store, events: list[dict[str, Any]] | None = None) -> RunData:
    """Read a run directory; parts that do not exist yet are empty.

    `events` spares reading them again where the caller follows them already.
    Raises ValueError where the folder holds no run.
    """
    events = read_events(store) if events is None else events
    spec = _read_spec(store, events)
    if not spec and not events:
        raise ValueError(f"{store.url}: no run here (neither spec.yaml nor events/)")
    evaluations = {}
    for role in ROLES:
        if _asked_for(spec, role) and store.exists(f"evaluations/{role}.json"):
            evaluations[role] = clean(store.read_json(f"evaluations/{role}.json"))
    sweep = _sweep(spec)
    cells = _cells(store, sweep)
    extra = {}
    for item in sweep.extra if sweep is not None else []:
        path = f"evaluations/extra-{item.label}.json"
        if store.exists(path):
            extra[item.label] = clean(store.read_json(path))
    name = str(spec.get("name") or store.name)
    plan = clean(store.read_json(PLAN)) if store.exists(PLAN) else {}
    return RunData(name, store.url, spec, events, evaluations, cells, extra, plan)


def _asked_for(spec: dict[str, Any], role: str) -> bool:
    """Whether the spec still has this model; what an earlier spec had stays on storage."""
    if role == "control" and isinstance(spec.get("distill"), dict):
        return bool(spec["distill"].get("control"))
    return not (role == "teacher" and "teacher" in spec and spec["teacher"] is None)


def _sweep(spec: dict[str, Any]) -> SweepSpec | None:
    """The spec's sweep; None where it has none, or is the spec of another version."""
    if not isinstance(spec.get("sweep"), dict):
        return None
    try:
        return SweepSpec.model_validate(spec["sweep"])
    except ValueError:
        return None


def _cells(store: Store, sweep: SweepSpec | None) -> dict[str, dict[str, Any]]:
    """The results of the cells that the sweep asks for, all where it does not say; by key.

    Uniform cells of an allocated one's size are asked for with it.
    """
    found = {
        path.split("/")[-2]: clean(store.read_json(path))
        for path in store.glob("cells/*/result.json")
    }
    if sweep is None:
        return found
    allocated = set(allocated_keys(sweep))
    asked = {cell.key for cell in grid(sweep)} | allocated
    return {
        key: result
        for key, result in found.items()
        if key in asked or allocated & set(result.get("control_of") or [])
    }


def _read_spec(store: Store, events: list[dict[str, Any]]) -> dict[str, Any]:
    if store.exists("spec.yaml"):
        spec = yaml.safe_load(store.read_text("spec.yaml"))
        if isinstance(spec, dict):
            return clean(json.loads(json.dumps(spec, default=str)))
    for event in reversed(events):
        if event.get("event") == "run_start" and isinstance(event.get("spec"), dict):
            return clean(event["spec"])
    return {}


def clean(value: object) -> Any:  # noqa: ANN401
    """The value with everything that strict JSON cannot hold (nan, infinities) as None."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: object) -> float | None:
    """The value as a finite float, or None where it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def seconds_since_epoch(event: dict[str, Any]) -> float | None:
    """When an event happened, in seconds since the Unix epoch; None where it does not say."""
    when = event.get("t")
    if isinstance(when, str):
        try:
            return datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp()
        except ValueError:
            return None
    return number(when)


def curve(data: RunData, stage: str) -> list[dict[str, Any]]:
    """The step events of one training stage, by rising step.

    A stage that was redone with fewer steps leaves the longer one's last steps in the events;
    the newest step event says how many steps there are now, and the rest is left out.
    """
    steps = [
        event
        for event in data.of_kind("step")
        if event.get("stage") == stage and number(event.get("step")) is not None
    ]
    if not steps:
        return []
    newest = max(enumerate(steps), key=lambda item: (item[1].get("attempt") or 0, item[0]))[1]
    last = number(newest.get("steps"))
    if last is not None:
        steps = [event for event in steps if event["step"] <= last]
    return sorted(steps, key=lambda event: event["step"])


def evaluations(data: RunData, stage: str) -> list[dict[str, Any]]:
    """The evaluation events of one training stage, by rising step; of one step the last.

    As with `curve`, what lies beyond the newest training's steps is an older one's.
    """
    steps = curve(data, stage)
    last = steps[-1]["step"] if steps else None
    found = {
        event["step"]: event
        for event in data.of_kind("evaluation")
        if event.get("stage") == stage and number(event.get("step")) is not None
    }
    return [found[step] for step in sorted(found) if last is None or step <= last]


def training_metrics(data: RunData, stage: str) -> dict[str, Any]:
    """Held-out and other closing numbers of a training stage; of several, the newest.

    With the means of its checkpoints: seconds for which they held the training up, and of their
    uploads beside it.
    """
    for event in reversed(data.of_kind("training_done")):
        if event.get("stage") == stage:
            return {**(event.get("metrics") or {}), **_checkpoints(data, stage)}
    return {}


def _checkpoints(data: RunData, stage: str) -> dict[str, Any]:
    made = [event for event in data.of_kind("checkpoint") if event.get("stage") == stage]
    found: dict[str, Any] = {}
    for name, key in (
        ("checkpoint_seconds", "seconds"),
        ("checkpoint_upload_seconds", "upload_seconds"),
    ):
        values = [value for event in made if (value := number(event.get(key))) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found
