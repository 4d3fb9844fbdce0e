"""A quantized model is still the transformers model that it was, and saves itself as codes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from quant.artifact import load_quantized
from quant.artifact.quantized_model import mark_quantized, quantized_class
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures.model_families import tiny

IDS = torch.arange(24).view(2, 12) * 37 % 256
SPEC = QuantSpec(4, 32)
BOTH = QuantSpec(4, 32, embeddings=True, head=True)


@pytest.fixture
def model() -> PreTrainedModel:
    """Tied, embeddings and head quantized too; float32, so that paths can be told apart."""
    return quantize(tiny("qwen3"), BOTH, dtype=torch.float32)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_it_is_still_of_its_class(model):
    assert isinstance(model, Qwen3ForCausalLM) and not isinstance(model, LlamaForCausalLM)
    kind = type(model)
    assert kind.__name__ == kind.__qualname__ == "Qwen3ForCausalLM"
    assert kind.__module__ == Qwen3ForCausalLM.__module__
    assert str(kind) == str(Qwen3ForCausalLM) and repr(model).startswith("Qwen3ForCausalLM(")
    assert model.quant_spec == BOTH
    # One class for all, so that types compare.
    assert type(quantize(tiny("qwen3"), SPEC)) is kind is quantized_class(kind)
    assert type(tiny("qwen3")) is Qwen3ForCausalLM

    class Local(Qwen3ForCausalLM):
        pass

    assert str(quantized_class(Local)) == str(Local) and "<locals>.Local" in str(Local)


def test_what_transformers_asks_of_the_class_holds_on(model):
    kind = type(model)
    assert kind.can_generate() and not kind.is_remote_code() and not kind.is_custom_code()
    assert kind.config_class is Qwen3ForCausalLM.config_class
    for name in ("_supports_sdpa", "_supports_flash_attn", "_can_compile_fullgraph"):
        assert getattr(kind, name) == getattr(Qwen3ForCausalLM, name)
    assert kind._can_set_attn_implementation()
    truth = logits(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)
    hidden = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    assert len(hidden.hidden_states) == 3 and len(hidden.attentions) == 2
    model.gradient_checkpointing_enable()


def test_its_class_makes_ordinary_models(model):
    made = type(model)(model.config)
    assert type(made) is Qwen3ForCausalLM and not hasattr(made, "quant_spec")
    assert type(type(model)._from_config(model.config)) is Qwen3ForCausalLM


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_copies_are_whole_and_their_own(model, how):
    truth = logits(model)
    if how == "deepcopy":
        made = copy.deepcopy(model)
    elif how == "pickle":
        made = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    assert type(made) is type(model) and made.quant_spec == BOTH
    assert torch.equal(logits(made), truth)
    assert made.lm_head.shared is made.model.embed_tokens  # its own, not the original's
    made.model.norm.weight.data.zero_()
    assert torch.equal(logits(model), truth)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_continues_as_forward_says(model, cache):
    ids = IDS[:1]
    made = model.generate(
        ids, max_new_tokens=4, do_sample=False, cache_implementation=cache, disable_compile=True
    )
    for _ in range(4):
        with torch.no_grad():
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
    assert torch.equal(made, ids)


def test_it_saves_itself_and_loads_again(model, tmp_path):
    truth = logits(model)
    model.save_pretrained(tmp_path / "made", max_shard_size="50GB", state_dict=None)
    made = load_quantized(tmp_path / "made", prefer="plain")
    assert torch.equal(logits(made), truth)
    assert type(made) is type(model) and made.quant_spec == BOTH
    assert made.config.architectures == ["Qwen3ForCausalLM"]
    made.save_pretrained(str(tmp_path / "again"))
    for file in (tmp_path / "made").iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    other = tmp_path / "other"
    model.save_pretrained(other, is_main_process=False)
    assert not other.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"state_dict": {"x": torch.zeros(3)}}, r"state_dict=.* cannot be honoured .* may be None"),
        ({"max_shard_size": "5GB"}, r"max_shard_size='5GB' cannot be honoured"),
        ({"push_to_hub": True}, r"push_to_hub=True cannot be honoured .* may be False"),
        ({"safe_serialization": False}, r"safe_serialization=False cannot be honoured"),
        ({"variant": "fp16"}, r"variant='fp16' cannot be honoured"),
        ({"bits": 4}, r"bits=4 cannot be honoured .* there is no such argument"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_named(model, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        model.save_pretrained(tmp_path / "made", **arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def test_what_codes_cannot_do_is_said(model):
    with pytest.raises(ValueError, match="push_to_hub: transformers cannot load"):
        model.push_to_hub("someone/something")
    with pytest.raises(ValueError, match="resize_token_embeddings: the model is quantized"):
        model.resize_token_embeddings(300)


def test_ties_are_kept_when_transformers_ties_again():
    model = quantize(tiny("llama", tie_word_embeddings=True), BOTH, dtype=torch.float32)
    truth = logits(model)
    model.tie_weights()
    model.post_init()
    assert torch.equal(logits(model), truth)


def test_marking_again_changes_the_spec_only(model):
    kind = type(model)
    assert mark_quantized(model, SPEC) is model
    assert type(model) is kind and model.quant_spec == SPEC


def test_it_compiles():
    model = quantize(tiny("qwen3", num_hidden_layers=1), BOTH, dtype=torch.float32)
    truth = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), truth)
