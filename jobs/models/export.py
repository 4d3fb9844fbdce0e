"""`stillhouse export`: a quantized model in a format that other programs load."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import Store, open_store
from cluster.storage.store import format_bytes
from jobs.errors import SpecErrors
from jobs.models.find import Found, compute_dtype, load_any, load_tokenizer, quiet
from jobs.models.terminal import bits, progress_bar

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quant.export import ExportReport

# Of the run's select part, to choose between formats on; several candidates are measured on it.
CALIBRATION_TOKENS = 8_192
PROSE_SEQUENCES, PROSE_TOKENS = 16, 256  # each of at most so many, where there is no run
CHARACTERS = 12  # enough for a token of most texts
KINDS = {
    "hf": ("auto", "exact", "bf16", "symmetric", "asymmetric"),
    "gguf": ("auto", "f32", "f16", "q8_0"),
}


@dataclass(frozen=True)
class ExportInputs:
    """What there is to choose on: ids int64 `[n, seq]`, the 16-bit model; notes: of the two."""

    ids: Tensor | None = None
    original: Path | None = None
    notes: list[str] = field(default_factory=list)


def check_kind(format: str, kind: str) -> None:
    """Raises SpecErrors, one line, unless `kind` is one of the format."""
    if kind not in KINDS[format]:
        (other,) = (name for name in KINDS if name != format)
        own = ", ".join(KINDS[format])
        raise SpecErrors([f"--kind {kind}: is of {other}; with --format {format} may be {own}"])


def export_to(
    found: Found, format: str, kind: str, out: Path, dtype: str = "auto"
) -> Iterator[str]:
    """Exports to the folder `out`; yields lines for the terminal.

    format: hf or gguf; kind: one of `KINDS`. dtype: what models are computed in while ways to keep
    the weights are compared. Raises SpecErrors and ValueError, one line.
    """
    if found.kind == "packed":
        raise SpecErrors([f"{found.name}: is exported already; give the model it was made of"])
    if format == "hf" and found.kind == "plain":
        raise SpecErrors(
            [
                f"{found.name}: is not quantized, and loads everywhere as it is; make one with "
                f"stillhouse quantize {found.name} --bits 4 --out DIR"
            ]
        )
    if format == "gguf" and dtype != "auto":
        raise SpecErrors([f"--dtype: got {dtype}; nothing is computed for gguf; leave it away"])
    quiet()
    tokenizer = load_tokenizer(found)
    if format == "gguf":
        from quant.export.gguf.export import export_gguf

        name = file_name(found)
        file = out / f"{name}.gguf"
        model = load_any(found, "cpu", "plain")
        report = export_gguf(model, found.folder, file, kind, name)  # type: ignore[arg-type]
        yield from _lines(report, model, file, [])
        yield f"run it: llama-cli -m {file}"
        return
    from quant.export.hf.export import export_hf

    model = load_any(found, "cpu", "plain")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    inputs = ExportInputs() if kind == "bf16" else export_inputs_of(found, tokenizer, longest)
    try:
        with progress_bar("trying") as progress:
            found_report = export_hf(
                model,
                found.folder,
                out,
                inputs.ids,
                formats=None if kind == "auto" else [kind],
                original=inputs.original,
                progress=progress,
                dtype=compute_dtype(dtype, "cpu"),
            )
    except ValueError as error:
        raise ValueError(re.sub(r'formats=\["(\w+)"\]', r"--kind \1", str(error))) from error
    yield from _lines(found_report, model, out, inputs.notes)
    yield f"run it: stillhouse generate {out} --prompt TEXT"


def file_name(found: Found) -> str:
    """What a file of the model is called."""
    from quant.export.gguf.export import model_name

    if found.run is not None:
        return f"{found.run.name}-{found.cell}"
    if "://" in found.name:  # its local copy has a name of its own
        return model_name(Path("/", found.name.partition("://")[2]))
    return model_name(found.folder)


def export_inputs_of(
    found: Found, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> ExportInputs:
    """The select part of the run's corpus and the model that the cell was made from.

    Without a run, prose that ships with Python, in sequences of at most `longest` tokens.
    """
    if found.run is None:
        return _prose(tokenizer, min(longest or PROSE_TOKENS, PROSE_TOKENS))
    notes: list[str] = []
    return ExportInputs(_calibration(found.run, notes), _original(found.run, notes), notes)


def _prose(tokenizer: PreTrainedTokenizerBase, length: int) -> ExportInputs:
    """Excerpts from all over the text, of the same number of tokens."""
    import torch

    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return ExportInputs(
            notes=["No run, and this Python ships without pydoc_data: KL is not measured."]
        )
    text = "\n".join(topics[name] for name in sorted(topics))
    apart = len(text) // PROSE_SEQUENCES
    excerpts = [
        text[start : start + length * CHARACTERS]
        for start in range(0, apart * PROSE_SEQUENCES, apart)
    ]
    found = tokenizer(excerpts, add_special_tokens=False, verbose=False).input_ids
    length = min(length, *map(len, found))
    if not length:
        return ExportInputs(notes=["The tokenizer makes no tokens of prose: KL is not measured."])
    ids = torch.tensor([row[:length] for row in found], dtype=torch.int64)
    note = (
        f"No run, so KL is measured on {ids.numel():,} tokens of the prose that ships with Python "
        f"(pydoc_data.topics, {len(ids)} sequences of {length}), to the quantized model itself."
    )
    return ExportInputs(ids, notes=[note])


def _calibration(run: Store, notes: list[str]) -> Tensor | None:
    import numpy as np
    import torch

    from jobs.run.directory import RunDir
    from trainer.corpus.corpus import open_corpus

    record = RunDir(run).record("prepare")
    storage = run.url.rpartition("/")[0]
    try:
        if record is None:
            raise ValueError("its stage prepare is not done")
        part = open_corpus(open_store(storage).sub("_corpora", record.outputs["corpus"])).part(
            "select"
        )
        length = part.batch([0]).input_ids.shape[1]
        count = min(len(part), max(1, CALIBRATION_TOKENS // length))
        return torch.from_numpy(part.batch(np.arange(count)).input_ids)
    except (ValueError, KeyError, OSError) as error:
        notes.append(
            f"The run's corpus cannot be read ({' '.join(str(error).split())}): KL is not measured."
        )
        return None


def _original(run: Store, notes: list[str]) -> Path | None:
    """The 16-bit model: the run's student, or the model that it swept as it was."""
    if run.exists("student/config.json"):
        return run.fetch_folder("student")
    from trainer.models.load import find_model
    from trainer.spec.yaml import parse

    try:
        spec: Any = parse(run.read_text("spec.yaml"), "spec.yaml")[0]
        if spec.get("distill") is not None:
            raise ValueError("what is swept is the trained student, which is gone")
        student = spec["student"]
        return find_model("student.model", student["model"], student.get("revision", "main"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        notes.append("The 16-bit model is not there any more: KL is that to the quantized one.")
        return None


def _lines(
    report: ExportReport, model: PreTrainedModel, written: Path, notes: list[str]
) -> Iterator[str]:
    from quant.artifact.sizes import parameter_count

    yield f"wrote {written}"
    yield f"format: {report.format}"
    for name, count in report.files.items():
        yield f"file: {name}, {format_bytes(count)}"
    weights = sum(
        count for name, count in report.files.items() if name.endswith((".safetensors", ".gguf"))
    )
    per_weight = 8 * weights / parameter_count(model)
    yield f"size: {format_bytes(report.bytes)}, {bits(per_weight)} bits per weight"
    yield from _divergences(report)
    if report.error:
        worst = max(report.error, key=lambda name: report.error[name])
        many = f"{len(report.error)} tensor{'s' * (len(report.error) > 1)}"
        yield f"inexact: {many}, relative error at most {report.error[worst]:.2g} ({worst})"
    said = f"{report.bytes} bytes for "  # as above
    yield from (f"note: {note}" for note in [*notes, *report.notes] if not note.startswith(said))


def _divergences(report: ExportReport) -> Iterator[str]:
    """KL in nats per token, where the format was chosen on it."""
    found: dict[str, float] = getattr(report, "kl", {})
    if not found:
        return
    own = getattr(report, "kl_of_model", None)
    reference = "the quantized model" if own is None else "the 16-bit model"
    yield f"KL of {reference}, in nats per token, to"
    if own is not None:
        yield f"  {own:<8.3g} the quantized model itself"
    chosen = getattr(report, "choice", "")
    for name, value in sorted(found.items(), key=lambda item: item[1]):
        yield f"  {value:<8.3g} {name}{' (written)' if name == chosen else ''}"
