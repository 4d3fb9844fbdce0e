"""Pieces of the report's page that several sections are made of. Texts are escaped here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from jobs.report import charts
from jobs.report import formats as f
from jobs.report.rows import Row


@dataclass(frozen=True)
class Field:
    """A column: its heading and how an entry is written, plain text."""

    title: str
    show: Callable[[Any], str]
    figure: bool = True


def heading(title: str, figure: bool) -> str:
    return f'<th class="{"figure" if figure else "name"}">{escape(title)}</th>'


def simple_table(head: str, body: str, class_: str = "") -> str:
    """A card with a table of finished rows, which scrolls where it is too wide."""
    kind = f' class="{escape(class_)}"' if class_ else ""
    return (
        f'<div class="card scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def table_of(
    items: Sequence[Any], fields: Sequence[Field], first: str, name: Callable[[Any], str]
) -> str:
    """A table with a line per item; columns that say nothing of any are left out.

    first: heading of the first column; name: its entry, finished HTML.
    """
    shown = [
        field for field in fields if any(field.show(item) not in ("", f.NOTHING) for item in items)
    ]
    head = heading(first, False) + "".join(heading(field.title, field.figure) for field in shown)
    body = ""
    for item in items:
        body += f'<tr><td class="nowrap">{name(item)}</td>'
        for field in shown:
            text = field.show(item) or f.NOTHING
            shown_as = f' class="figure">{figure(text)}' if field.figure else f">{escape(text)}"
            body += f"<td{shown_as}</td>"
        body += "</tr>"
    return simple_table(head, body)


def figure(text: str) -> str:
    """A text as HTML; the interval at its end, if it has one, stands small below."""
    value, found, interval = text.partition(" [")
    small = f' <small class="interval">[{escape(interval)}</small>' if found else ""
    return escape(value) + small


def titles(items: Sequence[Any], fields: Sequence[Field]) -> set[str]:
    """Headings of the columns that `table_of` shows."""
    return {
        field.title
        for field in fields
        if any(field.show(item) not in ("", f.NOTHING) for item in items)
    }


def dot(row: Row) -> str:
    kind = row["role"] if row["role"] != "cell" else charts.bits_class(row)
    square = " square" if row["of"] == "teacher" else ""
    return f'<span class="dot {escape(kind)}{square}"></span>'


def named(row: Row) -> str:
    """A row's key with the dot of its colour."""
    return dot(row) + escape(row["key"])


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def section(title: str, *blocks: str) -> str:
    body = "\n".join(block for block in blocks if block)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""
