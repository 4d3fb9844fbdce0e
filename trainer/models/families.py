"""The architectures that can be trained and taught from: those that tests have verified.

Verified of a family (`tests/unit/trainer/models/test_families.py`): our head gives the model's own
logits; documents packed into one sequence are as good as apart; what is saved loads again as it
was. Of others any of these may fail in silence: bloom and opt attend across documents, for they
take no notice of positions that restart.
"""

from __future__ import annotations

from typing import Any

# By model_type of transformers configs.
STUDENTS = frozenset((
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "granite", "helium", "llama", "mistral",
    "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
    "stablelm", "starcoder2",
))  # fmt: skip
# Mixtures of experts teach; training one would need a loss that keeps its experts in balance.
TEACHERS = STUDENTS | {"granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"}


def check_family(role: str, config: Any, key: str | None = None) -> None:
    """Raises ValueError, one line, unless this config's family is verified for `role`.

    role: "student" or "teacher". key: of the spec, that names the model; `<role>.model` if not
    given. A student that is sliced from its teacher is a student by the teacher's config.
    """
    known = STUDENTS if role == "student" else TEACHERS
    kind = config.model_type
    if kind in known:
        return
    text = config.get_text_config()
    hint = ""
    if text is not config and text.model_type in known:
        hint = f" (of this model the text part alone, saved as a {text.model_type}, can be used)"
    elif kind in TEACHERS:
        hint = " (as a teacher it can be used)"
    raise ValueError(
        f"{key or f'{role}.model'}: got a model of type {kind}{hint}; may be one of "
        f"{', '.join(sorted(known))}"
    )
