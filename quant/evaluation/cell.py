"""The work of one cell of the sweep: plain functions over model folders, which a scheduler may run
anywhere. Errors are the caller's to record.

`kernel_kl` tells whether the kernel that a quantized model decodes with answers as its weights say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.artifact import load_quantized, save_quantized
from quant.artifact.sizes import parameter_count, true_bits_per_weight, true_bytes
from quant.evaluation.evaluate import evaluate
from quant.evaluation.kl import full_kl
from quant.evaluation.measure import (
    METRICS,
    EvaluationConfig,
    EvaluationData,
    dtype_name,
    measure,
    reference_of,
    tasks_of,
    versions,
)
from quant.evaluation.memory import Peak
from quant.evaluation.speed import measure_speed
from quant.grid import Cell
from quant.kernels import use_kernels
from quant.layers.linear import dense_weights
from quant.methods import load_method
from quant.quant_spec import DYNAMIC, QuantSpec
from quant.quantize import Progress, quantize, stored_dtype
from trainer.models.load import cast_stored, load_for_inference
from trainer.processor import fast_dtype, processor_name

PROMPT, STEPS = 8, 24


def kernel_kl(model: PreTrainedModel) -> float:
    """Mean KL(plain || chosen) in nats: next-token distributions of `model` with the kernels that
    it has, against those of dequantized weights.

    Both decode the same random ids, a prompt and then one id at a time, so nothing but the
    kernels differs. The evaluation of a cell runs dequantized weights: this is what its numbers
    leave out. Leaves `model` with plain kernels.
    """
    config = model.config.get_text_config()
    length = min(PROMPT + STEPS, getattr(config, "max_position_embeddings", None) or PROMPT + STEPS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator).to(model.device)
    chosen = _log_probs(model, ids)
    use_kernels(model, "plain")
    # In double precision: of a kernel that answers as the plain weights do, what float32 rounds off
    # would be less than nothing.
    plain = _log_probs(model, ids).double().log_softmax(-1)
    return max(0.0, float(full_kl(plain, chosen.double().log_softmax(-1)).mean()))


@torch.no_grad()
def _log_probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 `[1 + further ids, vocab]` after the prompt and after each id that follows it."""
    found, cache = [], None
    for part in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)


MADE = (
    "bits_per_weight",
    "bytes",
    "parameters",
    "recovered",
    "tasks",
    "compute_dtype",
    "evaluated_with",
    "keep_16bit",
    "quantize_s",
    "eval_s",
    "eval_peak_bytes",
)
SPEEDS = (
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "speedup",
    "baseline_dtype",
    "resident_bytes",
    "kernel",
    "kernel_kl",
    "peak_memory_bytes",
    "memory_note",
    "energy_per_token_j",
    "energy_note",
    "device_name",
)


def run_cell(
    cell: Cell,
    model_folder: str,
    report: EvaluationData,
    select: EvaluationData | None = None,
    out_folder: str | None = None,
    *,
    config: EvaluationConfig | None = None,
    keep_16bit: Sequence[str] = (),
    recover: Callable[[PreTrainedModel], dict[str, Any]] | None = None,
    reference_tasks: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    made: Mapping[str, Any] | None = None,
    on_saved: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Quantize the model in `model_folder` as the cell says, save it to `out_folder`, evaluate it
    against itself unquantized and against the teacher's records.

    The evaluation runs dense matmuls over the dequantized weights, which every kernel agrees with
    to rounding; `evaluated_with` says so. Returns the cell's result with every key of
    `result.json`; speeds and the kernel they were had with are None until `measure_cell`.
    `quantize_s` is without loading the model. Without `out_folder` nothing is saved. `keep_16bit`:
    names or globs of modules that are not quantized. recover: trains a recovered cell's scales in
    place, before it is saved; what it returns is kept. reference_tasks: results of the setting's
    tasks for the 16-bit model, to count flips against. progress: called with the number of weights
    that are quantized and of all; of the evaluation the parts tell, and of tasks the setting.

    on_saved: called once the model is in `out_folder`, before the evaluation, with what is known of
    it until then. made: that of an earlier start, whose model is in `out_folder`: it is evaluated.
    """
    config = config or EvaluationConfig()
    torch.set_num_threads(config.threads)
    with Peak(config.device) as peak:
        if made is None:
            model, made = _made(cell, model_folder, config, keep_16bit, recover, progress)
            if out_folder is not None:
                save_quantized(model, out_folder, cell.spec, {"versions": versions()})
                if on_saved is not None:
                    on_saved(made)
        else:
            assert out_folder is not None
            model = load_quantized(out_folder, config.device, prefer="plain")
        size = {"bits_per_weight": true_bits_per_weight(model), "bytes": true_bytes(model)}
        cast_stored(model, config.compute_dtype(model))
        start = time.perf_counter()
        with dense_weights(model, model.dtype):
            found = measure(model, model_folder, cell.model, report, select, config)
            tasks = tasks_of(model, model_folder, config, reference_tasks)
    return {
        **_identity(cell),
        "status": "done",
        "error": None,
        **found,
        **size,
        "parameters": parameter_count(model),
        "recovered": made["recovered"],
        "tasks": tasks,
        **dict.fromkeys(SPEEDS),
        "compute_dtype": dtype_name(model.dtype),
        "evaluated_with": _evaluated_with(cell.spec, model.dtype),
        "keep_16bit": sorted(set(keep_16bit)),
        "quantize_s": made["quantize_s"],
        "eval_s": time.perf_counter() - start,
        "eval_peak_bytes": peak.bytes,
        "versions": versions(),
        "fingerprint": None,
    }


def _made(
    cell: Cell,
    model_folder: str,
    config: EvaluationConfig,
    keep_16bit: Sequence[str],
    recover: Callable[[PreTrainedModel], dict[str, Any]] | None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The cell's model as it is stored, and what is known of it before its evaluation."""
    model = load_for_inference(model_folder, config.device)
    load_method(cell.spec.method)  # importing it is no part of the time
    start = time.perf_counter()
    kept = stored_dtype(model)
    layers = {**cell.layers, **dict.fromkeys(keep_16bit)}
    model = quantize(model, cell.spec, layers, kept, progress=progress)
    quantize_s = time.perf_counter() - start
    recovered = None
    if recover is not None and cell.recovered:
        cast_stored(model, config.compute_dtype(model))
        recovered = recover(model)
        cast_stored(model, kept)
    return model, {"quantize_s": quantize_s, "recovered": recovered}


def select_kl(
    cell: Cell,
    model_folder: str,
    select: EvaluationData,
    *,
    config: EvaluationConfig | None = None,
    keep_16bit: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The KL of a cell to its 16-bit model on `select`, and nothing else: for choosing one.

    Returns kl (mean, nats per token), sums and tokens of every sequence.
    """
    config = config or EvaluationConfig()
    torch.set_num_threads(config.threads)
    model, _ = _made(cell, model_folder, config, keep_16bit, None, progress)
    cast_stored(model, config.compute_dtype(model))
    reference = reference_of(select, model_folder, config)
    with dense_weights(model, model.dtype):
        found = evaluate(
            model,
            select.batches(),
            reference,
            None,
            config.device,
            vocab=config.vocab,
            progress=select.on("evaluation"),
        )
    each = found["per_sequence"]
    return {
        "kl": found["kl_to_reference"],
        "sums": each["kl_to_reference"],
        "tokens": each["tokens"],
    }


def _identity(cell: Cell) -> dict[str, Any]:
    """What a cell is, as its result says it."""
    layers = {
        name: None if spec is None else {"bits": spec.bits, "group_size": spec.group_size}
        for name, spec in cell.layers.items()
    }
    return {
        "model": cell.model,
        "spec": cell.spec.to_dict(),
        "layers": layers or None,
        "budget_mb": cell.budget_mb,
        "control_of": list(cell.control_of),
    }


def measure_cell(
    artifact_folder: str,
    baseline: PreTrainedModel,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int = 3,
    notify: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Speed of a saved cell, loaded for speed, beside the 16-bit model it was made from.

    baseline: that model, of `load_baseline`; the cell runs on its device. Run it while nothing else
    runs on the machine. tell(done): the share of the work, now and then. Returns
    `measure_speed`'s dict, and `kernel_kl`: how far the kernel's answers are from those of the
    dequantized weights that were evaluated.
    """
    device = baseline.device
    dtype = getattr(torch, fast_dtype(str(device)))
    model = load_quantized(artifact_folder, device, prefer="speed", dtype=dtype)
    found = measure_speed(model, baseline, prompt_tokens, decode_tokens, repeats, notify)
    return {**found, "kernel_kl": kernel_kl(model), "device_name": device_name(device)}


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's: speeds of different ones are not comparable."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def _evaluated_with(spec: QuantSpec, dtype: torch.dtype) -> str:
    """In words, what the evaluation multiplied: no kernel's packed codes."""
    activations = ", activations in int8" if spec.method == DYNAMIC else ""
    return f"dequantized weights in {dtype_name(dtype)}{activations}"


def failed_cell(cell: Cell, error: str) -> dict[str, Any]:
    """The result of a cell that failed: every key of `run_cell`'s, numbers None."""
    return {
        **_identity(cell),
        "status": "failed",
        "error": error,
        **dict.fromkeys((*METRICS, *MADE, *SPEEDS, "select")),
        "versions": versions(),
        "fingerprint": None,
    }
