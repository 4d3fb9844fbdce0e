"""What the report shows of a sweep with cells of every kind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.storage import Store
from jobs.report import formats as f
from jobs.report.build import build_report
from jobs.report.formats import headline
from jobs.report.page import page
from jobs.report.rows import collect
from jobs.report.run_data import load_run
from jobs.report.table import markdown, terminal
from jobs.tracking.wandb_runs import wandb_runs
from quant.evaluation.bootstrap import Interval
from tests.fixtures.swept_run import swept_run

EVIL = '<img src="x" onerror="alert(1)">'
SECTIONS = (
    "Recommended",
    "Distil, quantize, or both",
    "Where the loss comes from",
    "Tasks",
    "Allocation",
    "Recovery",
    "Quantized elsewhere",
    "In detail",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return swept_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def rows(run: Store) -> list[dict[str, Any]]:
    return collect(run)


@pytest.fixture(scope="module")
def text(run: Store) -> str:
    return page(load_run(run))


def part(text: str, title: str) -> str:
    """A section of the page without its tags."""
    found = text.split(f"<h2>{title}</h2>")[1].split("</section>")[0]
    return " ".join(re.sub(r"<[^>]+>", " ", found).split())


def test_the_order_of_rows(rows: list[dict[str, Any]]) -> None:
    assert [row["key"] for row in rows] == [
        *("teacher", "student"),
        *("hqq-8b-g32", "hqq-8b-g64", "hqq-4b-g32", "hqq-4b-g64"),
        *("hqq-3b-g32", "hqq-3b-g32-recovered", "hqq-3b-g64", "hqq-3b-g64-recovered"),
        "hqq-3b-g128",  # a control of an allocated cell, outside of the grid
        *("hqq-2b-g32", "hqq-2b-g32-recovered", "hqq-2b-g64", "hqq-2b-g64-recovered"),
        "hqq-2b-g128",
        *("allocated-0.6mb", "allocated-0.5mb"),
        *("teacher-hqq-8b-g32", "teacher-hqq-8b-g64", "teacher-hqq-4b-g32", "teacher-hqq-4b-g64"),
        *("teacher-hqq-3b-g32", "teacher-hqq-3b-g64", "teacher-hqq-2b-g32", "teacher-hqq-2b-g64"),
        "extra-gptq-4b",
    ]


def test_what_rows_are_called(rows: list[dict[str, Any]]) -> None:
    by_key = {row["key"]: row for row in rows}
    assert by_key["hqq-2b-g64-recovered"]["technique"] == "hqq 2-bit g64, recovered (200 steps)"
    allocated = by_key["allocated-0.6mb"]
    assert allocated["technique"] == "allocated layer by layer, 0.6 MB"
    assert (allocated["bits"], allocated["group_size"]) == (None, None)
    of_teacher, extra = by_key["teacher-hqq-4b-g64"], by_key["extra-gptq-4b"]
    assert (of_teacher["model"], of_teacher["of"]) == ("org/big", "teacher")
    assert (by_key["hqq-4b-g64"]["model"], by_key["hqq-4b-g64"]["of"]) == ("swept", "student")
    assert (extra["role"], extra["technique"]) == ("extra", "quantized elsewhere (gptq)")
    lines = markdown(rows).splitlines()
    assert any(
        line.startswith("| swept | allocated layer by layer, 0.6 MB | 2–16 |") for line in lines
    )
    assert any("16-bit teacher" in line for line in lines)


def test_a_recovered_cell_that_also_has_its_tables_quantized_is_told_once(tmp_path: Path) -> None:
    found = collect(
        swept_run(tmp_path, head=True, embeddings=True, budgets_mb=[], models=["student"])
    )
    (row,) = [row for row in found if row["key"] == "hqq-2b-g64-embeddings-head-recovered"]
    assert row["technique"] == "hqq 2-bit g64, recovered (200 steps), embeddings and head too"
    assert "| hqq 2-bit g64, recovered (200 steps) |" in markdown(found)


def test_results_json_stays_small_and_strict(run: Store) -> None:
    build_report(run)
    raw = run.read_bytes("report/results.json")
    found = json.loads(raw, parse_constant=lambda name: pytest.fail(name))["rows"]
    assert len(raw) < 6000 * len(found)  # no sums of sequences, no answers per document
    assert all("per_sequence" not in row and "select" not in row for row in found)
    (row,) = [row for row in found if row["key"] == "hqq-4b-g64"]
    assert set(row["tasks"]["cloze"]) == {
        *("metric", "accuracy", "reference_accuracy", "right_to_wrong", "wrong_to_right"),
        *("mcnemar_p", "retention", "documents"),
    }
    assert row["kl_to_student_low"] < row["kl_to_student"] < row["kl_to_student_high"]


def test_cells_that_nobody_asks_for_any_more_are_left_out(tmp_path: Path) -> None:
    import yaml

    run = swept_run(tmp_path)
    spec = yaml.safe_load(run.read_text("spec.yaml"))
    spec["sweep"] |= {"budgets_mb": [0.5], "models": ["student"], "extra": [], "recover": None}
    run.write_text("spec.yaml", yaml.safe_dump(spec))
    keys = {row["key"] for row in collect(run)}
    assert {"allocated-0.5mb", "hqq-2b-g128", "hqq-2b-g64"} <= keys
    assert not keys & {"allocated-0.6mb", "hqq-3b-g128", "hqq-2b-g64-recovered", "extra-gptq-4b"}
    assert not any(key.startswith("teacher-") for key in keys)


def test_the_headline_is_of_the_students_plain_cells(rows: list[dict[str, Any]]) -> None:
    kept = [row["retention"] for row in rows if row["key"] in ("hqq-4b-g32", "hqq-4b-g64")]
    told = headline(rows)
    assert f"At 4 bits it keeps {min(kept):.1f}–{max(kept):.1f} % of its accuracy" in told
    assert "1 of 24 cells failed." in told
    alone = [row for row in rows if row["of"] == "teacher" or row["role"] == "teacher"]
    assert "At 4 bits the teacher keeps" in headline(alone)


def test_recovered_cells_are_not_in_the_headline_and_large_budgets_come_last(
    tmp_path: Path,
) -> None:
    found = collect(
        swept_run(
            tmp_path,
            bits=[4],
            group_size=[64],
            models=["student"],
            budgets_mb=[5, 700],
            recover={"steps": 9, "bits": [4]},
        )
    )
    cells = {row["key"]: row for row in found if row["role"] == "cell"}
    assert list(cells)[:2] == ["hqq-4b-g64", "hqq-4b-g64-recovered"]
    assert list(cells)[-2:] == ["allocated-700mb", "allocated-5mb"]
    kept = cells["hqq-4b-g64"]["retention"]
    assert kept != cells["hqq-4b-g64-recovered"]["retention"]
    assert f"At 4 bits it keeps {kept:.1f} % of its accuracy" in headline(found)


@pytest.mark.parametrize("width", [80, 110, 160])
def test_terminal_fits(rows: list[dict[str, Any]], width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(rows, width))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    assert ("2–16" in shown) == (width > 80)  # where space is scarce the true bits say it
    assert "allocated-0.6mb" in shown or "allocated layer" in shown


def test_every_section_is_there_and_balanced(text: str) -> None:
    assert [title for title in SECTIONS if f"<h2>{title}</h2>" not in text] == []
    checked = _Tags()
    checked.feed(text)
    assert checked.open == [] and not checked.fetched


class _Tags(HTMLParser):
    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe") or any(
            n in ("src", "href") for n, _ in attrs
        ):
            self.fetched.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_users_name_is_escaped(tmp_path: Path) -> None:
    run = swept_run(tmp_path)
    for path in (*run.glob("cells/*/result.json"), "evaluations/extra-gptq-4b.json"):
        result = run.read_json(path)
        result |= {"device_name": EVIL, "kernel": EVIL, "energy_note": EVIL, "technique": EVIL}
        if result.get("tasks"):
            result["tasks"] = {EVIL: {**result["tasks"]["cloze"], "metric": EVIL}}
        if result.get("layers"):
            result["layers"] = {**result["layers"], EVIL: {"bits": 2, "group_size": EVIL}}
        run.write_json(path, result)
    found = page(load_run(run))
    assert "<img" not in found and "&lt;img" in found


def test_recovery_is_told_with_its_reduction(text: str, run: Store) -> None:
    told = part(text, "Recovery")
    sums = [
        sum(run.read_json(f"cells/{key}/result.json")["per_sequence"]["kl_to_reference"])
        for key in ("hqq-2b-g64-recovered", "hqq-2b-g64")
    ]
    assert f"{100 * (1 - sums[0] / sums[1]):.0f} % [" in told and "hqq-2b-g64" in told
    assert "200" in told and "teacher" in told


def test_allocation_shows_the_layers_and_the_uniform_cells_of_its_size(text: str) -> None:
    told = part(text, "Allocation")
    assert "hqq-3b-g32 (0.525 MB)" in told and "lower" in told  # the next larger
    assert "hqq-3b-g64 (0.497 MB)" in told  # the next smaller
    table = text.split("<h2>Allocation</h2>")[1].split("</table>")[0]
    assert re.findall(r"<th>(\w+)</th>", table) == ["q_proj", "up_proj", "down_proj"]
    first = table.split("<tr><td>0</td>")[1].split("</tr>")[0]
    assert re.findall(r'"width (b\d+)">(\d+)', first) == [("b2", "2"), ("b3", "3"), ("b16", "16")]


def test_many_experts_share_a_column(tmp_path: Path) -> None:
    run = swept_run(tmp_path)
    path = "cells/allocated-0.6mb/result.json"
    layers: dict[str, Any] = {
        f"model.layers.{block}.mlp.experts.{expert}.up_proj": {
            "bits": 2 + 2 * (expert % 2),
            "group_size": 64,
        }
        for block in range(2)
        for expert in range(16)
    }
    layers["lm_head"] = None
    run.write_json(path, {**run.read_json(path), "layers": layers})
    table = page(load_run(run)).split("<h2>Allocation</h2>")[1].split("</table>")[0]
    assert table.count("2–4") == 2 and table.count("<th>") == 1 and "lm_head" in table


def test_tasks_show_flips_that_add_up(text: str, rows: list[dict[str, Any]]) -> None:
    told = part(text, "Tasks")
    assert "cloze" in told and "McNemar p" in told
    for row in rows:
        found = (row["tasks"] or {}).get("cloze", {})
        if "right_to_wrong" in found:
            gained = found["wrong_to_right"] - found["right_to_wrong"]
            assert found["accuracy"] - found["reference_accuracy"] == pytest.approx(gained / 200)
            assert f"{row['key']} {f.share(found['accuracy'])} acc" in told


def test_energy_that_cannot_be_measured_is_said(text: str) -> None:
    told = part(text, "In detail")
    assert "not measurable" in told and "no NVML and no RAPL here" in told
    assert f.energy({"energy_per_token_j": 0.123, "energy_note": "rapl"}) == "0.123 J"
    assert f.energy({"energy_per_token_j": None, "energy_note": None}) == f.NOTHING


def test_front_picture_marks_ties(text: str) -> None:
    told = text.split("<h2>Recommended</h2>")[1].split("</section>")[0]
    assert 'class="front"' in told and "tied with a smaller one" in told
    assert re.search(r'class="point cell b4 tied"><title>hqq-4b-g32', told)


def test_only_results_with_select_have_a_recommendation(tmp_path: Path) -> None:
    run = swept_run(tmp_path, extra=[], tasks=[], budgets_mb=[], recover=None, models=["student"])
    for path in (*run.glob("cells/*/result.json"), *run.glob("evaluations/*.json")):
        result = run.read_json(path)
        for name in ("select", "per_sequence", "model", "layers", "control_of", "device_name"):
            result.pop(name, None)
        run.write_json(path, result)
    found = page(load_run(run))
    assert "<h2>In detail</h2>" in found and "<h2>Accuracy against size</h2>" in found
    for title in set(SECTIONS) - {"In detail", "Tasks"}:
        assert f"<h2>{title}</h2>" not in found


def test_tracked_cells_keep_one_shape(run: Store) -> None:
    configs = [one.config for one in wandb_runs(load_run(run)) if one.job_type == "cell"]
    assert len(configs) == 25 and len({frozenset(config) for config in configs}) == 1
    assert not any(isinstance(value, dict | list) for one in configs for value in one.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.with_interval(0.0115, Interval(0.0115, 0.0104, 0.0126)), "0.0115 [0.0104, 0.0126]"),
        (f.with_interval(0.5, Interval(0.5, None, None)), "0.500"),
        (f.with_interval(None, None), f.NOTHING),
        (f.with_interval(98.25, Interval(98.25, 97.0, 99.0), 1, " %"), "98.2 % [97.0, 99.0]"),
        (f.reduced(Interval(0.42, 0.38, 0.46)), "42 % [38, 46]"),
        (f.reduced(Interval(0.042, 0.038, 0.046)), "4.2 % [3.8, 4.6]"),
        (f.change(-0.0012), "−0.12 pp"),
        (f.change(0.0012), "+0.12 pp"),
        (f.p_value(0.0004), "< 0.001"),
        (f.p_value(1.0), "1.000"),
    ],
)
def test_figures(text: str, expected: str) -> None:
    assert text == expected
