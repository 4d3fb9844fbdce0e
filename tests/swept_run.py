"""A run directory whose numbers are drawn, with all that a sweep can have in it.

Numbers per sequence are drawn so that their means are known: what the report says of them can be
checked against numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster.storage import Attempt, EventWriter, Store, open_store
from quant.cell import failed_cell
from quant.grid import Cell, grid, uniform
from quant.intervals import mcnemar, mean_interval, ratio_of_perplexities
from quant.metrics import with_interval
from quant.spec import QuantSpec
from quant.sweepspec import SweepSpec

KL = {8: 2e-4, 4: 4e-3, 3: 0.03, 2: 0.3}  # nats per token of groups of 64
SEQUENCES = 48
STUDENT, TEACHER = 600_000, 3_600_000  # weights
GPU = "NVIDIA H200"


class Sums:
    """Draws the sums over sequences of one part. seed: another part has other sequences."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.tokens = self.random.integers(200, 256, SEQUENCES).astype(float)
        self.hard = np.exp(self.random.normal(0, 0.3, SEQUENCES))  # sequences differ, for all alike
        self.teacher = self.tokens * 4.4 * np.exp(self.random.normal(0, 0.05, SEQUENCES))
        self.student = self.teacher + 0.13 * self.tokens * self.hard
        self.correct = {
            "teacher": self.random.binomial(self.tokens.astype(int), 0.18).astype(float),
            "student": self.random.binomial(self.tokens.astype(int), 0.17).astype(float),
        }

    def kl(self, mean: float, noise: float = 0.03) -> np.ndarray:
        return mean * self.tokens * self.hard * np.exp(self.random.normal(0, noise, SEQUENCES))

    def model(self, role: str) -> dict[str, Any]:
        """What evaluations/<role>.json says of the part."""
        nll = self.teacher if role == "teacher" else self.student
        each = {"tokens": self.tokens, "nll": nll, "correct": self.correct[role]}
        kl = None
        if role == "student":
            each |= {"kl_to_teacher": self.kl(0.128), "teacher_nll": self.teacher}
            kl = mean_interval(each["kl_to_teacher"], self.tokens)
        accuracy = mean_interval(self.correct[role], self.tokens)
        mean = nll.sum() / self.tokens.sum()
        kept = 100 * self.correct["student"].sum() / self.correct["teacher"].sum()
        return {
            "tokens": int(self.tokens.sum()),
            "nll": mean,
            "perplexity": np.exp(mean),
            **with_interval("accuracy", accuracy),
            **with_interval("kl_to_teacher", kl),
            "retention": kept if role == "student" else None,
            "top1_agreement": 0.67 if role == "student" else None,
            "per_sequence": {name: values.tolist() for name, values in each.items()},
        }

    def cell(self, model: str, kl: float, lost: float) -> dict[str, Any]:
        """What a cell's result says of the part. lost: of the accuracy, a fraction."""
        base = self.teacher if model == "teacher" else self.student
        own = self.kl(kl)
        far = own if model == "teacher" else self.kl(0.128) + 0.9 * own
        right = self.correct[model]
        correct = right - self.random.binomial(right.astype(int), lost)
        nll = base + 0.8 * own
        each = {
            "tokens": self.tokens,
            "nll": nll,
            "correct": correct,
            "kl_to_reference": own,
            "kl_to_teacher": far,
            "reference_nll": base,
            "reference_correct": right,
        }
        mean = nll.sum() / self.tokens.sum()
        found = {
            "tokens": int(self.tokens.sum()),
            "nll": mean,
            "perplexity": np.exp(mean),
            **with_interval("accuracy", mean_interval(correct, self.tokens)),
            **with_interval("perplexity_ratio", ratio_of_perplexities(nll, base, self.tokens)),
            "retention": 100 * correct.sum() / right.sum(),
            "top1_agreement": 0.95,
            "true_prob_change": -0.0004,
            "true_prob_change_rms": 0.012,
            "per_sequence": {name: values.tolist() for name, values in each.items()},
        }
        for name, values in (("kl_to_teacher", far), (f"kl_to_{model}", own)):
            found |= with_interval(name, mean_interval(values, self.tokens))
            found |= {f"{name}_p99": 12 * kl, f"{name}_max": 90 * kl}
        return found


def true_bytes(model: str, bits: float, group: Any) -> int:
    """Of weights of so many bits, with 4 bytes per group, and a quarter of them in 16 bits."""
    weights = TEACHER if model == "teacher" else STUDENT
    overhead = 0.02 if group == "channel" else 32 / group
    return round(weights * (0.25 * 2 + 0.75 * (bits + overhead) / 8))


def swept_run(root: Path, name: str = "swept", **changes: Any) -> Store:
    """A distilled student and its teacher with cells of every kind; `changes` of the sweep."""
    sweep: dict[str, Any] = {
        "bits": [8, 4, 3, 2],
        "group_size": [32, 64],
        "models": ["student", "teacher"],
        "recover": {"steps": 200, "bits": [3, 2]},
        "budgets_mb": [0.5, 0.6],
        "extra": [{"path": "/models/gptq", "name": "gptq-4b"}],
        "tasks": [{"folder": "/tasks/cloze"}],
        **changes,
    }
    run = open_store(root / name)
    spec = {
        "name": name,
        "teacher": {"model": "org/big"},
        "student": {"config": {"model_type": "llama"}, "init": "random"},
        "distill": {"losses": {"forward_kl": 1.0}, "control": False},
        "sweep": sweep,
    }
    run.write_text("spec.yaml", yaml.safe_dump(spec))
    with EventWriter(run, Attempt.claim(run).number) as events:
        for stage, hours in (("capture", 0.5), ("distill", 2.0), ("sweep", 0.4)):
            events.emit(
                "stage_done",
                stage=stage,
                seconds=1800.0,
                metrics={"device_hours": hours, "device": "gpu"},
            )
        events.emit("run_end", status="done")
    parts = {"report": Sums(1), "select": Sums(2)}
    parsed = SweepSpec.model_validate(sweep)
    for role in parsed.models:
        weights = TEACHER if role == "teacher" else STUDENT
        run.write_json(
            f"evaluations/{role}.json",
            {
                "role": role,
                "name": "org/big" if role == "teacher" else name,
                "parameters": weights,
                "bytes": 2 * weights,
                **parts["report"].model(role),
                "select": parts["select"].model(role),
                "decode_tokens_per_s": 100.0 if role == "teacher" else 400.0,
                "tasks": {"cloze": {"metric": "acc", "accuracy": 0.41, "documents": 200}},
            },
        )
    for cell in grid(parsed):
        _write(run, parts, cell, _kl(cell))
    for budget in parsed.budgets_mb:
        key = f"allocated-{budget:g}mb"
        layers = {
            f"model.layers.{block}.{layer}": None
            if (block, layer) == (0, "mlp.down_proj")
            else QuantSpec(2 + (block + number) % 3, 64)
            for block in range(4)
            for number, layer in enumerate(("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
        }
        cell = Cell(key, "student", QuantSpec(2, 64), layers, budget_mb=budget)
        size = int(budget * 1e6 - 1000)
        _write(run, parts, cell, 0.02 if budget < 0.55 else 0.0035, size)
        control = QuantSpec(2 if budget < 0.55 else 3, 128)
        key = uniform(control).key
        _write(run, parts, Cell(key, "student", control, control_of=(cell.key,)), KL[control.bits])
    if parsed.extra:
        found = {
            "role": "extra",
            "name": "gptq-4b",
            "technique": "quantized elsewhere (gptq)",
            "status": "done",
            "error": None,
            "parameters": STUDENT,
            "bytes": 610_000,
            "bits_per_weight": 8.13,
            **parts["report"].cell("student", 0.0045, 0.004),
            "select": parts["select"].cell("student", 0.0045, 0.004),
        }
        run.write_json("evaluations/extra-gptq-4b.json", found)
    return run


def _kl(cell: Cell) -> float:
    group = cell.spec.group_size
    assert isinstance(group, int)
    value = KL[cell.spec.bits] * (group / 64) ** 0.2
    return value * (0.55 if cell.recovered else 1.0)


def _write(
    run: Store, parts: dict[str, Sums], cell: Cell, kl: float, size: int | None = None
) -> None:
    if cell.model == "teacher" and cell.spec.bits == 2 and cell.spec.group_size == 32:
        error = "OutOfMemory: needs 3.1 GB, which no node has"
        run.write_json(f"cells/{cell.key}/result.json", failed_cell(cell, error))
        return
    lost = min(0.5, 0.6 * kl)
    size = size or true_bytes(cell.model, cell.spec.bits, cell.spec.group_size)
    weights = TEACHER if cell.model == "teacher" else STUDENT
    base = 100.0 if cell.model == "teacher" else 400.0
    speedup = {8: 0.9, 4: 2.1, 3: 1.4, 2: 1.2}[cell.spec.bits]
    how = {"steps": 200, "seconds": 95.0, "target": "teacher", "learning_rate": 0.005}
    flips = (round(200 * lost) + 3, 3)
    result = failed_cell(cell, "") | {
        "status": "done",
        "error": None,
        **parts["report"].cell(cell.model, kl, lost),
        "select": parts["select"].cell(cell.model, kl, lost),
        "bytes": size,
        "parameters": weights,
        "bits_per_weight": 8 * size / weights,
        "recovered": how if cell.recovered else None,
        "tasks": {
            "cloze": {
                "metric": "acc",
                "accuracy": (82 - flips[0] + flips[1]) / 200,
                "reference_accuracy": 0.41,
                "right_to_wrong": flips[0],
                "wrong_to_right": flips[1],
                "mcnemar_p": mcnemar(*flips),
                "retention": 100 * (82 - flips[0] + flips[1]) / 82,
                "documents": 200,
                "correct": [1, 0],
                "doc_hashes": ["a", "b"],
            }
        },
        "evaluated_with": "dequantized weights in bfloat16",
        "decode_tokens_per_s": base * speedup,
        "baseline_decode_tokens_per_s": base,
        "prefill_tokens_per_s": 4000.0,
        "speedup": speedup,
        "resident_bytes": size + 20_000,
        "peak_memory_bytes": size + 5_000_000,
        "kernel": "int4pack" if cell.spec.bits == 4 else "dequantize+matmul",
        "kernel_kl": 1.2e-6,
        "energy_per_token_j": None,
        "energy_note": "not measurable: no NVML and no RAPL here",
        "device_name": GPU,
        "device": "gpu",
        "device_hours": 0.02 + 0.1 * cell.recovered,
        "cell_s": 72.0,
        "quantize_s": 1.5,
        "eval_s": 60.0,
        "model_kept": True,
    }
    run.write_json(f"cells/{cell.key}/result.json", result)
