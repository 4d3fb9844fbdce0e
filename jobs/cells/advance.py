"""Progress of one task of the sweep: the share of its work that is done, and what it does now."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.progress import Report

# Work is counted in sequences that a model of the sweep passes once. What takes as long as
# quantizing, in tokens: both grow with the model (hqq on a CPU, one thread).
QUANTIZE_TOKENS = 4_000
EVALUATE = 1.2  # with its head and the reference's, and all divergences
TASK_TOKENS = 300  # of a document of a benchmark task, with all of its answers
TASK_DOCUMENTS = 1_000  # of a task without a limit
HEAD = 0.25  # the same without the forward pass, from stored hidden states
LEARN = 4.0  # a forward and a backward pass, beside a second model or records

_WORDS = {"reference": "hidden states of", "evaluation": "evaluated on"}


class Advance:
    """Tells `report` how far a task of several phases is."""

    def __init__(self, report: Report, work: Mapping[str, float]) -> None:
        """work: of each phase; no more than a guess."""
        self._report, self._work = report, dict(work)
        self._total = sum(work.values()) or 1.0
        self._shares = dict.fromkeys(work, 0.0)
        report(0.0, "loading the model")

    def at(self, phase: str, share: float, words: str) -> None:
        """That share of a phase is done."""
        if phase in self._work:
            self._shares[phase] = share
            done = sum(self._work[each] * self._shares[each] for each in self._work)
            self._report(done / self._total, words)

    def part(self, name: str, sequences: int) -> Callable[[str, float], None]:
        """What a `quant.evaluation.measure.Part` calls; phases are e.g. "evaluation/report"."""

        def tell(what: str, done: float) -> None:
            words = f"{_WORDS[what]} {name}: {int(done)} of {sequences} sequences"
            self.at(f"{what}/{name}", done / max(1, sequences), words)

        return tell

    def quantized(self, done: int, total: int) -> None:
        """What `quant.evaluation.cell.run_cell` calls."""
        self.at("quantize", done / total, f"quantizing: {100 * done / total:.0f} %")

    def answered(self, share: float, task: str, done: int, total: int) -> None:
        """What `quant.evaluation.lm_eval.run_tasks` calls."""
        self.at("tasks", share, f"benchmark task {task}: {done} of {total} answers")

    def steps(self, done: int, total: int) -> None:
        """What a recovery calls."""
        self.at("recover", done / total, f"recovering: step {done} of {total}")
