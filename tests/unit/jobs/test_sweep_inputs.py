"""What makes a finished sweep, and each finished cell of it, run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import open_store
from jobs import inputs as stage_inputs
from jobs.inputs import EVALUATION, Inputs, StageInputs
from jobs.rundir import RunDir, StageRecord
from jobs.schema import spec_of
from jobs.stages import sweep as stage
from jobs.stages.sweep import cell_fingerprint
from jobs.todo import is_current
from quant.spec import QuantSpec, SweepSpec
from tests import tiny
from tests.material import save_model
from trainer.corpus.tokenizer import train_tokenizer
from trainer.fingerprint import fingerprint
from trainer.job import resolve

OUTPUTS: dict[str, dict[str, Any]] = {
    "prepare": {"corpus": "one"},
    "capture": {"cache": "two"},
    "distill": {"student": "three"},
}
CELL = QuantSpec(4, 32)


def of_cell(**sweep: Any) -> str:
    return cell_fingerprint(CELL, SweepSpec(**sweep), {}, OUTPUTS)


def test_what_stays_in_16_bits_is_part_of_a_cell() -> None:
    before = {  # all that a cell depended on when the key did not exist
        "evaluation": EVALUATION,
        "cell": CELL.to_dict(),
        "model": "three",
        "corpus": "one",
        "cache": "two",
        "batch_sequences": 8,
    }
    assert of_cell() == of_cell(bits=[4], keep_16bit=[]) == fingerprint(before)
    some = of_cell(keep_16bit=["*.down_proj", "lm_head"])
    assert some == of_cell(keep_16bit=["lm_head", "*.down_proj", "lm_head"])
    assert len({of_cell(), some, of_cell(keep_16bit=["lm_head"])}) == 3


def test_another_way_to_evaluate_makes_every_cell_again(monkeypatch: Any) -> None:
    now = of_cell()
    monkeypatch.setattr(stage, "EVALUATION", EVALUATION - 1)
    assert of_cell() != now


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Those of the tiny job."""
    folder = tmp_path_factory.mktemp("sweep")
    train_tokenizer(iter(["some words of a text " * 50]), 270, folder / "tokenizer")
    save_model(folder / "runs" / "teacher" / "student", folder / "tokenizer", width=64)
    (folder / "texts").mkdir()
    (folder / "texts" / "0.jsonl").write_text('{"text": "some words"}\n')
    return Inputs(resolve(spec_of(tiny.job_spec(folder))))


def test_a_finished_sweep_of_an_older_evaluation_is_not_skipped(
    inputs: Inputs, tmp_path: Path, monkeypatch: Any
) -> None:
    run = RunDir(open_store(str(tmp_path)).sub("job"))
    run.claim()

    def now() -> StageInputs:
        return inputs.of("sweep", OUTPUTS)

    def record() -> StageRecord:
        found = run.record("sweep")
        assert found is not None
        return found

    with monkeypatch.context() as older:
        older.setattr(stage_inputs, "EVALUATION", EVALUATION - 1)
        then = now()
    assert then.fixed == now().fixed == {}, "made again, not refused"
    run.finish("sweep", {"fixed": then.fixed, "growing": then.growing}, {"failed": []}, 0.0)
    assert not is_current(record(), now())
    run.finish("sweep", {"fixed": {}, "growing": now().growing}, {"failed": []}, 0.0)
    assert is_current(record(), now())
