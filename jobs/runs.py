"""Runs by name: the directory that a user means, and the cells in it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import Store, open_store
from jobs.errors import SpecErrors


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
