"""Broken and hostile artifacts: every one is refused with one line that names the file."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.artifact import load_quantized, read_description
from tests.fixtures.artifacts import (
    CONFIG,
    DESCRIPTION,
    EMBEDDING,
    HEAD,
    UP,
    WEIGHTS,
    Q,
    change,
    make_sound,
    parts,
    put,
    refusal,
)

pytestmark = pytest.mark.timeout(120)  # what a file claims may not take its time

HUGE = 10**18


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def test_the_whole_one_loads(folder):
    assert load_quantized(folder).lm_head.shared is not None


# -- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_is_missing(folder, name):
    (folder / name).unlink()
    assert refusal(folder) == f"{name}: this file is missing; copy the whole folder again"
    (folder / name).mkdir()
    assert refusal(folder).startswith(f"{name}: this file is missing")


def test_the_folder_is_no_artifact_or_no_folder(folder, tmp_path):
    (folder / DESCRIPTION).unlink()
    for load in (load_quantized, read_description):
        assert refusal(folder, load).startswith(": it is no quantized model: it has no quant.json")
        assert refusal(tmp_path / "none", load).startswith(": there is no such folder")
        assert refusal(folder / CONFIG, load).startswith(": there is no such folder")


def test_a_description_of_a_gigabyte_is_not_read(folder):
    for name in (DESCRIPTION, CONFIG):
        whole = (folder / name).read_bytes()
        with (folder / name).open("r+b") as file:
            file.truncate(1 << 30)  # a hole: it takes no disk
        assert refusal(folder).startswith(f"{name}: it has 1073741824 bytes, and may have 16777216")
        (folder / name).write_bytes(whole)


# -- quant.json as JSON --------------------------------------------------------------------------

NOT_JSON = {
    "empty": b"",
    "cut short": b'{"format": 2, "spec": {"bi',
    "no text": b"\xff\xfe\x00\x01",
    "a list": b"[2]",
    "a number": b"2",
    "nested deeply": b'{"meta":' + b"[" * 100_000,
    "nan": b'{"format": NaN}',
    "infinity": b'{"format": 1e999}',
    "a key twice": b'{"format": 2, "format": 2}',
    "an integer of 5,000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "two objects": b"{}{}",
}


@pytest.mark.parametrize("name", [DESCRIPTION, CONFIG, "generation_config.json"])
@pytest.mark.parametrize("data", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_object(folder, name, data):
    (folder / name).write_bytes(data)
    said = r"is no valid JSON \(.*\)|nests too deeply|holds .*; must be a JSON object"
    assert re.match(f"{name}: the file ({said})", refusal(folder))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "it has no format, must be the number 2"),
        ("2", "it has format '2', must be the number 2"),
        (2.0, "it has format 2.0, must be the number 2"),
        (True, "it has format True, must be"),
        (0, "it has format 0, must be"),
        (-(10**30), "it has format -1000000000000000000000000000000, must be"),
        (1, "it has format 1, this program reads 2: quantize the model again"),
        (3, "it has format 3, this program reads 2: update stillhouse"),
        (10**30, "reads 2: update stillhouse"),
        ([2], r"it has format \[2\], must be"),
    ],
)
def test_another_format(folder, found, said):
    change(folder / DESCRIPTION, lambda it: it.update(format=found))
    if found is None:
        change(folder / DESCRIPTION, lambda it: it.pop("format") and None)
    for load in (load_quantized, read_description):
        assert re.search(said, refusal(folder, load))


# -- quant.json by its rules ---------------------------------------------------------------------

ENTRIES = [
    ("rows", HUGE, rf"layers: {UP} has {HUGE} rows and 64 columns; by the config it has \[128, 64"),
    ("rows", -1, r"rows: Input should be greater than or equal to 1 and is -1"),
    ("rows", 0, r"rows: .* and is 0"),
    ("rows", True, r"rows: Input should be a valid integer and is True"),
    ("rows", 128.0, r"rows: Input should be a valid integer and is 128\.0"),
    ("rows", "128", r"rows: Input should be a valid integer and is '128'"),
    ("rows", None, r"rows: Input should be a valid integer and is None"),
    ("rows", 10**4000, r"layers|rows"),
    ("columns", HUGE * 32, r"columns; by the config it has \[128, 64\]"),
    ("columns", 63, "63 columns are not offered; must be a multiple of 8"),
    ("columns", -64, "columns: "),
    ("bits", 7, "7 bits are not offered; may be"),
    ("bits", 99, "99 bits are not offered"),
    ("bits", -4, "-4 bits are not offered"),
    ("bits", True, "bits: Input should be a valid integer"),
    ("bits", 8, r"tensor .*up_proj\.codes has shape \[128, 32\], must have \[128, 64\]"),
    ("group_size", 24, "group_size 24 does not divide the 64 columns"),
    ("group_size", 0, "group_size: .* and is 0"),
    ("group_size", -32, "group_size: .* and is -32"),
    ("group_size", HUGE, f"group_size {HUGE} does not divide"),
    ("group_size", "channel", "group_size: Input should be a valid integer"),
    ("group_size", 64, r"tensor .*up_proj\.(scale|zero) has shape \[128, 2\], must have \[128, 1"),
    ("kind", "embedding", f"layers: {UP} is a Linear, not of kind embedding"),
    ("kind", "lstm", "kind: Input should be 'linear' or 'embedding' and is 'lstm'"),
    ("bias", True, f"layers: {UP} has bias True, the config differs"),
    ("bias", "no", "bias: Input should be a valid boolean"),
    ("activations", "int8", "activations in int8 go with 8 bits and one group per row, not 4 bits"),
    ("activations", "int4", "activations: Input should be 'int8' and is 'int4'"),
    ("method", "__import__('os')", "method: Input should be 'hqq', 'rtn' or 'int8-dynamic'"),
    ("scale", 1, "scale: Extra inputs are not permitted and is 1"),
]


@pytest.mark.parametrize(("key", "value", "said"), ENTRIES)
def test_a_layer_that_cannot_be(folder, key, value, said):
    change(folder / DESCRIPTION, lambda it: it["layers"][UP].update({key: value}))
    assert re.search(said, refusal(folder))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.7.mlp.up_proj", r"model\.layers\.7\.mlp\.up_proj is no module of a Llama"),
        ("model.layers.0.mlp", "model.layers.0.mlp is a LlamaMLP, not of kind linear"),
        ("model", "model is a LlamaModel, not of kind linear"),
        ("model.norm", "model.norm is a LlamaRMSNorm, not of kind linear"),
        ("../../etc/passwd", r"'../../etc/passwd' is no name; must be like"),
        ("", "'' is no name"),
        ("a\nb", r"'a\\nb' is no name"),
        ("x" * 100_000, "is no name"),
        ("model..mlp", "is no name"),
        ("__class__", "__class__ is no module"),
        ("forward", "forward is no module"),
        ("model.layers.0.mlp.up_proj.weight", "is no module"),
    ],
)
def test_a_layer_of_another_name(folder, name, said):
    change(folder / DESCRIPTION, lambda it: it["layers"].update({name: it["layers"].pop(UP)}))
    assert re.search(said, refusal(folder))


TOP = [
    ("layers", {}, "layers: Dictionary should have at least 1 item"),
    ("layers", [], "layers: Input should be (a valid dictionary|an object) and is"),
    ("layers", {UP: 3}, "layers.model.layers.0.mlp.up_proj: Input should be"),
    ("spec", None, "spec: Input should be"),
    ("dtype", "os.system", "dtype: Input should be 'bfloat16', .* and is 'os.system'"),
    ("dtype", "int8", "dtype: Input should be"),
    ("dtype", "float8_e4m3fn", "dtype: Input should be"),
    ("dtype", 3, "dtype: Input should be"),
    ("tied", {HEAD: "nowhere"}, f"tied: {HEAD} must lead to an embedding in layers"),
    ("tied", {HEAD: HEAD}, f"tied: {HEAD}"),
    ("tied", {HEAD: UP}, f"tied: {HEAD} must lead to an embedding"),
    ("tied", {EMBEDDING: HEAD, HEAD: EMBEDDING}, "tied: "),
    ("tied", {"a": "b", "b": "c", "c": "a"}, "tied: a leads to b, which is tied itself"),
    ("tied", {"a": "a"}, "tied: a leads to a, which is tied itself"),
    ("tied", {}, r"tensor lm_head\.(codes|scale|zero) is missing"),
    ("tied", {HEAD: EMBEDDING, "a.b": "model.norm.weight"}, "tied: a.b is no tensor of a Llama"),
    ("tied", {HEAD: EMBEDDING, "model.norm.weight": "x"}, "tied: x is no tensor of a Llama"),
    ("tied", {HEAD: EMBEDDING, "model.norm": UP}, "model.norm is a LlamaRMSNorm, not of kind"),
    (
        "tied",
        {HEAD: EMBEDDING, f"{Q}.bias": "model.norm.weight"},
        "tied: .*q_proj.bias is no tensor of",
    ),
    ("tied", {HEAD: 3}, "tied.lm_head: Input should be a valid string"),
    ("computed", {"model.norm.weight": "float32"}, "model.norm.weight is no computed buffer"),
    ("computed", {"model.config": "float32"}, "model.config is no computed buffer"),
    ("computed", {"model.rotary_emb.inv_freq": "int8"}, "inv_freq is int8, by the config"),
    ("computed", {"model.rotary_emb.inv_freq": "Tensor"}, "inv_freq: Input should be"),
    ("meta", [], "meta: Input should be"),
    ("bytes", HUGE, rf"bytes is {HUGE}, the tensors in {WEIGHTS} have \d+"),
    ("bytes", -1, "bytes: Input should be"),
    ("bytes", True, "bytes: Input should be"),
    ("parameters", 3, r"parameters is 3, the described tensors have \d+"),
    ("parameters", 0, "parameters: Input should be"),
    ("code", "import os", "code: Extra inputs are not permitted"),
    ("ky\n" * 90, 1, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("key", "value", "said"), TOP)
def test_a_description_that_cannot_be(folder, key, value, said):
    change(folder / DESCRIPTION, lambda it: it.update({key: value}))
    line = refusal(folder)
    assert re.search(said, line)
    assert "again" in line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bits", 7, "7 bits are not offered by hqq"),
        ("bits", True, "spec.bits: Input should be a valid integer"),
        ("group_size", 12, "group_size 12 is none"),
        ("group_size", "row", "spec.group_size"),
        ("method", "gptq", "spec.method: Input should be"),
        ("embeddings", 1, "spec.embeddings: Input should be a valid boolean"),
        ("sparsity", 0.5, "spec.sparsity: Extra inputs are not permitted"),
    ],
)
def test_a_spec_that_is_not_offered(folder, key, value, said):
    change(folder / DESCRIPTION, lambda it: it["spec"].update({key: value}))
    for load in (load_quantized, read_description):
        assert re.search(said, refusal(folder, load))


@pytest.mark.parametrize("key", ["spec", "dtype", "layers", "tied", "computed", "meta", "bytes"])
def test_a_key_is_missing(folder, key):
    change(folder / DESCRIPTION, lambda it: it.pop(key) and None)
    change(folder / DESCRIPTION, lambda it: it.pop(key, None) and None)
    assert f"quant.json: {key}: Field required" in refusal(folder)


def test_16_bit_ties_that_lead_nowhere(tmp_path):
    folder = make_sound(tmp_path / "model", embeddings=False)
    load_quantized(folder)
    for tied, said in (
        ({"lm_head.weight": "model.norm.weight"}, "lm_head.weight and model.norm.weight have diff"),
        ({"lm_head.weight": UP}, "layers: lm_head.weight is no module"),
        ({"lm_head.weight": f"{UP}.codes"}, "up_proj.codes is no tensor of a LlamaForCausalLM"),
        ({}, "tensor lm_head.weight is missing"),
    ):
        change(folder / DESCRIPTION, lambda it, tied=tied: it.update(tied=tied))
        assert said in refusal(folder)


# -- the weights' file ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 2000, -1, -100])
def test_weights_cut_short(folder, length):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    assert re.search(r"cannot start with a header|its tensors take|no valid JSON", refusal(folder))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length(folder, length):
    path = folder / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert refusal(folder).startswith(f"{WEIGHTS}: its ")


def test_a_huge_header_in_a_huge_file_is_not_read(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((1 << 33).to_bytes(8, "little"))
        file.truncate(1 << 34)
    assert f"cannot start with a header of {1 << 33} (at most {32 << 20})" in refusal(folder)


@pytest.mark.parametrize("text", [b"[]", b'{"a"', b"{}", b'{"a":1,"a":2}', b"\xff" * 9, b"null"])
def test_a_header_that_is_none(folder, text):
    put(folder / WEIGHTS, text, b"")
    assert re.match(rf"({WEIGHTS}|{DESCRIPTION}): (its header|bytes is)", refusal(folder))


SCALE = f"{UP}.scale"
HEADERS = [
    (SCALE, "shape", [HUGE, HUGE], "tensor .*scale of shape .* takes 2000000000"),
    (SCALE, "shape", [-128, -2], "has shape .*; must be a list of sizes"),
    (SCALE, "shape", [128, 2.0], "has shape .*; must be a list of sizes"),
    (SCALE, "shape", [True, 256], "has shape .*; must be a list of sizes"),
    (SCALE, "shape", [1] * 100_000, "has shape .*; must be a list of sizes"),
    (SCALE, "shape", [2, 128], r"has shape \[2, 128\], must have \[128, 2\]"),
    (SCALE, "shape", [256], r"has shape \[256\], must have \[128, 2\]"),
    (SCALE, "shape", "128", "has shape '128'; must be a list of sizes"),
    (SCALE, "dtype", "BF16", r"up_proj\.scale \(scale\) is torch.bfloat16, must be torch.float16"),
    (SCALE, "dtype", "I16", r"up_proj\.scale .*int16, must be torch.float16"),
    (SCALE, "dtype", "F32", "takes 1024 bytes; its data_offsets .* give 512"),
    (SCALE, "dtype", "F8_E4M3", "has dtype 'F8_E4M3'; may be BF16, BOOL"),
    (SCALE, "dtype", "os.system", "has dtype 'os.system'; may be"),
    (SCALE, "dtype", ["F16"], "has dtype .*; may be"),
    (SCALE, "data_offsets", [0, HUGE], "data_offsets .* give 1000000000000000000"),
    (SCALE, "data_offsets", [HUGE, HUGE + 512], r"starts at byte \d+; must start at \d+, where"),
    (SCALE, "data_offsets", [-512, 0], "has data_offsets .*; must be .start, end."),
    (SCALE, "data_offsets", [512, 0], "give -512"),
    (SCALE, "data_offsets", [0, 512, 0], "has data_offsets"),
    (SCALE, "more", 1, "must have dtype, shape, data_offsets"),
    ("model.norm.weight", "dtype", "I16", "must be a floating dtype"),
    (f"{Q}.bias", "dtype", "I16", "must be a floating dtype"),
]


@pytest.mark.parametrize(("name", "key", "value", "said"), HEADERS)
def test_a_tensor_that_is_not_as_described(folder, name, key, value, said):
    header, data = parts(folder / WEIGHTS)
    header[name][key] = value
    put(folder / WEIGHTS, header, data)
    line = refusal(folder)
    assert line.startswith(f"{WEIGHTS}: ") and re.search(said, line)


def test_tensors_that_overlap_leave_holes_or_lie_outside(folder):
    header, data = parts(folder / WEIGHTS)
    other = next(n for n, e in header.items() if n.endswith("zero") and e["shape"] == [128, 2])
    header[SCALE]["data_offsets"] = header[other]["data_offsets"]
    put(folder / WEIGHTS, header, data)
    assert re.search(
        r"starts at byte \d+; must start at \d+, where the one before", refusal(folder)
    )
    header, data = parts(folder / WEIGHTS)
    put(folder / WEIGHTS, {}, data)
    assert re.search(r"its tensors take 0 bytes and the file holds \d+", refusal(folder))


def test_tensors_missing_unexpected_or_renamed(folder):
    whole = load_file(folder / WEIGHTS)
    for edit, said in (
        (lambda it: it.pop(f"{UP}.zero"), "bytes is"),
        (lambda it: it.update(extra=it.pop(f"{UP}.zero")), r"up_proj\.zero is missing"),
        (
            lambda it: it.update({f"{UP}.codes": it.pop(f"{UP}.codes"), "more": torch.empty(0)}),
            "tensor more belongs to no LlamaForCausalLM as described",
        ),
        (
            lambda it: it.update({f"{HEAD}.codes": torch.empty(0)}),
            "tensor lm_head.codes belongs to no",
        ),
        (lambda it: it.update({"../x": torch.empty(0)}), "'../x' is no name of a tensor"),
    ):
        tensors = dict(whole)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)
        assert re.search(said, refusal(folder))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [f"{UP}.scale", f"{EMBEDDING}.zero"])
def test_a_scale_or_zero_that_is_not_finite(folder, name, value):
    tensors = load_file(folder / WEIGHTS)
    tensors[name][1, 1] = value
    save_file(tensors, folder / WEIGHTS)
    assert f"{WEIGHTS}: {name} is not finite everywhere" in refusal(folder)


def test_metadata_that_is_none(folder):
    header, data = parts(folder / WEIGHTS)
    put(folder / WEIGHTS, {**header, "__metadata__": {"format": 3}}, data)
    assert "__metadata__ is {'format': 3}; must map names to texts" in refusal(folder)


# -- config.json ---------------------------------------------------------------------------------

CONFIGS = [
    ("num_hidden_layers", 10**9, rf"num_hidden_layers is {10**9}, may be at most \d+ where the"),
    ("num_hidden_layers", 900, "far more tensors than the weights' file"),
    ("num_hidden_layers", 2, r"tensor model\.layers\.1\..* is missing"),
    ("num_hidden_layers", "two", "transformers cannot"),
    ("num_labels", 10**9, "num_labels is 1000000000, may be at most"),
    ("vocab_size", HUGE, "(by the config it has|cannot build)"),
    ("vocab_size", 257, r"by the config it has \[257, 64\]"),
    ("vocab_size", -1, "transformers cannot"),
    ("hidden_size", HUGE, "(by the config it has|cannot)"),
    ("hidden_size", 10**7, "(by the config it has|cannot)"),
    ("intermediate_size", 10**12, "by the config it has"),
    ("head_dim", 10**9, "head_dim is 1000000000, may be at most"),
    ("num_attention_heads", 0, "(transformers cannot|by the config)"),
    ("model_type", "none_such", "transformers cannot read it"),
    ("model_type", None, "model_type is None; must be a name"),
    ("model_type", "vit", "cannot build a causal language model"),
    ("model_type", "gpt2", "no module of a GPT2LMHeadModel"),
    ("hidden_act", "os.system", "cannot build a causal language model"),
    ("rope_parameters", {"rope_type": "none"}, "transformers cannot"),
    ("rope_parameters", [1], "transformers cannot"),
    ("auto_map", {"AutoConfig": "evil.Config"}, "auto_map is .*: it asks for code from elsewhere"),
    ("auto_map", {}, "asks for code from elsewhere"),
    ("_attn_implementation", "evil/kernel", "asks for code from elsewhere, which is never run"),
    ("attn_implementation", "evil/kernel", "asks for code from elsewhere, which is never run"),
    ("text_config", {"auto_map": {}}, "asks for code from elsewhere"),
    ("layer_types", ["full_attention"] * 3, "transformers cannot"),
]


@pytest.mark.parametrize(("key", "value", "said"), CONFIGS)
def test_a_config_that_does_not_belong(folder, key, value, said):
    change(folder / CONFIG, lambda it: it.update({key: value}))
    line = refusal(folder)
    assert re.match(rf"({CONFIG}|{DESCRIPTION}|{WEIGHTS}): ", line) and re.search(said, line)


def test_tables_of_a_size_that_no_file_bounds(folder):
    """Computed buffers are in no file: GPT-J has one row of a table for each position."""
    sizes = {"n_positions": 10**7, "n_layer": 1, "n_embd": 64, "n_head": 4, "rotary_dim": 16}
    (folder / CONFIG).write_text(json.dumps({"model_type": "gptj", "vocab_size": 256, **sizes}))
    said = (
        "config.json: it asks for 640000000 bytes of computed buffers; at most 268435456 are made"
    )
    assert refusal(folder).startswith(said)


def test_code_beside_the_config_is_never_run(folder, tmp_path):
    flag = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w')\n")
    change(
        folder / CONFIG,
        lambda it: it.update(
            auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil"
        ),
    )
    assert "auto_map" in refusal(folder)
    assert not flag.exists()


def test_a_generation_config_that_asks_for_code(folder):
    change(folder / "generation_config.json", lambda it: it.update(custom_generate="evil/repo"))
    assert "code from elsewhere is never run" in refusal(folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_length": "long"}))
    try:
        load_quantized(folder)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("value", ["x", [[1]], [1, "x"], 1.5, True, {"a": 1}])
@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id", "bos_token_id"])
def test_special_tokens_that_are_no_ids(folder, key, value):
    change(folder / "generation_config.json", lambda it: it.update({key: value}))
    assert re.match(f"generation_config.json: {key} is .*; must be a token id", refusal(folder))


@pytest.mark.parametrize("value", [None, 3, -1, [3], [3, 4]])
def test_special_tokens_that_are_ids(folder, value):
    change(folder / "generation_config.json", lambda it: it.update(eos_token_id=value))
    assert load_quantized(folder).generation_config.eos_token_id == value


def test_a_pipe_in_place_of_a_file_does_not_hang(folder):
    for name in (DESCRIPTION, WEIGHTS, CONFIG):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refusal(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(whole)
