"""Every family that is allowed: its head, its packed documents, its folder; others are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.losses.fused_linear import head_of
from trainer.models.head import check_head, last_hidden
from trainer.models.load import STUDENTS, TEACHERS, check_family
from trainer.training.save_student import save_student

VOCAB = 50
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Windows shorter than the documents, so that a family's windows are looked at too.
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
FEW = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MORE: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {**WINDOWS, "logit_scale": 0.0625},
    "exaone4": {**WINDOWS, "head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {**WINDOWS, "head_dim": 8, "final_logit_softcapping": 0.5},
    "gemma3_text": {**WINDOWS, "head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5},
    "granitemoe": {**FEW, "logits_scaling": 8.0},
    "helium": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "mixtral": {**FEW, "sliding_window": 4},
    "olmo3": WINDOWS,
    "olmoe": FEW,
    "phi3": {"sliding_window": 4},
    "phimoe": FEW,
    "qwen2": {**WINDOWS, "use_sliding_window": True, "max_window_layers": 0},
    "qwen2_moe": {**FEW, **SMALL},
    "qwen3": {**WINDOWS, "use_sliding_window": True, "max_window_layers": 0, "head_dim": 8},
    "qwen3_moe": {**FEW, **SMALL, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 4},
}
# What each may keep of other documents: rounding, of values of about 1.
TOLERANCE = 2e-4
SPANS = ((0, 5), (5, 13), (13, 16))


def make(kind: str, seed: int = 0, **more: Any) -> Any:
    """A small random model of a family, with lively logits, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = {} if kind == "gpt2" else SIZES
    values = {"vocab_size": VOCAB, **base, **MORE.get(kind, {}), **more}
    config = AutoConfig.for_model(kind, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(b - a) for a, b in SPANS])
    return ids, positions.expand(2, -1)


@torch.no_grad()
def leak(model: Any) -> float:
    """The largest difference between documents packed and documents alone, of hidden states.

    Alone they are run without any positions: as every user of the saved model runs them.
    """
    ids, positions = tokens()
    packed = last_hidden(model, ids, positions).view(2, 16, -1)
    apart = [model.base_model(ids[:, a:b], use_cache=False).last_hidden_state for a, b in SPANS]
    return float((packed - torch.cat(apart, dim=1)).abs().max())


@pytest.mark.parametrize("kind", sorted(TEACHERS))
def test_a_family_is_what_the_training_takes_it_for(kind, tmp_path: Path) -> None:
    model = make(kind)
    check_family("student" if kind in STUDENTS else "teacher", model.config)
    check_head(model, VOCAB)
    ids, positions = tokens()
    with torch.no_grad():
        own = model(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)
        ours = head_of(model).logits(last_hidden(model, ids, positions))
    assert own.abs().max() > 0.04
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    assert leak(model) < TOLERANCE
    if kind in STUDENTS:
        saved_and_loaded(model, own, tmp_path)


def saved_and_loaded(model: Any, logits: torch.Tensor, folder: Path) -> None:
    """The folder holds the same model, for anyone."""
    from transformers import AutoModelForCausalLM

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    state = {name: value.detach() for name, value in model.named_parameters()}
    save_student(model.config, state, Tokenizer(), folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, positions = tokens()
    with torch.no_grad():
        found = again(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found.flatten(0, 1), logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    "kind, sizes", [("bloom", {"n_head": 4}), ("opt", {"word_embed_proj_dim": 32})]
)
def test_why_others_are_refused(kind, sizes) -> None:
    """The look at packed documents does find families that let them see each other."""
    model = make(kind, n_layer=2, **sizes)
    assert leak(model) > 0.1
    with pytest.raises(ValueError, match=f"student.model: got a model of type {kind}; may be one"):
        check_family("student", model.config)


@pytest.mark.parametrize(
    "role, kind, message",
    [
        ("student", "mixtral", "student.model: got a model of type mixtral (as a teacher it can"),
        ("student", "gemma3", "(of this model the text part alone, saved as a gemma3_text, can"),
        ("teacher", "gpt_oss", "teacher.model: got a model of type gpt_oss; may be one of arcee"),
        ("teacher", "t5", "teacher.model: got a model of type t5; may be one of "),
    ],
)
def test_a_refusal_is_one_line_that_names_what_may_be(role, kind, message) -> None:
    from transformers import AutoConfig

    with pytest.raises(ValueError) as error:
        check_family(role, AutoConfig.for_model(kind))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "llama" in str(error.value)
    with pytest.raises(ValueError, match=r"^student\.config\.model_type: got"):
        check_family("student", AutoConfig.for_model("t5"), "student.config.model_type")


def test_the_documentation_lists_these_families() -> None:
    text = (Path(__file__).parents[4] / "docs" / "training.md").read_text(encoding="utf-8")
    found = re.search(r"fails in\s+silence\. ([^;]*); as teachers also ([^.]*)\.", text)
    assert found is not None
    students, more = (set(re.split(r",\s+", names)) for names in found.groups())
    assert students == STUDENTS
    assert students | more == TEACHERS
