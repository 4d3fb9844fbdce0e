"""Is a cached signal unbiased? Its gradients against full distillation's, and what students learn.

    make demo && make bench-cache-angle

The angle is between the gradients of all of the student's parameters, with a cached signal and with
the whole distribution of the demo's teacher, both summed over the same n tokens. Of an unbiased
signal it falls as 1/sqrt(n), of a biased one it ends at its bias. Writes
tests/bench/results/cache_angle/KIND.json and the curves of docs/cache.md.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.bench import docs, real
from tests.bench.figures import machine, read_result, result_file, write_result
from tests.bench.multi_epoch import Records, evaluate, loss_sum, new_student, states, train
from tests.bench.picture import Axis, Line, draw
from tests.bench.signals import Teacher
from trainer.corpus.corpus import Corpus, Part
from trainer.corpus.tokenizer import load_tokenizer
from trainer.spec.sections import DistillSpec

HERE = Path(__file__).parent
COMMAND = "make demo && make bench-cache-angle"
REDRAWS = 4
# name, how the docs call it, colour, dashed
SIGNALS = {
    "sample_50": ("50 draws; any number of epochs with redraws: 1", "#0b7a6f", False),
    "sample_50_x4": ("50 draws, 4 epochs with redraws: 4", "#45b5a8", False),
    "top_50_tail": ("top-50 with the tail", "#1a62ad", False),
    "top_50": ("top-50, renormalized", "#b4630a", True),
    "top_12": ("top-12, renormalized", "#b3261e", True),
}
# Trainings: signal, sets of draws
TRAININGS = {
    "full": ("full", 1),
    "sample_50, redraws 1": ("sample_50", 1),
    "sample_50, redraws 4": ("sample_50", REDRAWS),
    "top_50_tail": ("top_50_tail", 1),
    "top_12": ("top_12", 1),
}


class Comparison(NamedTuple):
    """A gradient beside full distillation's: the angle in degrees, the ratio of the norms, and the
    norm of the difference, per block of tokens."""

    angle: float
    norm_ratio: float
    error: float


class Sums:
    """Gradient sums over 1, 2, 4... blocks, and at each size their angles to full distillation's.

    Like a binary counter: two sums of one size are one sum of the next, so that the blocks of each
    size are disjoint and cover all tokens.
    """

    def __init__(self) -> None:
        self.waiting: dict[int, dict[str, Tensor]] = {}
        self.found: dict[int, dict[str, list[Comparison]]] = {}

    def add(self, sums: dict[str, Tensor], level: int = 0) -> None:
        full = sums["full"]
        for name in SIGNALS:
            found = self.found.setdefault(level, {}).setdefault(name, [])
            found.append(compare(sums[name], full, 1 << level))
        other = self.waiting.pop(level, None)
        if other is None:
            self.waiting[level] = sums
        else:
            self.add({name: sums[name] + other[name] for name in sums}, level + 1)


def compare(ours: Tensor, full: Tensor, blocks: int) -> Comparison:
    """Compares two gradients, sums over so many blocks."""
    a, b = ours.double(), full.double()
    a_norm, b_norm = a.norm(), b.norm()
    # By the chord of the unit vectors: the arc cosine has no digits left at small angles.
    chord = (a / a_norm - b / b_norm).norm().item()
    return Comparison(
        math.degrees(2 * math.asin(min(1.0, chord / 2))),
        float(a_norm / b_norm),
        float((a - b).norm()) / blocks,
    )


def gradients(student: Any, teacher: Teacher, part: Part, numbers: Any) -> dict[str, Tensor]:
    """The sum over a block's loss tokens of every signal's gradient, as one vector each."""
    batch = part.batch(numbers)
    log_p = teacher.log_probs(batch)
    hidden = states(student, batch)
    parameters = [p for p in student.parameters() if p.requires_grad]

    def gradient(name: str, redraw: int = 0) -> Tensor:
        target = teacher.target(name, batch, log_p, redraw)
        loss = loss_sum(student, teacher.vocab, batch, target, hidden)
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in found])

    sets = [gradient("sample_50", redraw) for redraw in range(REDRAWS)]
    return {
        "full": gradient("full"),
        "sample_50": sets[0],
        "sample_50_x4": torch.stack(sets).mean(dim=0),
        **{name: gradient(name) for name in ("top_50_tail", "top_50", "top_12")},
    }


KEYS = ("angle", "norm_ratio", "slope", "error_slope")


def angle(
    students: dict[str, Any], teacher: Teacher, part: Part, blocks: int, per_block: int
) -> dict[str, Any]:
    """By student: mean angles in degrees and norm ratios by number of tokens, and the slopes of
    the angle and of the error of the mean gradient."""
    length = part.batch([0]).input_ids.shape[1]
    sums = {name: Sums() for name in students}
    for block in range(blocks):
        numbers = np.arange(block * per_block, (block + 1) * per_block)
        for name, student in students.items():
            sums[name].add(gradients(student, teacher, part, numbers))
        if (block + 1) % 8 == 0:
            print(f"  block {block + 1} of {blocks}", flush=True)
    result: dict[str, Any] = {}
    for name, sum_ in sums.items():
        levels = sorted(sum_.found)
        sizes = [per_block * length << level for level in levels]
        result[name] = {"tokens": sizes, **{key: {} for key in KEYS}}
        for signal in SIGNALS:
            at = [sum_.found[level][signal] for level in levels]
            angles = [statistics.fmean(one.angle for one in found) for found in at]
            ratios = [statistics.fmean(one.norm_ratio for one in found) for found in at]
            errors = [statistics.fmean(one.error for one in found) for found in at]
            values = angles, ratios, _slope(sizes, angles), _slope(sizes, errors)
            for key, value in zip(KEYS, values, strict=True):
                result[name][key][signal] = np.round(value, 4).tolist()
        _print_angles(name, result[name])
    return result


def _slope(tokens: list[int], values: list[float]) -> float:
    """Least squares of log(value) over log(tokens): -0.5 is 1/sqrt(n), 0 is flat."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def _print_angles(student: str, found: dict[str, Any]) -> None:
    print(f"\nstudent {student}: angle to full distillation's gradient, degrees")
    print(
        f"{'tokens':16}"
        + "".join(f"{n // 1024:>8}k" for n in found["tokens"])
        + "   slope  of error  norm"
    )
    for name, angles in found["angle"].items():
        row = "".join(f"{value:>9.2f}" for value in angles)
        ratio = found["norm_ratio"][name][-1]
        print(
            f"{name:16}{row}{found['slope'][name]:>8.2f}{found['error_slope'][name]:>10.2f}{ratio:>6.2f}",
            flush=True,
        )


def trainings(
    teacher: Teacher, corpus: Corpus, spec: dict[str, Any], sequences: int, seeds: int
) -> dict[str, Any]:
    """Held-out KL and cross-entropy of students after 1 and 4 epochs on every signal."""
    part, held_out = corpus.part("train"), corpus.part("report")
    tokenizer = load_tokenizer(corpus.tokenizer_folder())
    length = int(corpus.manifest["sequence_length"])
    settings = DistillSpec(**spec["distill"])
    result: dict[str, Any] = {}
    print(f"\n{'held out, after':24}{'1 epoch: KL':>12}{'CE':>8}{'4 epochs: KL':>14}{'CE':>8}")
    for name, (signal, redraws) in TRAININGS.items():
        records = Records(teacher, part, signal, sequences, redraws)
        result[name] = {}
        for epochs in (1, 4):
            if redraws > 1 and epochs == 1:  # the same as one set of draws
                result[name]["1"] = result["sample_50, redraws 1"]["1"]
                continue
            runs = []
            for seed in range(seeds):
                student = new_student(spec, tokenizer, length, seed)
                train(student, records, settings, epochs, seed)
                runs.append(evaluate(student, teacher, held_out))
            mean = {key: round(statistics.fmean(run[key] for run in runs), 5) for key in runs[0]}
            spread = max(run["kl"] for run in runs) - min(run["kl"] for run in runs)
            result[name][str(epochs)] = {**mean, "kl_range": round(spread, 5)}
        one, four = result[name]["1"], result[name]["4"]
        print(
            f"{name:24}{one['kl']:>12.4f}{one['ce']:>8.3f}{four['kl']:>14.4f}{four['ce']:>8.3f}",
            flush=True,
        )
    return {"sequences": sequences, "seeds": seeds, "held_out": result}


def picture(found: dict[str, Any], path: Path, title: str) -> None:
    """The angles of one student over tokens, both logarithmic."""
    tokens = found["tokens"]
    lines = [
        Line(label, colour, list(zip(tokens, found["angle"][name], strict=True)), None, dashed)
        for name, (label, colour, dashed) in SIGNALS.items()
    ]
    every = [value for values in found["angle"].values() for value in values]
    draw(
        path,
        title,
        lines,
        Axis("tokens that the gradient is averaged over", log=True, marks=tokens),
        # Room above the curves for their names.
        Axis("angle to the gradient of full distillation, degrees", log=True, high=8 * max(every)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", default="angle,trainings", help="of angle,trainings")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="storage with the demo")
    parser.add_argument("--blocks", type=int, default=64, help="blocks of tokens, a power of 2")
    parser.add_argument("--per-block", type=int, default=16, help="sequences in a block")
    parser.add_argument("--half", type=int, default=200, help="steps of the half-trained student")
    parser.add_argument("--sequences", type=int, default=1024, help="of an epoch; 0: all")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as processors")
    parser.add_argument("--out", type=Path, default=result_file("cache_angle"))
    parser.add_argument("--images", type=Path, default=HERE.parents[1] / "docs" / "img")
    given = parser.parse_args()
    asked = given.only.split(",")
    if given.blocks < 2:
        parser.error(f"--blocks: got {given.blocks}; may be 2, 4, 8 ...")
    if wrong := sorted(set(asked) - {"angle", "trainings"}):
        parser.error(f"--only: no part {wrong[0]!r}; may be angle, trainings")
    torch.set_num_threads(given.threads or os.cpu_count() or 1)
    began = time.perf_counter()
    storage = real.open_runs(given.runs)
    try:
        corpus = real.corpus_of(storage)
        model, spec = real.teacher_of(storage)
    except FileNotFoundError as error:
        print(f"error: {error}; run: make demo", file=sys.stderr)
        return 2
    teacher = Teacher(model.float(), int(corpus.manifest["vocab_size"]))
    part = corpus.part("train")
    result = read_result(given.out)
    if "angle" in asked:
        tokenizer = load_tokenizer(corpus.tokenizer_folder())
        length = int(corpus.manifest["sequence_length"])
        students = {name: new_student(spec, tokenizer, length, 0) for name in ("start", "half")}
        everything = Records(teacher, part, "full", len(part))
        settings = DistillSpec(**spec["distill"])
        train(students["half"], everything, settings, 3, 0, stop=given.half)
        result["angle"] = angle(students, teacher, part, given.blocks, given.per_block)
        result["half_trained_steps"] = given.half
        for name, words in (("start", "at its start"), ("half", "half-trained")):
            path = given.images / f"cache-angle-{name}.svg"
            picture(result["angle"][name], path, f"Bias of cached gradients, student {words}")
    if "trainings" in asked:
        result["trainings"] = trainings(
            teacher, corpus, spec, given.sequences or len(part), given.seeds
        )
    result["command"] = COMMAND
    result["machine"] = machine()
    result["versions"] = {name: version(name) for name in ("torch", "transformers", "numpy")}
    write_result(given.out, result)
    if given.out == result_file("cache_angle"):
        docs.write()
    print(f"({time.perf_counter() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
