"""Export to GGUF, the file that llama.cpp and what builds on it run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
from gguf import GGMLQuantizationType as Type
from gguf.quants import quant_shape_to_byte_shape
from transformers import PreTrainedModel

from quant.export import ExportReport
from quant.export.gguf.blocks import encode
from quant.export.gguf.model import (
    MATRICES,
    Kind,
    PlannedTensor,
    add_parameters,
    architecture_of,
    embedding_rows,
    planned_tensors,
)
from quant.export.gguf.tokenizer import read_vocabulary

FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Type.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
UNTOLD_ERROR = 1e-6  # below float32's own rounding in a matrix product, so not worth a note


@torch.no_grad()
def export_gguf(
    model: PreTrainedModel,
    folder: Path,
    out: Path,
    kind: Kind = "auto",
    name: str | None = None,
) -> ExportReport:
    """Write `model`, quantized or plain, with the tokenizer in `folder` as one GGUF file.

    out: a path that ends in .gguf, or a folder, which then gets `<name>.gguf`. name: what the file
    says that the model is called (`general.name`), by default `model_name(folder)`. kind:
    "auto" keeps codes of up to 4 bits as Q4_1 and of 5 bits as Q5_1, exactly but for the float16
    rounding of offsets, codes of more bits as Q8_0, and what is not quantized as F16; "f32",
    "f16" and "q8_0" store every matrix that way. The file appears whole or not at all, and one
    tensor at a time is in memory twice. Raises ValueError (one line) for a model, tokenizer or
    kind that is not offered.
    """
    if kind not in MATRICES:
        raise ValueError(f"kind {kind!r} is unknown; may be {', '.join(MATRICES)}")
    folder, out = Path(folder).resolve(), Path(out)
    name = name or model_name(folder)
    offered = architecture_of(model)
    rows = embedding_rows(model)
    vocabulary = read_vocabulary(folder, rows)
    planned = list(planned_tensors(model, offered, kind))
    shares = Counter[Type]()
    for tensor in planned:
        shares[tensor.kind] += tensor.count if len(tensor.shape) == 2 else 0
    types = [stored for stored, count in shares.most_common() if count]

    writer = GGUFWriter(None, offered.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[types[0]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_parameters(writer, model.config, offered, rows)
    vocabulary.write(writer)

    path = out if out.suffix == ".gguf" else out / f"{name}.gguf"
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; may be a file, or a folder whose name does not end so"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    costs = _write(writer, planned, path)
    size = path.stat().st_size
    return ExportReport(
        format="gguf " + " + ".join(stored.name for stored in types),
        files={path.name: size},
        bytes=size,
        tensors={tensor.name: tensor.kind.name for tensor in planned},
        notes=[_size(size, planned), *_remarks(planned, costs), *vocabulary.notes],
        error={name: error for name, (error, _) in costs.items() if error},
    )


def model_name(folder: Path) -> str:
    """What the model in `folder` is called, which the folder's own name may not say.

    Of `models--org--name/snapshots/<hash>`, as the hub's cache has it, the name; of
    `run/cells/key/model`, run and key; of any other folder `model`, the name of the one around it.
    """
    folder = Path(folder).resolve()
    parents = [parent.name for parent in folder.parents] + [""] * 3
    if parents[0] == "snapshots" and parents[1].startswith("models--"):
        return parents[1].rpartition("--")[2]
    if folder.name != "model":
        return folder.name
    if parents[1] == "cells":
        return f"{parents[2]}-{parents[0]}"
    return parents[0] or folder.name


def _write(
    writer: GGUFWriter, planned: Sequence[PlannedTensor], path: Path
) -> dict[str, tuple[float, float]]:
    """Write the file; returns the relative and the largest absolute error by tensor."""
    for tensor in planned:
        size = int(np.prod(quant_shape_to_byte_shape(tensor.shape, tensor.kind)))
        dtype = np.dtype(np.float32)  # of no account beside raw_dtype
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, raw_dtype=tensor.kind)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    costs = {}
    try:
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in planned:
                made = encode(tensor.weight(), tensor.kind)
                writer.write_tensor_data(made.data)
                costs[tensor.name] = (made.error, made.largest)
        finally:
            writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return costs


def _size(size: int, planned: Sequence[PlannedTensor]) -> str:
    count = sum(tensor.count for tensor in planned)
    return f"{size} bytes for {count} weights: {8 * size / count:.2f} bits per weight in all"


def _remarks(planned: Sequence[PlannedTensor], costs: dict[str, tuple[float, float]]) -> list[str]:
    """Why tensors are stored as they are, and for each type what that cost."""
    notes = []
    reasons = Counter(tensor.why for tensor in planned if tensor.why)
    for why, number in reasons.items():
        notes.append(f"{number} tensor{'s' * (number > 1)}: {why}")
    for stored in (Type.Q4_1, Type.Q5_1, Type.Q8_0, Type.F16, Type.BF16):
        names = [t.name for t in planned if t.kind == stored and costs[t.name][0] > UNTOLD_ERROR]
        if not names:
            continue
        worst = max(names, key=lambda name: costs[name][0])
        largest = max(costs[name][1] for name in names)
        number = len(names)
        what = "the float16 rounding of offsets" if stored in (Type.Q4_1, Type.Q5_1) else "rounding"
        notes.append(
            f"{stored.name}: {what} costs {number} tensor{'s' * (number > 1)} a relative error of "
            f"at most {costs[worst][0]:.1e} ({worst}), in one weight at most {largest:.1e}"
        )
    return notes
