"""Loss curves of the report: each step thin, the mean of its neighbours bold."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.report import svg
from jobs.report.scatter import MARGIN

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
