"""`stillhouse quantize`: one model with --out, without a cluster; else a sweep of it, as a run."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage.store import format_bytes
from jobs.errors import SpecErrors
from jobs.models.find import Found, find, load_unquantized, quiet, short_of_memory
from jobs.models.options import Grid
from jobs.models.terminal import bits, progress_bar, seconds, terminable
from jobs.spec.job import JobSpec
from jobs.spec.resolve import SINGLE
from quant.quant_spec import QuantSpec
from trainer.corpus.tokenizer import copy_tokenizer, has_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMMAND = "quantize"
KEPT_SHARE = 1 / 3  # of the bytes in 16 bits: above it, the options that lower it are named


@dataclass(frozen=True)
class Written:
    """What `quantize_to` wrote.

    bytes: of all files; dense_bytes: with the weights in 16 bits; kept: the share of the weights'
    bytes that stays in 16 bits, in words; tokenizer: is there one.
    """

    folder: Path
    bytes: int
    dense_bytes: int
    bits_per_weight: float
    kept: str
    seconds: float
    kernels: str
    tokenizer: bool

    def lines(self) -> list[str]:
        """For the terminal."""
        return [
            f"wrote {self.folder}",
            f"size: {format_bytes(self.bytes)}, {self.bytes / self.dense_bytes:.2f} of the "
            f"{format_bytes(self.dense_bytes)} that the folder has in 16 bits",
            f"bits: {bits(self.bits_per_weight)} true bits per weight",
            self.kept,
            f"quantized in {seconds(self.seconds)}",
            f"kernel: {self.kernels}",
            f"run it: stillhouse generate {self.folder} --prompt TEXT"
            if self.tokenizer
            else "tokenizer: the model has none, so none was copied; copy one into the folder to "
            "run it",
        ]


def find_unquantized(model: str, storage: str, revision: str | None = None) -> Found:
    """The plain model to quantize. Raises SpecErrors, one line."""
    found = find(model, storage, COMMAND, revision=revision)
    refuse_quantized(found)
    return found


def refuse_quantized(found: Found) -> None:
    """Raises SpecErrors, one line, for a model whose weights are codes already."""
    if found.kind != "plain":
        raise SpecErrors([f"{found.name}: is quantized already; give the 16-bit model"])


def check_fits(
    folder: Path, spec: QuantSpec, layers: Mapping[str, QuantSpec | None] | None = None
) -> None:
    """Raises SpecErrors, one line, for what the model's layers do not allow; reads no weights."""
    from quant.targets import find_targets
    from quant.unsupported import LayersError
    from trainer.models.load import meta_model, read_config

    quiet()
    config = read_config(folder)
    try:
        model = meta_model(config)
    except ValueError:  # of a kind that is no causal language model
        raise SpecErrors(
            [
                f"{folder}: a model of type {config.model_type} generates no text; may be a causal "
                "language model"
            ]
        ) from None
    try:
        find_targets(model, spec, layers)
    except LayersError as error:
        keep = " ".join(f"--layer '{pattern}=16'" for pattern in error.keep)
        raise SpecErrors([error.line(f"--layer {error.pattern}:", keep)]) from None
    except ValueError as error:
        raise SpecErrors([str(error)]) from None


def fitted(
    folder: Path, spec: QuantSpec, layers: Mapping[str, QuantSpec | None] | None = None
) -> QuantSpec:
    """`spec` with the default group size for the model; as it is where `check_fits` refuses it."""
    from jobs.spec.resolve import single_group_size

    quiet()
    try:
        return replace(spec, group_size=single_group_size(folder, spec, layers or {}))
    except ValueError:
        return spec


def kept_line(
    folder: Path, spec: QuantSpec, layers: Mapping[str, QuantSpec | None] | None = None
) -> str:
    """What share of the bytes stays in 16 bits; above a third with the options that lower it.

    Reads the model's config alone. Raises ValueError for what `find_targets` refuses.
    """
    from quant.artifact.sizes import sixteen_bit_share
    from trainer.models.load import meta_model, read_config

    share = sixteen_bit_share(meta_model(read_config(folder)), spec, layers)
    line = f"16-bit: {share:.0%} of the bytes stay in 16 bits"
    missing = [f"--{name}" for name in ("embeddings", "head") if not getattr(spec, name)]
    if share <= KEPT_SHARE or not missing:
        return line
    return f"{line} at {spec.bits} bits; {' '.join(missing)} quantizes more of them"


def quantize_to(
    found: Found,
    spec: QuantSpec,
    layers: Mapping[str, QuantSpec | None],
    out: Path,
    device: str,
) -> Written:
    """Quantizes a plain model and writes it to `out`, whole or not at all.

    An interrupt before it is written ends with `Interrupted`.
    """
    from quant.artifact import save_quantized
    from quant.artifact.atomic_folder import whole_folder
    from quant.artifact.sizes import dense_bytes, folder_bytes, true_bits_per_weight, true_bytes

    with (
        terminable(),
        whole_folder(out, keep=lambda _: False, replace=lambda _: ()) as partial,
    ):
        model, took = load_and_quantize(found, spec, layers, device)
        meta = {"source": found.name, "quantize_s": round(took, 2)}
        save_quantized(model, partial, spec, meta)
        copy_tokenizer(found.folder, partial)
    total = folder_bytes(out)
    return Written(
        folder=out,
        bytes=total,
        dense_bytes=total - true_bytes(model) + dense_bytes(model),
        bits_per_weight=true_bits_per_weight(model),
        kept=kept_line(found.folder, spec, layers),
        seconds=took,
        kernels=fastest_kernels(model, device),
        tokenizer=has_tokenizer(out),
    )


def fastest_kernels(model: PreTrainedModel, device: str) -> str:
    """The kernels that the model would run on `device`, as `quant.kernels.kernel_names` has them.

    Told by copies of its smallest layers, one of each layout: the model stays as it is.
    """
    from torch import nn

    from quant.kernels import kernel_names, use_kernels
    from quant.layers.linear import QuantLinear, quant_linears

    smallest: dict[Any, QuantLinear] = {}
    # A head that shares the embedding's codes is copied with them: only if no other layer will do.
    for layer in sorted(
        quant_linears(model).values(), key=lambda layer: (layer.shared is not None, layer.rows)
    ):
        kind = (layer.bits, layer.group_size, layer.columns, layer.activations)
        smallest.setdefault(kind, layer)
    copies = nn.ModuleList(copy.deepcopy(layer).to(device) for layer in smallest.values())
    use_kernels(copies, "speed")
    return kernel_names(copies)


def load_and_quantize(
    found: Found, spec: QuantSpec, layers: Mapping[str, QuantSpec | None], device: str
) -> tuple[Any, float]:
    """The quantized model, on the CPU, and the seconds that quantizing took.

    device: where the arithmetic runs; a GPU is given one weight at a time, so that a model may be
    larger than it. A terminal shows a bar.
    """
    from quant.quantize import quantize, stored_dtype

    model = load_unquantized(found.folder, "cpu")
    kept = stored_dtype(model)
    began = time.perf_counter()
    with progress_bar("quantizing") as advance:
        try:
            model = quantize(model, spec, layers or None, kept, device, advance)
        except RuntimeError as error:  # of a layer, which it names
            if not str(error).startswith("layer ") or short_of_memory(error):
                raise
            raise ValueError(" ".join(str(error).split())) from error
    return model, time.perf_counter() - began


DATA = "builtin:python-docs"
# Of text that the models are measured on; a run that is worth more time may ask for more.
SEQUENCES, TOKENS = 32, 512
PROMPT_TOKENS, DECODE_TOKENS = 128, 32


def sweep_spec(
    found: Found,
    grid: Grid,
    *,
    data: str | None,
    name: str | None,
    storage: str,
    revision: str | None,
    overrides: Sequence[str] = (),
) -> JobSpec:
    """The job that quantizes the model over the grid and measures every cell; no training.

    Sequences are as long as the model's positions allow, up to 512 tokens. `overrides` are
    ``dotted.key=value`` pairs, as in `jobs.spec.load.load_spec`. Raises SpecErrors, a line per
    fault.
    """
    from jobs.spec.load import spec_of
    from trainer.models.load import max_length, read_config
    from trainer.spec.yaml import apply_override

    positions = max_length(read_config(found.folder)) or TOKENS
    section = grid.section()
    if not grid.group_sizes:
        model = QuantSpec(8, SINGLE, "hqq", grid.embeddings, grid.head)
        section["group_size"] = [fitted(found.folder, model).group_size]
    if positions < PROMPT_TOKENS + DECODE_TOKENS:
        decode = max(2, min(DECODE_TOKENS, positions // 4))
        section["speed_decode_tokens"] = decode
        section["speed_prompt_tokens"] = max(1, min(PROMPT_TOKENS, positions - decode))
    values: dict[Any, Any] = {
        "name": name or run_name(found.name),
        "storage": storage,
        "teacher": None,
        "student": {"model": found.name, "revision": revision or "main"},
        "data": {
            "train": [{"source": data or DATA}],
            "sequence_length": min(positions, TOKENS),
            "select_sequences": 16,
            "report_sequences": SEQUENCES,
        },
        "distill": None,
        "sweep": section,
    }
    faults = [fault for override in overrides if (fault := apply_override(values, override))]
    try:
        spec = spec_of(values)
    except SpecErrors as error:
        raise SpecErrors([*faults, *error.faults]) from None
    if faults:
        raise SpecErrors(faults)
    return spec


def kept_of(found: Found, spec: JobSpec) -> list[str]:
    """What share of the bytes stays in 16 bits in the smallest cell of the job; one line.

    None for a model that cannot be quantized, which the job's checks refuse.
    """
    assert spec.sweep is not None
    cells = spec.sweep.cells()
    try:
        return [kept_line(found.folder, min(cells, key=lambda cell: cell.bits))]
    except ValueError:
        return []


def run_name(model: str) -> str:
    """A valid run name for a model: its last telling part, e.g. qwen3-0.6b-quantized."""
    parts = [part for part in re.split(r"[/\\\\]", str(_absolute(model))) if part]
    last = parts[-1] if parts else "model"
    if last in ("student", "control") and len(parts) > 1:
        last = parts[-2]
    slug = re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:50].rstrip("-._")
    return f"{slug or 'model'}-quantized"


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if "://" not in model and path.exists() else model
