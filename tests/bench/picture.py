"""Line charts as stand-alone SVG files for the docs, drawn with the report's helpers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.report import svg

WIDTH, HEIGHT = 760, 430
FRAME = svg.Box(58, 40, 740, 374)
STYLE = """
svg { background: #ffffff; font: 12px system-ui, "Segoe UI", Roboto, sans-serif; }
text { fill: #1b1d22; } .tick, .axis-title { fill: #5d636f; } .title { font-weight: 600; font-size: 14px; }
.grid { stroke: #eceef1; } .axis { stroke: #9aa0aa; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.label { paint-order: stroke; stroke: #ffffff; stroke-width: 3px; }
"""  # noqa: E501


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y), and points beside it that it does not pass through."""

    name: str
    colour: str
    points: list[tuple[float, float]]
    beside: list[tuple[float, float]] | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis: its title, whether it is logarithmic, where it ends (None: at the points), and the
    places to mark (None: round numbers)."""

    title: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    marks: list[float] | None = None


def draw(
    path: Path,
    title: str,
    lines: list[Line],
    x: Axis,
    y: Axis,
    marked: tuple[float, str] | None = None,
) -> None:
    """Writes the chart; marked: a place on the x axis, and its name."""
    every = [
        point
        for line in lines
        for point in [*line.points, *(line.beside or [])]
        if _inside(point, x, y)
    ]
    across, x_marks = _scale(x, [point[0] for point in every], FRAME.left, FRAME.right)
    up, y_marks = _scale(y, [point[1] for point in every], FRAME.bottom, FRAME.top)
    drawn = [f"<style>{STYLE}</style>"]
    drawn.append(svg.element("text", title, x=FRAME.left, y=18, class_="title"))
    for mark in y_marks:
        at = up(mark)
        drawn.append(
            svg.element("line", x1=FRAME.left, y1=at, x2=FRAME.right, y2=at, class_="grid")
        )
        drawn.append(_text(f"{mark:,g}", FRAME.left - 8, at + 4, "end", "tick"))
    for mark in x_marks:
        at = across(mark)
        drawn.append(
            svg.element("line", x1=at, y1=FRAME.bottom, x2=at, y2=FRAME.bottom + 5, class_="axis")
        )
        drawn.append(_text(_count(mark), at, FRAME.bottom + 19, "middle", "tick"))
    drawn.append(
        svg.element(
            "line", x1=FRAME.left, y1=FRAME.bottom, x2=FRAME.right, y2=FRAME.bottom, class_="axis"
        )
    )
    drawn.append(
        _text(x.title, (FRAME.left + FRAME.right) / 2, HEIGHT - 16, "middle", "axis-title")
    )
    drawn.append(_text(y.title, FRAME.left, 34, "start", "axis-title"))
    for line in lines:
        for point in line.beside or []:
            if _inside(point, x, y):
                drawn.append(
                    svg.element(
                        "circle", cx=across(point[0]), cy=up(point[1]), r=2.2, fill=line.colour,
                        opacity=".35",
                    )
                )  # fmt: skip
        shown = [(across(a), up(b)) for a, b in line.points if _inside((a, b), x, y)]
        drawn.append(
            svg.element(
                "polyline",
                points=" ".join(f"{a:.1f},{b:.1f}" for a, b in shown),
                stroke=line.colour,
                stroke_dasharray="6 4" if line.dashed else None,
            )
        )
        drawn += [svg.element("circle", cx=a, cy=b, r=3, fill=line.colour) for a, b in shown]
    if marked:
        at = across(marked[0])
        drawn.append(
            svg.element(
                "line", x1=at, x2=at, y1=FRAME.top, y2=FRAME.bottom, class_="axis",
                stroke_dasharray="2 3",
            )
        )  # fmt: skip
        drawn.append(_text(marked[1], at + 6, FRAME.bottom - 8, "start", "label"))
    drawn += _legend(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = svg.picture(drawn, WIDTH, HEIGHT, title)
    path.write_text(body.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n")


def _inside(point: tuple[float, float], x: Axis, y: Axis) -> bool:
    return all(
        (axis.low is None or value >= axis.low) and (axis.high is None or value <= axis.high)
        for value, axis in zip(point, (x, y), strict=True)
    )


def _scale(
    axis: Axis, values: list[float], start: float, end: float
) -> tuple[svg.Scale, list[float]]:
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if axis.log:
        low, high = low / 1.04, high * 1.04
        marks = axis.marks or svg.log_ticks(low, high, 8)
        return svg.logarithmic(low, high, start, end), marks
    return svg.linear(low, high, start, end), axis.marks or svg.ticks(low, high, 7)


def _count(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:,g}"


def _legend(lines: list[Line]) -> list[str]:
    """Names of the lines, one under the other in the upper right corner."""
    drawn = []
    for row, line in enumerate(lines):
        at = FRAME.top + 12 + 17 * row
        drawn.append(
            svg.element(
                "line", x1=FRAME.right - 26, x2=FRAME.right, y1=at - 4, y2=at - 4,
                stroke=line.colour, stroke_width="2.5",
                stroke_dasharray="6 4" if line.dashed else None,
            )
        )  # fmt: skip
        drawn.append(_text(line.name, FRAME.right - 34, at, "end", "label"))
    return drawn


def _text(text: str, x: float, y: float, anchor: str, class_: str) -> str:
    return svg.element("text", text, x=x, y=y, text_anchor=anchor, class_=class_)
