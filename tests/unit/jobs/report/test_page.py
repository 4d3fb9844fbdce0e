"""The report over a small real run directory: rows, tables, the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.storage import Attempt, EventWriter, Fenced, Store, open_store
from jobs.report import formats as f
from jobs.report.build import build_report, show
from jobs.report.charts import pareto_front
from jobs.report.page import HELD_OUT, page
from jobs.report.rows import collect, compare, cost, technique
from jobs.report.run_data import curve, evaluations, load_run, training_metrics
from jobs.report.svg import Box, log_ticks, place_labels, ticks
from jobs.report.table import markdown, terminal

EVIL = '<script>alert("x")</script>'
ERROR = "ValueError: group_size 64 does not divide 96 of <down_proj>\nTraceback:\n  line 3"
SPEC: dict[str, Any] = {
    "name": "small-run",
    "seed": 17,
    "teacher": {"model": "big", "dtype": "bfloat16"},
    "student": {"model": None, "config": {"model_type": "llama"}, "init": "random"},
    "data": {"train": [{"source": EVIL}], "sequence_length": 64},
    "distill": {"losses": {"forward_kl": 0.9, "ce": 0.1}, "steps": 30, "control": True},
    "sweep": {"bits": [4, 8], "group_size": [64, 32]},
}
MODELS = {  # role: name, weights, bytes, accuracy, retention, decode speed
    "teacher": (f"big {EVIL}", 4_000_000, 8_000_000, 0.40, None, 100.0),
    "student": ("tiny", 400_000, 800_000, 0.36, 90.0, 400.0),
    "control": ("tiny", 400_000, 800_000, 0.34, 85.0, 401.0),
}
CELLS = {  # (bits, group size): bytes, accuracy, retention, speed-up; None: failed
    (4, 64): None,
    (4, 32): (300_000, 0.342, 95.0, 2.36),
    (8, 64): (470_000, 0.36, 100.0, 0.41),
    (8, 32): (480_000, 0.36, 100.0, 0.04),
}


def small_run(root: Path, name: str = "small-run") -> Store:
    run = open_store(root / name)
    spec = {**SPEC, "name": name}
    run.write_text("spec.yaml", yaml.safe_dump(spec))
    with EventWriter(run, Attempt.claim(run).number) as events:
        events.emit("run_start", name=name, spec=spec)
        for stage in ("distill", "control"):
            for step in range(1, 31):
                parts = {"forward_kl": 3 / step, "ce": 5.0} if stage == "distill" else {}
                events.emit("step", stage=stage, step=step, steps=30, loss=5 + 3 / step, **parts)
            events.emit("training_done", stage=stage, metrics={"select_ce": 4.5, "seconds": 7.0})
        hours = {"device_hours": 0.5, "device": "gpu"}
        events.emit("stage_done", stage="distill", seconds=1800.0, metrics=hours)
        events.emit("stage_done", stage="sweep", seconds=60.0, metrics={})
        events.emit("run_end", status="done")
    for role, (model, weights, size, accuracy, kept, speed) in MODELS.items():
        run.write_json(
            f"evaluations/{role}.json",
            {
                "role": role,
                "name": model,
                "parameters": weights,
                "bytes": size,
                "accuracy": accuracy,
                "perplexity": 98.76,
                "kl_to_teacher": None if role == "teacher" else 0.25,
                "retention": kept,
                "decode_tokens_per_s": speed,
                "versions": {"torch": "2.13.0"},
            },
        )
    for (bits, group), found in CELLS.items():
        result: dict[str, Any] = {
            "spec": {"bits": bits, "group_size": group, "method": "hqq"},
            "status": "failed",
            "error": ERROR,
            "bytes": None,
        }
        if found:
            size, accuracy, kept, speedup = found
            result |= {
                "status": "done",
                "error": None,
                "bytes": size,
                "bits_per_weight": 8 * size / 400_000,
                "accuracy": accuracy,
                "retention": kept,
                "perplexity": 1234.5,
                "kl_to_student": 0.0123,
                "kl_to_teacher": 0.2622,
                "decode_tokens_per_s": 400 * speedup,
                "speedup": speedup,
                "kernel": "int4",
                "quantize_s": 1.5,
            }
        run.write_json(f"cells/hqq-{bits}b-g{group}/result.json", result)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return small_run(tmp_path)


def test_rows_are_models_then_cells_by_falling_bits_then_group_size(run: Store) -> None:
    rows = collect(run)
    assert [row["key"] for row in rows] == [
        *("teacher", "student", "control"),
        *("hqq-8b-g32", "hqq-8b-g64", "hqq-4b-g32", "hqq-4b-g64"),
    ]
    assert {row["role"] for row in rows[3:]} == {"cell"}
    student, cell = rows[1], rows[5]
    assert student["technique"] == "distilled (forward_kl 0.9 + ce 0.1)"
    assert (student["bits"], student["bits_per_weight"]) == (16, 16.0)
    assert (cell["model"], cell["technique"]) == ("tiny", "hqq 4-bit g32")
    assert (cell["bits_per_weight"], cell["kl_to_student"], cell["kernel"]) == (6.0, 0.0123, "int4")
    assert {frozenset(row) - {"spec"} for row in rows} == {frozenset(rows[0])}


def test_failed_cell_is_a_row_with_its_error(run: Store) -> None:
    failed = collect(run)[-1]
    assert (failed["status"], failed["error"], failed["accuracy"]) == ("failed", ERROR, None)


def test_results_json_is_strict_and_in_its_public_format(run: Store) -> None:
    run.write_bytes("cells/hqq-2b-g64/result.json", b'{"status": "done", "perplexity": NaN}')
    rows = build_report(run)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(run.read_bytes("report/results.json"), parse_constant=refuse)
    assert found == {"format": 1, "rows": rows}
    assert found["rows"][-1]["perplexity"] is None


def test_report_of_a_superseded_attempt_is_not_published(run: Store) -> None:
    old = Attempt(run, Attempt.latest(run))
    build_report(old)
    Attempt.claim(run)
    with pytest.raises(Fenced):
        build_report(old)


def test_same_run_directory_gives_the_same_bytes(run: Store) -> None:
    build_report(run)
    first = [run.read_bytes(f"report/{name}") for name in run.list("report")]
    build_report(run)
    assert first == [run.read_bytes(f"report/{name}") for name in run.list("report")]


def test_markdown_table(run: Store) -> None:
    text = markdown(collect(run), "Cost: nothing")
    lines = text.splitlines()
    assert lines[0] == (
        "| Model | Technique | Bits | True bpw | Size | Accuracy | Retention | Perplexity "
        "| Decode speed | Speed-up |"
    )
    assert (
        "| tiny | hqq 8-bit g64 | 8 | 9.40 | 0.470 MB | 36.0 % | 100.0 % | 1,234 | 164 tok/s "
        "| 0.4x |" in lines
    )
    assert "| tiny | hqq 4-bit g64 | 4 | – | – | failed | – | – | – | – |" in lines
    assert (
        "hqq-4b-g64 failed: ValueError: group_size 64 does not divide 96 of &lt;down_proj>" in text
    )
    assert "<script>" not in text
    assert {line.count("|") for line in lines if line.startswith("|")} == {11}
    assert lines[-1] == "Cost: nothing"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_terminal_table_never_cuts_a_number(run: Store, width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(collect(run), width, "Cost: nothing"))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in ("0.470 MB", "100.0 %", "0.04x", "1,234", "failed", "9.40", "36.0 %"):
        assert re.search(rf"(^|\s){re.escape(number)}(\s|$)", text, re.M), number
    assert "group_size 64" in text


def test_terminal_table_in_a_tiny_terminal_drops_columns_instead_of_cutting(run: Store) -> None:
    console = Console(width=40, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(collect(run), 40))
    text = console.export_text()
    assert "0.470 MB" in text and "36.0 %" in text and "hqq-8b-g64" in text
    assert "Perplexity" not in text


def test_several_runs_get_a_run_column(tmp_path: Path) -> None:
    rows = compare([small_run(tmp_path, "one"), small_run(tmp_path, "two")])
    assert [row["run"] for row in rows] == ["one"] * 7 + ["two"] * 7
    lines = markdown(rows).splitlines()
    assert lines[0].startswith("| Run | Model |")
    assert "two hqq-4b-g64 failed: ValueError" in markdown(rows)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show([open_store(tmp_path / "one"), open_store(tmp_path / "two")], 100))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100 and "0.470 MB" in text
    assert "one: Cost: 0.50 GPU hours" in text and "two: Cost: 0.50 GPU hours" in text


class _Page(HTMLParser):
    """Collects what a browser would fetch or run, the texts, and unclosed elements."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(run: Store) -> tuple[str, _Page]:
    build_report(run)
    text = run.read_text("report/index.html")
    page = _Page()
    page.feed(text)
    return text, page


def test_page_is_self_contained_and_escapes_what_users_wrote(run: Store) -> None:
    text, page = _page(run)
    assert not page.open and not page.fetched
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert EVIL in page.text  # as text, in the model's name and in the spec
    assert len(text) < 300_000


def test_page_shows_every_part(run: Store) -> None:
    text, page = _page(run)
    assert "The student keeps 90.0 % of the teacher's accuracy at 0.800 MB" in page.text
    assert "At 4 bits it keeps 95.0 % of its accuracy at 0.300 MB, 2.7 times smaller." in page.text
    assert "1 of 4 cells failed" in page.text
    for part in ("Accuracy against size", "Training", "In detail", "Failures", "Cost", "Spec"):
        assert f"<h2>{part}</h2>" in text
    assert "Traceback:" in page.text and "0.50 GPU hours" in page.text
    assert text.count('class="wide"') == text.count('class="narrow"') == 4  # 1 + 3 loss curves
    wide = text.split('<svg class="wide"')[1].split("</svg>")[0]
    assert len(re.findall(r'<g class="point', wide)) == 6  # all models but the failed cell


def test_page_of_a_run_that_only_began(tmp_path: Path) -> None:
    run = open_store(tmp_path / "young")
    with EventWriter(run, 1) as events:
        events.emit("run_start", name="young", spec={"name": "young"})
        events.emit("stage_failed", stage="capture", error="RuntimeError: out of memory")
        events.emit("run_end", status="failed")
    assert build_report(run) == []
    text, page = _page(run)
    assert "No results yet." in page.text and "stage capture" in page.text
    assert '<span class="bad">failed</span>' in text
    assert markdown([]).startswith("| Model |")


def test_no_run_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run here"):
        collect(open_store(tmp_path / "nothing"))


def test_plain_quantization_without_teacher_and_training(tmp_path: Path) -> None:
    run = open_store(tmp_path / "q")
    run.write_text("spec.yaml", yaml.safe_dump({"name": "q", "teacher": None, "distill": None}))
    run.write_json("evaluations/student.json", {"name": "m", "accuracy": 0.5, "bytes": 10**9})
    row = build_report(run)[0]
    assert row["technique"] == "as given (not trained here)"
    assert "1,000 MB" in run.read_text("report/table.md")


def test_a_stage_redone_with_fewer_steps_leaves_no_old_steps(tmp_path: Path) -> None:
    run = open_store(tmp_path / "redone")
    for attempt, steps in ((1, 9), (2, 4)):
        with EventWriter(run, attempt) as events:
            for step in range(1, steps + 1):
                events.emit("step", stage="distill", step=step, steps=steps, loss=float(attempt))
    assert [(e["step"], e["loss"]) for e in curve(load_run(run), "distill")] == [
        (step, 2.0) for step in (1, 2, 3, 4)
    ]


def test_cost_adds_attempts_and_names_the_devices(run: Store) -> None:
    with EventWriter(run, 2) as events:
        events.emit(
            "stage_done",
            stage="distill",
            seconds=1800.0,
            metrics={"device_hours": 0.25, "device": "gpu"},
        )
    distill, sweep = cost(load_run(run))
    assert (distill.seconds, distill.hours, distill.device) == (3600.0, 0.75, "gpu")
    assert (sweep.stage, sweep.hours) == ("sweep", None)
    line = f.cost_line([distill, sweep])
    assert line == (
        "Cost: 0.75 GPU hours; wall time 1 h 01 min (distill 1 h 00 min, sweep 1 min 00 s)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.size(840_000), "0.840 MB"),
        (f.size(16_381_516_800), "16,382 MB"),
        (f.factor(0.4), "0.4x"),
        (f.factor(0.04), "0.04x"),
        (f.factor(12.34), "12.3x"),
        (f.factor(0.0), "0.0x"),
        (f.speed(4.21), "4.2 tok/s"),
        (f.speed(1234.5), "1,234 tok/s"),
        (f.share(None), "–"),
        (f.share(float("nan")), "–"),
        (f.plain(0.000123), "0.000123"),
        (f.plain(9.999), "10.0"),
        (f.plain(0), "0"),
        (f.count(3_660_000), "3.66 M"),
        (f.duration(59.96), "60 s"),
        (f.duration(3725), "1 h 02 min"),
        (f.device_time(0.02, "cpu"), "1.2 CPU core minutes"),
        (f.first_line("\n  a: b \nc"), "a: b"),
        (f.first_line(None), "no error text"),
    ],
)
def test_figures(text: str, expected: str) -> None:
    assert text == expected


def test_pareto_front_against_brute_force(run: Store) -> None:
    rows = [row for row in collect(run) if row["status"] == "done"]

    def beaten(row: dict[str, Any]) -> bool:
        return any(
            other["bytes"] <= row["bytes"]
            and other["accuracy"] >= row["accuracy"]
            and (other["bytes"], other["accuracy"]) != (row["bytes"], row["accuracy"])
            for other in rows
        )

    assert [row["key"] for row in pareto_front(rows)] == [
        row["key"] for row in sorted(rows, key=lambda row: row["bytes"]) if not beaten(row)
    ]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(13.2, 29.9) == [15.0, 20.0, 25.0]
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert log_ticks(0.13, 12.0) == [0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    for low, high in ((0.7, 0.9), (3, 40_000), (150, 151)):
        assert all(low <= tick <= high for tick in [*ticks(low, high), *log_ticks(low, high)])


def test_labels_of_points_close_together_do_not_overlap() -> None:
    frame = Box(0, 0, 400, 300)
    points = [(200.0 + 3 * i, 150.0 + 2 * i, f"4-bit g{i}") for i in range(6)]
    boxes = []
    for label in place_labels(points, frame):
        width = 6.6 * len(label.text)
        left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
        boxes.append(Box(left, label.y - 10, left + width, label.y + 2))
    assert all(a.overlap(b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(frame.left <= box.left and box.right <= frame.right for box in boxes)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"distill": {"losses": {"forward_kl": 1.0}}}, "distilled (forward_kl)"),
        (
            {
                "distill": {
                    "mode": "online",
                    "losses": {"jsd": {"weight": 0.5, "beta": 0.3}, "ce": 1},
                }
            },
            "distilled online (ce 1 + jsd (beta 0.3) 0.5)",
        ),
        (
            {
                "distill": {
                    "losses": {
                        "forward_kl": {"weight": {"start": 1.0, "end": 0.25, "until": 0.5}},
                        "hidden": {"weight": 0.1, "layers": "auto", "metric": "mse"},
                        "ce": 0,
                    }
                }
            },
            "distilled (forward_kl 1 to 0.25 + hidden (mse) 0.1)",
        ),
        (
            {
                "student": {"init": "slice", "layers": 4, "lora": {"r": 8, "alpha": 16}},
                "distill": {"losses": {"skew_kl": {"weight": 1, "alpha": 0.1}}},
            },
            "distilled (skew_kl (alpha 0.1)), slice of 4 of the teacher's layers, LoRA r 8",
        ),
        (
            {"distill": {"mode": "responses", "losses": {"ce": 1.0}}},
            "cross-entropy from answers",
        ),
        (
            {"distill": {"mode": "responses", "losses": {"ce": 0.5, "forward_kl": 0.5}}},
            "distilled from answers (ce 0.5 + forward_kl 0.5)",
        ),
    ],
)
def test_how_a_student_came_to_be(spec: dict[str, Any], words: str) -> None:
    assert technique(spec, "student") == words
    ending = ", LoRA r 8" if "lora" in spec.get("student", {}) else "(control)"
    assert technique(spec, "control").startswith("cross-entropy only (control)")
    assert technique(spec, "control").endswith(ending)


def test_evaluations_are_curves_and_the_newest_training_alone_has_them(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    with EventWriter(run, Attempt.claim(run).number) as events:
        for stage in ("distill", "control"):
            for step, value in ((10, 5.0), (20, 9.9), (20, 4.0), (30, 3.5), (70, 1.0)):
                more = {"select_forward_kl": value / 10} if stage == "distill" else {}
                events.emit("evaluation", stage=stage, step=step, select_ce=value, **more)
            events.emit("checkpoint", stage=stage, step=10, seconds=2.0, upload_seconds=8.0)
            events.emit("checkpoint", stage=stage, step=20, seconds=4.0, upload_seconds=10.0)
    data = load_run(run)
    # What is evaluated twice was replayed; step 70 was of a training with more steps.
    assert [(e["step"], e["select_ce"]) for e in evaluations(data, "distill")] == [
        (10, 5.0), (20, 4.0), (30, 3.5),
    ]  # fmt: skip
    found = training_metrics(data, "distill")
    assert (found["checkpoint_seconds"], found["checkpoint_upload_seconds"]) == (3.0, 9.0)
    text = page(data)
    assert "Cross-entropy on select" in text and "KL to the teacher on select" in text
    ce, kl = (text.split(f"<h3>{title}</h3>")[1].split("</svg>")[0] for title in HELD_OUT.values())
    assert "control" in ce.split("</div>")[0] and "control" not in kl.split("</div>")[0]


def test_an_evaluation_at_the_end_alone_is_no_curve(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    with EventWriter(run, Attempt.claim(run).number) as events:
        events.emit("evaluation", stage="distill", step=30, select_ce=4.0)
    assert "Cross-entropy on select" not in page(load_run(run))
