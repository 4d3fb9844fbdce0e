"""Losses and their gradients against float64 autograd over the full vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fixtures.loss_reference import (
    DEFINITIONS,
    TOKENS,
    VOCAB,
    coarsened_kl,
    drawn,
    exact,
    make_logits,
    ragged_rows,
    relative,
    target_of,
    value_and_grad,
)
from trainer.losses.divergences import JSD, CrossEntropy, ForwardKL, ReverseKL, SkewKL, Target
from trainer.losses.softmax_grad import loss_and_gradient


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits, float32 and float64."""
    return make_logits()


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("k", [1, 7, VOCAB - 1])
def test_kept_ids_and_a_tail(logits, k, temperature, name) -> None:
    student, teacher = logits
    ids = teacher.topk(k).indices
    value, grad = value_and_grad(
        DEFINITIONS[name][0](temperature), student, target_of(teacher, k, temperature)
    )
    truth, true_grad = exact(name, student, teacher, temperature, ids)
    assert relative(value, truth) <= 1e-6
    assert relative(grad, true_grad) <= 2e-6


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_ids_of_a_dense_teacher_and_all_ids_kept(logits, temperature, name) -> None:
    """One and the same: a sparse target that keeps every id is the dense one."""
    student, teacher = logits
    loss = DEFINITIONS[name][0](temperature)
    truth, true_grad = exact(name, student, teacher, temperature)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    for target, dense in (
        (target_of(teacher, VOCAB, temperature), None),
        (Target(labels), teacher.clone()),
    ):
        value, grad = value_and_grad(loss, student, target, dense)
        assert relative(value, truth) <= 1e-6
        assert relative(grad, true_grad) <= 2e-6


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixes_share_a_softmax(logits, temperature, sparse) -> None:
    """Every loss and every share keeps its own, also with cross-entropy at its temperature of 1."""
    student, teacher = logits
    # Of the labels some are kept ids, and some are in the tail.
    target = target_of(teacher, 7, temperature)
    ids = target.ids if sparse else None
    weights = torch.linspace(0.1, 2.0, TOKENS)
    shares = {name: 0.3 + 0.2 * i for i, name in enumerate(DEFINITIONS)}
    losses = [(share, DEFINITIONS[name][0](temperature)) for name, share in shares.items()]
    values, grad = loss_and_gradient(
        student.clone(),
        target if sparse else Target(target.labels),
        None if sparse else teacher.float(),
        weights,
        [*losses, (0.8, CrossEntropy())],
        True,
    )
    own = student.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(own, target.labels, reduction="none")
    (truth,) = torch.autograd.grad(0.8 * ce.sum(), own)
    for found, (name, share) in zip(values, shares.items(), strict=False):
        value, part = exact(name, student, teacher, temperature, ids)
        assert relative(found, value) <= 1e-6
        truth = truth + share * part
    assert relative(values[-1], ce.detach()) <= 1e-6
    assert relative(grad, truth * weights.double().unsqueeze(1)) <= 2e-6


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(DEFINITIONS)),
    st.integers(1, 12),
    st.floats(0.1, 12.0),
    st.floats(0.1, 12.0),
    st.sampled_from([1.0, 2.0, 4.0]),
    st.integers(0, 2**31),
)
def test_any_sharpness_of_both(name, k, sharp, sharp_teacher, temperature, seed) -> None:
    """Peaked teachers, tails of next to nothing: in log space nothing is lost."""
    noise = torch.Generator().manual_seed(seed)
    student = torch.randn(5, 13, generator=noise) * sharp
    teacher = torch.randn(5, 13, generator=noise, dtype=torch.float64) * sharp_teacher
    target = target_of(teacher, k, temperature)
    value, grad = value_and_grad(DEFINITIONS[name][0](temperature), student, target)
    truth, true_grad = exact(name, student, teacher, temperature, target.ids)
    # Log-probabilities are rounded to float32: of a difference of two of them so much is lost.
    size = temperature**2 * 6e-8 * (student.abs().max() + teacher.abs().max())
    assert (value - truth).abs().max() <= 1e-6 * truth.abs().max() + 4 * size
    assert (grad - true_grad).norm() <= 2e-6 * true_grad.norm() + 8 * size


def test_limits(logits) -> None:
    """JSD over its smaller share tends to a KL, either way; skew KL without a skew is one."""
    student, teacher = logits
    target = target_of(teacher, 7, 1.0)
    forward = value_and_grad(ForwardKL(), student.double(), target)
    reverse = value_and_grad(ReverseKL(), student.double(), target)
    for loss, share, truth in (
        (JSD(1e-6), 1e-6, forward),
        (JSD(1 - 1e-6), 1e-6, reverse),
        (SkewKL(1e-7), 1.0, forward),
    ):
        for found, expected in zip(
            value_and_grad(loss, student.double(), target), truth, strict=True
        ):
            assert relative(found / share, expected) < 1e-3


@pytest.mark.parametrize("name", DEFINITIONS)
def test_what_the_teacher_rules_out_stays_finite(logits, name) -> None:
    """The reverse KL to an id without probability is infinite; no training survives that."""
    student, teacher = logits
    ruled_out = teacher.topk(VOCAB - 5, largest=False).indices
    target = target_of(teacher.scatter(1, ruled_out, float("-inf")), 9, 1.0)
    for own in (student, student * 40, teacher.float() * 40):
        value, grad = value_and_grad(DEFINITIONS[name][0](1.0), own, target)
        assert value.isfinite().all() and (value >= -1e-4).all() and grad.isfinite().all()


def test_cross_entropy_and_its_gradient(logits) -> None:
    student, _ = logits
    labels = torch.randint(VOCAB, (TOKENS,))
    exact = student.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    truth.sum().backward()
    value, grad = value_and_grad(CrossEntropy(), student.clone(), Target(labels))
    assert relative(value, truth.detach()) <= 1e-6
    assert exact.grad is not None
    assert relative(grad, exact.grad) <= 1e-6


def test_a_tail_of_another_temperature_is_another_loss(logits) -> None:
    """The tail mass at T = 1 alone does not give the tail at T = 2."""
    student, teacher = logits
    truth = coarsened_kl(student, teacher, 5, 2.0)
    right, _ = value_and_grad(ForwardKL(2.0), student.clone(), target_of(teacher, 5, 2.0))
    wrong, _ = value_and_grad(ForwardKL(2.0), student.clone(), target_of(teacher, 5, 1.0))
    assert relative(right, truth) < 1e-6 < 1e-2 < relative(wrong, truth)


def test_a_teacher_that_has_no_tail(logits) -> None:
    """0 log 0 is 0: minus infinity in the records must not become NaN."""
    student, teacher = logits
    teacher = teacher.scatter(1, teacher.topk(VOCAB - 5, largest=False).indices, float("-inf"))
    target = target_of(teacher, 5, 1.0)
    assert target.log_tail is not None and torch.isneginf(target.log_tail).all()
    value, grad = value_and_grad(ForwardKL(), student.clone(), target)
    truth = coarsened_kl(student, teacher, 5, 1.0)
    assert relative(value, truth) <= 1e-6
    assert grad.isfinite().all()


def test_kept_ids_may_have_no_probability(logits) -> None:
    """A teacher that rules out more ids than are dropped."""
    student, teacher = logits
    ruled_out = teacher.topk(VOCAB - 5, largest=False).indices
    target = target_of(teacher.scatter(1, ruled_out, float("-inf")), 9, 1.0)
    assert target.log_probs is not None and torch.isneginf(target.log_probs[:, 5:]).all()
    value, grad = value_and_grad(ForwardKL(), student.clone(), target)
    few = target_of(teacher.scatter(1, ruled_out, float("-inf")), 5, 1.0)
    expected, expected_grad = value_and_grad(ForwardKL(), student.clone(), few)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_unused_slots_of_ragged_rows_change_nothing(logits, temperature) -> None:
    """They repeat an id that is kept: its mass must not count twice, nor its gradient be undone."""
    student, teacher = logits
    student = student.double()
    rows, together = ragged_rows(teacher, temperature)
    value, grad = value_and_grad(ForwardKL(temperature), student.clone(), together)
    assert grad.isfinite().all()
    for i, alone in enumerate(rows):
        row_value, row_grad = value_and_grad(ForwardKL(temperature), student[i : i + 1], alone)
        torch.testing.assert_close(value[i : i + 1], row_value, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(grad[i : i + 1], row_grad, rtol=1e-13, atol=1e-14)


def test_ragged_rows_with_ids_of_no_probability(logits) -> None:
    """Such an id is kept: the student's mass on it is no part of the tail's."""
    student, teacher = logits
    exact = student.double().requires_grad_()
    _, target = ragged_rows(teacher, 1.0)
    value, grad = value_and_grad(ForwardKL(), student.double(), target)
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


def test_the_gradient_of_drawn_ids_is_q_minus_their_share(logits) -> None:
    student, teacher = logits
    target = drawn(teacher, 12, 0)
    assert target.ids is not None and target.log_probs is not None
    share = torch.zeros(TOKENS, VOCAB, dtype=torch.float64)
    share.scatter_add_(1, target.ids, target.log_probs.double().exp())
    torch.testing.assert_close(share.sum(dim=1), torch.ones(TOKENS).double())
    value, grad = value_and_grad(ForwardKL(), student.clone(), target)
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
    _, grad = value_and_grad(ForwardKL(), student.repeat(rounds, 1), many)
    mean = grad.double().reshape(rounds, TOKENS, VOCAB).mean(dim=0)
    error = (p * (1 - p) / (draws * rounds)).sqrt()
    z = (mean - (q - p)) / error
    assert 0.9 < z.square().mean().sqrt() < 1.1
    cut = target_of(teacher, draws, 1.0)
    _, biased = value_and_grad(
        ForwardKL(),
        student.clone(),
        Target(cut.labels, cut.ids, cut.log_probs, torch.full((TOKENS,), -1e9)),
    )
    assert ((biased.double() - (q - p)) / error).square().mean().sqrt() > 3


def test_a_student_that_has_no_tail_gets_finite_numbers(logits) -> None:
    _, teacher = logits
    target = target_of(teacher, 5, 1.0)
    assert target.ids is not None
    student = torch.full((TOKENS, VOCAB), -300.0).scatter(1, target.ids, 50.0)
    value, grad = value_and_grad(ForwardKL(), student, target)
    assert value.isfinite().all() and grad.isfinite().all()


def test_large_logits_do_not_overflow(logits) -> None:
    student, teacher = logits
    for loss in (ForwardKL(2.0), CrossEntropy()):
        value, grad = value_and_grad(loss, student * 1e4, target_of(teacher * 30, 5, 2.0))
        assert value.isfinite().all() and grad.isfinite().all()


def test_the_gradients_size_does_not_follow_the_temperature(logits) -> None:
    """T squared (Hinton et al., 2015): without it T = 4 would train with a sixteenth."""
    student, teacher = logits
    norms = []
    for temperature in (8.0, 16.0):
        target = target_of(teacher, VOCAB, temperature)
        _, grad = value_and_grad(ForwardKL(temperature), student.clone(), target)
        norms.append(float(grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
