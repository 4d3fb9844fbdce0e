"""Low-rank adapters (LoRA, Hu et al., 2021) on a student's linear layers, through peft.

The adapters are put into the transformers model itself, whose class and own parameters stay; only
the adapters are trained. `W x` becomes `W x + (alpha / r) B A x`, with B = 0 before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.spec.sections import LoraSpec, StudentSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

if TYPE_CHECKING:  # torch must not be loaded to say that a spec has no adapters
    from torch import Tensor

# The name under which peft keeps the one set of adapters.
_NAME = "default"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that can have an adapter: all but the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, weights transposed

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def lora_faults(student: StudentSpec, config: PreTrainedConfig) -> list[str]:
    """One line per fault of `student.lora` for a model of this transformers config.

    Targets name linear layers; the head and the embeddings may be none, for the loss reads the
    head's weight itself.
    """
    from trainer.models.load import meta_model

    if student.lora is None or student.lora.targets == "auto":
        return []
    model = meta_model(config)
    layers = linear_layers(model)
    leaves = ", ".join(sorted({_leaf(name) for name in layers}))
    faults = []
    for target in student.lora.targets:
        if not any(_matches(name, target) for name in layers):
            what = "the output head or the embeddings" if _is_end(model, target) else "no layer"
            faults.append(
                f"student.lora.targets: got {target!r}, which is {what} of a {config.model_type}; "
                f"may be auto or a list of its linear layers: {leaves}"
            )
    return faults


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_end(model: PreTrainedModel, target: str) -> bool:
    both = [model.get_output_embeddings(), model.get_input_embeddings()]
    return any(module in both for name, module in model.named_modules() if _matches(name, target))


def add_adapters(
    model: PreTrainedModel, spec: LoraSpec, seed: int, base: str | None = None
) -> None:
    """Puts untrained adapters into `model`, which are from now on all of it that trains.

    A is drawn by `seed` in float32 and then has the dtype of the weights, so it is the same for
    every dtype, world size and ZeRO stage. base: the name of the model under them, for who
    loads them alone. Raises ValueError where a target names no linear layer.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    layers = linear_layers(model)
    wanted = [
        name
        for name in layers
        if spec.targets == "auto" or any(_matches(name, target) for target in spec.targets)
    ]
    if not wanted:
        raise ValueError(f"student.lora.targets: {spec.targets} names no linear layer")
    modules = dict(model.named_modules())
    short = {_leaf(name) for name in wanted} if spec.targets == "auto" else set(spec.targets)
    meant = [name for name in modules if any(_matches(name, target) for target in short)]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # only ever divided by r
        lora_dropout=spec.dropout,
        # Short names read better; whole ones where short ones would mean other modules too.
        target_modules=sorted(short) if set(meant) == set(wanted) else wanted,
        fan_in_fan_out=isinstance(modules[wanted[0]], Conv1D),
    )
    dtype = next(model.parameters()).dtype
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name


def merged_state(model: PreTrainedModel, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model that computes what `model` with these `adapters` does.

    By their names without adapters; W + (alpha / r) B A is made in float32 and then cast to W's
    dtype. `model`, as `add_adapters` left it, is changed.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    load_adapters(model, adapters)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.float()  # type: ignore[attr-defined]
                module.merge(safe_merge=True)  # type: ignore[attr-defined]
    return {
        name.replace(".base_layer.", "."): parameter.detach().to(dtypes[name])
        for name, parameter in model.named_parameters()
        if not is_adapter(name)
    }


def load_adapters(model: PreTrainedModel, adapters: Mapping[str, Tensor]) -> None:
    """Puts trained adapters, by parameter name, into a model that has untrained ones.

    Raises ValueError unless they are exactly the model's.
    """
    own = {name for name, _ in model.named_parameters() if is_adapter(name)}
    if own != set(adapters):
        odd = sorted(own ^ set(adapters))
        raise ValueError(f"adapters do not fit the model: {odd[:3]} ({len(odd)} in all)")
    model.load_state_dict(dict(adapters), strict=False)


def save_adapters(model: PreTrainedModel, adapters: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a peft folder, which `PeftModel.from_pretrained(base, folder)` loads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # peft's own files name the model inside its wrapper, and not the set of adapters.
    named = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value.contiguous()
        for name, value in adapters.items()
    }
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    config = model.peft_config[_NAME]
    config.inference_mode = True
    config.save_pretrained(folder)
