"""Seconds that quantizing takes per 1e9 weights, here and by hqq alone.

    python -m tests.bench.quantize_speed --rows 2048 --columns 5632 --bits 4 --threads 2

The two take turns on one matrix in one process, so that a noisy moment of the machine meets both;
the figures are medians. The codes are compared too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from torch import Tensor

from quant.methods import quantize_weight

SCALE = 0.02  # standard deviation: a language model's initial weights


def measure(
    rows: int, columns: int, bits: int, group_size: int, threads: int, repeats: int = 5
) -> dict[str, Any]:
    """Medians over `repeats` turns, on a random bfloat16 matrix; restores torch's threads.

    Returns `quantize_s_per_1e9`, `hqq_s_per_1e9` (seconds per 1e9 weights; hqq is given the matrix
    in float32 already), `speedup` (the median of the turns' ratios), `same_codes` (share of codes
    equal to hqq's) and the arguments.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        weight = (torch.randn(rows, columns) * SCALE).bfloat16()
        wide = weight.float()
        config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
        settings = config["weight_quant_params"]

        def ours() -> Tensor:
            return quantize_weight(weight, bits, group_size).codes

        def theirs() -> Tensor:
            codes, _ = Quantizer.quantize(wide, **settings, bitpack=False, device="cpu")
            return codes.view(rows, columns).to(torch.uint8)

        ours()  # compiles
        turns = [(_seconds(ours), _seconds(theirs)) for _ in range(repeats)]
        same = float((ours() == theirs()).double().mean())
    finally:
        torch.set_num_threads(before)
    per_1e9 = 1e9 / (rows * columns)
    return {
        "rows": rows,
        "columns": columns,
        "bits": bits,
        "group_size": group_size,
        "threads": threads,
        "repeats": repeats,
        "quantize_s_per_1e9": statistics.median(mine for mine, _ in turns) * per_1e9,
        "hqq_s_per_1e9": statistics.median(his for _, his in turns) * per_1e9,
        "speedup": statistics.median(his / mine for mine, his in turns),
        "same_codes": same,
    }


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        ("rows", 2048),
        ("columns", 5632),
        ("bits", 4),
        ("group-size", 64),
        ("threads", torch.get_num_threads()),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    made = measure(**vars(parser.parse_args()))
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in made.items()}))


if __name__ == "__main__":
    main()
