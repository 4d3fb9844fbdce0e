"""Students cut from a teacher: which layers, what config, and that weights stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.trainer.models.test_families import MORE, SIZES, VOCAB, leak
from trainer.models.slicing import kept_layers, slice_faults, slice_model, sliced_config

LAYERS = 5
KINDS = {
    "llama": {},
    "qwen2": {"layer_types": None, "max_window_layers": 1},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] + [
            "sliding_attention", "full_attention",
        ]
    },
    "smollm3": {"no_rope_layers": [1, 0, 0, 1, 1]},
    "cohere2": {"layer_types": None},
    "gpt2": {},
    "gpt_neox": {},
    "phi3": {},
}  # fmt: skip


def config_of(kind: str) -> Any:
    from transformers import AutoConfig

    base = {} if kind == "gpt2" else {**SIZES, "num_hidden_layers": LAYERS}
    values = {"vocab_size": VOCAB, **base, **MORE.get(kind, {}), **KINDS[kind]}
    if kind == "gpt2":
        values["n_layer"] = LAYERS
    return AutoConfig.for_model(kind, **values)


def make(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def blocks(model: Any) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


@pytest.mark.parametrize(
    "layers, keep, expected",
    [
        (28, 14, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]),
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (12, 5, [0, 3, 6, 8, 11]),
        (7, 3, [0, 3, 6]),
        (7, 2, [0, 6]),
        (7, 1, [0]),
        (1, 1, [0]),
    ],
)
def test_layers_are_kept_evenly(layers, keep, expected) -> None:
    assert kept_layers(layers, keep) == expected


def test_any_number_of_layers_can_be_kept() -> None:
    for layers in range(1, 81):
        assert kept_layers(layers, layers) == list(range(layers))
        for keep in range(2, layers + 1):
            kept = kept_layers(layers, keep)
            gaps = {b - a for a, b in zip(kept[:-1], kept[1:], strict=True)}
            assert len(kept) == keep and kept[0] == 0 and kept[-1] == layers - 1
            assert max(gaps) - min(gaps) <= 1 and min(gaps) > 0


@pytest.mark.parametrize("size", ["one file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_layers_are_the_teachers_bit_for_bit(kind, size, tmp_path: Path) -> None:
    """And the slice computes what the teacher does without the layers in between."""
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher = make(config_of(kind))
    teacher.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if size == "shards" else {}))
    assert (tmp_path / "model.safetensors.index.json").is_file() == (size == "shards")
    student = slice_model(tmp_path, AutoConfig.from_pretrained(tmp_path), 3, torch.float32).eval()
    kept = kept_layers(LAYERS, 3)
    assert len(blocks(student)) == student.config.num_hidden_layers == 3
    whole = dict(teacher.named_parameters())
    for name, value in student.named_parameters():
        for new, old in reversed(list(enumerate(kept))):
            name = name.replace(f".{new}.", f".{old}.") if f".{new}." in name else name
            if f".{old}." in name:
                break
        assert torch.equal(value, whole[name]), name
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    own = blocks(teacher)
    parent = next(m for m in teacher.modules() if own in m.children())
    name = next(name for name, child in parent.named_children() if child is own)
    with torch.no_grad():
        found = student(ids, use_cache=False).logits
        setattr(parent, name, torch.nn.ModuleList(own[i] for i in kept))
        parent.config = sliced_config(teacher.config, 3)  # its masks go by number too
        torch.testing.assert_close(found, teacher(ids, use_cache=False).logits, atol=0, rtol=0)
        assert leak(student) < 1e-4
        folder = tmp_path / "student"
        student.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.testing.assert_close(again(ids, use_cache=False).logits, found, atol=0, rtol=0)
        generated = again.generate(ids[:1], max_new_tokens=3, do_sample=False)  # caches by layer
        assert generated.shape == (1, 15)


def test_lists_by_layer_are_cut_and_others_are_not() -> None:
    config = config_of("smollm3")
    config.eos_token_id = [1, 2, 3, 4, 5]  # as many as layers, by chance
    made = sliced_config(config, 3)
    assert made.num_hidden_layers == 3 and config.num_hidden_layers == LAYERS
    assert made.no_rope_layers == [1, 0, 1] and config.no_rope_layers == [1, 0, 0, 1, 1]
    assert len(made.layer_types) == 3 and made.eos_token_id == [1, 2, 3, 4, 5]
    assert sliced_config(config_of("gemma3_text"), 4).layer_types == [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    ]  # fmt: skip
    assert sliced_config(config_of("gpt2"), 2).n_layer == 2


def test_more_layers_than_there_are_is_one_line() -> None:
    config = config_of("gpt2")
    assert slice_faults(config, LAYERS) == []
    (fault,) = slice_faults(config, LAYERS + 1)
    assert fault == (
        "student.layers: got 6; may be 1 to 5, the layers of the teacher, with init: slice"
    )
    with pytest.raises(ValueError, match="may be 1 to 5"):
        sliced_config(config, 6)
    config.scale_attn_by_inverse_layer_idx = True
    assert "scale_attn_by_inverse_layer_idx" in slice_faults(config, 3)[0]


def test_a_teacher_that_no_student_may_be_like_is_one_line() -> None:
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="student.init: got a model of type gemma3 .*text part"):
        sliced_config(AutoConfig.for_model("gemma3"), 2)
    with pytest.raises(ValueError, match="student.init: got a model of type mixtral"):
        sliced_config(AutoConfig.for_model("mixtral"), 2)


def test_a_layer_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = config_of("llama")
    make(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys \['model.layers.1.mlp.up_proj.weight'\]"):
        slice_model(tmp_path, config, 3, torch.float32)
    assert slice_model(tmp_path, config, 2, torch.bfloat16).dtype == torch.bfloat16
