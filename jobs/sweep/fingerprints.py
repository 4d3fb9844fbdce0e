"""Fingerprints of a sweep's results, and which cells keep their models."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import Attempt, Store
from cluster.storage.keys import fingerprint, flatten
from jobs.run.inputs import Outputs, ResolvedJob
from jobs.spec.job import JobSpec
from quant.grid import Cell
from quant.spec import ExtraModel, SweepSpec, Task
from trainer.models.load import find_model, identity
from trainer.stage_inputs import capture_inputs

if TYPE_CHECKING:
    pass

# Part of every cell's fingerprint: raise it when the same inputs would give another result.
EVALUATION = 3


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


def cell_fingerprint(cell: Cell, spec: JobSpec, model: object, outputs: Outputs) -> str:
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


def model_fingerprint(role: str, spec: JobSpec, model: object, outputs: Outputs) -> str:
    """What the evaluation of a 16-bit model depends on."""
    assert spec.sweep is not None
    return fingerprint({**common(spec.sweep, outputs), "role": role, "model": model})


def reference_folder(role: str, spec: JobSpec, model: object, outputs: Outputs) -> str:
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


def extra_fingerprint(extra: ExtraModel, spec: JobSpec, student: object, outputs: Outputs) -> str:
    """What the evaluation of a model quantized elsewhere depends on; it is beside the student."""
    own_fingerprint = model_fingerprint("extra", spec, student, outputs)
    return fingerprint({"extra": extra_identity(extra), "beside": own_fingerprint})


def complete(sweep: SweepSpec, result: dict[str, Any], store: Store, key: str) -> bool:
    """Whether a finished cell has all that is asked for: its speed, and its model if it is kept.

    Of a model that went because it was not on the front it is not known what the front is now: it
    stands, and `missing` finds those that are.
    """
    there = store.exists(f"cells/{key}/model/config.json")
    if there:
        return True
    measured = result.get("decode_tokens_per_s") is not None
    return measured and sweep.keep_models != "all"


def missing(sweep: SweepSpec, results: dict[str, dict[str, Any]], store: Store) -> list[str]:
    """Cells on the front whose models an earlier sweep did not keep."""
    from jobs.report.pareto import front_keys

    if sweep.keep_models != "pareto":
        return []
    return [
        key
        for key in sorted(front_keys(results))
        if not store.exists(f"cells/{key}/model/config.json")
    ]


def drop(sweep: SweepSpec, results: dict[str, dict[str, Any]], attempt: Attempt) -> list[str]:
    """Deletes the models that are not kept, of cells that are measured; returns their keys."""
    from jobs.report.pareto import front_keys

    if sweep.keep_models == "all":
        return []
    kept = front_keys(results) if sweep.keep_models == "pareto" else set()
    dropped = []
    for key, result in results.items():
        place = f"cells/{key}/model"
        done = result["status"] == "done" and result.get("decode_tokens_per_s") is not None
        if not done or key in kept or not attempt.store.exists(place):
            continue
        attempt.fence()
        attempt.store.delete(place, recursive=True)
        results[key] = {**result, "model_kept": False}
        attempt.write_json(f"cells/{key}/result.json", results[key])
        dropped.append(key)
    return dropped


def of_sweep(job: ResolvedJob, outputs: Outputs) -> dict[str, Any]:
    """What the whole sweep is made from; flat."""
    sweep = job.spec.sweep
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
    return {
        "evaluation": EVALUATION,
        **flatten(sweep.model_dump(), "sweep"),
        "corpus": outputs["prepare"]["corpus"],
        "cache": outputs.get("capture", {}).get("cache"),
        **flatten(models or job.names.student, "models"),
        **flatten({name: value for name, value in found.items() if value}, "of"),
    }


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
