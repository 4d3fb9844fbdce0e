"""Faults that only the world can tell: files, models, storage. Looked for before Ray starts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from cluster.storage import open_store
from jobs.spec import JobSpec
from quant.spec import CHANNEL, QuantSpec, SweepSpec
from quant.wording import Wording
from trainer.checks import faults_in, has_student, student_config, world_faults
from trainer.job import identities


def storage_faults(spec: JobSpec) -> list[str]:
    """Faults of the storage: unknown protocol, not writable."""
    return faults_in(lambda: open_store(spec.storage).check_writable(), "storage")


def spec_faults(spec: JobSpec, stages: list[str]) -> list[str]:
    """One line per fault of what the spec names, as far as the `stages` to run need it."""
    found = identities(spec)
    faults = world_faults(spec, found, set(stages) - {"summarize"})
    if "sweep" in stages and spec.sweep is not None and has_student(spec, found):
        faults += _sweep_faults(spec.sweep, student_config(spec, found))
    return faults


def _sweep_faults(sweep: SweepSpec, config: Any) -> list[str]:
    """What the student cannot be quantized with: its layers, its two ends, the group sizes."""
    from quant.quantize import check_group_size
    from quant.targets import find_targets, meta_model

    model, kept = meta_model(config), dict.fromkeys(sweep.keep_16bit)
    said = _KeyWording()
    faults = faults_in(lambda: find_targets(model, QuantSpec(8, CHANNEL), kept, said), "sweep")
    if not faults and (sweep.embeddings or sweep.head):
        ends = QuantSpec(8, CHANNEL, "hqq", sweep.embeddings, sweep.head)
        key = "sweep.embeddings" if sweep.embeddings else "sweep.head"
        faults = faults_in(lambda: find_targets(model, ends, kept, said), key)
    if faults:
        return faults  # what follows would only repeat them
    sizes = dict.fromkeys(cell.group_size for cell in sweep.cells())
    check = partial(
        check_group_size, model, embeddings=sweep.embeddings, head=sweep.head, layers=kept
    )
    return [
        fault for size in sizes for fault in faults_in(partial(check, [size]), "sweep.group_size")
    ]


class _KeyWording(Wording):
    """`sweep.keep_16bit`, which lists what stays in 16 bits."""

    def entry(self, pattern: object) -> str:
        return f"sweep.keep_16bit: {pattern!r}"

    def keep(self, patterns: Iterable[str]) -> str:
        return f"sweep.keep_16bit: {list(patterns)}"

    def kept(self) -> str:
        return "what sweep.keep_16bit lists"
