"""Bits and group size layer by layer within a number of bytes: bit allocation.

    options = layer_options(model, QuantSpec(4, 64), [(4, 64), (3, 64), (2, 32)])
    losses = {}
    for shard in shards_of(options, tasks):                  # anywhere, each with its own model
        losses |= sensitivity(model, reference, batches, shard)
    kl = {key: found["kl"] for key, found in losses.items()}
    for allocation in candidates(options, kl, budget_bytes):
        quantize(model, base, layers=allocation.layers)      # measured whole; the best is taken

The KL of the model with one layer quantized tells what an option of that layer costs; a knapsack
over the bytes of the file finds allocations; `neighbours` of the best one are a hill climb's next
ones; `uniform_controls` says which uniform models an allocation must beat.
"""

from __future__ import annotations

from quant.allocation.candidates import Allocation, candidates, neighbours, uniform_controls
from quant.allocation.options import Option, Options, layer_options, uniform_bytes
from quant.allocation.sensitivity import sensitivity, shards_of

__all__ = [
    "Allocation",
    "Option",
    "Options",
    "candidates",
    "layer_options",
    "neighbours",
    "shards_of",
    "sensitivity",
    "uniform_bytes",
    "uniform_controls",
]
