"""A forecast as tables for a terminal of 80 columns and more."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.storage.store import format_bytes
from jobs.forecast.place import USABLE

NOTHING = "–"


def _bytes(value: float | None) -> str:
    return NOTHING if value is None else format_bytes(value)


def count(value: float) -> str:
    """A number of weights or tokens."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{_three(seconds / 3600)} h"


def hours(value: float | None) -> str:
    """Device hours."""
    return NOTHING if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def _three(value: float) -> str:
    return (
        f"{value:,.2f}" if value < 9.995 else f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"
    )


WORDS = {"capture": "capture", "distill": "distill", "sweep": "sweep, one cell"}


def show(plan: dict[str, Any]) -> Group:
    """The plan that `jobs.forecast.forecast` gave."""
    blocks: list[RenderableType] = [Text(_headline(plan), style="bold")]
    resolved = [f"{key}={value}" for key, value in plan["resolved"].items()]
    if resolved:
        blocks.append(Text("auto is: " + ", ".join(resolved)))
    blocks += [Text(), _models(plan), Text(), _memory(plan), *_advice(plan), Text()]
    blocks += [_time(plan), *_assumed(plan), Text(), _storage(plan), Text()]
    blocks += [Text(line) for line in _break_even(plan)]
    blocks += [Text(f"Note: {line}") for line in plan["notes"]]
    return Group(*blocks)


def _headline(plan: dict[str, Any]) -> str:
    place = plan["place"]
    nodes, (cpus, gpus) = len(place["nodes"]), place["nodes"][0]
    if gpus:
        name = place["gpu"] or "GPUs of a type that is not known"
        memory = f" of {_bytes(place['gpu_memory'])}" if place["gpu_memory"] else ""
        what = f"{gpus} x {name}{memory}"
    else:
        what = f"{cpus} CPUs, {_bytes(place['host_memory'])} of memory"
    where = what if nodes == 1 else f"{nodes} nodes of {what}"
    verdict = {True: "fits", False: "does not fit", None: "memory not known"}[plan["fits"]]
    return f"{plan['name']} on {where}: {verdict}"


def _table(*columns: str, figures: int) -> Table:
    """The last `figures` columns are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for index, title in enumerate(columns):
        number = index >= len(columns) - figures
        table.add_column(title, justify="right" if number else "left", no_wrap=number)
    return table


def _models(plan: dict[str, Any]) -> Table:
    table = _table(
        "Model", "Type", "Weights", "Met by a token", "Layers", "Width", "Ids", figures=5
    )
    for role, model in plan["models"].items():
        table.add_row(
            role,
            model["type"] + (", experts" if model["experts"] else ""),
            count(model["parameters"]),
            count(model["active_parameters"]),
            str(model["layers"]),
            f"{model['hidden_size']:,}",
            f"{model['vocabulary']:,}",
        )
    return table


def _memory(plan: dict[str, Any]) -> Table:
    place = plan["place"]
    unit = "GPU" if any(gpus for _, gpus in place["nodes"]) else "worker"
    table = _table(f"Memory per {unit}", "Part", "Size", figures=1)
    for name, stage in plan["stages"].items():
        need = stage["memory"]
        table.add_section()
        if need is None:
            table.add_row(WORDS[name], Text(stage["why_not"], style="red"), NOTHING)
            continue
        first = _of(name, stage)
        for part, amount in need["device"].items():
            table.add_row(first, part, _bytes(amount))
            first = ""
        if need["start"] > sum(need["device"].values()):
            table.add_row("", "at the start: the whole student", _bytes(need["start"]))
        verdict = _verdict(need)
        table.add_row("", verdict, Text(_bytes(need["total"]), style="bold"))
        if need["host_total"]:
            table.add_row("", _host(need), _bytes(need["host_total"]))
    return table


def _of(name: str, stage: dict[str, Any]) -> str:
    if name == "sweep":
        return f"sweep: cell {stage['cell']['key']}"
    return f"{name}: {stage['group']['workers']} workers"


def _host(need: dict[str, Any]) -> str:
    """What the host memory of a node is for, and how much there is."""
    of = f", of {_bytes(need['host_memory'])}" if need["host_memory"] else ""
    when = ", while loading" if need["host_load"] == need["host_total"] else ""
    return f"host memory of a node{when}{of}"


def _verdict(need: dict[str, Any]) -> Text:
    if need["memory"] is None:
        return Text("in all", style="bold")
    capacity = f"in all, of {_bytes(need['memory'])}"
    if need["fits"]:
        return Text(f"{capacity}: fits", style="bold")
    over = need["total"] > USABLE * need["memory"]
    why = "does not fit" if over else "host memory does not suffice"
    return Text(f"{capacity}: {why}", style="bold red")


def _advice(plan: dict[str, Any]) -> list[Text]:
    lines = []
    for name, stage in plan["stages"].items():
        if stage["memory"] and stage["memory"]["fits"] is not False:
            continue
        found = stage["remedies"]
        if not found:
            lines.append(Text(f"{name}: nothing that plan knows of makes it fit"))
            continue
        lines.append(Text(f"{name} fits with any of:"))
        lines += [Text(f"  {words}") for words in found]
    return lines


def _time(plan: dict[str, Any]) -> Table:
    kind = "GPU hours" if plan["place"]["gpu"] else "Device hours"
    table = _table("Stage", "Tokens", "Utilisation", "Time", kind, "Cost", figures=5)
    price = plan["cost"]["price_per_gpu_hour"]
    for name, stage in plan["stages"].items():
        tokens = stage.get("tokens")
        spent = stage.get("device_hours")
        money = None
        if price is not None and spent is not None and stage["device"] == "gpu":
            money = price * spent
        used = stage.get("utilisation")
        table.add_row(
            name if name != "sweep" else f"sweep, {plan['cells']} cells",
            NOTHING if tokens is None else count(tokens),
            NOTHING if used is None else f"{100 * used:.0f} %",
            duration(stage.get("seconds")),
            hours(spent) + ("" if stage.get("device", "gpu") == "gpu" else " CPU"),
            NOTHING if money is None else f"{money:,.2f}",
        )
    cost = plan["cost"]
    gpu_hours, cpu_hours = cost["gpu_hours"], cost["cpu_hours"]
    total = hours(gpu_hours) if gpu_hours or cpu_hours is None else f"{hours(cpu_hours)} CPU"
    money = cost["money"]
    table.add_section()
    table.add_row(
        "all", "", "", duration(cost["seconds"]), total,
        NOTHING if money is None else f"{money:,.2f}",
    )  # fmt: skip
    return table


def _assumed(plan: dict[str, Any]) -> list[Text]:
    """Which peaks the utilisations are of: one line for each processor and dtype."""
    place, found = plan["place"], []
    for stage in plan["stages"].values():
        if stage.get("peak_flops") is None:
            continue
        if stage["device"] == "gpu":
            peak = place["gpu_peak_flops"][stage["dtype"]]
            of, known = f"of one {place['gpu']}", "the utilisation is assumed, not measured"
        else:
            core = place["core"]
            peak = core[f"{stage['dtype']}_flops"]
            of = f"of one {core['kind']} core"
            known = "measured here" if core["measured"] else "assumed for its kind"
        line = (
            f"Utilisation: of {peak / 1e12:,.3g} Tflop/s, the {stage['dtype']} peak {of}; {known}."
        )
        if line not in found:
            found.append(line)
    return [Text(line) for line in found]


def _storage(plan: dict[str, Any]) -> Table:
    table = _table("Storage", "What", "Size", figures=1)
    sizes, tokens = plan["storage"], plan["tokens"]
    known = count(tokens["corpus"]) if tokens["corpus"] is not None else "not counted"
    table.add_row("corpus", f"tokens of train: {known}", _bytes(sizes["corpus"]))
    if "cache" in sizes:
        cache = sizes["cache"]
        words = f"{cache['held_out_bytes_per_token']:,.0f} bytes per held-out token"
        if cache["sets"]:
            sets = f" in {cache['sets']} sets" if cache["sets"] > 1 else ""
            words = (
                f"{cache['train_bytes_per_token']:,.1f} bytes per token{sets} "
                f"({cache['ids_per_token']:.0f} ids); {words}"
            )
        table.add_row("logit cache", words, _bytes(cache["bytes"]))
    if "student" in sizes:
        table.add_row("student", "", _bytes(sizes["student"]))
        if sizes["control"]:
            table.add_row("control", "", _bytes(sizes["control"]))
        words = f"at most, while training; one is {_bytes(sizes['checkpoint'])}"
        table.add_row("checkpoints", words, _bytes(sizes["checkpoints"]))
    if "cells" in sizes:
        table.add_row("cells", f"{plan['cells']} models", _bytes(sizes["cells"]))
    table.add_section()
    table.add_row("all", "", _bytes(sizes["total"]))
    return table


def _break_even(plan: dict[str, Any]) -> list[str]:
    found = plan.get("break_even")
    if found is None:
        return []
    students, passes = found["students"], found["passes"]
    reads = f"{count(found['online_tokens_per_student'])} tokens"
    if passes > 1.005:
        reads += f", each of them {passes:.3g} times"
    once, each = found["cached_teacher_hours"], found["online_teacher_hours_per_student"]
    told = "" if once is None else f" ({duration(3600 * once)})"
    more = "" if each is None else f" ({duration(3600 * each)})"
    captured = count(found["cached_tokens"])
    first = (
        f"Cached against online: for a cache the teacher runs over {captured} tokens once{told}; "
        f"beside a student it runs over all that this one reads, {reads}{more}."
    )
    if students == 1:
        return [first, "Break-even: the cache is cheaper from the first student on."]
    return [first, f"Break-even: the cache is cheaper from {students} students on it."]
