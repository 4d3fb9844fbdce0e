"""Logit caches as tables on a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

from cluster.storage.store import format_bytes
from jobs.caches.describe import UNIQUES, Coverage, Facts, Histogram, Kind, Run
from jobs.report.formats import NOTHING, fixed

_BAR = 40


def console() -> Console:
    """The terminal; a file or a pipe has no width of its own."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=max(made.width, 160))


def table(*columns: str) -> Table:
    """An empty table; columns whose names begin with `>` are figures."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        figure = name != column
        made.add_column(name, justify="right" if figure else "left", no_wrap=figure)
    return made


def age(seconds: float | None) -> str:
    """A duration in its largest unit."""
    if seconds is None:
        return NOTHING
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def teacher_of(facts: Facts, users: Sequence[Run]) -> str:
    """The teacher's name: a hub id, or as the runs call it, else its weights' hash."""
    if "teacher.name" in facts.identity:
        return str(facts.identity["teacher.name"])
    named = [run.teacher for run in users if run.teacher]
    weights = str(facts.identity.get("teacher.weights", ""))
    return named[0] if named else (f"weights {weights[:8]}" if weights else "?")


def listing(rows: Sequence[tuple[Facts, Sequence[Run]]]) -> Table:
    """One line for each cache."""
    made = table(
        "Cache", "Teacher", "Method", ">Sequences", ">Tokens", ">Size", ">B/token", ">eval B/token",
        ">Age", "Used by", "",
    )  # fmt: skip
    for facts, users in rows:
        # Further sets of draws are of the same sequences.
        kinds = {kind.kind: kind for kind in facts.kinds if kind.kind in ("train", "eval")}
        used = ", ".join(run.name for run in users) or "no run"
        remark = "damaged" if facts.mendable else ("another format" if facts.fault else "")
        made.add_row(
            facts.name[:12],
            teacher_of(facts, users),
            facts.method,
            NOTHING if facts.fault else f"{sum(kind.sequences for kind in kinds.values()):,}",
            NOTHING if facts.fault else _tokens(list(kinds.values())),
            format_bytes(facts.bytes),
            *(_per_token(kinds.get(name)) for name in ("train", "eval")),
            age(facts.age),
            used,
            remark,
        )
    return made


def kinds_table(facts: Facts) -> Table:
    """One line for each kind of records."""
    made = table("Kind", ">Sequences", ">Tokens", ">Shards", ">Size", ">Bytes/token")
    for kind in facts.kinds:
        made.add_row(
            kind.kind,
            f"{kind.sequences:,}",
            _tokens([kind]),
            f"{kind.shards:,}",
            format_bytes(kind.bytes),
            _per_token(kind),
        )
    return made


def histogram(kind: Kind, made: Histogram) -> Group:
    """Bars of a histogram, under a line that says what of."""
    mean = f"{100 * made.mean:.2f} %" if made.what == "retained mass" else f"{made.mean:.2f}"
    rows = table(made.what, ">positions", "")
    for name, share in zip(_bins(made), made.shares, strict=True):
        rows.add_row(name, f"{100 * share:.1f} %", "#" * round(_BAR * share))
    title = (
        f"{kind.kind}: {made.what}, mean {mean} "
        f"({made.positions:,} positions of {kind.seen} sequences)"
    )
    return Group(title, rows)


def coverage_table(found: Sequence[Coverage]) -> Table:
    """What a spec wants, and what of it is there."""
    made = table("Kind", ">Wanted", ">Present", ">Missing")
    for item in found:
        made.add_row(item.kind, f"{item.wanted:,}", f"{item.present:,}", f"{item.missing:,}")
    return made


def as_json(facts: Facts, users: Sequence[Run]) -> dict[str, Any]:
    """A cache's facts for programs."""
    values = asdict(facts)
    values["teacher"], values["method"] = teacher_of(facts, users), facts.method
    values["used_by"] = [run.name for run in users]
    for kind, row in zip(facts.kinds, values["kinds"], strict=True):
        row["bytes_per_token"] = kind.bytes_per_token
    return values


def _tokens(kinds: Sequence[Kind]) -> str:
    about = "" if all(kind.tokens_exact for kind in kinds) else "~"
    return f"{about}{sum(kind.tokens for kind in kinds):,}"


def _per_token(kind: Kind | None) -> str:
    return fixed(kind.bytes_per_token, 1) if kind is not None else NOTHING


def _bins(made: Histogram) -> list[str]:
    """The bins in words."""
    if made.what == "retained mass":
        both = zip(made.edges, [*made.edges[1:], 1.0], strict=True)
        return [f"{100 * low:g} to {100 * end:g} %" for low, end in both]
    return [
        f"{low:g}" if end == low + 1 else f"{low:g} to {end - 1:g}"
        for low, end in zip(made.edges, UNIQUES[1 : len(made.edges) + 1], strict=True)
    ]
