"""Models by name, from configs, and the head of every architecture as its own forward has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.losses.fused_linear import head_of
from trainer.models.head import check_head, last_hidden
from trainer.models.load import (
    build_model,
    count_parameters,
    find_model,
    identity,
    load_model,
    max_length,
    meta_model,
    new_config,
    read_config,
    tokenizer_identity,
    width_of,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, **SIZES},
    "mistral": {"model_type": "mistral", **SIZES},
    "gpt2, with dropout": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma2, soft-capped": {
        "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5, **SIZES,
    },
    "cohere, scaled": {"model_type": "cohere", "logit_scale": 0.0625, **SIZES},
    "granite, scaled": {"model_type": "granite", "logits_scaling": 8.0, **SIZES},
    "phi, with a bias": {"model_type": "phi", **SIZES},
}  # fmt: skip


class Tokens:
    """As much of a tokenizer as a config needs."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def get_vocab(self) -> dict[str, int]:
        return {"last": 50 - 1}


def config_of(values: dict[str, Any] | str, length: int = 64) -> Any:
    return new_config("student.config", values, Tokens(), length)


def random_model(values: dict[str, Any], seed: int = 1) -> Any:
    return build_model(
        folder=None, config=config_of(values), init="random", dtype=torch.float32, seed=seed
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model(LLAMA).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_our_head_gives_the_models_own_logits(kind) -> None:
    model = random_model(ARCHITECTURES[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if parameter.ndim > 1 or "lm_head" in name else 0.1)
    check_head(model, 50)
    ids = torch.randint(50, (2, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]] * 2)
    model.eval()
    with torch.no_grad():
        own = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        ours = head_of(model).logits(last_hidden(model, ids, positions))
    assert own.abs().max() > 0.04
    torch.testing.assert_close(ours, own.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_a_model_in_training_is_left_in_training() -> None:
    model = random_model(ARCHITECTURES["gpt2, with dropout"]).train()
    check_head(model, 50)
    assert model.training
    assert not check_head(model.eval(), 50) and not model.training


def test_a_head_that_is_not_understood_is_refused() -> None:
    model = random_model(LLAMA)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) + 1.0
    with pytest.raises(ValueError, match="LlamaForCausalLM makes its logits in a way"):
        check_head(model, 50)


def test_rows_beyond_the_tokenizers_vocabulary_are_cut_off() -> None:
    model = random_model(LLAMA)
    assert head_of(model, 40).vocab == 40
    assert head_of(model, 400).vocab == 50
    assert head_of(model).vocab == 50


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(99)
    first = random_model(LLAMA).state_dict()
    torch.randn(7)
    again = random_model(LLAMA).state_dict()
    other = random_model(LLAMA, seed=2).state_dict()
    low = build_model(
        folder=None, config=config_of(LLAMA), init="random", dtype=torch.bfloat16, seed=1
    ).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value.bfloat16(), low[name])
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_config_is_completed_from_the_tokenizer(tmp_path) -> None:
    made = config_of(LLAMA)
    assert (made.vocab_size, made.bos_token_id, made.eos_token_id, made.pad_token_id) == (
        50, 0, 1, 2,
    )  # fmt: skip
    assert made.max_position_embeddings == max_length(made) == 64
    assert config_of({**LLAMA, "max_position_embeddings": 256}).max_position_embeddings == 256
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    assert config_of(str(file)).hidden_size == 32


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "lama"}, "student.config.model_type: transformers knows no 'lama'"),
        ({"hidden_size": 8}, "student.config.model_type: transformers knows no None"),
        ({"model_type": "bloom"}, "student.config.model_type: got a model of type bloom; may be"),
        ({**LLAMA, "hidden_sise": 8}, "student.config: llama knows no hidden_sise"),
        ("/no/such/config.json", "student.config: /no/such/config.json cannot be read"),
    ],
)
def test_a_wrong_config_is_one_line(values, message) -> None:
    with pytest.raises(ValueError) as error:
        config_of(values)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parameters_are_counted_without_memory() -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    for values in (LLAMA, tied):
        model, meta = random_model(values), meta_model(config_of(values))
        assert all(parameter.is_meta for parameter in meta.parameters())
        assert count_parameters(meta) == count_parameters(model)
        assert count_parameters(model) == sum(p.numel() for p in model.parameters())
    difference = count_parameters(random_model(LLAMA)) - count_parameters(random_model(tied))
    assert difference == 50 * 32


def test_a_folder_loads_as_it_was_saved(folder) -> None:
    expected = random_model(LLAMA).state_dict()
    found = load_model(find_model("teacher.model", str(folder)), torch.float32)
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert load_model(folder, torch.bfloat16).dtype == torch.bfloat16
    assert read_config(folder).hidden_size == width_of({"hidden_size": 32}) == 32


def test_missing_weights_are_refused_not_made_up(folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    taken = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys \['model.layers.1.mlp.up_proj.weight'\]"):
        load_model(tmp_path / "model", torch.float32)
    save_file({**state, "module.x": taken}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit the model"):
        load_model(tmp_path / "model", torch.float32)


def test_a_model_that_is_not_there_is_one_line_that_names_the_key(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "none"), "is no folder; give a folder, a URL, or a hub id"),
        (str(tmp_path / "empty"), "holds no config.json"),
        ("memory://no/such", "holds no config.json"),
        ("just-a-name", "is no folder"),
    ):
        with pytest.raises(ValueError) as error:
            find_model("teacher.model", name)
        assert str(error.value).startswith("teacher.model: ") and message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_hub_model_that_cannot_be_read_is_one_line(monkeypatch, tmp_path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError) as error:
        find_model("student.model", "nobody/nothing", "v2")
    assert str(error.value).startswith("student.model: 'nobody/nothing' (revision v2) is neither")
    assert "\n" not in str(error.value)


def test_a_model_at_a_url_is_fetched_with_its_weights(folder) -> None:
    from cluster.storage import open_store

    store = open_store("memory://models/small")
    store.upload_folder(folder, "")
    found = find_model("teacher.model", store.url)
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_identity_is_of_weights_and_config(folder, tmp_path) -> None:
    first = identity(folder, "small")
    assert first == identity(folder, "another name")
    shutil.copytree(folder, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert identity(copy, "small") == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert identity(copy, "small") == first
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert identity(copy, "small")["config"] != first["config"]
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert identity(copy, "small")["weights"] != first["weights"]


def test_identity_of_a_hub_snapshot_is_its_commit(folder, tmp_path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    found = identity(snapshot, "a/b")
    assert found["revision"] == "0123abcd" and "weights" not in found


def test_tokenizer_identity_has_the_chat_template(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    plain = tokenizer_identity(tmp_path / "copy")
    assert plain == tokenizer_identity(folder)
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_identity(tmp_path / "copy")["chat_template"] != plain["chat_template"]
    (tmp_path / "copy" / "tokenizer.json").write_text('{"a": 1}')
    assert tokenizer_identity(tmp_path / "copy")["tokenizer"] != plain["tokenizer"]


def test_training_never_imports_ray() -> None:
    """A GPU machine under torchrun may have no Ray, and no jobs floor to call."""
    import subprocess
    import sys

    code = (
        "import sys, pkgutil, importlib, trainer\n"
        "for item in pkgutil.walk_packages(trainer.__path__, 'trainer.'):\n"
        "    importlib.import_module(item.name)\n"
        "bad = {'ray', 'jobs', 'quant', 'wandb'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_rotary_frequencies_stay_float32_in_bfloat16_training(folder) -> None:
    """What is trained must be what `from_pretrained` gives back: the saved model's function."""
    import torch

    made = build_model(folder=folder, config=None, init="random", dtype=torch.bfloat16, seed=3)
    buffers = dict(made.named_buffers())
    assert buffers and all(buffer.dtype == torch.float32 for buffer in buffers.values())
    assert all(parameter.dtype == torch.bfloat16 for parameter in made.parameters())


def test_snapshots_of_the_users_own_are_known_by_their_weights(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "snapshots" / "best")
    assert "weights" in identity(tmp_path / "snapshots" / "best", "best")


def test_another_end_of_text_is_another_tokenizer(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert tokenizer_identity(tmp_path / "copy") != tokenizer_identity(folder)
