"""`stillhouse generate`: text on stdout as it comes, then one line on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from cluster.storage.store import format_bytes
from jobs.errors import SpecErrors
from jobs.models.find import Found, compute_dtype, load_any, quiet
from jobs.models.terminal import rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.generation.stream import Statistics, Stream
    from quant.quant_spec import QuantSpec

DONE, INTERRUPTED = 0, 130
ENDS = {  # by what `quant.generation.stream` calls it
    "end of text": "up to the end of text",
    "length": "as many as asked for",
    "positions": "up to the model's last position",
    "stopped": "stopped",
}


def read_prompt(argument: str | None) -> str:
    """The prompt: as given, else all of stdin without its last line end.

    Raises SpecErrors, one line: there is none.
    """
    if argument is not None:
        text = argument
    elif sys.stdin.isatty():
        raise SpecErrors(["--prompt: is missing; give a text, or pipe one in"])
    else:
        try:
            text = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError:
            raise SpecErrors(["--prompt: what was piped in is no UTF-8 text"]) from None
    if not text:
        raise SpecErrors(["--prompt: is empty; may be a text, also piped in"])
    return text


def sampling_faults(temperature: float | None, top_p: float | None, seed: int | None) -> list[str]:
    """A line for each option that is out of range or would do nothing."""
    from quant.generation import stream

    faults = [
        f"--{name.replace('_', '-')}: {fault}"
        for name, fault in stream.sampling_faults(temperature or 0.0, top_p, seed)
    ]
    idle = [name for name, value in (("--top-p", top_p), ("--seed", seed)) if value is not None]
    if idle and not temperature:
        faults.append(
            f"{' and '.join(idle)}: nothing is drawn at temperature 0; give --temperature, e.g. 1"
        )
    return faults


def check_threads(threads: int | None) -> None:
    """Raises SpecErrors, one line, for more threads than there are CPUs."""
    import os

    there = os.cpu_count() or 1
    if threads is not None and threads > there:
        raise SpecErrors(
            [f"--threads: got {threads}; may be 1 to {there}, the CPUs of this machine"]
        )


def preference(found: Found, spec: QuantSpec | None, asked: str | None) -> str:
    """What kernels are chosen for. Raises SpecErrors, one line, where there are none to choose."""
    if asked is not None and spec is None and found.kind != "artifact":
        mend = ", or give --bits" if found.kind == "plain" else ""
        raise SpecErrors(
            [
                f"--prefer {asked}: {found.name} has no layers of stillhouse quantize, which alone "
                f"have a choice of kernels; leave it away{mend}"
            ]
        )
    return asked or "speed"


def model_of(
    found: Found,
    spec: QuantSpec | None,
    device: str,
    prefer: str,
    dtype: str = "auto",
    fit: bool = False,
) -> PreTrainedModel:
    """The model, ready to run in `dtype`; a plain one is quantized in memory where `spec` asks.

    fit: in the largest group size up to 64 that its layers allow, whatever `spec` says.
    Raises SpecErrors, one line, where a quantized model is asked for in other bits.
    """
    quiet()
    if spec is None:
        return load_any(found, device, prefer, compute_dtype(dtype, device))
    if found.kind != "plain":
        raise SpecErrors([f"--bits {spec.bits}: {found.name} {_is_quantized(found)}"])
    from jobs.models.quantize import check_fits, fitted, load_and_quantize
    from quant.kernels import use_kernels
    from trainer.models.load import cast_stored

    if fit:
        spec = fitted(found.folder, spec)
    check_fits(found.folder, spec)
    model, _ = load_and_quantize(found, spec, {}, device)
    cast_stored(model, compute_dtype(dtype, device))
    model.to(device)
    use_kernels(model, prefer)  # type: ignore[arg-type]
    return model


def _is_quantized(found: Found) -> str:
    hint = "leave --bits away, or give the 16-bit model"
    if found.kind == "artifact":
        from quant.artifact import read_description
        from quant.quant_spec import QuantSpec

        key = QuantSpec(**read_description(found.folder)["spec"]).key
        return f"is quantized already ({key}); {hint}"
    return f"is quantized already; {hint}"


def write_text(made: Stream) -> int:
    """Streams to stdout, then tells on stderr how it went; 130 after Ctrl-C."""
    code, last = DONE, "\n"
    try:
        for piece in made:
            typer.echo(piece, nl=False)
            last = piece
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read it has enough
        _forget_stdout()
    finally:
        made.close()
        if not last.endswith("\n"):  # before an error's line too
            typer.echo()
    typer.echo(statistics_line(made.statistics), err=True)
    return code


def statistics_line(found: Statistics) -> str:
    """The figures of a generation, on one line."""
    return (
        f"prompt: {_tokens(found.prompt_tokens)}, {rate(found.prompt_tokens_per_s)}; "
        f"generated: {_tokens(found.new_tokens)}, {rate(found.new_tokens_per_s)}, "
        f"{ENDS[found.finish]}; kernel: {found.kernel}; memory: {format_bytes(found.memory_bytes)}"
    )


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def _forget_stdout() -> None:
    """Have what is still buffered go nowhere: Python writes it at exit, and would complain."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
