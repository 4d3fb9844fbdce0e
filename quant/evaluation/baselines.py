"""The models beside the cells: 16-bit ones, and those that were quantized elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quant.artifact import load_quantized
from quant.artifact.sizes import dense_bytes, parameter_count
from quant.evaluation.cell import MADE, SPEEDS
from quant.evaluation.evaluate import evaluate, teacher_metrics
from quant.evaluation.measure import (
    METRICS,
    EvaluationConfig,
    EvaluationData,
    dtype_name,
    measure,
    metrics,
    tasks_of,
    versions,
)
from quant.evaluation.memory import Peak
from quant.evaluation.reference import StoredReference, write_reference
from quant.layers.linear import dense_weights
from quant.quant_spec import QuantSpec
from trainer.models.load import cast_stored

Role = Literal["teacher", "student", "control"]


def evaluate_model(
    model_folder: str,
    report: EvaluationData,
    select: EvaluationData | None,
    role: Role,
    name: str | None = None,
    *,
    config: EvaluationConfig | None = None,
    references: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The result of an unquantized model, as in `evaluations/<role>.json`.

    A teacher's numbers come from its records, its size from its config (`model_folder` may then be
    a hub name); it is loaded (and has a compute_dtype) only for tasks and for `references`:
    {part: folder} where its final hidden states go, for cells to be compared with. Bytes are those
    of 16-bit weights. Retention and top1_agreement are against the teacher. Raises ValueError for
    a teacher without records.
    """
    config = config or EvaluationConfig()
    torch.set_num_threads(config.threads)
    parts = {"report": report, "select": select}
    model = None
    if role != "teacher" or references or config.tasks:
        model = config.load(model_folder)
    stored: dict[str, Any] = {}
    for part_name, folder in (references or {}).items():
        part = parts[part_name]
        assert part is not None and model is not None
        meta = write_reference(model, part.batches(), folder, config.device, part.on("reference"))
        if meta["kind"] == "hidden":  # its answers, without running it a second time
            stored[part_name] = StoredReference(folder, model_folder, config.device)
    found: dict[str, dict[str, Any] | None] = {}
    for part_name, part in parts.items():
        if part is None:
            found[part_name] = None
        elif role == "teacher":
            if part.records is None:
                raise ValueError("the teacher is evaluated from its records; none were given")
            found[part_name] = metrics(teacher_metrics(part.batches(), part.records()), None)
        else:
            assert model is not None
            found[part_name] = metrics(
                evaluate(
                    stored.get(part_name, model),
                    part.batches(),
                    None,
                    part.records() if part.records is not None else None,
                    config.device,
                    vocab=config.vocab,
                    progress=part.on("evaluation"),
                ),
                None,
            )
    assert found["report"] is not None
    result = {**found["report"], "select": found["select"]}
    tasks = None if model is None else tasks_of(model, model_folder, config, None)
    compute_dtype = None if model is None else dtype_name(model.dtype)
    if model is None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    return {
        "role": role,
        "name": name or Path(model_folder).name,
        "parameters": parameter_count(model),
        "bytes": dense_bytes(model),
        **result,
        "top1_agreement": result["teacher_top1_agreement"],
        "tasks": tasks,
        "compute_dtype": compute_dtype,
        "decode_tokens_per_s": None,
        "prefill_tokens_per_s": None,
        "versions": versions(),
    }


def evaluate_extra(
    extra_folder: str,
    model_folder: str,
    report: EvaluationData,
    select: EvaluationData | None,
    name: str,
    *,
    config: EvaluationConfig | None = None,
    reference_tasks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of a model that was quantized elsewhere, beside the student in `model_folder`.

    A folder of `stillhouse quantize --out` is loaded as what it is, any other by transformers,
    which knows the quantizer that its config names. Bytes are those of its weight files. Raises
    ValueError (one line) for a folder that neither loads.
    """
    config = config or EvaluationConfig()
    torch.set_num_threads(config.threads)
    start = time.perf_counter()
    with Peak(config.device) as peak:
        model, how = load_extra(extra_folder, config)
        with dense_weights(model, model.dtype):
            found = measure(model, model_folder, "student", report, select, config)
            tasks = tasks_of(model, model_folder, config, reference_tasks)
    files = sum(path.stat().st_size for path in Path(extra_folder).glob("*.safetensors"))
    with torch.device("meta"):
        model_config = AutoConfig.from_pretrained(extra_folder, trust_remote_code=False)
        if hasattr(model_config, "quantization_config"):
            del model_config.quantization_config
        weights = parameter_count(AutoModelForCausalLM.from_config(model_config))
    return {
        "role": "extra",
        "name": name,
        "technique": how,
        "status": "done",
        "error": None,
        **found,
        "bytes": files,
        "parameters": weights,
        "bits_per_weight": 8 * files / weights,
        "compute_dtype": dtype_name(model.dtype),
        "tasks": tasks,
        **dict.fromkeys(SPEEDS),
        "eval_s": time.perf_counter() - start,
        "eval_peak_bytes": peak.bytes,
        "versions": versions(),
        "fingerprint": None,
    }


def load_extra(folder: str, config: EvaluationConfig) -> tuple[PreTrainedModel, str]:
    """A model quantized elsewhere and how it was, in words. Raises ValueError, one line."""
    from quant.artifact.description import DESCRIPTION

    if (Path(folder) / DESCRIPTION).is_file():
        model = load_quantized(folder, config.device, prefer="plain")
        cast_stored(model, config.compute_dtype(model))
        spec: QuantSpec = model.quant_spec  # type: ignore[assignment]
        return model, f"quantized elsewhere ({spec.key})"
    try:
        model = config.load(folder)
    except Exception as error:  # transformers and quantizers raise many kinds
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: transformers cannot load it ({why})") from error
    by: Any = getattr(model.config, "quantization_config", None)
    if by is None:
        return model, f"as given, in {dtype_name(model.dtype)}"
    known = by if isinstance(by, dict) else by.to_dict()
    return model, f"quantized elsewhere ({known.get('quant_method', 'unknown')})"


def failed_extra(name: str, error: str) -> dict[str, Any]:
    """The result of an extra model that failed: every key of `evaluate_extra`'s, numbers None."""
    return {
        "role": "extra",
        "name": name,
        "technique": "quantized elsewhere",
        "status": "failed",
        "error": error,
        **dict.fromkeys((*METRICS, *MADE, *SPEEDS, "select")),
        "versions": versions(),
        "fingerprint": None,
    }
