"""Builds the C++ op for quantized layers on CPUs once, so that no job waits for a compiler.

    python -m quant.build_ops

Takes about 15 seconds the first time and needs g++; later calls find it built. Where it cannot be
built nothing fails: layers then use torch's own kernels, and say so.
"""

from __future__ import annotations

import sys

from quant.kernels import native

if __name__ == "__main__":
    if reason := native.unavailable():
        print(f"quantized layers will use torch's own kernels: {reason}", file=sys.stderr)
