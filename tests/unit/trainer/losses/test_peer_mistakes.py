"""One test for each mistake that other distillation code was seen to make.

Of those in the losses and the head the tests are here. The others are where their code is tested:

unshifted positions: test_loader.py, test_labels_are_the_next_tokens, test_positions_are_not_shifted
salted hash() as a key: test_pack.py, test_keys_are_those_of_every_other_process
averaging per micro-batch, by the weights that the loader makes: test_loader.py,
    test_weights_make_the_mean_over_tokens_whatever_the_split
the model behind the engine's back: system/test_training.py, test_two_workers_have_the_losses_of_one
    under ZeRO-3, where it holds no weights
ids fixed at 17 bits: test_codec.py, test_any_shape_of_row_comes_back
caches keyed by iteration order: test_logit_store.py, test_records_are_found_by_key_not_by_order
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.fixtures.loss_reference import (
    DEFINITIONS,
    TOKENS,
    VOCAB,
    coarsened_kl,
    exact,
    make_logits,
    relative,
    target_of,
    value_and_grad,
)
from trainer.losses.divergences import JSD, CrossEntropy, ForwardKL, Target
from trainer.losses.fused_linear import fused_loss
from trainer.models.head import Head


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits, float32 and float64."""
    return make_logits()


@pytest.mark.parametrize("name", ["ce", *DEFINITIONS])
def test_a_smaller_vocabulary_padded_with_logit_0(logits, name) -> None:
    """Rows of the head beyond the vocabulary have logit 0 here; they get no mass, and learn not."""
    student, teacher = logits
    target = target_of(teacher, 5, 1.0)
    loss = CrossEntropy() if name == "ce" else DEFINITIONS[name][0](1.0)
    found = []
    for padding in (0, 9):
        head = Head(torch.eye(VOCAB + padding, VOCAB).requires_grad_(), None, VOCAB)
        hidden = student.clone().requires_grad_()
        value, _ = fused_loss(hidden, head, target, torch.ones(TOKENS), {"it": (1.0, loss)})
        value.backward()
        assert head.weight.grad is not None and not head.weight.grad[VOCAB:].any()
        found.append((value.detach(), hidden.grad, head.weight.grad[:VOCAB]))
    for bare, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, bare, rtol=1e-6, atol=1e-6)
    zeros = torch.cat([student, torch.zeros(TOKENS, 9)], dim=1)
    mistaken, _ = value_and_grad(loss, zeros, target)
    assert float(mistaken.sum()) != pytest.approx(float(found[0][0]), rel=1e-3)


def test_a_teacher_with_more_rows_than_the_student() -> None:
    """152,064 and 151,936 rows of one tokenizer: neither's padding has any part."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 6), torch.randn(16, 6)
    teacher_hidden, teacher = torch.randn(7, 4), Head(torch.randn(24, 4), None, 13)
    target = Target(
        torch.zeros(7, dtype=torch.int64), teacher_hidden=teacher_hidden, teacher_head=teacher
    )
    for name, (make, _) in DEFINITIONS.items():
        losses = {name: (1.0, make(1.0))}
        found, _ = fused_loss(hidden, Head(weight, None, 13), target, torch.ones(7), losses)
        truth, _ = exact(
            name,
            (hidden.double() @ weight.double().T)[:, :13],
            (teacher_hidden.double() @ teacher.weight.double().T)[:, :13],
            1.0,
        )
        assert found.item() == pytest.approx(truth.sum().item(), rel=1e-6)


def test_averaging_per_micro_batch_instead_of_per_token(logits) -> None:
    """A micro-batch of few tokens has as little weight as they have, in loss and gradient."""
    student, teacher = logits
    target, head = target_of(teacher, 5, 1.0), Head(torch.eye(VOCAB), None, VOCAB)
    losses = {"forward_kl": (1.0, ForwardKL())}

    def run(tokens: slice, weight: float) -> tuple[Tensor, Tensor]:
        hidden = student[tokens].clone().requires_grad_()
        weights = torch.full((len(hidden),), weight)
        loss, _ = fused_loss(hidden, head, target.at(tokens), weights, losses)
        loss.backward()
        assert hidden.grad is not None
        return loss.detach(), hidden.grad

    whole, grad = run(slice(0, TOKENS), 1 / TOKENS)
    parts = [run(cut, 1 / TOKENS) for cut in (slice(0, 3), slice(3, TOKENS))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)
    means = [run(cut, 1 / count)[0] for cut, count in ((slice(0, 3), 3), (slice(3, TOKENS), 20))]
    assert abs(sum(means) / 2 - whole) > 0.01


def test_truncated_targets_without_a_tail(logits) -> None:
    """The best student of a target without one is certain of what was kept: overconfident."""
    _, teacher = logits
    target = target_of(teacher, 5, 1.0)
    assert target.ids is not None and target.log_tail is not None
    for shift in (-2.0, 2.0):
        moved = teacher.float().scatter_add(1, target.ids, torch.full((TOKENS, 5), shift))
        value, grad = value_and_grad(ForwardKL(), moved, target)
        assert value.min() > 0.01
        pull = grad.gather(1, target.ids).sum(dim=1)
        assert (pull * shift > 0).all()  # back to the teacher's mass, from both sides
        assert grad.sum(dim=1).abs().max() < 1e-5  # it moves mass, it makes none
    without = Target(
        target.labels, target.ids, target.log_probs, torch.full((TOKENS,), float("-inf"))
    )
    _, grad = value_and_grad(ForwardKL(), teacher.float(), without)
    tail = target.log_tail.exp()
    torch.testing.assert_close(grad.gather(1, target.ids).sum(dim=1), -tail, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [5, None])
def test_renormalizing_only_one_side(logits, name, temperature, k) -> None:
    """The teacher against itself is zero; with one side renormalized there is a gradient there."""
    _, teacher = logits
    target = target_of(teacher, k or 1, temperature)
    value, grad = value_and_grad(
        DEFINITIONS[name][0](temperature), teacher.float(), target, None if k else teacher.clone()
    )
    assert value.abs().max() < 2e-6
    assert grad.abs().max() < 2e-6


def test_log_sum_exp_in_bf16() -> None:
    """Exact bf16 logits, so that all that is left is the arithmetic after them."""
    torch.manual_seed(0)
    head = Head(torch.eye(VOCAB).bfloat16(), None, VOCAB)
    hidden = (torch.randn(TOKENS, VOCAB) * 3).bfloat16()
    labels = torch.randint(VOCAB, (TOKENS,))
    losses = {"ce": (1.0, CrossEntropy())}
    loss, _ = fused_loss(hidden, head, Target(labels), torch.ones(TOKENS), losses)
    truth = nn.functional.cross_entropy(hidden.double(), labels, reduction="sum")
    assert abs(loss.item() / truth.item() - 1) < 1e-6
    mistaken = -torch.log_softmax(hidden, dim=-1).gather(1, labels[:, None]).double().sum()
    assert abs(mistaken.item() / truth.item() - 1) > 1e-4


def test_top_k_before_softmax(logits) -> None:
    """A target whose kept probabilities sum to 1 is another loss."""
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
    right, _ = value_and_grad(ForwardKL(), student, target)
    wrong, _ = value_and_grad(ForwardKL(), student, mistaken)
    truth = coarsened_kl(student, teacher, 5, 1.0)
    assert relative(right, truth) < 1e-6 < 0.1 < relative(wrong, truth)


def test_falling_back_to_plain_cross_entropy_with_a_warning() -> None:
    """A loss to a teacher that is not there is an error."""
    hidden, head = torch.zeros(1, 2), Head(torch.zeros(4, 2), None, 4)
    target = Target(torch.zeros(1, dtype=torch.int64))
    for loss in (JSD(), ForwardKL()):
        with pytest.raises(ValueError, match="^kl needs the teacher's distributions"):
            fused_loss(
                hidden, head, target, torch.ones(1), {"ce": (1, CrossEntropy()), "kl": (1, loss)}
            )


@pytest.mark.parametrize("tokens", [3, 1000])
@pytest.mark.parametrize("share", [1.0, 0.001, 0.0])
def test_an_eval_loss_a_thousand_times_too_large(tokens, share) -> None:
    """The sums are of tokens and of nothing else: not of shares, chunks or the vocabulary.

    A student that knows nothing has ln V per token, and so has its KL to a teacher that is sure.
    """
    head, labels = Head(torch.zeros(VOCAB, 4), None, VOCAB), torch.arange(tokens) % VOCAB
    sure = Target(
        labels, labels[:, None], torch.zeros(tokens, 1), torch.full((tokens,), float("-inf"))
    )
    losses = {"ce": (share, CrossEntropy()), "forward_kl": (share, ForwardKL())}
    with torch.no_grad():
        loss, sums = fused_loss(torch.randn(tokens, 4), head, sure, torch.ones(tokens), losses)
    assert (sums / tokens).tolist() == pytest.approx([math.log(VOCAB)] * 2, rel=1e-6)
    assert loss.item() == pytest.approx(2 * share * tokens * math.log(VOCAB), rel=1e-6)
