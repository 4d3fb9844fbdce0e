"""The report's pictures: accuracy against size, and loss curves."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.report import figures as f
from jobs.report import svg
from jobs.report.rows import Row
from jobs.report.source import number
from quant.spec import CHANNEL, DYNAMIC, METHODS

WIDE = (860, 440)
NARROW = (370, 380)
CURVE_WIDE = (520, 290)
CURVE_NARROW = (350, 250)
MARGIN = svg.Box(56, 18, 16, 46)  # room around the plot: left, top, right, bottom


@dataclass(frozen=True)
class Curve:
    """One line of a picture: its name, its css class, and its points (step, value)."""

    name: str
    class_: str
    points: list[tuple[float, float]]


def size_picture(rows: list[Row]) -> str:
    """`accuracy_against_size` for a wide page and for a phone; the style sheet shows one."""
    return accuracy_against_size(rows, WIDE, "wide") + accuracy_against_size(rows, NARROW, "narrow")


def curve_picture(title: str, curves: list[Curve]) -> str:
    """`loss_curves` for a wide page and for a phone; the style sheet shows one."""
    return loss_curves(title, curves, CURVE_WIDE, "wide") + loss_curves(
        title, curves, CURVE_NARROW, "narrow"
    )


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


def accuracy_against_size(rows: list[Row], canvas: tuple[int, int], class_: str) -> str:
    """Accuracy in percent over the size in MB (logarithmic), with the Pareto front.

    Empty text where no row has both numbers. Details of a point are its tooltip.
    """
    shown = _drawable(rows)
    if not shown:
        return ""
    width, height = canvas
    sizes = [row["bytes"] / 1e6 for row in shown]
    values = [100 * row["accuracy"] for row in shown]
    frame = svg.Box(MARGIN.left, MARGIN.top, width - MARGIN.right, height - MARGIN.bottom)
    low_x, high_x = min(sizes) / 1.35, max(sizes) * 1.45
    pad = max((max(values) - min(values)) * 0.12, 0.5)
    low_y, high_y = max(0.0, min(values) - pad), min(100.0, max(values) + pad)
    across = svg.logarithmic(low_x, high_x, frame.left, frame.right)
    up = svg.linear(low_y, high_y, frame.bottom, frame.top)
    drawn = _axes(
        frame,
        [(across(t), f"{t:,g}") for t in svg.log_ticks(low_x, high_x, 8 if width > 500 else 5)],
        [(up(t), f"{t:g} %") for t in svg.ticks(low_y, high_y)],
        "Size in MB (10⁶ bytes, logarithmic)",
        (width, height),
    )
    front = [(across(row["bytes"] / 1e6), up(100 * row["accuracy"])) for row in pareto_front(shown)]
    drawn.append(_front(front))
    where = [(across(row["bytes"] / 1e6), up(100 * row["accuracy"])) for row in shown]
    labels = svg.place_labels(
        [(x, y, _label(row)) for (x, y), row in zip(where, shown, strict=True)], frame, front
    )
    for (x, y), row, label in zip(where, shown, labels, strict=True):
        kind = row["role"] if row["role"] != "cell" else "cell " + bits_class(row)
        children = [svg.element("line", x1=x, y1=y, x2=label.x, y2=label.y - 4, class_="leader")]
        children = children if label.far else []
        children.append(_mark(row["role"], x, y))
        children.append(
            svg.element("text", label.text, x=label.x, y=label.y, text_anchor=label.anchor)
        )
        drawn.append(svg.group(children, _tooltip(row), f"point {kind}"))
    return svg.picture(drawn, width, height, "Accuracy against size of every model", class_)


def bits_class(row: Row) -> str:
    """The css class that colours a cell by its width."""
    bits = number(row["bits"]) or 0
    return next(
        name
        for least, name in ((8, "b8"), (5, "b6"), (4, "b4"), (3, "b3"), (0, "b2"))
        if bits >= least
    )


def _label(row: Row) -> str:
    if row["role"] != "cell":
        return row["role"]
    if row["method"] == DYNAMIC:
        return DYNAMIC
    method = "" if row["method"] in (METHODS[0], None) else f"{row['method']} "
    size = CHANNEL if row["group_size"] == CHANNEL else f"g{f.whole(row['group_size'])}"
    return f"{method}{f.whole(row['bits'])}-bit {size}"


def _tooltip(row: Row) -> str:
    return (
        f"{row['model']}\n{row['technique']}\n{f.size(row['bytes'])}, "
        f"{f.share(row['accuracy'])} accuracy, retention {f.percent(row['retention'])}\n"
        f"perplexity {f.plain(row['perplexity'])}, KL to teacher {f.plain(row['kl_to_teacher'])}\n"
        f"{f.speed(row['decode_tokens_per_s'])}, speed-up {f.factor(row['speedup'])}"
    )


def _mark(role: str, x: float, y: float) -> str:
    if role == "teacher":
        return svg.element("rect", x=x - 6, y=y - 6, width=12, height=12, rx=2)
    if role == "control":
        corners = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
        return svg.element("polygon", points=corners)
    return svg.element("circle", cx=x, cy=y, r=7 if role == "student" else 5)


def _front(corners: list[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    line = svg.element("polyline", points=points, class_="front")
    return svg.group([line], "Pareto front: no other model is both smaller and more accurate")


def _axes(
    frame: svg.Box,
    x_ticks: list[tuple[float, str]],
    y_ticks: list[tuple[float, str]],
    x_title: str,
    canvas: tuple[int, int],
) -> list[str]:
    drawn = []
    for y, text in y_ticks:
        drawn.append(svg.element("line", x1=frame.left, y1=y, x2=frame.right, y2=y, class_="grid"))
        drawn.append(
            svg.element("text", text, x=frame.left - 8, y=y + 4, text_anchor="end", class_="tick")
        )
    for x, text in x_ticks:
        drawn.append(
            svg.element("line", x1=x, y1=frame.bottom, x2=x, y2=frame.bottom + 5, class_="axis")
        )
        drawn.append(
            svg.element("text", text, x=x, y=frame.bottom + 19, text_anchor="middle", class_="tick")
        )
    drawn.append(
        svg.element(
            "line", x1=frame.left, y1=frame.bottom, x2=frame.right, y2=frame.bottom, class_="axis"
        )
    )
    middle = (frame.left + frame.right) / 2
    drawn.append(
        svg.element(
            "text", x_title, x=middle, y=canvas[1] - 6, text_anchor="middle", class_="axis-title"
        )
    )
    return drawn


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
    drawn = _axes(
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
