"""The tables of docs/benchmarks.md that `tests.bench.train` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bench.docs import figure, fill, table
from tests.bench.figures import tables_by_kind

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
WAYS = {
    "ce": "cross-entropy, transformers' own loss",
    "ce_fused": "cross-entropy, fused head",
    "cached_sample": "cached, `sample`, 50 draws",
    "cached_topk": "cached, `topk`, k: 64",
    "online": "online",
    "trl_gkd": "TRL GKDTrainer, off-policy, its defaults",
    "trl_gkd_forward_kl": "TRL GKDTrainer, off-policy, forward KL, no checkpointing",
}
Json = dict[str, Any]


def speeds(found: Json) -> str:
    """Tokens per second and peak memory of each way."""
    rates, peaks = found["tokens_per_s"], found["peak_bytes"]
    rows = [
        [
            words,
            figure(rates[name], 0),
            figure(rates[name] / rates["ce"], 2),
            figure(rates[name] / rates["online"], 2),
            figure(rates[name] / rates["trl_gkd"], 2),
            figure(peaks[name] / 1e6, 0),
        ]
        for name, words in WAYS.items()
    ]
    heads = ["training", "tokens/s", "over CE", "over online", "over TRL", "peak MB"]
    return table(heads, rows)


def heldout(found: Json) -> str:
    """Held-out cross-entropy by signal and seed."""
    losses, means = found["heldout"], found["heldout_mean"]
    rows = [
        [WAYS[name], *(figure(loss, 4) for loss in losses[name]), figure(means[name], 4)]
        for name in losses
    ]
    seeds = [f"seed {number + 1}" for number in range(len(losses["ce"]))]
    return table(["signal", *seeds, "mean"], rows)


def parts(found: Json) -> dict[str, str]:
    """The tables whose figures are there, by name."""
    made = {}
    if "tokens_per_s" in found:
        made["train-speeds"] = speeds(found)
    if "loss_extra_bytes" in found:
        extra = found["loss_extra_bytes"]
        rows = [
            [name, figure(extra[name] / 1e6, 0), figure(extra[f"{name}_bf16"] / 1e6, 0)]
            for name in ("dense", "fused")
        ]
        made["loss-memory"] = table(["loss", "float32, MB beyond its inputs", "bf16"], rows)
    if "heldout" in found:
        made["heldout"] = heldout(found)
    return made


def text(found: Json) -> str:
    """The tables, for a terminal."""
    return "\n\n".join(parts(found).values())


def write() -> None:
    """Puts those of all kinds of processors into the page."""
    fill(PAGE, tables_by_kind("train", parts))
