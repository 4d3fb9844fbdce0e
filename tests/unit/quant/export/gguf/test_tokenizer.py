"""Tokenizers in GGUF files: what is written, and that it splits texts as the tokenizer does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from quant.export.gguf.tokenizer import Vocabulary, read_vocabulary
from tests.fixtures import gguf_models

END, PAD = gguf_models.END, gguf_models.PAD


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory) -> Path:
    return gguf_models.byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory) -> Path:
    return gguf_models.sentence_pieces(tmp_path_factory.mktemp("tokenizer") / "pieces")


@pytest.fixture
def changed(byte_folder, piece_folder, tmp_path):
    """A copy of a folder, its tokenizer.json changed by a function of the parsed file."""

    def change(how, pieces=False) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(piece_folder if pieces else byte_folder, copy)
        spec = json.loads((copy / "tokenizer.json").read_text())
        how(spec)
        (copy / "tokenizer.json").write_text(json.dumps(spec))
        return copy

    return change


def written(vocabulary: Vocabulary, path: Path) -> dict:
    """The fields that a file of it has."""
    writer = GGUFWriter(path, "llama")
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if "tokenizer" in name}


def test_byte_level_fields(byte_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(byte_folder)
    fields = written(read_vocabulary(byte_folder, 400), tmp_path / "x.gguf")
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert fields["tokenizer.ggml.tokens"] == [text for text, _ in ids]
    types = fields["tokenizer.ggml.token_type"]
    assert types == [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 398
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    special = {k: fields[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")}
    assert special == {"bos": 0, "eos": 0, "padding": 1}
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert "tokenizer.chat_template" not in fields and "tokenizer.ggml.scores" not in fields


@pytest.mark.parametrize("kind", gguf_models.BYTE_LEVEL)
def test_tokens_and_merges_split_texts_as_before(kind, tmp_path):
    folder = gguf_models.byte_level(tmp_path / kind, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = read_vocabulary(folder, 400)
    fields = written(vocabulary, tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.pre"] == kind
    tokens = {text: i for i, text in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    again = Tokenizer(models.BPE(tokens, merges, ignore_merges=kind == "llama-bpe"))
    again.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    again.decoder = decoders.ByteLevel()
    again.add_special_tokens([END, PAD])
    for text in gguf_models.texts():
        assert again.encode(text).ids == tokenizer(text).input_ids
        assert again.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text


def joined(text: str, vocabulary: Vocabulary) -> list[int]:
    """SentencePiece's BPE, plainly: of all neighbours whose union is a piece, those with the best
    score, leftmost first, until none is left; then bytes for what is no piece."""
    ids = {piece: i for i, piece in enumerate(vocabulary.tokens)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(parts[i] + parts[i + 1], i) for i in range(len(parts) - 1)]
        found = [(-vocabulary.scores[ids[p]], i) for p, i in pairs if p in ids]
        if not found:
            break
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = [[p] if p in ids else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [ids[p] for part in spelled for p in part]


def test_scores_join_pieces_as_the_merges_do(piece_folder):
    tokenizer = AutoTokenizer.from_pretrained(piece_folder)
    vocabulary = read_vocabulary(piece_folder, 800)
    for text in gguf_models.texts():
        text = text[:200].replace("<0x", "")
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert joined(text, vocabulary) == expected, text


def test_sentence_piece_fields(piece_folder, tmp_path):
    vocabulary = read_vocabulary(piece_folder, 802)
    fields = written(vocabulary, tmp_path / "x.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    types = fields["tokenizer.ggml.token_type"]
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert types[3:259] == [TokenType.BYTE] * 256
    assert set(types[259:800]) == {TokenType.NORMAL}
    assert fields["tokenizer.ggml.tokens"][800:] == ["[PAD800]", "[PAD801]"]
    assert types[800:] == [TokenType.UNUSED] * 2
    assert len(fields["tokenizer.ggml.scores"]) == 802 and "tokenizer.ggml.merges" not in fields
    ids = [fields[f"tokenizer.ggml.{k}_token_id"] for k in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    "scheme,prefix,notes", [("never", 0, 0), ("always", 1, 1), ("first", 1, 1)]
)
def test_metaspace_says_where_it_differs(tmp_path, scheme, prefix, notes):
    folder = gguf_models.sentence_pieces(tmp_path / "tokenizer", scheme)
    vocabulary = read_vocabulary(folder, 800)
    assert vocabulary.space_prefix == bool(prefix) and len(vocabulary.notes) == notes


def test_nfc_is_told(tmp_path, changed):
    def normalize(spec):
        spec["normalizer"] = {"type": "NFC"}

    (note,) = read_vocabulary(changed(normalize), 400).notes
    assert "NFC" in note


def test_rows_beyond_the_tokenizer_have_names_of_their_own(byte_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(byte_folder)
    tokenizer.add_tokens(["[PAD402]"])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, 404)
    assert vocabulary.tokens[400:] == ["[PAD402]", "[PAD401]", "[[PAD402]]", "[PAD403]"]
    assert len(set(vocabulary.tokens)) == 404
    assert vocabulary.types[400:] == [TokenType.USER_DEFINED, *[TokenType.UNUSED] * 3]


def test_added_tokens_and_what_they_swallow(byte_folder, tmp_path):
    from tokenizers import AddedToken

    tokenizer = AutoTokenizer.from_pretrained(byte_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken("<think>", special=False, lstrip=True)])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, 402)
    assert vocabulary.tokens[400:] == ["<|im_start|>", "<think>"]
    assert vocabulary.types[400:] == [TokenType.CONTROL, TokenType.USER_DEFINED]
    (note,) = vocabulary.notes
    assert "<think>" in note and "whitespace" in note


def test_chat_template_and_more_ends(byte_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(byte_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [400, 0]}))
    fields = written(read_vocabulary(tmp_path, 401), tmp_path / "x.gguf")
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.eot_token_id"] == 400
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 400, 7, 8]}))
    vocabulary = read_vocabulary(tmp_path, 401)
    assert (vocabulary.special["eot"], vocabulary.special["eom"]) == (400, 7)
    assert "[400, 7, 8]" in vocabulary.notes[0]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 400}))
    vocabulary = read_vocabulary(tmp_path, 401)
    assert (vocabulary.special["eos"], vocabulary.special["eot"]) == (0, 400)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json cannot be read"):
        read_vocabulary(tmp_path, 401)


def pre_tokenizer(**step):
    return lambda spec: spec.update(pre_tokenizer=step)


def model(**keys):
    return lambda spec: spec["model"].update(keys)


def template(ids):
    """A post-processor that puts a token before or behind a text."""
    parts = [{"SpecialToken": {"id": i, "type_id": 0}} for i in ids]
    parts = [parts[0], {"Sequence": {"id": "A", "type_id": 0}}, *parts[1:]]
    known = {i: {"id": i, "ids": [{END: 0, PAD: 1}[i]], "tokens": [i]} for i in ids}
    made = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": known}
    return lambda spec: spec.update(post_processor=made)


def interleave(spec):
    merges = spec["model"]["merges"]
    first = next(
        i for i, m in enumerate(merges) if m[0] + m[1] == merges[i + 1][0] + merges[i + 1][1]
    )
    merges.append(merges.pop(first))


def forget(spec):
    """Merges as training finds them: one for each piece."""
    seen = {"".join(pair): pair for pair in reversed(spec["model"]["merges"])}
    spec["model"]["merges"] = list(reversed(seen.values()))


DIGITS_BY_THREE = {"type": "Split", "pattern": {"Regex": r"\d{3}"}, "behavior": "Isolated"}
REFUSED = {
    r"splits by \\d\{3\} .*may be as llama.cpp's gpt-2, smollm": pre_tokenizer(
        type="Sequence",
        pretokenizers=[
            {**DIGITS_BY_THREE, "invert": False},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
        ],
    ),
    "add_prefix_space is true": pre_tokenizer(
        type="ByteLevel", add_prefix_space=True, trim_offsets=True
    ),
    "ignore_merges: True": model(ignore_merges=True),
    "Whitespace.*may be ByteLevel": pre_tokenizer(type="Whitespace"),
    "not byte-level": lambda spec: spec.update(pre_tokenizer=None),
    "normalizer Lowercase": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "dropout is 0.1": model(dropout=0.1),
    "no token <0x00>": model(byte_fallback=True),
    "puts .* around a text": template([PAD]),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_llama_cpp_does_not_have_is_refused(changed, match):
    folder = changed(REFUSED[match])
    with pytest.raises(ValueError, match=match) as error:
        read_vocabulary(folder, 400)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change,match",
    [
        (interleave, "are not next to each other"),
        (forget, "which the merges do not have"),
        (lambda spec: spec.update(normalizer={"type": "NFKC"}), "not SentencePiece's; may be"),
        (model(ignore_merges=True), "ignore_merges is true"),
    ],
)
def test_merges_that_scores_cannot_tell_are_refused(changed, change, match):
    folder = changed(change, pieces=True)
    with pytest.raises(ValueError, match=match) as error:
        read_vocabulary(folder, 800)
    assert "\n" not in str(error.value)


def test_other_models_than_bpe_are_refused(tmp_path):
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    folder = gguf_models.save(unigram, tmp_path / "x", unk_token="<unk>", eos_token="<unk>")
    with pytest.raises(ValueError, match="model is Unigram; may be BPE"):
        read_vocabulary(folder, 400)


def test_folders_without_a_fast_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json; .*save_pretrained"):
        read_vocabulary(tmp_path, 400)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match="has no tokenizer.json, only tokenizer.model"):
        read_vocabulary(tmp_path, 400)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_vocabulary(tmp_path, 400)


def test_more_tokens_than_embeddings_are_refused(byte_folder):
    with pytest.raises(ValueError, match=r"has id 399.*has 390 embeddings.*embeddings\(400\)"):
        read_vocabulary(byte_folder, 390)


def test_a_tokenizer_without_an_end_is_refused(byte_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(byte_folder / "tokenizer.json"))
    folder = gguf_models.save(tokenizer, tmp_path / "x", pad_token=PAD)
    with pytest.raises(ValueError, match="no eos_token"):
        read_vocabulary(folder, 400)
