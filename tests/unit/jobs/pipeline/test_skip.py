"""Which stages are skipped: a cache that has lost records is captured again, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import open_store
from jobs.errors import SpecErrors
from jobs.pipeline.skip import StageSelection
from jobs.run.directory import RunDir
from jobs.run.inputs import ResolvedJob
from jobs.spec.job import JobSpec
from jobs.spec.load import spec_of
from jobs.stages import STAGES
from jobs.stages.capture import count_lacking
from tests.fixtures import small_job
from tests.fixtures.corpora import save_model, write_texts
from trainer.corpus.corpus import open_corpus
from trainer.corpus.prepare import prepare
from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import encode
from trainer.logits.records import Draws, Records, coding_of
from trainer.logits.store import open_cache, publish_codebook, write_shard
from trainer.resolve_auto import resolve
from trainer.stage_inputs import training_folders
from trainer.tasks import make_capture
from trainer.teacher.job import wanted


class Run:
    """A run on disk whose corpus and cache are made; its stages are finished one by one."""

    def __init__(self, folder: Path, **cache: Any) -> None:
        write_texts(folder / "texts", documents=400)
        texts = (folder / "texts" / "0.jsonl").read_text().splitlines()
        train_tokenizer(iter(texts), 400, folder / "tokenizer")
        save_model(folder / "runs" / "teacher" / "student", folder / "tokenizer", width=64)
        self.values = small_job.job_spec(folder, cache={"method": "sample", "draws": 5, **cache})
        self.spec = self.load()
        self.job = ResolvedJob.of(self.spec)
        self.store = open_store(self.spec.storage)
        self.done: dict[str, dict[str, Any]] = {}
        self.dir = RunDir(self.store.sub("job"))
        self.dir.claim()

    def load(self, **changes: Any) -> JobSpec:
        return resolve(spec_of({**self.values, **changes}))

    def finish(self, stage: str, **outputs: Any) -> None:
        """Records a stage as done."""
        found = STAGES[stage].inputs(self.job, self.done)
        self.dir.finish(stage, found.values(), outputs, 0.0)
        self.done[stage] = outputs

    def fill(self) -> None:
        """Makes the corpus, and random records of everything."""
        name = self.corpus = self.store.sub("_corpora", "one")
        assert self.spec.data is not None
        prepare(
            self.spec.data,
            load_tokenizer(self.job.names.tokenizer_folder),
            name,
            identity=self.job.names.corpus,
        )
        self.finish("prepare", corpus="one")
        self.cache = open_cache(self.store.sub("_logits"), self.job.names.cache)
        corpus = open_corpus(name)
        job = make_capture(self.spec, name, self.cache, batch_tokens=64, shard_seconds=1)
        draw = np.random.default_rng(0)
        for kind, part, numbers in wanted(job, corpus):
            coding = coding_of(self.spec.cache, int(corpus.manifest["vocab_size"]), kind)
            length = self.spec.data.sequence_length
            item: Records | Draws = Draws(
                np.sort(draw.integers(400, size=(length, 5)), 1).astype("i4")
            )
            if kind == "eval":
                ids = np.tile(np.arange(coding.k), (length, 1))
                flat, one = np.full(ids.shape, -6.0, "f4"), np.zeros(length, "f4")
                item = Records(ids, flat, one[:, None] - 1, one + 5, one - 6)
            codebook = publish_codebook(self.cache, kind, fit_codebook(coding, [item]))
            blob = encode(item, codebook)
            for some in np.array_split(numbers, 2):
                keys = [part.keys[number].tobytes() for number in some]
                write_shard(self.cache, kind, keys, [blob] * len(keys))
        self.finish("capture", cache=self.cache.name)

    def lose(self, kind: str) -> None:
        """Drops one shard, as a repair does."""
        name = next(n for n in self.cache.list("shards") if n.startswith(f"{kind}-"))
        for end in (".idx", ".bin"):
            self.cache.delete(f"shards/{name[:-4]}{end}")

    def count(self, *kinds: str) -> int:
        """Sequences that a capture of everything holds of these kinds."""
        job = make_capture(self.spec, self.corpus, self.cache, batch_tokens=64, shard_seconds=1)
        found = wanted(job, open_corpus(self.corpus))
        return sum(len(numbers) for kind, _, numbers in found if kind in kinds)

    def plan(self, **options: Any) -> StageSelection:
        asked = {"until": None, "only": None, "redo": None, **options}
        spec = asked.pop("spec", self.spec)
        return StageSelection(
            ResolvedJob.of(spec), self.dir, asked["until"], asked["only"], asked["redo"]
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("to_run"))
    made.fill()
    return made


def test_a_whole_cache_is_not_captured_again(run: Run) -> None:
    plan = run.plan()
    assert plan.skipped == ["prepare", "capture"]
    assert plan.to_run == ["distill", "sweep", "summarize"]
    assert set(plan.outputs) == {"prepare", "capture"}


def test_a_changed_training_that_is_unfinished_is_refused(tmp_path: Path) -> None:
    """Before anything starts, unless training anew is asked for."""
    run = Run(tmp_path)
    run.fill()
    found = STAGES["distill"].inputs(run.job, run.done).fixed
    store = run.dir.store.sub("checkpoints", training_folders(run.spec, found)["distill"])
    store.write_json("00000002-0001-abc.json", {})
    store.write_json("inputs.json", found)
    assert "distill" in run.plan().to_run
    other = run.load(distill={**run.values["distill"], "learning_rate": 0.5})
    with pytest.raises(SpecErrors, match="unfinished at step 2; put it back") as error:
        run.plan(spec=other)
    assert str(error.value).count("learning_rate") == 1 and "--redo distill" in str(error.value)
    for stage in ("prepare", "distill"):
        assert "distill" in run.plan(spec=other, redo=stage).to_run
    assert run.plan(spec=other, until="capture").to_run == []


def test_more_sets_of_draws_are_captured(run: Run) -> None:
    """They are further records of the same cache; the run itself is not another one."""
    more = run.load(cache={**run.values["cache"], "redraws": 2})
    assert ResolvedJob.of(more).names.cache == run.job.names.cache
    plan = run.plan(spec=more)
    assert plan.to_run == ["capture", "distill", "sweep", "summarize"]
    assert "capture" not in plan.forced  # its inputs have grown


def test_other_draws_are_another_cache(run: Run) -> None:
    other = run.load(cache={**run.values["cache"], "draws": 6})
    with pytest.raises(SpecErrors, match="cache.draws: 5 -> 6 .an input of the stage capture"):
        run.plan(spec=other)


def test_a_cache_that_lost_records_is_captured_again(tmp_path: Path) -> None:
    """After a repair dropped a damaged shard, training ended in a sequence that was not there."""
    run = Run(tmp_path)
    run.fill()
    for kind in ("train", "eval"):
        run.lose(kind)
        plan = run.plan()
        assert plan.skipped == ["prepare"]
        assert plan.to_run == ["capture", "distill", "sweep", "summarize"]
        assert "capture" in plan.forced and set(plan.outputs) == {"prepare"}
    with pytest.raises(
        SpecErrors, match=r"lacks \d+ records that it had; run with --until distill"
    ):
        run.plan(only="distill")
    # With the student trained, only what comes after it reads the cache.
    run.finish("distill", student="abc")
    plan = run.plan()
    assert plan.skipped == ["prepare", "distill"]
    assert plan.to_run == ["capture", "sweep", "summarize"]
    assert plan.forced == {None, "capture"} and set(plan.outputs) == {"prepare", "distill"}
    run.finish("sweep")
    run.finish("summarize")
    assert run.plan().to_run == []


def test_after_training_only_records_for_evaluation_are_missed(tmp_path: Path) -> None:
    """A new bit width after the cache was removed needs no record that training reads."""
    run = Run(tmp_path)
    run.fill()
    run.finish("distill", student="abc")
    run.lose("train")
    assert run.plan().skipped == ["prepare", "capture", "distill"]
    assert run.spec.distill is not None
    other = run.load(distill={**run.values["distill"], "control": not run.spec.distill.control})
    assert run.plan(spec=other).to_run == ["capture", "distill", "sweep", "summarize"]
    run.finish("sweep")
    run.finish("summarize")
    run.cache.delete("", recursive=True)
    assert run.plan().to_run == []
    more = run.load(sweep={**run.values["sweep"], "bits": [2]})
    plan = run.plan(spec=more)
    assert plan.skipped == ["prepare", "distill"]
    assert plan.to_run == ["capture", "sweep", "summarize"]
    with pytest.raises(SpecErrors, match=f"lacks {run.count('eval')} records that it had"):
        run.plan(spec=more, only="sweep")
    assert count_lacking(run.job, {**run.done, **plan.outputs}) == run.count("eval")
    del run.done["distill"]
    assert count_lacking(run.job, run.done) == run.count("train", "eval")
    # A run that was stopped while it added them goes on with them, not with all.
    run.dir.forget("capture")
    again = run.plan(spec=more)
    assert (again.skipped, again.to_run) == (plan.skipped, plan.to_run)
    assert again.outputs == plan.outputs
    # Whoever asks for a capture alone gets all of it, for trainings to come.
    assert run.plan(until="capture").outputs.keys() == {"prepare"}


def test_a_damaged_index_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fill()
    name = next(n for n in run.cache.list("shards") if n.endswith(".idx"))
    data = run.cache.read_bytes(f"shards/{name}")
    run.cache.write_bytes(f"shards/{name}", data[:-3])
    with pytest.raises(ValueError, match="stillhouse cache repair") as found:
        run.plan()
    assert "\n" not in str(found.value) and name in str(found.value)


@pytest.mark.parametrize(("steps", "prepared"), [(20, False), (30, False), (31, True)])
def test_a_corpus_is_prepared_again_where_it_lacks_what_is_read(
    run: Run, steps: int, prepared: bool
) -> None:
    spec = run.load(distill={**run.values["distill"], "steps": steps})
    plan = run.plan(spec=spec, until="capture")
    assert ("prepare" in plan.to_run) is prepared
    assert ("capture" in plan.to_run) is (steps != 30)


def test_a_corpus_of_a_version_that_prepared_everything_has_what_is_read(run: Run) -> None:
    inputs = STAGES["prepare"].inputs(run.job, {})
    assert inputs.at_least and "at_least" in inputs.values()
    assert inputs.met_by({"fixed": inputs.fixed, "growing": {}})
    assert not inputs.met_by({"fixed": {**inputs.fixed, "seed": 1}, "growing": {}})
