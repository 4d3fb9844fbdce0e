"""Every path of a quantized layer's product on this processor, by rows of activations.

    python -m tests.bench.kernels       (three minutes; one thread)
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m tests.bench.kernels   (as on AVX2)

What `quant.kernels` chooses rests on it. Microseconds, the least of repeats; kept in
results/kernels/<kind>.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from quant.codes import Codes, pack
from quant.kernels.blocks import Blocks
from quant.kernels.int4 import Int4
from quant.kernels.kernel import StoredWeight
from tests.bench.docs import figure, fill, table
from tests.bench.figures import machine, result_file, tables_by_kind, write_result

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
SHAPES = ((1536, 576), (4096, 4096))  # rows, columns: one in a cache, one in memory
ROWS = (1, 2, 4, 8, 16, 512)
SECONDS = 0.05  # of each repeat


def microseconds(run: Callable[[], Any]) -> float:
    """The least of three repeats, each as long as it takes for a steady figure."""
    run()
    best = float("inf")
    for _ in range(3):
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < SECONDS or not count:
            run()
            count += 1
        best = min(best, spent / count)
    return round(best * 1e6, 1)


def paths(bits: int, rows: int, columns: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    """By name what multiplies float32 activations `[m, columns]` by one weight."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, columns // 64, generator=generator) + 0.2).half() / 15
    zero = torch.full_like(scale, (1 << bits) / 2)
    weight = Codes(codes, scale, zero, bits)
    stored = StoredWeight(pack(codes, bits), scale, zero, bits, columns)
    blocks, int4, dense = Blocks(stored), Int4(stored), weight.dequantize()
    narrow = dense.bfloat16()
    blocks.few = None
    signed = (dense / dense.abs().amax() * 127).round().to(torch.int8)
    return {
        "dense float32": lambda x: F.linear(x, dense),
        "dense bfloat16": lambda x: F.linear(x.bfloat16(), narrow),
        "dequantize + float32": lambda x: F.linear(x, blocks.dequantize(torch.float32)),
        "dequantize + bfloat16": lambda x: F.linear(
            x.bfloat16(), blocks.dequantize(torch.bfloat16)
        ),
        "torch int4, bfloat16": lambda x: int4._few(x.bfloat16()),
        "torch int4, float32": lambda x: torch._weight_int4pack_mm_for_cpu(
            torch.cat((x, x), 1) if bits > 4 else x,
            int4.packed,
            int4.group,
            int4.scales_and_zeros.float(),
        ),
        "torch int8, float32": lambda x: torch._weight_int8pack_mm(x, signed, torch.ones(rows)),
        blocks.name.partition(" to ")[0]: lambda x: blocks(x),
    }


def measure() -> dict[str, Any]:
    """`{"4 bits, 1536 x 576": {path: {rows: microseconds}}}`; paths that take seconds are left
    out for more rows."""
    found: dict[str, Any] = {}
    for bits in (4, 8):
        for rows, columns in SHAPES:
            made = found.setdefault(f"{bits} bits, {rows} x {columns}", {})
            for name, run in paths(bits, rows, columns).items():
                times: dict[str, float] = {}
                for count in ROWS:
                    if max(times.values(), default=0) > 1e5:
                        break
                    x = torch.randn(count, columns)
                    times[str(count)] = microseconds(lambda x=x, run=run: run(x))
                made[name] = times
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Microseconds of the matrix that lies in memory, for the docs."""
    rows, columns = SHAPES[-1]
    times = found["microseconds"][f"4 bits, {rows} x {columns}"]
    body = [
        [name, *(figure(each.get(str(count)), 0) for count in ROWS)] for name, each in times.items()
    ]
    heads = [f"4 bits, {rows} x {columns}, microseconds for rows:", *map(str, ROWS)]
    return {"kernels": table(heads, body)}


def main() -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = measure()
    write_result(result_file("kernels"), {"microseconds": found, "machine": machine()})
    fill(PAGE, tables_by_kind("kernels", tables))


if __name__ == "__main__":
    main()
