"""How fast a CPU core multiplies matrices: by its instruction set, measured where it can be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.processor import DtypeName, Kind, cpu_dtype, cpu_kind

# float32 operations per second of one core, where it cannot be asked. 58.8e9 were measured in
# torch on a cloud machine with AVX2 alone, 102e9 on a Zen 4; the others follow from the width of
# their units at 2.5 GHz.
FLOAT32_FLOPS: dict[Kind, float] = {
    "avx2": 60e9,
    "avx512": 100e9,
    "avx512_bf16": 100e9,
    "amx": 130e9,
    "neon": 50e9,
    "generic": 15e9,
}
# Time of a float32 product in torch over that of the same in bfloat16. Measured: 2.1 and .33 on a
# Zen 4 with and without its bf16 instructions (512 x 512, one thread); with AVX2 alone 1/8 to 1/55.
# Of amx and neon it is assumed.
BFLOAT16_GAIN: dict[Kind, float] = {
    "avx2": 0.05,
    "avx512": 0.33,
    "avx512_bf16": 2.1,
    "amx": 8.0,
    "neon": 0.1,
    "generic": 0.05,
}
NEON_BF16_GAIN = 2.0  # of one with the instructions for it
# What numpy's BLAS must leave unused to measure what torch will use.
BLAS_CORES = {"avx2": "Haswell"}
MEASURE_LIMIT_S = 30.0


@dataclass(frozen=True)
class Core:
    """One core. kind: of its instruction set. dtype: what it is fastest in. float32: operations
    per second of a product of matrices. measured: whether on the machine itself."""

    kind: Kind
    dtype: DtypeName
    float32: float
    measured: bool

    def flops(self, dtype: DtypeName) -> float:
        """Operations per second of products in a dtype."""
        if dtype == "float32":
            return self.float32
        gain = BFLOAT16_GAIN[self.kind]
        if self.kind == "neon" and self.dtype == "bfloat16":
            gain = NEON_BF16_GAIN
        return self.float32 * gain

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kind": self.kind,
            "float32_flops": self.flops("float32"),
            "bfloat16_flops": self.flops("bfloat16"),
            "measured": self.measured,
        }


# Of a machine with GPUs that is only named.
ASSUMED = Core("avx512_bf16", "bfloat16", FLOAT32_FLOPS["avx512_bf16"], False)


def this_core() -> Core:
    """A core of this machine, measured in a quarter of a second; by the table if that fails."""
    kind = cpu_kind()
    measured = _measure(kind)
    return Core(kind, cpu_dtype(), measured or FLOAT32_FLOPS[kind], measured is not None)


def _measure(kind: Kind) -> float | None:
    """In a process of its own: this one's BLAS may have threads already."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(threads, "1")}
    if kind in BLAS_CORES:
        environment["OPENBLAS_CORETYPE"] = BLAS_CORES[kind]
    command = [sys.executable, "-P", str(Path(__file__).with_name("measure_core.py"))]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(
            command, env=environment, check=True, timeout=MEASURE_LIMIT_S,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        return float(done.stdout)
    return None


def slowest(cores: Iterable[Core]) -> Core | None:
    """The core that the others wait for; None of none."""
    return min(cores, key=lambda core: core.float32, default=None)
