"""What the Hugging Face export of a quantized student costs: KL, agreement and bytes of each way.

    python -m tests.bench.quant_hf [RUN]        (a minute, after make demo; RUN: runs/demo)

Ways are chosen on the run's `select` sequences; what stock transformers answers (in a process
without this project) is measured on its `report` sequences, which nothing was chosen on.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant.artifact import load_quantized
from quant.evaluation.kl import full_kl
from quant.export.hf.export import export_hf
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures.stock_transformers import stock_answers

SPECS = (QuantSpec(4, 64), QuantSpec(8, 64), QuantSpec(2, 64))
CALIBRATION, HELD_OUT = 8, 8  # sequences


def measure(
    student: str | Path,
    quantized: str | Path | QuantSpec,
    calibration: Tensor,
    held_out: Tensor,
) -> dict[str, Any]:
    """Export one quantized model in every way and ask stock transformers about each folder.

    student: a plain Hugging Face folder; quantized: how to quantize it, or the folder of an
    artifact of it; calibration, held_out: int64 `[n, seq]`. KL in nats per position; agreement of
    first choices as a share; bytes of the safetensors files.
    """
    student = Path(student)
    model = _quantized(student, quantized)
    dense = _student(student)
    with tempfile.TemporaryDirectory() as scratch:
        ways = {
            "chosen": {"calibration": calibration},
            "chosen from the 16-bit student": {"calibration": calibration, "original": dense},
            "uncalibrated": {},
            "exact": {"formats": ["exact"], "calibration": calibration},
            "bf16": {"formats": ["bf16"]},
        }
        reports = {
            name: export_hf(model, student, Path(scratch, name.replace(" ", "-")), **settings)
            for name, settings in ways.items()
        }
        folders = {name: Path(scratch, name.replace(" ", "-")) for name in ways}
        answers = stock_answers(dict.fromkeys(folders.values(), held_out))
        folder_bytes = {name: _weight_bytes(folder) for name, folder in folders.items()}
    ours, theirs = _logits(model, held_out), _logits(dense, held_out)
    rows = {}
    for name, report in reports.items():
        answer = answers[folders[name]]
        assert "logits" in answer, answer
        rows[name] = {
            "format": report.format,
            "choice": report.choice,
            "bytes": folder_bytes[name],
            "kl_to_quantized": _kl(ours, answer["logits"]),
            "top1_to_quantized": _same(ours, answer["logits"]),
            "kl_to_student": _kl(theirs, answer["logits"]),
            "top1_to_student": _same(theirs, answer["logits"]),
            "odd_keys": answer["odd"],
            "candidates": report.kl,
            "notes": report.notes,
        }
    return {
        "spec": model.quant_spec.key if hasattr(model, "quant_spec") else str(quantized),
        "quantized": {"kl_to_student": _kl(theirs, ours), "top1_to_student": _same(theirs, ours)},
        "student_bytes": _weight_bytes(student),
        "exports": rows,
    }


def _student(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def _quantized(student: Path, quantized: str | Path | QuantSpec) -> PreTrainedModel:
    if isinstance(quantized, QuantSpec):
        return quantize(_student(student), quantized)
    return load_quantized(quantized, prefer="plain")


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in ids])


def _kl(reference: Tensor, other: Tensor) -> float:
    logs = [torch.log_softmax(logits.flatten(0, 1), -1) for logits in (reference, other)]
    return float(full_kl(*logs).double().mean())


def _same(reference: Tensor, other: Tensor) -> float:
    return float((reference.argmax(-1) == other.argmax(-1)).double().mean())


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def sequences(run: Path, part: str, count: int) -> Tensor:
    """The first `count` sequences of a part of a run's corpus: int64 `[count, seq]`."""
    from cluster.storage import open_store
    from trainer.corpus.corpus import open_corpus

    done = sorted((run / "state").glob("prepare-*.json"))[-1]
    name = json.loads(done.read_text())["outputs"]["corpus"]
    corpus = open_corpus(open_store(str(run.parent / "_corpora" / name)))
    return torch.from_numpy(corpus.part(part).batch(np.arange(count)).input_ids)


def measure_run(run: Path) -> dict[str, Any]:
    """By cell, what exports of a run's student lose on text that nothing was chosen on.

    run: a run's folder, with student/ and its corpus beside it. kl, uncalibrated_kl, exact_kl: of
    the quantized model to each export, in nats per position; kl_to_student: of the 16-bit student
    to the chosen export, quantized_kl_to_student: to the quantized model itself; top1: share of
    equal first choices; bytes, student_bytes: of the weights' files.
    """
    run = Path(run)
    parts = sequences(run, "select", CALIBRATION), sequences(run, "report", HELD_OUT)
    found = {}
    for spec in SPECS:
        told = measure(run / "student", spec, *parts)
        ways = told["exports"]
        chosen = ways["chosen"]
        found[spec.key] = {
            "chosen": chosen["choice"],
            "format": chosen["format"],
            "bytes": chosen["bytes"],
            "student_bytes": told["student_bytes"],
            "kl": chosen["kl_to_quantized"],
            "top1": chosen["top1_to_quantized"],
            "kl_to_student": chosen["kl_to_student"],
            "quantized_kl_to_student": told["quantized"]["kl_to_student"],
            "with_student": ways["chosen from the 16-bit student"]["choice"],
            "with_student_kl_to_student": ways["chosen from the 16-bit student"]["kl_to_student"],
            "uncalibrated_kl": ways["uncalibrated"]["kl_to_quantized"],
            "exact_kl": ways["exact"]["kl_to_quantized"],
            "exact_bytes": ways["exact"]["bytes"],
        }
    return found


def main(arguments: Sequence[str]) -> None:
    found = measure_run(Path(arguments[0] if arguments else "runs/demo"))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
