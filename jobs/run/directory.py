"""The run directory: finished stages and their inputs, attempts, cells; and runs found by name."""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import Attempt, Store, open_store
from jobs.errors import SpecErrors


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One text per key that differs: ``distill.steps: 400 -> 500``."""
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]


@dataclass(frozen=True)
class StageRecord:
    """What a stage was made from, and what it gave; `finished` or to be done again."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    finished: bool


class RunDir:
    """One run's directory, with the attempt that this process holds."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attempt: Attempt | None = None

    def claim(self, job: str | None = None) -> Attempt:
        """Starts a new attempt; older ones can no longer publish. job: the Ray job it is of."""
        self.attempt = Attempt.claim(self.store, job=job)
        return self.attempt

    def was_begun(self, stage: str, job: str) -> bool:
        """Whether an attempt of this Ray job has forgotten or finished a stage."""
        attempts = self.store.list("state/attempts")
        numbers = [
            name.partition(".")[0]
            for name in attempts
            if self.store.read_json(f"state/attempts/{name}").get("job") == job
        ]
        return any(self.store.exists(f"state/{stage}-{number}.json") for number in numbers)

    def current(self) -> Attempt:
        """This process's attempt."""
        if self.attempt is None:
            raise RuntimeError("no attempt claimed")
        return self.attempt

    def record(self, stage: str) -> StageRecord | None:
        """The newest record of a stage, None if it was never finished."""
        names = [n for n in self.store.list("state") if n.startswith(f"{stage}-")]
        if not names:
            return None
        data = self.store.read_json(f"state/{max(names)}")
        return StageRecord(data["inputs"], data["outputs"], not data.get("redo"))

    def forget(self, stage: str) -> None:
        """From now on the stage counts as not done, also for attempts to come."""
        record, attempt = self.record(stage), self.current()
        if record is not None:
            attempt.write_json(
                f"state/{stage}-{attempt.number:04d}.json",
                {"stage": stage, "redo": True, "inputs": record.inputs, "outputs": record.outputs},
            )

    def finish(
        self, stage: str, inputs: dict[str, Any], outputs: dict[str, Any], seconds: float
    ) -> None:
        """Records that a stage is done; from now on it is skipped."""
        attempt = self.current()
        attempt.write_json(
            f"state/{stage}-{attempt.number:04d}.json",
            {
                "stage": stage,
                "attempt": attempt.number,
                "inputs": inputs,
                "outputs": outputs,
                "seconds": seconds,
                "finished": time.time(),
            },
        )


def find_run(run: str, storage: str, command: str = "report") -> Store:
    """The run directory of `run`: a URL, a path, or a name below `storage`.

    Raises:
        SpecErrors: no run is there; the line names those below `storage`, the likeliest first,
            and the help of `command`.
    """
    try:
        root = open_store(storage)
        place = known_run(run, root)
    except ValueError as error:
        raise SpecErrors(str(error).splitlines()) from None
    if place is not None:
        return place
    there = runs_there(run, root, storage)
    raise SpecErrors([f"{run}: no such run; {there}; see stillhouse {command} --help"])


def known_run(run: str, root: Store) -> Store | None:
    """The run directory of a URL, a path or a name below `root`; None if there is none."""
    if "://" in run:
        places = [open_store(run)]
    else:
        places = [open_store(run)] if Path(run).is_dir() else []
        if "/" not in run.strip("/") and run not in (".", ".."):
            places.append(root.sub(run))
    return next((place for place in places if holds_run(place)), None)


def runs_there(run: str, root: Store, storage: str) -> str:
    """Which runs there are, in words: those whose names are like `run` first."""
    known = [name for name in root.list() if name[:1] not in "_." and holds_run(root.sub(name))]
    close = difflib.get_close_matches(run, known, n=3, cutoff=0.5)
    named = [*close, *(name for name in known if name not in close)][:8]
    return f"the runs in {storage} are {', '.join(named)}" if named else f"{storage} holds no runs"


def holds_run(place: Store) -> bool:
    """Whether a folder is a run directory."""
    return any(place.exists(name) for name in ("spec.yaml", "events", "state"))


@dataclass(frozen=True)
class Cells:
    """The cells of a run by key: those with a model, and why others have none."""

    models: list[str]
    without: dict[str, str]

    def __str__(self) -> str:
        told = ", ".join(self.models) if self.models else "no cell of this run has a model"
        return told + "".join(f"; {key} {why}" for key, why in self.without.items())


def cells_of(run: Store) -> Cells:
    """Reads the results of the sweep of a run directory."""
    models, without = [], {}
    for path in run.glob("cells/*/result.json"):
        key = path.split("/")[1]
        result = run.read_json(path)
        if result.get("status") != "done":
            why = " ".join(str(result.get("error")).split())
            without[key] = f"failed ({why[:120]})"
        elif not run.exists(f"cells/{key}/model/config.json"):
            without[key] = "has no model any more"
        else:
            models.append(key)
    return Cells(models, without)
