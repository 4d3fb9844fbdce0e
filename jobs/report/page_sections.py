"""The page's answers: which cell to take, by which route, where the loss is, what tasks say."""

from __future__ import annotations

from html import escape
from typing import Any

from jobs.report import charts
from jobs.report import formats as f
from jobs.report.page_parts import (
    Field,
    dot,
    figure,
    heading,
    named,
    note,
    section,
    simple_table,
    table_of,
)
from jobs.report.pareto import OWN, candidates, front, yardstick
from jobs.report.recommend import recommend
from jobs.report.routes import Attribution, Route, answer, attributions, hours_in_words, routes
from jobs.report.rows import Row, is_allocated
from jobs.report.run_data import RunData


def recommendation(data: RunData, rows: list[Row]) -> str:
    """One cell and why; the picture of the front that it is on. "" without numbers on select."""
    measure = yardstick(data.cells.values())
    known = candidates(data.cells, measure)
    if not known:
        return ""
    found = recommend(data)
    best = front(data.cells, measure)
    key = escape(str(found.key))
    lines = "".join(f"<li>{escape(line)}</li>" for line in found.why)
    card = (
        f'<div class="card answer"><p><strong>{key}</strong></p><ul>{lines}</ul>'
        f"<pre>{escape(str(found.command))}</pre></div>"
    )
    drawn = charts.kl_picture(rows, known, best, measure)
    picture = f'<div class="card"><div class="legend">{_legend(rows, best)}</div>{drawn}</div>'
    asked = (
        f"Other limits: stillhouse report {data.name} --max-mb 600, --min-retention 98 or "
        "--min-speed 2, also together."
    )
    to = "the 16-bit model they are made of" if measure == OWN else "the teacher"
    ties = [one for one in best if one.tied]
    text = f"KL of the cells to {to}, on the part select, in nats per token; both axes logarithmic."
    if ties:
        told = "; ".join(f"{one.candidate.key} with {', '.join(one.tied)}" for one in ties)
        text += f" Tied with a smaller one (the paired 95 % interval contains 0): {told}."
    return section(
        "Recommended", card, note(asked), "<h3>KL against size</h3>", picture, note(text)
    )


def _legend(rows: list[Row], best: list[Any]) -> str:
    cells = [row for row in rows if row["role"] == "cell" and row["status"] != "failed"]
    widths = {row["bits"]: charts.bits_class(row) for row in cells if row["bits"]}
    kinds = [(f"{bits:g}-bit", widths[bits]) for bits in sorted(widths, reverse=True)]
    kinds += [("allocated", "mixed")] if any(is_allocated(row) for row in cells) else []
    if len({row["of"] for row in cells}) > 1:
        kinds += [("of the teacher", "plain square"), ("of the student", "plain")]
    kinds += [("tied with a smaller one", "plain hollow")] if any(one.tied for one in best) else []
    text = "".join(f'<span><span class="dot {kind}"></span>{name}</span>' for name, kind in kinds)
    return text + '<span><span class="front-key"></span>front</span>'


def distil_or_quantize(data: RunData, rows: list[Row]) -> str:
    """The table of the four models, and the answer; "" where not both models have cells."""
    found = routes(data)
    if not found:
        return ""
    by_key = {row["key"]: row for row in rows}
    fields = [
        Field("Cell", lambda one: "" if one.key in ("teacher", "student") else one.key, False),
        Field("Size", lambda one: f.size(one.bytes)),
        Field("Accuracy", lambda one: f.share(one.accuracy)),
        Field("Retention", lambda one: f.percent(one.retention)),
        Field("KL to teacher", lambda one: f.plain(one.kl)),
        Field("Decode speed", lambda one: f.speed(one.decode)),
        Field("Cost to get there", lambda one: hours_in_words(one.hours)),
    ]

    def name(one: Route) -> str:
        return dot(by_key[one.key]) + escape(one.name)

    devices = {one.device for one in found if one.decode is not None and one.device}
    text = (
        "The quantized ones are those recommended of each model, chosen on select; the numbers are "
        "of report. Cost: the device time that this run spent on capture, distillation and the "
        "cell; a shared logit cache is free for later runs."
    )
    if len(devices) > 1:
        text += " Speeds were measured on different devices: do not compare them."
    told = answer(data, found)
    lead = f"<p>{escape(told)}</p>" if told else ""
    return section(
        "Distil, quantize, or both", lead, table_of(found, fields, "Model", name), note(text)
    )


def where_the_loss_comes_from(data: RunData, rows: list[Row]) -> str:
    """Loss of the student and the cells, part by part, with bars; "" where sums are missing."""
    by_key = {row["key"]: row for row in rows}
    found = {one.key: one for one in attributions(data) if one.key in by_key}
    shown = [found[key] for key in by_key if key in found]
    if not any(one.quantized for one in shown):
        return ""
    reach = max(_added(one) for one in shown) or 1.0
    distilled = any(one.distilled for one in shown)
    head = heading("Model", False) + (heading("Teacher", True) if distilled else "")
    head += heading("+ distillation", True) if distilled else ""
    head += heading("+ quantization", True) + heading("= loss", True) + heading("", False)
    body = ""
    for one in shown:
        body += f'<tr><td class="nowrap">{named(by_key[one.key])}</td>'
        cells = [f.fixed(one.teacher, 4), _part(one.distilled)] if distilled else []
        for text in (*cells, _part(one.quantized), f.fixed(one.total, 4)):
            body += f'<td class="figure">{figure(text)}</td>'
        body += f'<td class="bars">{_bars(one, reach)}</td></tr>'
    text = (
        "Cross-entropy on report in nats per token, with 95 % intervals of the paired differences. "
        "The bars are what distillation and quantization added; what they took away is not drawn."
    )
    legend = '<span><span class="dot student"></span>distillation</span>' if distilled else ""
    legend += '<span><span class="dot b3 square"></span>quantization</span>'
    return section(
        "Where the loss comes from",
        f'<div class="legend">{legend}</div>',
        simple_table(head, body),
        note(text),
    )


def _part(part: Any) -> str:  # noqa: ANN401
    if part is None:
        return f.NOTHING
    return "+" * (part.value >= 0) + f.with_interval(part.value, part, 4)


def _added(one: Attribution) -> float:
    return sum(max(0.0, part.value) for part in (one.distilled, one.quantized) if part)


def _bars(one: Attribution, reach: float) -> str:
    bars = ""
    for part, kind in ((one.distilled, "student"), (one.quantized, "b3")):
        if part is not None and part.value > 0:
            bars += (
                f'<span class="bar {kind}" style="width:{100 * part.value / reach:.2f}%"></span>'
            )
    return f'<span class="track">{bars}</span>'


def tasks(rows: list[Row]) -> str:
    """Accuracy of the benchmark tasks, and which answers changed; "" without tasks."""
    names = list(dict.fromkeys(name for row in rows for name in _tasks(row)))
    fields = [
        Field("Accuracy", lambda row: f.share(row["task"].get("accuracy"))),
        Field("Metric", lambda row: _metric(row["task"]), False),
        Field("Of 16-bit", lambda row: f.percent(row["task"].get("retention"))),
        Field("Right to wrong", lambda row: f.whole(row["task"].get("right_to_wrong"))),
        Field("Wrong to right", lambda row: f.whole(row["task"].get("wrong_to_right"))),
        Field("McNemar p", lambda row: f.p_value(row["task"].get("mcnemar_p"))),
        Field("Documents", lambda row: f.fixed(row["task"].get("documents"), 0)),
    ]
    blocks: list[str] = []
    for name in names:
        shown = [{**row, "task": _tasks(row)[name]} for row in rows if name in _tasks(row)]
        opened = "" if blocks else " open"
        table = table_of(shown, fields, "Model", named)
        blocks.append(f"<details{opened}><summary>{escape(name)}</summary>{table}</details>")
    if not blocks:
        return ""
    text = (
        "Answers that changed against the 16-bit model, both ways. McNemar p: how often chance "
        "alone would change as many more one way than the other; of many cells some are low."
    )
    return section("Tasks", *blocks, note(text))


def _tasks(row: Row) -> dict[str, Any]:
    found = row.get("tasks")
    found = found if isinstance(found, dict) else {}
    return {str(name): task for name, task in found.items() if isinstance(task, dict)}


def _metric(task: dict[str, Any]) -> str:
    """What the accuracy is called in lm-eval; other numbers where the task has none."""
    if task.get("metric"):
        return str(task["metric"])
    metrics = task.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    return ", ".join(f"{name} {f.plain(value)}" for name, value in list(metrics.items())[:3])
