"""The page's sections of cells that are more than a uniform grid: allocated, recovered, extra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from jobs.report import formats as f
from jobs.report.charts import width_class
from jobs.report.page_parts import Field, heading, named, note, section, simple_table, table_of
from jobs.report.pareto import model_of
from jobs.report.routes import reduction
from jobs.report.rows import Row, is_allocated, is_recovered, widths
from jobs.report.run_data import RunData, number
from quant.evaluation.bootstrap import Interval
from quant.grid import RECOVERED

OWN, TEACHER = "kl_to_reference", "kl_to_teacher"
NUMBERED = re.compile(r"^(?P<stack>.*?)\.(?P<block>\d+)\.(?P<name>.+)$")
COLUMNS = 14  # of a table of layers; more names than that are told together


def allocation(data: RunData, rows: list[Row]) -> str:
    """Every allocated cell: its layers' bits, and the uniform cells of its size beside it."""
    blocks = []
    for row in rows:
        if row["role"] != "cell" or not is_allocated(row) or row["status"] == "failed":
            continue
        blocks.append(f"<h3>{named(row)}</h3>")
        blocks.append(f"<p>{escape(_against_uniform(data, row, rows))}</p>")
        blocks.append(_layers(row["layers"] or {}))
    if not blocks:
        return ""
    text = (
        "Bits and group size (g) of every layer, chosen on select within the budget; 16 bits: left "
        "as it is. The comparison is on report, paired over sequences."
    )
    return section("Allocation", *blocks, note(text))


def _against_uniform(data: RunData, row: Row, rows: list[Row]) -> str:
    """Size and KL beside the uniform cells that are nearest in size, from both sides."""
    told = f"{f.size(row['bytes'])} of {row['budget_mb']:g} MB, {widths(row)} bits: KL {_kl(row)}."
    plain = [
        other
        for other in rows
        if other["role"] == "cell"
        and other["of"] == row["of"]
        and other["status"] != "failed"
        and not is_allocated(other)
        and not is_recovered(other)
        and number(other["bytes"]) is not None
    ]
    size = number(row["bytes"]) or 0.0
    larger = min((o for o in plain if o["bytes"] >= size), key=lambda o: o["bytes"], default=None)
    smaller = max((o for o in plain if o["bytes"] < size), key=lambda o: o["bytes"], default=None)
    for other in (larger, smaller):
        if other is None:
            continue
        less = reduction(data.cells[other["key"]], data.cells[row["key"]], OWN)
        told += f" {other['key']} ({f.size(other['bytes'])}) has {_kl(other)}"
        told += f": here it is {_lower(less)}." if less is not None else "."
    return told


def _kl(row: Row) -> str:
    return f.ranged(row, f"kl_to_{row['of'] or 'student'}")


def _lower(less: Interval) -> str:
    """ "42 % [38, 46] lower", or higher; tied where the interval contains 0."""
    if less.holds_zero:
        return "tied"
    if less.value < -1:
        return f"{1 - less.value:.1f} times as high"
    if less.value < 0:
        return f"{f.reduced(less.map(lambda part: -part, falling=True))} higher"
    return f"{f.reduced(less)} lower"


@dataclass(frozen=True)
class _Layer:
    row: str
    column: str
    bits: int
    group: Any


def _layers(layers: Mapping[str, Any]) -> str:
    """A table with a line per block and a column per kind of layer, coloured by width."""
    found = []
    for name, choice in layers.items():
        parts = NUMBERED.match(name)
        row, column = (parts["block"], parts["name"]) if parts else ("", name)
        bits, group = (choice["bits"], choice["group_size"]) if choice else (16, None)
        found.append(_Layer(row, column, bits, group))
    if len({layer.column for layer in found}) > COLUMNS:  # experts: as one
        found = [
            _Layer(x.row, re.sub(r"\.\d+(?=\.|$)", ".*", x.column), x.bits, x.group) for x in found
        ]
    columns = list(dict.fromkeys(layer.column for layer in found))
    names = sorted(
        {layer.row for layer in found}, key=lambda row: (row == "", int(row) if row else 0)
    )
    body = ""
    for row in names:
        line = [layer for layer in found if layer.row == row]
        if row == "":  # what is in no block stands for itself
            for layer in line:
                body += f'<tr><td class="nowrap">{escape(layer.column)}</td>{_width([layer])}'
                body += f'<td colspan="{max(1, len(columns))}"></td></tr>'
            continue
        body += f"<tr><td>{row}</td>"
        for column in columns:
            body += _width([layer for layer in line if layer.column == column])
        body += "</tr>"
    blocks = [c for c in columns if any(x.column == c and x.row for x in found)]
    head = heading("Block", False)
    head += "".join(f"<th>{escape(column.rpartition('.')[2] or column)}</th>" for column in blocks)
    return simple_table(head, body, "layers")


def _width(layers: list[_Layer]) -> str:
    if not layers:
        return "<td></td>"
    bits = sorted({layer.bits for layer in layers})
    groups = {layer.group for layer in layers if layer.group is not None}
    text = f"{bits[0]}" if len(bits) == 1 else f"{bits[0]}–{bits[-1]}"
    size = f"<small>{escape(_group(groups.pop()))}</small>" if len(groups) == 1 else ""
    return f'<td class="width {width_class(bits[0])}">{text}{size}</td>'


def _group(size: object) -> str:
    return f"g{size:g}" if number(size) is not None else str(size)


def recovery(data: RunData, rows: list[Row]) -> str:
    """Recovered cells beside the plain ones; "" without any."""
    by_key = {row["key"]: row for row in rows if row["status"] != "failed"}
    pairs = []
    for key, row in by_key.items():
        plain = by_key.get(key.removesuffix(RECOVERED))
        if row["role"] == "cell" and is_recovered(row) and plain is not None:
            how = row["recovered"] if isinstance(row["recovered"], dict) else {}
            pairs.append({"key": key, "row": row, "plain": plain, "how": how})
    if not pairs:
        return ""

    def less(pair: dict[str, Any], name: str) -> str:
        found = reduction(data.cells[pair["plain"]["key"]], data.cells[pair["key"]], name)
        return f.NOTHING if found is None else f.reduced(found)

    def of(pair: dict[str, Any]) -> str:
        return f"kl_to_{pair['row']['of']}"

    def perplexity(pair: dict[str, Any]) -> str:
        before, after = (f.plain(pair[name]["perplexity"]) for name in ("plain", "row"))
        return f"{before} → {after}"

    fields = [
        Field("KL before", lambda pair: f.ranged(pair["plain"], of(pair))),
        Field("KL after", lambda pair: f.ranged(pair["row"], of(pair))),
        Field("Lower by", lambda pair: less(pair, OWN)),
        Field("KL to teacher lower by", lambda pair: less(pair, TEACHER)),
        Field("Perplexity", perplexity),
        Field("Learnt from", lambda pair: str(pair["how"].get("target") or f.NOTHING), False),
        Field("Steps", lambda pair: f.fixed(pair["how"].get("steps"), 0)),
        Field("Time", lambda pair: f.duration(pair["how"].get("seconds"))),
    ]
    text = (
        "The same codes with and without a few steps of distillation, on report: KL to the 16-bit "
        "model in nats per token; by how much it is lower, with the 95 % interval over sequences, "
        "paired. The weights that did best on select were kept."
    )
    table = table_of(pairs, fields, "Cell", lambda pair: named(pair["plain"]))
    return section("Recovery", table, note(text))


def extra(data: RunData, rows: list[Row]) -> str:
    """Models quantized elsewhere, beside the best cell that is no larger; "" without any."""
    shown = [row for row in rows if row["role"] == "extra" and row["status"] != "failed"]
    if not shown:
        return ""
    cells = {
        row["key"]: row
        for row in rows
        if row["role"] == "cell" and row["of"] == "student" and row["status"] != "failed"
    }

    def no_larger(row: Row) -> str | None:
        """The cell that does best on select of those no larger."""
        fitting = [
            (select, key)
            for key, cell in cells.items()
            if (number(cell["bytes"]) or 0) <= (number(row["bytes"]) or 0)
            and (select := _select_kl(data.cells[key])) is not None
        ]
        return min(fitting)[1] if fitting else None

    def compared(row: Row) -> str:
        key = no_larger(row)
        if key is None:
            return f.NOTHING
        less = reduction(data.extra[row["name"]], data.cells[key], OWN)
        return f.NOTHING if less is None else _lower(less)

    fields = [
        Field("Technique", lambda row: row["technique"], False),
        Field("Size", lambda row: f.size(row["bytes"])),
        Field("KL to student", _kl),
        Field("Best cell no larger", lambda row: no_larger(row) or f.NOTHING, False),
        Field("Its KL", lambda row: _kl(cells[key]) if (key := no_larger(row)) else f.NOTHING),
        Field("which is", compared, False),
    ]
    text = "Sizes are those of the weight files. The cell was chosen on select; KL is on report."
    return section("Quantized elsewhere", table_of(shown, fields, "Model", named), note(text))


def _select_kl(cell: Mapping[str, Any]) -> float | None:
    return number((cell.get("select") or {}).get(f"kl_to_{model_of(cell)}"))
