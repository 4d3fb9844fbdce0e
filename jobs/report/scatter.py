"""A picture of points over the size of models, with the front of those that no other beats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jobs.report import svg

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
