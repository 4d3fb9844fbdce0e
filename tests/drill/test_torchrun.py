"""The trainer by itself under torchrun, as a machine without Ray would run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.storage import Store, open_store, read_events
from tests.fixtures.corpora import (
    LENGTH,
    VOCAB,
    config_values,
    make_corpus,
    save_model,
    write_texts,
)
from tests.fixtures.ranks import ROOT

STEPS = 250


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    """A whole job with a teacher and a control, and sections that are not the trainer's."""
    root = tmp_path_factory.mktemp("torchrun")
    texts = write_texts(root / "texts")
    data = {
        "train": [{"source": texts}],
        "select_sequences": 7,
        "report_sequences": 9,
        "sequence_length": LENGTH,
    }
    from trainer.spec.sections import DataSpec

    corpus = make_corpus(open_store(root).sub("corpus"), DataSpec(**data))
    teacher = save_model(root / "teacher", corpus.tokenizer_folder(), kind="llama", width=48)
    values: dict[str, Any] = {
        "name": "small",
        "storage": str(root / "runs"),
        "teacher": {"model": str(teacher), "dtype": "float32", "sharding": "none"},
        "student": {"init": "random", "config": config_values("llama")},
        "data": data,
        "cache": {"method": "topk", "k": 8},
        "distill": {
            "dtype": "float32",
            "steps": STEPS,
            "tokens_per_step": 8 * LENGTH,
            "micro_batch": 4,
            "checkpoint_steps": 100,
            "control": True,
        },
        "sweep": {"bits": [8, 4], "group_size": [32]},
        "resources": {"max_failures": 1},
        "tracking": {"mode": "disabled"},
    }
    path = root / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def launch(*arguments: str, ranks: int = 2) -> subprocess.Popen[str]:
    """torchrun on the CPU, away from the checkout; or one process without it."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *(start if ranks > 1 else []), "-m", "trainer", *arguments],
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_of(spec: Path) -> Any:
    return open_store(spec.parent / "runs" / "small")


@pytest.fixture(scope="module")
def interrupted(spec) -> tuple[str, str]:
    """Output of a launch that is told to stop while it trains."""
    return stopped(launch(str(spec)), run_of(spec))


def stopped(process: subprocess.Popen[str], store: Store) -> tuple[str, str]:
    """Output of a launch that is told to stop once it trains."""
    deadline = time.monotonic() + 400
    while not any(event["event"] == "step" for event in read_events(store)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=400)


@pytest.fixture(scope="module")
def finished(spec, interrupted) -> tuple[str, str]:
    """Output of the same command again."""
    process = launch(str(spec))
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    return out, error


def test_a_stop_leaves_a_checkpoint(spec, interrupted) -> None:
    out, error = interrupted
    assert "interrupted: distill stopped after step" in error, error
    events = read_events(run_of(spec))
    first = [event for event in events if event["attempt"] == 1]
    assert first[-1]["event"] == "run_end" and first[-1]["status"] == "interrupted"
    assert "capture: 2" in out and "sequences added" in out
    steps = [event["step"] for event in first if event["event"] == "step"]
    checkpoints = [event["step"] for event in first if event["event"] == "checkpoint"]
    assert checkpoints[-1] == steps[-1] < STEPS


def test_the_same_command_goes_on_where_it_stopped(spec, finished) -> None:
    out, _ = finished
    store = run_of(spec)
    events = read_events(store)
    resume = next(event for event in events if event["event"] == "resume")
    assert f"continues from the checkpoint of step {resume['step']}" in out
    for stage in ("distill", "control"):
        steps = [e["step"] for e in events if e["event"] == "step" and e["stage"] == stage]
        assert steps == list(range(1, STEPS + 1))
        assert f"{stage}: done, perplexity on select" in out
        assert f"{stage}: {STEPS}/{STEPS}  loss" in out
    assert events[-1]["event"] == "run_end" and events[-1]["status"] == "done"
    # What the second launch found was not captured again.
    assert [e["metrics"]["sequences"] > 0 for e in events if e["event"] == "capture_done"] == [
        True, False,
    ]  # fmt: skip


def test_the_models_are_there(spec, finished) -> None:
    import torch

    from trainer.models.load import load_model

    for role in ("student", "control"):
        model = load_model(run_of(spec).fetch_folder(role), torch.float32)
        assert model.config.vocab_size == VOCAB


def test_the_pipeline_finds_everything_where_torchrun_left_it(spec, finished, monkeypatch) -> None:
    """`stillhouse run` of the same spec has nothing to prepare, to capture, or to train."""
    from cluster.storage.keys import fingerprint
    from jobs.run.inputs import ResolvedJob
    from jobs.spec.load import load_spec
    from jobs.stages import distill
    from trainer.corpus.corpus import is_complete, open_corpus
    from trainer.resolve_auto import resolve
    from trainer.tasks import make_capture, make_trainings
    from trainer.teacher.job import missing

    job = resolve(load_spec(str(spec), []))
    resolved = ResolvedJob.of(job)
    root, run = open_store(job.storage), open_store(job.storage).sub(job.name)
    outputs = {
        "prepare": {"corpus": fingerprint(resolved.names.corpus)},
        "capture": {"cache": fingerprint(resolved.names.cache)},
    }
    corpus = root.sub("_corpora", outputs["prepare"]["corpus"])
    cache = root.sub("_logits", outputs["capture"]["cache"])
    assert root.list("_corpora") == [corpus.name] and root.list("_logits") == [cache.name]
    assert is_complete(corpus)
    capture = make_capture(job, corpus, cache, batch_tokens=64, shard_seconds=1)
    assert not any(numbers for _, _, numbers in missing(capture, open_corpus(corpus)))
    trainings = make_trainings(job, distill.inputs(resolved, outputs).fixed, run, corpus, cache)
    assert [training.stage for training in trainings] == ["distill", "control"]
    for training in trainings:
        assert training.checkpoints.read_json("done/metrics.json")["steps"] == STEPS
    assert len(run.list("checkpoints")) == 2


def test_an_online_training_goes_on_with_fewer_ranks(spec) -> None:
    """The teacher beside the student, nothing captured of train, and one rank after two."""
    changes = [
        "name=online", "distill.mode=online", "distill.losses={jsd: 1, hidden: 0.1}",
        "distill.temperature=3", "distill.control=false", "distill.evaluate_steps=60",
        "distill.steps=120",
    ]  # fmt: skip
    store = open_store(spec.parent / "runs" / "online")
    out, error = stopped(launch(str(spec), *changes), store)
    assert "interrupted: distill stopped after step" in error, error
    process = launch(str(spec), *changes, ranks=1)
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert "which 2 ranks saved and 1 go on with" in out
    assert "distill: step 60, perplexity on select" in out
    events = read_events(store)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 121))
    assert steps[-1]["jsd"] < steps[0]["jsd"] and steps[-1]["hidden"] < steps[0]["hidden"]
    (captured, *_) = [e["metrics"]["sequences"] for e in events if e["event"] == "capture_done"]
    assert captured <= 16  # of select and report alone


def test_a_wrong_spec_is_one_line_and_exit_code_2(spec) -> None:
    """One process, without torchrun; faults of keys, of rules, and of what is not there."""
    for override, line in (
        ("distill.stepz=3", "error: distill.stepz: unknown key"),
        ("distill.tokens_per_step=33", "error: distill.tokens_per_step: got 33; may be a multiple"),
        ("distill.temperature=4", "error: distill.temperature: got 4.0; may be one of"),
        ("distill.losses={hidden: 1}", "error: distill.losses.hidden: got distill.mode: cached"),
    ):
        from trainer.__main__ import load

        with pytest.raises(ValueError) as found:
            load(str(spec), [override])
        assert line.removeprefix("error: ") in str(found.value)
        assert "\n" not in str(found.value)
    process = launch(str(spec), "teacher.model=/no/such/folder", "name=other", ranks=1)
    _, error = process.communicate(timeout=400)
    assert process.returncode == 2
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "teacher.model: '/no/such/folder' is no folder" in lines[0]
    assert "Traceback" not in error
