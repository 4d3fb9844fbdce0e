"""KL of a model with one layer quantized, and the work in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.allocation import layer_options, sensitivity, shards_of
from quant.evaluation.evaluate import evaluate
from quant.layers.linear import dense_weights
from quant.methods import quantize_weight
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures.model_families import tiny

CHOICES = [(4, 64), (2, 32)]


def pieces(options) -> list:
    return [piece for part in shards_of(options, 1) for piece in part]


def scaled(family: str, **changes):
    """A tiny bfloat16 model of a family that is not indifferent to its layers."""
    model = tiny(family, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(4)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "changes", "ends"),
    [
        ("llama", {"tie_word_embeddings": True}, (True, True)),
        ("llama", {}, (True, True)),
        ("gpt2", {}, (False, False)),
    ],
)
def test_it_is_the_kl_of_the_model_quantized_in_that_layer(batches, family, changes, ends):
    base = QuantSpec(4, 64, "hqq", *ends)
    model, reference = scaled(family, **changes), scaled(family, **changes)
    work = pieces(layer_options(model, base, CHOICES))
    found = sensitivity(model, reference, lambda: iter(batches), work)
    assert set(found) == {(name, option.key) for name, option in work}
    for name, option in work:
        alone = quantize(scaled(family, **changes), base, {name: option.spec, "*": None})
        with dense_weights(alone, alone.dtype):
            expected = evaluate(alone, batches, reference)
        one = found[name, option.key]
        # GPT-2's own layers and ours multiply in another order.
        near = 0 if family == "llama" else 1e-3
        assert one["kl"] == pytest.approx(expected["kl_to_reference"], rel=near, abs=near)
        assert one["tokens"] == expected["per_sequence"]["tokens"]
        assert np.allclose(one["sums"], expected["per_sequence"]["kl_to_reference"], near, near)
        assert one["kl"] == pytest.approx(sum(one["sums"]) / sum(one["tokens"]))
        assert one["kl"] > 0


def test_it_is_the_kl_in_float64(make_llama, batches, whole_log_probs):
    name = "model.layers.1.mlp.up_proj"
    options = layer_options(make_llama(), QuantSpec(3, 32), [(3, 32)])
    work = [piece for piece in pieces(options) if piece[0] == name]
    found = sensitivity(make_llama(), make_llama(), batches, work)[name, "3b-g32"]
    changed = make_llama()
    layer = changed.get_submodule(name)
    layer.weight.copy_(quantize_weight(layer.weight, 3, 32).dequantize())
    for at, batch in enumerate(batches):
        before, after = whole_log_probs(make_llama(), batch), whole_log_probs(changed, batch)
        kl = (before.exp() * (before - after)).sum(-1).numpy() * batch.loss_mask
        first = 3 * at
        assert np.allclose(found["sums"][first : first + len(kl)], kl.sum(1), rtol=1e-4)


def test_the_model_is_afterwards_what_it_was(make_llama, batches):
    model = make_llama(tied=True)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    options = layer_options(model, QuantSpec(2, 32, "rtn", True, True), [(2, 32)])

    def unchanged() -> bool:
        return all(
            p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
            for name, p in model.named_parameters()
        )

    sensitivity(model, make_llama(tied=True), batches, pieces(options))
    assert unchanged() and model.lm_head.weight is model.model.embed_tokens.weight

    def broken():
        yield batches[0]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        sensitivity(model, make_llama(tied=True), broken, pieces(options))
    assert unchanged()


def test_two_parameters_of_one_memory_are_one_weight(make_llama, batches):
    base = QuantSpec(2, 32, "rtn", True, True)

    def twofold():
        model = make_llama(tied=True)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data, requires_grad=False)
        return model

    found = []
    for make in (lambda: make_llama(tied=True), twofold):
        options = layer_options(make(), base, [(2, 32)])
        found.append(sensitivity(make(), make(), batches, pieces(options)))
    assert found[0] == found[1]


def test_weights_in_a_files_mapping_are_not_written_to(make_llama, batches, tmp_path):
    from trainer.models.load import load_for_inference

    make_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    model, reference = load_for_inference(str(tmp_path)), load_for_inference(str(tmp_path))
    options = layer_options(model, QuantSpec(2, 32, "rtn"), [(2, 32)])
    found = sensitivity(model, reference, batches, pieces(options)[:2])
    assert all(one["kl"] > 0 for one in found.values())
    assert evaluate(model, batches, reference)["kl_to_reference"] == 0
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_an_option_that_breaks_the_model_is_left_out(batches):
    """Weights at the edge of float16: their codes' values lie beyond it."""

    def at_the_edge():
        model = tiny("llama").half()
        block = model.model.layers[0]
        block.post_attention_layernorm.weight.fill_(1e-5)
        block.mlp.up_proj.weight.fill_(65504).view(-1, 2)[:, 0].neg_()
        return model

    options = layer_options(at_the_edge(), QuantSpec(2, 64, "rtn"), [(2, 64)])
    found = sensitivity(at_the_edge(), at_the_edge(), batches, pieces(options))
    assert len(found) == 13
    assert ("model.layers.0.mlp.up_proj", "2b-g64") not in found


def test_other_modules_that_cannot_be_quantized_are_no_hindrance(batches):
    model, reference = scaled("mixtral"), scaled("mixtral")
    options = layer_options(model, QuantSpec(3, 64, "rtn"), [(3, 64)], ["*.experts*"])
    found = sensitivity(model, reference, batches, pieces(options))
    assert len(found) == len(options.layers) == 8


def test_faults_are_one_line(make_llama, batches):
    model = make_llama()
    options = layer_options(model, QuantSpec(2, 32, "rtn"), [(2, 32)])
    with pytest.raises(ValueError, match="reference is the model itself"):
        sensitivity(model, model, batches, pieces(options))
    [option] = options.layers["model.layers.0.mlp.up_proj"][:1]
    with pytest.raises(ValueError, match="nowhere.up_proj"):
        sensitivity(model, make_llama(), batches, [("nowhere.up_proj", option)])
    model.model.layers[0].mlp.up_proj.weight[0] = torch.linspace(-1e6, 1e6, 64)
    with pytest.raises(RuntimeError, match=r"layer model.layers.0.mlp.up_proj: .*beyond float16"):
        sensitivity(model, make_llama(), batches, [("model.layers.0.mlp.up_proj", option)])


@pytest.mark.parametrize("tasks", [1, 2, 5, 1000])
def test_parts_hold_every_piece_once_and_take_about_as_long(make_llama, tasks):
    model = make_llama(vocab_size=4096)
    options = layer_options(model, QuantSpec(4, 64, "rtn", True, True), [(4, 64), (3, 64), (2, 64)])
    parts = shards_of(options, tasks)
    made = [(name, option.key) for part in parts for name, option in part]
    wanted = [(name, o.key) for name, each in options.layers.items() for o in each if o.spec]
    assert sorted(made) == sorted(wanted) and len(set(made)) == len(made) == 48
    assert len(parts) == min(tasks, 48) and all(parts)
    weights = sum(p.numel() for p in model.parameters())
    lengths = [
        sum(weights + model.get_submodule(name).weight.numel() for name, _ in part)
        for part in parts
    ]
    assert max(lengths) - min(lengths) <= weights + 4096 * 64


def test_no_task_is_refused(make_llama):
    options = layer_options(make_llama(), QuantSpec(4, 64), [(4, 64)])
    with pytest.raises(ValueError, match="tasks is 0; may be 1 or more"):
        shards_of(options, 0)
