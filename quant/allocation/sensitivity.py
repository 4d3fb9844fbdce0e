"""What each option of each layer costs: the KL of the 16-bit model with that layer alone quantized.

Layers are judged by what the model says, never by the error of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.allocation.options import SIXTEEN_BYTES, Option, Options
from quant.evaluation.evaluate import Batch, evaluate
from quant.methods import quantize_weight
from quant.quant_spec import CHANNEL, QuantSpec
from quant.targets import Target, find_targets

if TYPE_CHECKING:
    from quant.evaluation.reference import StoredReference

Piece = tuple[str, Option]  # a layer, and how it is quantized
Losses = dict[tuple[str, str], dict[str, Any]]  # by layer and key of the option


def shards_of(options: Options, tasks: int) -> list[list[Piece]]:
    """The work of `sensitivity` in at most `tasks` parts of about the same length.

    A piece costs a pass over the data, which all weights of the model take part in, and quantizing
    its layer, which takes per weight about as long as that pass. Raises ValueError for no task.
    """
    if tasks < 1:
        raise ValueError(f"tasks is {tasks}; may be 1 or more")
    model = options.sixteen_bit // SIXTEEN_BYTES
    pieces = [
        (model + max(each.bytes for each in found if each.spec is None) // SIXTEEN_BYTES, name, one)
        for name, found in options.layers.items()
        for one in found
        if one.spec is not None
    ]
    parts: list[list[Piece]] = [[] for _ in range(min(tasks, len(pieces)))]
    costs = [0] * len(parts)
    for cost, name, option in sorted(pieces, key=lambda piece: -piece[0]):  # longest first
        least = costs.index(min(costs))
        parts[least].append((name, option))
        costs[least] += cost
    return parts


def sensitivity(
    model: PreTrainedModel,
    reference: PreTrainedModel | StoredReference,
    batches: Callable[[], Iterable[Batch]] | Sequence[Batch],
    pieces: Iterable[Piece],
    device: torch.device | str = "cpu",
    vocab: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Losses:
    """KL(reference || model) with one layer of `model` quantized at a time, for each of `pieces`.

    reference: what `evaluate` takes, of the 16-bit model: another instance of it, or its stored
    hidden states. batches: a list, or called for every pass. The layer's weight is replaced by its
    codes' values in the model's dtype: the numbers of a quantized model that is evaluated with
    dense weights. Afterwards the model is as it was, to the bit. progress: called with the number
    of the pass, how many there are, and the sequences that it has done.

    Returns {(layer, key of the option): {kl: mean over tokens, nats; sums: KL of each sequence;
    tokens: counted positions of each}}. An option with which the model's loss is not finite is
    left out: it cannot be chosen. Raises ValueError for a layer that the model does not have,
    RuntimeError naming a layer whose scales exceed float16.
    """
    if reference is model:
        raise ValueError("reference is the model itself, which is changed; load it a second time")
    model.to(torch.device(device))  # type: ignore[arg-type]
    found: Losses = {}
    work = [(name, option.key, option.spec) for name, option in pieces if option.spec is not None]
    targets = _targets(model, {name: spec for name, _, spec in work})
    for number, (name, key, spec) in enumerate(work):
        say = None if progress is None else partial(progress, number, len(work))
        with _quantized(model, targets[name], spec):
            data = batches() if callable(batches) else batches
            try:
                measured = evaluate(model, data, reference, None, device, vocab=vocab, progress=say)
            except FloatingPointError:
                continue
        each = measured["per_sequence"]
        found[name, key] = {
            "kl": measured["kl_to_reference"],
            "sums": list(each["kl_to_reference"]),
            "tokens": list(each["tokens"]),
        }
    return found


def _targets(model: PreTrainedModel, layers: dict[str, QuantSpec]) -> dict[str, Target]:
    """The weights of these layers. What else the model holds, quantizable or not, stays."""
    if not layers:
        return {}
    first = next(iter(layers.values()))
    base = QuantSpec(8, CHANNEL, first.method, first.embeddings, first.head)
    return find_targets(model, base, {**dict.fromkeys(layers, base), "*": None}).layers


@contextmanager
def _quantized(model: PreTrainedModel, target: Target, spec: QuantSpec) -> Iterator[None]:
    """Within the block a layer's weight is what its codes say; then it is what it was.

    Other memory is put in its place: the weight itself may lie in a file's mapping.
    """
    modules = [model.get_submodule(name) for name in (*target.names, *target.head_names)]
    weights = [module.weight for module in modules]
    parameters = [weight for weight in weights if isinstance(weight, Tensor)]
    before = parameters[0].data
    with torch.no_grad():
        weight = before.t() if target.kind == "conv1d" else before
        try:
            codes = quantize_weight(weight.contiguous(), spec.bits, spec.group_size, spec.method)
        except RuntimeError as error:
            raise RuntimeError(f"layer {target.names[0]}: {error}") from error
        dense = codes.dequantize(before.dtype)
        dense = dense.t().contiguous() if target.kind == "conv1d" else dense
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = dense
        yield
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data
