"""Exports of quantized models, and what an export reports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ExportReport:
    """What lies in an exported model, for every format.

    format: in words, e.g. "gguf Q4_1 + F16". files: size in bytes by name, of everything that was
    written; bytes: their sum. tensors: tensor of the file -> the type it is stored in. notes: what
    a user should know, one sentence each. error: tensor of the file -> relative error that storing
    it cost beyond quantization (norm of the difference over norm of the weight); tensors that are
    stored exactly are left out.
    """

    format: str
    files: dict[str, int]
    bytes: int
    tensors: dict[str, str]
    notes: list[str] = field(default_factory=list)
    error: dict[str, float] = field(default_factory=dict)
