"""Answers on real process groups: whoever generates them, they are the same, and can be learnt."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import (
    WORDS,
    data_spec,
    load_plain,
    make_corpus,
    save_model,
    write_texts,
)
from tests.fixtures.ranks import Log, Ranks, spawn, start
from tests.fixtures.waiting import until

NEW = 12
ENDS = list(range(0, 320, 8))
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Generation settings by name.
HOW = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "samples": 2, "seed": 7},
    "nucleus": {"temperature": 1.0, "top_p": 0.6, "seed": 7},
    "other-seed": {"temperature": 1.0, "top_p": 0.6, "seed": 8},
}


# What runs on the ranks.


def answer_all(jobs: list[tuple[Any, int | None]]) -> list[dict[str, Any]]:
    """Runs each job, with a stop asked for at question so-and-so (None: no stop)."""
    from trainer.responses import job as module
    from trainer.run_task import run_task
    from trainer.worker import Stopped

    worker = start()
    told = []
    for job, stop_at in jobs:
        log = Log(stop_at)
        module.MAX_SHARDED_PARAMETERS = 10_000 if "too-large" in job.store.url else 8_000_000_000
        result: dict[str, Any] = {"events": log.events}
        try:
            result["facts"] = run_task(job, replace(worker, hooks=log.hooks()))
        except (Stopped, ValueError) as error:
            result["error"] = f"{type(error).__name__}: {error}"
        told.append(result)
    return told


def partly(job: Any, pieces: Path) -> None:
    """Runs a job that stands still once something is published, to be killed there."""
    from trainer.run_task import run_task
    from trainer.worker import Hooks

    def pause() -> bool:
        if len(list(pieces.glob("*.jsonl"))) >= 3:
            time.sleep(600)
        return False

    run_task(job, replace(start(), hooks=Hooks(stop_requested=pause, attempt=1)))


def learn(capture: Any, training: Any) -> list[Any]:
    """Captures the teacher, then trains."""
    from trainer.run_task import run_task

    log = Log()
    worker = replace(start(), hooks=log.hooks())
    metrics = run_task(capture, worker)
    run_task(training, worker)
    return [metrics, log.events]


# The world.


@dataclass
class World:
    """A teacher and prompts, and the jobs that can be made of them."""

    root: Path
    teacher: Path
    data: Any

    def job(self, name: str, how: str, *, tokens: int = 512, sharding: str = "none") -> Any:
        """Answers into a folder of their own."""
        from cluster.storage import open_store
        from trainer.responses.job import Answers
        from trainer.spec.responses import ResponsesSpec
        from trainer.spec.sections import TeacherSpec

        return Answers(
            teacher=TeacherSpec(model=str(self.teacher), dtype="float32", sharding=sharding),
            responses=ResponsesSpec(max_new_tokens=NEW, **HOW[how]),
            data=self.data,
            batch_tokens=tokens,
            publish_seconds=0.0,
            store=open_store(self.root).sub("answers", name),
        )

    def rows(self, name: str) -> dict[str, dict[str, Any]]:
        """All published answers by key; none is there twice."""
        found: dict[str, dict[str, Any]] = {}
        for path in (self.root / "answers" / name / "pieces").glob("*.jsonl"):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                assert row["key"] not in found, "generated twice"
                found[row["key"]] = row
        return found


def write_prompts(folder: Path) -> list[Any]:
    """A source of texts without completions, and one of conversations that end with an answer."""
    from trainer.spec.sections import SourceSpec

    draw = np.random.default_rng(3)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(1, most)))

    texts = [{"prompt": f"{number} {words(12)}"} for number in range(60)]
    texts.append(texts[0])  # the same again
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{number} {words(4)}"},
                {"role": "assistant", "content": words(4)},
                {"role": "user", "content": words(6)},
                {"role": "assistant", "content": "is dropped"},
            ]
        }
        for number in range(40)
    ]
    for name, rows in (("texts", texts), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        SourceSpec(source=str(folder / "texts.jsonl"), format="prompt_completion"),
        SourceSpec(source=str(folder / "chats.jsonl"), format="messages", weight=2.0),
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    from cluster.storage import open_store
    from trainer.corpus.tokenizer import load_tokenizer

    root = tmp_path_factory.mktemp("responses")
    data = data_spec(write_texts(root / "texts"))
    corpus = make_corpus(open_store(root).sub("texts-corpus"), data)
    tokenizer = load_tokenizer(corpus.tokenizer_folder())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "tokenizer")
    teacher = save_model(root / "teacher", root / "tokenizer", tied=False)
    for name, more in (
        ("config.json", {"max_position_embeddings": 256}),
        ("generation_config.json", {"eos_token_id": ENDS, "repetition_penalty": 3.0, "top_k": 1}),
    ):
        values = json.loads((teacher / name).read_text())
        (teacher / name).write_text(json.dumps({**values, **more}))
    prompts = data.model_copy(
        update={
            "train": write_prompts(root),
            "sequence_length": 128,
            "select_sequences": 2,
            "report_sequences": 2,
        }
    )
    return World(root, teacher, prompts)


@pytest.fixture(scope="module")
def killed(world) -> int:
    """A group that was killed once it had published something; how many answers that was."""
    folder = world.root / "answers" / "killed" / "pieces"
    ranks = Ranks(partly, world.job("killed", "sampled"), folder, world=2)
    until(lambda: len(list(folder.glob("*.jsonl"))) >= 3, 120)
    for process in ranks.processes:
        process.kill()
        process.wait()
    return len(world.rows("killed"))


@pytest.fixture(scope="module")
def two(world) -> list[list[dict[str, Any]]]:
    """By rank: every way on two ranks, one teacher whole and one sharded, and one stopped."""
    jobs = [(world.job(f"two-{how}", how), None) for how in HOW]
    jobs += [
        (world.job(f"zero3-{how}", how, sharding="zero3"), None) for how in ("greedy", "sampled")
    ]
    jobs += [
        (world.job("too-large", "greedy", sharding="zero3"), None),
        (world.job("whole-too-large", "greedy"), None),
        (world.job("stopped", "sampled"), 2),
    ]
    return spawn(answer_all, jobs, world=2)


@pytest.fixture(scope="module")
def one(world, killed, two) -> list[dict[str, Any]]:
    """Every way on one rank, in other batches; what was killed and stopped is continued."""
    jobs = [world.job(f"one-{how}", how) for how in HOW]
    jobs += [world.job(f"alone-{how}", how, tokens=1) for how in ("greedy", "sampled")]
    jobs += [world.job(name, "sampled") for name in ("killed", "stopped", "stopped")]
    (results,) = spawn(answer_all, [(job, None) for job in jobs], world=1)
    return results


def without_order(rows: dict[str, Any]) -> list[Any]:
    return [rows[key] for key in sorted(rows)]


@pytest.mark.parametrize("how", HOW)
def test_answers_are_the_same_on_one_and_two_ranks(world, one, two, how):
    rows = world.rows(f"one-{how}")
    assert len(rows) == 100 * HOW[how].get("samples", 1)
    assert without_order(world.rows(f"two-{how}")) == without_order(rows)


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_an_answer_does_not_depend_on_its_batch(world, one, how):
    assert without_order(world.rows(f"alone-{how}")) == without_order(world.rows(f"one-{how}"))


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_a_sharded_teacher_gives_the_same_answers(world, one, two, how):
    first = two[0][len(HOW) :][:2]
    assert [result["events"][0]["sharding"] for result in first] == ["zero3"] * 2
    assert without_order(world.rows(f"zero3-{how}")) == without_order(world.rows(f"one-{how}"))


def test_a_teacher_too_large_to_generate_while_sharded_is_refused(world, two):
    for rank in two:
        error = rank[len(HOW) + 2]["error"]
        assert error.startswith("ValueError: responses.from: got teacher") and "\n" not in error
        assert "may have at most 1e-05, " in error and "from: {endpoint: " in error
        assert "error" not in rank[len(HOW) + 3]
    assert world.rows("too-large") == {} and len(world.rows("whole-too-large")) == 100


def test_samples_and_seeds_differ(world, one):
    rows = world.rows("one-sampled").values()
    by_prompt: dict[str, set[str]] = {}
    for row in rows:
        by_prompt.setdefault(json.dumps(row["prompt"]), set()).add(json.dumps(row["completion"]))
    assert sum(len(answers) == 2 for answers in by_prompt.values()) > 80
    first, second = world.rows("one-nucleus"), world.rows("one-other-seed")
    assert sum(first[key]["completion"] != second[key]["completion"] for key in first) > 40


def test_greedy_is_what_transformers_generates(world, one):
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    model = load_plain(world.teacher)
    model.generation_config = GenerationConfig()
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    rows = list(world.rows("one-greedy").values())
    stopped = 0
    for row in rows:
        if isinstance(row["prompt"], str):
            ids = tokenizer(row["prompt"])["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=False
            )
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=ENDS,
            pad_token_id=1,
        )[0, len(ids) :].tolist()  # fmt: skip
        ended = output[-1] in ENDS
        stopped += ended
        kept = output[:-1] if ended else output
        assert row["finish"] == ("stop" if ended else "length")
        assert row["tokens"] == len(kept)
        text = row["completion"]
        text = text if isinstance(text, str) else text[0]["content"]
        assert text == tokenizer.decode(kept, skip_special_tokens=True)
    assert 10 < stopped < len(rows)


def test_a_stop_saves_and_nothing_is_generated_twice(world, killed, two, one):
    assert [rank[-1]["error"] for rank in two] == [
        "Stopped: prepare stopped; the answers are saved"
    ] * 2
    assert 0 < killed < 200
    whole = without_order(world.rows("one-sampled"))
    for name in ("killed", "stopped"):  # rows() refuses a second one
        assert without_order(world.rows(name)) == whole
    assert one[-1]["facts"]["generated"]["tokens"] == 0
    progress = [event for event in one[0]["events"] if event["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 100


def test_answers_become_a_corpus_that_is_learnt_with_cached_logits(world, one):
    """From answers through the corpus and the cache to a student that knows them better."""
    from cluster.storage import open_store
    from trainer.corpus.corpus import open_corpus
    from trainer.corpus.prepare import prepare
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.responses.make import answered, finish
    from trainer.responses.store import AnswerStore
    from trainer.spec.sections import CacheSpec, DistillSpec, StudentSpec, TeacherSpec
    from trainer.teacher.job import Capture
    from trainer.training.job import Training

    store = open_store(world.root)
    answers = AnswerStore(store.sub("answers", "one-sampled"))

    class Spec:
        data, responses = world.data, world.job("", "sampled").responses

    manifest = finish(Spec, answers, {"from": "teacher"}, one[1]["facts"], time.time())
    counts = manifest["counts"]
    assert counts["prompts"] == 100 and counts["answers"] == 200 and counts["failed"] == 0
    assert 0 < counts["cut"] < 200 and counts["left_out"] > 0
    rows = world.rows("one-sampled").values()
    learnt = [
        row
        for row in rows
        if (isinstance(row["prompt"], str) and row["completion"].strip())
        or (row["finish"] == "stop" and not isinstance(row["completion"], str)
            and row["completion"][0]["content"].strip())
    ]  # fmt: skip
    assert sum(file["rows"] for file in manifest["files"]) == len(learnt)

    data = answered(world.data, answers)
    assert [source.weight for source in data.train] == [1.0, 2.0]
    corpus_store = store.sub("answers-corpus")
    prepare(data, load_tokenizer(world.teacher), corpus_store, identity={})
    corpus = open_corpus(corpus_store)
    part = corpus.part("train")
    assert set(part.sources.tolist()) == {0, 1}
    batch = part.batch(range(len(part)))
    assert 0 < batch.loss_mask.mean() < 0.9  # what the prompts say is not learnt

    distill = DistillSpec(
        mode="responses",
        losses={"ce": 0.5, "forward_kl": 0.5},
        dtype="float32",
        steps=30,
        tokens_per_step=8 * data.sequence_length,
        micro_batch=8,
        learning_rate=1e-2,
        evaluate_steps=None,
    )
    teacher = TeacherSpec(model=str(world.teacher), dtype="float32", sharding="none")
    shared = {
        "cache_spec": CacheSpec(method="topk", k=16),
        "data": world.data,
        "seed": 3,
        "corpus": corpus_store,
        "cache": store.sub("answers-cache"),
    }
    capture = Capture(
        teacher=teacher, distill=distill, batch_tokens=512, shard_seconds=20.0, **shared
    )
    training = Training(
        stage="distill",
        teacher=teacher,
        student=StudentSpec(model=str(world.teacher), init="random"),
        distill=distill,
        checkpoints=store.sub("answers-checkpoints"),
        output=store.sub("answers-student"),
        last=store.sub("answers-last"),
        **shared,
    )
    ((metrics, events),) = spawn(learn, capture, training, world=1)
    assert metrics["sequences"] > 0
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert (world.root / "answers-student" / "model.safetensors").is_file()
