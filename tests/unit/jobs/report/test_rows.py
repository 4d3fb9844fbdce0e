"""How the report names and orders the cells of every method, and what it says of their kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.storage import Store, open_store
from jobs.report.build import build_report
from jobs.report.charts import size_picture
from jobs.report.formats import headline
from jobs.report.rows import collect, compare
from jobs.report.run_data import load_run
from jobs.report.table import markdown, remarks, terminal
from jobs.tracking.wandb_runs import wandb_runs
from quant.evaluation.cell import failed_cell
from quant.grid import grid
from quant.spec import SweepSpec

FAST, SLOW = "int4pack", "dequantize+matmul"
GRID: dict[str, Any] = {
    "bits": [4, 8],
    "group_size": ["channel", 64, 128],
    "methods": ["rtn", "int8-dynamic", "hqq"],
}


def swept(root: Path, name: str = "swept", **changes: Any) -> Store:
    """A run directory with the results of a sweep without training."""
    run, sweep = open_store(root / name), {**GRID, **changes}
    spec = {"name": name, "teacher": None, "distill": None, "student": {"model": "some/model"}}
    run.write_text("spec.yaml", yaml.safe_dump({**spec, "sweep": sweep}))
    student = {"name": "some/model", "parameters": 1000, "bytes": 2000, "accuracy": 0.5}
    run.write_json("evaluations/student.json", {**student, "resident_bytes": 2100})
    for index, cell in enumerate(grid(SweepSpec.model_validate(sweep))):
        result = failed_cell(cell, "") | {"status": "done", "error": None}
        result |= {
            "bytes": 1000 + index,
            "bits_per_weight": 8.0,
            "accuracy": 0.4,
            "retention": 80.0 + index,
            "decode_tokens_per_s": 50.0,
            "resident_bytes": 1234,
            "kernel_kl": 0.00012,
            "kernel": FAST if cell.spec.group_size == 64 and cell.spec.bits == 4 else SLOW,
            "evaluated_with": "dequantized weights in bfloat16",
        }
        run.write_json(f"cells/{cell.key}/result.json", result)
    return run


def test_what_was_kept_in_16_bits_is_told(tmp_path: Path) -> None:
    plain, kept = swept(tmp_path, "plain"), swept(tmp_path, "kept")
    for path in kept.glob("cells/*/result.json"):
        kept.write_json(path, kept.read_json(path) | {"keep_16bit": ["*.experts*", "*.gate"]})
    assert not any("16 bits" in line for line in remarks(collect(plain)))
    assert remarks(collect(kept))[0] == "Kept in 16 bits in all cells: *.experts*, *.gate."
    both = remarks([*collect(plain), *collect(kept)])
    assert both[0] == "Kept in 16 bits in all cells of kept: *.experts*, *.gate."


def cells(run: Store) -> list[dict[str, Any]]:
    return [row for row in collect(run) if row["role"] == "cell"]


def drawn(rows: list[dict[str, Any]], width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(rows, width))
    return console.export_text()


def test_cells_are_in_the_order_of_bits_methods_and_groups_the_channel_last(tmp_path: Path) -> None:
    assert [row["technique"] for row in cells(swept(tmp_path))] == [
        "hqq 8-bit g64",
        "hqq 8-bit g128",
        "hqq 8-bit per channel",
        "rtn 8-bit g64",
        "rtn 8-bit g128",
        "rtn 8-bit per channel",
        "int8-dynamic per channel",
        "hqq 4-bit g64",
        "hqq 4-bit g128",
        "hqq 4-bit per channel",
        "rtn 4-bit g64",
        "rtn 4-bit g128",
        "rtn 4-bit per channel",
    ]


def test_results_json_holds_what_a_cell_is(tmp_path: Path) -> None:
    run = swept(tmp_path, bits=[4], group_size=["channel"], methods=["rtn"], head=True)
    build_report(run)
    row = json.loads(run.read_bytes("report/results.json"))["rows"][-1]
    expected = {
        "key": "rtn-4b-channel-head",
        "bits": 4,
        "group_size": "channel",
        "method": "rtn",
        "embeddings": False,
        "head": True,
        "resident_bytes": 1234,
        "kernel": SLOW,
        "evaluated_with": "dequantized weights in bfloat16",
    }
    assert {key: row[key] for key in expected} == expected


def test_tracked_configs_are_flat_and_of_one_shape(tmp_path: Path) -> None:
    configs = [
        one.config for one in wandb_runs(load_run(swept(tmp_path))) if one.job_type == "cell"
    ]
    assert len(configs) == 13 and len({frozenset(config) for config in configs}) == 1
    assert not any(isinstance(value, dict | list) for one in configs for value in one.values())
    assert {config["group_size"] for config in configs} == {64, 128, "channel"}
    assert {config["method"] for config in configs} == {"hqq", "rtn", "int8-dynamic"}


def test_what_all_cells_share_is_told_once_and_what_differs_in_the_row(tmp_path: Path) -> None:
    small: dict[str, Any] = {"bits": [4], "group_size": [64], "methods": ["hqq"]}
    both = swept(tmp_path, "both", **small, embeddings=True, head=True)
    text = markdown(collect(both))
    assert "| hqq 4-bit g64 |" in text
    assert "\nAll cells: embeddings and head quantized too.\n" in text
    none = swept(tmp_path, "none", **small)
    assert "quantized too" not in markdown(collect(none))
    text = markdown(compare([both, none]))
    assert "| hqq 4-bit g64, embeddings and head too |" in text and "| hqq 4-bit g64 |" in text
    assert "All cells" not in text


def test_the_kernels_of_the_speeds_are_named(tmp_path: Path) -> None:
    rows = collect(swept(tmp_path))
    line = f"Kernels of the cells' speeds: {FAST} (hqq-4b-g64, rtn-4b-g64); {SLOW} (all others)."
    assert remarks(rows) == [line]
    assert line in markdown(rows)
    same = [row for row in rows if row["kernel"] == FAST]
    assert remarks(same) == [f"Kernel of the cells' speeds: {FAST}."]
    for row in rows:
        row["decode_tokens_per_s"] = None
    assert remarks(rows) == []


def test_the_dtype_of_the_baseline_is_named(tmp_path: Path) -> None:
    rows = collect(swept(tmp_path, bits=[4], methods=["hqq"]))
    cells = [row for row in rows if row["role"] == "cell"]
    for row in cells:
        row["baseline_dtype"] = "float32"
    line = remarks(rows)[-1]
    assert "the student in float32" in line and line in markdown(rows)
    cells[0]["of"], cells[0]["baseline_dtype"] = "teacher", "bfloat16"
    assert "the teacher in bfloat16, the student in float32" in remarks(rows)[-1]
    for row in cells:
        row["decode_tokens_per_s"] = None
    assert not [line for line in remarks(rows) if "float" in line]


def test_a_cell_without_a_speed_is_not_among_all_others(tmp_path: Path) -> None:
    rows = collect(swept(tmp_path, bits=[4], methods=["hqq"]))
    rows[-1]["kernel"] = rows[-1]["decode_tokens_per_s"] = None
    assert remarks(rows) == [
        f"Kernels of the cells' speeds: {FAST} (hqq-4b-g64); {SLOW} (hqq-4b-g128)."
    ]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_terminal_names_the_method_and_true_bits_of_every_cell(tmp_path: Path, width: int) -> None:
    rows = collect(swept(tmp_path, embeddings=True, head=True))
    text = drawn(rows, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    if width == 80:  # one name per line, none folded
        names = [line.split()[0] for line in text.splitlines() if " 8.00 " in line]
        assert names[:3] == ["hqq-8b-g64", "hqq-8b-g128", "hqq-8b-channel"]
        assert "int8-dynamic" in names and len(names) == 13
    assert text.count("8.00") == 13
    assert "All cells: embeddings and head quantized too." in text and FAST in text


def test_the_headline_is_about_one_method(tmp_path: Path) -> None:
    rows = collect(swept(tmp_path))
    kept = [row["retention"] for row in rows if row["key"].startswith("hqq-4b")]
    told = f"At 4 bits (hqq) it keeps {min(kept):.1f}–{max(kept):.1f} % of its accuracy"
    assert told in headline(rows)
    alone = [row for row in rows if row["method"] in (None, "rtn")]
    assert "At 4 bits it keeps" in headline(alone)


def test_picture_and_page_tell_the_cells_apart(tmp_path: Path) -> None:
    run = swept(tmp_path)
    build_report(run)
    picture = size_picture(collect(run))
    for label in (">4-bit g64<", ">rtn 4-bit g64<", ">4-bit channel<", ">int8-dynamic<"):
        assert label in picture, label
    page = run.read_text("report/index.html")
    assert (
        "In memory" in page and "KL of kernel" in page and "0.00210 MB" in page
    )  # the student's own
    assert "evaluated with dequantized weights in bfloat16" in page
    assert FAST in page and SLOW in page
