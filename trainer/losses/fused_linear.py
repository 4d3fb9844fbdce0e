"""Output head and losses in one pass over chunks of tokens.

The logits of a chunk are made, turned into loss and gradient, and dropped, so no
[tokens, vocab] tensor exists; the gradients of hidden states and head come out of the same pass.
The idea is Liger Kernel's fused linear cross-entropy (Hsu et al., 2024); here over any mix of
losses of `trainer.losses.divergences`, against a dense or a sparse teacher.

A chunk is large, for the matrix products, and in the dtype of the weights; what comes between the
products runs in float32 on tiles of it, which on a CPU stay in the processor's cache. The
gradient of the logits takes the place of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer.losses.divergences import Loss, Target
from trainer.losses.softmax_grad import loss_and_gradient
from trainer.models.head import Head, head_of

__all__ = ["Head", "chunk_tokens", "fused_loss", "head_of"]

# Bytes of a chunk of logits, and elements of a float32 tile of it.
CPU_CHUNK, GPU_CHUNK = 16 << 20, 512 << 20
CPU_TILE, GPU_TILE = 1 << 19, 1 << 25
# Fewer tokens than this make slow matrix products, however large the vocabulary.
_FEWEST_TOKENS = 64
# The weight's gradient is summed in the weight's own dtype over so many chunks, in float32 over
# more. Every sum rounds once more: over 8 of them bfloat16 comes to about twice the error that it
# has anyway, and float32 would be twice the gradient's size on top of it. Rather are chunks made
# larger, up to half of what that would take.
_FEW_CHUNKS = 8
# Rows of the weight of which a product is added to a float32 gradient at once.
_BLOCK_ROWS = 8192


def chunk_tokens(rows: int, itemsize: int = 4, device: str = "cpu") -> int:
    """Tokens per chunk for a head of so many rows, whose logits take `itemsize` bytes each."""
    return max(_FEWEST_TOKENS, (CPU_CHUNK if device == "cpu" else GPU_CHUNK) // (rows * itemsize))


def fused_loss(
    hidden: Tensor,
    head: Head,
    target: Target,
    token_weights: Tensor,
    losses: Mapping[str, tuple[float, Loss]],
    tokens_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of losses over tokens, without ever holding all logits.

    hidden: [tokens, hidden]; target: see `Target`; token_weights: float32 [tokens], 0 = left out:
    nothing is computed of such tokens. Returns the loss (float32 scalar, differentiable once in
    hidden, head weight and bias): sum over tokens and losses of share x token weight x loss; and
    float64 [losses], each loss's own sum (not differentiable, shares left out). Without gradients
    (torch.no_grad, or nothing that requires them) none are computed. Raises ValueError if a loss
    needs a teacher and `target` has none, or one with another vocabulary.
    """
    for name, (_, loss) in losses.items():
        if loss.needs_teacher and not target.has_teacher:
            raise ValueError(f"{name} needs the teacher's distributions, and there are none")
    other = target.teacher_head
    if other is not None and other.vocab != head.vocab:
        raise ValueError(
            f"teacher of {other.vocab} ids, student of {head.vocab}; need equally many"
        )
    return _FusedLoss.apply(
        hidden,
        head.weight,
        head.bias,
        head,
        target,
        token_weights,
        list(losses.values()),
        tokens_per_chunk,
        torch.is_grad_enabled(),
    )


class _FusedLoss(torch.autograd.Function):
    """Sum over tokens of weight x loss; gradients are made in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        target: Target,
        token_weights: Tensor,
        losses: list[tuple[float, Loss]],
        tokens_per_chunk: int | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        counting = (token_weights > 0).nonzero().squeeze(1)
        size = tokens_per_chunk or _default_size(head, target, hidden, len(counting))
        chunks = list(_chunks(counting, len(hidden), size))
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        grads = _Gradients(hidden, head, needs, len(chunks))
        sums = torch.zeros(len(losses), dtype=torch.float64, device=hidden.device)
        for tokens in chunks:
            rows = hidden[tokens]
            product = head.product(rows)
            sums += _measure_chunk(
                product, head, target.at(tokens), token_weights[tokens], losses, any(needs)
            )
            if any(needs):
                grads.add(tokens, rows, product)
            del product  # or two chunks would be held while the next one is made
        ctx.save_for_backward(*grads.done())
        ctx.mark_non_differentiable(sums)
        total = sums.new_zeros(())
        for (share, _), value in zip(losses, sums, strict=True):
            total += share * value
        return total.float(), sums

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as a second gradient of the weight would double the memory: once only.
        found = [
            None if value is None else value.mul_(grads[0].to(value.dtype))
            for value in ctx.saved_tensors
        ]
        return *found, *[None] * 6


def _default_size(head: Head, target: Target, hidden: Tensor, counting: int) -> int:
    """Tokens per chunk, where `counting` of them count."""
    weight = head.weight
    logits = 1 if target.teacher_hidden is None else 2
    size = chunk_tokens(head.width, weight.element_size() * logits, hidden.device.type)
    if weight.requires_grad and weight.element_size() < 4:
        size = max(size, min(-(-counting // _FEW_CHUNKS), hidden.shape[1]))
    return size


def _chunks(counting: Tensor, total: int, size: int) -> Iterator[slice | Tensor]:
    """The tokens that count, in equal chunks of at most `size`: slices if all of them do."""
    parts = max(1, -(-len(counting) // size))
    step = max(1, -(-len(counting) // parts))
    for start in range(0, len(counting), step):
        if len(counting) == total:
            yield slice(start, min(start + step, total))
        else:
            yield counting[start : start + step]


def _measure_chunk(
    product: Tensor,
    head: Head,
    target: Target,
    weights: Tensor,
    losses: list[tuple[float, Loss]],
    needs_grad: bool,
) -> Tensor:
    """Float64 sums [losses] over a chunk; its `product` becomes the gradient of itself."""
    vocab, other, of_teacher = head.vocab, target.teacher_head, None
    if other is not None and any(loss.needs_teacher for _, loss in losses):
        assert target.teacher_hidden is not None
        of_teacher = other.product(target.teacher_hidden)
    step = max(1, (CPU_TILE if product.device.type == "cpu" else GPU_TILE) // vocab)
    sums = torch.zeros(len(losses), dtype=torch.float64, device=product.device)
    for start in range(0, len(product), step):
        tile = slice(start, start + step)
        logits, teacher = _working_copy(product[tile, :vocab]), None
        slope = head.finish_(logits, needs_grad)
        if of_teacher is not None and other is not None:
            teacher = _working_copy(of_teacher[tile, :vocab])
            other.finish_(teacher)
        values, grad = loss_and_gradient(
            logits, target.at(tile), teacher, weights[tile], losses, needs_grad
        )
        sums += (values * weights[tile]).sum(dim=1)
        if needs_grad:
            place = product[tile, :vocab]
            if head.back_(grad, slope).data_ptr() != place.data_ptr():
                place.copy_(grad)
    product[:, vocab:] = 0.0
    return sums


def _working_copy(tile: Tensor) -> Tensor:
    """Contiguous and at least float32: the tile itself where it is so."""
    return tile.to(torch.promote_types(tile.dtype, torch.float32)).contiguous()


class _Gradients:
    """Gradients of hidden states, weight and bias, added up chunk by chunk."""

    def __init__(self, hidden: Tensor, head: Head, needs: list[bool], chunks: int) -> None:
        of_hidden, of_weight, of_bias = needs
        self.head = head
        weight, bias = head.weight, head.bias
        self.hidden = torch.zeros_like(hidden) if of_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        sum_dtype = weight.dtype if chunks <= _FEW_CHUNKS else wide
        self.weight = torch.zeros_like(weight, dtype=sum_dtype) if of_weight else None
        self.bias = torch.zeros_like(bias, dtype=wide) if of_bias and bias is not None else None

    def add(self, tokens: slice | Tensor, rows: Tensor, grad: Tensor) -> None:
        """grad [n, width]: gradient of the product of hidden states `rows` [n, hidden]."""
        width = grad.shape[1]
        if self.hidden is not None:
            self.hidden[tokens] = grad @ self.head.weight[:width]
        if self.weight is not None and self.weight.dtype == grad.dtype:
            self.weight[:width].addmm_(grad.t(), rows)
        elif self.weight is not None:
            for start in range(0, width, _BLOCK_ROWS):
                block = slice(start, min(start + _BLOCK_ROWS, width))
                self.weight[block].add_(grad[:, block].t() @ rows)
        if self.bias is not None:
            self.bias[:width] += grad.sum(dim=0, dtype=self.bias.dtype)

    def done(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All three in the dtypes of what they are of; None for what was not asked."""
        weight, bias = self.weight, self.bias
        return (
            self.hidden,
            None if weight is None else weight.to(self.head.weight.dtype),
            None if bias is None or self.head.bias is None else bias.to(self.head.bias.dtype),
        )
