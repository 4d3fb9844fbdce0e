"""The losses that a spec asks for."""

from __future__ import annotations

from trainer.losses import JSD, CrossEntropy, ForwardKL, Loss, ReverseKL, SkewKL
from trainer.lossspec import JsdSpec, SkewSpec
from trainer.spec import DistillSpec


def make_losses(spec: DistillSpec) -> dict[str, Loss]:
    """The losses over distributions that ever count, by name; `hidden` is none of them."""
    made: dict[str, Loss] = {}
    for name, asked in spec.losses.used().items():
        if name == "ce":
            made[name] = CrossEntropy()
        elif name == "forward_kl":
            made[name] = ForwardKL(spec.temperature)
        elif name == "reverse_kl":
            made[name] = ReverseKL(spec.temperature)
        elif isinstance(asked, JsdSpec):
            made[name] = JSD(asked.beta, spec.temperature)
        elif isinstance(asked, SkewSpec):
            made[name] = SkewKL(asked.alpha, spec.temperature)
    return made
