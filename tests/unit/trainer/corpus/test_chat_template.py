"""Conversations: which tokens are learnt, against expectations by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.storage import open_store
from tests.fixtures.corpora import CHATML, CHATML_MARKED, chat_tokenizer, write_chats, write_texts
from trainer.corpus.chat_template import chat_faults, prompt_ids, render
from trainer.corpus.conversations import Pair, conversation, prompt_completion
from trainer.corpus.corpus import open_corpus
from trainer.corpus.identity import corpus_identity
from trainer.corpus.prepare import prepare
from trainer.corpus.size import check_size
from trainer.corpus.sources import read_documents, resolve
from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer
from trainer.spec.sections import DataSpec, SourceSpec, TokenizerSpec

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_CONTROLS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# As thinking models have it: thoughts only before the last answer, also where there were none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No token ends a turn.
OPEN = (
    "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
# Its generation prompt is not what it writes before an answer.
TORN = (
    "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No\nsystem') }}"
    "{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
)

USER, ANSWER = {"role": "user", "content": "barn dest"}, {"role": "assistant", "content": "gest"}
MORE, LAST = {"role": "user", "content": "kirn"}, {"role": "assistant", "content": "birn\n\nlamp"}
TALK = [USER, ANSWER, MORE, LAST]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Any:
    """Makes a tokenizer with a template, each once."""
    root, made = tmp_path_factory.mktemp("tokenizers"), {}

    def make(template: str | None, *controls: str) -> Any:
        key = (template, *controls)
        if key not in made:
            more = {"controls": controls} if controls else {}
            made[key] = chat_tokenizer(root / str(len(made)), template, **more)
        return made[key]

    return make


def row(*messages: dict[str, Any], prompt: int | None = None) -> Any:
    if prompt is None:
        return conversation("here", list(messages))
    return prompt_completion("here", list(messages[:prompt]), list(messages[prompt:]))


def check(tokenizer: Any, given: Any, pieces: list[tuple[str, int]]) -> None:
    """That a row becomes these texts, tokenised apart, of which those with a 1 are learnt."""
    expected = [
        (token, bool(learnt))
        for text, learnt in pieces
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    ids, flags = render(tokenizer, given)
    assert ids.dtype == np.int32 and flags.dtype == np.bool_
    assert list(zip(ids.tolist(), flags.tolist(), strict=True)) == expected


# What is learnt.


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_chatml_learns_the_answers_and_their_ends(tokenizers, template) -> None:
    """Also where the template's marks leave the end of the turn out; the line feed is its own."""
    tokenizer = tokenizers(template)
    system = {"role": "system", "content": "dab"}
    first = "<|im_start|>user\nbarn dest<|im_end|>\n<|im_start|>assistant\n"
    second = "\n<|im_start|>user\nkirn<|im_end|>\n<|im_start|>assistant\n"
    answers = [(first, 0), ("gest<|im_end|>", 1), (second, 0), ("birn\n\nlamp<|im_end|>", 1)]
    check(tokenizer, row(*TALK), [*answers, ("\n", 0)])
    headed = ("<|im_start|>system\ndab<|im_end|>\n" + first, 0)
    check(tokenizer, row(system, *TALK), [headed, *answers[1:], ("\n", 0)])
    check(tokenizer, row(*TALK, USER), [*answers, ("\n", 0)])  # nobody answers it any more
    given = [(first + "gest<|im_end|>" + second, 0), answers[3], ("\n", 0)]
    check(tokenizer, row(*TALK, prompt=3), given)  # the prompt's answers are not learnt
    check(tokenizer, row(*TALK, prompt=1), [*answers, ("\n", 0)])
    assert tokenizer.decode(prompt_ids(tokenizer, TALK[:3])) == first + "gest<|im_end|>" + second


def test_llama3_learns_the_answers_and_begins_once(tokenizers) -> None:
    """Templates write the beginning of a text themselves: a tokenizer that adds one doubled it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizers(LLAMA3, "<|begin|>", *LLAMA3_CONTROLS)
    tokenizer.bos_token = "<|begin|>"
    begin = tokenizer.bos_token_id
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    first = "<|begin|>" + head.format("user") + "barn dest<|eot_id|>" + head.format("assistant")
    second = head.format("user") + "kirn<|eot_id|>" + head.format("assistant")
    answers = [(first, 0), ("gest<|eot_id|>", 1), (second, 0), ("birn\n\nlamp<|eot_id|>", 1)]
    check(tokenizer, row(*TALK), answers)
    texts = [("<|begin|>barn", 0), (" gest<|endoftext|>", 1)]  # added here: no template did
    check(tokenizer, Pair("barn", " gest"), texts)


def test_white_space_at_the_edges_of_an_answer_is_its_own(tokenizers) -> None:
    """Masks by character offsets lose it: byte-level tokenizers leave it out of their offsets."""
    for template in (CHATML, CHATML_MARKED):
        spaced = {"role": "assistant", "content": "\n\n gest \n"}
        pieces = [
            ("<|im_start|>user\nbarn dest<|im_end|>\n<|im_start|>assistant\n", 0),
            ("\n\n gest \n<|im_end|>", 1),
            ("\n", 0),
        ]
        check(tokenizers(template), row(USER, spaced), pieces)


def test_a_template_that_rewrites_earlier_answers_teaches_the_last_one(tokenizers) -> None:
    tokenizer = tokenizers(THINKING)
    first = "<|im_start|>user\nbarn dest<|im_end|>\n<|im_start|>assistant\ngest<|im_end|>\n"
    second = "<|im_start|>user\nkirn<|im_end|>\n<|im_start|>assistant\n"
    thought = "<think>\n\n</think>\n\n"
    pieces = [(first + second, 0), (thought + "birn\n\nlamp<|im_end|>", 1), ("\n", 0)]
    check(tokenizer, row(*TALK), pieces)


def test_an_answer_that_no_token_ends_is_ended_by_the_end_of_text(tokenizers) -> None:
    tokenizer = tokenizers(OPEN)
    pieces = [
        ("### user: barn dest\n### assistant: ", 0),
        ("gest\n", 1),
        ("### user: kirn\n### assistant: ", 0),
        ("birn\n\nlamp\n<|endoftext|>", 1),
    ]
    ids, learnt = render(tokenizer, row(*TALK))
    text = "".join(text for text, _ in pieces)
    assert tokenizer.decode(ids) == text
    # " g" and " b" lie across the boundaries: they are the answer's.
    said = [tokenizer.decode(run) for run in runs(ids, learnt)]
    assert said == [" gest\n", " birn\n\nlamp\n<|endoftext|>"]


def runs(ids: np.ndarray, learnt: np.ndarray) -> list[np.ndarray]:
    edges = np.flatnonzero(np.diff(learnt.astype(int))) + 1
    return [
        run for run, on in zip(np.split(ids, edges), np.split(learnt, edges), strict=True) if on[0]
    ]


def test_a_prompt_and_its_completion_as_texts(tokenizers) -> None:
    tokenizer = tokenizers(None)  # needs no template
    check(tokenizer, Pair("barn dest", " gest"), [("barn dest", 0), (" gest<|endoftext|>", 1)])
    check(tokenizer, Pair("", "gest"), [("gest<|endoftext|>", 1)])
    ended = Pair("barn", " gest<|endoftext|>")
    check(tokenizer, ended, [("barn", 0), (" gest<|endoftext|>", 1)])


def test_what_a_template_cannot_render_is_named_by_its_row(tokenizers) -> None:
    def error(template: str, *messages: dict[str, str]) -> str:
        with pytest.raises(ValueError) as caught:
            render(tokenizers(template), row(*messages))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    system = {"role": "system", "content": "dab"}
    said = error(STRICT, system, USER, ANSWER)
    assert said.startswith("here: the chat template refuses it") and "No system" in said
    assert "generation prompt otherwise" in error(TORN, USER, ANSWER)
    assert "'>' against '[ges" in error(TORN, USER, ANSWER).replace("gest]'", "ges")
    assert "nothing comes before the assistant's turn" in error(CHATML, ANSWER)
    unmarked = CHATML_MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'nobody'")
    assert "gives the assistant no token" in error(unmarked, USER, ANSWER)


# Corpora.


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def spec(*sources: tuple[str, str], **changes: Any) -> DataSpec:
    made = [SourceSpec(source=source, format=format) for source, format in sources]
    values = {"select_sequences": 3, "report_sequences": 4, "sequence_length": 48, **changes}
    return DataSpec(train=made, **values)


def test_a_tokenizer_without_a_template_is_refused_before_work(tokenizers, tmp_path) -> None:
    chats = write_chats(tmp_path / "chats", 5)
    texts = jsonl(
        tmp_path / "texts.jsonl",
        [{"prompt": "", "completion": ""}, {"prompt": "a", "completion": "b"}],
    )
    lists = jsonl(tmp_path / "lists.jsonl", [{"prompt": TALK[:1], "completion": TALK[1:2]}])
    data = spec(
        (chats, "messages"), (str(texts), "prompt_completion"), (str(lists), "prompt_completion")
    )
    assert chat_faults(data, tokenizers(CHATML)) == []
    plain = tokenizers(None)
    faults = chat_faults(data, plain)
    assert [fault.split(": ")[0] for fault in faults] == [
        "data.train.0.format",
        "data.train.2.format",
    ]
    assert plain.name_or_path in faults[0] and "prompt_completion with texts" in faults[0]
    assert "tokenizer.train" in chat_faults(data, TokenizerSpec(train=300))[0]
    with pytest.raises(ValueError, match=r"data.train.0.format: messages .* chat template"):
        check_size(data, plain)
    with pytest.raises(ValueError, match=r"data.train.0.format: messages .* chat template"):
        prepare(data, plain, open_store(tmp_path / "store"), identity={})


def make(root: Path, data: DataSpec, tokenizer: Any) -> Any:
    store = open_store(root)
    check_size(data, tokenizer)
    prepare(data, tokenizer, store, identity=corpus_identity(data, {}))
    return open_corpus(store)


def test_a_corpus_of_conversations_and_texts(tokenizers, tmp_path) -> None:
    """Every conversation is whole, in one part, and counts exactly where it is learnt."""
    tokenizer = tokenizers(CHATML)
    chats, texts = write_chats(tmp_path / "chats", 60), write_texts(tmp_path / "texts", 30)
    rows = [
        row for file in Path(tmp_path / "chats").iterdir() for row in file.read_text().split("\n")
    ]
    data = spec((chats, "messages"), (texts, "text"), sequence_length=96)
    corpus = make(tmp_path / "corpus", data, tokenizer)
    expected = {}
    for line in rows[:-1]:
        ids, learnt = render(tokenizer, conversation("", json.loads(line)["messages"]))
        expected[ids[:96].tobytes()] = learnt[:96]
    start, pad = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.pad_token_id
    seen: list[bytes] = []
    for name, count in (("select", 3), ("report", 4), ("train", len(corpus.part("train")))):
        part = corpus.part(name)
        batch = part.batch(np.arange(len(part)))
        assert len(part) == count
        for ids, positions, mask in zip(
            batch.input_ids, batch.position_ids, batch.loss_mask, strict=True
        ):
            edges = [*np.flatnonzero(positions == 0), len(ids)]
            for a, b in zip(edges[:-1], edges[1:], strict=True):
                if ids[a] == start:
                    key = ids[a:b].astype(np.int32).tobytes()
                    seen.append(key)
                    assert (
                        mask[a : b - 1].tolist() == expected[key][1:].tolist() and mask[b - 1] == 0
                    )
                else:
                    assert (mask[a : b - 1] == (ids[a] != pad)).all()
    assert len(seen) == len(set(seen)) >= len(expected) - 2  # the end of a part may be dropped
    cut = sum(len(learnt) == 96 for learnt in expected.values())
    assert corpus.manifest["documents"]["cut"] <= cut


def test_held_out_parts_take_whole_conversations_and_count_the_cut(tokenizers, tmp_path) -> None:
    tokenizer = tokenizers(CHATML)
    data = spec((write_chats(tmp_path / "c", 80), "messages"), sequence_length=24)
    corpus = make(tmp_path / "corpus", data, tokenizer)
    lengths = [
        len(render(tokenizer, one)[0])
        for shard in resolve(data.train[0], 0)
        for one in read_documents(shard)
    ]
    assert corpus.manifest["documents"]["cut"] == sum(length > 24 for length in lengths) > 0
    for name in ("select", "report"):
        batch = corpus.part(name).batch(np.arange(len(corpus.part(name))))
        assert (batch.loss_mask.sum(axis=1) > 0).all()


def test_limits_and_repeats_work_on_what_is_said(tokenizers, tmp_path) -> None:
    long = {"role": "assistant", "content": "gest " * 200}
    talks = [[{"role": "user", "content": f"{n} barn"}, ANSWER] for n in range(60)]
    rows = [*talks, talks[0], [USER, long], [USER, {"role": "assistant", "content": ""}]]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": one} for one in rows])
    data = spec((str(path), "messages"), max_chars=300)
    documents = make(tmp_path / "corpus", data, tokenizers(CHATML)).manifest["documents"]
    assert documents == {"read": 63, "filtered": 2, "duplicate": 1, "kept": 60, "cut": 0}


def test_a_trained_tokenizer_serves_prompts_and_completions_of_texts(tmp_path) -> None:
    rows = [{"prompt": f"{n} barn dest", "completion": f" gest {n}"} for n in range(200)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = spec((str(path), "prompt_completion"), sequence_length=16)
    corpus = make(tmp_path / "corpus", data, TokenizerSpec(train=270))
    tokenizer = load_tokenizer(corpus.tokenizer_folder())
    batch = corpus.part("train").batch([0])
    learnt = batch.input_ids[0, 1:][batch.loss_mask[0, :-1] == 1]
    assert tokenizer.decode(learnt).count("<|endoftext|>") >= 1 and "barn" not in tokenizer.decode(
        learnt
    )


def test_a_template_by_default_among_several_is_used(tmp_path) -> None:
    folder = train_tokenizer(["barn dest gest " * 3], 258 + 4, tmp_path / "plain")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {"default": OPEN, "tool_use": TORN}
    assert "### user" in tokenizer.decode(render(tokenizer, row(USER, ANSWER))[0])


# Training.


def test_nothing_that_stands_where_nothing_counts_changes_the_training(
    tokenizers, tmp_path
) -> None:
    """Neither labels nor the teacher's records there: loss and gradients are the same bits."""
    from trainer.losses.divergences import CrossEntropy, ForwardKL, Target
    from trainer.losses.fused_linear import Head, fused_loss
    from trainer.training.loader import make_micro_batch

    data = spec((write_chats(tmp_path / "chats", 30), "messages"), sequence_length=64)
    corpus = make(tmp_path / "corpus", data, tokenizers(CHATML))
    vocab = int(corpus.manifest["vocab_size"])
    part = corpus.part("select")
    micro = make_micro_batch(part, np.arange(3), np.ones(3, np.float32), None)
    counts = micro.token_weights > 0
    assert 0 < counts.sum() < 0.7 * len(counts)
    states = torch.randn(len(counts), 16, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(vocab, 16, generator=torch.Generator().manual_seed(2))

    def learn(seed: int) -> list[torch.Tensor]:
        """Loss, sums and gradients, with other numbers where nothing counts for each seed."""
        fixed, draw = (torch.Generator().manual_seed(number) for number in (3, seed))
        made = [
            torch.stack([torch.randperm(vocab, generator=one)[:5] for _ in counts])
            for one in (fixed, draw)
        ]
        ids = torch.where(counts[:, None], made[0], made[1])
        noise = [torch.rand(len(counts), 6, generator=one) for one in (fixed, draw)]
        logs = torch.where(counts[:, None], noise[0], noise[1] * 1e3).log()
        labels = torch.where(
            counts, micro.labels, torch.randint(vocab, counts.shape, generator=draw)
        )
        hidden, rows = states.clone().requires_grad_(), weight.clone().requires_grad_()
        target = Target(labels, ids, logs[:, :5] - 3.0, logs[:, 5] - 3.0)
        losses = {"forward_kl": (0.7, ForwardKL(1.0)), "ce": (0.3, CrossEntropy())}
        head = Head(rows, None, vocab)
        loss, sums = fused_loss(hidden, head, target, micro.token_weights, losses)
        loss.backward()
        assert hidden.grad is not None and rows.grad is not None
        assert not hidden.grad[~counts].any() and hidden.grad[counts].any()
        return [loss.detach(), sums, hidden.grad, rows.grad]

    one, *others = (learn(seed) for seed in (4, 5, 6))
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))
