"""What each stage is made from: flat mappings that decide whether its result still stands.

`fixed` inputs may not change under a finished stage (the run refuses, and shows the difference);
`growing` ones make the stage run again, adding what is missing; and so do `at_least` ones where
they ask for more than the stage has made.

What a sweep is given beside its models: models quantized elsewhere, and benchmark tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import Store
from cluster.storage.keys import fingerprint, flatten
from jobs.spec.job import JobSpec
from quant.spec import ExtraModel, Task
from trainer.models.load import absolute, find_model, identity
from trainer.stage_inputs import capture_inputs, identities, training_inputs
from trainer.tasks import make_capture

if TYPE_CHECKING:
    from trainer.teacher.job import Capture


def absolute_paths(spec: JobSpec) -> JobSpec:
    """The spec with its extra models and task folders named absolutely: workers run elsewhere."""
    sweep = spec.sweep
    if sweep is None or not (sweep.extra or sweep.tasks):
        return spec
    extra = [item.model_copy(update={"path": absolute(item.path)}) for item in sweep.extra]
    # The label is made of the path as it was written.
    extra = [
        item.model_copy(update={"name": before.label})
        for item, before in zip(extra, sweep.extra, strict=True)
    ]
    tasks = [
        task.model_copy(update={"folder": absolute(task.folder)}) if task.folder else task
        for task in sweep.tasks
    ]
    return spec.model_copy(
        update={"sweep": sweep.model_copy(update={"extra": extra, "tasks": tasks})}
    )


def extra_identity(extra: ExtraModel) -> dict[str, Any]:
    """What an extra model is: its name, and hashes of its config and weights.

    Raises ValueError, one line, if it is not there.
    """
    return {**identity(find_model("sweep.extra", extra.path), extra.path), "label": extra.label}


def task_identity(task: Task) -> dict[str, Any]:
    """A benchmark task: its settings, and the contents of its folder in the place of its name."""
    found = task.model_dump(exclude={"folder"})
    if task.folder is not None:
        digest = hashlib.blake2b(digest_size=16)
        root = Path(task.folder)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0")
                digest.update(path.read_bytes())
        found["content"] = digest.hexdigest()
    return found


Outputs = dict[str, dict[str, Any]]

# Part of every cell's fingerprint: raise it when the same inputs would give another result.
EVALUATION = 3


@dataclass(frozen=True)
class StageInputs:
    """See the module's docstring."""

    fixed: dict[str, Any]
    growing: dict[str, Any] = field(default_factory=dict)
    at_least: dict[str, int] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """As a finished stage is recorded with them."""
        found: dict[str, Any] = {"fixed": self.fixed, "growing": self.growing}
        return {**found, "at_least": self.at_least} if self.at_least else found

    def met_by(self, made_from: Mapping[str, Any]) -> bool:
        """Whether a stage that was made from such `values` has all that these ask for.

        A record of an earlier version says nothing of `at_least`: then everything was made.
        """
        if (made_from["fixed"], made_from["growing"]) != (self.fixed, self.growing):
            return False
        had = made_from.get("at_least", {})
        return all(had.get(key, number) >= number for key, number in self.at_least.items())


class Inputs:
    """Inputs of the stages of one spec, from what the stages before have given."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.identities = identities(spec)

    def of(self, stage: str, outputs: Outputs) -> StageInputs:
        """The inputs of a stage, by its name."""
        result: StageInputs = getattr(self, stage)(outputs)
        return result

    def prepare(self, outputs: Outputs) -> StageInputs:
        """The corpus's identity; sequences of train may grow."""
        from trainer.corpus.corpus import TRAIN_SEQUENCES, of_held_out

        identity = self.identities.corpus
        asked = identity.get(TRAIN_SEQUENCES)
        at_least = {} if asked is None else {TRAIN_SEQUENCES: asked}
        return StageInputs(of_held_out(identity), at_least=at_least)

    def capture(self, outputs: Outputs) -> StageInputs:
        """The cache's identity; sequences and sets of draws to hold may grow."""
        growing = {
            "corpus": outputs["prepare"]["corpus"],
            **capture_inputs(self.spec),
        }
        return StageInputs(self.identities.cache, growing)

    def distill(self, outputs: Outputs) -> StageInputs:
        """What the weights depend on; a control may be added later."""
        spec = self.spec
        assert spec.distill is not None
        cache = outputs["capture"]["cache"] if spec.teacher is not None else None
        fixed = training_inputs(spec, self.identities, outputs["prepare"]["corpus"], cache)
        return StageInputs(fixed, {"distill.control": spec.distill.control})

    def sweep(self, outputs: Outputs) -> StageInputs:
        """Nothing is fixed: each cell has a fingerprint of its own."""
        sweep = self.spec.sweep
        assert sweep is not None
        models = {
            key: value
            for key, value in outputs.get("distill", {}).items()
            if key in ("student", "control")
        }
        found = {
            "extra": [extra_identity(extra) for extra in sweep.extra],
            "tasks": [task_identity(task) for task in sweep.tasks],
        }
        growing = {
            "evaluation": EVALUATION,
            **flatten(sweep.model_dump(), "sweep"),
            "corpus": outputs["prepare"]["corpus"],
            "cache": outputs.get("capture", {}).get("cache"),
            **flatten(models or self.identities.student, "models"),
            **flatten({name: value for name, value in found.items() if value}, "of"),
        }
        return StageInputs({}, growing)

    def summarize(self, outputs: Outputs) -> StageInputs:
        """Everything that the report shows."""
        return StageInputs({}, {"outputs": fingerprint(outputs)})


def capture_of(spec: JobSpec, corpus: Store, cache: Store) -> Capture:
    """The capture of a spec, with the resources that it asks for."""
    asked = spec.resources.capture
    return make_capture(
        spec, corpus, cache, batch_tokens=asked.batch_tokens, shard_seconds=asked.shard_seconds
    )
