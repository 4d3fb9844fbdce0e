"""How a figure is written: one function per kind of number, "–" where there is none."""

from __future__ import annotations

from jobs.report.rows import Row, StageCost, is_recovered
from jobs.report.run_data import number
from quant.evaluation.bootstrap import Interval

NOTHING = "–"


def _significant(value: float, digits: int) -> str:
    """At least `digits` significant digits below 10**digits, whole numbers with commas above."""
    if value != value or value == 0:
        return "0"
    size = abs(float(f"{value:.{digits}g}"))  # 9.999 has three digits as 10.0, not as 10.00
    decimals = 0
    while size < 10 ** (digits - 1) and decimals < 8:
        size *= 10
        decimals += 1
    return f"{value:,.{decimals}f}"


def count(value: object) -> str:
    """A number of weights: 3.66 M, 8.19 B."""
    value = number(value)
    if value is None:
        return NOTHING
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_significant(value / scale, 3)} {unit}"
    return f"{value:.0f}"


def size(value: object) -> str:
    """Bytes as megabytes of 10^6 bytes."""
    value = number(value)
    return NOTHING if value is None else f"{_significant(value / 1e6, 3)} MB"


def share(value: object) -> str:
    """A fraction as percent."""
    value = number(value)
    return NOTHING if value is None else f"{100 * value:.1f} %"


def percent(value: object) -> str:
    value = number(value)
    return NOTHING if value is None else f"{value:.1f} %"


def plain(value: object, digits: int = 3) -> str:
    value = number(value)
    return NOTHING if value is None else _significant(value, digits)


def fixed(value: object, decimals: int = 2) -> str:
    value = number(value)
    return NOTHING if value is None else f"{value:,.{decimals}f}"


def with_interval(
    value: object, found: Interval | None, decimals: int | None = None, unit: str = ""
) -> str:
    """A statistic and its interval: "0.0115 [0.0104, 0.0126]"; ends as exact as the value.

    decimals: so many behind the point, else three significant digits of the value. Without an
    interval the value stands alone.
    """
    value = number(value)
    if value is None:
        return NOTHING
    if decimals is None:
        decimals = len(_significant(value, 3).partition(".")[2])
    shown = f"{value:,.{decimals}f}{unit}"
    if found is None or found.low is None or found.high is None:
        return shown
    return f"{shown} [{found.low:,.{decimals}f}, {found.high:,.{decimals}f}]"


def energy(row: Row) -> str:
    """Energy per token in joules, or that the machine cannot measure it."""
    value = number(row.get("energy_per_token_j"))
    if value is not None:
        return f"{_significant(value, 3)} J"
    return "not measurable" if row.get("energy_note") else NOTHING


def change(value: object) -> str:
    """A change of a probability in percentage points, with its sign."""
    value = number(value)
    return NOTHING if value is None else f"{100 * value:+.2f} pp".replace("-", "−")


def points(value: object) -> str:
    """A size of changes of a probability in percentage points."""
    value = number(value)
    return NOTHING if value is None else f"{100 * value:.2f} pp"


def p_value(value: object) -> str:
    value = number(value)
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def reduced(part: Interval) -> str:
    """By which part something is lower, in percent: "42 % [38, 46]"."""
    decimals = 0 if abs(part.value) >= 0.1 else 1
    return with_interval(100 * part.value, part.map(lambda end: 100 * end), decimals, " %")


def ranged(row: Row, name: str, decimals: int | None = None, scale: float = 1.0) -> str:
    """A row's number with its own ends, `<name>_low` and `<name>_high`, all times `scale`."""
    value, low, high = (number(row.get(name + end)) for end in ("", "_low", "_high"))
    if value is None:
        return NOTHING
    ends = None
    if low is not None and high is not None:
        ends = Interval(value * scale, low * scale, high * scale)
    return with_interval(value * scale, ends, decimals)


def whole(value: object) -> str:
    value = number(value)
    return NOTHING if value is None else f"{value:g}"


def speed(value: object) -> str:
    """Tokens per second."""
    value = number(value)
    return NOTHING if value is None else f"{_significant(value, 2)} tok/s"


def factor(value: object) -> str:
    """A speed-up as measured, also below 1."""
    value = number(value)
    if value is None:
        return NOTHING
    return f"{value:.1f}x" if abs(value) >= 0.1 or value == 0 else f"{_significant(value, 1)}x"


def duration(seconds: object) -> str:
    seconds = number(seconds)
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{_significant(seconds, 2)} s"
    minutes, _ = divmod(round(seconds), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours:,} h {rest:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def device_time(hours: float, device: str) -> str:
    """Device hours in words: "3.2 GPU hours", below 0.1 hours in minutes."""
    what = "GPU" if device == "gpu" else "CPU core"
    if hours < 0.1:
        return f"{_significant(60 * hours, 2)} {what} minutes"
    return f"{_significant(hours, 2)} {what} hours"


def cost_line(costs: list[StageCost]) -> str:
    """The cost of a run in one line; empty where nothing is known."""
    if not costs:
        return ""
    totals: dict[str, float] = {}
    for stage in costs:
        if stage.hours is not None:
            totals[stage.device] = totals.get(stage.device, 0.0) + stage.hours
    wall = duration(sum(stage.seconds for stage in costs))
    parts = ", ".join(f"{stage.stage} {duration(stage.seconds)}" for stage in costs)
    spent = " + ".join(device_time(hours, device) for device, hours in sorted(totals.items()))
    return f"Cost: {spent + '; ' if spent else ''}wall time {wall} ({parts})"


def first_line(error: object) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[0] if lines else "no error text"


def headline(rows: list[Row]) -> str:
    """What came out, in a sentence.

    It describes the plain 4-bit cells, or the next wider or narrower ones that exist, of the first
    method that has any, and of the student where both models have cells: what is told does not
    depend on any result, for nothing is chosen on the report part.
    """
    cells = [row for row in rows if row["role"] == "cell"]
    done = [row for row in cells if row["status"] != "failed"]
    student = next((row for row in rows if row["role"] == "student"), None)
    teacher = next((row for row in rows if row["role"] == "teacher"), None)
    parts = []
    if student and teacher and number(student["retention"]) is not None:
        parts.append(
            f"The student keeps {percent(student['retention'])} of the teacher's accuracy "
            f"at {size(student['bytes'])} instead of {size(teacher['bytes'])}."
        )
    told = [row for row in done if number(row["retention"]) is not None and row["bits"]]
    told = [row for row in told if not is_recovered(row)]
    if told:
        of = "student" if any(row["of"] == "student" for row in told) else "teacher"
        parts.append(_of_cells([row for row in told if row["of"] == of], student, teacher))
    failed = len(cells) - len(done)
    if failed:
        parts.append(f"{failed} of {len(cells)} cells failed.")
    if not parts:
        return f"{len(done)} cells measured." if cells else "No results yet."
    return " ".join(parts)


def _of_cells(told: list[Row], student: Row | None, teacher: Row | None) -> str:
    """What the cells of one width and method keep of their model's accuracy, and at which size."""
    bits = min({row["bits"] for row in told}, key=lambda width: (abs(width - 4), width))
    chosen = [row for row in told if row["bits"] == bits]  # in the order of their methods
    chosen = [row for row in chosen if row["method"] == chosen[0]["method"]]
    of_teacher = chosen[0]["of"] == "teacher"
    kept = sorted({percent(row["retention"]) for row in chosen}, key=lambda text: float(text[:-2]))
    sizes = sorted({row["bytes"] for row in chosen if number(row["bytes"]) is not None})
    how = f" ({chosen[0]['method']})" if len({row["method"] for row in told}) > 1 else ""
    who = "the teacher" if of_teacher else "it"
    text = f"At {bits} bits{how} {who} keeps {_span(kept, ' %')} of its accuracy"
    model = teacher if of_teacher else student
    if sizes:
        text += f" at {_span([size(value) for value in sizes], ' MB')}"
        if model and model["bytes"]:
            times = [f"{model['bytes'] / value:.1f}" for value in reversed(sizes)]
            text += f", {_span(times, '')} times smaller"
    return text + "."


def _span(texts: list[str], unit: str) -> str:
    """ "97.9–98.9 %" of a rising list of texts that end in the same unit."""
    first, last = texts[0], texts[-1]
    if first == last:
        return last
    return f"{first.removesuffix(unit)}–{last}"
