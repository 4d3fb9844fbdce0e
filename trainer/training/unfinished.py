"""Trainings of a run that were begun with other inputs, and would be passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.storage import Store
from trainer.spec.rules import Sections
from trainer.stage_inputs import CHECKPOINTS, training_folders
from trainer.training.checkpoint_names import DONE, INPUTS, records, step_of


def unfinished_trainings(
    spec: Sections, inputs: Mapping[str, Any], run: Store
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Trainings of `run` that have checkpoints to go on from but are not those of these inputs.

    By the folder's path below `run`: steps that are done, and the inputs it was begun with, empty
    if it does not say. What is done is not among them.
    """
    wanted = training_folders(spec, inputs)
    found = {}
    for name in run.list(CHECKPOINTS):
        stage = name.partition("-")[0]
        store = run.sub(CHECKPOINTS, name)
        if stage not in wanted or name == wanted[stage]:
            continue
        there = records(store.list())
        if there and not store.exists(DONE):
            told = store.read_json(INPUTS) if store.exists(INPUTS) else {}
            found[f"{CHECKPOINTS}/{name}"] = (step_of(there[-1]), told)
    return found


def unfinished_faults(
    spec: Sections,
    inputs: Mapping[str, Any],
    run: Store,
    way_out: str = "run with --redo distill to drop it and train anew",
) -> list[str]:
    """One line per input that was changed under an unfinished training, which would be passed over.

    inputs: of `training_inputs`, for the spec as it is now. way_out: what a user may do beside
    putting it back and naming the run anew.
    """
    new = json.loads(json.dumps(inputs, default=str))
    faults = []
    for path, (step, old) in unfinished_trainings(spec, inputs, run).items():
        what = f"a training of this run is unfinished at step {step}"
        rest = f"{way_out.format(path=run.path(path))}, or give the run another name"
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r} ({what}; put it back to continue, {rest})"
            for key in sorted({*old, *new} if old else ())
            if old.get(key) != new.get(key)
        ]
        faults += changed or [f"{run.path(path)}: {what}, of other inputs than these; {rest}"]
    return list(dict.fromkeys(faults))  # student and control have the same inputs
