"""What can go wrong with a job, as the command line tells it."""

from __future__ import annotations

from collections.abc import Sequence


class SpecErrors(ValueError):
    """The spec or the arguments are wrong (exit code 2): one line per fault in `faults`."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type[SpecErrors], tuple[list[str]]]:
        return type(self), (self.faults,)


class StageFailed(RuntimeError):
    """A stage failed (exit code 3): which one, why, where its log is, how to go on.

    Args:
        stage: prepare, capture, distill, sweep or summarize.
        why: the cause, in one line.
        log: path or URL of the log.
        resume_command: the command that continues the run.
    """

    def __init__(self, stage: str, why: str, log: str, resume_command: str) -> None:
        self.stage = stage
        self.why = why
        self.log = log
        self.resume_command = resume_command
        super().__init__(f"{stage} failed: {why}")

    def __reduce__(self) -> tuple[type[StageFailed], tuple[str, str, str, str]]:
        return type(self), (self.stage, self.why, self.log, self.resume_command)


class Superseded(RuntimeError):
    """A newer attempt of the run goes on, and this one has stopped (exit code 4)."""


class Interrupted(RuntimeError):
    """The run was asked to stop and stopped cleanly (exit code 130)."""
