"""Feature distillation: hidden states of the student drawn to those of the teacher.

A pair (i, j) compares what layer i of the student hands to the next one with what layer j of the
teacher does: the residual stream after the layer, before any final norm. Where the widths differ,
a learnt linear map takes the student's states to the teacher's width (Romero et al., 2015, FitNets:
Hints for Thin Deep Nets, section 2.1); it is part of the training, never of the student.

Distances of one token's states s (student) and t (teacher):

    mse     |s - t|^2 / |t|^2    the mean squared difference over the teacher's mean square
    cosine  1 - s.t / (|s| |t|)

The mean square of the states grows with depth, often a hundredfold, and that of single tokens (the
first of a document above all) a thousandfold on top (Sun et al., 2024, Massive Activations in Large
Language Models). Without the division those few would be the whole loss, and its weight would mean
something else for every teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.spec.losses import HiddenSpec
from trainer.spec.sections import DistillSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KEY = "distill.losses.hidden.layers"
# Elements of a float32 chunk of states: 16 Mi = 64 MiB.
CHUNK_ELEMENTS = 1 << 24
# Mean squares of states below this count as this.
SMALLEST = 1e-12


@dataclass(frozen=True)
class HiddenPairs:
    """Which hidden states are compared: (student layer, teacher layer), from 0, and how."""

    pairs: tuple[tuple[int, int], ...]
    student_width: int
    teacher_width: int
    metric: str

    @property
    def student_layers(self) -> list[int]:
        return [student for student, _ in self.pairs]

    @property
    def teacher_layers(self) -> list[int]:
        return [teacher for _, teacher in self.pairs]


def hidden_pairs(
    spec: HiddenSpec | None, student_config: PreTrainedConfig, teacher_config: PreTrainedConfig
) -> HiddenPairs | None:
    """The layers that a spec pairs, of models with these transformers configs.

    None without a spec, and for one whose weight is always 0. Raises ValueError, one line, for
    layers that a model does not have.
    """
    if spec is None or not spec.counts:
        return None
    student, teacher = (config.get_text_config() for config in (student_config, teacher_config))
    depths = (int(student.num_hidden_layers), int(teacher.num_hidden_layers))
    pairs = same_share(*depths) if spec.layers == "auto" else list(spec.layers)
    for pair in pairs:
        if any(layer >= depth for layer, depth in zip(pair, depths, strict=True)):
            raise ValueError(
                f"{KEY}: got {list(pair)}; may be [student layer, teacher layer] from [0, 0] to "
                f"[{depths[0] - 1}, {depths[1] - 1}]: the student has {depths[0]} layers, the "
                f"teacher {depths[1]}"
            )
    return HiddenPairs(
        tuple((int(a), int(b)) for a, b in pairs),
        int(student.hidden_size),
        int(teacher.hidden_size),
        spec.metric,
    )


def hidden_faults(
    distill: DistillSpec, student_config: PreTrainedConfig, teacher_config: PreTrainedConfig
) -> list[str]:
    """One line per fault of `distill.losses.hidden` that the models' transformers configs tell."""
    try:
        hidden_pairs(distill.losses.hidden, student_config, teacher_config)
    except ValueError as error:
        return [str(error)]
    return []


def same_share(student: int, teacher: int) -> list[tuple[int, int]]:
    """Every student layer with the teacher's nearest at the same share of the depth; last with
    last."""
    # After layer i of n the share is (i + 1) / n; rounded half up, in whole numbers.
    return [
        (layer, max(0, (2 * (layer + 1) * teacher + student) // (2 * student) - 1))
        for layer in range(student)
    ]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a transformers model, in order.

    Raises ValueError, one line, for a model that keeps them where this version does not look.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"distill.losses.hidden: the {count} layers of {type(model).__name__} are not found by "
        "this version; use the losses over distributions alone"
    )


@contextmanager
def collected(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """What `layers` of a model give in the forward pass made inside: [batch, seq, width] by layer.

    By hooks, so that no other layer's states are kept. They go with the context: a layer that
    runs once more in the backward pass (activation checkpointing) is not collected again.
    """
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:  # noqa: ANN401
        def hook(module: nn.Module, inputs: object, output: Any) -> None:  # noqa: ANN401
            states[layer] = output[0] if isinstance(output, (tuple, list)) else output

        return hook

    wanted = sorted(set(layers))
    # Last of all hooks: under ZeRO-3 others put in what gathers the layer for its backward pass.
    blocks = blocks_of(model) if wanted else nn.ModuleList()
    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in wanted]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class HiddenLoss(nn.Module):
    """The distance of the paired states; holds the linear maps where the widths differ.

    The maps are drawn from `seed`, alike on all ranks, so that the size of the states stays.
    """

    def __init__(self, compared: HiddenPairs, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.pairs = compared
        self.maps = nn.ModuleList()
        if compared.student_width == compared.teacher_width:
            return
        draw = torch.Generator().manual_seed(seed)
        for _ in compared.pairs:
            shape = (compared.teacher_width, compared.student_width)
            weight = torch.randn(shape, generator=draw) * compared.student_width**-0.5
            linear = nn.Linear(
                compared.student_width, compared.teacher_width, bias=False, dtype=dtype
            )
            linear.weight.data.copy_(weight)
            self.maps.append(linear)

    def forward(
        self, states: Sequence[Tensor], wanted: Sequence[Tensor], token_weights: Tensor
    ) -> Tensor:
        """Sum over tokens of weight x mean distance over the pairs: float64 scalar.

        states: of the student, [batch, seq, width] for each pair; wanted: of the teacher, likewise.
        token_weights: float32 [batch * seq]; tokens of weight 0 may hold anything, also infinities.
        """
        left_out = (token_weights <= 0).unsqueeze(1)
        total = torch.zeros((), dtype=torch.float64, device=token_weights.device)
        for index, (own, other) in enumerate(zip(states, wanted, strict=True)):
            own = own.reshape(-1, own.shape[-1]).masked_fill(left_out, 0.0)
            if self.maps:
                own = self.maps[index](own)
            other = other.reshape(-1, other.shape[-1])
            total = total + _Distance.apply(own, other, token_weights, self.pairs.metric)
        return total / len(self.pairs.pairs)


class _Distance(torch.autograd.Function):
    """Sum over tokens of weight x distance; the states of tokens of weight 0 are numbers.

    The gradient is made in the forward pass, so that nothing of float32, and nothing of the
    teacher, is kept for the backward pass.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, states: Tensor, wanted: Tensor, token_weights: Tensor, metric: str
    ) -> Tensor:
        distance = {"mse": _relative, "cosine": _cosine}[metric]
        grad = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        step = max(16, CHUNK_ELEMENTS // states.shape[1])
        for start in range(0, states.shape[0], step):
            rows = slice(start, start + step)
            weights = token_weights[rows].unsqueeze(1)
            # What is left out has numbers put in its place, on both sides: 0 times them is 0.
            other = wanted[rows].float().masked_fill(weights <= 0, 1.0)
            value, slope = distance(states[rows].float(), other)
            total += (value * weights.squeeze(1)).double().sum()
            if grad is not None:
                grad[rows] = slope.mul_(weights).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return None if grad is None else grad * grads[0].to(grad.dtype), None, None, None


def _relative(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """|s - t|^2 / |t|^2 of each token [tokens], and its gradient in s [tokens, width]."""
    size = wanted.square().mean(dim=1).clamp_min_(SMALLEST) * wanted.shape[1]
    gap = states - wanted
    return gap.square().sum(dim=1) / size, gap.mul_((2 / size).unsqueeze(1))


def _cosine(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos(s, t) of each token [tokens], and its gradient in s [tokens, width]."""
    smallest = (SMALLEST * wanted.shape[1]) ** 0.5
    own = states.norm(dim=1, keepdim=True).clamp_min_(smallest)
    unit = states / own
    aim = wanted / wanted.norm(dim=1, keepdim=True).clamp_min_(smallest)
    cosine = (unit * aim).sum(dim=1, keepdim=True)
    return 1 - cosine.squeeze(1), unit.mul_(cosine).sub_(aim).div_(own)
