"""The report's pictures of all models: accuracy against size, and KL against size."""

from __future__ import annotations

from jobs.report import figures as f
from jobs.report.front import TEACHER, Candidate, OnFront
from jobs.report.rows import CELLS, Row, is_allocated, is_recovered
from jobs.report.scatter import Point, Shape, over_size
from jobs.report.source import number
from quant.quant_spec import CHANNEL, DYNAMIC, METHODS

SHAPES: dict[str, tuple[Shape, float]] = {
    "teacher": ("square", 6),
    "student": ("circle", 7),
    "control": ("diamond", 7),
    "extra": ("diamond", 6),
}


def size_picture(rows: list[Row]) -> str:
    """Accuracy in percent over the size, with the Pareto front, for a wide page and for a phone.

    Empty text where no row has both numbers. Details of a point are its tooltip.
    """
    front = {row["key"] for row in pareto_front(rows)}
    points = [
        Point(
            row["bytes"] / 1e6,
            100 * row["accuracy"],
            label(row),
            _tooltip(row),
            class_of(row),
            *shape_of(row),
            front=row["key"] in front,
            important=row["key"] in front or row["role"] != "cell",
        )
        for row in _drawable(rows)
    ]
    meaning = "Pareto front: no other model is both smaller and more accurate"
    return over_size(
        points, "Accuracy against size of every model", meaning, lambda tick: f"{tick:g} %", False
    )


def kl_picture(rows: list[Row], known: list[Candidate], front: list[OnFront], measure: str) -> str:
    """KL on select over the size, both logarithmic, with the front; for a page and for a phone.

    known: the cells with both numbers. A cell of the front that is tied with a smaller one is
    hollow, and the line passes it by. Empty text without cells.
    """
    by_key = {row["key"]: row for row in rows}
    ties = {one.candidate.key: one.tied for one in front}
    points = []
    for one in known:
        if one.kl <= 0 or one.bytes <= 0 or one.key not in by_key:
            continue
        row, tied = by_key[one.key], ties.get(one.key)
        to = "teacher" if measure == TEACHER else f"16-bit {one.model}"
        told = f"KL to the {to} on select {f.with_interval(one.kl, one.interval())}"
        if tied:
            told += f"\ntied with {', '.join(tied)}"
        hollow = " tied" if tied else ""
        points.append(
            Point(
                one.bytes / 1e6,
                one.kl,
                label(row),
                f"{row['key']}\n{row['technique']}\n{f.size(one.bytes)}, {told}",
                class_of(row) + hollow,
                *shape_of(row),
                front=tied == (),
                important=tied == (),
            )
        )
    meaning = "Front: no other cell is both smaller and lower in KL, by more than chance"
    return over_size(points, "KL against size of every cell", meaning, lambda t: f"{t:g}", True)


def pareto_front(rows: list[Row]) -> list[Row]:
    """The rows that no other row beats: from small to large, each more accurate than all before."""
    front: list[Row] = []
    for row in sorted(_drawable(rows), key=lambda row: (row["bytes"], -row["accuracy"])):
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return front


def _drawable(rows: list[Row]) -> list[Row]:
    return [
        row
        for row in rows
        if row["status"] != "failed"
        and number(row["accuracy"]) is not None
        and (number(row["bytes"]) or 0) > 0
    ]


def class_of(row: Row) -> str:
    """The css classes of a row's point."""
    return "cell " + bits_class(row) if row["role"] == "cell" else str(row["role"])


def bits_class(row: Row) -> str:
    """The css class that colours a cell by its width; one for those of several widths."""
    if is_allocated(row):
        return "mixed"
    return width_class(number(row["bits"]) or 0)


def width_class(bits: float) -> str:
    """The css class of a width in bits."""
    return next(
        name
        for least, name in ((16, "b16"), (8, "b8"), (5, "b6"), (4, "b4"), (3, "b3"), (0, "b2"))
        if bits >= least
    )


def shape_of(row: Row) -> tuple[Shape, float]:
    """The mark of a row: cells of the teacher are squares, those of the student circles."""
    if row["role"] == "cell":
        return ("square", 4.5) if row["of"] == "teacher" else ("circle", 5)
    return SHAPES[row["role"]]


def label(row: Row) -> str:
    """How a picture calls a row, e.g. "4-bit g64", "rtn 4-bit channel", "allocated"."""
    if row["role"] not in CELLS:
        return str(row["role"])
    if row["role"] == "extra":
        return str(row["name"])
    of = "teacher " if row["of"] == "teacher" else ""
    if is_allocated(row):
        return f"{of}allocated {f.whole(row['budget_mb'])} MB"
    if row["method"] == DYNAMIC:
        return of + DYNAMIC
    method = "" if row["method"] in (METHODS[0], None) else f"{row['method']} "
    size = CHANNEL if row["group_size"] == CHANNEL else f"g{f.whole(row['group_size'])}"
    recovered = " recovered" if is_recovered(row) else ""
    return f"{of}{method}{f.whole(row['bits'])}-bit {size}{recovered}"


def _tooltip(row: Row) -> str:
    return (
        f"{row['model']}\n{row['technique']}\n{f.size(row['bytes'])}, "
        f"{f.share(row['accuracy'])} accuracy, retention {f.percent(row['retention'])}\n"
        f"perplexity {f.plain(row['perplexity'])}, KL to teacher {f.plain(row['kl_to_teacher'])}\n"
        f"{f.speed(row['decode_tokens_per_s'])}, speed-up {f.factor(row['speedup'])}"
    )
