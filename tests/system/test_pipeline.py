"""The whole way on a tiny job, as a user runs it: real Ray, DeepSpeed, hqq and W&B client."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Attempt, Store, open_store, read_events
from jobs.tracking.wandb_runs import run_id
from tests.fixtures import small_job
from tests.fixtures.lm_eval_tasks import write_task
from tests.fixtures.ranks import ROOT

pytestmark = pytest.mark.timeout(900)

CELLS = [
    "allocated-0.034mb",
    "hqq-4b-g16",
    "hqq-4b-g16-recovered",
    "hqq-4b-g32",
    "hqq-4b-g32-recovered",
    "hqq-8b-g16",
    "hqq-8b-g32",
    "int8-dynamic-8b-channel",
    "teacher-hqq-4b-g32",
]
SWEEP = {
    "bits": [8, 4],
    "group_size": [16, 32],
    "methods": ["hqq", "int8-dynamic"],
    "models": ["teacher", "student"],
    "exclude": [
        {"model": "teacher", "bits": 8},
        {"model": "teacher", "group_size": 16},
    ],
    "budgets_mb": [0.034],
    "recover": {"steps": 4, "bits": [4]},
    "speed_prompt_tokens": 16,
    "speed_decode_tokens": 4,
}


@dataclass(frozen=True)
class Done:
    """A finished tiny job."""

    folder: Path
    spec: dict[str, Any]
    path: Path
    run: Store
    output: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return small_job.results(self.run)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A teacher by plain training without Ray, then the job on it: one launch of Ray Train."""
    folder = tmp_path_factory.mktemp("pipeline")
    teacher = small_job.write_spec(small_job.teacher_spec(folder), folder)
    command = [sys.executable, "-m", "trainer", str(teacher)]
    environment = small_job.environment(PYTHONPATH=str(ROOT))
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    task = write_task(folder / "task", [row["text"] for row in documents(folder)][:120])
    sweep = {**SWEEP, "tasks": [{"folder": str(task), "limit": 60}]}
    spec = small_job.job_spec(folder, tracking={"mode": "auto"}, sweep=sweep)
    path = small_job.write_spec(spec, folder)
    code, out, err = small_job.stillhouse("run", str(path), cwd=folder, WANDB_API_KEY="")
    assert code == 0, out + err
    return Done(folder, spec, path, small_job.run_store(spec), out)


def documents(folder: Path) -> list[dict[str, Any]]:
    """The made-up texts of the job."""
    lines = (folder / "texts" / "0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def cell_keys(done: Done) -> list[str]:
    """The cells of the run: those that were asked for, and controls of the allocated one."""
    return sorted(path.split("/")[1] for path in done.run.glob("cells/*/result.json"))


def by_role(rows: list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["role"] == role]


def test_every_model_has_its_row(done: Done) -> None:
    rows = done.rows
    assert [row["role"] for row in rows[:3]] == ["teacher", "student", "control"]
    keys = [row["key"] for row in by_role(rows, "cell")]
    assert sorted(keys) == cell_keys(done) and set(CELLS) <= set(keys)
    for key in set(keys) - set(CELLS):  # uniform ones of its size that the grid has not
        found = done.run.read_json(f"cells/{key}/result.json")
        assert found["control_of"] == ["allocated-0.034mb"], key
    for row in by_role(rows, "cell"):
        assert row["status"] == "done" and row["error"] is None
        for name in (
            "bits_per_weight",
            "bytes",
            "perplexity",
            "perplexity_ratio",
            "kl_to_teacher",
            "kl_to_teacher_low",
            "kl_to_teacher_high",
            "top1_agreement",
            "accuracy",
            "retention",
            "decode_tokens_per_s",
            "prefill_tokens_per_s",
            "quantize_s",
            "eval_s",
        ):
            assert math.isfinite(row[name]), name
        assert row["kernel"] and row["versions"]["hqq"]
        assert row["evaluated_with"] and row["resident_bytes"] > 0
    for row in by_role(rows, "cell"):
        (reference,) = by_role(rows, row["of"])
        assert row["retention"] == pytest.approx(100 * row["accuracy"] / reference["accuracy"])
        assert (row["kl_to_student"] is None) == (row["of"] == "teacher")


def test_eight_bits_are_nearer_to_the_student_than_four(done: Done) -> None:
    kl = {row["key"]: row["kl_to_student"] for row in by_role(done.rows, "cell")}
    assert kl["hqq-8b-g16"] < kl["hqq-4b-g16"] and kl["hqq-8b-g32"] < kl["hqq-4b-g32"]


def test_bytes_are_those_of_the_files(done: Done) -> None:
    for row in by_role(done.rows, "cell"):
        weights = done.run.size(f"cells/{row['key']}/model/quantized.safetensors")
        assert row["bytes"] <= weights <= row["bytes"] + 16384  # the file's header


def test_the_run_directory(done: Done) -> None:
    assert {"spec.yaml", "state", "events", "student", "control", "cells", "report"} <= set(
        done.run.list()
    )
    assert done.run.list("report") == ["index.html", "results.json", "table.md"]
    page = done.run.read_text("report/index.html")
    assert "<svg" in page and not re.search(r"(src|href)=[\"']https?:", page)


def test_losses_fall_and_are_recorded_once(done: Done) -> None:
    for stage in ("distill", "control"):
        steps = [e for e in read_events(done.run) if e["event"] == "step" and e["stage"] == stage]
        assert [event["step"] for event in steps] == list(range(1, 31))
        assert steps[-1]["loss"] < steps[0]["loss"]
        assert steps[-1]["loader_wait_ms"] >= 0


def test_students_are_trained_by_the_workers_that_captured(done: Done) -> None:
    events = read_events(done.run)
    assert [event["stage"] for event in events if event["event"] == "launch"] == ["capture"]
    captured = next(event for event in events if event["event"] == "capture_start")
    trained = [event["pids"] for event in events if event["event"] == "training_start"]
    assert trained == [captured["pids"]] * 2


def test_the_control_starts_from_the_same_student_and_reads_the_same_data(done: Done) -> None:
    first = {
        e["stage"]: e
        for e in read_events(done.run)
        if e["event"] == "step" and e["step"] == 1 and e["stage"] in ("distill", "control")
    }
    assert first["distill"]["ce"] == pytest.approx(first["control"]["ce"], rel=1e-6)
    assert first["distill"]["tokens"] == first["control"]["tokens"]


LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    AutoTokenizer.from_pretrained(folder)
    found[folder] = sorted(kind for kind, names in info.items() if names)
assert not [name for name in sys.modules if name.split(".")[0] in ("jobs", "trainer", "quant")]
print(json.dumps(found))
"""


def test_the_student_loads_where_nobody_knows_stillhouse(done: Done, tmp_path: Path) -> None:
    folders = [str(done.run.local(role)) for role in ("student", "control")]
    out = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, *folders],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(out.splitlines()[-1]) == dict.fromkeys(folders, [])


def test_chatter_goes_to_the_log(done: Done) -> None:
    assert "log: " in done.output and "RayTrainWorker" not in done.output
    log = done.run.local("logs/0001.log")
    assert log is not None and "RayTrainWorker" in log.read_text()


def test_wandb_has_one_run_per_training_stage_and_cell(done: Done) -> None:
    stages = ["capture", "distill", "control", "report"]
    cells = cell_keys(done)
    ids = {run_id(done.run.url, "job", key): key for key in [*stages, *cells]}
    folders = {path.name.rpartition("-")[2]: path for path in done.folder.glob("wandb/offline-*")}
    assert set(folders) == set(ids) and len(folders) == len(ids)
    runs = {ids[name]: inspect(folder, "--summary") for name, folder in folders.items()}
    for name in ("distill", "control"):
        assert runs[name]["config"]["losses"], name
        assert runs[name]["summary"]["select_perplexity"] > 1
        folder = folders[run_id(done.run.url, "job", name)]
        assert [row["_step"] for row in history(folder)] == list(range(1, 31))
    assert len({frozenset(runs[key]["config"]) for key in cells}) == 1, "flat, of one shape"
    for row in by_role(done.rows, "cell"):
        run = runs[row["key"]]
        for name in ("bits", "group_size", "method", "kernel"):
            assert run["config"][name] == row[name]
        assert run["summary"]["perplexity"] == pytest.approx(row["perplexity"])


def leet(folder: Path, *options: str) -> str:
    """An offline run as `wandb leet inspect` prints it."""
    (file,) = folder.glob("run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inspect(folder: Path, *options: str) -> dict[str, Any]:
    return json.loads(leet(folder, *options))


def history(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in leet(folder).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_again_everything_is_skipped_and_ray_stays_off(done: Done) -> None:
    attempts = Attempt.latest(done.run)
    code, out, err = small_job.stillhouse("run", str(done.path), cwd=done.folder)
    assert code == 0, err
    for stage in ("prepare", "capture", "distill", "sweep", "summarize"):
        assert f"{stage}: done before, skipped" in out
    assert "hqq 4-bit g32" in out
    assert Attempt.latest(done.run) == attempts


def test_a_changed_input_of_a_finished_stage_is_refused(done: Done) -> None:
    code, _, err = small_job.stillhouse(
        "run", str(done.path), "distill.learning_rate=0.001", cwd=done.folder
    )
    assert code == 2
    assert err.splitlines() == [
        "error: distill.learning_rate: 0.003 -> 0.001 (an input of the stage distill, which is "
        "done; run with --redo distill, or give the run another name)"
    ]


def test_a_longer_training_of_a_finished_student_is_refused(done: Done) -> None:
    """Also though the cache could grow for it: a finished student is never replaced unasked."""
    code, _, err = small_job.stillhouse("run", str(done.path), "distill.steps=40", cwd=done.folder)
    assert code == 2
    assert "error: distill.steps: 30 -> 40 (an input of the stage distill" in err


def test_edited_data_is_refused(done: Done) -> None:
    text = done.folder / "texts" / "0.jsonl"
    before = text.read_text()
    text.write_text(before + '{"text": "one more document"}\n')
    try:
        code, _, err = small_job.stillhouse("run", str(done.path), cwd=done.folder)
    finally:
        text.write_text(before)
    assert code == 2
    assert all("prepare" in line and "--redo prepare" in line for line in err.splitlines()), err


def test_recovery_is_chosen_on_select_and_never_worse_there(done: Done) -> None:
    for size in (16, 32):
        plain = done.run.read_json(f"cells/hqq-4b-g{size}/result.json")
        found = done.run.read_json(f"cells/hqq-4b-g{size}-recovered/result.json")
        assert plain["recovered"] is None and found["recovered"]["steps"] == 4
        assert found["recovered"]["target"] == "teacher" and found["bytes"] == plain["bytes"]
        assert found["select"]["kl_to_teacher"] <= plain["select"]["kl_to_teacher"] + 1e-9


def test_the_allocated_cell_is_within_its_budget_and_was_chosen_on_select(done: Done) -> None:
    found = done.run.read_json("cells/allocated-0.034mb/result.json")
    decision = done.run.read_json("allocations/allocated-0.034mb.json")
    assert found["bytes"] == decision["bytes"] <= 34_000 and found["budget_mb"] == 0.034
    assert found["select"]["kl_to_student"] == pytest.approx(decision["select_kl"], rel=1e-9)
    assert decision["select_kl"] == min(tried["select_kl"] for tried in decision["tried"])
    controls = [f"hqq-{bits}b-g{size}" for bits, size in decision["controls"]]
    sizes = [done.run.read_json(f"cells/{key}/result.json")["bytes"] for key in controls]
    assert any(size >= found["bytes"] for size in sizes)


def test_flips_add_up_with_accuracies(done: Done) -> None:
    """The task needs no network: it is made of the job's own texts."""
    references = {
        role: done.run.read_json(f"evaluations/{role}.json") for role in ("student", "teacher")
    }
    for key in cell_keys(done):
        found = done.run.read_json(f"cells/{key}/result.json")
        task, own = found["tasks"]["heldout"], references[found["model"]]["tasks"]["heldout"]
        assert task["documents"] == own["documents"] == 60
        assert task["reference_accuracy"] == own["accuracy"]
        flips = task["wrong_to_right"] - task["right_to_wrong"]
        assert task["accuracy"] - own["accuracy"] == pytest.approx(flips / 60, abs=1e-12)
        right = [a > b for a, b in zip(task["correct"], own["correct"], strict=True)]
        assert sum(right) == task["wrong_to_right"]


def test_references_are_gone_when_the_sweep_is_done(done: Done) -> None:
    assert "references" not in done.run.list()


def test_a_cell_is_recommended_and_can_be_exported(done: Done, tmp_path: Path) -> None:
    code, out, err = small_job.stillhouse(
        "report", str(done.run.local()), "--max-mb", "0.04", cwd=tmp_path
    )
    assert code == 0, err
    (command,) = [line for line in out.splitlines() if line.startswith("stillhouse export")]
    code, out, err = small_job.stillhouse(*shlex.split(command)[1:], cwd=tmp_path)
    assert code == 0, out + err
    code, out, err = small_job.stillhouse(
        "report", str(done.run.local()), "--max-mb", "0.001", cwd=tmp_path
    )
    assert code == 2 and "the nearest is" in err


def test_a_new_bit_width_and_an_extra_model_run_alone(done: Done, tmp_path: Path) -> None:
    keys = cell_keys(done)
    before = {key: done.run.read_text(f"cells/{key}/result.json") for key in keys}
    student = str(done.run.local("student"))
    other = str(tmp_path / "other")
    code, out, err = small_job.stillhouse(
        "quantize", student, "--bits", "3", "--group-size", "32", "--out", other, cwd=tmp_path
    )
    assert code == 0, out + err
    # Its own bits and layers are those of an earlier decision: an allocated cell is decided anew.
    code, out, err = small_job.stillhouse(
        "run",
        str(done.path),
        "sweep.bits=[8,4,3]",
        "sweep.budgets_mb=[]",
        f"sweep.extra=[{{path: {other}}}]",
        cwd=done.folder,
        WANDB_API_KEY="",
    )
    assert code == 0, out + err
    assert "distill: done before, skipped" in out
    started = {
        e["key"] for e in read_events(done.run) if e["event"] == "cell_start" and e["attempt"] == 2
    }
    assert started == {"hqq-3b-g16", "hqq-3b-g32", "teacher-hqq-3b-g32"}
    assert before == {key: done.run.read_text(f"cells/{key}/result.json") for key in keys}
    (extra,) = by_role(done.rows, "extra")
    same = next(row for row in done.rows if row["key"] == "hqq-3b-g32")
    assert extra["status"] == "done" and extra["technique"] == "quantized elsewhere (hqq-3b-g32)"
    assert extra["kl_to_student"] == pytest.approx(same["kl_to_student"], rel=1e-6)
    assert extra["accuracy"] == same["accuracy"] and extra["parameters"] == same["parameters"]


def test_a_plain_folder_is_swept_by_one_command_and_a_failing_cell_is_a_result(
    done: Done, tmp_path: Path
) -> None:
    """No teacher, no training. Of weights of 4 in a spread of 1e-3 an 8-bit zero point is beyond
    float16, a 1-bit one is not."""
    model = tmp_path / "model"
    make_extreme_model(Path(str(done.run.local("student"))), model)
    command = ["quantize", str(model), "--bits", "8,1", "--group-size", "32"]
    settings = ["data.report_sequences=8", "data.select_sequences=8", "tracking.mode=disabled"]
    recover = "sweep.recover={steps: 2, bits: [1]}"
    texts = ["--data", str(done.folder / "texts" / "*.jsonl"), "--name", "alone"]
    code, out, err = small_job.stillhouse(*command, *settings, recover, *texts, cwd=tmp_path)
    assert code == 0, out + err
    assert "hqq 1-bit g32, recovered (2 steps)" in out and "1 failed" in out
    run = open_store(tmp_path / "runs" / "alone")
    rows = {row["key"]: row for row in small_job.results(run) if row["key"]}
    assert rows["hqq-1b-g32"]["status"] == rows["hqq-1b-g32-recovered"]["status"] == "done"
    recovered = run.read_json("cells/hqq-1b-g32-recovered/result.json")["recovered"]
    assert recovered["target"] == "student"
    failed = rows["hqq-8b-g32"]
    assert failed["status"] == "failed" and failed["perplexity"] is None
    assert "zero" in failed["error"], failed["error"]


def make_extreme_model(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.copy_(4 + 1e-3 * torch.rand(weight.shape))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def test_no_process_of_ray_is_left(done: Done) -> None:
    mine = str(os.getpid())
    out = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    left = [line for line in out.splitlines() if "gcs_server" in line and line.split()[0] == mine]
    assert left == []


def test_the_cache_is_whole_and_says_what_the_teacher_says(done: Done) -> None:
    code, out, err = small_job.stillhouse(
        "cache", "verify", str(done.path), "--json", cwd=done.folder
    )
    told = json.loads(out)
    assert code == 0 and told["ok"], err
    assert {kind["kind"] for kind in told["kinds"]} == {"train", "eval"}
    code, out, err = small_job.stillhouse(
        "cache", "info", str(done.path), "--json", cwd=done.folder
    )
    told = json.loads(out)
    assert code == 0 and told["used_by"] == ["job"], err
    assert all(item["present"] == item["wanted"] > 0 for item in told["coverage"])
