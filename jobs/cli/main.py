"""The command line, ``stillhouse``.

Only typer is imported here: each command imports what it needs, so that help answers at once.
Exit codes: 0 done; 2 the spec or the arguments are wrong; 3 the run failed; 4 a newer attempt of
the run has taken over; 130 interrupted.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import cache, models
from jobs.cli import runs as live
from jobs.cli import submit as remote
from jobs.cli.options import OnlyOption, OverridesArgument, RedoOption, SpecArgument, UntilOption
from jobs.cli.submit import manifest
from jobs.errors import Interrupted, SpecErrors, StageFailed, Superseded

if TYPE_CHECKING:
    from cluster.storage import Store


DONE = 0


def plan(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Plan for such GPUs, e.g. h200. Default: this machine as it is."
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --gpu: how many. Default: 8.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --gpu: of one machine. Default: at most 8."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(metavar="MONEY", min=0, help="Of an hour of one GPU, in any currency."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> int:
    """Forecast memory, bytes, hours and cost of SPEC.

    Nothing is started. Configs are read, weights are not: a folder with config.json alone will do.
    """
    from jobs.spec.load import load_spec

    faults = []
    for option, value in (("--gpus", gpus), ("--gpus-per-node", gpus_per_node)):
        if gpu is None and value is not None:
            faults.append(f"{option}: needs --gpu, e.g. --gpu h200")
    try:
        job = load_spec(spec, overrides or [])
    except SpecErrors as error:
        raise SpecErrors([*faults, *error.faults]) from None
    from jobs.forecast.place import named_place, this_machine

    if faults:
        raise SpecErrors(faults)
    place = this_machine() if gpu is None else named_place(gpu, gpus or 8, gpus_per_node)
    from jobs.forecast.forecast import forecast

    found = forecast(job, place, price)
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        return DONE
    from rich.console import Console

    from jobs.forecast.show import show

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(highlight=False, width=max(console.width, 100))
    console.print(show(found))
    return DONE


EXAMPLE = "\b\nExample:\n  "  # \b keeps the command on a line of its own
DONE, WRONG, FAILED, SUPERSEDED, INTERRUPTED = 0, 2, 3, 4, 130
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")


app = typer.Typer(
    name="stillhouse",
    help="Distils a big language model into a small one and quantizes it, on a Ray cluster.",
    epilog=EXAMPLE + "stillhouse run demo",
    add_completion=False,
    rich_markup_mode=None,  # rich alone would double the time of --help
)
app.add_typer(cache.app)


@app.command(epilog=EXAMPLE + "stillhouse init --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-0.6B")
def init(
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="Hub id, local folder or URL of the teacher.")
    ],
    student: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Hub id, local folder or URL of the student; or slice: half of the teacher's "
            "layers.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Hub data set, glob of files (txt, json, jsonl, parquet), or the prose that ships "
            "with Python.",
        ),
    ] = "builtin:python-docs",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write it. Default: the run's name + .yaml."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> int:
    """Write a commented spec with sensible values."""
    from jobs.spec.init import render, run_name

    empty = [
        f"--{name}: is empty; may be {what}"
        for name, value, what in (
            ("teacher", teacher, "a model"),
            ("student", student, "a model"),
            ("data", data, "a data set or files"),
        )
        if not value.strip()
    ]
    if empty:
        raise SpecErrors(empty)
    file = out or Path(f"{run_name(teacher, student)}.yaml")
    try:
        text = render(teacher, student, data, str(file))
    except ValueError as error:
        raise SpecErrors([str(error)]) from None
    try:
        with file.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise SpecErrors([f"{file}: exists; give --force to overwrite it, or --out FILE"]) from None
    except OSError as error:
        raise SpecErrors([f"{file}: cannot be written: {error.strerror}"]) from None
    typer.echo(f"wrote {file}; next: stillhouse run {file}")
    return DONE


@app.command(epilog=EXAMPLE + "stillhouse run demo distill.steps=50 'sweep.bits=[8,4]'")
def run(
    spec: SpecArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|local|HOST:PORT",
            help="The Ray cluster. Default: RAY_ADDRESS, else local: one inside this process.",
        ),
    ] = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    redo: RedoOption = None,
    each: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=A,B,...",
            help="One run per value of this key, one after the other; their names end in the "
            "value, and corpus and logit cache are shared.",
        ),
    ] = None,
) -> int:
    """Run the pipeline of SPEC; again continues where it stopped."""
    faults = []
    if until and only:
        faults.append("--until and --only: may not be given together; see stillhouse run --help")
    if address not in (None, "auto", "local") and not _HOST_PORT.fullmatch(str(address)):
        faults.append(
            f'--address: got "{address}"; may be auto, local or HOST:PORT; '
            "see stillhouse run --help"
        )
    from jobs.spec.load import each_spec, load_spec, run_each

    try:
        if each is None:
            jobs = [load_spec(spec, overrides or [])]
        else:
            jobs = each_spec(spec, overrides or [], each)
    except SpecErrors as error:
        raise SpecErrors([*faults, *error.faults]) from None
    if faults:
        raise SpecErrors(faults)
    from jobs.pipeline.pipeline import run_pipeline

    go = partial(
        run_pipeline,
        address=address,
        until=until.value if until else None,
        only=only.value if only else None,
        redo=redo.value if redo else None,
    )
    return go(jobs[0]) if each is None else run_each(jobs, go)


for command, name, example in (
    (plan, "plan", "plan qwen3-8b-to-0.6b --gpu h200 --gpus 16 --price 3.5"),
    (remote.submit, "submit", "submit demo storage=s3://bucket/runs --address http://HOST:8265"),
    (
        manifest,
        "manifest",
        "manifest llama-70b-to-8b --image reg/stillhouse:0.1.0-cuda --gpus-per-node 8 "
        "--gpu-type NVIDIA-H100-80GB-HBM3",
    ),
    (live.list_runs, "list", "list --storage s3://bucket/runs"),
    (live.status, "status", "status demo"),
    (live.watch, "watch", "watch demo"),
    (live.logs, "logs", "logs demo --follow"),
    (live.stop, "stop", "stop demo"),
    (models.quantize, "quantize", "quantize Qwen/Qwen3-0.6B --bits 4 --out qwen3-0.6b-4bit"),
    (models.export, "export", "export demo --cell hqq-4b-g64 --format gguf --out demo-gguf"),
    (models.generate, "generate", 'generate qwen3-0.6b-4bit --prompt "The function returns"'),
):
    app.command(name, epilog=f"{EXAMPLE}stillhouse {example}")(command)


@app.command(epilog=EXAMPLE + "stillhouse report qwen3-8b-to-0.6b --max-mb 600 --min-retention 98")
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Names, paths or URLs.")],
    max_mb: Annotated[
        float | None,
        typer.Option(metavar="MB", help="Recommend a cell of at most so many true 10^6 bytes."),
    ] = None,
    min_retention: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="Recommend one that keeps so much of its 16-bit model's accuracy.",
        ),
    ] = None,
    min_speed: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="Recommend one that decodes so many times as fast as the 16-bit model.",
        ),
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="URL", help="Where runs given by name are.")
    ] = "./runs",
) -> int:
    """Rebuild reports, compare runs, recommend a cell.

    Limits hold together; what is recommended is chosen on the part select alone.
    """
    from jobs.run.directory import find_run

    limits = (max_mb, min_retention, min_speed)
    stores, faults = [], []
    if len(set(runs)) > 1 and any(limit is not None for limit in limits):
        faults.append("--max-mb, --min-retention, --min-speed: need one RUN; give one at a time")
    for name in dict.fromkeys(runs):
        try:
            stores.append(find_run(name, storage))
        except SpecErrors as error:
            faults += error.faults
    if faults:
        raise SpecErrors(faults)
    from rich.console import Console

    from jobs.report.build import build_report, show

    for store in stores:
        build_report(store)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=max(console.width, 160))
    console.print(show(stores, console.width))
    for store in stores:
        typer.echo(f"report: {store.path('report', 'index.html')}")
    return _recommend(stores[0], runs[0], limits) if len(stores) == 1 else DONE


def _recommend(store: Store, run: str, limits: tuple[float | None, ...]) -> int:
    """Answers with one cell of a run that has any, or says that none is within the limits."""
    from jobs.report.recommend import in_words, recommend
    from jobs.report.run_data import load_run

    data = load_run(store)
    asked = any(limit is not None for limit in limits)
    if not data.cells and not asked:
        return DONE
    found = recommend(data, *limits, run=run)
    if found.key is None and asked:
        raise SpecErrors(in_words(found))
    typer.echo("\n" + "\n".join(in_words(found)))
    return DONE


@app.command(epilog=EXAMPLE + "stillhouse schema > stillhouse.schema.json")
def schema() -> int:
    """Print the JSON Schema of a spec.

    It has every key, its meaning and its bounds; editors complete and check specs with it.
    """
    import json

    from jobs.spec.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; the user's mistakes become lines on stderr."""
    command = typer.main.get_command(app)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = command.main(
            args=arguments or ["--help"], prog_name="stillhouse", standalone_mode=False
        )
        return code if isinstance(code, int) else DONE
    except SpecErrors as error:
        return _say(WRONG, error.faults)
    except StageFailed as error:
        lines = [f"{error.stage} failed: {' '.join(error.why.split())}"]
        code = _say(FAILED, lines)
        print(f"log: {error.log}\ncontinue with: {error.resume_command}", file=sys.stderr)
        return code
    except Superseded as error:
        return _say(SUPERSEDED, [f"{error}; the newer attempt goes on"])
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        return _say(INTERRUPTED, [f"interrupted: {error}" if str(error) else "interrupted"])
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "stillhouse"
        message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        return _say(WRONG, [f"{message}; see {path} --help"])
    except ValueError as error:
        # What the other floors raise for a user's mistake is one line; anything else is a bug.
        if "\n" in str(error).strip() or not str(error).strip():
            return _defect()
        return _say(WRONG, [str(error).strip()])
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        return _say(FAILED, [what])
    except Exception:
        traceback.print_exc()
        return _say(
            FAILED, ["this is a defect of stillhouse; the trace above belongs in its report"]
        )


def _say(code: int, faults: Sequence[str]) -> int:
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return code


def _defect() -> int:
    traceback.print_exc()
    return _say(FAILED, ["this is a defect of stillhouse; please report it with the trace above"])
