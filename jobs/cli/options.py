"""Arguments and options that several commands take. Only typer is imported here."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Stage(StrEnum):
    """The stages of a run, in their order."""

    prepare = "prepare"
    capture = "capture"
    distill = "distill"
    sweep = "sweep"
    summarize = "summarize"


SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="A YAML file, or the name of a bundled recipe.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted keys with YAML values.", show_default=False),
]
UntilOption = Annotated[Stage | None, typer.Option(help="Stop after this stage.")]
OnlyOption = Annotated[Stage | None, typer.Option(help="Run this stage alone.")]
RedoOption = Annotated[Stage | None, typer.Option(help="Run this stage again, from its beginning.")]
