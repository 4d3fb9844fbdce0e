"""The DeepSpeed configuration of a training, its losses, optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer.losses.divergences import JSD, CrossEntropy, ForwardKL, Loss, ReverseKL, SkewKL
from trainer.spec.losses import JsdSpec, SkewSpec
from trainer.spec.sections import DistillSpec

if TYPE_CHECKING:
    from torch import nn


def training_config(
    spec: DistillSpec, micro_batch: int, accumulation: int, world: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for training; master weights and gradients are float32.

    offload: cpu keeps master weights and optimizer state in host memory, where torch's own AdamW
    updates them (ZeRO-Offload, Ren et al., 2021).
    """
    zero: dict[str, Any] = {"stage": spec.zero_stage}
    if spec.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": _has_gpu()}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "zero_optimization": zero,
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": spec.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on the CPU too; DeepSpeed's needs a compiler on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
    return merged(config, spec.deepspeed)


def merged(config: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `overlay` laid over it, section by section; neither is changed."""
    result = dict(config)
    for key, value in overlay.items():
        under = result.get(key)
        if isinstance(value, Mapping):
            result[key] = merged(under if isinstance(under, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def make_losses(spec: DistillSpec) -> dict[str, Loss]:
    """The losses over distributions that ever count, by name; `hidden` is none of them."""
    made: dict[str, Loss] = {}
    for name, asked in spec.losses.used().items():
        if name == "ce":
            made[name] = CrossEntropy()
        elif name == "forward_kl":
            made[name] = ForwardKL(spec.temperature)
        elif name == "reverse_kl":
            made[name] = ReverseKL(spec.temperature)
        elif isinstance(asked, JsdSpec):
            made[name] = JSD(asked.beta, spec.temperature)
        elif isinstance(asked, SkewSpec):
            made[name] = SkewKL(asked.alpha, spec.temperature)
    return made


# Share of the peak learning rate at which cosine and linear schedules end.
FINAL_SHARE = 0.1


def learning_rate(spec: DistillSpec, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule."""
    peak = float(spec.learning_rate)
    warmup = math.ceil(spec.warmup_ratio * spec.steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, spec.steps - warmup)
    if spec.schedule == "constant":
        return peak
    if spec.schedule == "linear":
        return peak * (1 - (1 - FINAL_SHARE) * progress)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, spec: DistillSpec) -> torch.optim.AdamW:
    """AdamW of what is trained; weight decay on matrices only, adapters among them.

    Not on norms, biases and other vectors. It also runs on the CPU, for `offload: cpu`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=float(spec.learning_rate),
        betas=spec.betas,
        fused=True,
    )
