"""Faults that only the world can tell: files, models, storage. Looked for before Ray starts."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from cluster.storage import open_store
from jobs.spec import JobSpec
from quant.spec import CHANNEL, QuantSpec, SweepSpec
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
    faults = faults_in(lambda: find_targets(model, QuantSpec(8, CHANNEL), kept), "sweep")
    if not faults and (sweep.embeddings or sweep.head):
        ends = QuantSpec(8, CHANNEL, "hqq", sweep.embeddings, sweep.head)
        key = "sweep.embeddings" if sweep.embeddings else "sweep.head"
        faults = faults_in(lambda: find_targets(model, ends, kept), key)
    if faults:
        return [_in_keys(fault) for fault in faults]  # what follows would only repeat them
    sizes = dict.fromkeys(cell.group_size for cell in sweep.cells())
    check = partial(
        check_group_size, model, embeddings=sweep.embeddings, head=sweep.head, layers=kept
    )
    return [
        fault for size in sizes for fault in faults_in(partial(check, [size]), "sweep.group_size")
    ]


def _in_keys(fault: str) -> str:
    """A fault that names the argument `layers` of `quantize`, with the spec's key instead."""
    listed = r"(?:quantize\(model, spec, )?layers=\{(?P<globs>[^{}]*)\}\)?"
    key = "sweep.keep_16bit"
    fault = re.sub(listed, lambda found: f"{key}: [{found['globs'].replace(': None', '')}]", fault)
    fault = re.sub(r"^sweep(?:\.\w+)?: layers\[('.*'|\".*\")\] ", rf"{key}: \1 ", fault)
    return fault.replace("`layers` lists as None", f"{key} lists")
