"""A student's weights gathered from its engine, and written as a folder that anyone can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.student.lora import merged_state, save_adapters

if TYPE_CHECKING:
    from trainer.student.build import Built

# Where in a student's folder its adapters are, beside the weights that they are merged into.
ADAPTER = "adapter"


def student_state(built: Built, is_main: bool) -> dict[str, Tensor]:
    """What was trained, by parameter name, on rank 0's CPU; collective.

    All weights of the student, or its adapters alone. Under ZeRO-3 each parameter is gathered in
    turn, so no rank holds more than one more. Other ranks get an empty dictionary.
    """
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in built.engine.module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=None, enabled=hasattr(parameter, "ds_id")
        ):
            if is_main:
                state[name] = parameter.detach().cpu().clone()
    return state


def save(built: Built, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Writes a student as a Hugging Face folder, from what `student_state` gave; on one rank.

    Adapters are merged into the weights, which any transformers loads, and also written beside
    them as a peft folder, `adapter`, unless what is under them is no model of its own (a slice).
    Raises ValueError on a misfit.
    """
    if not built.lora:
        save_student(built.config, state, tokenizer, folder, built.generation)
        return
    model = built.untrained()
    if built.base is not None:
        save_adapters(model, state, folder / ADAPTER)
    save_student(built.config, merged_state(model, state), tokenizer, folder, built.generation)


def save_student(
    config: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path, generation: Any = None
) -> None:
    """Writes a Hugging Face folder: safetensors, config, tokenizer, generation config if given.

    The weights are put into a fresh model of the same config, so that the folder's names are the
    architecture's own whatever wrapped the model in training. Raises ValueError on a misfit.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if unexpected or left:
        raise ValueError(f"weights do not fit the config: unexpected {unexpected}, without {left}")
    model.config.dtype = next(iter(state.values())).dtype
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
