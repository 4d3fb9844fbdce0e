"""Compiles the kernels for CPUs once, so that no job waits for a compiler.

    python -m jobs.build_kernels

numba compiles a function at its first call and keeps the code beside the sources; each process that
finds none compiles for itself. Takes 20 to 40 seconds the first time; later calls find it done.

So is the C++ op for quantized layers on CPUs, which needs g++ and takes 15 seconds. Where it cannot
be built nothing fails: layers then use torch's own kernels, and say so.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from quant.kernels import native
from quant.methods import quantize_weight
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import decode, encode
from trainer.logits.records import Coding, Draws, Records

ROWS, IDS, VOCABULARY = 8, 4, 16


def build() -> None:
    """Calls every kernel of the logit cache's codec and of hqq's search, with the types of jobs."""
    ids = np.tile(np.arange(IDS), (ROWS, 1))
    log_probs = np.full((ROWS, IDS), np.log(0.2), np.float32)
    tails = np.full((ROWS, 1), np.log(0.2), np.float32)
    for item, coding in (
        (Records(ids, log_probs, tails), Coding("topk", VOCABULARY, IDS)),
        (
            Records(ids, log_probs, tails, -log_probs[:, 0], log_probs[:, 0]),
            Coding("exact", VOCABULARY, IDS),
        ),
        (Draws(ids.astype(np.int32)), Coding("sample", VOCABULARY, IDS, temperatures=())),
    ):
        book = fit_codebook(coding, [item], None)
        decode(encode(item, book), book)
    # With these all of its loops are met: large errors, and two steps with equal ones.
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        quantize_weight(weight, bits, 64)


if __name__ == "__main__":
    build()
    if reason := native.unavailable():
        print(f"quantized layers will use torch's own kernels: {reason}", file=sys.stderr)
