"""prepare of answers: what it gives decides whether the stages after it follow; no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import open_store
from jobs.pipeline.pipeline import _run_stage
from jobs.pipeline.skip import StageSelection
from jobs.run.context import Context
from jobs.run.directory import RunDir
from jobs.run.inputs import ResolvedJob
from jobs.spec.load import spec_of
from jobs.stages import distill
from tests.fixtures import small_job
from tests.fixtures.corpora import save_model
from trainer.corpus.corpus import is_complete
from trainer.corpus.prepare import serial
from trainer.corpus.tokenizer import train_tokenizer
from trainer.resolve_auto import resolve
from trainer.responses.make import open_answers
from trainer.responses.prompts import read_prompts
from trainer.responses.store import Answer, AnswerStore
from trainer.stage_inputs import find_corpus


class Quiet:
    """Takes every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Server:
    """Answers with as many words as prompts have, other ones if told so; counts what it answers."""

    def __init__(self) -> None:
        self.word, self.answered = "so", 0

    def collect(self, spec: Any, answers: AnswerStore, hooks: Any) -> dict[str, Any]:
        prompts = read_prompts(spec.data)
        self.answered += len(prompts)
        made = [
            Answer(p.answer_key(0), p.source, 0, p.value, f" {self.word} {p.value}", 9, "stop")
            for p in prompts
        ]
        answers.publish(made, 1, 0)
        return {"counts": {"prompts": len(prompts), "failed": 0}}


class Run:
    """A run whose student learns answers of a server."""

    def __init__(self, folder: Path) -> None:
        prompts = folder / "prompts.jsonl"
        rows = [{"prompt": f"number {n} of many words " * 4} for n in range(200)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = small_job.teacher_spec(folder, 10)
        values["data"]["train"] = [{"source": str(prompts), "format": "prompt_completion"}]
        values["distill"] |= {"mode": "responses", "losses": {"ce": 1.0}}
        train_tokenizer((row["prompt"] for row in rows), 300, folder / "tokenizer")
        save_model(folder / "student", folder / "tokenizer", width=64)
        values |= {"tokenizer": None, "student": {"model": str(folder / "student")}}
        values["responses"] = {"from": {"endpoint": "http://x.example/v1", "model": "m"}}
        self.spec = resolve(spec_of(values))
        self.job = ResolvedJob.of(self.spec)
        self.root = open_store(self.spec.storage)
        self.dir = RunDir(self.root.sub("run"))
        self.dir.claim()
        quiet: Any = Quiet()
        self.context = Context(self.dir, self.job, {}, quiet, quiet, quiet, quiet, quiet)

    def prepare(self, forced: bool = False) -> str:
        """The name of the corpus that the stage gives."""
        self.context.outputs.clear()
        _run_stage("prepare", self.context, Path("log"), forced)
        return str(self.context.outputs["prepare"]["corpus"])

    def distilled(self) -> None:
        """Records the training as done."""
        fixed = distill.inputs(self.job, self.context.outputs)
        values = {"fixed": fixed.fixed, "growing": fixed.growing}
        self.dir.finish("distill", values, {"student": "x"}, 0.0)

    def plan(self) -> StageSelection:
        return StageSelection(ResolvedJob.of(self.spec), self.dir, None, None, None)


def test_other_answers_are_another_corpus_and_the_stages_after_it_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.setattr("trainer.responses.make.collect", server.collect)
    monkeypatch.setattr("jobs.stages.prepare._Tasks", lambda context: serial)
    run = Run(tmp_path)
    names = run.job.names
    assert find_corpus(names, run.root) is None
    first = run.prepare()
    run.distilled()
    assert run.plan().skipped == ["prepare", "distill"]

    assert run.prepare(forced=True) == first and server.answered == 200
    assert run.plan().skipped == ["prepare", "distill"]  # nothing has changed

    answers = open_answers(run.root, names.responses).store
    answers.delete("", recursive=True)
    server.word = "but"
    second = run.prepare(forced=True)
    assert second != first and server.answered == 400
    assert is_complete(run.root.sub("_corpora", first))  # of other runs
    asked = find_corpus(names, run.root)
    assert asked is not None and asked.items() > names.corpus.items()
    plan = run.plan()  # not refused, though an input of a stage that was done has changed
    assert plan.skipped == ["prepare"] and plan.to_run[0] == "distill"
    run.distilled()
    assert run.plan().skipped == ["prepare", "distill"]
