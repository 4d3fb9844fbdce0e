"""The work of one cell of the sweep, and of the unquantized models beside it: plain functions
over model folders, which a scheduler may run anywhere. Errors are the caller's to record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quant.agreement import kernel_kl
from quant.artifact import FORMAT, load_quantized, save_quantized
from quant.bytes import dense_bytes, parameter_count, true_bits_per_weight, true_bytes
from quant.evaluate import Batch, TeacherRecords, evaluate, teacher_metrics
from quant.linear import dense_weights
from quant.methods import load_method
from quant.quantize import quantize
from quant.spec import DYNAMIC, QuantSpec
from quant.speed import measure_speed

Role = Literal["teacher", "student", "control"]
MEASURED = (
    "bits_per_weight",
    "bytes",
    "parameters",
    "tokens",
    "perplexity",
    "accuracy",
    "retention",
    "kl_to_student",
    "kl_to_student_p99",
    "kl_to_student_max",
    "kl_to_teacher",
    "top1_agreement",
    "teacher_top1_agreement",
    "per_sequence",
    "evaluated_with",
    "keep_16bit",
    "quantize_s",
    "eval_s",
)
SPEEDS = (
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "speedup",
    "resident_bytes",
    "kernel",
    "kernel_kl",
)


def versions() -> dict[str, str]:
    """What a result depends on: library versions and the artifact's format."""
    found = {name: version(name) for name in ("torch", "transformers", "hqq")}
    return {**found, "stillhouse_format": str(FORMAT)}


def load_model(
    folder: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder, in the dtype its config names."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False, use_safetensors=True
    )
    return model.requires_grad_(False).eval().to(device)


def run_cell(
    spec: QuantSpec,
    model_folder: str,
    batches: Iterable[Batch],
    teacher_records: Iterable[TeacherRecords] | None = None,
    out_folder: str | None = None,
    student_accuracy: float | None = None,
    threads: int = 1,
    device: torch.device | str = "cpu",
    vocab: int | None = None,
    keep_16bit: Sequence[str] = (),
) -> dict[str, Any]:
    """Quantize the model in `model_folder`, save it to `out_folder`, evaluate it against itself
    unquantized and against the teacher's records.

    The evaluation runs dense matmuls over the dequantized weights, which every kernel agrees with
    to rounding; `evaluated_with` says so. Returns the cell's result with every key of
    `result.json`; speeds and the kernel they were had with are None until `measure_cell`.
    `quantize_s` is without loading the model. `student_accuracy` is what retention refers to: by
    default the unquantized model's accuracy on the same batches. Without `out_folder` nothing is
    saved. `keep_16bit`: names or globs of modules that are not quantized.
    """
    torch.set_num_threads(threads)
    model = load_model(model_folder, device)
    load_method(spec.method)  # importing it is no part of the time
    start = time.perf_counter()
    model = quantize(model, spec, layers=dict.fromkeys(keep_16bit))
    quantize_s = time.perf_counter() - start
    if out_folder is not None:
        save_quantized(model, out_folder, spec, {"versions": versions()})

    start = time.perf_counter()
    reference = load_model(model_folder, device)
    with dense_weights(model, model.dtype):
        found = evaluate(model, batches, reference, teacher_records, device, vocab=vocab)
    eval_s = time.perf_counter() - start
    whole = found["reference_accuracy"] if student_accuracy is None else student_accuracy
    return {
        "spec": spec.to_dict(),
        "status": "done",
        "error": None,
        "bits_per_weight": true_bits_per_weight(model),
        "bytes": true_bytes(model),
        "parameters": parameter_count(model),
        "tokens": found["tokens"],
        "perplexity": found["perplexity"],
        "accuracy": found["accuracy"],
        "retention": _percent(found["accuracy"], whole),
        "kl_to_student": found["kl_to_reference"],
        "kl_to_student_p99": found["kl_to_reference_p99"],
        "kl_to_student_max": found["kl_to_reference_max"],
        "kl_to_teacher": found["kl_to_teacher"],
        "top1_agreement": found["top1_agreement"],
        "teacher_top1_agreement": found["teacher_top1_agreement"],
        "per_sequence": found["per_sequence"],
        **dict.fromkeys(SPEEDS),
        "evaluated_with": _evaluated_with(spec, model.dtype),
        "keep_16bit": sorted(set(keep_16bit)),
        "quantize_s": quantize_s,
        "eval_s": eval_s,
        "versions": versions(),
        "fingerprint": None,
    }


def measure_cell(
    artifact_folder: str,
    model_folder: str,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int = 3,
    threads: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Speed of a saved cell, loaded for speed, beside the bfloat16 model it was made from.

    Run it while nothing else runs on the machine. Returns `measure_speed`'s dict, and `kernel_kl`:
    how far the kernel's answers are from those of the dequantized weights that were evaluated.
    """
    torch.set_num_threads(threads)
    model = load_quantized(artifact_folder, device, prefer="speed")
    baseline = load_model(model_folder, device, torch.bfloat16)
    found = measure_speed(model, baseline, prompt_tokens, decode_tokens, repeats)
    return {**found, "kernel_kl": kernel_kl(model)}


def evaluate_model(
    model_folder: str,
    batches: Iterable[Batch],
    teacher_records: Iterable[TeacherRecords] | None,
    role: Role,
    name: str | None = None,
    threads: int = 1,
    device: torch.device | str = "cpu",
    vocab: int | None = None,
) -> dict[str, Any]:
    """The result of an unquantized model, as in `evaluations/<role>.json`.

    A teacher is never loaded: its numbers come from its records, its size from its config
    (`model_folder` may then be a hub name). Bytes are those of 16-bit weights. Retention and
    top1_agreement are against the teacher. Raises ValueError for a teacher without records.
    """
    torch.set_num_threads(threads)
    result: dict[str, Any] = {"role": role, "name": name or Path(model_folder).name}
    if role == "teacher":
        if teacher_records is None:
            raise ValueError("the teacher is evaluated from its records; none were given")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
        found = teacher_metrics(batches, teacher_records)
    else:
        model = load_model(model_folder, device)
        found = evaluate(model, batches, None, teacher_records, device, vocab=vocab)
    teacher_accuracy = found.get("teacher_accuracy")
    return {
        **result,
        "parameters": parameter_count(model),
        "bytes": dense_bytes(model),
        "tokens": found["tokens"],
        "accuracy": found["accuracy"],
        "perplexity": found["perplexity"],
        "kl_to_teacher": found.get("kl_to_teacher"),
        "retention": _percent(found["accuracy"], teacher_accuracy),
        "top1_agreement": found.get("teacher_top1_agreement"),
        "per_sequence": found.get("per_sequence"),
        "decode_tokens_per_s": None,
        "prefill_tokens_per_s": None,
        "versions": versions(),
    }


def _evaluated_with(spec: QuantSpec, dtype: torch.dtype) -> str:
    """In words, what the evaluation multiplied: no kernel's packed codes."""
    activations = ", activations in int8" if spec.method == DYNAMIC else ""
    return f"dequantized weights in {str(dtype).removeprefix('torch.')}{activations}"


def _percent(part: float, whole: float | None) -> float | None:
    return 100 * part / whole if whole else None


def failed_cell(spec: QuantSpec, error: str) -> dict[str, Any]:
    """The result of a cell that failed: every key of `run_cell`'s, numbers None."""
    return {
        "spec": spec.to_dict(),
        "status": "failed",
        "error": error,
        **dict.fromkeys((*MEASURED, *SPEEDS)),
        "versions": versions(),
        "fingerprint": None,
    }
