"""Charts of the report: accuracy and KL against size, and loss curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jobs.report import formats as f
from jobs.report import svg
from jobs.report.pareto import TEACHER, Candidate, OnFront
from jobs.report.rows import CELLS, Row, is_allocated, is_recovered
from jobs.report.run_data import number
from quant.quant_spec import CHANNEL, DYNAMIC, METHODS

WIDE = (860, 440)
NARROW = (370, 380)
MARGIN = svg.Box(56, 18, 16, 46)  # room around the plot: left, top, right, bottom
LABELS = 16  # above so many points only those that `important` says are named

Shape = Literal["circle", "square", "diamond"]


@dataclass(frozen=True)
class Point:
    """megabytes: of 10^6 bytes, above 0. class_: its css class, which colours it.

    front: whether the line of the front goes through it. important: named however many there are.
    """

    megabytes: float
    value: float
    label: str
    tooltip: str
    class_: str
    shape: Shape = "circle"
    radius: float = 5
    front: bool = False
    important: bool = False


def over_size(
    points: list[Point], label: str, front: str, text: Callable[[float], str], logarithmic: bool
) -> str:
    """`scatter` for a wide page and for a phone; the style sheet shows one."""
    return "".join(
        scatter(points, canvas, class_, label, front, text, logarithmic)
        for canvas, class_ in ((WIDE, "wide"), (NARROW, "narrow"))
    )


def scatter(
    points: list[Point],
    canvas: tuple[int, int],
    class_: str,
    label: str,
    front: str,
    text: Callable[[float], str],
    logarithmic: bool = False,
) -> str:
    """Values over the size in MB (logarithmic), as one <svg>; empty text without points.

    label: of the whole. front: what its line means. text: how a tick of the values is written.
    logarithmic: the values' axis is too; they are above 0 then.
    """
    if not points:
        return ""
    width, height = canvas
    frame = svg.Box(MARGIN.left, MARGIN.top, width - MARGIN.right, height - MARGIN.bottom)
    sizes, values = [p.megabytes for p in points], [p.value for p in points]
    low_x, high_x = min(sizes) / 1.35, max(sizes) * 1.45
    across = svg.logarithmic(low_x, high_x, frame.left, frame.right)
    if logarithmic:
        low_y, high_y = min(values) / 1.5, max(values) * 1.5
        up = svg.logarithmic(low_y, high_y, frame.bottom, frame.top)
        steps = svg.log_ticks(low_y, high_y)
    else:
        pad = max((max(values) - min(values)) * 0.12, 0.5)
        low_y, high_y = max(0.0, min(values) - pad), min(100.0, max(values) + pad)
        up = svg.linear(low_y, high_y, frame.bottom, frame.top)
        steps = svg.ticks(low_y, high_y)
    many = 8 if width > 500 else 5
    drawn = svg.axes(
        frame,
        [(across(t), f"{t:,g}") for t in svg.log_ticks(low_x, high_x, many)],
        [(up(t), text(t)) for t in steps],
        "Size in MB (10⁶ bytes, logarithmic)",
        canvas,
    )
    where = [(across(p.megabytes), up(p.value)) for p in points]
    line = sorted(place for place, p in zip(where, points, strict=True) if p.front)
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    drawn.append(svg.group([svg.element("polyline", points=corners, class_="front")], front))
    named = [p.label if p.important or len(points) <= LABELS else "" for p in points]
    labels = svg.place_labels(
        [(x, y, name) for (x, y), name in zip(where, named, strict=True)], frame, line
    )
    for (x, y), point, placed in zip(where, points, labels, strict=True):
        # On a phone, lines to names far off would cover a crowd; tooltips have them.
        told = bool(placed.text) and not (placed.far and width < 500 and len(points) > LABELS)
        leader = svg.element("line", x1=x, y1=y, x2=placed.x, y2=placed.y - 4, class_="leader")
        children = [leader] if placed.far and told else []
        children.append(_mark(point, x, y))
        if told:
            children.append(
                svg.element("text", placed.text, x=placed.x, y=placed.y, text_anchor=placed.anchor)
            )
        drawn.append(svg.group(children, point.tooltip, f"point {point.class_}"))
    return svg.picture(drawn, width, height, label, class_)


def _mark(point: Point, x: float, y: float) -> str:
    r = point.radius
    if point.shape == "square":
        return svg.element("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, rx=2)
    if point.shape == "diamond":
        corners = f"{x:.1f},{y - r:.1f} {x + r:.1f},{y:.1f} {x:.1f},{y + r:.1f} {x - r:.1f},{y:.1f}"
        return svg.element("polygon", points=corners)
    return svg.element("circle", cx=x, cy=y, r=r)


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


CURVE_WIDE = (520, 290)
CURVE_NARROW = (350, 250)


@dataclass(frozen=True)
class Curve:
    """One line of a picture: its name, its css class, and its points (step, value)."""

    name: str
    class_: str
    points: list[tuple[float, float]]


def curve_picture(title: str, curves: list[Curve]) -> str:
    """`loss_curves` for a wide page and for a phone; the style sheet shows one."""
    return loss_curves(title, curves, CURVE_WIDE, "wide") + loss_curves(
        title, curves, CURVE_NARROW, "narrow"
    )


def loss_curves(title: str, curves: list[Curve], canvas: tuple[int, int], class_: str) -> str:
    """Loss over optimizer steps: each step thin, the mean of its neighbours bold, its end named.

    The first steps from random weights would flatten the rest: the axis ends at the 98th
    percentile, and what lies above it is not drawn. Empty text where no curve has points.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    width, height = canvas
    frame = svg.Box(MARGIN.left, MARGIN.top, width - 62, height - MARGIN.bottom)
    steps = [step for curve in curves for step, _ in curve.points]
    values = sorted(value for curve in curves for _, value in curve.points)
    low, high = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    across = svg.linear(min(steps), max(steps), frame.left, frame.right)
    up = svg.linear(low - pad, high + pad, frame.bottom, frame.top)
    drawn = svg.axes(
        frame,
        [
            (across(t), f"{t:,.0f}")
            for t in svg.ticks(min(steps), max(steps), 6 if width > 500 else 4)
            if t == int(t)
        ],
        [(up(t), f"{t:g}") for t in svg.ticks(low - pad, high + pad)],
        "Optimizer step",
        (width, height),
    )
    ends = []
    for curve in curves:
        smooth = _smooth(curve.points)
        lines = []
        for points, kind in ((curve.points, "raw"), (smooth, "mean")):
            path = " ".join(
                f"{across(step):.1f},{max(frame.top, up(value)):.1f}"
                for step, value in _thin(points)
            )
            lines.append(svg.element("polyline", points=path, class_=kind))
        drawn.append(svg.group(lines, f"{curve.name}: {title}", f"curve {curve.class_}"))
        ends.append((up(smooth[-1][1]), curve, smooth[-1][1]))
    drawn += _end_labels(ends, frame)
    return svg.picture(drawn, width, height, f"{title} over steps", class_)


def _end_labels(ends: list[tuple[float, Curve, float]], frame: svg.Box) -> list[str]:
    """The mean at the end of each curve, pushed apart where they would overlap."""
    drawn = []
    free = frame.top + 4
    for y, curve, value in sorted(ends, key=lambda end: end[0]):
        y = free = max(y + 4, free)
        free += 15
        text = svg.element("text", f"{value:.3f}", x=frame.right + 7, y=y, class_="end")
        drawn.append(svg.group([text], f"{curve.name}: {value:.4f}", f"curve {curve.class_}"))
    return drawn


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window of about a twentieth of the curve, centred, narrower at both ends."""
    reach = len(points) // 40
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth = []
    for index, (step, _) in enumerate(points):
        half = min(reach, index, max(len(points) - 1 - index, reach // 4))
        low, high = index - half, min(len(points), index + half + 1)
        smooth.append((step, (sums[high] - sums[low]) / (high - low)))
    return smooth


def _thin(points: list[tuple[float, float]], at_most: int = 400) -> list[tuple[float, float]]:
    """Evenly fewer points, the last one always among them."""
    stride = max(1, -(-len(points) // at_most))
    kept = points[::-1][::stride][::-1]
    return kept if kept and kept[0] == points[0] else [points[0], *kept]
