"""What each stage is made from: flat mappings that decide whether its result still stands.

`fixed` inputs may not change under a finished stage (the run refuses, and shows the difference);
`growing` ones make the stage run again, adding what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs.spec import JobSpec
from trainer.identity import Identities, fingerprint, flatten

Outputs = dict[str, dict[str, Any]]

# Keys of `distill` that change how a training runs, not what comes out of it.
_RUNNING = {"checkpoint_minutes", "checkpoint_steps", "keep_checkpoints", "control"}


@dataclass(frozen=True)
class StageInputs:
    """See the module's docstring."""

    fixed: dict[str, Any]
    growing: dict[str, Any] = field(default_factory=dict)


def identities(spec: JobSpec) -> Identities:
    """The identities of this spec's parts."""
    assert spec.data is not None
    return Identities(spec.teacher, spec.student, spec.tokenizer, spec.data, spec.cache)


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
        """The corpus's identity."""
        return StageInputs(self.identities.corpus)

    def capture(self, outputs: Outputs) -> StageInputs:
        """The cache's identity; the sequences to hold may grow with corpus and schedule."""
        growing = {"corpus": outputs["prepare"]["corpus"], **self._schedule()}
        return StageInputs(self.identities.cache, growing)

    def _schedule(self) -> dict[str, Any]:
        spec = self.spec
        if spec.distill is None or spec.data is None:
            return {}
        return {
            "distill.steps": spec.distill.steps,
            "distill.tokens_per_step": spec.distill.tokens_per_step,
            "data.max_tokens": spec.data.max_tokens,
            **flatten([source.weight for source in spec.data.train], "weights"),
            "seed": spec.seed,
        }

    def distill(self, outputs: Outputs) -> StageInputs:
        """What the weights depend on; a control may be added later."""
        spec = self.spec
        assert spec.distill is not None
        fixed = flatten(spec.distill.model_dump(exclude=_RUNNING), "distill")
        fixed |= flatten(self.identities.student, "student")
        fixed |= self._schedule()
        fixed["corpus"] = outputs["prepare"]["corpus"]
        if spec.teacher is not None:
            fixed["cache"] = outputs["capture"]["cache"]
        return StageInputs(fixed, {"distill.control": spec.distill.control})

    def sweep(self, outputs: Outputs) -> StageInputs:
        """Nothing is fixed: each cell has a fingerprint of its own."""
        assert self.spec.sweep is not None
        models = {
            key: value
            for key, value in outputs.get("distill", {}).items()
            if key in ("student", "control")
        }
        growing = {
            **flatten(self.spec.sweep.model_dump(), "sweep"),
            "corpus": outputs["prepare"]["corpus"],
            "cache": outputs.get("capture", {}).get("cache"),
            **flatten(models or self.identities.student, "models"),
        }
        return StageInputs({}, growing)

    def summarize(self, outputs: Outputs) -> StageInputs:
        """Everything that the report shows."""
        return StageInputs({}, {"outputs": fingerprint(outputs)})
