"""The rules behind the spec's `auto` values of training."""

from __future__ import annotations

import math


def auto_learning_rate(init: str, width: int) -> float:
    """Rule for `learning_rate: auto`.

    From random weights 1e-3 at width 768, falling with the square root of the width, at most 3e-3;
    full fine-tuning of pretrained weights 2e-5.
    """
    return 2e-5 if init == "pretrained" else min(3e-3, 1e-3 * math.sqrt(768 / width))


def auto_micro_batch(sequence_length: int) -> int:
    """Rule for `micro_batch: auto`: as many sequences as 16,384 tokens hold, at least one."""
    return max(1, 16384 // sequence_length)
