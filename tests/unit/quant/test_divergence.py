from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quant.divergence import coarsened_kl, full_kl


def coarsened_in_float64(q: np.ndarray, ids: list[int], p: list[float], tail: float) -> float:
    q_tail = q.sum() - q[ids].sum()
    value = sum(a * math.log(a / q[i]) for i, a in zip(ids, p, strict=True))
    return value + (tail * math.log(tail / q_tail) if tail else 0.0)


def test_full_kl_is_the_sum_in_float64():
    logits = torch.randn(2, 7, 500) * 5
    a, b = torch.log_softmax(logits, -1)
    p, q = logits.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    np.testing.assert_allclose(full_kl(a, b).numpy(), expected.numpy(), rtol=1e-4)
    assert torch.equal(full_kl(a, a), torch.zeros(7))


def test_full_kl_with_logits_of_minus_infinity():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]]).log_softmax(-1)
    other = torch.tensor([[2.0, 1.0, -torch.inf]]).log_softmax(-1)
    expected = (math.e - 1) / (math.e + 1)
    assert full_kl(logits, other).item() == pytest.approx(expected, rel=1e-6)


def test_tail_bucket_closed_form():
    q = np.array([0.4, 0.3, 0.2, 0.1])
    got = coarsened_kl(
        torch.tensor(np.log(q)).float()[None],
        torch.tensor([[0, 2]]),
        torch.tensor([[0.5, 0.25]]).log(),
        torch.tensor([0.25]),
    )
    expected = 0.5 * math.log(0.5 / 0.4) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(0.25 / 0.4)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_random_records_are_float64s_and_bound_the_full_kl_from_below():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 20, 300)) * 3)
    p, q = logits.softmax(-1).numpy()
    ids = np.argsort(-p, axis=-1)[:, :16]
    kept = np.take_along_axis(p, ids, -1)
    got = coarsened_kl(
        logits[1].log_softmax(-1).float(),
        torch.from_numpy(ids),
        torch.from_numpy(np.log(kept)).float(),
        torch.from_numpy(1 - kept.sum(-1)).float(),
    ).numpy()
    expected = [
        coarsened_in_float64(q[t], ids[t].tolist(), kept[t].tolist(), 1 - kept[t].sum())
        for t in range(20)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert (got <= (p * np.log(p / q)).sum(-1) + 1e-5).all()


def test_a_tiny_model_tail_does_not_cancel():
    # 1 - sum(q) is 0 or negative in float32 here; the tail is exp(-30) spread over two ids.
    logits = torch.tensor([[0.0, -1.0, -30.0, -30.0]])
    model = logits.log_softmax(-1)
    got = coarsened_kl(
        model, torch.tensor([[0, 1]]), model[:, :2] + math.log(0.9), torch.tensor([0.1])
    )
    tail = 2 * math.exp(-30) / (1 + math.exp(-1) + 2 * math.exp(-30))
    expected = 0.9 * math.log(0.9) + 0.1 * math.log(0.1 / tail)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_no_tail_on_either_side():
    model = torch.randn(1, 3).log_softmax(-1)
    ids, noise = torch.tensor([[0, 1, 2]]), torch.tensor([3e-8])
    for tail in (torch.zeros(1), noise, -noise):
        assert coarsened_kl(model, ids, model, tail).item() == pytest.approx(0, abs=1e-6)
    # a padded vocabulary: the model gives the other ids probability 0, the teacher does not
    padded = torch.tensor([[0.0, 0.0, -torch.inf]]).log_softmax(-1)
    record = torch.tensor([[0.4, 0.4]]).log()
    assert coarsened_kl(padded, torch.tensor([[0, 1]]), record, torch.tensor([0.2])).isinf()


def test_ids_beyond_the_vocabulary_and_empty_slots_join_the_tail():
    model = torch.randn(1, 10).log_softmax(-1)
    plain = coarsened_kl(
        model, torch.tensor([[1, 4]]), torch.tensor([[0.5, 0.2]]).log(), torch.tensor([0.3])
    )
    ids = torch.tensor([[1, 4, 12, 0, -1]])
    p = torch.tensor([[0.5, 0.2, 0.1, 0.0, 0.0]]).log()
    assert torch.allclose(coarsened_kl(model, ids, p, torch.tensor([0.2])), plain)


def test_rounding_of_a_record_enters_in_second_order():
    q = torch.tensor([[0.5, 0.3, 0.2]]).log()
    rounded = torch.tensor([[0.5 * 1.001, 0.3 * 1.001]]).log()
    got = coarsened_kl(q, torch.tensor([[0, 1]]), rounded, torch.tensor([0.2])).item()
    assert abs(got) < 1e-6  # without the correction: 8e-4
