from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quant.evaluation.kl import Distribution, coarsened_kl, coarsened_kl_of, full_kl, kl_of


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


def distributions(*logits: torch.Tensor) -> list[Distribution]:
    return [Distribution.of(each) for each in logits]


def test_a_distribution_is_the_softmax_in_float64():
    logits = torch.randn(50, 3000) * 4 + 30
    logits[7, [5, 90]] = logits[7].max() + 1  # equal ones: the first is the likeliest
    found = Distribution.of(logits)
    exact = torch.log_softmax(logits.double(), -1)
    ids = torch.randint(0, 3000, (50, 9))
    torch.testing.assert_close(found.log_prob(ids), exact.gather(1, ids), rtol=0, atol=2e-6)
    assert torch.equal(found.top1, logits.argmax(-1)) and found.top1[7] == 5


@pytest.mark.parametrize("shift", [0.0, 50.0])
@pytest.mark.parametrize("step", [1e-2, 0.3, 3.0])
def test_kl_from_logits_is_as_near_to_float64_as_the_definition(step, shift):
    a = torch.randn(40, 2000) * 3
    b = a + torch.randn(40, 2000) * step + shift
    p, q = (torch.log_softmax(each.double(), -1) for each in (a, b))
    exact = (p.exp() * (p - q)).sum(1)
    found = kl_of(*distributions(a, b))
    assert found.dtype == torch.float64
    direct = full_kl(torch.log_softmax(a, -1), torch.log_softmax(b, -1))
    error, bound = (found - exact).abs().max(), (direct - exact).abs().max()
    rounding = 2.0**-24 * shift  # of a difference of logits that far apart
    assert error < max(2 * bound, 4e-7 + rounding)


def test_kl_from_equal_logits_is_exactly_zero():
    for logits in (torch.randn(30, 777) * 9, torch.randn(30, 777).bfloat16().float()):
        logits[3, 5:] = -torch.inf
        found = kl_of(*distributions(logits, logits.clone()))
        assert torch.equal(found, torch.zeros(30, dtype=torch.float64))


def test_kl_from_logits_of_minus_infinity():
    a = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 1.0, 2.0], [1.0, 2.0, -torch.inf]])
    b = torch.tensor([[2.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf], [2.0, 1.0, 0.0]])
    p, q = (torch.log_softmax(each.double(), -1) for each in (a, b))
    found = kl_of(*distributions(a, b))
    assert found[0].item() == pytest.approx((math.e - 1) / (math.e + 1), rel=1e-6)
    assert found[1] == torch.inf
    expected = (p[2, :2].exp() * (p[2] - q[2])[:2]).sum().item()
    assert found[2].item() == pytest.approx(expected, rel=1e-6)


def test_coarsened_kl_from_logits_is_the_definitions():
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(size=(8, 300)) * 3).float()
    teacher = torch.from_numpy(rng.normal(size=(8, 300)) * 3).log_softmax(-1).float()
    log_probs, ids = teacher.topk(12, dim=1)
    tail = 1 - log_probs.exp().sum(1)
    ids[1, 3], ids[2, 0], ids[2, 5] = 300, -1, 4096  # ids that the model does not have
    log_probs[3, 6:], ids[3, 6:] = -torch.inf, 0  # empty slots
    ids[4] += 1000  # none at all
    log_probs[5], tail[5] = -torch.inf, 1.0
    logits[6, ids[6]] += 200  # the other ids have no probability that float32 can hold
    logits[7] = -torch.inf
    logits[7, ids[7]], tail[7] = 1.0, 0.0  # nothing left on either side
    own = Distribution.of(logits)
    before = own.probability.clone()
    expected = coarsened_kl(torch.log_softmax(logits, -1).double(), ids, log_probs, tail)
    found = coarsened_kl_of(own, ids, log_probs, tail)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    assert torch.equal(own.probability, before) and expected[6] > 1 and found.isfinite().all()
    assert found[4].item() == pytest.approx(0, abs=1e-6)  # all mass in both tails


def test_coarsened_kl_from_logits_over_every_id_is_the_full_one():
    a, b = torch.randn(2, 6, 64) * 2
    ids = torch.arange(64).expand(6, 64)
    own, other = distributions(b, a)
    found = coarsened_kl_of(own, ids, torch.log_softmax(a, -1), torch.zeros(6))
    np.testing.assert_allclose(found, kl_of(other, own), rtol=1e-5, atol=1e-6)
