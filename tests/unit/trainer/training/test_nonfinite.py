"""What is said when a loss is no number: whose fault it is, and what is kept."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.storage import open_store
from trainer.spec.sections import DistillSpec
from trainer.training.loader import MicroBatch
from trainer.training.nonfinite import (
    nonfinite_error,
    nonfinite_sequences,
    nonfinite_signals,
    norm_of,
)
from trainer.worker import Hooks, Worker

LENGTH, K = 4, 3
KEYS = (b"a" * 16, b"b" * 16)
CPU = torch.device("cpu")


def micro() -> MicroBatch:
    """Three sequences; the last fills the batch up, and the last position never counts."""
    weights = torch.ones(3, LENGTH)
    weights[:, -1] = 0
    weights[2] = 0
    zeros = torch.zeros(3, LENGTH, dtype=torch.int64)
    return MicroBatch(
        zeros,
        zeros,
        weights.reshape(-1),
        zeros.reshape(-1),
        torch.zeros(3 * LENGTH, K, dtype=torch.int64),
        torch.full((3 * LENGTH, K), -1.0),
        torch.full((3 * LENGTH,), -math.inf),
        KEYS,
    )


@pytest.mark.parametrize(
    ("field", "place", "value", "keys"),
    [
        ("log_probs", (5, 1), math.nan, KEYS[1:]),
        ("log_probs", (0, 2), math.inf, KEYS[:1]),
        ("log_tail", 6, math.nan, KEYS[1:]),
        ("log_tail", 2, math.inf, KEYS[:1]),
        ("log_probs", (1, 0), -math.inf, ()),  # a probability of 0
        ("log_probs", (3, 0), math.nan, ()),  # does not count
        ("log_tail", 8, math.nan, ()),  # fills up
    ],
)
def test_records_that_are_no_numbers_are_told_apart(field, place, value, keys) -> None:
    batch = micro()
    tensor = getattr(batch, field)
    tensor[place] = value
    assert nonfinite_signals([micro(), batch], None, CPU) == list(keys)
    assert (
        nonfinite_signals([replace(batch, ids=None, log_probs=None, log_tail=None)], None, CPU)
        == []
    )


@pytest.mark.parametrize("field", ["teacher_hidden", "teacher_states"])
def test_a_teacher_beside_the_student_is_asked_again(field) -> None:
    class Teacher:
        @contextmanager
        def signal(self, inputs: dict[str, Any]):
            assert inputs["input_ids"].shape == (3, LENGTH)
            more = {
                "teacher_hidden": torch.zeros(3 * LENGTH, 8),
                "teacher_states": [torch.zeros(3, LENGTH, 8)],
            }
            found = more[field]
            (found if field == "teacher_hidden" else found[0].reshape(-1, 8))[4, 7] = math.inf
            yield more

    assert nonfinite_signals([micro()], Teacher(), CPU) == [KEYS[1]]  # type: ignore[arg-type]


def test_all_sequences_of_a_micro_batch_are_suspects() -> None:
    values = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [1.0, -math.inf]])
    keys = [(b"1",), (b"2", b"3"), (b"4",)]
    assert nonfinite_sequences(values, keys) == [b"2", b"3", b"4"]


def test_deepspeed_says_minus_one_for_a_norm_that_is_no_number() -> None:
    def norm(value: Any) -> float | None:
        return norm_of(SimpleNamespace(get_global_grad_norm=lambda: value))

    assert norm(-1.0) == norm(torch.tensor(-1.0)) == math.inf
    assert norm(torch.tensor(0.5)) == 0.5 and norm(0.0) == 0.0 and norm(None) is None
    assert math.isnan(norm(math.nan) or 0.0) or norm(math.nan) == math.inf


def said(tmp_path, values: dict[str, Any], *keys: Any, **distill: Any) -> str:
    store = open_store(tmp_path).sub("checkpoints")
    job: Any = SimpleNamespace(
        stage="control", distill=DistillSpec(**distill), checkpoints=store, cache=None
    )
    events: list[tuple[str, dict[str, Any]]] = []
    hooks = Hooks(emit=lambda event, **fields: events.append((event, fields)))
    error = nonfinite_error(job, Worker(0, 1, CPU, hooks), 7, values, *keys)
    ((event, fields),) = events
    assert event == "diverged" and fields["step"] == 7 and fields["stage"] == "control"
    assert "\n" not in str(error) and len(str(error)) < 600
    return str(error)


def test_few_sequences_are_named_and_the_rest_counted(tmp_path) -> None:
    keys = [bytes([i]) * 16 for i in range(9)]
    text = said(tmp_path, {"forward_kl": math.nan, "ce": 2.0, "grad_norm": math.inf}, keys)
    assert text.startswith("control: forward_kl is nan in step 7, in micro-batches with sequences ")
    assert text.count("0" * 32) == 1 and "02" * 16 in text and "03" * 16 not in text
    assert (
        "and 6 more; start over with a lower distill.learning_rate or distill.dtype=float32 (--r"
        in text
    )
    assert "(--redo distill), or look at these sequences; " in text
    assert text.endswith("; no checkpoint had been saved")


def test_a_norm_alone_and_float32(tmp_path) -> None:
    values = {"forward_kl": 1.0, "grad_norm": math.inf}
    assert said(tmp_path, values, [], dtype="float32") == (
        "control: grad_norm is inf in step 7; start over with a lower distill.learning_rate "
        "(--redo distill); no checkpoint had been saved"
    )
    # Losses that are finite tell nothing of single micro-batches.
    text = said(tmp_path, values, list(KEYS), dtype="float32")
    assert f"with losses that are finite; the whole step read sequences {KEYS[0].hex()}" in text
    assert "micro-batch" not in text


def test_a_teacher_at_fault_is_no_diverged_student(tmp_path) -> None:
    text = said(tmp_path, {"forward_kl": math.nan}, list(KEYS), [KEYS[0]])
    assert "the teacher's own signal is not finite for sequence " + KEYS[0].hex() in text
    assert "capture them again with --redo capture" in text and "learning_rate" not in text
    text = said(tmp_path, {"forward_kl": math.nan}, list(KEYS), [KEYS[0]], mode="online")
    assert "teacher.dtype=float32 (--redo capture)" in text and "again" not in text
