"""The headline table: as markdown for `report/table.md`, and as rich text for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jobs.report import formats as f
from jobs.report.rows import CELLS, Row, in_words, too, widths
from quant.quant_spec import DYNAMIC

FAILED = "failed"


@dataclass(frozen=True)
class Column:
    """One column: its heading, how a row's entry is written, and whether it is a figure."""

    title: str
    show: Callable[[Row], str]
    figure: bool = True
    short: str = ""  # heading where space is scarce


COLUMNS = (
    Column("Model", lambda row: row["model"], figure=False),
    Column("Technique", lambda row: row["technique"], figure=False),
    Column("Bits", lambda row: widths(row) or f.NOTHING),
    Column("True bpw", lambda row: f.fixed(row["bits_per_weight"]), short="bpw"),
    Column("Size", lambda row: f.size(row["bytes"])),
    Column("Accuracy", lambda row: f.share(row["accuracy"])),
    Column("Retention", lambda row: f.percent(row["retention"])),
    Column("Perplexity", lambda row: f.plain(row["perplexity"]), short="PPL"),
    Column("Decode speed", lambda row: f.speed(row["decode_tokens_per_s"])),
    Column("Speed-up", lambda row: f.factor(row["speedup"])),
)
RUN = Column("Run", lambda row: row["run"], figure=False)
NOTES = (
    "Retention: accuracy as a share of the reference's, cells against the unquantized student, "
    "student and control against the teacher. Speed-up: decoding against the 16-bit student."
)
OF_TEACHER = "Cells of the teacher: retention and speed-up against the 16-bit teacher."


def columns(rows: list[Row]) -> list[Column]:
    """The columns of these rows: with a Run column where there are several runs."""
    shared = _too(rows)
    shown = [
        replace(column, show=lambda row: row["technique"].removesuffix(in_words(shared)))
        if column.title == "Technique"
        else column
        for column in COLUMNS
    ]
    return [RUN, *shown] if len({row["run"] for row in rows}) > 1 else shown


def _too(rows: list[Row]) -> list[str]:
    """What of embeddings and head all cells have quantized; it is told once, not in every row."""
    cells = [row for row in rows if row["role"] == "cell"]
    kinds = {tuple(too(row)) for row in cells}
    return list(kinds.pop()) if len(kinds) == 1 else []


def entry(column: Column, row: Row) -> str:
    """What stands in a column for a row; a failed cell says so where its accuracy would be."""
    if row["status"] == FAILED and column.title == "Accuracy":
        return FAILED
    return column.show(row)


def remarks(rows: list[Row]) -> list[str]:
    """What holds for all cells, and which kernels their speeds were had with; each a line."""
    shared = _too(rows)
    lines = [OF_TEACHER] if any(row["of"] == "teacher" for row in rows) else []
    lines += [f"All cells: {' and '.join(shared)} quantized too."] if shared else []
    lines += _kept(rows)
    cells = [row for row in rows if row["role"] == "cell" and row["status"] != FAILED]
    found: dict[str, list[str]] = {}
    for row in cells:
        if row["kernel"] and row["decode_tokens_per_s"] is not None:
            keys = found.setdefault(str(row["kernel"]), [])
            keys += [name for name in [_one_name(row, shared)] if name not in keys]
    rising = sorted(found.items(), key=lambda item: len(item[1]))
    told = [f"{kernel} ({', '.join(keys)})" for kernel, keys in rising]
    if rising and all(row["kernel"] for row in cells):  # the commonest names the rest
        told[-1] = rising[-1][0] + (" (all others)" if len(rising) > 1 else "")
    if told:
        word = "Kernels" if len(told) > 1 else "Kernel"
        lines.append(f"{word} of the cells' speeds: {'; '.join(told)}.")
    return lines + _baselines(cells)


def _baselines(cells: list[Row]) -> list[str]:
    """In which dtype the 16-bit models were timed that the cells' speed-ups are against."""
    found = {
        f"the {row['of']} in {row['baseline_dtype']}": None
        for row in cells
        if row["baseline_dtype"] and row["decode_tokens_per_s"] is not None
    }
    if not found:
        return []
    return [f"Speed-ups: against {', '.join(found)}, the faster of bfloat16 and float32 there."]


def _kept(rows: list[Row]) -> list[str]:
    """What the cells of each run were told to leave in 16 bits."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["role"] == "cell" and row.get("keep_16bit"):
            names = runs.setdefault(tuple(row["keep_16bit"]), [])
            names += [row["run"]] if row["run"] not in names else []
    several = len({row["run"] for row in rows}) > 1
    lines = []
    for kept, names in runs.items():
        of = f" of {', '.join(names)}" if several else ""
        lines.append(f"Kept in 16 bits in all cells{of}: {', '.join(kept)}.")
    return lines


def failures(rows: list[Row]) -> list[str]:
    """One line per failed cell: its key and the first line of its error."""
    several = len({row["run"] for row in rows}) > 1
    return [
        f"{row['run'] + ' ' if several else ''}{row['key']} failed: {f.first_line(row['error'])}"
        for row in rows
        if row["status"] == FAILED
    ]


def markdown(rows: list[Row], cost: str = "") -> str:
    """The headline table as GitHub markdown, then notes, failures and the cost line."""
    shown = columns(rows)
    lines = [
        "| " + " | ".join(column.title for column in shown) + " |",
        "| " + " | ".join("---:" if column.figure else "---" for column in shown) + " |",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_escape(entry(column, row)) for column in shown) + " |")
    lines += ["", NOTES]
    lines += [f"\n{_escape(line)}" for line in (*remarks(rows), *failures(rows))]
    if cost:
        lines += ["", cost]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def terminal(rows: list[Row], width: int, cost: str = "") -> Group:
    """The headline table for a terminal `width` columns wide.

    Figures are never cut: where they do not fit, headings get short, then the two name columns
    become one, then whole columns are left out, those first that others imply.
    """
    for layout in _layouts(rows):
        figures = sum(_needs(column, rows) for column in layout if column.figure) + 2 * len(layout)
        names = [column for column in layout if not column.figure]
        space = width - figures
        wanted = [_needs(column, rows) for column in names]
        if sum(wanted) <= space:
            break
        if space >= sum(
            min(want, floor) for want, floor in zip(wanted, _floors(names), strict=True)
        ):
            wanted = _shrink(wanted, _floors(names), space)
            break
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    widths = dict(zip([column.title for column in names], wanted, strict=True))
    for column in layout:
        table.add_column(
            column.title,
            justify="right" if column.figure else "left",
            no_wrap=column.figure,
            overflow="fold",
            width=_needs(column, rows) if column.figure else max(1, widths[column.title]),
        )
    for row in rows:
        table.add_row(*(_styled(column, row) for column in layout))
    lines = [Text(line, style="dim") for line in remarks(rows)]
    lines += [Text(line, style="red") for line in failures(rows)]
    lines += [Text(cost)] if cost else []
    return Group(table, *lines)


def _styled(column: Column, row: Row) -> Text:
    text = entry(column, row)
    if row["status"] == FAILED:
        return Text(text, style="red" if text == FAILED else "dim")
    return Text(text, style="bold" if row["role"] == "student" else "")


def _layouts(rows: list[Row]) -> list[list[Column]]:
    full = columns(rows)
    run = full[:1] if full[0].title == "Run" else []
    short = [_shortened(column) for column in full]
    shared = _too(rows)
    one_name = Column("Model", lambda row: _one_name(row, shared), figure=False)
    compact = [*run, one_name, *(column for column in short if column.figure)]
    layouts = [full, short, compact]
    for drop in ("Bits", "PPL", "bpw", "tok/s", "Speed-up", "Retention", "Run"):
        layouts.append([column for column in layouts[-1] if column.title != drop])
    return layouts


def _shortened(column: Column) -> Column:
    show = column.show
    if column.title == "Decode speed":
        return Column("tok/s", lambda row: show(row).removesuffix(" tok/s"))
    if column.title == "Model":
        return Column("Model", lambda row: show(row).rpartition("/")[2], figure=False)
    return Column(column.short or column.title, show, column.figure)


def _one_name(row: Row, shared: list[str]) -> str:
    if row["role"] not in CELLS:
        return row["role"]
    name = row["key"].removesuffix("".join(f"-{part}" for part in shared))
    return name.removesuffix("-8b-channel") if row["method"] == DYNAMIC else name


def _floors(names: list[Column]) -> list[int]:
    return [{"Model": 12, "Technique": 14, "Run": 10}[column.title] for column in names]


def _shrink(wanted: list[int], floors: list[int], space: int) -> list[int]:
    """Take from the widest column, never below its floor, until they fit into `space`."""
    widths = list(wanted)
    while sum(widths) > space:
        spare = [
            width - min(floor, want)
            for width, floor, want in zip(widths, floors, wanted, strict=True)
        ]
        widths[spare.index(max(spare))] -= 1
    return widths


def _needs(column: Column, rows: list[Row]) -> int:
    return max(cell_len(text) for text in [column.title, *(entry(column, row) for row in rows)])
