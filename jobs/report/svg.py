"""Helpers for drawing SVG by hand: elements, scales, ticks, labels that do not collide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

Scale = Callable[[float], float]
CHARACTER = 6.6  # width of a character and height of a line of a label, in picture units
LINE = 13.0


def element(tag: str, text: str | None = None, **attributes: object) -> str:
    """One SVG element; `text` and attribute values are escaped, `class_` becomes class."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{pairs}/>" if text is None else f"<{tag}{pairs}>{escape(text)}</{tag}>"


def group(children: list[str], title: str | None = None, class_: str = "") -> str:
    """A <g> around finished elements, with a tooltip where `title` is given."""
    head = f"<title>{escape(title)}</title>" if title else ""
    return f'<g class="{escape(class_)}">{head}{"".join(children)}</g>'


def picture(children: list[str], width: int, height: int, label: str, class_: str = "") -> str:
    """A whole <svg> that scales with its container; `label` is read out by screen readers."""
    return (
        f'<svg class="{escape(class_)}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(children)}</svg>'
    )


def _short(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Maps [low, high] onto [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Maps [low, high] onto [start, end] by logarithm; low and high above 0."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(value))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, at_most: int = 7) -> list[float]:
    """Round numbers inside [low, high] for a logarithmic axis: 1, 2, 5 or only powers of ten."""
    found: list[float] = []
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= at_most:
            break
    return found


@dataclass(frozen=True)
class Box:
    """A rectangle in picture coordinates."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, across) * max(0.0, down)


@dataclass(frozen=True)
class Label:
    """Where a label ended up: the text's anchor point, and the point it belongs to."""

    text: str
    x: float
    y: float
    anchor: str  # start | middle | end
    far: bool  # so far off that a line should lead to it


def axes(
    frame: Box,
    x_ticks: list[tuple[float, str]],
    y_ticks: list[tuple[float, str]],
    x_title: str,
    canvas: tuple[int, int],
) -> list[str]:
    """Ticks of both axes (place, text), lines across for the upright one, and the lower title."""
    drawn = []
    for y, text in y_ticks:
        drawn.append(element("line", x1=frame.left, y1=y, x2=frame.right, y2=y, class_="grid"))
        drawn.append(
            element("text", text, x=frame.left - 8, y=y + 4, text_anchor="end", class_="tick")
        )
    for x, text in x_ticks:
        drawn.append(
            element("line", x1=x, y1=frame.bottom, x2=x, y2=frame.bottom + 5, class_="axis")
        )
        drawn.append(
            element("text", text, x=x, y=frame.bottom + 19, text_anchor="middle", class_="tick")
        )
    drawn.append(
        element(
            "line", x1=frame.left, y1=frame.bottom, x2=frame.right, y2=frame.bottom, class_="axis"
        )
    )
    middle = (frame.left + frame.right) / 2
    drawn.append(
        element(
            "text", x_title, x=middle, y=canvas[1] - 6, text_anchor="middle", class_="axis-title"
        )
    )
    return drawn


def place_labels(
    points: list[tuple[float, float, str]],
    frame: Box,
    line: list[tuple[float, float]] | None = None,
) -> list[Label]:
    """A place for each point's label (x, y, text), one by one, where it collides least.

    Labels stay inside `frame` where they can; the points, and the `line` through the given
    corners, count as obstacles.
    """
    hard = [Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    soft = [Box(x - 2, y - 2, x + 2, y + 2) for x, y in _along(line or [])]
    placed: list[Label] = []
    for x, y, text in points:
        width = CHARACTER * len(text)
        best: tuple[float, Label, Box] | None = None
        for rank, (dx, dy, anchor) in enumerate(_places()):
            left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = Box(left, y + dy - LINE * 0.8, left + width, y + dy + LINE * 0.2)
            outside = width * LINE - frame.overlap(box)
            hit = sum(box.overlap(other) for other in hard)
            crossed = sum(box.overlap(other) for other in soft)
            cost = 100 * (hit + max(0.0, outside - 1e-6)) + 0.2 * crossed + rank
            if best is None or cost < best[0]:
                best = (cost, Label(text, x + dx, y + dy, anchor, abs(dy) > 22), box)
        assert best is not None
        placed.append(best[1])
        hard.append(best[2])
    return placed


def _along(corners: list[tuple[float, float]], every: float = 5.0) -> list[tuple[float, float]]:
    """Points on the line through the corners, `every` so far apart."""
    found = []
    for (x1, y1), (x2, y2) in zip(corners, corners[1:], strict=False):
        pieces = max(1, round(math.hypot(x2 - x1, y2 - y1) / every))
        found += [
            (x1 + (x2 - x1) * i / pieces, y1 + (y2 - y1) * i / pieces) for i in range(pieces + 1)
        ]
    return found


def _places() -> list[tuple[float, float, str]]:
    """Offsets from the point, from the best place on."""
    near = [
        (10.0, 4.0, "start"),
        (0.0, -11.0, "middle"),
        (0.0, 20.0, "middle"),
        (-10.0, 4.0, "end"),
        (8.0, -9.0, "start"),
        (8.0, 17.0, "start"),
        (-8.0, -9.0, "end"),
        (-8.0, 17.0, "end"),
    ]
    far = [
        (side * 14.0, up * away, "start" if side > 0 else "end")
        for away in (30.0, 44.0, 58.0, 72.0)
        for up in (-1, 1)
        for side in (1, -1)
    ]
    return near + far
