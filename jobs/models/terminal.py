"""Progress bars, clean interruption and figures for the commands on models."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.errors import Interrupted


@contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """A function (done, total[, what is next]) that moves a bar on stderr; None where that is no
    terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None)

        def advance(done: int, total: int, next_: str = "") -> None:
            words = escape(f"{what} {next_}".strip())
            bars.update(task, completed=done, total=total, description=words, refresh=True)

        yield advance


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM is what Ctrl-C is, and both end with `Interrupted`."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before: Any = None
    with contextlib.suppress(ValueError):  # not the main thread, which alone has signals
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("nothing was written") from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def bits(value: float) -> str:
    """Bits per weight."""
    return f"{value:.2f}"


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def rate(value: float | None) -> str:
    """Tokens per second."""
    if value is None:
        return "– tokens/s"
    return f"{value:,.0f} tokens/s" if value >= 100 else f"{value:.3g} tokens/s"
