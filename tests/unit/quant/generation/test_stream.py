"""Streaming: the pieces are the text that `generate` gives, and the statistics are of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quant.generation.stream import END, LENGTH, POSITIONS, STOPPED, Detokenizer, stream
from tests.fixtures.corpora import CHATML, chat_tokenizer
from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer

TEXT = "naïve — 日本語 🙂 d'accord\n  e\u0301 fin"


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Every byte is a token of its own, so most characters of TEXT are several."""
    folder = tmp_path_factory.mktemp("bytes")
    train_tokenizer(["a"], 258, folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    from tests.unit.quant.conftest import tiny_llama

    return tiny_llama(vocab_size=258)


def whole(model, tokenizer, prompt: str, tokens: int, **changes) -> str:
    """What transformers itself generates, decoded at once."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    config = GenerationConfig(
        max_new_tokens=tokens, eos_token_id=0, pad_token_id=1, do_sample=False, **changes
    )
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# -- pieces ------------------------------------------------------------------------------------


def shards_of(tokenizer, ids: list[int]) -> list[str]:
    pieces = Detokenizer(tokenizer)
    return [*(piece for token in ids if (piece := pieces.add(token))), pieces.rest()]


def test_a_character_of_several_tokens_is_one_piece(bytes_tokenizer) -> None:
    ids = bytes_tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    assert shards_of(bytes_tokenizer, ids) == [*TEXT, ""]


def test_a_character_that_never_ends_is_told_at_the_end(bytes_tokenizer) -> None:
    ids = bytes_tokenizer("ab🙂")["input_ids"][:-1]
    assert shards_of(bytes_tokenizer, ids) == ["a", "b", "\ufffd"]
    # and where another follows, with that one
    broken = [*ids, *bytes_tokenizer("cd")["input_ids"]]
    assert shards_of(bytes_tokenizer, broken) == ["a", "b", "\ufffdc", "d", ""]


def test_random_bytes_join_to_the_decoded_whole(bytes_tokenizer) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        ids = torch.randint(2, 258, (40,), generator=draw).tolist()
        expected = bytes_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(shards_of(bytes_tokenizer, ids)) == expected


def test_spaces_of_a_sentencepiece_vocabulary_stay() -> None:
    vocab = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4, "<0xC3>": 5, "<0xAF>": 6, ".": 7}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    ids = [1, 2, 3, 5, 6, 1, 4, 2, 7]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "the catsï the  cat."
    assert shards_of(tokenizer, ids) == ["the", " cat", "s", "ï", " the", " ", " cat", ".", ""]


def test_special_tokens_are_no_text(bytes_tokenizer) -> None:
    a, b = bytes_tokenizer("ab")["input_ids"]
    assert shards_of(bytes_tokenizer, [1, a, 0, 1, b, 0]) == ["a", "b", ""]


# -- stream ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_the_text_is_that_of_generate(model, bytes_tokenizer, tokens: int) -> None:
    made = stream(model, bytes_tokenizer, "Once", tokens)
    pieces = list(made)
    assert "".join(pieces) == whole(model, bytes_tokenizer, "Once", tokens)
    found = made.statistics
    assert (found.prompt_tokens, found.new_tokens, found.finish) == (4, tokens, LENGTH)
    assert found.kernel == "float32 matmul"
    assert found.prompt_s > 0 and found.prompt_tokens_per_s == 4 / found.prompt_s
    if tokens == 1:
        assert found.new_tokens_per_s is None
    else:
        assert found.new_tokens_per_s == (tokens - 1) / found.decode_s


def test_greedy_is_greedy_whatever_the_model_would_like(model, bytes_tokenizer) -> None:
    """The generation_config of many published models draws, and punishes repetition."""
    expected = whole(model, bytes_tokenizer, "Once", 30)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=5.0
    )
    try:
        assert "".join(stream(model, bytes_tokenizer, "Once", 30)) == expected
        model.generation_config = GenerationConfig(do_sample=True, top_k=1)
        drawn = "".join(stream(model, bytes_tokenizer, "Once", 30, temperature=3.0, seed=1))
        assert drawn != expected
    finally:
        model.generation_config = before


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_no_setting_of_the_model_changes_the_text(
    model, bytes_tokenizer, temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Some take ids away, some `generate` refuses without more arguments; none is warned of."""

    def made() -> list[int]:
        stream_ = stream(model, bytes_tokenizer, "Once", 12, temperature=temperature, seed=1)
        list(stream_)
        return stream_.ids

    expected, before = made(), model.generation_config
    own = GenerationConfig(
        suppress_tokens=expected,
        bad_words_ids=[[id_] for id_ in expected],
        min_new_tokens=3,
        num_return_sequences=2,
        num_beams=2,
        stop_strings=["a"],
    )
    held = own.to_dict()
    model.generation_config = own
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        assert made() == expected
        assert model.generation_config is own and own.to_dict() == held
    finally:
        model.generation_config = before
        library.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_draws_depend_on_the_seed_alone(model, bytes_tokenizer) -> None:
    def drawn(seed: int | None, top_p: float = 1.0) -> list[int]:
        made = stream(model, bytes_tokenizer, "On", 20, temperature=2.0, seed=seed, top_p=top_p)
        list(made)
        return made.ids

    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(None) != drawn(None)
    greedy = stream(model, bytes_tokenizer, "On", 20)
    list(greedy)
    assert drawn(1, top_p=1e-6) == greedy.ids


def test_the_end_of_text_ends_it(model, bytes_tokenizer) -> None:
    free = stream(model, bytes_tokenizer, "Once", 10)
    list(free)
    third = free.ids[2]
    assert third not in free.ids[:2]
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[0, third])
    try:
        made = stream(model, bytes_tokenizer, "Once", 10)
        list(made)
        assert made.ids == free.ids[:3]
        assert made.statistics.finish == END
    finally:
        model.generation_config = before


def test_positions_end_it_and_are_told(model, bytes_tokenizer) -> None:
    made = stream(model, bytes_tokenizer, "x" * 120, 100)
    list(made)
    assert (made.statistics.new_tokens, made.statistics.finish) == (8, POSITIONS)
    with pytest.raises(ValueError) as error:
        stream(model, bytes_tokenizer, "x" * 128, 1)
    assert str(error.value) == (
        "prompt: has 128 tokens, but the model has 128 positions, for prompt and new tokens "
        "together; give one of at most 127 tokens"
    )


def test_closing_stops_the_model(bytes_tokenizer, make_llama) -> None:
    model, calls = make_llama(vocab_size=258), []

    def hold(*_) -> None:
        calls.append(1)
        if len(calls) == 20:  # no token more before it is told to stop
            assert made._stop.wait(60)

    model.lm_head.register_forward_hook(hold)
    threads = threading.active_count()
    with stream(model, bytes_tokenizer, "Once", 100) as made:
        next(made)
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
    assert len(calls) <= 20
    found = made.statistics
    assert 1 <= found.new_tokens < 100 and found.finish == STOPPED
    assert list(made) == []
    # one that nobody reads has started nothing
    stream(model, bytes_tokenizer, "Once").close()
    assert threading.active_count() == threads


def test_what_goes_wrong_while_generating_is_raised(bytes_tokenizer, make_llama) -> None:
    model = make_llama(vocab_size=258)
    down, calls = model.model.layers[1].mlp.down_proj, []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    down.register_forward_hook(fail)
    made, got = stream(model, bytes_tokenizer, "Once", 50), []
    with pytest.raises(RuntimeError, match="out of memory"):
        for piece in made:
            got.append(piece)
    assert len(made.ids) == 3


def test_messages_are_rendered_by_the_chat_template(tmp_path: Path, make_llama) -> None:
    tokenizer = chat_tokenizer(tmp_path / "t", CHATML)
    model = make_llama(vocab_size=len(tokenizer))
    made = stream(model, tokenizer, [{"role": "user", "content": "birn"}], 3)
    list(made)
    text = "<|im_start|>user\nbirn<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert made.statistics.prompt_tokens == len(ids)
    plain = stream(model, tokenizer, text, 3)
    assert list(plain) is not None and plain.ids == made.ids


@pytest.mark.parametrize(
    ("prompt", "changes", "line"),
    [
        ("", {}, "prompt: is empty; may be a text"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens: got 0; may be 1 or more"),
        (
            "a",
            {"temperature": -1.0},
            "temperature: got -1; may be 0 (the likeliest token), or 0.0001 and more",
        ),
        (
            "a",
            {"temperature": 1e-40},
            "temperature: got 1e-40; may be 0 (the likeliest token), or 0.0001 and more",
        ),
        ("a", {"top_p": 0.0}, "top_p: got 0; may be above 0, up to 1"),
        ("a", {"temperature": 1.0, "seed": 2**63}, f"seed: got {2**63}; may be 0 to {2**63 - 1}"),
        (
            [{"role": "user", "content": "a"}],
            {},
            "prompt: messages need a chat template, which this tokenizer lacks; give a text",
        ),
    ],
)
def test_wrong_input_is_told_in_a_line(
    model, bytes_tokenizer, prompt, changes: dict, line: str
) -> None:
    with pytest.raises(ValueError) as error:
        stream(model, bytes_tokenizer, prompt, **changes)
    assert str(error.value) == line


def test_another_models_tokenizer_is_refused(bytes_tokenizer, make_llama) -> None:
    with pytest.raises(ValueError, match="the model has 32 embedding rows; give the tokenizer"):
        stream(make_llama(vocab_size=32), bytes_tokenizer, "z")


def test_memory_is_that_of_the_model_alone(bytes_tokenizer, make_llama) -> None:
    model = make_llama(vocab_size=258)
    held = torch.ones(1_000_000)  # of something else
    made = stream(model, bytes_tokenizer, "Once", 3)
    "".join(made)
    weights = {p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}
    assert sum(weights.values()) <= made.statistics.memory_bytes < 1.01 * sum(weights.values())
    assert held.nbytes > sum(weights.values())


def test_the_kernel_of_a_quantized_model_is_named(
    bytes_tokenizer, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    from quant.kernels import kernel_names
    from quant.quant_spec import QuantSpec
    from quant.quantize import quantize

    model = quantize(make_llama(vocab_size=258), QuantSpec(4, 32))
    made = stream(model, bytes_tokenizer, "Once", 12)
    assert "".join(made) == whole(model, bytes_tokenizer, "Once", 12)
    assert made.statistics.kernel == kernel_names(model) != "dense"
