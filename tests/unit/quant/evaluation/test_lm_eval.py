"""Benchmark tasks, against an own computation of what each choice is worth."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import quant.evaluation.lm_eval
import quant.evaluation.lm_eval_tasks
from quant.evaluation.lm_eval import check_tasks, compare_tasks, require_lm_eval, run_tasks  # noqa: E402
from quant.layers.linear import dense_weights
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from quant.spec import Task
from tests.fixtures.corpora import WORDS
from tests.fixtures.lm_eval_tasks import write_task

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(train_tokenizer([" ".join(WORDS)] * 2, VOCAB, folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(11, 14))) for _ in range(44)]
    return write_task(tmp_path_factory.mktemp("task"), texts)


WANDB_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")


@pytest.fixture
def no_network(monkeypatch) -> list[object]:
    """Every attempt to reach a network fails and is noted.

    But those of W&B's client to its server from a thread that another test has left.
    """
    tried: list[object] = []
    others = set(threading.enumerate()) - {threading.current_thread()}

    def refuse(*arguments, **_):
        left = threading.current_thread() in others
        if not (left and arguments[0] in WANDB_HOSTS):
            tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def llama(make_llama, **changes):
    return make_llama(vocab_size=VOCAB, **changes)


def local(folder: Path, **more) -> list[Task]:
    return [Task(folder=str(folder), **more)]


def rows_of(folder: Path, name: str = "heldout") -> list[dict]:
    lines = (folder / "data" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def worth(model, tokenizer, context: str, choice: str) -> float:
    """Log-probability of a choice after its context: one text at a time, summed in float64."""
    known = len(tokenizer.encode(context))
    ids = torch.tensor([tokenizer.encode(f"{context} {choice}")])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids[:, :-1]).logits.double(), dim=-1)[0]
    return sum(float(log_probs[at - 1, ids[0, at]]) for at in range(known, ids.shape[1]))


def right(model, tokenizer, rows, prefix: str = "", per_letter: bool = False) -> list[int]:
    found = []
    for row in rows:
        each = [worth(model, tokenizer, prefix + row["context"], one) for one in row["choices"]]
        if per_letter:
            each = [value / len(one) for value, one in zip(each, row["choices"], strict=True)]
        found.append(int(int(np.argmax(each)) == row["label"]))
    return found


def test_accuracy_is_that_of_the_choices_log_probabilities(
    make_llama, tokenizer, folder, no_network, monkeypatch, tmp_path
):
    """Anywhere, without a network."""
    monkeypatch.chdir(tmp_path)
    model = llama(make_llama)
    found = run_tasks(model, tokenizer, local(folder), batch_size=8)["heldout"]
    exact = copy.deepcopy(model).double()
    rows = rows_of(folder)
    assert found["correct"] == right(exact, tokenizer, rows)
    assert found["accuracy"] == sum(found["correct"]) / 40 and 0 < found["accuracy"] < 1
    per_letter = right(exact, tokenizer, rows, per_letter=True)
    assert found["accuracy_norm"] == sum(per_letter) / 40
    assert per_letter != found["correct"], "else the two accuracies could be mixed up"
    assert found["metric"] == "acc" and found["metrics"]["acc"] == found["accuracy"]
    assert (found["documents"], found["num_fewshot"], found["limit"]) == (40, 0, None)
    assert (found["batch_size"], found["max_length"], found["truncated_texts"]) == (8, 128, 0)
    assert found["version"] == 1.0 and found["lm_eval"]
    assert len(set(found["doc_hashes"])) == 40
    assert json.loads(json.dumps(found)) == found
    assert no_network == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_model_is_asked_as_it_is(make_llama, tokenizer, folder, tied):
    spec = QuantSpec(2, 32, embeddings=tied, head=tied)
    plain = llama(make_llama, tied=tied, scale=8.0)
    before = run_tasks(plain, tokenizer, local(folder), batch_size=4)
    model = quantize(plain, spec)
    with dense_weights(model, torch.float32):
        found = run_tasks(model, tokenizer, local(folder), batch_size=4)["heldout"]
    assert found["correct"] == right(model, tokenizer, rows_of(folder))
    assert before["heldout"]["correct"] != found["correct"]


def test_answers_in_bfloat16_are_weighed_in_float32(make_llama, tokenizer, folder, monkeypatch):
    """A softmax in bfloat16 would make choices alike that are not."""
    from lm_eval.models.huggingface import HFLM

    seen = []
    inside = HFLM._loglikelihood_tokens

    def look(self, *arguments, **named):
        seen.extend(inside(self, *arguments, **named))
        return seen

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", look)
    model = llama(make_llama).bfloat16()
    run_tasks(model, tokenizer, local(folder), batch_size=1)
    rows = rows_of(folder)
    expected = [
        worth(model, tokenizer, row["context"], one) for row in rows for one in row["choices"]
    ]
    np.testing.assert_allclose([value for value, _ in seen], expected, rtol=1e-5)


def test_examples_and_limit_are_what_was_asked_for(make_llama, tokenizer, folder):
    model = llama(make_llama)
    tasks = local(folder, num_fewshot=2, limit=9)
    found = run_tasks(model, tokenizer, tasks, 8, max_length=256)["heldout"]
    assert (found["num_fewshot"], found["limit"], found["documents"]) == (2, 9, 9)
    assert found["max_length"] == 256
    # lm-eval draws the examples of document after document from one seeded generator.
    draw = random.Random(quant.evaluation.lm_eval.SEED)
    examples, expected = rows_of(folder, "heldout-examples"), []
    for row in rows_of(folder)[:9]:
        chosen = draw.sample(examples, 2)
        prefix = "".join(f"{one['context']} {one['choices'][one['label']]}\n\n" for one in chosen)
        expected += right(model.double(), tokenizer, [row], prefix)
    assert found["correct"] == expected
    without = run_tasks(model.float(), tokenizer, local(folder, limit=9), 8)["heldout"]
    assert without["doc_hashes"] == found["doc_hashes"]
    assert without["task_hash"] != found["task_hash"], "other prompts"


def test_the_same_numbers_at_another_time_and_nothing_is_left_changed(
    make_llama, tokenizer, folder, capfd
):
    import datasets

    model = llama(make_llama)
    tasks = local(folder, num_fewshot=1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    tokenizer, offline = copy.deepcopy(tokenizer), datasets.config.HF_HUB_OFFLINE
    tokenizer.pad_token = None
    one = run_tasks(model, tokenizer, tasks, batch_size=8)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before
    assert (tokenizer.pad_token, datasets.config.HF_HUB_OFFLINE) == (None, offline)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert run_tasks(model, tokenizer, tasks, batch_size=8) == one
    assert capfd.readouterr() == ("", "")


def test_texts_that_do_not_fit_are_counted_or_refused(make_llama, tokenizer, folder):
    model = llama(make_llama)
    lengths = [
        (len(tokenizer.encode(f"{row['context']} {one}")), len(tokenizer.encode(f" {one}")))
        for row in rows_of(folder)
        for one in row["choices"]
    ]
    median = sorted(whole for whole, _ in lengths)[len(lengths) // 2]
    for size in (median - 1, median - 2):  # the last token is foretold, not read
        found = run_tasks(model, tokenizer, local(folder), 8, max_length=size)["heldout"]
        expected = sum(whole > size + 1 for whole, _ in lengths)
        assert 0 < found["truncated_texts"] == expected < len(lengths)
    with pytest.raises(ValueError, match=r"an answer of \d+ tokens exceeds the 3 "):
        run_tasks(model, tokenizer, local(folder), 8, max_length=3)


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """Two tasks on a common base, one in a folder of its own, a group of them, a task aside."""
    root = tmp_path_factory.mktemp("several")
    draw = random.Random(1)
    for number, name in enumerate(("one", "two", "aside")):
        texts = [" ".join(draw.choices(WORDS, k=11)) for _ in range(8 + 2 * number)]
        write_task(root / name, texts, name=name, seed=number)
    text = (root / "two" / "two.yaml").read_text()
    (root / "base").write_text(text.replace("task: two\n", ""))
    (root / "two" / "two.yaml").write_text("task: two\ninclude: ../base\n")
    (root / "inner.yaml").write_text("group: an_inner\ntask:\n  - two\n")
    (root / "group.yaml").write_text("group: both\nnum_fewshot: 1\ntask:\n  - one\n  - an_inner\n")
    return root


def test_a_folder_of_several_tasks_and_a_group(make_llama, tokenizer, several):
    assert check_tasks(local(several)) == []
    one, two = llama(make_llama), llama(make_llama, seed=1)
    found = run_tasks(one, tokenizer, local(several), batch_size=4)
    assert set(found) == {"one", "two", "aside", "both", "an_inner"}
    assert [found[name]["num_fewshot"] for name in ("one", "two", "aside")] == [1, 1, 0]
    for name, documents in {"one": 4, "two": 6, "aside": 8}.items():
        assert found[name]["documents"] == documents
    assert found["aside"]["correct"] == right(one, tokenizer, rows_of(several / "aside", "aside"))
    both = found["one"]["correct"] + found["two"]["correct"]
    assert (found["both"]["accuracy"], found["both"]["documents"]) == (sum(both) / 10, 10)
    assert found["both"]["tasks"] == ["one", "two"]
    compared = compare_tasks(found, run_tasks(two, tokenizer, local(several), batch_size=4))
    for key in ("right_to_wrong", "wrong_to_right"):
        assert compared["both"][key] == compared["one"][key] + compared["two"][key]


def test_answers_are_told_as_they_come(make_llama, tokenizer, several, folder):
    told = []
    tasks = [*local(several), *local(folder, limit=5)]
    run_tasks(llama(make_llama), tokenizer, tasks, 4, progress=lambda *said: told.append(said))
    shares = [share for share, *_ in told]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] == pytest.approx(1)
    choices = len(rows_of(folder)[0]["choices"])
    for name, documents in {"one": 4, "two": 6, "aside": 8, "heldout": 5}.items():
        counted = [(done, total) for _, task, done, total in told if task == name]
        total = documents * choices
        assert counted == [(done, total) for done in range(1, total + 1)]


def test_flips_add_up_with_the_accuracies(make_llama, tokenizer, folder):
    tasks = local(folder)
    before = run_tasks(llama(make_llama), tokenizer, tasks, batch_size=8)
    after = run_tasks(llama(make_llama, seed=1), tokenizer, tasks, batch_size=8)
    # As from a file, and in another order of documents.
    stored = json.loads(json.dumps(before))
    for key in ("doc_hashes", "correct"):
        stored["heldout"][key].reverse()
    found = compare_tasks(stored, after)["heldout"]
    pairs = list(zip(before["heldout"]["correct"], after["heldout"]["correct"], strict=True))
    lost, won = found["right_to_wrong"], found["wrong_to_right"]
    assert lost == sum(old > new for old, new in pairs) > 0
    assert won == sum(old < new for old, new in pairs) > 0
    assert round(40 * (found["accuracy"] - found["reference_accuracy"])) == won - lost
    assert found["accuracy"] == after["heldout"]["accuracy"]
    assert found["reference_accuracy"] == before["heldout"]["accuracy"]
    assert found["retention"] == pytest.approx(
        100 * found["accuracy"] / found["reference_accuracy"]
    )
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert found["mcnemar_p"] == pytest.approx(min(1, 2 * tail))


def results(correct: list[int], documents: str = "abcdefghij") -> dict:
    hashes = list(documents[: len(correct)])
    return {"t": {"metric": "acc", "doc_hashes": hashes, "correct": correct}}


def test_comparing_at_the_edges():
    same = compare_tasks(results([0, 1, 1]), results([0, 1, 1]))["t"]
    assert (same["mcnemar_p"], same["retention"]) == (1.0, 100)
    lost = compare_tasks(results([1] * 8), results([0] * 8))["t"]
    assert (lost["mcnemar_p"], lost["retention"]) == (pytest.approx(2 / 2**8), 0)
    assert compare_tasks(results([0, 0]), results([1, 1]))["t"]["retention"] is None
    twice = results([1, 0], "aa"), results([0, 0], "aa")
    assert compare_tasks(*twice)["t"]["right_to_wrong"] == 1
    for other in (results([0, 1]), results([0, 1, 1], "abd")):
        with pytest.raises(ValueError, match="task t: the reference saw .* not the same ones"):
            compare_tasks(results([0, 1, 1]), other)
    with pytest.raises(ValueError, match="task t: the reference was not measured in it"):
        compare_tasks({}, results([1]))
    numbers_alone = {"t": {"metric": None, "metrics": {"perplexity": 3.0}}}
    assert compare_tasks(numbers_alone, numbers_alone) == {}


def test_generated_answers_are_right_or_wrong_too(make_llama, tokenizer, tmp_path):
    """Half of the targets are what the model says."""
    model = llama(make_llama)
    rows = []
    for number, word in enumerate(WORDS[:6]):
        ids = torch.tensor([tokenizer.encode(word)])
        said = model.generate(
            ids, max_new_tokens=3, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )
        answer = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        rows.append({"question": word, "answer": answer if number % 2 else answer + "?"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        "task: answers\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.jsonl}}\n"
        "output_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['\\n\\n\\n'], max_gen_toks: 3, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    told = []
    found = run_tasks(
        model, tokenizer, local(tmp_path), 2, progress=lambda *said: told.append(said)
    )["answers"]
    assert [tuple(said) for said in told] == [(n / 6, "answers", n, 6) for n in range(1, 7)]
    assert (found["metric"], found["correct"]) == ("exact_match", [0, 1, 0, 1, 0, 1])
    assert found["accuracy"] == found["metrics"]["exact_match"] == 0.5
    assert "accuracy_norm" not in found


@pytest.mark.parametrize(
    "files, fault",
    [
        (None, "is no folder; give that of a task's YAML files"),
        ({}, "holds no .yaml file"),
        ({"a.yaml": "dataset_path: json\n"}, "no file in .* names a task; add `task: NAME`"),
        ({"a.yaml": "task: [\n"}, "a.yaml cannot be read"),
        ({"a.yaml": "task: t\ninclude: gone.yaml\n"}, "a.yaml cannot be read .*gone"),
        (
            {"a.yaml": "task: t\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n"},
            "names gone.jsonl, which is not in .*; add it",
        ),
        ({"a.yaml": "task: t\n", "b.yaml": "task: t\n"}, "b.yaml names the task t, as another"),
        ({"a.yaml": "group: g\ntask: [arc_easy]\n"}, "group g names arc_easy, which is not in"),
        ({"a.yaml": "task: t\nnum_fewshot: 0\n"}, "num_fewshot is 3, but t fixes 0 itself"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_in_one_line(tmp_path, files, fault):
    folder = tmp_path / "task"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if files == {}:
        folder.mkdir()
    fine = write_task(
        tmp_path / "fine", [" ".join(f"{a}{b}" for b in range(11)) for a in "abcdefgh"]
    )
    (found,) = check_tasks([*local(fine), *local(folder, num_fewshot=3)])
    assert found.startswith("sweep.tasks.1: ") and "\n" not in found
    assert re.search(fault, found), found


def test_tasks_by_name(monkeypatch, folder):
    """With a part of lm-eval's own tasks: reading them all takes long."""
    import lm_eval.tasks

    arc = Path(lm_eval.tasks.__file__).parent / "arc"
    part = lm_eval.tasks.TaskManager(include_path=str(arc), include_defaults=False)
    monkeypatch.setattr(quant.evaluation.lm_eval_tasks, "_built_in", lambda: part)
    assert check_tasks([Task(task="arc_easy"), Task(task="ai2_arc"), *local(folder)]) == []
    (found,) = check_tasks([Task(task="arc_easy"), Task(task="arc_esay")])
    assert found.startswith("sweep.tasks.1: lm-eval ") and "did you mean arc_easy" in found
    (found,) = check_tasks([Task(task="arc_easy"), Task(task="arc_easy", num_fewshot=5)])
    assert found == ("sweep.tasks.1: arc_easy is in sweep.tasks.0 already; list every task once")


def test_without_lm_eval_the_fault_says_what_to_install(monkeypatch, folder):
    monkeypatch.setattr(quant.evaluation.lm_eval, "find_spec", lambda name: None)
    assert check_tasks([]) == []
    (found,) = check_tasks(local(folder))
    assert found.startswith("sweep.tasks: needs lm-eval")
    assert "pip install --constraint requirements.lock --editable '.[tasks]'" in found
    with pytest.raises(ValueError, match="needs lm-eval"):
        require_lm_eval()
    with pytest.raises(ValueError, match="needs lm-eval"):
        run_tasks(SimpleNamespace(), SimpleNamespace(), local(folder), 1)  # type: ignore[arg-type]
