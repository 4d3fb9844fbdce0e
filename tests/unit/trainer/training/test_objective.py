"""The losses that a spec asks for, and why draws cannot serve all of them."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.fixtures.loss_reference import (
    DEFINITIONS,
    TOKENS,
    VOCAB,
    drawn,
    exact,
    make_logits,
    relative,
    value_and_grad,
)
from trainer.losses.divergences import JSD, CrossEntropy, ForwardKL, ReverseKL, SkewKL
from trainer.spec.rules import NOT_LINEAR
from trainer.spec.sections import DistillSpec
from trainer.training.engine import make_losses


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits, float32 and float64."""
    return make_logits()


def test_losses_by_name() -> None:
    losses = {
        "forward_kl": 0.7,
        "reverse_kl": 0.1,
        "jsd": {"weight": 0.2, "beta": 0.3},
        "skew_kl": {"alpha": 0.4},
        "hidden": 0.5,
        "ce": 0.1,
    }
    made = make_losses(DistillSpec(mode="online", losses=losses, temperature=2.0))
    assert made == {
        "forward_kl": ForwardKL(2.0),
        "reverse_kl": ReverseKL(2.0),
        "jsd": JSD(0.3, 2.0),
        "skew_kl": SkewKL(0.4, 2.0),
        "ce": CrossEntropy(),
    }
    assert list(make_losses(DistillSpec(losses={"forward_kl": 0.7, "ce": 0}))) == ["forward_kl"]


def test_drawn_ids_bias_what_is_not_linear_in_the_teacher(logits) -> None:
    """Why the rules refuse them: the mean gradient over many draws is another one."""
    student, teacher = logits
    rounds = 2000
    many, repeated = drawn(teacher.repeat(rounds, 1), 10, 1), student.repeat(rounds, 1)
    for name, biased in {"forward_kl": False, "jsd": True, "skew_kl": True}.items():
        assert biased == (name in NOT_LINEAR)
        _, grad = value_and_grad(DEFINITIONS[name][0](1.0), repeated, many)
        mean = grad.double().reshape(rounds, TOKENS, VOCAB).mean(dim=0)
        off = relative(mean, exact(name, student, teacher, 1.0)[1])
        assert off > 0.2 if biased else off < 0.02
