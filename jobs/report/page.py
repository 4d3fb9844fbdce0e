"""The report page: one self-contained HTML file that needs no network and no script."""

from __future__ import annotations

from functools import partial
from html import escape
from pathlib import Path

import yaml

from jobs.report import charts, page_details, page_quantized, page_sections, table
from jobs.report import formats as f
from jobs.report.charts import Curve, curve_picture
from jobs.report.page_details import detail
from jobs.report.page_parts import dot, heading, simple_table
from jobs.report.rows import Row, StageCost, cost, is_allocated, rows_of
from jobs.report.run_data import TRAININGS, RunData, curve, evaluations, number, training_metrics

STYLE = Path(__file__).with_name("style.css")
HELD_OUT = {
    "select_ce": "Cross-entropy on select",
    "select_forward_kl": "KL to the teacher on select",
}
CURVE_NAMES = {"distill": "student", "control": "control (cross-entropy only)"}


def page(data: RunData) -> str:
    """The whole page of one run. Everything that users wrote is escaped; nothing is fetched."""
    rows = rows_of(data)
    parts = [
        _head(data, rows),
        _headline_table(rows),
        page_sections.recommendation(data, rows),
        page_sections.distil_or_quantize(data, rows),
        _size_picture(rows),
        page_sections.where_the_loss_comes_from(data, rows),
        page_sections.tasks(rows),
        page_quantized.allocation(data, rows),
        page_quantized.recovery(data, rows),
        page_quantized.extra(data, rows),
        _training(data),
        detail(rows),
        _failures(data, rows),
        _cost(cost(data)),
        page_details.html_section(data),
        _environment(rows),
        _spec(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.name)} – Stillhouse</title>\n<style>\n"
        f"{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(data: RunData, rows: list[Row]) -> str:
    newest = max((event.get("attempt") or 0 for event in data.events), default=0)
    ended = [event for event in data.of_kind("run_end") if (event.get("attempt") or 0) == newest]
    status = str(ended[-1].get("status", "")) if ended else ""
    note = "" if status in ("done", "") else f' – <span class="bad">{escape(status)}</span>'
    return (
        f'<header>\n<p class="kicker">Stillhouse report{note}</p>\n<h1>{escape(data.name)}</h1>\n'
        f'<p class="lead">{escape(f.headline(rows))}</p>\n</header>'
    )


def _headline_table(rows: list[Row]) -> str:
    if not rows:
        return '<p class="note">No model was evaluated yet.</p>'
    shown = table.columns(rows)
    lines = ['<div class="card scroll">\n<table class="headline">', "<thead><tr>"]
    lines += [heading(column.title, column.figure) for column in shown]
    lines.append("</tr></thead>\n<tbody>")
    for row in rows:
        lines.append(f'<tr class="{escape(row["role"])} {escape(row["status"])}">')
        for column in shown:
            text = escape(table.entry(column, row))
            if column.title == "Model":
                text = dot(row) + text
            if column.title == "Technique":
                text = text.replace(" MB", "\u00a0MB")
            if text == table.FAILED:
                text = f'<span class="bad">{text}</span>'
            kind = "figure" if column.figure else "name"
            kind += " nowrap" if column.title == "Model" and len(row["model"]) <= 24 else ""
            lines.append(f'<td class="{kind}" data-title="{escape(column.title)}">{text}</td>')
        lines.append("</tr>")
    lines.append("</tbody>\n</table>\n</div>")
    lines.append(f'<p class="note">{escape(" ".join([table.NOTES, *table.remarks(rows)]))}</p>')
    return "".join(lines)


def _size_picture(rows: list[Row]) -> str:
    drawn = charts.size_picture(rows)
    if not drawn:
        return ""
    there = {row["role"] for row in rows}
    roles = [role for role in ("teacher", "student", "control") if role in there]
    roles += ["extra"] if "extra" in there else []
    legend = "".join(
        f'<span><span class="dot {role}"></span>'
        f"{'quantized elsewhere' if role == 'extra' else role}</span>"
        for role in roles
    )
    widths = {r["bits"]: charts.bits_class(r) for r in rows if r["role"] == "cell" and r["bits"]}
    for bits in sorted(widths, reverse=True):
        legend += f'<span><span class="dot {widths[bits]}"></span>{bits}-bit cells</span>'
    if any(row["role"] == "cell" and is_allocated(row) for row in rows):
        legend += '<span><span class="dot mixed"></span>allocated cells</span>'
    legend += '<span><span class="front-key"></span>Pareto front</span>'
    return (
        "<section>\n<h2>Accuracy against size</h2>\n"
        f'<div class="card"><div class="legend">{legend}</div>{drawn}</div>\n</section>'
    )


def _training(data: RunData) -> str:
    cards = []
    drawings = [(title, partial(_points, data, quantity)) for quantity, title in _quantities(data)]
    drawings += [(title, partial(_held_out_points, data, name)) for name, title in HELD_OUT.items()]
    for title, points_of in drawings:
        curves = [
            Curve(CURVE_NAMES[stage], "student" if stage == "distill" else "control", points)
            for stage in TRAININGS
            if (points := points_of(stage))
        ]
        drawn = curve_picture(title, curves)
        if drawn:
            legend = "".join(
                f'<span><span class="dot {c.class_}"></span>{escape(c.name)}</span>' for c in curves
            )
            cards.append(
                f'<div class="card"><h3>{escape(title)}</h3>'
                f'<div class="legend">{legend}</div>{drawn}</div>'
            )
    cards += _held_out(data)
    if not cards:
        return ""
    return (
        f'<section>\n<h2>Training</h2>\n<div class="pair">{"".join(cards)}</div>\n'
        '<p class="note">Losses in nats per token: one point per optimizer step, and the mean of '
        "its neighbours; the number is that mean at the end. select: the held-out part on which "
        "choices are made.</p>\n</section>"
    )


def _quantities(data: RunData) -> list[tuple[str, str]]:
    """Which numbers of the step events to draw: the loss, and its parts where it has several."""
    steps = curve(data, "distill") or curve(data, "control")
    losses = ((data.spec.get("distill") or {}).get("losses")) or {}
    parts = [name for name in losses if any(number(event.get(name)) is not None for event in steps)]
    found = [
        ("loss", "Training loss, each its own objective" if len(parts) > 1 else "Training loss")
    ]
    if len(parts) > 1 or (parts and parts != ["ce"] and curve(data, "control")):
        found += [(name, f"Loss part {name}") for name in parts]
    return found


def _points(data: RunData, quantity: str, stage: str) -> list[tuple[float, float]]:
    points = []
    for event in curve(data, stage):
        value = number(event.get(quantity))
        if value is None and quantity == "ce" and stage == "control":
            value = number(event.get("loss"))  # the control's loss is cross-entropy alone
        if value is not None:
            points.append((float(event["step"]), value))
    return points


def _held_out_points(data: RunData, name: str, stage: str) -> list[tuple[float, float]]:
    """A number of the evaluations on select; [] where there was one alone, at the end."""
    points = [
        (float(event["step"]), value)
        for event in evaluations(data, stage)
        if (value := number(event.get(name))) is not None
    ]
    return points if len(points) > 1 else []


def _held_out(data: RunData) -> list[str]:
    found = {stage: training_metrics(data, stage) for stage in TRAININGS}
    found = {stage: metrics for stage, metrics in found.items() if metrics}
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    names = [name for name in names if any(number(m.get(name)) is not None for m in found.values())]
    if not names:
        return []
    head = heading("At the end of training", False)
    head += "".join(heading(CURVE_NAMES[stage], True) for stage in found)
    body = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>"
        + "".join(f'<td class="figure">{f.plain(m.get(name), 4)}</td>' for m in found.values())
        + "</tr>"
        for name in names
    )
    return [simple_table(head, body)]


def _failures(data: RunData, rows: list[Row]) -> str:
    found = [(row["key"], row["error"]) for row in rows if row["status"] == table.FAILED]
    redone = {
        str(e.get("stage")): i for i, e in enumerate(data.events) if e.get("event") == "stage_done"
    }
    for index, event in enumerate(data.events):
        stage = str(event.get("stage"))
        if event.get("event") == "stage_failed" and redone.get(stage, -1) < index:
            found.append((f"stage {stage}", event.get("error")))
    if not found:
        return ""
    blocks = []
    for name, error in found:
        text = str(error or "").strip()
        block = f"<p><strong>{escape(name)}</strong>: {escape(f.first_line(error))}</p>"
        if len(text.splitlines()) > 1:
            block += f"<details><summary>Whole error</summary><pre>{escape(text)}</pre></details>"
        blocks.append(f'<div class="failure">{block}</div>')
    return "<section>\n<h2>Failures</h2>\n" + "\n".join(blocks) + "\n</section>"


def _cost(costs: list[StageCost]) -> str:
    if not costs:
        return ""
    head = heading("Stage", False) + heading("Wall time", True) + heading("Devices", True)
    body = ""
    for stage in costs:
        spent = f.NOTHING if stage.hours is None else f.device_time(stage.hours, stage.device)
        body += (
            f'<tr><td>{escape(stage.stage)}</td><td class="figure">{f.duration(stage.seconds)}</td>'
            f'<td class="figure">{escape(spent)}</td></tr>'
        )
    line = escape(f.cost_line(costs).split(" (")[0].removeprefix("Cost: "))
    return f"<section>\n<h2>Cost</h2>\n<p>{line}</p>\n{simple_table(head, body)}\n</section>"


def _environment(rows: list[Row]) -> str:
    """Versions, once where all rows agree; each value that differs is listed."""
    found: dict[str, set[str]] = {}
    for row in rows:
        versions = row.get("versions")
        if isinstance(versions, dict):
            for name, version in versions.items():
                found.setdefault(str(name), set()).add(str(version))
    if not found:
        return ""
    texts = [f"{escape(name)} {escape(' / '.join(sorted(v)))}" for name, v in sorted(found.items())]
    return f"<section>\n<h2>Versions</h2>\n<p>{', '.join(texts)}</p>\n</section>"


def _spec(data: RunData) -> str:
    if not data.spec:
        return ""
    text = yaml.safe_dump(data.spec, sort_keys=False, allow_unicode=True, width=88)
    return (
        '<section>\n<h2>Spec</h2>\n<details class="card"><summary>The resolved spec of this run'
        f"</summary><pre>{escape(text)}</pre></details>\n"
        f'<p class="note">Run directory: <code>{escape(data.url)}</code></p>\n</section>'
    )
