"""Extra memory of the fused head and losses, against plain PyTorch over all logits.

    python -m tests.bench.loss_memory [float32|bfloat16]

prints JSON: bytes beyond the inputs at the peak of one forward and backward pass, each in a fresh
process, and their ratio. Inputs: hidden states, weight of the head, records of the teacher.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

TOKENS, WIDTH, VOCAB, KEPT = 2048, 512, 128_256, 64


def dense_bytes(dtype: str = "float32") -> int:
    """Of the KL to a sparse target, through log-softmax of all logits in float32 and autograd."""
    return _in_fresh_process("dense", dtype)


def fused_bytes(dtype: str = "float32") -> int:
    """Of the same KL through `fused_loss`."""
    return _in_fresh_process("fused", dtype)


def _in_fresh_process(kind: str, dtype: str) -> int:
    command = [sys.executable, "-m", "tests.bench.loss_memory", kind, dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at its highest) of this process in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) << 10


def _measure(kind: str, dtype: str) -> int:
    import torch

    from trainer.losses.divergences import ForwardKL, Target
    from trainer.losses.fused_linear import fused_loss
    from trainer.models.head import Head

    def run(tokens: int, vocab: int) -> int:
        """Bytes that one pass adds to what its inputs take."""
        hidden = torch.randn(tokens, WIDTH, dtype=getattr(torch, dtype)).requires_grad_()
        weight = torch.randn(vocab, WIDTH, dtype=hidden.dtype).mul_(0.05).requires_grad_()
        ids = torch.randint(vocab, (tokens, KEPT)).sort(dim=1).values
        log_probs = torch.full((tokens, KEPT), 0.8 / KEPT).log()
        tail = torch.full((tokens,), 0.2).log()
        ones = torch.full((tokens,), 1 / tokens)
        before = _resident("VmRSS")
        if kind == "fused":
            target = Target(ids[:, 0], ids, log_probs, tail)
            losses = {"forward_kl": (1.0, ForwardKL())}
            loss, _ = fused_loss(hidden, Head(weight, None, vocab), target, ones, losses)
        else:
            log_q = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
            kept = log_q.gather(1, ids)
            log_tail = torch.log1p(-kept.exp().sum(dim=1).clamp_max(0.999))
            loss = -((log_probs.exp() * kept).sum(dim=1) + tail.exp() * log_tail).mul(ones).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return _resident("VmHWM") - before

    run(64, 512)  # what libraries load at their first use is no part of it
    return run(TOKENS, VOCAB)


def main() -> None:
    """The command above."""
    if len(sys.argv) == 3:
        print(_measure(sys.argv[1], sys.argv[2]))
        return
    dtype = sys.argv[1] if len(sys.argv) > 1 else "float32"
    dense, fused = dense_bytes(dtype), fused_bytes(dtype)
    numbers = {"dense_bytes": dense, "fused_bytes": fused, "ratio": round(fused / dense, 4)}
    print(json.dumps({"dtype": dtype, **numbers}))


if __name__ == "__main__":
    main()
