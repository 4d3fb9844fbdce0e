"""Streaming a checkpoint into a model: the same model as transformers loads, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.teacher.load import Misfit, stream_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "mixtral": {"num_local_experts": 3, "tie_word_embeddings": False},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "phi": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}


def save(folder: Path, kind: str, dtype: torch.dtype = torch.float32, shard: str = "12KB") -> Path:
    """A random model of a kind as a Hugging Face folder of several files."""
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else SIZES) | KINDS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for value in [*model.parameters(), *model.state_dict().values()]:
            if value.is_floating_point():
                value.normal_()
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def stream(folder: Path, dtype: torch.dtype = torch.float32, take: Any = None) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return stream_model(folder, config, dtype, torch.device("cpu"), take or (lambda made: None))


def edit(folder: Path, change: Any) -> Path:
    """One file with all tensors, after `change` of the mapping."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_one_that_transformers_loads(tmp_path, kind, dtype) -> None:
    folder = save(tmp_path, kind)
    assert len(list(folder.glob("*.safetensors"))) > 2
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    made = stream(folder, dtype)
    for name in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, name)()) for model in (made, wanted))
        assert ours.keys() == theirs.keys()  # tied weights are one parameter in both
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(made(ids).logits, wanted(ids).logits)
    assert not made.training
    assert made.config._attn_implementation == wanted.config._attn_implementation


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_pieces_are_no_larger_than_the_largest_parameter_and_each_comes_once(
    tmp_path, kind
) -> None:
    sizes, seen = [], []

    def take(made: list[torch.nn.Parameter]) -> None:
        sizes.append(sum(parameter.numel() for parameter in made))
        seen.extend(made)
        for parameter in made:
            assert not parameter.requires_grad
            parameter.data = torch.empty(0)  # as sharding does: the rest must still load

    model = stream(save(tmp_path, kind), take=take)
    shape = AutoModelForCausalLM.from_config(model.config)
    assert max(sizes) == max(parameter.numel() for parameter in shape.parameters())
    assert len({id(parameter) for parameter in seen}) == len(seen)
    assert {id(parameter) for parameter in seen} == {id(p) for p in model.parameters()}
    assert sum(sizes) == sum(parameter.numel() for parameter in shape.parameters())


def test_a_tied_weight_that_is_stored_twice_and_equal_is_tied(tmp_path) -> None:
    def change(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = stream(edit(save(tmp_path, "qwen3"), change))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_weight_that_is_stored_twice_and_differs_stays_apart(tmp_path) -> None:
    """As transformers has it: the checkpoint knows better than the config."""

    def change(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    folder = edit(save(tmp_path, "qwen3"), change)
    model, wanted = stream(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, wanted.lm_head.weight)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


def test_only_the_other_name_of_a_tied_weight_is_stored(tmp_path) -> None:
    def change(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    model = stream(edit(save(tmp_path, "qwen3"), change))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_missing_tensor_is_named(tmp_path, kind) -> None:
    folder = edit(save(tmp_path, kind), lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(Misfit, match=r"missing \['model.norm.weight'\] \(1 in all\)$"):
        stream(folder)


def test_a_missing_expert_is_noticed(tmp_path) -> None:
    """transformers stacks the experts that are there."""

    def change(tensors: dict) -> None:
        del tensors[next(name for name in tensors if "layers.1" in name and "experts.2.w1" in name)]

    with pytest.raises(Misfit, match="layers.1.*gate_up_proj"):
        stream(edit(save(tmp_path, "mixtral"), change))


def test_a_tensor_that_is_left_over_is_named(tmp_path) -> None:
    def change(tensors: dict) -> None:
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(3)

    with pytest.raises(Misfit, match=r"left over \['model.layers.7.mlp.up_proj.weight'\]"):
        stream(edit(save(tmp_path, "llama"), change))


def test_a_tensor_of_another_shape_is_named(tmp_path) -> None:
    def change(tensors: dict) -> None:
        tensors["model.norm.weight"] = torch.ones(33)

    with pytest.raises(Misfit, match=r"model.norm.weight is \(33,\), the model has \(32,\)"):
        stream(edit(save(tmp_path, "llama"), change))


def test_a_file_that_the_index_names_is_not_there(tmp_path) -> None:
    folder = save(tmp_path, "llama")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(Misfit, match=f"index.json names {gone.name}, which is not there"):
        stream(folder)


def test_other_files_in_the_folder_are_not_read(tmp_path) -> None:
    """Some repositories hold the same weights a second time, under their authors' names."""
    folder = save(tmp_path, "llama")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert stream(folder) is not None


def test_a_quantized_checkpoint_is_refused(tmp_path) -> None:
    folder = save(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Misfit, match="quantized"):
        stream(folder)
