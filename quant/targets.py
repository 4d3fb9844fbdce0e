"""Which weights of a model are quantized, each how. What does not fit is refused here, before a
weight is touched.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from quant.codes import BLOCK
from quant.quant_spec import CHANNEL, GroupSize, QuantSpec
from quant.unsupported import (
    LayersError,
    check_unsupported,
    inside,
    is_matrix,
    is_plain_linear,
    kept_modules,
    matches,
    unsupported_weights,
)
from trainer.models.load import meta_model


@dataclass(frozen=True)
class Embeddings:
    """table: looked up by token id. head: gives the logits. Each with all names of its module.

    Tables of positions or token types are no ends. tied: both hold the same parameter.
    """

    table: nn.Module | None
    table_names: tuple[str, ...]
    head: nn.Module | None
    head_names: tuple[str, ...]
    tied: bool

    @staticmethod
    def of(model: PreTrainedModel) -> Embeddings:
        """Those of a transformers model."""
        try:
            table = model.get_input_embeddings()
        except NotImplementedError:
            table = None
        head = model.get_output_embeddings()
        tied = _same(getattr(table, "weight", None), getattr(head, "weight", None))
        return Embeddings(table, _names(model, table), head, _names(model, head), tied)

    def kept(self, spec: QuantSpec) -> dict[str, str]:
        """Which of their names stay in 16 bits, and why."""
        kept = {} if spec.embeddings else dict.fromkeys(self.table_names, "embeddings=False")
        return kept | ({} if spec.head else dict.fromkeys(self.head_names, "head=False"))

    def check(self, model: PreTrainedModel, spec: QuantSpec) -> None:
        """Raise ValueError (one line) unless what `spec` asks for can be quantized."""
        kind = type(model).__name__
        if (spec.embeddings or (self.tied and spec.head)) and not _is_plain_table(self.table):
            tied = f", tied to its head {self.head_names[0]}" if self.tied else ""
            raise ValueError(
                f"embeddings of {kind} cannot be quantized: {_said(self.table_names, self.table)}"
                f"{tied}; only a plain torch.nn.Embedding can; leave it in 16 bits"
            )
        if self.tied and spec.embeddings != spec.head:
            asked, other = ("embeddings", "head") if spec.embeddings else ("head", "embeddings")
            raise ValueError(
                f"{asked} without {other}: {kind} ties its head {self.head_names[0]} to its "
                f"embeddings {self.table_names[0]}, one weight is both; ask for both or none"
            )
        if spec.head and not (self.head is not None and is_plain_linear(self.head)):
            raise ValueError(
                f"head of {kind} cannot be quantized: {_said(self.head_names, self.head)}; "
                "only a plain torch.nn.Linear can; leave it in 16 bits"
            )


def _is_plain_table(module: nn.Module | None) -> bool:
    """Whether the module looks rows up and does nothing else to them."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None  # renormalizes its own weight when it is called
    )


def _same(one: object, other: object) -> bool:
    """Whether two weights are one: the same parameter, or two of the same memory."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if one.is_meta or other.is_meta:  # no memory to compare
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _said(names: tuple[str, ...], module: nn.Module | None) -> str:
    if module is None:
        return "it has none"
    limit = getattr(module, "max_norm", None)
    with_norm = f" with max_norm {limit}" if limit is not None else ""
    return f"{names[0]} is of class {type(module).__name__}{with_norm}"


def _names(model: PreTrainedModel, module: nn.Module | None) -> tuple[str, ...]:
    """All names of a module in the model."""
    found = model.named_modules(remove_duplicate=False)
    return tuple(name for name, each in found if each is module and module is not None)


Layers = Mapping[str, QuantSpec | None]
Kind = Literal["linear", "conv1d", "embedding", "tied"]


@dataclass(frozen=True)
class Target:
    """A weight `[rows, columns]` that becomes codes by `spec`.

    kind: of its module; "conv1d" holds it transposed, "tied" is a table that is the head too.
    names: all names of the module, or of several that hold the same weight; the first counts.
    head_names: of a tied weight, those of the head.
    """

    kind: Kind
    names: tuple[str, ...]
    rows: int
    columns: int
    spec: QuantSpec
    head_names: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Targets:
    """layers: what is quantized, by its first name. kept: modules that stay in 16 bits, and why."""

    layers: dict[str, Target]
    kept: dict[str, str]


def find_targets(
    model: PreTrainedModel,
    spec: QuantSpec,
    layers: Layers | None = None,
) -> Targets:
    """What `spec` quantizes of the model: every linear layer (GPT-2's Conv1D too) but the head.

    `spec.head` and `spec.embeddings` add those. `layers`: module names or globs (they hold for all
    inside a module), each with a spec of its own or None to stay in 16 bits; the first that
    matches counts. Routers of experts and towers of other modalities stay in 16 bits. The model
    may be on the meta device.

    Raises LayersError (one line) for fused and unknown kinds of weights that are not listed in
    `layers` and for names of no layer; ValueError for one of two tied weights asked for without the
    other, embeddings with a forward of their own, group sizes that do not divide a row, and for no
    layer at all.
    """
    listed: Layers = layers or {}
    _check_layers(listed)
    io_embeddings = Embeddings.of(model)
    io_embeddings.check(model, spec)
    kept = kept_modules(model) | io_embeddings.kept(spec)
    candidates = _linears(model, io_embeddings, kept, spec) + _asked_embeddings(io_embeddings, spec)
    left = unsupported_weights(model, kept)
    _check_names(
        listed,
        [name for target in candidates for name in (*target.names, *target.head_names)],
        [item.name for item in left],
        kept,
    )
    found: dict[str, Target] = {}
    for target in candidates:
        own = _first(listed, (*target.names, *target.head_names), spec)
        if own is None:
            kept.update(dict.fromkeys((*target.names, *target.head_names), "listed as None"))
        else:
            found[target.names[0]] = replace(target, spec=own)
    refused = [item for item in left if _first(listed, (item.name,), spec) is not None]
    check_unsupported(model, refused)
    names = {item.name for item in refused}
    for item in left:
        kept[item.name] = "few" if item.name in names else "listed as None"
    if not found:
        what = "no layer besides those listed as None" if listed else "no linear layer"
        raise ValueError(f"{type(model).__name__} has {what}: nothing to quantize")
    _check_widths(found)
    for size in dict.fromkeys(target.spec.group_size for target in found.values()):
        _check_size(size, [target for target in found.values() if target.spec.group_size == size])
    return Targets(found, kept)


def check_group_size(
    config_or_model: PreTrainedConfig | PreTrainedModel,
    sizes: Iterable[GroupSize],
    embeddings: bool = False,
    head: bool = False,
    layers: Layers | None = None,
) -> None:
    """Raise ValueError (one line) unless each size divides the rows of all that is quantized.

    A transformers config is enough: the model is then built without weights. `layers` as in
    `find_targets`. Refuses too what that refuses.
    """
    model = meta_model(config_or_model)
    targets = find_targets(model, QuantSpec(8, CHANNEL, "hqq", embeddings, head), layers)
    for size in sizes:
        _check_size(size, list(targets.layers.values()))


def _linears(
    model: PreTrainedModel, io_embeddings: Embeddings, kept: Mapping[str, str], spec: QuantSpec
) -> list[Target]:
    """The linear layers besides the head. Those that hold the same weight and bias are one."""
    names: dict[tuple[int, int], list[str]] = {}
    modules: dict[tuple[int, int], nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_matrix(module) and module is not io_embeddings.head and not inside(name, kept):
            key = (id(module.weight), id(module.bias))
            names.setdefault(key, []).append(name)
            modules[key] = module
    targets = []
    for key, module in modules.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.shape
        if isinstance(module, nn.Linear):
            targets.append(Target("linear", tuple(names[key]), rows, columns, spec))
        else:
            targets.append(Target("conv1d", tuple(names[key]), columns, rows, spec))
    return targets


def _asked_embeddings(io_embeddings: Embeddings, spec: QuantSpec) -> list[Target]:
    """Embeddings and head as far as `spec` asks for them; tied, they are one weight."""
    targets = []
    if spec.embeddings:
        assert isinstance(io_embeddings.table, nn.Embedding)
        rows, columns = io_embeddings.table.weight.shape
        kind: Kind = "tied" if io_embeddings.tied else "embedding"
        heads = io_embeddings.head_names if io_embeddings.tied else ()
        targets.append(Target(kind, io_embeddings.table_names, rows, columns, spec, heads))
    if spec.head and not io_embeddings.tied:
        assert isinstance(io_embeddings.head, nn.Linear)
        rows, columns = io_embeddings.head.weight.shape
        targets.append(Target("linear", io_embeddings.head_names, rows, columns, spec))
    return targets


def _first(layers: Layers, names: Iterable[str], spec: QuantSpec) -> QuantSpec | None:
    """What the first entry of `layers` that matches one of `names` says; else `spec`."""
    names = tuple(names)
    for pattern, own in layers.items():
        if any(matches(pattern, name) for name in names):
            return own
    return spec


def _check_layers(layers: Layers) -> None:
    for pattern, own in layers.items():
        if not isinstance(pattern, str) or not (own is None or isinstance(own, QuantSpec)):
            raise LayersError(
                f"is {own!r}; may be a QuantSpec, or None to stay in 16 bits, by the name of a "
                "module or a glob",
                pattern,
            )


def _check_names(
    layers: Layers, targets: list[str], left: list[str], kept: Mapping[str, str]
) -> None:
    """Every entry of `layers` must match something, and something quantizable unless None."""
    for pattern, own in layers.items():
        if any(matches(pattern, name) for name in targets):
            continue
        other = next((name for name in (*left, *kept) if matches(pattern, name)), None)
        if other is None:
            names = list(dict.fromkeys([*targets, *left, *kept]))
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or names[:3]
            examples = ", ".join(close)
            raise LayersError(f"matches no layer; there are for example {examples}", pattern)
        if own is not None:
            why = kept.get(other, "cannot be quantized")
            raise LayersError(f"{other} is not quantized ({why}); may only be left so", pattern)


def _check_widths(found: Mapping[str, Target]) -> None:
    """Codes of every width are packed in blocks of `BLOCK`."""
    for name, target in found.items():
        if target.columns % BLOCK:
            glob = "*." + name.rpartition(".")[2]
            raise LayersError(
                f"layer {name} is {target.columns} weights wide, which is no multiple of {BLOCK}: "
                "no group size does; it can only stay in 16 bits,",
                keep=[glob],
            )


def _check_size(size: GroupSize, targets: list[Target]) -> None:
    """`size` must divide the rows of all `targets`."""
    if size == CHANNEL:
        return
    common = math.gcd(*(target.columns for target in targets))
    choices = [each for each in range(BLOCK, common + 1, BLOCK) if common % each == 0]
    for target in targets:
        if size < BLOCK or size % BLOCK or target.columns % size:
            raise ValueError(
                f"group_size {size} does not do for layer {target.names[0]}, which is "
                f"{target.columns} weights wide; for this model it may be "
                f"{', '.join(map(str, choices))} or {CHANNEL}"
            )
