"""Losses and their gradients against float64 autograd over the full vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.losses import CrossEntropy, ForwardKL, Target, make_losses

TOKENS, VOCAB = 23, 61


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - truth).norm() / truth.norm())


def target_of(teacher: Tensor, k: int, temperature: float, labels: Tensor | None = None) -> Target:
    """Records of float64 teacher logits [tokens, vocab], as a capture would make them."""
    log_p = torch.log_softmax(teacher.double(), dim=-1)
    kept, ids = log_p.topk(k, dim=-1)
    rest = log_p.scatter(1, ids, float("-inf"))
    tail = torch.logsumexp(rest / temperature, dim=-1)
    if labels is None:
        labels = torch.arange(len(teacher)) % teacher.shape[1]
    return Target(labels, ids, kept.float(), tail.float())


def coarsened_kl(logits: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    """T^2 KL of softmax(./T) over the teacher's k ids and one bucket for the rest: [tokens].

    In float64, by autograd, from the definition.
    """
    p = torch.softmax(teacher.double() / temperature, dim=-1)
    log_q = torch.log_softmax(logits.double() / temperature, dim=-1)
    ids = teacher.topk(k, dim=-1).indices
    rest = torch.ones_like(p, dtype=torch.bool).scatter(1, ids, False)
    kept_p, kept_log_q = p.gather(1, ids), log_q.gather(1, ids)
    value = (kept_p * (kept_p.log() - kept_log_q)).sum(dim=1)
    if k < p.shape[1]:
        tail_p = (p * rest).sum(dim=1)
        tail_log_q = torch.logsumexp(log_q.masked_fill(~rest, float("-inf")), dim=1)
        value = value + torch.where(tail_p > 0, tail_p * (tail_p.log() - tail_log_q), 0.0)
    return temperature**2 * value


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits, float32 and float64."""
    torch.manual_seed(2)
    return torch.randn(TOKENS, VOCAB) * 2, torch.randn(TOKENS, VOCAB, dtype=torch.float64) * 2


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("k", [1, 7, VOCAB])
def test_forward_kl_and_its_gradient(logits, k, temperature) -> None:
    student, teacher = logits
    exact = student.double().requires_grad_()
    truth = coarsened_kl(exact, teacher, k, temperature)
    truth.sum().backward()
    value, grad = ForwardKL(temperature).value_and_grad(
        student.clone(), target_of(teacher, k, temperature)
    )
    assert relative(value, truth.detach()) <= 1e-6
    assert exact.grad is not None
    assert relative(grad, exact.grad) <= 2e-6


def test_all_ids_kept_is_the_full_kl(logits) -> None:
    student, teacher = logits
    full = torch.nn.functional.kl_div(
        torch.log_softmax(student.double() / 2, dim=-1),
        torch.log_softmax(teacher / 2, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    value, _ = ForwardKL(2.0).value_and_grad(student.clone(), target_of(teacher, VOCAB, 2.0))
    assert relative(value, 4 * full) <= 1e-6


def test_cross_entropy_and_its_gradient(logits) -> None:
    student, _ = logits
    labels = torch.randint(VOCAB, (TOKENS,))
    exact = student.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    truth.sum().backward()
    value, grad = CrossEntropy().value_and_grad(student.clone(), Target(labels))
    assert relative(value, truth.detach()) <= 1e-6
    assert exact.grad is not None
    assert relative(grad, exact.grad) <= 1e-6


def test_the_teacher_against_itself_is_zero_with_no_gradient(logits) -> None:
    """Renormalizing only one side would leave a gradient at the very aim."""
    _, teacher = logits
    for temperature in (1.0, 2.0):
        target = target_of(teacher, 5, temperature)
        value, grad = ForwardKL(temperature).value_and_grad(teacher.float(), target)
        assert value.abs().max() < 1e-6
        assert grad.abs().max() < 1e-6


def test_truncated_targets_keep_a_tail(logits) -> None:
    """Without a tail, mass moved from the kept ids to the others would cost nothing or too much."""
    _, teacher = logits
    target = target_of(teacher, 5, 1.0)
    assert target.ids is not None
    for shift in (-2.0, 2.0):
        moved = teacher.float().scatter_add(1, target.ids, torch.full((TOKENS, 5), shift))
        value, grad = ForwardKL().value_and_grad(moved.clone(), target)
        assert value.min() > 0.01
        pull = grad.gather(1, target.ids).sum(dim=1)
        assert (pull * shift > 0).all()  # back to the teacher's mass, from both sides
        # The gradient moves mass, it makes none.
        assert grad.sum(dim=1).abs().max() < 1e-5


def test_probabilities_are_of_the_full_softmax_not_of_the_top_k(logits) -> None:
    """Top-k before softmax: a target whose kept probabilities sum to 1 is another loss."""
    student, teacher = logits
    target = target_of(teacher, 5, 1.0)
    assert target.log_probs is not None and target.log_tail is not None
    mass = target.log_probs.exp().sum(dim=1) + target.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones(TOKENS))
    mistaken = Target(
        target.labels,
        target.ids,
        torch.log_softmax(teacher.topk(5).values, dim=-1).float(),
        torch.full((TOKENS,), float("-inf")),
    )
    right, _ = ForwardKL().value_and_grad(student.clone(), target)
    wrong, _ = ForwardKL().value_and_grad(student.clone(), mistaken)
    truth = coarsened_kl(student, teacher, 5, 1.0)
    assert relative(right, truth) < 1e-6 < 0.1 < relative(wrong, truth)


def test_a_tail_of_another_temperature_is_another_loss(logits) -> None:
    """The tail mass at T = 1 alone does not give the tail at T = 2."""
    student, teacher = logits
    truth = coarsened_kl(student, teacher, 5, 2.0)
    right, _ = ForwardKL(2.0).value_and_grad(student.clone(), target_of(teacher, 5, 2.0))
    wrong, _ = ForwardKL(2.0).value_and_grad(student.clone(), target_of(teacher, 5, 1.0))
    assert relative(right, truth) < 1e-6 < 1e-2 < relative(wrong, truth)


def test_a_teacher_that_has_no_tail(logits) -> None:
    """0 log 0 is 0: minus infinity in the records must not become NaN."""
    student, teacher = logits
    teacher = teacher.scatter(1, teacher.topk(VOCAB - 5, largest=False).indices, float("-inf"))
    target = target_of(teacher, 5, 1.0)
    assert target.log_tail is not None and torch.isneginf(target.log_tail).all()
    value, grad = ForwardKL().value_and_grad(student.clone(), target)
    truth = coarsened_kl(student, teacher, 5, 1.0)
    assert relative(value, truth) <= 1e-6
    assert grad.isfinite().all()


def test_kept_ids_may_have_no_probability(logits) -> None:
    """A teacher that rules out more ids than are dropped."""
    student, teacher = logits
    ruled_out = teacher.topk(VOCAB - 5, largest=False).indices
    target = target_of(teacher.scatter(1, ruled_out, float("-inf")), 9, 1.0)
    assert target.log_probs is not None and torch.isneginf(target.log_probs[:, 5:]).all()
    value, grad = ForwardKL().value_and_grad(student.clone(), target)
    few = target_of(teacher.scatter(1, ruled_out, float("-inf")), 5, 1.0)
    expected, expected_grad = ForwardKL().value_and_grad(student.clone(), few)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


def ragged_rows(teacher: Tensor, temperature: float) -> tuple[list[Target], Target]:
    """Records of 1 to 9 ids per row, ascending: a target for each row alone, and one for all rows.

    Of some rows an id that is kept has no probability at all.
    """
    log_p = torch.log_softmax(teacher, dim=-1)
    rows = []
    for i, row in enumerate(log_p):
        count = 1 + i % 9
        ids = row.topk(count).indices.sort().values
        tail = row.scatter(0, ids, float("-inf"))
        kept = row[ids].clone()
        if i % 4 == 3:
            kept[i % count] = float("-inf")
        log_tail = torch.logsumexp(tail / temperature, dim=0)
        rows.append(Target(torch.zeros(1).long(), ids[None], kept[None], log_tail[None]))
    ids = torch.full((TOKENS, 9), -1)
    log_probs = torch.full((TOKENS, 9), float("-inf"), dtype=teacher.dtype)
    for i, row in enumerate(rows):
        assert row.ids is not None and row.log_probs is not None
        ids[i] = row.ids[0, 0]
        ids[i, : row.ids.shape[1]] = row.ids[0]
        log_probs[i, : row.ids.shape[1]] = row.log_probs[0]
    tails = torch.cat([row.log_tail for row in rows if row.log_tail is not None])
    return rows, Target(torch.zeros(TOKENS).long(), ids, log_probs, tails)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unused_slots_of_ragged_rows_change_nothing(logits, temperature) -> None:
    """They repeat an id that is kept: its mass must not count twice, nor its gradient be undone."""
    student, teacher = logits
    student = student.double()
    rows, together = ragged_rows(teacher, temperature)
    value, grad = ForwardKL(temperature).value_and_grad(student.clone(), together)
    assert grad.isfinite().all()
    for i, alone in enumerate(rows):
        row_value, row_grad = ForwardKL(temperature).value_and_grad(student[i : i + 1], alone)
        torch.testing.assert_close(value[i : i + 1], row_value, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(grad[i : i + 1], row_grad, rtol=1e-13, atol=1e-14)


def test_ragged_rows_with_ids_of_no_probability(logits) -> None:
    """Such an id is kept: the student's mass on it is no part of the tail's."""
    student, teacher = logits
    exact = student.double().requires_grad_()
    _, target = ragged_rows(teacher, 1.0)
    value, grad = ForwardKL().value_and_grad(student.double(), target)
    assert target.ids is not None and target.log_probs is not None and target.log_tail is not None
    truth = []
    log_q = torch.log_softmax(exact, dim=-1)
    for i in range(TOKENS):
        kept = target.ids[i, : 1 + i % 9]
        p = torch.cat([target.log_probs[i, : len(kept)], target.log_tail[i, None]]).exp()
        p = p / p.sum()  # the id without probability was taken away
        others = torch.ones(VOCAB, dtype=torch.bool)
        others[kept] = False
        buckets = torch.cat([log_q[i, kept], torch.logsumexp(log_q[i, others], 0)[None]])
        truth.append(torch.special.xlogy(p, p).sum() - (p * buckets).sum())
    total = torch.stack(truth)
    total.sum().backward()
    torch.testing.assert_close(value, total.detach())
    assert exact.grad is not None
    torch.testing.assert_close(grad, exact.grad)


def drawn(teacher: Tensor, draws: int, seed: int) -> Target:
    """Records of ids drawn from float64 teacher logits [tokens, vocab], as the cache gives them."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(torch.softmax(teacher, -1), draws, replacement=True, generator=noise)
    width = max(len(row.unique()) for row in ids)
    unique = torch.zeros(len(ids), width, dtype=torch.int64)
    log_probs = torch.full((len(ids), width), float("-inf"))
    for i, row in enumerate(ids):
        found, counts = row.unique(return_counts=True)
        unique[i] = found[0]
        unique[i, : len(found)] = found
        log_probs[i, : len(found)] = (counts / draws).log()
    tails = torch.full((len(ids),), float("-inf"))
    return Target(torch.zeros(len(ids)).long(), unique, log_probs, tails)


def test_the_gradient_of_drawn_ids_is_q_minus_their_share(logits) -> None:
    student, teacher = logits
    target = drawn(teacher, 12, 0)
    assert target.ids is not None and target.log_probs is not None
    share = torch.zeros(TOKENS, VOCAB, dtype=torch.float64)
    share.scatter_add_(1, target.ids, target.log_probs.double().exp())
    torch.testing.assert_close(share.sum(dim=1), torch.ones(TOKENS).double())
    value, grad = ForwardKL().value_and_grad(student.clone(), target)
    log_q = torch.log_softmax(student.double(), dim=-1)
    assert relative(grad, log_q.exp() - share) <= 1e-6
    truth = (torch.special.xlogy(share, share) - share * log_q).sum(dim=1)
    assert relative(value, truth) <= 1e-6


def test_drawn_ids_are_unbiased(logits) -> None:
    """Their mean gradient is the full KL's, within what chance allows; a cut tail's is not."""
    student, teacher = logits
    rounds, draws = 400, 10
    p, q = torch.softmax(teacher, -1), torch.softmax(student.double(), -1)
    many = drawn(teacher.repeat(rounds, 1), draws, 1)
    _, grad = ForwardKL().value_and_grad(student.repeat(rounds, 1), many)
    mean = grad.double().reshape(rounds, TOKENS, VOCAB).mean(dim=0)
    error = (p * (1 - p) / (draws * rounds)).sqrt()
    z = (mean - (q - p)) / error
    assert 0.9 < z.square().mean().sqrt() < 1.1
    cut = target_of(teacher, draws, 1.0)
    _, biased = ForwardKL().value_and_grad(
        student.clone(), Target(cut.labels, cut.ids, cut.log_probs, torch.full((TOKENS,), -1e9))
    )
    assert ((biased.double() - (q - p)) / error).square().mean().sqrt() > 3


def test_a_student_that_has_no_tail_gets_finite_numbers(logits) -> None:
    _, teacher = logits
    target = target_of(teacher, 5, 1.0)
    assert target.ids is not None
    student = torch.full((TOKENS, VOCAB), -300.0).scatter(1, target.ids, 50.0)
    value, grad = ForwardKL().value_and_grad(student, target)
    assert value.isfinite().all() and grad.isfinite().all()


def test_ids_that_do_not_exist_get_no_mass(logits) -> None:
    """A smaller vocabulary padded with logit 0 would give the padding a share of the mass."""
    student, teacher = logits
    padded = torch.cat([student, torch.full((TOKENS, 9), float("-inf"))], dim=1)
    zeros = torch.cat([student, torch.zeros(TOKENS, 9)], dim=1)
    target = target_of(teacher, 5, 1.0)
    for loss in (ForwardKL(), CrossEntropy()):
        value, grad = loss.value_and_grad(student.clone(), target)
        value_padded, grad_padded = loss.value_and_grad(padded.clone(), target)
        torch.testing.assert_close(value_padded, value)
        torch.testing.assert_close(grad_padded[:, :VOCAB], grad)
        assert not grad_padded[:, VOCAB:].any()
        value_zeros, _ = loss.value_and_grad(zeros.clone(), target)
        assert (value_zeros - value).abs().max() > 0.01


def test_large_logits_do_not_overflow(logits) -> None:
    student, teacher = logits
    for loss in (ForwardKL(2.0), CrossEntropy()):
        value, grad = loss.value_and_grad(student * 1e4, target_of(teacher * 30, 5, 2.0))
        assert value.isfinite().all() and grad.isfinite().all()


def test_the_gradients_size_does_not_follow_the_temperature(logits) -> None:
    """T squared (Hinton et al., 2015): without it T = 4 would train with a sixteenth."""
    student, teacher = logits
    norms = []
    for temperature in (8.0, 16.0):
        target = target_of(teacher, VOCAB, temperature)
        _, grad = ForwardKL(temperature).value_and_grad(student.clone(), target)
        norms.append(float(grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_losses_by_name() -> None:
    made = make_losses({"forward_kl": 0.7, "ce": 0.0}, 2.0)
    assert list(made) == ["forward_kl"] and made["forward_kl"][0] == 0.7
    assert made["forward_kl"][1].temperature == 2.0  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"unknown losses \['jsd'\]; may be \['ce', 'forward_kl'\]"
    ):
        make_losses({"jsd": 1.0}, 1.0)
    with pytest.raises(ValueError, match="needs the teacher's records"):
        ForwardKL().value_and_grad(torch.zeros(1, 4), Target(torch.zeros(1, dtype=torch.long)))
    assert math.isclose(make_losses({"ce": 2.0}, 1.0)["ce"][0], 2.0)
