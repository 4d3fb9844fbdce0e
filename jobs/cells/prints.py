"""Fingerprints: what the result of a cell, or of a model beside the cells, depends on."""

from __future__ import annotations

from typing import Any

from jobs.cells.given import extra_identity, task_identity
from jobs.inputs import EVALUATION, Outputs
from jobs.spec import JobSpec
from quant.grid import Cell
from quant.spec import ExtraModel, SweepSpec
from trainer.fingerprint import fingerprint
from trainer.stage_inputs import capture_inputs


def common(sweep: SweepSpec, outputs: Outputs) -> dict[str, Any]:
    """What all results of a sweep depend on: the sequences, the records, how they are read."""
    return {
        "evaluation": EVALUATION,
        "corpus": _held_out(outputs),
        "cache": outputs.get("capture", {}).get("cache"),
        "batch_sequences": sweep.batch_sequences,
        "dtype": sweep.dtype,
        **({"tasks": [task_identity(task) for task in sweep.tasks]} if sweep.tasks else {}),
    }


def _held_out(outputs: Outputs) -> str:
    """The corpus as far as select and report go: with more of train they are the same."""
    prepared = outputs["prepare"]
    return str(prepared.get("held_out", prepared["corpus"]))


def cell_fingerprint(cell: Cell, spec: JobSpec, model: Any, outputs: Outputs) -> str:
    """What a cell's result depends on; `model`: the identity of the 16-bit model it is made of."""
    sweep = spec.sweep
    assert sweep is not None
    kept = sorted(set(sweep.keep_16bit))
    found = {
        **common(sweep, outputs),
        "cell": cell.to_dict(),
        "model": model,
        "keep_16bit": kept,
    }
    if cell.recovered:
        assert sweep.recover is not None
        found["recover"] = sweep.recover.model_dump(exclude={"bits"})
        found["seed"] = spec.seed
        found["corpus"] = outputs["prepare"]["corpus"]  # its train part too
        # It learns from the records that the training of this run had captured.
        found["captured"] = capture_inputs(spec)
    return fingerprint(found)


def model_fingerprint(role: str, spec: JobSpec, model: Any, outputs: Outputs) -> str:
    """What the evaluation of a 16-bit model depends on."""
    assert spec.sweep is not None
    return fingerprint({**common(spec.sweep, outputs), "role": role, "model": model})


def reference_folder(role: str, spec: JobSpec, model: Any, outputs: Outputs) -> str:
    """Where in the run a model's final hidden states are: named by what they depend on."""
    assert spec.sweep is not None
    found = {
        "corpus": _held_out(outputs),
        "batch_sequences": spec.sweep.batch_sequences,
        "dtype": spec.sweep.dtype,
        "model": model,
        "evaluation": EVALUATION,
    }
    return f"references/{role}-{fingerprint(found)[:16]}"


def extra_fingerprint(extra: ExtraModel, spec: JobSpec, student: Any, outputs: Outputs) -> str:
    """What the evaluation of a model quantized elsewhere depends on; it is beside the student."""
    print_ = model_fingerprint("extra", spec, student, outputs)
    return fingerprint({"extra": extra_identity(extra), "beside": print_})
