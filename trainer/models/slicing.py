"""A student made of evenly kept layers of its teacher.

What is left of a model after layers are taken out is a good start for learning the rest again
(ShortGPT, Men et al., 2024; Minitron, Muralidharan et al., 2024).
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.models.load import check_family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

if TYPE_CHECKING:  # a fault in a spec must not cost seconds of imports
    import torch

# The number of a layer in the name of a weight: model.layers.3.mlp.up_proj.weight, h.3.attn...
_LAYER = re.compile(r"^((?:[a-z_]+\.)*?(?:layers|h)\.)(\d+)(\..+)$")


def kept_layers(layers: int, keep: int) -> list[int]:
    """Which of `layers` are kept, evenly spread; the first, and from two on the last one too."""
    if keep == 1:
        return [0]
    # Half up in whole numbers: floats would round to even, differently from gap to gap.
    return [(2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def slice_faults(config: PreTrainedConfig, keep: int) -> list[str]:
    """One line per reason why no student of `keep` layers can be cut from this config's model."""
    layers = config.get_text_config().num_hidden_layers
    if keep > layers:
        return [
            f"student.layers: got {keep}; may be 1 to {layers}, the layers of the teacher, with "
            "init: slice"
        ]
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return [
            "student.init: got slice; may be pretrained or random: the teacher scales its "
            "attention by the number of the layer (scale_attn_by_inverse_layer_idx)"
        ]
    return []


def sliced_config(config: PreTrainedConfig, keep: int) -> PreTrainedConfig:
    """The transformers config of the student: as the teacher's, with `keep` of its layers.

    What the config says layer by layer (layer_types, no_rope_layers, ...) is kept for the kept
    ones. Raises ValueError, one line, for more layers than there are, and for a family that is not
    verified for students.
    """
    check_family("student", config, "student.init")
    if faults := slice_faults(config, keep):
        raise ValueError(faults[0])
    layers = config.num_hidden_layers
    kept = kept_layers(layers, keep)
    result = deepcopy(config)
    for name, value in vars(config).items():
        # By name, for a list of special tokens may be as long by chance.
        if isinstance(value, (list, tuple)) and len(value) == layers and "layer" in name:
            setattr(result, name, [value[i] for i in kept])
    result.num_hidden_layers = keep
    return result


def slice_model(
    folder: Path, config: PreTrainedConfig, keep: int, dtype: torch.dtype
) -> PreTrainedModel:
    """The student cut from the teacher in `folder`, whose config this is, on the CPU.

    Only weights that are kept are read. Raises ValueError, one line, if one is missing or misfits.
    """
    from transformers import AutoModelForCausalLM

    from trainer.models.load import check_loading

    made = sliced_config(config, keep)
    number = {old: new for new, old in enumerate(kept_layers(config.num_hidden_layers, keep))}
    kind: Any = AutoModelForCausalLM._model_mapping[type(made)]
    model, info = kind.from_pretrained(
        None,
        config=made,
        state_dict=_read(folder, number),
        dtype=dtype,
        output_loading_info=True,
    )
    check_loading(folder, info)
    return model


def _read(folder: Path, number: dict[int, int]) -> dict[str, torch.Tensor]:
    """The checkpoint's weights but for the layers not in `number`, which gives them new numbers."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]  # which transformers prefers where both are there
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state = {}
    for file_name in names:
        with safe_open(folder / file_name, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                target: str | None = name
                if found := _LAYER.match(name):
                    new = number.get(int(found[2]))
                    target = None if new is None else f"{found[1]}{new}{found[3]}"
                if target is not None:
                    state[target] = file.get_tensor(name)
    return state
