"""A Hugging Face folder of a quantized model that loads without this project.

    from quant.export.hf.export import export_hf
    report = export_hf(model, "runs/demo/student", "out", calibration=ids)

The formats are those of compressed-tensors:
- "symmetric", "asymmetric": `pack-quantized` int4 (codes of up to 4 bits) or int8, in groups or per
  row. The codes of hqq have zero points that are fractions, which no such grid has, so the weights
  move: with calibration ids several ways are measured end to end and the lowest KL is written.
- int8-dynamic layers: `int-quantized`, codes exactly as they are.
- "exact": hqq's codes and zero points as they are (any bits, tables and tied heads too).
- "bf16": no quantization.

Verified, by the tests, with transformers 5.23 and compressed-tensors 0.20: every format loads with
`AutoModelForCausalLM.from_pretrained` in a process without this project, and answers as measured.
By reading vLLM only (`compressed_tensors.py`, `schemes/compressed_tensors_wNa16.py`,
`schemes/compressed_tensors_w8a8_int8.py`, `utils.py`): int4 and int8 `pack-quantized` in groups of
32, 64, 128 or per row, integer zero points with int4 alone, W8A8, and a quantized head (since
vllm-project/vllm#37291) are what it runs; it has no strategy for "exact" and refuses it.
Asymmetric weights load in transformers only while it dequantizes: config.json asks for that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant.artifact import load_quantized
from quant.export import ExportReport
from quant.export.hf.candidates import (
    ALONE,
    PORTABLE,
    LayerFormats,
    candidates,
    exact_plan,
    portable_plan,
    tied_names,
)
from quant.export.hf.compressed_tensors import Packed
from quant.export.hf.folder import check_folders, write_folder
from quant.export.hf.trial import Reference, importance, put, quantized_inputs, stock_model
from quant.layers.linear import QuantEmbedding, quant_weights
from trainer.models.load import cast_stored

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class HfReport(ExportReport):
    """An `ExportReport` with what was chosen, and why.

    choice: the candidate that was written. kl: candidate -> mean KL in nats per position over the
    calibration ids, of the reference (the 16-bit original if there is one, else the quantized
    model) to the candidate; empty without calibration. kl_of_model: of the original to the
    quantized model, if there is an original. kl_to_codes: of the quantized model to what was
    written; top1_to_codes: share of positions where both have the same first choice.
    """

    choice: str = ""
    kl: dict[str, float] = field(default_factory=dict)
    kl_of_model: float | None = None
    kl_to_codes: float | None = None
    top1_to_codes: float | None = None


def export_hf(
    model: PreTrainedModel | str | Path,
    source: str | Path,
    out: str | Path,
    calibration: Tensor | None = None,
    formats: Sequence[str] | None = None,
    original: PreTrainedModel | str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int, str], None] | None = None,
    dtype: torch.dtype | None = None,
) -> HfReport:
    """Write a quantized model into `out`, a folder that appears whole or not at all.

    model: quantized, or the folder of one. source: a folder with the tokenizer's files.
    calibration: int64 `[n, seq]`, token ids that nothing is reported on. formats: some of
    "symmetric" and "asymmetric" (default: both; the lowest KL wins), or "exact" or "bf16" alone.
    original: the unquantized model or its folder: weights to quantize from, and the reference of
    the choice. shard_bytes: largest safetensors file. progress: called with the number of
    candidates that were measured, of all, and the name of the next. dtype: what models are computed
    in while candidates are compared; None: their own. Raises ValueError (one line)
    for folders, ids or models that will not do: experts, group sizes, layers that are no
    `torch.nn.Linear`, formats that do not hold the model.
    """
    source, out = Path(source), Path(out)
    wanted = _formats(formats)
    check_folders(source, out)
    if not isinstance(model, PreTrainedModel):
        model = load_quantized(model, prefer="plain")
    _check_model(model)
    _check_ids(calibration, model)
    stock = stock_model(model)
    linear = [name for name, module in stock.named_modules() if isinstance(module, nn.Linear)]
    plan = LayerFormats({}, [])
    if wanted == ("exact",):
        plan = exact_plan(model)
    elif wanted != ("bf16",):
        plan = portable_plan(model, linear)
    chosen = _choose(model, stock, plan, wanted, calibration, original, progress, dtype)
    put(stock, chosen.packed)
    notes = [*plan.notes, *chosen.notes, *_sixteen_bits(model, stock, plan)]
    files, tensors = write_folder(
        stock, chosen.packed, linear, chosen.dequantize, source, out, shard_bytes, notes
    )
    return HfReport(
        format=_format_name(chosen.packed, stock),
        files=files,
        bytes=sum(files.values()),
        tensors=tensors,
        notes=notes,
        error=_errors(model, chosen.packed),
        choice=chosen.name,
        kl=chosen.kl,
        kl_of_model=chosen.kl_of_model,
        kl_to_codes=chosen.kl_to_codes,
        top1_to_codes=chosen.top1_to_codes,
    )


@dataclass(frozen=True)
class _Chosen:
    name: str
    packed: dict[str, Packed]
    dequantize: bool
    notes: list[str]
    kl: dict[str, float] = field(default_factory=dict)
    kl_of_model: float | None = None
    kl_to_codes: float | None = None
    top1_to_codes: float | None = None


def _choose(
    model: PreTrainedModel,
    stock: PreTrainedModel,
    plan: LayerFormats,
    formats: Sequence[str],
    calibration: Tensor | None,
    original: PreTrainedModel | str | Path | None,
    progress: Callable[[int, int, str], None] | None,
    dtype: torch.dtype | None,
) -> _Chosen:
    """The candidate of lowest KL; without calibration the default one. May change `stock`."""
    if not plan.schemes:
        return _Chosen("16 bits", {}, False, ["No layer is quantized in this folder."])
    first = _original(original, stock)
    weights = (
        None
        if first is None
        else {name: first.get_parameter(f"{name}.weight").data for name in plan.schemes}
    )
    if calibration is None:
        tries = candidates(model, plan, formats, None, None)
        note = [f"{tries[0].name}: not chosen on KL, for there was no calibration."]
        return _Chosen(
            tries[0].name, tries[0].pack(), tries[0].dequantize, note if len(tries) > 1 else []
        )
    stock, quantized = _computing(stock, dtype), _computing(model, dtype)
    inputs = importance(stock, calibration, list(plan.schemes))
    tries = candidates(model, plan, formats, weights, inputs)
    codes = Reference(quantized, calibration)
    reference = codes if first is None else Reference(_computing(first, dtype), calibration)
    kl = {}
    for number, candidate in enumerate(tries):
        if progress is not None:
            progress(number, len(tries), candidate.name)
        packed = candidate.pack()
        put(stock, packed)
        with quantized_inputs(stock, packed):
            kl[candidate.name] = reference.compare(stock)[0]
        if number < len(tries) - 1:
            del packed  # before the next is made: each has the size of the model's codes
    best = min(tries, key=lambda tried: kl[tried.name])
    if best is not candidate:
        del packed
        packed = best.pack()
        put(stock, packed)
    candidate = best
    with quantized_inputs(stock, packed):
        divergence, agreed = codes.compare(stock)
    notes = [
        f"{candidate.name}: KL {divergence:.2e} to the quantized model's own codes, the same first "
        f"choice at {agreed:.1%} of {calibration.numel()} calibration positions."
    ]
    own = None if first is None else reference.compare(quantized)[0]
    return _Chosen(candidate.name, packed, candidate.dequantize, notes, kl, own, divergence, agreed)


def _computing(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model as it computes in `dtype`; a copy where that is not its own."""
    if dtype in (None, model.dtype):
        return model
    other = copy.deepcopy(model)
    cast_stored(other, dtype)
    return other


def _formats(formats: Sequence[str] | None) -> tuple[str, ...]:
    if formats is None:
        return PORTABLE
    wanted = (formats,) if isinstance(formats, str) else tuple(formats)
    known = len(wanted) == 1 and wanted[0] in ALONE
    if not known and (not wanted or any(name not in PORTABLE for name in wanted)):
        raise ValueError(
            f"formats {list(wanted)} are none; may be some of {', '.join(PORTABLE)}, or "
            f"{' or '.join(ALONE)} alone"
        )
    return wanted


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not quant_weights(model):
        raise ValueError(f"{name} holds no quantized layer; quantize it first")
    fused = [name for name, weight in model.named_parameters() if weight.dim() > 2]
    if fused:
        raise ValueError(
            f"{name} has experts or fused weights ({fused[0]}), which compressed-tensors stores "
            "in another layout than this export writes; only dense models can be exported"
        )


def _check_ids(ids: Tensor | None, model: PreTrainedModel) -> None:
    if ids is None:
        return
    if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise ValueError(
            f"calibration is {ids.dtype} {list(ids.shape)}; must be torch.int64 [sequences, tokens]"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"calibration has ids from {int(ids.min())} to {int(ids.max())}; the model's "
            f"vocabulary has 0 to {vocabulary - 1}"
        )


def _original(
    original: PreTrainedModel | str | Path | None, stock: PreTrainedModel
) -> PreTrainedModel | None:
    if original is None:
        return None
    where, found = "the original", original
    if not isinstance(found, PreTrainedModel):
        where = str(found)
        found = AutoModelForCausalLM.from_pretrained(where, dtype=stock.dtype).eval()
        nn.Module.to(found, stock.device)
    shapes = {name: weight.shape for name, weight in found.named_parameters()}
    for name, weight in stock.named_parameters():
        if shapes.get(name) != weight.shape:
            other = list(shapes[name]) if name in shapes else "missing"
            raise ValueError(
                f"{where} is not what the model was quantized from: {name} is {other}, "
                f"must be {list(weight.shape)}"
            )
    return found


def _sixteen_bits(model: PreTrainedModel, stock: PreTrainedModel, plan: LayerFormats) -> list[str]:
    """A note for every quantized layer that is stored in 16 bits, with its bytes."""
    notes = []
    tied = tied_names(model)
    for name, layer in quant_weights(model).items():
        if name in plan.schemes or name in tied:
            continue
        why = ""
        if isinstance(layer, QuantEmbedding):
            why = " (vLLM looks up few kinds of quantized tables)"
        notes.append(
            f"{name} is stored as {_short(stock.dtype)}{why}: "
            f"{layer.rows * layer.columns * stock.dtype.itemsize:,} bytes."
        )
    return notes


def _format_name(packed: dict[str, Packed], stock: PreTrainedModel) -> str:
    kinds = sorted({str(layer.scheme) for layer in packed.values()})
    if not kinds:
        return _short(stock.dtype)
    layouts = sorted({layer.scheme.format for layer in packed.values()})
    return f"compressed-tensors {'+'.join(layouts)}: {'; '.join(kinds)}"


def _errors(model: PreTrainedModel, packed: dict[str, Packed]) -> dict[str, float]:
    """Relative error of each stored weight against the dequantized one, where there is any."""
    found = {}
    layers = quant_weights(model)
    for name, layer in packed.items():
        if name not in layers:
            continue
        own = layers[name].dequantize(torch.float32).cpu()
        error = float((layer.weight(torch.float32) - own).norm() / own.norm())
        if error:
            found[f"{name}.{next(iter(layer.tensors()))}"] = error
    return found


def _short(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
