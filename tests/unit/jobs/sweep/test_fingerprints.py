"""What makes a finished sweep, and each finished cell of it, run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import open_store
from jobs.pipeline.skip import is_current
from jobs.run.directory import RunDir, StageRecord
from jobs.run.inputs import ResolvedJob, StageInputs
from jobs.spec.load import spec_of
from jobs.spec.resolve import absolute_paths
from jobs.stages import sweep
from jobs.sweep import fingerprints
from jobs.sweep.fingerprints import EVALUATION, cell_fingerprint, task_identity
from quant.grid import Cell, uniform
from quant.quant_spec import QuantSpec
from quant.spec import Task
from tests.fixtures import small_job
from tests.fixtures.corpora import save_model
from trainer.corpus.tokenizer import train_tokenizer
from trainer.resolve_auto import resolve

OUTPUTS: dict[str, dict[str, Any]] = {
    "prepare": {"corpus": "one"},
    "capture": {"cache": "two"},
    "distill": {"student": "three"},
}
CELL = uniform(QuantSpec(4, 32))
BASE = {
    "name": "job",
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "data": {"train": [{"source": "builtin:python-docs"}]},
}


def of_cell(cell: Cell = CELL, **sweep: Any) -> str:
    return cell_fingerprint(cell, spec_of({**BASE, "sweep": sweep}), "three", OUTPUTS)


def test_a_cell_depends_on_itself_and_on_how_it_is_measured() -> None:
    assert of_cell() == of_cell(bits=[4], keep_16bit=[], keep_models="none", budgets_mb=[1])
    some = of_cell(keep_16bit=["*.down_proj", "lm_head"])
    assert some == of_cell(keep_16bit=["lm_head", "*.down_proj", "lm_head"])
    changed = [
        of_cell(),
        some,
        of_cell(keep_16bit=["lm_head"]),
        of_cell(batch_sequences=4),
        of_cell(tasks=["arc_easy"]),
        of_cell(tasks=[{"task": "arc_easy", "limit": 3}]),
        of_cell(uniform(QuantSpec(4, 32), "teacher")),
        of_cell(uniform(QuantSpec(4, 64))),
    ]
    assert len(set(changed)) == len(changed)


def test_only_recovered_cells_depend_on_how_they_are_recovered() -> None:
    few, many = {"steps": 3, "bits": [4]}, {"steps": 4, "bits": [4]}
    assert of_cell(recover=few) == of_cell(recover=many) == of_cell()
    cell = uniform(QuantSpec(4, 32), recovered=True)
    assert len({of_cell(cell, recover=few), of_cell(cell, recover=many), of_cell()}) == 3
    wider = {**few, "bits": [4, 2]}
    assert of_cell(cell, recover=few) == of_cell(cell, recover=wider)


def test_only_recovered_cells_depend_on_the_train_part_of_the_corpus() -> None:
    recover = {"steps": 3, "bits": [4]}

    def made(corpus: str, cell: Cell) -> str:
        outputs = {**OUTPUTS, "prepare": {"corpus": corpus, "held_out": "one"}}
        spec = spec_of({**BASE, "sweep": {"recover": recover}})
        return cell_fingerprint(cell, spec, "three", outputs)

    assert made("larger", CELL) == made("one", CELL) == of_cell(recover=recover)
    recovered = uniform(QuantSpec(4, 32), recovered=True)
    assert (
        made("larger", recovered) != made("one", recovered) == of_cell(recovered, recover=recover)
    )


def test_another_way_to_evaluate_makes_every_cell_again(monkeypatch: Any) -> None:
    now = of_cell()
    monkeypatch.setattr(fingerprints, "EVALUATION", EVALUATION - 1)
    assert of_cell() != now


def test_a_task_is_its_content_wherever_it_lies(tmp_path: Path) -> None:
    for name, text in (("a", "task: x"), ("b", "task: x"), ("c", "task: y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.yaml").write_text(text)
    a, b, c = (task_identity(Task(folder=str(tmp_path / name))) for name in "abc")
    assert a == b != c


def test_what_a_sweep_is_given_is_named_absolutely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "Other Model").mkdir()
    monkeypatch.chdir(tmp_path)
    sweep = {"extra": [{"path": "Other Model"}], "tasks": [{"folder": "task"}, "arc_easy"]}
    found = absolute_paths(spec_of({**BASE, "sweep": sweep})).sweep
    assert found is not None
    assert [(item.path, item.label) for item in found.extra] == [
        (str(tmp_path / "Other Model"), "other-model")
    ]
    assert [task.folder for task in found.tasks] == [str(tmp_path / "task"), None]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ResolvedJob:
    """The tiny one."""
    folder = tmp_path_factory.mktemp("sweep")
    train_tokenizer(iter(["some words of a text " * 50]), 270, folder / "tokenizer")
    save_model(folder / "runs" / "teacher" / "student", folder / "tokenizer", width=64)
    (folder / "texts").mkdir()
    (folder / "texts" / "0.jsonl").write_text('{"text": "some words"}\n')
    return ResolvedJob.of(resolve(spec_of(small_job.job_spec(folder))))


def test_a_finished_sweep_of_an_older_evaluation_is_not_skipped(
    job: ResolvedJob, tmp_path: Path, monkeypatch: Any
) -> None:
    run = RunDir(open_store(str(tmp_path)).sub("job"))
    run.claim()

    def now() -> StageInputs:
        return sweep.inputs(job, OUTPUTS)

    def record() -> StageRecord:
        found = run.record("sweep")
        assert found is not None
        return found

    with monkeypatch.context() as older:
        older.setattr(fingerprints, "EVALUATION", EVALUATION - 1)
        then = now()
    assert then.fixed == now().fixed == {}, "made again, not refused"
    run.finish("sweep", {"fixed": then.fixed, "growing": then.growing}, {"failed": []}, 0.0)
    assert not is_current(record(), now())
    run.finish("sweep", {"fixed": {}, "growing": now().growing}, {"failed": []}, 0.0)
    assert is_current(record(), now())
