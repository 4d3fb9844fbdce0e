"""Which teachers can be sharded by ZeRO-3, mixtures of experts above all.

ZeRO-3 gathers a module's weights when the module is called, and all ranks of a group must gather
the same ones in the same order. An expert that is a module of its own is called only on the ranks
whose tokens chose it, and the others would wait for ever. So the module around such experts is made
a leaf: all that is in it is gathered before it runs, whoever is called. Experts held as one tensor
need nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# How configs name the number of experts.
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def check_shardable(config: Any) -> None:
    """Raises ValueError, one line, if ZeRO-3 cannot shard a model of this transformers config."""
    from trainer.models import meta_model

    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"teacher.sharding: zero3 does not work for a quantized {config.model_type}; use "
            "sharding: none on workers with enough memory"
        )
    if has_experts(config) and not _expert_modules(meta_model(config)):
        raise ValueError(
            f"teacher.sharding: zero3 does not work for {config.model_type}, a mixture of experts "
            "whose experts this version does not find; use sharding: none on workers with enough "
            "memory"
        )


def has_experts(config: Any) -> bool:
    """Whether a transformers config is of a mixture of experts."""
    text = config.get_text_config()
    return any(_count(getattr(text, name, None)) > 1 for name in COUNTS)


def _count(value: Any) -> int:
    """A number of experts; some configs give one for each layer."""
    return max(value, default=0) if isinstance(value, (list, tuple)) else int(value or 0)


def _expert_modules(model: nn.Module) -> list[nn.Module]:
    """Modules named for experts that hold weights, or hold modules that do."""
    return [
        module
        for name, module in model.named_modules()
        if "expert" in name.rpartition(".")[2].lower()
        or ("expert" in type(module).__name__.lower() and next(module.parameters(False), None))
    ]


def mark_leaves(model: nn.Module) -> list[nn.Module]:
    """Makes the modules around experts that are modules of their own leaves; returns them."""
    from deepspeed.utils import set_z3_leaf_module

    leaves = [
        module
        for module in model.modules()
        if any(
            isinstance(child, (nn.ModuleList, nn.ModuleDict)) and "expert" in name.lower()
            for name, child in module.named_children()
        )
    ]
    for module in leaves:
        set_z3_leaf_module(module, True)
    return leaves
