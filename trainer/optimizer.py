"""Optimizer and learning rate of a training."""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer.spec import DistillSpec

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


def make_optimizer(model: Any, spec: DistillSpec) -> torch.optim.AdamW:
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
