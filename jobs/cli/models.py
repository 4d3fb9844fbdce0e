"""`stillhouse quantize`, `export` and `generate`.

Only typer is imported here: each command imports what it needs, so that help answers at once.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.errors import SpecErrors

DONE = 0


class Format(StrEnum):
    """What a model is exported to."""

    hf = "hf"
    gguf = "gguf"


class Kind(StrEnum):
    """How a model is exported, by format: see `KINDS` in `jobs.models.export`."""

    auto = "auto"
    exact = "exact"
    bf16 = "bf16"
    symmetric = "symmetric"
    asymmetric = "asymmetric"
    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"


class Device(StrEnum):
    """Where a model is computed."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """What a model is computed in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Prefer(StrEnum):
    """What kernels are chosen for."""

    speed = "speed"
    memory = "memory"
    plain = "plain"


StorageOption = Annotated[str, typer.Option(metavar="URL", help="Where runs given by name are.")]
DeviceOption = Annotated[Device, typer.Option(help="auto: a GPU if there is one.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="What is computed in. auto: bfloat16 on GPUs and on CPUs that are fast at it, else "
        "float32."
    ),
]
CellOption = Annotated[
    str | None, typer.Option(metavar="KEY", help="With RUN: which cell, e.g. hqq-4b-g64.")
]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="REV", help="Of a hub id. Default: main.")
]


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local folder, URL or hub id of a 16-bit model.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Without --out: dotted keys of the spec with YAML values.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="BITS", help="Of 8, 6, 5, 4, 3, 2, 1.")
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Weights that share a scale: a multiple of 8, or channel. Default: 64, or less "
            "where 64 does not divide all layers.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "--methods",
            metavar="METHOD",
            help="hqq, rtn, or int8-dynamic (8 bits, channel). Default: hqq.",
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Quantize the input embeddings too.")
    ] = False,
    head: Annotated[bool, typer.Option("--head", help="Quantize the output head too.")] = False,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=BITS[:SIZE]",
            help="With --out: layers with bits of their own, 16 for none; repeatable, the first "
            "that fits counts.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write one quantized model there, and measure nothing."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Without --out: text to measure on, as in init. Default: the prose that ships "
            "with Python.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Without --out: of the run. Default: after the model."),
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="URL", help="Without --out: where the run goes.")
    ] = "./runs",
    revision: RevisionOption = None,
    device: DeviceOption = Device.auto,
) -> int:
    """Quantize a model: one with --out, or a grid, compared.

    With --out one model is quantized and written, with its tokenizer; nothing else is needed.
    Without it, --bits, --group-size and --method are lists with commas: every combination is
    quantized and measured on text as a run, which ends with a table. The same command again
    continues it.
    """
    from jobs.models.options import check_device, check_out, read_grid, read_layers

    grid = read_grid(bits, group_size, method, embeddings, head)
    if out is None:
        return _sweep(model, grid, layer, data, name, storage, revision, device, overrides or [])
    faults = [
        f"{option}: has no meaning with --out, which measures nothing; leave one of them away"
        for option, has_value in (
            ("--data", data is not None),
            ("--name", name is not None),
            *((f"override {text}", True) for text in overrides or []),
        )
        if has_value
    ]
    if faults:
        raise SpecErrors(faults)
    spec = grid.single()
    layers = read_layers(layer or [], spec)
    folder = check_out(out, "the quantized model")
    from jobs.models.find import enough_memory
    from jobs.models.quantize import check_fits, find_unquantized, fitted, quantize_to

    place = check_device(device.value)
    found = find_unquantized(model, storage, revision)
    if not grid.group_sizes:
        spec = fitted(found.folder, spec, layers)
        layers = read_layers(layer or [], spec)
    check_fits(found.folder, spec, layers)
    with enough_memory(found.name):
        written = quantize_to(found, spec, layers, folder, place)
    for line in written.lines():
        typer.echo(line)
    return DONE


def _sweep(
    model: str,
    grid: object,
    layer: list[str] | None,
    data: str | None,
    name: str | None,
    storage: str,
    revision: str | None,
    device: Device,
    overrides: list[str],
) -> int:
    from jobs.models.options import Grid
    from jobs.models.quantize import find_unquantized, kept_of, sweep_spec

    assert isinstance(grid, Grid)
    faults = []
    if layer:
        faults.append("--layer: needs --out; the cells of a sweep have the same bits everywhere")
    if device is not Device.auto:
        faults.append("--device: needs --out; a sweep takes what its Ray cluster has")
    if faults:
        raise SpecErrors(faults)
    found = find_unquantized(model, storage, revision)
    spec = sweep_spec(
        found,
        grid,
        data=data,
        name=name,
        storage=storage,
        revision=revision,
        overrides=overrides,
    )
    from jobs.pipeline.pipeline import run_pipeline

    for line in kept_of(found, spec):
        typer.echo(line)
    return run_pipeline(spec)


def export(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL_DIR", help="A run with --cell, or a model's folder.")
    ],
    format: Annotated[
        Format,
        typer.Option(
            help="hf: a folder that stock transformers and vLLM load. gguf: a file for llama.cpp."
        ),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder.")],
    cell: CellOption = None,
    kind: Annotated[
        Kind,
        typer.Option(
            help="How weights are kept. hf: auto (symmetric or asymmetric, the lower KL), "
            "symmetric, asymmetric, exact (loads in transformers alone), bf16. gguf: auto (codes "
            "of up to 5 bits as they are, 8-bit ones as Q8_0, the rest as F16), f32, f16, q8_0."
        ),
    ] = Kind.auto,
    dtype: DtypeOption = Dtype.auto,
    storage: StorageOption = "./runs",
) -> int:
    """Write a model in a format that other programs load.

    What the format cannot hold exactly is requantized, and what that costs is printed.
    """
    from jobs.models.export import check_kind, export_to
    from jobs.models.find import enough_memory, find
    from jobs.models.options import check_out
    from jobs.models.terminal import terminable

    check_kind(format.value, kind.value)
    folder = check_out(out, "the exported model")
    found = find(model, storage, "export", cell)
    with terminable(), enough_memory(found.name):
        for line in export_to(found, format.value, kind.value, folder, dtype.value):
            typer.echo(line)
    return DONE


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_DIR",
            help="Folder, URL or hub id of a quantized, exported or plain model; or a run, with "
            "--cell.",
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Default: what is piped in.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Generate at most so many tokens.")
    ] = 128,
    bits: Annotated[
        str | None,
        typer.Option(metavar="BITS", help="Quantize a plain model first, in memory."),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="With --bits. Default: 64, or less as in quantize."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help="With --bits. Default: hqq.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="Draw tokens. Default: 0, the likeliest each time."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw from the likeliest that have this probability."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Draw the same again. Default: another each time."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message, for the chat template.")
    ] = False,
    prefer: Annotated[
        Prefer | None,
        typer.Option(
            help="Kernels of quantized layers: the fastest, those that need no more memory than "
            "the file, or plain dequantization. Default: speed."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    cell: CellOption = None,
    storage: StorageOption = "./runs",
    revision: RevisionOption = None,
) -> int:
    """Run a model: text as it comes, then tokens per second.

    The text goes to stdout, one line of figures to stderr. Ctrl-C stops with the figures.
    """
    from jobs.models.find import find
    from jobs.models.generate import check_threads, preference, read_prompt, sampling_faults
    from jobs.models.options import read_single

    faults = sampling_faults(temperature, top_p, seed)
    spec = None
    try:
        spec = read_single(bits, group_size, method)
    except SpecErrors as error:
        faults += error.faults
    if faults:
        raise SpecErrors(faults)
    check_threads(threads)

    found = find(model, storage, "generate", cell, revision)
    kernels = preference(found, spec, prefer.value if prefer else None)
    text = read_prompt(prompt)
    import torch

    from jobs.models.find import enough_memory, load_tokenizer
    from jobs.models.generate import model_of, write_text
    from jobs.models.options import check_device
    from quant.generation.stream import stream

    place = check_device(device.value)
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer = load_tokenizer(found)
    if chat and not tokenizer.chat_template:
        raise SpecErrors([f"--chat: {found.name} has no chat template; leave --chat away"])
    with enough_memory(found.name):
        made = stream(
            model_of(found, spec, place, kernels, dtype.value, fit=group_size is None),
            tokenizer,
            [{"role": "user", "content": text}] if chat else text,
            max_new_tokens,
            temperature=temperature or 0.0,
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
        )
        return write_text(made)
