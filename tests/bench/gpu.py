"""On a GPU: the fused head and loss beside plain PyTorch and Liger, and 4-bit decoding beside bf16.

    python tests/bench/gpu.py                         # on a GPU: into results/gpu/KIND.json
    python tests/bench/gpu.py --device cpu --tokens 256 --width 64 --vocab 1000    # does it run?
    python tests/bench/gpu.py --part decode           # the second part alone: see gpu_decode.py

Needs torch, transformers and safetensors alone, so that it runs on a bare GPU machine; liger-kernel
is compared where it is installed. bf16, forward and backward. Memory is the peak over the inputs.
Times are medians; all ways take turns within one run. A part that fails is named under "failed".
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.figures import read_result, result_file, write_result  # noqa: E402
from trainer.losses.divergences import JSD, CrossEntropy, ForwardKL, Loss, Target  # noqa: E402
from trainer.losses.fused_linear import fused_loss  # noqa: E402
from trainer.models.head import Head  # noqa: E402

KEPT, DRAWN = 64, 13
ROUNDS = 7


class Inputs:
    """Hidden states, head weight, and a teacher's signal of every kind, on the device."""

    def __init__(self, tokens: int, width: int, vocab: int, device: torch.device) -> None:
        made = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=made) * scale
            return values.to(device, torch.bfloat16)

        self.device, self.vocab = device, vocab
        self.hidden = normal(tokens, width).requires_grad_()
        self.weight = normal(vocab, width, scale=width**-0.5).requires_grad_()
        self.teacher_hidden = normal(tokens, width)
        self.teacher_weight = normal(vocab, width, scale=width**-0.5)
        self.labels = torch.randint(vocab, (tokens,), generator=made).to(device)
        self.ones = torch.full((tokens,), 1.0 / tokens, device=device)
        ids = torch.stack(
            [torch.randperm(vocab, generator=made)[:KEPT] for _ in range(min(tokens, 64))]
        )
        ids = ids.repeat(-(-tokens // len(ids)), 1)[:tokens]
        logits = torch.randn(tokens, KEPT + 1, generator=made).log_softmax(-1)
        self.topk = Target(
            self.labels,
            ids.to(device),
            logits[:, :KEPT].contiguous().to(device),
            logits[:, KEPT].contiguous().to(device),
        )
        drawn = torch.randn(tokens, DRAWN, generator=made).log_softmax(-1)
        nothing = torch.full((tokens,), float("-inf"))
        self.draws = Target(
            self.labels,
            ids[:, :DRAWN].contiguous().to(device),
            drawn.to(device),
            nothing.to(device),
        )
        teacher = Head(self.teacher_weight, None, vocab)
        self.dense = Target(self.labels, teacher_hidden=self.teacher_hidden, teacher_head=teacher)

    def fused(self, target: Target, loss: Loss) -> Callable[[], Tensor]:
        """Our loss."""
        head = Head(self.weight, None, self.vocab)

        def run() -> Tensor:
            return fused_loss(self.hidden, head, target, self.ones, {"loss": (1.0, loss)})[0]

        return run

    def plain(self, kind: str) -> Callable[[], Tensor]:
        """The loss as PyTorch alone would have it, over whole [tokens, vocab] tensors."""

        def run() -> Tensor:
            logits = functional.linear(self.hidden, self.weight).float()
            if kind == "ce":
                return functional.cross_entropy(logits, self.labels)
            with torch.no_grad():
                teacher = functional.linear(self.teacher_hidden, self.teacher_weight).float()
            log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
            return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

        return run

    def bare(self) -> Callable[[], None]:
        """The three matrix products that no such loss can do without."""
        rows = torch.empty(
            (self.hidden.shape[0], self.vocab), dtype=torch.bfloat16, device=self.device
        )

        def run() -> None:
            with torch.no_grad():
                torch.mm(self.hidden, self.weight.t(), out=rows)
                torch.mm(rows, self.weight)
                torch.mm(rows.t(), self.hidden)

        return run


def liger_ways(inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Liger's fused linear losses, where it is installed and there is a GPU for its kernels."""
    if inputs.device.type != "cuda":
        return {}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
    except ImportError:
        return {}
    cross_entropy, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD()
    return {
        "ce_liger": lambda: cross_entropy(inputs.weight, inputs.hidden, inputs.labels),
        "jsd_dense_liger": lambda: jsd(
            inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
        ),
    }


def ways_of(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    return {
        "bare_products": inputs.bare(),
        "ce_fused": inputs.fused(Target(inputs.labels), CrossEntropy()),
        "kl_sample_fused": inputs.fused(inputs.draws, ForwardKL()),
        "kl_topk_fused": inputs.fused(inputs.topk, ForwardKL()),
        "kl_dense_fused": inputs.fused(inputs.dense, ForwardKL()),
        "jsd_dense_fused": inputs.fused(inputs.dense, JSD(0.5)),
        "ce_torch": inputs.plain("ce"),
        "kl_dense_torch": inputs.plain("kl"),
        **liger_ways(inputs),
    }


def once(inputs: Inputs, way: Callable[[], Any]) -> tuple[float, int]:
    """(seconds, peak bytes over the inputs) of one forward and backward pass."""
    inputs.hidden.grad = inputs.weight.grad = None
    cuda = inputs.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss = way()
    if loss is not None:
        loss.backward()
    if not cuda:
        return time.perf_counter() - began, 0
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before


def measure(inputs: Inputs) -> dict[str, Any]:
    """Medians of all ways, and why a way could not be run."""
    ways = ways_of(inputs)
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            if name in failed:
                continue
            try:
                took, peak = once(inputs, way)
            except torch.OutOfMemoryError:
                failed[name] = "out of memory"
                continue
            if turn:  # the first one warms up
                seconds.setdefault(name, []).append(took)
                peaks[name] = max(peaks.get(name, 0), peak)
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    return {
        "ms": {name: round(1000 * value, 2) for name, value in medians.items()},
        "over_bare_products": {
            name: round(value / medians["bare_products"], 3) for name, value in medians.items()
        },
        "peak_gb": {name: round(peak / 1e9, 3) for name, peak in peaks.items()},
        "failed": failed,
    }


def loss_part(tokens: int, width: int, vocab: int, device: torch.device) -> dict[str, Any]:
    """The losses' figures, at the top level of the result."""
    found = measure(Inputs(tokens, width, vocab, device))
    return {**found, "sizes": {"tokens": tokens, "width": width, "vocab": vocab}}


def decode_part(device: torch.device) -> dict[str, Any]:
    """4-bit and 8-bit decoding; on a CPU only to see it run."""
    from tests.bench import gpu_decode  # here, so that the losses do without what it needs

    shapes, tokens = (["1.1b", "8b"], gpu_decode.TOKENS) if device.type == "cuda" else (["tiny"], 4)
    found = gpu_decode.measure(shapes, list(gpu_decode.CASES), device, tokens)
    return {"decode": {**found, **gpu_decode.facts(device)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--part", choices=("loss", "decode"), help="one of the two alone")
    parser.add_argument("--out", type=Path, help="not results/gpu/KIND.json")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; try --device cpu with small sizes", file=sys.stderr)
        return 2
    device = torch.device(asked.device)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "loss": lambda: loss_part(asked.tokens, asked.width, asked.vocab, device),
        "decode": lambda: decode_part(device),
    }
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in parts if asked.part is None else [asked.part]:
        try:
            found |= parts[name]()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    found["failed"] = {**found.get("failed", {}), **failed}
    found |= {
        "command": "python tests/bench/gpu.py",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": _versions(),
    }
    print(json.dumps(found, indent=2))
    if device.type == "cuda":
        path = asked.out or result_file("gpu", "cuda")
        write_result(path, {**read_result(path), **found})
    return 0


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for name in ("transformers", "triton", "liger-kernel", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
