"""Which stages of a run are skipped and which may run, decided from what is on storage."""

from __future__ import annotations

from typing import Any

from cluster.storage.keys import fingerprint
from jobs.errors import SpecErrors
from jobs.run.directory import RunDir, StageRecord, differences
from jobs.run.inputs import Outputs, ResolvedJob, StageInputs
from jobs.spec.job import JobSpec
from jobs.stages import STAGES, distill
from jobs.stages.capture import count_lacking
from trainer.stage_inputs import CHECKPOINTS, find_corpus


def stages_of(spec: JobSpec) -> list[str]:
    """The stages that a spec asks for, in order."""
    return [name for name, stage in STAGES.items() if stage.is_asked(spec)]


class StageSelection:
    """Which stages are skipped and which may run, decided from what is on storage."""

    def __init__(
        self,
        job: ResolvedJob,
        run: RunDir,
        until: str | None,
        only: str | None,
        redo: str | None,
    ) -> None:
        """Raises SpecErrors when a finished stage, or an unfinished training that would be passed
        over, was made from other inputs than these."""
        stages = stages_of(job.spec)
        for option, stage in (("--until", until), ("--only", only), ("--redo", redo)):
            if stage is not None and stage not in stages:
                raise SpecErrors([f"{option} {stage}: this spec has {', '.join(stages)}"])
        asked = stages[: stages.index(until or only or stages[-1]) + 1]
        if redo is not None and redo not in (asked if only is None else [only]):
            raise SpecErrors([f"--redo {redo}: is not among the stages that this command runs"])
        self.forced = {redo}
        self.skipped: list[str] = []
        self.to_run: list[str] = []
        self.outputs: Outputs = {}
        known = True  # whether what the stages before give is what they gave
        refilled = False  # whether an earlier attempt began to add what the cache had lost
        for stage in asked:
            record = run.record(stage)
            same = False
            if record is None or stage == redo:
                known = False
            elif known:
                new = STAGES[stage].inputs(job, self.outputs)
                if record.finished:
                    _refuse_changes(stage, record.inputs["fixed"], new.fixed)
                same = is_current(record, new)
                if stage == "capture":
                    refilled = not record.finished and has_inputs(record, new)
            if record is not None:
                self.outputs[stage] = record.outputs
            trained = stage == "distill" and refilled and self.to_run == ["capture"]
            if same and (trained or not self.to_run):
                self.skipped.append(stage)
            elif only in (None, stage):
                self.to_run.append(stage)
            else:
                raise SpecErrors(
                    [
                        f"--only {only}: the stage {stage} before it is not done; "
                        f"run with --until {only}"
                    ]
                )
        for stage in self.to_run:
            self.outputs.pop(stage, None)
        # Whoever does a stage before it anew knows that another training follows.
        anew = redo in stages[: stages.index("distill") + 1] if "distill" in stages else True
        if "distill" in self.to_run and not anew:
            _refuse_passing_over(run, job, self.outputs)
        if "capture" in self.skipped and {"distill", "sweep"} & set(self.to_run):
            self._complete_cache(job, only)

    def _complete_cache(self, job: ResolvedJob, only: str | None) -> None:
        """Captures again if records are gone that a stage in todo reads: a repair drops damaged
        shards, and caches are removed. The stages that are done stay done."""
        lacking = count_lacking(job, self.outputs)
        if lacking and only is not None:
            raise SpecErrors(
                [
                    f"--only {only}: the logit cache lacks {lacking} records that it had; "
                    f"run with --until {only}"
                ]
            )
        if lacking:
            self.skipped.remove("capture")
            self.to_run.insert(0, "capture")
            self.forced.add("capture")
            del self.outputs["capture"]


def is_current(record: StageRecord, inputs: StageInputs) -> bool:
    """Whether a stage has nothing left to do: same inputs, finished, and nothing in it failed."""
    same = has_inputs(record, inputs)
    return same and record.finished and not record.outputs.get("failed")


def has_inputs(record: StageRecord, inputs: StageInputs) -> bool:
    """Whether a stage was made, or begun again, from these inputs."""
    return inputs.met_by(record.inputs)


def _refuse_passing_over(run: RunDir, job: ResolvedJob, outputs: Outputs) -> None:
    if not run.store.list(CHECKPOINTS):  # models and sources are only looked at where they must
        return
    from trainer.training.unfinished import unfinished_faults

    names = job.names
    expected = {  # of stages to come the names that they will give
        "prepare": {"corpus": fingerprint(find_corpus(names, job.storage) or names.corpus)},
        "capture": {"cache": fingerprint(names.cache)},
        **outputs,
    }
    faults = unfinished_faults(job.spec, distill.inputs(job, expected).fixed, run.store)
    if faults:
        raise SpecErrors(faults)


def _refuse_changes(stage: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = differences(old, new)
    if changed:
        raise SpecErrors(
            [
                f"{change} (an input of the stage {stage}, which is done; run with --redo "
                f"{stage}, or give the run another name)"
                for change in changed
            ]
        )
