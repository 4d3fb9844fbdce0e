"""`stillhouse plan`. Only typer is imported here: what a plan needs is imported by the call."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.arguments import OverridesArgument, SpecArgument
from jobs.errors import SpecErrors

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
    from jobs.load import load_spec

    faults = []
    for option, value in (("--gpus", gpus), ("--gpus-per-node", gpus_per_node)):
        if gpu is None and value is not None:
            faults.append(f"{option}: needs --gpu, e.g. --gpu h200")
    try:
        job = load_spec(spec, overrides or [])
    except SpecErrors as error:
        raise SpecErrors([*faults, *error.faults]) from None
    from jobs.plan.place import named_place, this_machine

    if faults:
        raise SpecErrors(faults)
    place = this_machine() if gpu is None else named_place(gpu, gpus or 8, gpus_per_node)
    from jobs.plan.forecast import forecast

    found = forecast(job, place, price)
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        return DONE
    from rich.console import Console

    from jobs.plan.show import show

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(highlight=False, width=max(console.width, 100))
    console.print(show(found))
    return DONE
